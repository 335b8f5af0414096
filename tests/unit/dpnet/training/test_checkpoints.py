"""Checkpoints on storage: complete or absent, and never mixed."""

import json
import threading

import pytest
import torch

from data_prep.core.errors import LeaseLostError, PipelineError, StorageError
from data_prep.core.lease import Lease
from data_prep.core.storage.local import LocalStore
from dpnet.training import checkpoints
from dpnet.training.checkpoints import (
    MARK,
    Writer,
    check_requested,
    differences,
    load,
    marks,
    newest,
)

RUN = "runs/x-0123456789ab"
ASKED = {"train": {"batch_size": 4, "steps": 10}, "sha256": {}}


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def state(step):
    return {"step": step, "weights": torch.full((3,), float(step))}


def write(store, *steps, scores=None, **kept):
    writer = Writer(store, RUN, ASKED, **{"last": 10, "best": 0, **kept})
    for step in steps:
        writer.save(step, state(step), [{"step": step}], (scores or {}).get(step))
    writer.wait()
    writer.close()
    return [mark.folder.rpartition("/")[2] for mark in marks(store, RUN)]


def test_saved_checkpoints_are_read_back_newest_first(store):
    assert write(store, 5, 20, 100) == ["step-00000100", "step-00000020", "step-00000005"]
    loaded = newest(store, RUN)
    assert loaded.mark.step == 100
    assert torch.equal(loaded.state["weights"], state(100)["weights"])
    assert loaded.log == [{"step": 100}]
    assert loaded.mark.asked == ASKED


def test_a_run_without_checkpoints_has_none(store):
    assert newest(store, RUN) is None


@pytest.mark.parametrize("name", ["state.pt", "log.jsonl"])
@pytest.mark.parametrize("how", ["altered", "cut short", "missing"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_kept(store, name, how, caplog):
    write(store, 1, 2)
    key = f"{RUN}/step-00000002/{name}"
    data = store.read(key)
    if how == "missing":
        store.delete(key)
    else:
        data = data[:-1] if how == "cut short" else bytes([data[0] ^ 1]) + data[1:]
        store.write(key, data)
    assert newest(store, RUN).mark.step == 1
    told = caplog.text
    assert f"step-00000002 is skipped: {name}" in told
    assert "missing" in told if how == "missing" else "was altered or cut short" in told
    assert write(store, 2) == ["step-00000002.2", "step-00000002", "step-00000001"]
    if how != "missing":
        assert store.read(key) == data
    assert newest(store, RUN).mark.folder == f"{RUN}/step-00000002.2"


@pytest.mark.parametrize("mark", [b"", b"{}", b'{"format": 99}', b"[1]"])
def test_a_checkpoint_with_an_unreadable_mark_is_skipped_with_a_warning(store, mark, caplog):
    write(store, 1, 2)
    store.write(f"{RUN}/step-00000002/{MARK}", mark)
    assert newest(store, RUN).mark.step == 1
    assert "step-00000002 is skipped: its checkpoint.json" in caplog.text


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        (b"", "is damaged"),
        (b"[1]", "is damaged"),
        (b'{"format": 1}', "is damaged"),
        (b'{"format": 2}', "has format 2, and this version reads format 1"),
    ],
)
def test_training_does_not_restart_if_no_mark_can_be_read(store, mark, told):
    write(store, 1, 2)
    for step in (1, 2):
        store.write(f"{RUN}/step-{step:08d}/{MARK}", mark)
    with pytest.raises(PipelineError) as refused:
        newest(store, RUN)
    text = str(refused.value)
    assert f"none of the 2 checkpoints of {store.label}/{RUN} can be read" in text
    assert f"step-00000002/{MARK} {told}. Use the version of dpnet that wrote them" in text
    assert "restore one from a backup. To train from the start, remove the run's folder" in text


def test_training_does_not_restart_if_some_marks_and_the_other_states_are_damaged(store):
    write(store, 1, 2)
    store.write(f"{RUN}/step-00000001/state.pt", b"no")
    store.write(f"{RUN}/step-00000002/{MARK}", b"no")
    with pytest.raises(PipelineError, match=r"every checkpoint of .* is damaged: restore one"):
        newest(store, RUN)


def spoil(store, step, name):
    store.write(f"{RUN}/step-{step:08d}/{name}", b"no")


