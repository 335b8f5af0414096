"""Training batches: they follow from the order, for all threads, ranks, first steps and stores."""

from __future__ import annotations

import gc
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from small_shards import Far, flip_byte, stage_of

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.masks.codec import encode_png
from data_prep.shards.shards import read_index
from dpnet.loading.loader import AHEAD, Loader
from dpnet.loading.order import augmentation
from dpnet.loading.shard_cache import ShardCache
from dpnet.loading.shard_files import OpenShard, Shard, ShardFiles, find_shards

SIZE, SEED, BATCH, LANES = 16, 3, 6, 4
Pixels = NDArray[np.uint8]


def jpeg(pixels: Pixels) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95))


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def random_image(number: int, height: int = SIZE, width: int = SIZE) -> Pixels:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask(number: int, size: int = SIZE) -> bytes:
    hole = np.random.default_rng(number).integers(0, 2, (size, size), dtype=np.uint8)
    return encode_png(hole * 255)


def split(payloads: Sequence[bytes], sizes: Sequence[int]) -> list[list[bytes]]:
    """Split payloads into shards of these sizes, in turn."""
    shards, at = list[list[bytes]](), 0
    while at < len(payloads):
        size = sizes[len(shards) % len(sizes)]
        shards.append(list(payloads[at : at + size]))
        at += size
    return shards


@dataclass(frozen=True)
class Data:
    """Committed images and masks, and the payloads of their shards."""

    store: Store
    images: list[list[bytes]]
    masks: list[list[bytes]]

    @cached_property
    def refs(self) -> tuple[StageRef, StageRef]:
        return (
            stage_of(self.store, "images", self.images),
            stage_of(self.store, "masks", self.masks),
        )

    def path(self, set_number: int, shard: int) -> Path:
        assert isinstance(self.store, LocalStore)
        shards = find_shards(self.store, self.refs[set_number], "train").shards
        return self.store.path(shards[shard].key)


def data_in(
    store: Store,
    images: Sequence[bytes] | None = None,
    masks: Sequence[bytes] | None = None,
) -> Data:
    if images is None:
        images = [jpeg(random_image(number)) for number in range(50)]
    if masks is None:
        masks = [mask(number) for number in range(41)]
    data = Data(store, split(images, [7, 4, 9]), split(masks, [5, 8, 3]))
    assert all(ref.content_digest for ref in data.refs)  # the stages are committed
    return data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Return data that tests only read."""
    return data_in(LocalStore(tmp_path_factory.mktemp("root")))


@pytest.fixture
def own(tmp_path: Path) -> Data:
    """Return the same data for tests that change it."""
    return data_in(LocalStore(tmp_path / "root"))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dpnet-")]


def open_tars() -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return sum(link.endswith(".tar") for link in links)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Check after each test that no thread of the loader runs and no shard is open."""
    yield
    wait_until(lambda: not threads())
    gc.collect()  # frames of exceptions can hold shards
    wait_until(lambda: open_tars() == 0)


def loader_of(
    data: Data,
    store: Any = None,
    *,
    cache: ShardCache | None = None,
    skip: bool = False,
    files: ShardFiles | None = None,
    **options: Any,
) -> Loader:
    files = files or ShardFiles(store or data.store, cache)
    sets = [find_shards(files.store, ref, "train") for ref in data.refs]
    given = {"size": SIZE, "seed": SEED, "batch": BATCH, "lanes": LANES} | options
    return Loader(*sets, files, skip=skip, **given)


def batches(loader: Loader, start: int, stop: int) -> list[tuple[Pixels, Pixels]]:
    found = []
    with closing(loader.batches(start, stop)) as made:
        for step, batch in made:
            assert step == start + len(found)
            assert str(batch.image.dtype) == str(batch.valid.dtype) == "torch.uint8"
            found.append((batch.image.numpy().copy(), batch.valid.numpy().copy()))
    assert len(found) == stop - start
    return found


