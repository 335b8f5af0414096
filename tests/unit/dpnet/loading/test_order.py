"""The order of samples: its properties, and a table of fixed values."""

from __future__ import annotations

from collections import Counter
from itertools import islice, takewhile

import numpy as np
import pytest

from dpnet.loading.order import ShardOrder, Visit, augmentation, generator, rank_cursors, uniform

SIZES = [7, 3, 12, 1, 9, 5, 5, 8, 2, 11, 6, 4]  # 73 samples in 12 shards
WORLDS = [1, 2, 3, 5, 8]


def an_order(digest: str = "d", seed: int = 0, lanes: int = 4) -> ShardOrder:
    return ShardOrder(digest, seed, SIZES, lanes)


def rows(order: ShardOrder, start: int, stop: int) -> list[tuple[int, ...]]:
    """Return (epoch, shard, position) at each cursor."""
    return [tuple(row) for row in order.samples_at(start, stop).tolist()]


def visits_of(order: ShardOrder, epochs: int) -> list[Visit]:
    return list(takewhile(lambda visit: visit.epoch < epochs, order.visits()))


# Which samples


@pytest.mark.parametrize("lanes", [1, 4, 8, 64])
def test_every_sample_comes_once_an_epoch(lanes: int) -> None:
    seen = Counter(rows(an_order(lanes=lanes), 0, 5 * 73))
    assert set(seen.values()) == {1}
    every = {(shard, at) for shard, size in enumerate(SIZES) for at in range(size)}
    for epoch in range(3):  # in later epochs some lanes are not finished
        assert {sample[1:] for sample in seen if sample[0] == epoch} == every


def test_with_one_lane_an_epoch_ends_before_the_next_begins() -> None:
    epochs = [epoch for epoch, _, _ in rows(an_order(lanes=1), 0, 4 * 73)]
    assert epochs == [epoch for epoch in range(4) for _ in range(73)]


@pytest.mark.parametrize("lanes", [1, 4, 64])
def test_every_shard_is_visited_once_an_epoch_by_one_lane(lanes: int) -> None:
    order = an_order(lanes=lanes)
    visits = visits_of(order, 9)
    assert sorted((v.epoch, v.shard) for v in visits) == [
        (e, s) for e in range(9) for s in range(12)
    ]
    assert all(visit.size == SIZES[visit.shard] for visit in visits)
    for lane in range(order.lanes):  # one after the other, without a gap
        own = [visit for visit in visits if visit.lane == lane]
        assert [visit.start for visit in own] == [0, *(visit.stop for visit in own[:-1])]


def test_a_batch_mixes_the_shards_of_all_lanes() -> None:
    order = ShardOrder("d", 0, [100] * 64, 16)
    for start in (0, 320, 6400):
        assert len({shard for _, shard, _ in rows(order, start, start + 16)}) == 16


@pytest.mark.parametrize(
    ("lanes", "shards", "used"),
    [(64, 64, 64), (64, 1000, 64), (64, 63, 32), (64, 1, 1), (12, 11, 6), (7, 6, 1), (5, 9, 5)],
)
def test_the_number_of_lanes_is_a_divisor_and_each_lane_has_a_shard(
    lanes: int, shards: int, used: int
) -> None:
    assert ShardOrder("d", 0, [2] * shards, lanes).lanes == used


def test_the_order_is_repeatable_and_differs_by_epoch_seed_and_dataset() -> None:
    first = rows(an_order(), 0, 200)
    assert rows(an_order(), 0, 200) == first
    assert an_order().shards(0) != an_order().shards(1)
    for other in (an_order(seed=1), an_order(digest="e")):
        assert rows(other, 0, 200) != first
    visits = {v.epoch: v for v in visits_of(an_order(), 2) if v.size == 12}
    assert an_order().within(visits[0]).tolist() != an_order().within(visits[1]).tolist()


def test_the_order_is_that_of_earlier_versions() -> None:
    # A change of these values, for example by NumPy, would change the order of resumed runs.
    order = ShardOrder("0123456789ab", 7, [3, 2, 4, 3], 2)
    shards = [(0, 2), (0, 0)] * 3 + [(0, 2), (0, 3), (0, 1), (0, 3), (0, 1), (0, 3)]
    positions = [3, 0, 2, 1, 0, 2, 1, 2, 1, 1, 0, 0]
    assert rows(order, 0, 12) == [(*s, at) for s, at in zip(shards, positions, strict=True)]
    assert rows(order, 9000, 9004) == [(750, 3, 2), (749, 0, 1), (750, 3, 1), (750, 1, 0)]
    changes = augmentation(7, np.arange(5))
    assert changes.flip.tolist() == [False, False, True, False, False]
    assert changes.turns.tolist() == [0, 2, 1, 3, 0]
    assert changes.mask_flip.tolist() == [True, False, False, True, False]
    assert changes.crop[1].tolist() == [0.8068073941891024, 0.06243433045602409]


# The first row


@pytest.mark.parametrize("row", [0, 1, 17, 18, 19, 500])
def test_visits_from_a_row_are_those_that_end_after_it(row: int) -> None:
    order = an_order()
    late = list(islice(order.visits(row), 30))
    every = takewhile(lambda visit: visit.start <= late[-1].start, order.visits())
    assert late == [visit for visit in every if visit.stop > row][:30]
    assert sorted(visit.lane for visit in late[:4]) == [
        0,
        1,
        2,
        3,
    ]  # first the current visit of each lane
    assert all(visit.start <= row for visit in late[:4])


