"""Register a trained model with its evaluation, and read the registry back from storage.

MLflow is the registry that people look at; `registry/<model>/v<N>.json` in storage is the copy that
the pipeline itself reads, so inpainting needs no MLflow and a lost MLflow database is made again
from it. `champion.json` is the record of the version that is in use.

One registration at a time holds the lease of the model. Its steps can each be repeated, so a run
that is killed between any two of them goes on where it stopped and never makes a second version.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.lease import Lease
from data_prep.core.progress import say
from data_prep.core.stage import Produced, Request, StageRef, Work, read_manifest, run_stage
from data_prep.core.storage.store import LocalStore, Store
from data_prep.shards.shards import write_file

CHAMPION, CHALLENGER = "champion", "challenger"
RECORD = "record.json"
INPUTS = ("run", "evaluation")
AGAINST = "against"  # a third input, where a new evaluation of the champion was compared with
_REFERENCE = re.compile(r"models:/([A-Za-z0-9][\w.-]*)(?:@(\w+)|/(\d+))")


class RegisterSettings(BaseModel):
    """Where and under which name a model is registered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "dpnet",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=80,
        description="Name in the registry: letters, digits, '_', '.' and '-'.",
    )
    tracking_uri: str | None = Field(
        None,
        description="MLflow's server or database; by default that of MLFLOW_TRACKING_URI, else"
        " ROOT/mlflow.db (SQLite).",
    )


def register(
    settings: RegisterSettings,
    run: StageRef,
    evaluation: StageRef,
    store: Store,
    against: StageRef | None = None,
) -> StageRef:
    """Make `run` a version of the model, and the champion if it beats the present one.

    The version becomes champion if there is none, or if the champion was evaluated on the same
    pairs and has a lower hole PSNR (the mean over bins); otherwise challenger. `against` is an
    evaluation of the champion that counts instead of the one that it was registered with.
    """
    uri = tracking_uri(settings, store)
    request = Request(
        stage="register",
        name=settings.model,
        top=f"registry/{settings.model}",
        settings={"model": settings.model},  # where MLflow runs changes no version
        inputs={
            "run": run,
            "evaluation": evaluation,
            **({AGAINST: against} if against is not None else {}),
        },
    )
    return run_stage(store, request, lambda work: _build(work, settings.model, uri), say)


def tracking_uri(settings: RegisterSettings, store: Store) -> str:
    """MLflow's address. Raises ConfigError where the root cannot hold the database."""
    if given := settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    if isinstance(store, LocalStore):
        return f"sqlite:///{store.folder}/mlflow.db"
    raise ConfigError(
        f"register.tracking_uri is not set and {store.uri} cannot hold MLflow's database: set it,"
        " or MLFLOW_TRACKING_URI, to an MLflow server (http://…) or a database"
        " (sqlite:////path/mlflow.db)."
    )


def find_record(store: Store, reference: str = "") -> dict[str, Any]:
    """The registry record that `reference` names, from storage.

    `reference` is `models:/NAME@champion`, `models:/NAME/VERSION`, or "" for the champion of the
    only model. Raises PipelineError if there is none.
    """
    if not reference:
        keys = [e.key for e in store.list("registry") if e.key.endswith(f"/{CHAMPION}.json")]
        if not keys:
            raise PipelineError(
                f"{store.uri} has no champion yet: run the pipeline there first, or name the root"
                " with --root, or a model with --model."
            )
        if len(keys) > 1:
            names = ", ".join(f"models:/{key.split('/')[1]}@{CHAMPION}" for key in keys)
            raise PipelineError(f"{store.uri} has several champions: choose one of {names}.")
        return _read_record(store, keys[0])
    match = _REFERENCE.fullmatch(reference)
    if match is None or match[2] not in (None, CHAMPION):
        raise PipelineError(
            f"{reference!r} is no model reference: write models:/NAME@{CHAMPION} or"
            " models:/NAME/VERSION."
        )
    name = CHAMPION if match[2] else f"v{int(match[3])}"
    key = f"registry/{match[1]}/{name}.json"
    if not store.exists(key):
        known = sorted(_records(store, match[1]))
        there = f"its versions are {', '.join(map(str, known))}" if known else "no such model"
        raise PipelineError(f"{store.uri} has no {reference}: {there}; check --root and the name.")
    return _read_record(store, key)


def find_champion(store: Store, model: str) -> dict[str, Any] | None:
    """The record of the model's champion; None where it has no version yet."""
    key = f"registry/{model}/{CHAMPION}.json"
    return _read_record(store, key) if store.exists(key) else None