def same(a: Sequence[tuple[Pixels, Pixels]], b: Sequence[tuple[Pixels, Pixels]]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def expected(data: Data, loader: Loader, step: int) -> tuple[Pixels, Pixels]:
    """Make a global batch in the simplest way: sample by sample, from the order."""
    start, stop = step * loader.batch, (step + 1) * loader.batch
    changes = augmentation(loader.seed, np.arange(start, stop))
    places = [order.samples_at(start, stop)[:, 1:].tolist() for order in loader.orders]
    image, valid = [], []
    for i, ((shard, at), (mask_shard, mask_at)) in enumerate(zip(*places, strict=True)):
        payload = data.images[shard][at]
        if payload[:2] == b"\xff\xd8":
            pixels = simplejpeg.decode_jpeg(payload)
        else:
            pixels = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
        top, left = (
            int(share * (side - SIZE + 1))
            for share, side in zip(changes.crop[i], pixels.shape[:2], strict=True)
        )
        pixels = pixels[top : top + SIZE, left : left + SIZE]
        image.append(pixels[:, ::-1] if changes.flip[i] else pixels)
        known = np.asarray(Image.open(io.BytesIO(data.masks[mask_shard][mask_at]))) == 0
        known = np.rot90(known, changes.turns[i])
        valid.append(known[:, ::-1] if changes.mask_flip[i] else known)
    return np.stack(image), np.stack(valid).astype(np.uint8)


class Watched(ShardFiles):
    """Records the keys of the shards that it opens, and calls `before` with each shard."""

    def __init__(self, store: Store, before: Callable[[Shard], None] = lambda shard: None) -> None:
        super().__init__(store, None)
        self.keys: list[str] = []
        self.before = before

    def open(self, shard: Shard) -> OpenShard:
        self.keys.append(shard.key)
        self.before(shard)
        return super().open(shard)


# The content of a batch


@pytest.mark.parametrize("encode", [jpeg, png])
@pytest.mark.parametrize("larger", [False, True])
def test_a_batch_follows_from_the_order_and_the_augmentation(
    tmp_path: Path, encode: Callable[[Pixels], bytes], larger: bool
) -> None:
    sides = [(SIZE, SIZE)]
    if larger:  # in one or both directions, by one pixel or many
        sides = [(SIZE, 40), (33, SIZE), (SIZE + 1, SIZE + 1), (50, 21), (SIZE, SIZE)]
    images = [encode(random_image(n, *sides[n % len(sides)])) for n in range(30)]
    data = data_in(LocalStore(tmp_path), images)
    loader = loader_of(data, batch=10)
    found = batches(loader, 0, 12)
    assert same(found, [expected(data, loader, step) for step in range(12)])
    changes = augmentation(SEED, np.arange(120))
    kinds = zip(changes.flip, changes.turns, changes.mask_flip, strict=True)
    assert len(set(kinds)) == 16  # every kind occurs


def test_other_seeds_give_other_batches(data: Data) -> None:
    assert not same(batches(loader_of(data, seed=4), 0, 2), batches(loader_of(data), 0, 2))


@pytest.mark.parametrize("threads", [2, 7])
def test_batches_are_the_same_with_any_number_of_threads(data: Data, threads: int) -> None:
    options = {"batch": 20}  # more than one job of a thread
    one = batches(loader_of(data, **options), 0, 10)
    assert same(batches(loader_of(data, threads=threads, **options), 0, 10), one)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch", [6, 7])
def test_the_ranks_share_out_the_global_batch(data: Data, world: int, batch: int) -> None:
    whole = batches(loader_of(data, batch=batch), 0, 20)
    for rank in range(world):
        found = batches(loader_of(data, batch=batch, rank=rank, world=world), 0, 20)
        for step, (image, valid) in enumerate(found):
            mine = [i for i in range(batch) if (step * batch + i) % world == rank]
            assert same([(image, valid)], [(whole[step][0][mine], whole[step][1][mine])])


def test_a_dataset_of_one_shard_serves_several_ranks(tmp_path: Path) -> None:
    data = Data(LocalStore(tmp_path), [[jpeg(random_image(n)) for n in range(9)]], [[mask(0)]])
    whole = batches(loader_of(data, batch=4), 0, 8)
    for rank in range(2):
        found = batches(loader_of(data, batch=4, rank=rank, world=2), 0, 8)
        assert same(found, [(image[rank::2], valid[rank::2]) for image, valid in whole])


# The first step


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 3)])
def test_a_run_that_starts_at_any_step_gives_the_same_batches(
    data: Data, rank: int, world: int
) -> None:
    options = {"rank": rank, "world": world, "threads": 2}
    whole = batches(loader_of(data, **options), 0, 25)
    for start in range(25):
        assert same(
            batches(loader_of(data, **options), start, min(start + 3, 25)), whole[start : start + 3]
        )
    assert batches(loader_of(data, **options), 25, 25) == []


@pytest.mark.parametrize("start", [0, 7, 1000])
def test_only_shards_with_samples_of_the_wanted_steps_are_opened(data: Data, start: int) -> None:
    files = Watched(data.store)
    loader = loader_of(data, files=files)
    batches(loader, start, start + 2)
    wanted = []
    for order, shards in zip(loader.orders, loader.sets, strict=True):
        places = order.samples_at(start * BATCH, (start + 2) * BATCH)
        visits = {(epoch, shard) for epoch, shard, _ in places.tolist()}
        wanted += [shards.shards[shard].key for _, shard in visits]
    assert sorted(files.keys) == sorted(wanted)
    assert files.opened == len(wanted)


