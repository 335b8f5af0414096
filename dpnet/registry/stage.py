"""Register a trained model with its evaluation, and read the registry back from storage.

MLflow is the registry that people look at; `registry/<model>/v<N>.json` in storage is the copy that
the pipeline itself reads, so inpainting needs no MLflow and a lost MLflow database is made again
from it. `champion.json` is the record of the version that is in use.

One registration at a time holds the lease of the model. Its steps can each be repeated, so a run
that is killed between any two of them goes on where it stopped and never makes a second version.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.lease import Lease
from data_prep.core.manifest import StageRef, read_manifest
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

log = logging.getLogger(__name__)


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
        top=registry_folder(settings.model),
        settings={"model": settings.model},  # where MLflow runs changes no version
        inputs={
            "run": run,
            "evaluation": evaluation,
            **({AGAINST: against} if against is not None else {}),
        },
    )
    return run_stage(store, request, lambda work: _build(work, settings.model, uri))


def tracking_uri(settings: RegisterSettings, store: Store) -> str:
    """MLflow's address. Raises ConfigError where the root cannot hold the database."""
    if given := settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    if store.local_folder:
        return mlflow_uri(store.local_folder)
    raise ConfigError(
        f"register.tracking_uri is not set and {store.uri} cannot hold MLflow's database: set it,"
        " or MLFLOW_TRACKING_URI, to an MLflow server (http://…) or a database"
        " (sqlite:////path/mlflow.db)."
    )


def _build(work: Work, model: str, uri: str) -> Produced:
    from dpnet.registry import mlflow_versions as mlflow
    from dpnet.tracking.mlflow_client import connect

    store, top = work.store, work.request.top
    with Lease(store, lease_key(top)) as lease, connect(uri) as client:
        records = read_records(store, model)
        mlflow.restore_versions(client, store, model, records)
        crown = champion_key(model)
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
            _keep(store, version_key(model, version), record)
        if record["champion_before"] == (champion["version"] if champion else None):
            client.set_registered_model_alias(model, record["alias"], str(record["version"]))
            if record["alias"] == CHAMPION:
                store.write(crown, _bytes(record))
    summary = {key: record[key] for key in ("model", "version", "alias", "reason", "hole_psnr")}
    return Produced([write_file(work, RECORD, _bytes(record))], summary)


def _judged(work: Work, champion: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record of a version yet without its number: no times and no absolute paths in it."""
    summary = read_manifest(work.store, work.request.inputs["evaluation"].folder).summary
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
    if manifest.inputs["run"].content_digest != champion["run"]["content_digest"]:
        return champion
    return {**champion, **{key: manifest.summary[key] for key in ("hole_psnr", "pairs_digest")}}


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
