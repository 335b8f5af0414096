"""The register stage: make a trained model a version, champion or challenger.

People look at MLflow's registry. The pipeline reads the records in storage
(`registry/<model>/v<N>.json`), so inpainting needs no MLflow, and a lost MLflow database is
restored from them. `champion.json` is the record of the version in use. The gate decides whether
the version becomes champion; `dpnet/registry/promotion.py` writes that down.

One registration at a time holds the lease of the model. Each of its steps can be repeated. So a
registration that was killed resumes, and never creates a second version.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_prep.core.environment import MLFLOW_ADDRESS, is_mlflow_address
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.lease import Lease, confirm_leases
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.network_disk import refuse_network_disk
from data_prep.core.paths import (
    lease_key,
    mlflow_uri,
    registry_folder,
    version_key,
)
from data_prep.core.stage import Produced, Request, Work, find_committed, run_stage
from data_prep.core.storage.store import Store
from data_prep.shards.shards import write_file
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.model_store.history import MLFLOW, Change, find_champion
from dpnet.model_store.records import (
    AGAINST,
    CHALLENGER,
    CHAMPION,
    INPUTS,
    RECORD,
    read_records,
)
from dpnet.registry.card import card_facts, version_card
from dpnet.registry.compare import champion_figures, judge
from dpnet.registry.promotion import make_champion, settle
from dpnet.registry.settings import RegisterSettings
from dpnet.tracking.mlflow_database import mlflow_database

CARD = "README.md"

log = logging.getLogger(__name__)


def register(
    settings: RegisterSettings,
    run: StageRef,
    evaluation: StageRef,
    store: Store,
    against: StageRef | None = None,
    *,
    measure: EvaluateSettings | None = None,
) -> StageRef:
    """Register `run` as a version of the model, and as the champion if it is better.

    The version becomes champion if it passes the gate (`dpnet/registry/gate.py`) against the
    champion, or against the mean fill if there is no champion. Otherwise it becomes challenger. If
    the champion was evaluated on other pairs, it is evaluated again on those of `evaluation`.

    Args:
        settings: settings of the registry.
        run: the train stage.
        evaluation: the evaluation of `run`.
        store: the root.
        against: a newer evaluation of the champion, to compare with instead of its first one.
        measure: settings whose weights of metrics and threads an evaluation of the champion uses.
    """
    uri = tracking_uri(settings, store)
    request = _request(settings, run, evaluation, against)
    return run_stage(store, request, lambda work: _build(work, settings, uri, measure))


def find_registration(
    settings: RegisterSettings, run: StageRef, evaluation: StageRef, store: Store
) -> StageRef | None:
    """Return the stage that registered `run` by `evaluation`, or None if it is not committed."""
    return find_committed(store, _request(settings, run, evaluation, None))


def _request(
    settings: RegisterSettings, run: StageRef, evaluation: StageRef, against: StageRef | None
) -> Request:
    return Request(
        stage="register",
        name=settings.model,
        top=registry_folder(settings.model),
        settings=settings.requested(),  # MLflow's address does not change a version
        inputs={
            "run": run,
            "evaluation": evaluation,
            **({AGAINST: against} if against is not None else {}),
        },
    )


def check_tracking_uri(settings: RegisterSettings) -> None:
    """Raise ConfigError if `register.tracking_uri` has the form of no MLflow address."""
    if settings.tracking_uri and not is_mlflow_address(settings.tracking_uri):
        raise ConfigError(
            f"register.tracking_uri is {settings.tracking_uri!r}: it must be {MLFLOW_ADDRESS}."
        )


def tracking_uri(settings: RegisterSettings, store: Store) -> str:
    """Return MLflow's address.

    Raises:
        ConfigError: it has a wrong form, none is set and the root is on S3, or its database is on a
            network disk.
    """
    check_tracking_uri(settings)
    if given := settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        advice = "Set register.tracking_uri to a server or to a file on a disk of this machine"
        refuse_network_disk(given, "MLflow's database", advice)
        return given
    if database := mlflow_database(store):
        return mlflow_uri(database.parent)
    raise ConfigError(
        f"register.tracking_uri is not set and {store.label} cannot hold MLflow's database: set it,"
        " or MLFLOW_TRACKING_URI, to an MLflow server (http://…) or a database"
        " (sqlite:////path/mlflow.db)."
    )


def _build(
    work: Work, settings: RegisterSettings, uri: str, measure: EvaluateSettings | None
) -> Produced:
    from dpnet.tracking.mlflow_client import connect

    record = None
    while record is None:
        # An evaluation of the champion can take long, so it does not hold the model's lease.
        rival = _find_rival(work, settings, measure)
        lease = Lease(work.store, lease_key(work.request.top))
        with lease, connect(uri) as client:
            record = _register(work, settings, client, rival)
    names = ("model", "version", "alias", "reason", "hole_psnr")
    summary = {key: record[key] for key in names}
    if record.get("gate"):
        summary["gate"] = record["gate"]
    card = version_card(card_facts(work.store, record)).encode()
    files = [
        write_file(work, RECORD, _bytes(record)),
        write_file(work, CARD, card, content=False),  # a change of its words is no change
    ]
    return Produced(files, summary)


class _Rival(NamedTuple):
    """The champion that a new version is compared with.

    Attributes:
        champion: its record, or None if there is no champion.
        figures: its evaluation on the new version's pairs, or a sentence why there is none.
    """

    champion: Mapping[str, Any] | None
    figures: StageRef | str | None


def _find_rival(work: Work, settings: RegisterSettings, measure: EvaluateSettings | None) -> _Rival:
    """Return the champion, with figures that the gate can compare."""
    store, inputs = work.store, work.request.inputs
    champion = find_champion(store, settings.model)
    if champion is None or settings.promote != "gate" or _own_record(work, settings.model):
        return _Rival(champion, None)
    against = inputs.get(AGAINST)
    figures = champion_figures(store, champion, inputs["evaluation"], against, measure)
    return _Rival(champion, figures)


def _own_record(work: Work, model: str) -> dict[str, Any] | None:
    """Return the record that an earlier call of this registration wrote before it was killed."""
    found = read_records(work.store, model).values()
    return next((r for r in found if r["request_digest"] == work.request.digest), None)


def _register(
    work: Work, settings: RegisterSettings, client: Any, rival: _Rival
) -> dict[str, Any] | None:
    """Register the version. Return its record, or None if another version became champion.

    Args:
        work: the stage.
        settings: settings of the registry.
        client: MLflow's client.
        rival: the champion that the new version is compared with.
    """
    from dpnet.registry import mlflow_versions as mlflow

    store, model = work.store, settings.model
    entries = settle(store, model)
    deleted = mlflow.restore_versions(client, store, model, read_records(store, model))
    if entries and (named := mlflow.moved_alias(client, model, entries[-1])):
        if settings.mlflow_alias == "adopt" and named in read_records(store, model):
            why = f"The alias {CHAMPION} was moved to this version in MLflow."
            entries = make_champion(
                store, model, entries, Change(named, MLFLOW, why), "somebody in MLflow"
            )
            log.info("register: version %d is champion: its alias was set in MLflow.", named)
        else:
            mlflow.report_moved(store, model, named, entries[-1])
    if entries:
        mlflow.set_champion(client, model, entries[-1], deleted)
    record = _own_record(work, model)
    if record is None:
        champion = entries[-1].version if entries else None
        if champion != (rival.champion["version"] if rival.champion else None):
            return None
        new = _new_record(work, settings, rival)
        run, evaluation = (read_manifest(store, new[r]["folder"]) for r in INPUTS)
        confirm_leases()
        version = mlflow.ensure_version(client, store, model, new, run, evaluation)
        record = {"model": model, "version": version, **new}
        confirm_leases()
        _write_once(store, version_key(model, version), record)
        entries = settle(store, model)
    if record["alias"] == CHALLENGER:
        if record["champion_before"] == (entries[-1].version if entries else None) and (
            record["version"] not in deleted
        ):
            confirm_leases()
            client.set_registered_model_alias(model, CHALLENGER, str(record["version"]))
    elif entries:
        mlflow.set_champion(client, model, entries[-1], deleted)
    return record


def _new_record(work: Work, settings: RegisterSettings, rival: _Rival) -> dict[str, Any]:
    """Return the record of a new version without its number, times or absolute paths."""
    inputs = dict(work.request.inputs)
    summary = read_manifest(work.store, inputs["evaluation"].folder).summary
    better, reason, gate = _decide(work, settings, rival)
    if isinstance(rival.figures, StageRef):
        inputs[AGAINST] = rival.figures
    return {
        "alias": CHAMPION if better else CHALLENGER,
        "reason": reason,
        "champion_before": rival.champion["version"] if rival.champion else None,
        "hole_psnr": summary["hole_psnr"],
        "pairs_digest": summary["pairs_digest"],
        "promote": settings.promote,
        "gate": gate,
        "request_digest": work.request.digest,
        **{
            role: {
                "folder": ref.folder,
                "request_digest": ref.request_digest,
                "content_digest": ref.content_digest,
            }
            for role, ref in inputs.items()
        },
    }


def _decide(
    work: Work, settings: RegisterSettings, rival: _Rival
) -> tuple[bool, str, dict[str, Any] | None]:
    """Return whether the version becomes champion, the reason, and the gate's differences.

    The sentences are content of the record, so a change of a word changes its digest.
    """
    if settings.promote == "always":
        return True, "register.promote is always.", None
    if settings.promote == "never":
        return False, "register.promote is never.", None
    if isinstance(rival.figures, str):
        return False, rival.figures, None
    inputs = work.request.inputs
    decision = judge(work.store, inputs["run"], inputs["evaluation"], rival.champion, rival.figures)
    return decision.better, decision.reason, decision.to_json()


def _write_once(store: Store, key: str, record: Mapping[str, Any]) -> None:
    """Write a version's record, which never changes afterwards."""
    data = _bytes(record)
    # A write that is repeated after a lost answer finds its own bytes.
    if store.create(key, data) is None and store.read(key) != data:
        raise PipelineError(
            f"{store.label}/{key} belongs to another registration: run the same command again."
        )


def _bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"