def test_the_first_batch_does_not_wait_for_shards_of_others(tmp_path: Path) -> None:
    images = [[jpeg(random_image(n))] * 50 for n in range(24)]
    data = Data(LocalStore(tmp_path), images, [[mask(n)] * 50 for n in range(24)])
    options = {"batch": 4, "lanes": 24}
    loader = loader_of(data, **options)
    needed = {
        shards.shards[shard].key
        for order, shards in zip(loader.orders, loader.sets, strict=True)
        for _, shard, _ in order.samples_at(8, 12).tolist()
    }
    go, late = threading.Event(), list[str]()

    def hold(shard: Shard) -> None:
        if shard.key not in needed and not go.wait(20):
            late.append(shard.key)

    with closing(
        loader_of(data, files=Watched(data.store, hold), **options).batches(2, 99)
    ) as made:
        next(made)
        assert not late
        go.set()


# Open files and threads


def test_at_most_two_shards_of_each_lane_and_those_of_waiting_batches_are_open(
    tmp_path: Path,
) -> None:
    images = [[jpeg(random_image(n))] * 10 for n in range(40)]
    data = Data(LocalStore(tmp_path), images, [[mask(n)] * 10 for n in range(40)])
    most = []
    with closing(loader_of(data, batch=4).batches(0, 300)) as made:
        for _ in made:
            most.append(open_tars())
    assert len(most) == 300  # three epochs: 240 shards
    waiting = (AHEAD + 2) * 4  # samples; each can keep a shard open
    assert 2 * LANES <= max(most) <= 2 * 2 * LANES + 2 * waiting


@pytest.mark.parametrize("filled", [False, True])
def test_closing_the_loader_early_stops_its_threads(data: Data, filled: bool) -> None:
    made = loader_of(data, threads=3).batches(0, 10**6)
    next(made)
    assert threads()
    if filled:
        time.sleep(0.5)  # until the queue is full
    made.close()
    wait_until(lambda: not threads())


def test_waiting_time_does_not_include_the_work_of_the_consumer(data: Data) -> None:
    loader = loader_of(data)
    with closing(loader.batches(0, 100)) as made:
        next(made)
        before = loader.waited
        for _ in range(3):
            time.sleep(0.3)
            next(made)
        assert loader.waited - before < 0.8
    slow = loader_of(data, files=Watched(data.store, lambda shard: time.sleep(0.3)))
    batches(slow, 0, 1)
    assert slow.waited > 0.3


# Damaged data


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("set_number", [0, 1])
def test_a_damaged_shard_is_an_error_with_its_name(own: Data, set_number: int, far: bool) -> None:
    damage(own, set_number, 2, 0)
    loader = loader_of(own, Far(own.store) if far else None)
    sentence = r"sample \S+ of \S+/train-000002\.tar cannot be used \(its bytes are not those"
    with pytest.raises(PipelineError, match=sentence):
        batches(loader, 0, 20)


def damage(data: Data, set_number: int, shard: int, position: int) -> tuple[int, int]:
    """Damage a sample. Return its shard and position."""
    path = data.path(set_number, shard)
    key = path.relative_to(data.store.folder).as_posix()  # type: ignore[attr-defined]
    flip_byte(path, read_index(data.store, key)[position]["offset"] + 30)
    return shard, position


