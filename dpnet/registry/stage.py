"""The register stage: make a trained model a version, champion or challenger.

People look at MLflow's registry. The pipeline reads the records in storage
(`registry/<model>/v<N>.json`), so inpainting needs no MLflow, and a lost MLflow database is
restored from them. `champion.json` is the record of the version in use.

One registration at a time holds the lease of the model. Each of its steps can be repeated. So a
registration that was killed resumes, and never creates a second version.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Mapping
from typing import Any

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.lease import Lease, confirm_leases
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.network_disk import refuse_network_disk
from data_prep.core.paths import (
    champion_key,
    lease_key,
    mlflow_uri,
    registry_folder,
    version_key,
)
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.shards.shards import write_file
from dpnet.model_store.records import (
    AGAINST,
    CHALLENGER,
    CHAMPION,
    INPUTS,
    RECORD,
    find_champion,
    read_records,
)
from dpnet.registry.settings import RegisterSettings
from dpnet.tracking.mlflow_database import mlflow_database

log = logging.getLogger(__name__)


def register(
    settings: RegisterSettings,
    run: StageRef,
    evaluation: StageRef,
    store: Store,
    against: StageRef | None = None,
) -> StageRef:
    """Register `run` as a version of the model, and as the champion if it is better.

    The version becomes champion if there is no champion, or if the champion was evaluated on the
    same pairs and has a lower hole PSNR (mean over the bins). Otherwise it becomes challenger.

    Args:
        settings: settings of the registry.
        run: the train stage.
        evaluation: the evaluation of `run`.
        store: the root.
        against: a new evaluation of the champion, to compare with instead of its first one.
    """
    uri = tracking_uri(settings, store)
    request = Request(
        stage="register",
        name=settings.model,
        top=registry_folder(settings.model),
        settings={"model": settings.model},  # MLflow's address does not change a version
        inputs={
            "run": run,
            "evaluation": evaluation,
            **({AGAINST: against} if against is not None else {}),
        },
    )
    return run_stage(store, request, lambda work: _build(work, settings.model, uri))


def tracking_uri(settings: RegisterSettings, store: Store) -> str:
    """Return MLflow's address.

    Raises:
        ConfigError: none is set and the root is on S3, or its database is on a network disk.
    """
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


def _build(work: Work, model: str, uri: str) -> Produced:
    from dpnet.registry import mlflow_versions as mlflow
    from dpnet.tracking.mlflow_client import connect

    store, top = work.store, work.request.top
    with Lease(store, lease_key(top)), connect(uri) as client:
        records = read_records(store, model)
        deleted = mlflow.restore_versions(client, store, model, records)
        champion = find_champion(store, model)
        if champion is not None and not store.exists(champion_key(model)):
            confirm_leases()
            _promote(client, store, champion, deleted)
            log.warning(
                "register: %s/%s was missing: version %d is champion again, as the records of the"
                " versions say.",
                store.label,
                champion_key(model),
                champion["version"],
            )
        mine = [r for r in records.values() if r["request_digest"] == work.request.digest]
        if champion is not None and not mine:  # a killed call may have set the alias before
            mlflow.keep_alias(client, store, champion, CHAMPION, deleted)
        if mine:  # an earlier call wrote it, and was killed afterwards
            record = mine[0]
        else:
            new = _new_record(work, champion)
            run, evaluation = (read_manifest(store, new[r]["folder"]) for r in INPUTS)
            confirm_leases()
            version = mlflow.ensure_version(client, store, model, new, run, evaluation)
            record = {"model": model, "version": version, **new}
            confirm_leases()
            _write_once(store, version_key(model, version), record)
        if record["champion_before"] == (champion["version"] if champion else None):
            confirm_leases()
            if record["alias"] == CHAMPION:
                _promote(client, store, record, deleted)
            elif record["version"] not in deleted:
                client.set_registered_model_alias(model, CHALLENGER, str(record["version"]))
    summary = {key: record[key] for key in ("model", "version", "alias", "reason", "hole_psnr")}
    return Produced([write_file(work, RECORD, _bytes(record))], summary)


def _promote(client: Any, store: Store, record: Mapping[str, Any], deleted: Container[int]) -> None:
    """Make the version of a record the champion, in storage and in MLflow.

    Args:
        client: MLflow's client.
        store: the root.
        record: the record of the version.
        deleted: the versions that were deleted in MLflow, which can have no alias.
    """
    if record["version"] not in deleted:
        client.set_registered_model_alias(record["model"], CHAMPION, str(record["version"]))
    store.write(champion_key(record["model"]), _bytes(record))


def _new_record(work: Work, champion: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the record of a new version without its number, times or absolute paths."""
    summary = read_manifest(work.store, work.request.inputs["evaluation"].folder).summary
    psnr, pairs = summary["hole_psnr"], summary["pairs_digest"]
    alias, reason = choose_alias(psnr, pairs, _with_new_figures(work, champion))
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


def _with_new_figures(work: Work, champion: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the champion with the figures of `against`, if there is such an evaluation.

    It is ignored if it is of a former champion: another version can become champion in between.
    """
    against = work.request.inputs.get(AGAINST)
    if champion is None or against is None:
        return champion
    manifest = read_manifest(work.store, against.folder)
    if manifest.inputs["run"].content_digest != champion["run"]["content_digest"]:
        return champion
    return {**champion, **{key: manifest.summary[key] for key in ("hole_psnr", "pairs_digest")}}


def choose_alias(psnr: float, pairs: str, champion: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return the alias of a new version, and the reason in one sentence.

    The sentences are content of the record, so a change of a word changes its digest.

    Args:
        psnr: the version's hole PSNR in dB.
        pairs: digest of the pairs.
        champion: the record of the champion, if there is one.
    """
    if champion is None:
        return CHAMPION, "It is the first version."
    name, its = f"version {champion['version']}", champion["hole_psnr"]
    if champion["pairs_digest"] != pairs:
        return CHALLENGER, f"The champion, {name}, was evaluated on other pairs: not comparable."
    # Compare the figures that people see: a gain that disappears by rounding does not count.
    if round(psnr, 2) > round(its, 2):
        return CHAMPION, f"Its hole PSNR of {psnr:.2f} dB is above the {its:.2f} dB of {name}."
    return CHALLENGER, f"Its hole PSNR of {psnr:.2f} dB is not above the {its:.2f} dB of {name}."


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
