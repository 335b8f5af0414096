"""Describe a training: its request, and the job that its workers receive."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from data_prep.core.digest import sha256_file
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.lease import MISSED, Lease
from data_prep.core.manifest import StageRef, load_reference
from data_prep.core.paths import RUNS, TRAINING_LEASE
from data_prep.core.record import known_fields
from data_prep.core.stage import Request
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.model_store.weights_file import holds_weights
from dpnet.training.settings import LossSettings, ModelSettings, TrainSettings

# These settings do not change the trained weights, so they are not part of the request. (The
# weights that `init_from` names are part of it: by their hash.)
NOT_REQUESTED = {
    "accumulate", "activation_checkpointing", "max_skipped", "init_from", "checkpoint_every",
    "keep_checkpoints", "keep_best", "on_bad_sample", "loader_threads", "cache", "cache_gb",
    "workers", "min_workers", "max_failures", "gpus", "compile",
}  # fmt: skip


# How long training continues without storage, in seconds. Servers restart within minutes, and a
# stop costs the steps since the last checkpoint and the place in a cluster's queue.
PATIENCE_S = 600.0
# Interval of a training's leases. They expire when its patience ends and not before, because with
# shorter ones each short outage of storage would stop every training. The price: if a machine dies,
# another one resumes the run ten minutes later. On the same machine the next start sees at once
# that the owner has ended.
LEASE_INTERVAL_S = PATIENCE_S / MISSED


@dataclass(frozen=True)
class TrainRequest:
    """The network, losses, settings and data of one training.

    Attributes:
        name: Name of the experiment. The run's folder begins with it.
        images: The committed image shards to train on.
        masks: The committed mask shards to train on.
    """

    name: str
    images: StageRef
    masks: StageRef
    model: ModelSettings
    losses: LossSettings
    settings: TrainSettings


@dataclass(frozen=True)
class TrainJob:
    """Everything that a training worker needs, on any machine.

    Attributes:
        folder: Key of the run's folder under the root.
        asked: The requested settings and digests. Every checkpoint stores them.
        init: Store and folder of the generator to start from, or None.
        extends: Key of another run's checkpoint to start from, or None.
    """

    root: str
    folder: str
    images: StageRef
    masks: StageRef
    model: ModelSettings
    losses: LossSettings
    settings: TrainSettings
    asked: Mapping[str, Any]
    init: tuple[str, str] | None = None
    extends: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON values, for workers on other machines."""
        return {
            **asdict(self),
            "model": self.model.model_dump(),
            "losses": self.losses.model_dump(),
            "settings": self.settings.model_dump(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TrainJob:
        """Read a job from the values of `to_json`.

        Raises:
            PipelineError: another version wrote it, with a setting that this one does not have.
                Training without that setting would be another training.
        """
        try:
            init = record["init"]
            return cls(
                **{
                    **{name: value for name, value in record.items() if value is not None},
                    "images": StageRef(**known_fields(StageRef, record["images"])),
                    "masks": StageRef(**known_fields(StageRef, record["masks"])),
                    "model": ModelSettings(**record["model"]),
                    "losses": LossSettings(**record["losses"]),
                    "settings": TrainSettings(**record["settings"]),
                    "init": None if init is None else (init[0], init[1]),
                }
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (KeyError, TypeError) as error:
            reason = str(error)
        raise PipelineError(
            f"this training was described by another version of dpnet ({reason}): install the same"
            " version where the command runs and on the cluster."
        )


def plan_training(training: TrainRequest, store: Store) -> tuple[Request, TrainJob]:
    """Return the request of the train stage and the job of its workers."""
    losses = training.losses
    if losses.vgg_weights is not None:  # the workers run in other folders
        path = str(Path(losses.vgg_weights).expanduser().absolute())
        losses = losses.model_copy(update={"vgg_weights": path})
    init = find_initial(training.settings.init_from, store)
    check_network(init, training.model)
    request = stage_request(replace(training, losses=losses), init)
    job = TrainJob(
        root=store.uri,
        folder=request.folder,
        images=training.images,
        masks=training.masks,
        model=training.model,
        losses=losses,
        settings=training.settings,
        asked=requested(request),
        init=(init.store, init.folder) if init else None,
    )
    return request, job


def check_settings(settings: TrainSettings) -> None:
    """Raise ConfigError if the numbers of workers, samples and lanes contradict each other."""
    s = settings
    if s.min_workers is not None and s.min_workers > s.workers:
        raise ConfigError(
            f"train.min_workers is {s.min_workers} and train.workers is {s.workers}: lower"
            " train.min_workers to train.workers or less."
        )
    for option, most in (("batch_size", s.batch_size), ("lanes", s.lanes)):
        if s.workers > most:
            raise ConfigError(
                f"train.workers is {s.workers} and train.{option} is {most}, but each worker needs"
                f" at least one: raise train.{option} or lower train.workers."
            )


class Initial(NamedTuple):
    """The generator that a run starts from."""

    network: Mapping[str, Any]  # its config
    store: str  # URI; "pretrained" for the weights in the package, wherever that is installed
    folder: str
    sha256: str  # of its weights
    run: StageRef | None  # the run that made it, if that run is in this root
    state: str | None = None  # SHA-256 of the training state beside it, if there is one


def find_initial(reference: str | None, store: Store) -> Initial | None:
    """Find the generator that `train.init_from` names. Return None without a reference."""
    if reference is None:
        return None
    from dpnet.model_store.find_model import PRETRAINED, find_model
    from dpnet.model_store.layout import EXPORTED, RUN, TRAINING_STATE
    from dpnet.model_store.weights import read_config, training_state_sha256

    place, folder, _ = find_model(reference, store.uri)
    record, layout = read_config(place, folder)
    ref = state = None
    if place.uri == store.uri and layout == RUN:
        ref = load_reference(store, folder)
    if layout == EXPORTED and place.exists(f"{folder}/{TRAINING_STATE}"):
        state = training_state_sha256(record, f"{place.label}/{folder}")
    uri = PRETRAINED if reference == PRETRAINED else place.uri
    return Initial(record["model"], uri, folder, record["weights_sha256"], ref, state)


def check_network(init: Initial | None, model: ModelSettings) -> None:
    """Raise ConfigError if the generator to start from is another network than the config's."""
    if init is None:
        return
    from dpnet.model.config import ModelConfig, preset
    from dpnet.model_store.find_model import PACKAGED, PRETRAINED

    wanted = preset(model.preset, **model.model_dump(exclude={"preset"}))
    if ModelConfig.from_json(dict(init.network)) != wanted:
        name = PACKAGED if init.store == PRETRAINED else init.folder
        raise ConfigError(
            f"train.init_from names {name}, a network that differs from this config's: set the same"
            " preset and switches in `model`, or set train.init_from to null."
        )


def stage_request(training: TrainRequest, init: Initial | None = None) -> Request:
    """Return the request of the train stage. Its digest names the run's folder."""
    sources = {}
    inputs = {"images": training.images, "masks": training.masks}
    model = training.model.model_dump()
    if model["statistics"] == "own":
        del model["statistics"]  # so that a run from before version 0.3 is found again
    losses = training.losses.model_dump(exclude={"vgg_weights"})
    if training.losses.vgg_weights is None:
        losses |= {"perceptual": 0.0, "style": 0.0}
    else:
        check_vgg_file(training.losses)
        sources["vgg"] = sha256_file(Path(training.losses.vgg_weights).expanduser())
    if init is not None:
        sources["init"] = init.sha256
        if init.state is not None:
            sources["init_state"] = init.state
        if init.run is not None:
            inputs["init"] = init.run
    return Request(
        stage="train",
        name=training.name,
        top=RUNS,
        slug=f"{training.name}-",
        settings={
            "model": model,
            "losses": losses,
            "train": training.settings.model_dump(exclude=NOT_REQUESTED),
        },
        inputs=inputs,
        sources=sources,
    )


def requested(request: Request) -> dict[str, Any]:
    """Return the settings and digests of a run's request, as its checkpoints store them."""
    return {
        **request.settings,
        "content digest": {role: ref.content_digest for role, ref in request.inputs.items()},
        "sha256": dict(request.sources),
    }


def check_vgg_file(losses: LossSettings) -> None:
    """Raise ConfigError if `losses.vgg_weights` names a missing file, or one of another kind."""
    name = losses.vgg_weights
    if name is None:
        return
    if not Path(name).expanduser().is_file():
        raise ConfigError(
            f"losses.vgg_weights names {name!r}, which does not exist: make the file with"
            f" `{vgg_command(losses.vgg, name)}`, or leave the option out."
        )
    if not holds_weights(Path(name).expanduser()):
        raise ConfigError(
            f"losses.vgg_weights names {name!r}, which is not a file of weights (.safetensors, or"
            " .pth of torch.save), or is cut short: make it with"
            f" `{vgg_command(losses.vgg, name)}`, or leave the option out."
        )


def vgg_command(kind: str, file: str) -> str:
    """Return the command that makes a file of VGG weights. It needs torchvision and a network."""
    return (
        'python -c "import sys, torch, torchvision.models as m;'
        f" torch.save(m.{kind}(weights='DEFAULT').state_dict(), sys.argv[1])\""
        f" {shlex.quote(file)}"
    )


def training_lease(job: TrainJob) -> Lease:
    """Return the lease of the process that trains. It outlives the launcher's own.

    So a run whose launcher was killed is not trained by two processes at once.
    """
    key = f"{job.folder}/{TRAINING_LEASE}"
    return Lease(open_store(job.root), key, interval=LEASE_INTERVAL_S)


def is_finished(job: TrainJob, step: int, finished: str) -> bool:
    """Return whether a checkpoint at `step` ends the run.

    Args:
        job: The run.
        step: Steps done at the checkpoint.
        finished: Why training ended early there, or "".
    """
    return step == job.settings.steps or bool(finished)