@pytest.mark.parametrize("name", ["state.pt", "log.jsonl", MARK])
@pytest.mark.parametrize(
    ("damaged", "used"), [((3,), 2), ((2,), 3), ((1,), 3), ((3, 2), 1), ((3, 1), 2), ((2, 1), 3)]
)
def test_the_newest_sound_checkpoint_of_three_is_used(store, name, damaged, used):
    write(store, 1, 2, 3)
    for step in damaged:
        spoil(store, step, name)
    found = newest(store, RUN)
    assert found.mark.step == used
    assert torch.equal(found.state["weights"], state(used)["weights"])
    assert found.log == [{"step": used}]


def test_a_step_that_was_saved_twice_is_read_from_its_later_folder(store):
    write(store, 9)
    spoil(store, 9, "state.pt")
    write(store, 9)
    spoil(store, 9, "log.jsonl")
    for _ in range(9):
        write(store, 9)  # the folders .3 to .11: they sort as numbers, not as text
    assert newest(store, RUN).mark.folder == f"{RUN}/step-00000009.11"


def test_of_equal_scores_the_later_checkpoint_is_kept(store):
    scores = {1: 7.0, 2: 9.0, 3: 9.0, 4: 8.0}
    assert write(store, 1, 2, 3, 4, 5, scores=scores, last=1, best=1) == [
        "step-00000005",
        "step-00000003",
    ]


def test_pruning_never_deletes_the_newest_the_best_or_a_fixed_step(store):
    for newest_step in range(4, 9):
        scores = {1: 9.0, **dict.fromkeys(range(2, newest_step + 1), 1.0)}
        kept = write(store, newest_step, scores=scores, last=1, best=1, fixed=[2])
        if newest_step == 4:  # earlier ones, which the next call prunes
            kept = write(store, 3, 2, 1, scores=scores, last=1, best=1, fixed=[2])
        assert {"step-00000001", "step-00000002"} <= set(kept)
        assert kept[0] == f"step-{max(newest_step, 4):08d}"
        assert len(kept) == 3


def test_the_mark_of_a_checkpoint_is_written_last(store, monkeypatch):
    written = []
    for name in ("write", "create"):
        method = getattr(LocalStore, name)

        def record(self, key, data, real=method):
            folder, _, file = key.rpartition("/")
            assert file != MARK or {"state.pt", "log.jsonl"} == {each for _, each in written}
            written.append((folder, file))
            return real(self, key, data)

        monkeypatch.setattr(LocalStore, name, record)
    write(store, 1)
    assert written[-1] == (f"{RUN}/step-00000001", MARK)


def test_a_pruned_checkpoint_loses_its_mark_first(store, monkeypatch):
    write(store, 1)
    deleted, real = [], LocalStore.delete
    monkeypatch.setattr(
        LocalStore, "delete", lambda self, key: deleted.append(key) or real(self, key)
    )
    assert write(store, 2, last=1) == ["step-00000002"]
    assert deleted[0] == f"{RUN}/step-00000001/{MARK}"
    assert {key.rpartition("/")[2] for key in deleted} == {MARK, "state.pt", "log.jsonl"}
    assert not (store.folder / RUN / "step-00000001").exists()


def test_an_unfinished_checkpoint_does_not_count_and_is_reported(store, caplog):
    write(store, 1)
    store.write(f"{RUN}/step-00000002/state.pt", b"half")
    assert newest(store, RUN).mark.step == 1
    assert "step-00000002 was never finished: training resumes from step 1" in caplog.text
    # It is not written into, and goes once there is a whole one.
    write(store, 2)
    assert newest(store, RUN).mark.folder == f"{RUN}/step-00000002.2"
    assert not store.exists(f"{RUN}/step-00000002/state.pt")


def test_training_does_not_restart_if_all_checkpoints_are_damaged(store):
    write(store, 1, 2)
    for step in (1, 2):
        store.write(f"{RUN}/step-{step:08d}/state.pt", b"no")
    with pytest.raises(PipelineError, match=r"every checkpoint of .* is damaged: restore one"):
        newest(store, RUN)


def test_a_state_that_would_run_code_is_not_loaded(store):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code was run",))

    writer = Writer(store, RUN, ASKED, last=1, best=0)
    writer.save(1, {"evil": Evil()}, [])
    writer.wait()
    with pytest.raises(PipelineError, match="cannot be read"):
        load(store, marks(store, RUN)[0])


def test_the_last_the_best_and_fixed_steps_are_kept(store):
    scores = {1: 5.0, 2: 9.0, 3: 7.0, 4: 8.0, 5: 1.0, 6: 2.0}
    kept = write(store, *range(1, 8), scores=scores, last=2, best=2, fixed=[3])
    assert kept == [f"step-{step:08d}" for step in (7, 6, 4, 3, 2)]