@pytest.mark.parametrize("set_number", [0, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_skipped_sample_is_replaced_with_the_next_one_of_the_batch(
    own: Data, set_number: int, threads: int
) -> None:
    whole = batches(loader_of(own), 0, 20)
    bad = {damage(own, set_number, 2, 1), damage(own, set_number, 0, 0)}
    loader = loader_of(own, skip=True, threads=threads)
    found = batches(loader, 0, 20)
    count = 0
    for step in range(20):
        order = loader.orders[set_number]
        places = order.samples_at(step * BATCH, (step + 1) * BATCH)[:, 1:].tolist()
        good = [i for i in range(BATCH) if tuple(places[i]) not in bad]
        count += BATCH - len(good)
        instead = [
            next(k % BATCH for k in range(i, i + BATCH) if k % BATCH in good) for i in range(BATCH)
        ]
        assert same([found[step]], [(whole[step][0][instead], whole[step][1][instead])])
    assert loader.skipped == count >= 4


def png_with_a_broken_chunk() -> bytes:
    whole = png(random_image(0, 200, 200))
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    return whole[:second] + b"\x01DAT" + whole[second + 4 :]


@pytest.mark.parametrize(
    "payload",
    [b"", b"not an image", b"\xff\xd8\xff\xe0 a", b"\x89PNG\r\n\x1a\n", png_with_a_broken_chunk()],
    ids=["nothing", "text", "jpeg", "png", "broken chunk"],
)
@pytest.mark.parametrize("set_number", [0, 1])
def test_a_sample_that_is_not_an_image_is_named_or_skipped(
    tmp_path: Path, payload: bytes, set_number: int
) -> None:
    given: list[list[bytes]] = [
        [jpeg(random_image(n)) for n in range(12)],
        [mask(n) for n in range(12)],
    ]
    given[set_number][4] = payload
    data = data_in(LocalStore(tmp_path), *given)
    with pytest.raises(PipelineError, match=r"sample s4 of /.*/train-000000\.tar cannot") as raised:
        batches(loader_of(data, lanes=1), 0, 2)  # an epoch
    assert len(str(raised.value).splitlines()) == 1
    assert " object at " not in str(raised.value)
    loader = loader_of(data, lanes=1, skip=True)
    batches(loader, 0, 4)
    assert loader.skipped == 2


def test_a_png_cut_anywhere_is_a_bad_sample_and_not_a_crash(tmp_path: Path) -> None:
    whole = png(random_image(0))
    images = [whole[:at] for at in range(8, len(whole), 23)] + [whole] * 5
    data = data_in(LocalStore(tmp_path), images)
    loader = loader_of(data, skip=True, batch=len(images))
    batches(loader, 0, 1)
    assert (
        len(images) - 6 <= loader.skipped <= len(images) - 5
    )  # the last one can lack only its end


def test_an_image_that_is_too_small_is_refused_with_advice(tmp_path: Path) -> None:
    data = data_in(LocalStore(tmp_path), [jpeg(random_image(n, 40, SIZE - 1)) for n in range(12)])
    with pytest.raises(PipelineError, match=r"cannot be used \(it is 15 x 40 pixels") as raised:
        batches(loader_of(data), 0, 1)
    assert str(raised.value).endswith(
        "smaller than the masks' 16): build images of at least 16 pixels, or smaller masks, or set"
        " train.on_bad_sample to skip."
    )


@pytest.mark.parametrize("size", [SIZE - 1, 2 * SIZE])
def test_a_mask_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    data = data_in(LocalStore(tmp_path), masks=[mask(n, size) for n in range(12)])
    with pytest.raises(
        PipelineError, match=rf"masks.*\(it is {size} x {size} pixels, not 16 x 16\)"
    ):
        batches(loader_of(data), 0, 1)


def test_a_batch_without_a_usable_sample_is_an_error_even_with_skipping(
    tmp_path: Path,
) -> None:
    data = data_in(LocalStore(tmp_path), [jpeg(random_image(n, 8, 8)) for n in range(12)])
    with pytest.raises(
        PipelineError,
        match=r"no sample of the batch of step 3 can be used \(it is 8 x 8 pixels, sm",
    ):
        batches(loader_of(data, skip=True), 3, 5)


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_a_missing_file_is_an_error_even_with_skipping(own: Data, ending: str) -> None:
    own.path(1, 1).with_suffix(f".{ending}").unlink()
    with pytest.raises(PipelineError, match=rf"train-000001\.{ending} is missing"):
        batches(loader_of(own, skip=True), 0, 20)


def test_batches_before_an_error_are_still_delivered(own: Data) -> None:
    whole = batches(loader_of(own), 0, 20)
    last = loader_of(own).orders[0].shards(0)[-1]
    own.path(0, last).unlink()
    came = []
    with closing(loader_of(own).batches(0, 20)) as made:
        with pytest.raises(PipelineError, match="missing"):
            came.extend(batch.image.numpy().copy() for _, batch in made)
        assert len(came) >= 2
    assert all(np.array_equal(image, whole[step][0]) for step, image in enumerate(came))


def test_an_error_in_a_thread_reaches_the_consumer(data: Data) -> None:
    def fail(shard: Shard) -> None:
        raise KeyError(shard.key)

    with pytest.raises(KeyError, match="train-0"):
        batches(loader_of(data, files=Watched(data.store, fail)), 0, 3)


# Stores


def test_s3_gives_the_same_batches_with_and_without_a_cache(
    data: Data, moto_root: str, tmp_path: Path
) -> None:
    store = open_store(moto_root)
    for entry in data.store.list():
        store.write(entry.key, data.store.read(entry.key))
    whole = batches(loader_of(data), 0, 20)
    assert same(batches(loader_of(data, store), 0, 20), whole)
    for limit in (10**9, 20_000):  # all, or a few at a time
        cache = ShardCache(tmp_path / str(limit), limit)
        assert same(batches(loader_of(data, store, cache=cache), 0, 20), whole)
        wait_until(lambda: not threads())  # what is under way is still fetched
        kept = sum(path.stat().st_size for path in (tmp_path / str(limit)).glob("*.tar"))
        assert 0 < kept <= limit


def test_training_continues_without_the_folder_of_its_cache(
    data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path / "cache", 10**9)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_bytes(b"")
    whole = batches(loader_of(data), 0, 10)
    assert same(batches(loader_of(data, Far(data.store), cache=cache), 0, 10), whole)
    assert caplog.text.count("WARNING") == 1
