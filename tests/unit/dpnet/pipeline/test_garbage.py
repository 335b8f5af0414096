"""`dpnet gc`: what is garbage, what is never deleted, and that a kill does no harm."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import small_root

from data_prep.core.errors import PipelineError
from data_prep.core.lease import Lease
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.cli import main as cli
from dpnet.pipeline import collect_garbage as collecting
from dpnet.pipeline.collect_garbage import Collection, collect_garbage
from dpnet.pipeline.garbage import (
    CHECKPOINTS,
    EVALUATIONS,
    LEFTOVERS,
    MARK,
    PICTURES,
    UNFINISHED,
    VERSIONS,
)
from dpnet.pipeline.verify import verify
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register

OLD = time.time() - 30 * 86_400
RUN = "runs/small-0123456789ab"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("os.fsync", lambda _: None)
    return LocalStore(tmp_path / "root")


def version(store: Any, number: int, parent: StageRef | None = None, **settings: Any) -> StageRef:
    """Commit a version of the dataset `mine`. Its stage has no shards that `verify` reads."""
    return small_root.commit(
        store,
        "data",
        "images/mine",
        {f"train-{number:06d}.tar": b"t" * 100 * number},
        settings={"number": number} | settings,
        inputs={"parent": parent} if parent else {},
        summary={"version": number},
    )


def finished_run(
    store: Any, images: StageRef, *, seed: int = 0, name: str = "small", **train: Any
) -> StageRef:
    """Commit a run of 10 steps, of which the last 2 are fine-tuning."""
    from data_prep.core.stage import Produced, Request, Work, run_stage
    from data_prep.shards.shards import write_file

    def build(work: Work) -> Produced:
        return Produced([write_file(work, "model/model.json", f"{name}{seed}".encode())], {})

    settings = {"train": {"steps": 10, "finetune_share": 0.2, "seed": seed} | train}
    request = Request("train", name, "runs", settings, {"images": images}, slug=f"{name}-")
    return run_stage(store, request, build)


def evaluated(store: Any, run: StageRef, *, seed: int = 0) -> StageRef:
    return small_root.commit(
        store,
        "evaluate",
        "evaluations",
        {"report.json": b"{}", "metrics.parquet": small_root.table(20.0)},
        settings={"seed": seed},
        inputs={"run": run},
        summary={"hole_psnr": 20.0, "pairs_digest": "p" * 64, "figures": {}},
    )


def checkpoint(store: Any, folder: str, name: str, **asked: str) -> None:
    mark = {"format": 1, "asked": {"content digest": asked}}
    store.write(f"{folder}/{name}/checkpoint.json", json.dumps(mark).encode())
    store.write(f"{folder}/{name}/state.pt", b"s" * 50)
    store.write(f"{folder}/{name}/log.jsonl", b"")


def make_old(store: LocalStore, folder: str = "") -> None:
    """Set the time of files to a month ago."""
    for path in (store.folder / folder).rglob("*"):
        if path.is_file():
            os.utime(path, (OLD, OLD))


def unfinished_run(store: Any, folder: str = RUN, **asked: str) -> None:
    store.write(f"{folder}/status.json", b"{}")
    store.write(f"{folder}/log/000000.jsonl", b"{}\n")
    checkpoint(store, folder, "step-00000100", **asked)


def found(result: Collection) -> dict[str, set[str]]:
    """Return the folders of the garbage by kind."""
    kinds: dict[str, set[str]] = {}
    for unit in result.findings.units:
        kinds.setdefault(unit.kind, set()).add(unit.folder)
    return kinds


def keys(store: Store) -> list[str]:
    return [entry.key for entry in store.list()]


def files(store: Store) -> dict[str, bytes]:
    """Return every object but leases, whose records S3 keeps after their release."""
    return {key: store.read(key) for key in keys(store) if "lease" not in key}


@pytest.fixture
def full(store: LocalStore) -> dict[str, StageRef]:
    """Fill a root with one thing of each kind, garbage and not."""
    return fill(store)


def fill(store: Any) -> dict[str, StageRef]:
    refs: dict[str, StageRef] = {}
    refs["unused 1"] = version(store, 1)
    refs["unused 2"] = version(store, 2, refs["unused 1"])
    refs["used 3"] = version(store, 3, size=2)
    refs["of registered 4"] = version(store, 4, size=3)
    refs["newest 5"] = version(store, 5, size=4)
    refs["old run"] = finished_run(store, refs["used 3"])
    refs["new run"] = finished_run(store, refs["used 3"], seed=1)
    refs["registered run"] = finished_run(store, refs["of registered 4"], name="other")
    for each in ("old run", "new run", "registered run"):
        refs[f"evaluation of {each}"] = evaluated(store, refs[each])
    for name in ("step-00000004", "step-00000008", "step-00000010"):
        checkpoint(store, refs["old run"].folder, name)
    store.write(f"{refs['used 3'].folder}/work/train-000000.parquet", b"w")
    unfinished_run(store)
    store.write("notes.txt", b"mine")
    store.write(f"{RUN}/notes.txt", b"mine")
    return refs


@pytest.fixture
def whole(full: dict[str, StageRef], store: LocalStore) -> dict[str, StageRef]:
    """Register the registered run, and let everything be old."""
    store.write("mlflow.db", small_root.new_database().data)
    refs = full
    settings = RegisterSettings(promote="always")
    register(settings, refs["registered run"], refs["evaluation of registered run"], store)
    # `created` has seconds only, so the digest may decide which run is the newest.
    rename_times(store, refs)
    make_old(store)
    return refs


def rename_times(store: LocalStore, refs: Mapping[str, StageRef]) -> None:
    """Let the new run be newer than the old one."""
    key = f"{refs['old run'].folder}/manifest.json"
    manifest = json.loads(store.read(key)) | {"created": "2020-01-01T00:00:00Z"}
    store.write(key, json.dumps(manifest, indent=1).encode())


# What is garbage.


def test_a_vote_is_known_and_never_garbage(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    small_root.champion(store)
    key = "registry/dpnet/votes/20260131T120000Z-0123abcd.json"
    store.write(key, b"{}")
    store.write("registry/dpnet/votes/other.txt", b"")
    result = collect_garbage(store, delete=True)
    assert store.exists(key)
    assert "registry/dpnet/votes/other.txt" in result.findings.unknown
    assert key not in result.findings.unknown
    assert not found(result).get(UNFINISHED)


def test_each_kind_of_garbage_is_found_and_nothing_else(
    whole: dict[str, StageRef], store: LocalStore
) -> None:
    result = collect_garbage(store)
    assert found(result) == {
        VERSIONS: {whole["unused 1"].folder, whole["unused 2"].folder},
        EVALUATIONS: {whole["evaluation of old run"].folder},
        CHECKPOINTS: {whole["old run"].folder},
        UNFINISHED: {RUN},
        LEFTOVERS: {whole["used 3"].folder},
    }
    assert result.findings.unknown == ["notes.txt", f"{RUN}/notes.txt"]
    assert result.findings.kept[VERSIONS, "used by a run"] == 1


def test_a_dry_run_changes_nothing_and_names_the_command(
    whole: dict[str, StageRef], store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(store)
    assert cli.main(["gc", str(store.folder)]) == 0
    text = capsys.readouterr().out
    assert files(store) == before
    assert f"dpnet gc {store.folder} --delete" in text
    assert "notes.txt" in text
    assert re.search(r"^kept +count  why$", text, re.MULTILINE)
    assert re.search(r"^dataset versions +1  used by a run$", text, re.MULTILINE)
    assert cli.main(["gc", "--root", str(store.folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"]
    assert not answer["deleted"]
    assert answer["bytes"] == sum(each["bytes"] for each in answer["garbage"]) > 0
    assert answer["kinds"][VERSIONS]["count"] == 2


def test_delete_removes_exactly_the_garbage_and_verify_stays_clean(
    whole: dict[str, StageRef], store: LocalStore
) -> None:
    before = files(store)
    result = collect_garbage(store, delete=True)
    gone = before.keys() - files(store).keys()
    assert gone == {key for unit in result.gone for key in unit.keys}
    assert result.size == sum(len(before[key]) for key in gone)
    assert not result.skipped
    assert files(store).keys() <= before.keys()
    assert verify(store).ok
    again = collect_garbage(store, delete=True)
    assert again.findings.units == []
    assert not (store.folder / whole["unused 1"].folder).exists()
    assert {path.name for path in (store.folder / RUN).iterdir()} <= {"notes.txt", ".lock"}


def test_a_longer_training_keeps_its_checkpoint(
    whole: dict[str, StageRef], store: LocalStore
) -> None:
    """It starts from the last one before fine-tuning, which begins at step 8 of 10."""
    collect_garbage(store, delete=True)
    run = whole["old run"].folder
    steps = {key.split("/")[2] for key in keys(store) if key.startswith(f"{run}/step-")}
    assert steps == {"step-00000008"}


def test_without_fine_tuning_the_checkpoint_before_the_last_step_is_kept_too(
    store: LocalStore,
) -> None:
    run = finished_run(store, version(store, 1), finetune_share=0.0)
    for name in ("step-00000004", "step-00000008", "step-00000010"):
        checkpoint(store, run.folder, name)
    (unit,) = collect_garbage(store).findings.units
    assert {key.split("/")[2] for key in unit.keys} == {"step-00000004"}


def test_checkpoints_that_a_manifest_lists_are_kept(store: LocalStore) -> None:
    files = {"step-00000001/state.pt": b"s", "step-00000001/checkpoint.json": b"{}"}
    settings = {"train": {"steps": 10, "finetune_share": 1.0}}
    small_root.commit(store, "train", "runs", files, settings=settings)
    assert collect_garbage(store).findings.units == []


def test_checkpoints_stay_while_a_training_of_the_name_runs(
    whole: dict[str, StageRef], store: LocalStore
) -> None:
    with Lease(store, "runs/small-aaaaaaaaaaaa/lease.json"):
        result = collect_garbage(store)
    assert CHECKPOINTS not in found(result)


def test_an_evaluation_whose_run_is_gone_is_garbage(store: LocalStore) -> None:
    run = finished_run(store, version(store, 1))
    evaluation = evaluated(store, run)
    for key in keys(store):
        if key.startswith(run.folder):
            store.delete(key)
    assert found(collect_garbage(store, delete=True)) == {EVALUATIONS: {evaluation.folder}}
    assert verify(store).ok


def test_a_version_stays_while_any_stage_runs(
    whole: dict[str, StageRef], store: LocalStore
) -> None:
    """What a running stage reads is recorded only when it ends."""
    with Lease(store, "runs/x-aaaaaaaaaaaa/lease-training.json"):
        result = collect_garbage(store)
    assert VERSIONS not in found(result)
    assert EVALUATIONS not in found(result)


def test_a_version_that_an_unfinished_run_was_asked_to_read_is_kept(store: LocalStore) -> None:
    old = version(store, 1)
    version(store, 2, size=2)
    unfinished_run(store, images=old.content_digest)
    assert found(collect_garbage(store)) == {}
    make_old(store, RUN)
    assert found(collect_garbage(store)) == {UNFINISHED: {RUN}, VERSIONS: {old.folder}}


def test_the_parents_of_the_newest_version_are_kept(store: LocalStore) -> None:
    version(store, 2, version(store, 1))
    assert found(collect_garbage(store)) == {}


def test_what_a_started_retrain_planned_is_kept(store: LocalStore) -> None:
    old = version(store, 1)
    version(store, 2, size=2)
    plan = {"champion": None, "images": old.folder}
    store.write("retrains/dpnet/0123456789ab/plan.json", json.dumps(plan).encode())
    assert found(collect_garbage(store)) == {}


def test_what_only_the_history_names_is_kept(store: LocalStore) -> None:
    """The history names the photos of each champion, whatever became of its run."""
    from dataclasses import replace

    from dpnet.model_store.history import read_history

    store.write("mlflow.db", small_root.new_database().data)
    old = version(store, 1)
    version(store, 2, size=2)
    run, evaluation = small_root.run_and_evaluation(store, 20.0)
    register(RegisterSettings(promote="always"), run, evaluation, store)
    (entry,) = read_history(store, "dpnet")
    made = entry.made_from | {"images": {"folder": old.folder}}
    store.write("registry/dpnet/history/000001.json", replace(entry, made_from=made).to_bytes())
    assert found(collect_garbage(store)) == {}


@pytest.mark.parametrize("days", [3.0, 40.0])
def test_an_unfinished_run_is_garbage_only_after_the_given_age(
    store: LocalStore, days: float
) -> None:
    version(store, 1)
    unfinished_run(store)
    make_old(store)
    assert (UNFINISHED in found(collect_garbage(store, days))) == (days == 3.0)


@pytest.mark.parametrize("name", ["lease.json", "lease-training.json"])
def test_an_unfinished_run_stays_while_its_lease_is_held(store: LocalStore, name: str) -> None:
    unfinished_run(store)
    make_old(store)
    with Lease(store, f"{RUN}/{name}"):
        assert found(collect_garbage(store, 0)) == {}
    assert found(collect_garbage(store, 0)) == {UNFINISHED: {RUN}}


def test_a_lease_of_a_killed_process_of_this_machine_is_not_held(store: LocalStore) -> None:
    unfinished_run(store)
    make_old(store)
    with Lease(store, f"{RUN}/lease.json"):
        record = json.loads(store.read(f"{RUN}/lease.json"))
    record |= {"pid": 2**22 + 1, "owner": "x"}
    store.write(f"{RUN}/lease.json", json.dumps(record).encode())
    assert collect_garbage(store, 0, delete=True).gone
    assert keys(store) == []


def test_temporary_files_of_killed_writers_are_garbage(store: LocalStore) -> None:
    version(store, 1)
    fresh, old = "images/mine/.staged-x-1-2-ab", "images/.probe-abcd"
    empty = store.folder / "images/empty"
    empty.mkdir()
    store.folder.joinpath(fresh).write_bytes(b"1")
    store.folder.joinpath(old).write_bytes(b"")
    os.utime(store.folder / old, (OLD, OLD))
    result = collect_garbage(store, delete=True)
    assert [unit.keys for unit in result.gone] == [(old,)]
    assert store.folder.joinpath(fresh).exists()
    assert empty.exists()


def test_pictures_of_runs_that_mlflow_does_not_have_are_garbage(store: LocalStore) -> None:
    version(store, 1)
    known, gone = ("a" * 32, "b" * 32)
    paths = [f"mlflow-artifacts/{run}/artifacts/pictures/1.png" for run in (known, gone)]
    for path in paths:
        store.write(path, b"png")
    make_old(store)
    assert found(collect_garbage(store)) == {}  # there is no MLflow
    store.write("mlflow.db", b"broken")
    assert found(collect_garbage(store)) == {}
    store.write("mlflow.db", small_root.new_database().data)
    with closing(sqlite3.connect(store.folder / "mlflow.db")) as database, database:
        database.execute("INSERT INTO runs (run_uuid) VALUES (?)", (known,))
    assert found(collect_garbage(store, delete=True)) == {PICTURES: {paths[1].rpartition("/")[0]}}
    assert [path for path in paths if store.exists(path)] == [paths[0]]


def test_after_gc_the_stages_of_a_registered_version_are_skipped(store: LocalStore) -> None:
    """A version with `--repack` refers to no older one, so those of no run can go."""
    from data_prep.images.settings import ImagesSettings
    from data_prep.images.stage import prepare_images
    from data_prep.masks.settings import MasksSettings
    from data_prep.masks.stage import prepare_masks

    store.write("mlflow.db", small_root.new_database().data)
    first, masks = small_root.real_data(store, eval_per_bin=1)
    source = store.folder / "photos"
    small_root.photographs(source / "more", 2)
    images = ImagesSettings(source=str(source), name="small", size=32, val=0.1, test=0.4)
    child = prepare_images(images, store)
    small_root.photographs(source / "other", 1)
    repacked = prepare_images(images, store, repack=True)
    run = small_root.trained(store, images=repacked, masks=masks)
    evaluation = evaluated(store, run)
    settings = RegisterSettings(promote="always")
    version_1 = register(settings, run, evaluation, store)
    result = collect_garbage(store, delete=True)
    assert found(result) == {VERSIONS: {first.folder, child.folder}}
    assert verify(store).problems == []
    again = [
        prepare_images(images, store),
        prepare_masks(MasksSettings(name="small", size=32, train=4, eval_per_bin=1), store),
        small_root.trained(store, images=repacked, masks=masks),
        register(settings, run, evaluation, store),
    ]
    assert [each.skipped for each in again] == [True] * 4
    assert [each.folder for each in again] == [
        repacked.folder, masks.folder, run.folder, version_1.folder
    ]  # fmt: skip


# What ends gc.


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("{old run}/manifest.json", {"settings": {"train": {"steps": 11}}}),
        ("{newest 5}/manifest.json", {"format": 7}),
        ("registry/dpnet/v1.json", {"reason": "other"}),
        ("registry/dpnet/history/000001.json", {"version": 2}),
    ],
)
def test_a_damaged_record_ends_gc_with_one_sentence(
    whole: dict[str, StageRef], store: LocalStore, key: str, change: dict[str, Any]
) -> None:
    key = key.format_map({name: ref.folder for name, ref in whole.items()})
    before = json.loads(store.read(key))
    store.write(key, json.dumps(before | change).encode())
    expected = files(store)
    with pytest.raises(PipelineError, match=r"nothing is deleted, because .*dpnet verify"):
        collect_garbage(store, delete=True)
    assert files(store) == expected


def test_a_lost_manifest_ends_gc(whole: dict[str, StageRef], store: LocalStore) -> None:
    store.delete(f"{whole['used 3'].folder}/manifest.json")
    with pytest.raises(PipelineError, match="is missing, and runs/"):
        collect_garbage(store, delete=True)


def test_a_link_to_another_folder_ends_gc(
    whole: dict[str, StageRef], store: LocalStore, tmp_path: Path
) -> None:
    (store.folder / "registry").rename(tmp_path / "elsewhere")
    (store.folder / "registry").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PipelineError, match="is a link"):
        collect_garbage(store, delete=True)


def test_a_folder_that_is_no_root_ends_gc(store: LocalStore) -> None:
    with pytest.raises(PipelineError, match="does not exist"):
        collect_garbage(store)
    store.write("photo.png", b"p")
    with pytest.raises(PipelineError, match="contains no stage"):
        collect_garbage(store)


# Kills, and stages that start meanwhile.


class Killed(BaseException):
    """The end of the process."""


class Fragile:
    """A store whose process is killed at a deletion or a write of gc's mark."""

    def __init__(self, store: Store, last: int) -> None:
        self._store, self._left = store, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self, key: str) -> None:
        self._step()
        self._store.delete(key)

    def write(self, key: str, data: bytes) -> None:
        self._step()
        self._store.write(key, data)

    def _step(self) -> None:
        if self._left == 0:
            raise Killed
        self._left -= 1