def _read_record(store: Store, key: str) -> dict[str, Any]:
    try:
        record = json.loads(store.read(key))
        folder = record["run"]["folder"]
        if isinstance(folder, str) and isinstance(record["version"], int):
            return dict(record)
    except (ValueError, KeyError, TypeError):
        pass
    raise PipelineError(
        f"{store.uri}/{key} was altered: `dpnet verify` tells more; put the file back as it was."
    )


def _records(store: Store, model: str) -> dict[int, dict[str, Any]]:
    """Every version's record in storage."""
    keys = [e.key for e in store.list(f"registry/{model}")]
    found = [re.fullmatch(rf"registry/{re.escape(model)}/v(\d+)\.json", key) for key in keys]
    return {int(match[1]): _read_record(store, match[0]) for match in found if match}


def _build(work: Work, model: str, uri: str) -> Produced:
    from dpnet.registry import mlflow_versions as mlflow

    store, top = work.store, work.request.top
    with Lease(store, f"{top}/lease.json", waiting=say) as lease, mlflow.connect(uri) as client:
        records = _records(store, model)
        mlflow.restore_versions(client, store, model, records)
        crown = f"{top}/{CHAMPION}.json"
        champion = find_champion(store, model)
        mine = [r for r in records.values() if r["request_digest"] == work.request.digest]
        if mine:  # written by an earlier call, which was killed afterwards
            record = mine[0]
        else:
            judged = _judged(work, champion)
            run, evaluation = (read_manifest(store, judged[r]["folder"]) for r in INPUTS)
            version = mlflow.ensure_version(client, store, model, judged, run, evaluation)
            record = {"model": model, "version": version, **judged}
            lease.check()
            _keep(store, f"{top}/v{version}.json", record)
        if record["champion_before"] == (champion["version"] if champion else None):
            client.set_registered_model_alias(model, record["alias"], str(record["version"]))
            if record["alias"] == CHAMPION:
                store.write(crown, _bytes(record))
    summary = {key: record[key] for key in ("model", "version", "alias", "reason", "hole_psnr")}
    return Produced([write_file(work, RECORD, _bytes(record))], summary)


def _judged(work: Work, champion: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record of a version yet without its number: no times and no absolute paths in it."""
    summary = read_manifest(work.store, work.request.inputs["evaluation"].folder)["summary"]
    psnr, pairs = summary["hole_psnr"], summary["pairs_digest"]
    alias, reason = judge(psnr, pairs, _measured_again(work, champion))
    return {
        "alias": alias,
        "reason": reason,
        "champion_before": champion["version"] if champion else None,
        "hole_psnr": psnr,
        "pairs_digest": pairs,
        "request_digest": work.request.digest,
        **{
            role: {
                "folder": ref.folder,
                "request_digest": ref.request_digest,
                "content_digest": ref.content_digest,
            }
            for role, ref in work.request.inputs.items()
        },
    }


def _measured_again(work: Work, champion: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The champion with the figures of `against`, unless that is of one that was champion before:
    another may have been registered since it was evaluated."""
    against = work.request.inputs.get(AGAINST)
    if champion is None or against is None:
        return champion
    manifest = read_manifest(work.store, against.folder)
    if manifest["inputs"]["run"]["content_digest"] != champion["run"]["content_digest"]:
        return champion
    return {**champion, **{key: manifest["summary"][key] for key in ("hole_psnr", "pairs_digest")}}


def judge(psnr: float, pairs: str, champion: Mapping[str, Any] | None) -> tuple[str, str]:
    """The alias of a new version with hole PSNR `psnr` on `pairs`, and why, in one sentence."""
    if champion is None:
        return CHAMPION, "It is the first version."
    name, its = f"version {champion['version']}", champion["hole_psnr"]
    if champion["pairs_digest"] != pairs:
        return CHALLENGER, f"The champion, {name}, was evaluated on other pairs: not comparable."
    # By what people are shown: a gain that vanishes in rounding is none.
    if round(psnr, 2) > round(its, 2):
        return CHAMPION, f"Its hole PSNR of {psnr:.2f} dB is above the {its:.2f} dB of {name}."
    return CHALLENGER, f"Its hole PSNR of {psnr:.2f} dB is not above the {its:.2f} dB of {name}."


def _keep(store: Store, key: str, record: Mapping[str, Any]) -> None:
    """Write a version's record once and for all."""
    data = _bytes(record)
    # A put that is repeated after a lost answer finds its own bytes.
    if store.create(key, data) is None and store.read(key) != data:
        raise PipelineError(
            f"{store.uri}/{key} is another registration's: run the same command again."
        )


def _bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"