def test_the_samples_at_cursors_do_not_depend_on_the_first_cursor() -> None:
    order, whole = an_order(), rows(an_order(), 0, 300)
    for start in range(0, 290, 13):
        assert rows(order, start, start + 10) == whole[start : start + 10]
    assert rows(order, 8, 8) == []


def test_a_hundred_thousand_shards_are_ordered_on_a_thousand_lanes() -> None:
    sizes = np.random.default_rng(0).integers(1, 2000, 100_000).tolist()
    order = ShardOrder("d", 0, sizes, 1024)
    late = 3 * order.samples // order.lanes
    visits = list(islice(order.visits(late), 1024))
    assert {visit.lane for visit in visits} == set(range(1024))
    assert all(visit.start <= late < visit.stop for visit in visits)


# Ranks


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch", [8, 15])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(world: int, batch: int) -> None:
    order = an_order()
    for step in range(12):
        first = step * batch
        samples, changes = (
            rows(order, first, first + batch),
            augmentation(3, np.arange(first, first + batch)),
        )
        found = []
        for rank in range(world):
            cursors = rank_cursors(step, batch, rank, world)
            own = augmentation(3, np.asarray(cursors))
            for i, cursor in enumerate(cursors):
                found.append(
                    (
                        cursor,
                        rows(order, cursor, cursor + 1)[0],
                        *(part[i].tolist() for part in own),
                    )
                )
        assert sorted(found) == [
            (first + i, samples[i], *(part[i].tolist() for part in changes)) for i in range(batch)
        ]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch", [8, 15, 16])
def test_ranks_differ_by_at_most_one_sample_and_each_has_one(world: int, batch: int) -> None:
    for step in range(20):
        counts = [len(rank_cursors(step, batch, rank, world)) for rank in range(world)]
        assert sum(counts) == batch
        assert max(counts) - min(counts) <= 1
        assert min(counts) >= 1


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_takes_the_same_share_of_all_cursors_at_every_step(world: int) -> None:
    for rank in range(world):
        cursors = [c for step in range(9) for c in rank_cursors(step, 15, rank, world)]
        assert cursors == list(range(rank, 135, world))


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32, 64])
def test_one_rank_reads_a_shard_if_the_ranks_divide_the_lanes(world: int) -> None:
    order = ShardOrder("d", 0, [3, 5, 4, 1] * 25, 64)
    assert order.lanes % world == 0
    ranks: dict[tuple[int, int], set[int]] = {}
    for cursor, (epoch, shard, _) in enumerate(rows(order, 0, 3000)):
        ranks.setdefault((epoch, shard), set()).add(cursor % world)
    assert all(len(own) == 1 for own in ranks.values())
    assert {rank for own in ranks.values() for rank in own} == set(range(world))


def test_a_batch_can_hold_samples_of_two_epochs() -> None:
    cursors = [c for step in range(30) for c in rank_cursors(step, 10, 0, 1)]  # 73 samples an epoch
    assert cursors == list(range(300))
    seen = rows(an_order(lanes=1), 70, 80)
    assert [epoch for epoch, _, _ in seen] == [0] * 3 + [1] * 7


# Randomness


def test_augmentation_depends_on_seed_and_cursor_and_not_on_the_batch() -> None:
    whole = augmentation(5, np.arange(100))
    parts = [augmentation(5, np.arange(at, at + 10)) for at in range(0, 100, 10)]
    for name, values in whole._asdict().items():
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), values)
    assert not np.array_equal(augmentation(6, np.arange(100)).crop, whole.crop)


def test_all_augmentations_are_equally_frequent() -> None:
    count = 64_000
    changes = augmentation(1, np.arange(count))
    kinds = Counter(
        zip(
            changes.flip.tolist(),
            changes.turns.tolist(),
            changes.mask_flip.tolist(),
            *(changes.crop < 0.5).T.tolist(),
            strict=True,
        )
    )
    assert len(kinds) == 2 * 4 * 2 * 2 * 2
    assert all(abs(n - count / 64) < 5 * (count / 64) ** 0.5 for n in kinds.values())


@pytest.mark.parametrize("start", [0, 10**9, 2**62])
def test_numbers_are_uniform_in_0_to_1_and_independent_of_neighbours_names_and_seeds(
    start: int,
) -> None:
    count = 100_000
    cursors = np.arange(start, start + count)
    one = uniform(0, "one", cursors)
    assert one.min() >= 0
    assert one.max() < 1
    assert abs(one.mean() - 0.5) < 5 / (12 * count) ** 0.5
    assert abs(one.var() - 1 / 12) < 0.002
    tenths = np.bincount((one * 10).astype(int), minlength=10)
    assert ((tenths - count / 10) ** 2 / (count / 10)).sum() < 40  # chi squared of 9
    others = [
        uniform(0, "other", cursors),
        uniform(1, "one", cursors),
        np.roll(one, 1),
        np.roll(one, 2),
    ]
    for other in others:
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / count**0.5


def test_random_streams_are_independent_and_repeatable() -> None:
    assert generator("a", 1).integers(1 << 60) != generator("a", 2).integers(1 << 60)
    assert generator("a", 1).integers(1 << 60) == generator("a", 1).integers(1 << 60)