def kill_everywhere(make: Any) -> Iterator[int]:
    """Kill gc at every deletion in turn, on a new root each time, and check what follows."""
    whole = make()
    collect_garbage(whole, delete=True)
    expected = files(whole)
    for last in range(1000):
        root = make()
        try:
            collect_garbage(Fragile(root, last), delete=True)  # type: ignore[arg-type]
            assert last > 10
            return
        except Killed:
            pass
        assert verify(root).problems == []
        collect_garbage(root, delete=True)
        assert files(root) == expected
        assert verify(root).ok
        yield last


def test_gc_finishes_what_a_kill_at_any_deletion_left(
    whole: dict[str, StageRef], store: LocalStore, tmp_path: Path
) -> None:
    import shutil

    def make() -> LocalStore:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(store.folder, tmp_path / "copy")
        return LocalStore(tmp_path / "copy")

    assert len(list(kill_everywhere(make))) > 20


def test_gc_finishes_what_a_kill_left_of_young_stages(store: LocalStore, tmp_path: Path) -> None:
    """The files of the deleted version are new, so only the mark says that it was garbage."""

    def make() -> LocalStore:
        root = LocalStore(tmp_path / str(time.monotonic_ns()))
        version(root, 2, version(root, 1))
        version(root, 3, size=2)
        # The times of writing are in every manifest.
        for key in keys(root):
            if key.endswith("manifest.json"):
                body = json.loads(root.read(key)) | {"created": "", "seconds": 0.0}
                root.write(key, json.dumps(body, indent=1).encode())
        return root

    for last in (1, 2, 3, 4):
        root = make()
        with pytest.raises(Killed):
            collect_garbage(Fragile(root, last), delete=True)  # type: ignore[arg-type]
        assert verify(root).ok
        collect_garbage(root, delete=True)
        assert len(keys(root)) == 2  # the newest version


