import pytest

from dpnet.order import epoch_order, generator, rank_cursors, sample_at


def test_one_epoch_visits_every_sample_once():
    assert sorted(epoch_order("d", 0, 3, 1000)) == list(range(1000))


def test_epochs_seeds_and_datasets_differ_and_repeat():
    first = epoch_order("d", 0, 0, 100).tolist()
    assert first == epoch_order.__wrapped__("d", 0, 0, 100).tolist()
    for other in (("d", 0, 1), ("d", 1, 0), ("e", 0, 0)):
        assert epoch_order(*other, 100).tolist() != first


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_global_batch_is_the_same_whatever_the_number_of_ranks(world):
    batch = 15
    cursors = [c for rank in range(world) for c in rank_cursors(7, batch, rank, world)]
    assert sorted(cursors) == list(range(105, 120))


def test_batches_run_on_across_the_end_of_an_epoch():
    seen = [sample_at("d", 0, cursor, 10) for cursor in range(30)]
    for epoch in range(3):
        assert sorted(seen[epoch * 10 : epoch * 10 + 10]) == list(range(10))


def test_streams_are_independent():
    assert generator("a", 1).integers(1 << 60) != generator("a", 2).integers(1 << 60)
    assert generator("a", 1).integers(1 << 60) == generator("a", 1).integers(1 << 60)