def test_saving_does_not_wait_but_the_next_one_does(store, monkeypatch):
    gate, begun = threading.Event(), threading.Event()
    real = LocalStore.write

    def slow(self, key, data):
        begun.set()
        assert gate.wait(10)
        real(self, key, data)

    monkeypatch.setattr(LocalStore, "write", slow)
    writer = Writer(store, RUN, ASKED, last=2, best=0)
    writer.save(1, state(1), [])
    assert begun.wait(10)
    assert marks(store, RUN) == []
    threading.Timer(0.2, gate.set).start()
    writer.save(2, state(2), [])
    assert [mark.step for mark in marks(store, RUN)][-1] == 1
    writer.wait()
    assert [mark.step for mark in marks(store, RUN)] == [2, 1]


def failing(monkeypatch, times):
    real, left = LocalStore.write, [times]

    def write(self, key, data):
        if left[0]:
            left[0] -= 1
            raise StorageError("cannot use it: the disk is full.")
        real(self, key, data)

    monkeypatch.setattr(LocalStore, "write", write)
    monkeypatch.setattr(checkpoints, "_WAIT_S", 0.01)


def test_a_write_that_storage_refuses_is_retried_and_reported_once(store, monkeypatch, caplog):
    failing(monkeypatch, 3)
    assert write(store, 1) == ["step-00000001"]
    told = caplog.text
    assert told.count("step 1 cannot be written yet: cannot use it: the disk is full.") == 1
    assert "the checkpoint of step 1 is written now" in told


def test_training_ends_if_storage_refuses_for_too_long(store, monkeypatch):
    failing(monkeypatch, 10**6)
    writer = Writer(store, RUN, ASKED, last=1, best=0, patience=0.05)
    writer.save(1, state(1), [])
    with pytest.raises(PipelineError, match="the disk is full"):
        writer.save(2, state(2), [])


def test_a_second_writer_of_the_same_checkpoint_is_refused(store, monkeypatch):
    writer = Writer(store, RUN, ASKED, last=1, best=0)
    monkeypatch.setattr(LocalStore, "create", lambda self, key, data: None)
    writer.save(1, state(1), [])
    with pytest.raises(PipelineError, match="written by another run of the same training"):
        writer.wait()


def test_a_checkpoint_whose_lease_is_lost_gets_no_mark(store, monkeypatch):
    real = LocalStore.write

    def losing(self, key, data):
        real(self, key, data)
        if key.endswith("/state.pt"):
            real(self, f"{RUN}/lease.json", b'{"owner": "other"}')

    monkeypatch.setattr(LocalStore, "write", losing)
    with (
        Lease(store, f"{RUN}/lease.json"),
        pytest.raises(LeaseLostError, match="was taken over by another runner"),
    ):
        write(store, 1)
    assert marks(store, RUN) == []


def test_a_writer_whose_lease_is_lost_deletes_nothing(store, monkeypatch):
    write(store, 1)
    real = LocalStore.create

    def losing(self, key, data):
        tag = real(self, key, data)
        if key.endswith(MARK):
            self.write(f"{RUN}/lease.json", b'{"owner": "other"}')
        return tag

    monkeypatch.setattr(LocalStore, "create", losing)
    with (
        Lease(store, f"{RUN}/lease.json"),
        pytest.raises(LeaseLostError, match="was taken over by another runner"),
    ):
        write(store, 2, last=1)
    assert [mark.step for mark in marks(store, RUN)] == [2, 1]


def test_options_that_differ_are_named_with_both_values(store):
    other = {"train": {"batch_size": 8, "steps": 10, "lanes": 64}, "sha256": {}}
    assert differences(ASKED, other) == ["train.batch_size 4, not 8", "train.lanes unset, not 64"]
    assert differences(ASKED, json.loads(json.dumps(ASKED))) == []
    write(store, 1)
    mark = marks(store, RUN)[0]
    check_requested(mark, ASKED, store.uri)
    with pytest.raises(PipelineError, match=r"was made with train\.batch_size 4, not 8, train"):
        check_requested(mark, other, store.uri)


@pytest.mark.parametrize("kind", ["", "moto"])
def test_checkpoints_work_on_s3_like_in_a_folder(kind, request, tmp_path):
    from data_prep.core.storage.open import open_store

    root = request.getfixturevalue("moto_root") if kind else str(tmp_path)
    there = open_store(root)
    assert write(there, 1, 2, 3, last=2) == ["step-00000003", "step-00000002"]
    assert newest(there, RUN).mark.step == 3
