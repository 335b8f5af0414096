"""Compare a source with its newest version, and decide whether to announce the changes."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from image_sets import crops, photograph, photographs

from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from data_prep.images.next_version import Changes, look
from data_prep.images.stage import prepare_images
from data_prep.images.watch import Watched, decide, watch

SOME = Changes("d1", version=1, items=15, new=3, changed=0, removed=0, unchanged=12)
NONE = replace(SOME, new=0, unchanged=15)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos", 12)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def counts(seen: Changes) -> tuple[int, int, int, int]:
    return seen.new, seen.changed, seen.removed, seen.unchanged


def test_a_new_source_has_only_new_items_and_nothing_is_written(
    folder: Path, store: LocalStore
) -> None:
    seen = look(crops(folder), store)
    assert (seen.version, seen.items, counts(seen)) == (None, 12, (12, 0, 0, 0))
    assert list(store.list()) == []


def test_a_prepared_source_shows_new_removed_and_changed_items(
    folder: Path, store: LocalStore
) -> None:
    prepare_images(crops(folder), store)
    assert not look(crops(folder), store)
    photograph(folder / "new 1.png", 101)
    photograph(folder / "new 2.png", 102)
    photograph(folder / "trip 0/0.png", 103)
    (folder / "trip 1/1.png").unlink()
    before = list(store.list())
    seen = look(crops(folder), store)
    assert (seen.version, seen.items, counts(seen)) == (1, 13, (2, 1, 1, 10))
    assert list(store.list()) == before
    made = prepare_images(crops(folder), store)
    assert (made.summary["added"], made.summary["changed"], made.summary["removed"]) == (2, 1, 1)
    assert not look(crops(folder), store)


def test_new_file_dates_are_not_a_change(folder: Path, store: LocalStore) -> None:
    prepare_images(crops(folder), store)
    before = look(crops(folder), store)
    for path in folder.rglob("*.png"):
        os.utime(path, (1, 1))
    assert look(crops(folder), store) == before


def test_other_settings_are_compared_with_their_own_versions(
    folder: Path, store: LocalStore
) -> None:
    prepare_images(crops(folder), store)
    assert look(crops(folder, size=48), store).version is None


def test_two_contents_of_the_same_size_have_different_digests(
    folder: Path, store: LocalStore
) -> None:
    path = folder / "a.bmp"  # its size does not depend on its content
    photograph(path, 50)
    prepare_images(crops(folder), store)
    digests = set()
    for seed in (51, 52):
        photograph(path, seed)
        os.utime(path, (seed, seed))
        seen = look(crops(folder), store)
        assert counts(seen) == (0, 1, 0, 12)
        digests.add(seen.digest)
        assert look(crops(folder), store).digest == seen.digest
    assert len(digests) == 2


def test_a_state_that_returns_after_another_version_has_a_new_digest(
    folder: Path, store: LocalStore
) -> None:
    prepare_images(crops(folder), store)
    path = photograph(folder / "new.png", 101)
    first = look(crops(folder), store)
    prepare_images(crops(folder), store)
    path.unlink()
    prepare_images(crops(folder), store)
    photograph(path, 101)
    again = look(crops(folder), store)
    assert counts(again) == counts(first)
    assert again.digest != first.digest


@pytest.mark.parametrize(
    ("changes", "watched", "options", "reason"),
    [
        (NONE, Watched(), {}, "Nothing is new."),
        (SOME, Watched(), {"min_new": 100}, "3 of 100 new images have arrived."),
        (replace(SOME, new=0, removed=2), Watched(), {}, "0 of 1 new images have arrived."),
        (
            SOME,
            Watched("d1", 960.0),
            {"quiet_s": 600},
            "The last change was 40 s ago",
        ),
        (
            SOME,
            Watched("d0", 1.0),
            {"quiet_s": 600},
            "The last change was 0 s ago",
        ),
        (SOME, Watched("d1", 0.0, "d1"), {}, "It was announced before."),
    ],
)
def test_a_change_is_not_announced_and_the_reason_is_given(changes, watched, options, reason):  # type: ignore[no-untyped-def]
    decision = decide(changes, watched, 1000.0, **options)
    assert not decision.announce
    assert decision.reason.startswith(reason)


@pytest.mark.parametrize(
    ("changes", "watched", "options"),
    [
        (SOME, Watched(), {}),
        (SOME, Watched(), {"min_new": 3}),
        (replace(SOME, new=1, changed=2), Watched(), {"min_new": 3}),
        (replace(SOME, new=0, removed=2), Watched(), {"min_new": 0}),
        (SOME, Watched("d1", 400.0), {"quiet_s": 600}),
        (SOME, Watched("d0", 0.0, "d0"), {}),
        (SOME, Watched("d1", 0.0, "d1"), {"again": True}),
    ],
)
def test_a_change_that_is_large_enough_and_old_enough_is_announced(changes, watched, options):  # type: ignore[no-untyped-def]
    decision = decide(changes, watched, 1000.0, **options)
    assert decision.announce
    assert decision.reason.endswith("images since version 1.")


def test_every_change_restarts_the_quiet_time() -> None:
    seen = decide(SOME, Watched("d0", 0.0, "d0"), 1000.0, quiet_s=600).watched
    assert seen == Watched("d1", 1000.0, "d0")
    assert decide(SOME, seen, 1500.0, quiet_s=600).watched == seen
    assert decide(replace(SOME, digest="d2"), seen, 1500.0).watched.since == 1500.0


def test_a_failed_announcement_is_repeated_at_the_next_call(store: LocalStore) -> None:
    announced: list[str] = []

    def away(changes: Changes) -> None:
        raise PipelineError("the server is away")

    def once(announce: object) -> str:
        return watch(store, "x", lambda: SOME, announce, lambda: 1.0)[1].reason  # type: ignore[arg-type]

    with pytest.raises(PipelineError, match="away"):
        once(away)
    once(lambda changes: announced.append(changes.digest))
    assert once(announced.append) == "It was announced before."
    assert announced == ["d1"]
    assert json.loads(store.read("images/x/watch.json"))["announced"] == "d1"


def test_only_one_of_two_watchers_announces(store: LocalStore) -> None:
    announced: list[str] = []
    begun, proceed = threading.Event(), threading.Event()

    def announce(changes: Changes) -> None:
        begun.set()
        assert proceed.wait(20)
        announced.append(changes.digest)

    def run() -> None:
        watch(store, "x", lambda: SOME, announce, lambda: 1.0)

    first = threading.Thread(target=run)
    first.start()
    assert begun.wait(20)
    second = threading.Thread(target=run)
    second.start()
    proceed.set()
    first.join(20)
    second.join(20)
    assert announced == ["d1"]


def test_an_altered_state_file_is_an_error(store: LocalStore) -> None:
    store.write("images/x/watch.json", b"[]")
    with pytest.raises(PipelineError, match=r"was altered\. Delete it"):
        watch(store, "x", lambda: SOME, lambda changes: None, lambda: 1.0)
