"""Compare a new version with the champion: find or make the figures of both on the same pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import Manifest, StageRef, load_reference, read_manifest
from data_prep.core.paths import manifest_key, version_key
from data_prep.core.storage.store import Store
from dpnet.evaluation.settings import OF_THIS_MACHINE, EvaluateSettings
from dpnet.evaluation.stage import evaluate
from dpnet.model_store.layout import has_model

if TYPE_CHECKING:
    from dpnet.registry.gate import Decision, Scores

TABLE = "metrics.parquet"
_METRICS = ("hole_psnr", "ssim", "lpips")


def champion_figures(
    store: Store,
    champion: Mapping[str, Any],
    evaluation: StageRef,
    against: StageRef | None,
    measure: EvaluateSettings | None = None,
) -> StageRef | str:
    """Return an evaluation of the champion that can be compared with a new version's.

    If there is none on the same pairs and with the same definitions, the champion is evaluated
    again. This can take long.

    Args:
        store: the root.
        champion: the record of the champion.
        evaluation: the evaluation of the new version.
        against: an evaluation that may be of the champion.
        measure: settings whose weights of metrics and threads a new evaluation uses.

    Returns:
        The evaluation, or a sentence that says which files of the champion are gone.
    """
    wanted = read_manifest(store, evaluation.folder)
    _check_record(store, champion)
    candidates = [champion["evaluation"]["folder"]]
    if against is not None:
        candidates.insert(0, against.folder)
    for folder in candidates:
        if not store.exists(manifest_key(folder)):
            continue
        found = read_manifest(store, folder)
        if _is_of(found, champion) and _same_pairs(found, wanted):
            return _with_table(store, champion, load_reference(store, folder))
    name, run = f"version {champion['version']}", champion["run"]["folder"]
    if not (has_model(store, run) and store.exists(manifest_key(run))):
        return (
            f"The champion, {name}, was evaluated on other pairs, and its model in {run} is gone,"
            " so the two cannot be compared."
        )
    known = {k: v for k, v in wanted.settings.items() if k in EvaluateSettings.model_fields}
    try:
        settings = EvaluateSettings.model_validate(known)
        data = [load_reference(store, wanted.inputs[role].folder) for role in ("images", "masks")]
    except (ValueError, KeyError) as error:
        if isinstance(error, PipelineError):
            raise
        raise PipelineError(
            f"{store.label}/{manifest_key(evaluation.folder)} was altered: it does not say what was"
            " evaluated. Restore it, or delete its folder and run the same command again."
        ) from None
    if measure is not None:
        settings = settings.model_copy(update=measure.model_dump(include=OF_THIS_MACHINE))
    ref = evaluate(settings, data[0], data[1], load_reference(store, run), store)
    if not _same_pairs(read_manifest(store, ref.folder), wanted):
        return (
            f"The champion, {name}, was evaluated on other pairs: this version's evaluation was"
            " made by another version of dpnet, so evaluate it again."
        )
    return _with_table(store, champion, ref)


def _is_of(evaluation: Manifest, champion: Mapping[str, Any]) -> bool:
    """Return whether an evaluation is of the champion. Another can become champion in between."""
    run = evaluation.inputs.get("run")
    return run is not None and bool(run.content_digest == champion["run"]["content_digest"])


def _check_record(store: Store, champion: Mapping[str, Any]) -> None:
    """Raise PipelineError if the champion's record lacks what a comparison needs."""
    found = [champion["run"].get("content_digest")]
    evaluation = champion.get("evaluation")
    found.append(evaluation.get("folder") if isinstance(evaluation, Mapping) else None)
    if not all(isinstance(each, str) for each in found):
        key = version_key(str(champion.get("model")), champion["version"])
        raise PipelineError(
            f"{store.label}/{key} was altered: run `dpnet verify` for details, and restore the"
            " file."
        )


def _same_pairs(one: Manifest, other: Manifest) -> bool:
    """Return whether two evaluations measured the same pairs with the same definitions."""
    return bool(
        one.summary["pairs_digest"] == other.summary["pairs_digest"]
        and one.settings.get("protocol") == other.settings.get("protocol")
    )


def _with_table(store: Store, champion: Mapping[str, Any], ref: StageRef) -> StageRef | str:
    if store.exists(f"{ref.folder}/{TABLE}"):
        return ref
    return (
        f"The figures of the champion, version {champion['version']}, are gone from"
        f" {ref.folder}, so the two cannot be compared."
    )


def judge(
    store: Store,
    run: StageRef,
    evaluation: StageRef,
    champion: Mapping[str, Any] | None,
    figures: StageRef | None,
) -> Decision:
    """Return the decision of the gate. Without a champion, the mean fill takes its place.

    Args:
        store: the root.
        run: the train stage of the new version.
        evaluation: its evaluation.
        champion: the record of the champion, if there is one.
        figures: the evaluation of the champion on the same pairs.

    Raises:
        PipelineError: a table of figures is missing or was altered.
    """
    import numpy as np

    from dpnet.registry.gate import decide

    new = read_scores(store, evaluation.folder, "dpnet")
    if champion is not None and figures is not None:
        name, its = f"version {champion['version']}", champion["run"]["content_digest"]
        other = read_scores(store, figures.folder, "dpnet")
    else:
        name = its = "the mean fill"
        other = read_scores(store, evaluation.folder, "mean_fill")
    pairs = evaluation.summary["pairs_digest"]
    # The digests decide on the resamples, so the same comparison always has the same result.
    key = sha256_bytes(f"gate/{run.content_digest}/{its}/{pairs}".encode())
    rng = np.random.Generator(np.random.Philox(key=int(key[:32], 16)))
    try:
        return decide(new, other, name, rng)
    except ValueError:
        raise PipelineError(
            f"the tables of {evaluation.folder} and of the champion name different pairs although"
            " their digests are equal: run `dpnet verify` on the root, and restore the altered one."
        ) from None


def read_scores(store: Store, folder: str, method: str) -> Scores:
    """Read the figures of one method from the table of an evaluation.

    Raises:
        PipelineError: the table is missing or was altered.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from data_prep.shards.shards import read_table
    from dpnet.registry.gate import Scores

    advice = "Restore it, or delete its folder and run the same command again."
    key = f"{folder}/{TABLE}"
    try:
        data = store.read(key)
    except FileNotFoundError:
        raise PipelineError(f"{store.label}/{key} is missing. {advice}") from None
    hashes = {file.path: file.sha256 for file in read_manifest(store, folder).files}
    try:
        if hashes.get(TABLE) != sha256_bytes(data):
            raise ValueError
        table = read_table(data)
        rows = table.filter(pc.equal(table["method"], method))
        columns = {
            name: np.asarray(rows[name].cast(pa.float64()).to_numpy(), np.float64)
            for name in _METRICS
            if name in rows.column_names
        }
        names = (rows[name].to_pylist() for name in ("image", "mask"))
        return Scores(list(zip(*names, strict=True)), rows["ratio_bin"].to_pylist(), columns)
    except (ValueError, KeyError, TypeError, pa.ArrowException):
        raise PipelineError(f"{store.label}/{key} was altered. {advice}") from None