def test_a_stage_that_started_again_after_an_interrupted_gc_is_not_garbage(
    store: LocalStore,
) -> None:
    version(store, 1)
    unfinished_run(store)
    store.write(f"{RUN}/{MARK}", b"{}")
    assert found(collect_garbage(store)) == {UNFINISHED: {RUN}}
    later = time.time() + 5
    os.utime(store.folder / RUN / "status.json", (later, later))
    assert found(collect_garbage(store)) == {}


def test_what_came_into_use_meanwhile_is_not_deleted(
    whole: dict[str, StageRef], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of the unused version is committed after the first look."""

    def commit_first(units: Any) -> Any:
        finished_run(store, whole["unused 2"], name="late")
        return batches(units)

    batches = collecting._batches
    monkeypatch.setattr(collecting, "_batches", commit_first)
    result = collect_garbage(store, delete=True)
    assert {folder for kind, folder in result.skipped if kind == VERSIONS} == {
        whole["unused 1"].folder,
        whole["unused 2"].folder,
    }
    assert verify(store).ok
    assert store.exists(f"{whole['unused 1'].folder}/manifest.json")


def test_an_unfinished_run_that_is_written_meanwhile_is_not_deleted(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_first(units: Any) -> Any:
        store.write(f"{RUN}/status.json", b"{}")
        return batches(units)

    unfinished_run(store)
    make_old(store)
    batches = collecting._batches
    monkeypatch.setattr(collecting, "_batches", write_first)
    result = collect_garbage(store, delete=True)
    assert result.skipped == [(UNFINISHED, RUN)]
    assert store.exists(f"{RUN}/step-00000100/state.pt")
    assert f"in use now: {RUN}" in result.as_text()


def test_the_parent_of_a_skipped_version_is_not_deleted(
    whole: dict[str, StageRef], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease of the child was held for a moment only, so the second look does not show it."""

    class Refused(Lease):
        def __enter__(self) -> Lease:
            return self if child in self.key else super().__enter__()

    child = whole["unused 2"].folder
    monkeypatch.setattr(collecting, "Lease", Refused)
    result = collect_garbage(store, delete=True)
    assert result.skipped == [(VERSIONS, child), (VERSIONS, whole["unused 1"].folder)]
    assert verify(store).ok


def test_a_lease_that_is_renewed_meanwhile_keeps_its_folder(
    whole: dict[str, StageRef], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_first(units: Any) -> Any:
        lease.__enter__()
        return batches(units)

    lease = Lease(store, f"{RUN}/lease.json", interval=0.4)
    batches = collecting._batches
    monkeypatch.setattr(collecting, "_batches", start_first)
    try:
        result = collect_garbage(store, delete=True)
    finally:
        lease.__exit__(None, None, None)
    assert (UNFINISHED, RUN) in result.skipped
    assert store.exists(f"{RUN}/status.json")


# On S3.


@pytest.mark.integration
@pytest.mark.slow
def test_gc_on_s3(moto_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = open_store(moto_root)
    refs = fill(store)
    before = files(store)
    result = collect_garbage(store, 0.0, delete=True)
    assert VERSIONS in found(result)
    assert UNFINISHED in found(result)
    gone = before.keys() - files(store).keys()
    assert gone == {key for unit in result.gone for key in unit.keys}
    assert f"{refs['newest 5'].folder}/manifest.json" in files(store)
    assert verify(store).ok
    again = collect_garbage(store, 0.0, delete=True)
    assert again.findings.units == []


@pytest.mark.integration
@pytest.mark.slow
def test_a_kill_on_s3_is_finished_by_the_next_gc(
    moto_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for last in (1, 3):
        store = open_store(f"{moto_root}/{last}")
        version(store, 2, version(store, 1))
        newest = version(store, 3, size=2)
        with pytest.raises(Killed):
            collect_garbage(Fragile(store, last), delete=True)  # type: ignore[arg-type]
        assert verify(store).ok
        collect_garbage(store, delete=True)
        assert {key.rpartition("/")[0] for key in files(store)} == {newest.folder}
