"""Single samples by position, as validation and evaluation read them."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from small_shards import Far, flip_byte, stage_of

from data_prep.core.errors import ItemError, PipelineError
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.masks.codec import encode_png
from data_prep.shards.shards import read_index
from dpnet.loading.decoding import decode_image
from dpnet.loading.samples import Samples

SIZE = 16
Pixels = NDArray[np.uint8]


class Root:
    """A store with images of these sizes (width, height), and as many masks.

    The first sample is in the first shard, the others are in the second.
    """

    def __init__(self, folder: Path, *sizes: tuple[int, int]) -> None:
        self.store = LocalStore(folder)
        random = np.random.default_rng(0)
        self.images = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]
        self.valid = [random.integers(0, 2, (SIZE, SIZE), dtype=np.uint8) for _ in sizes]
        pngs = []
        for image in self.images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            pngs.append(file.getvalue())
        masks = [encode_png(255 * (1 - valid)) for valid in self.valid]
        self.ref = stage_of(self.store, "images", [pngs[:1], pngs[1:]])
        self.masks = stage_of(self.store, "masks", [masks[:1], masks[1:]])

    def samples(
        self, kind: str = "image", size: int | None = None, store: Store | None = None
    ) -> Samples:
        ref = self.ref if kind == "image" else self.masks
        return Samples(store or self.store, ref, "train", size)

    def tar(self, kind: str = "image", number: int = 1) -> Path:
        folder = (self.ref if kind == "image" else self.masks).folder
        return self.store.path(f"{folder}/train-{number:06d}.tar")


def reader(samples: Samples, kind: str) -> Callable[[int], Pixels]:
    return samples.image if kind == "image" else samples.valid


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root", (16, 16), (16, 16), (16, 16))


def test_a_larger_image_is_cut_to_the_square_in_its_middle(tmp_path: Path) -> None:
    root = Root(tmp_path, (16, 16), (21, 40))
    whole = root.samples()
    assert len(whole) == 2
    assert all((whole.image(i) == root.images[i]).all() for i in range(2))
    cut = root.samples(size=16)
    assert (cut.image(0) == root.images[0]).all()
    assert (cut.image(1) == root.images[1][12:28, 2:18]).all()


def test_a_position_counts_over_all_shards(root: Root) -> None:
    images, masks = root.samples(), root.samples("mask")
    for position in (2, 0, 1):
        assert (images.image(position) == root.images[position]).all()
        assert (masks.valid(position) == root.valid[position]).all()
    assert [images.key(position) for position in range(3)] == ["s0", "s0", "s1"]
    shards = [root.store.path(images.shard_key(position)) for position in range(3)]
    assert shards == [root.tar(number=0), root.tar(), root.tar()]
    with pytest.raises(IndexError):
        images.image(3)


def test_a_smaller_image_is_refused_with_advice(tmp_path: Path) -> None:
    root = Root(tmp_path, (16, 16), (40, 15))
    samples = root.samples(size=16)
    with pytest.raises(
        PipelineError, match=r"sample s0 of .*train-000001\.tar cannot be used"
    ) as raised:
        samples.image(1)
    assert str(raised.value).endswith(
        "(it is 40 x 15 pixels, smaller than the masks' 16): build images of at least 16 pixels, or"
        " smaller masks."
    )


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_flipped_byte_is_refused_with_shard_and_sample(root: Root, kind: str, far: bool) -> None:
    tar = root.tar(kind)
    key = tar.relative_to(root.store.folder).as_posix()
    read = reader(root.samples(kind, store=Far(root.store) if far else None), kind)  # type: ignore[arg-type]
    flip_byte(tar, read_index(root.store, key)[1]["offset"] + 40)
    wanted = (root.images if kind == "image" else root.valid)[1]
    assert (read(1) == wanted).all()
    sentence = (
        r"sample s1 of \S*/train-000001\.tar cannot be used \(its bytes are not those that were"
        r" stored\): run `dpnet verify` on the root\."
    )
    with pytest.raises(PipelineError, match=sentence):
        read(2)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_shard_that_was_swapped_with_one_of_the_same_length_is_refused(
    tmp_path: Path, kind: str
) -> None:
    shape = (SIZE, SIZE, 3) if kind == "image" else (SIZE, SIZE)
    payloads = []
    for value in (0, 255):
        file = io.BytesIO()
        Image.fromarray(np.full(shape, value, np.uint8)).save(file, "PNG", compress_level=0)
        payloads.append([file.getvalue()])
    store = LocalStore(tmp_path)
    samples = Samples(store, stage_of(store, "small", payloads), "train")
    first, second = (store.path(samples.shard_key(position)) for position in range(2))
    assert first.stat().st_size == second.stat().st_size
    first.write_bytes(second.read_bytes())
    read = reader(samples, kind)
    assert (read(1) == (255 if kind == "image" else 0)).all()
    with pytest.raises(
        PipelineError, match=r"sample s0 of .*train-000000\.tar cannot be used \(its bytes are not"
    ):
        read(0)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_damaged_index_is_refused_before_any_sample_is_read(root: Root, kind: str) -> None:
    flip_byte(root.tar(kind).with_suffix(".parquet"), 20)
    with pytest.raises(
        PipelineError, match=r"train-000001\.parquet was altered or cut short: run `dpnet verify`"
    ):
        root.samples(kind)


def test_a_missing_shard_is_named(root: Root) -> None:
    samples = root.samples()
    root.tar().unlink()
    with pytest.raises(PipelineError, match=r"train-000001\.tar is missing: run `dpnet verify`"):
        samples.image(1)


def test_a_missing_index_is_named(root: Root) -> None:
    root.tar().with_suffix(".parquet").unlink()
    with pytest.raises(
        PipelineError, match=r"train-000001\.parquet is missing: run `dpnet verify`"
    ):
        root.samples()


def test_a_shard_that_was_cut_short_is_named(root: Root) -> None:
    samples = root.samples()
    root.tar().write_bytes(root.tar().read_bytes()[:700])
    with pytest.raises(
        PipelineError, match=r"train-000001\.tar cannot be used \(the shard is shorter than its"
    ):
        samples.image(1)


def test_a_mask_that_is_not_a_png_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    ref = stage_of(store, "masks", [[b"no PNG"]])
    with pytest.raises(
        PipelineError, match=r"sample s0 of .*tar cannot be used \(a mask is not a readable PNG"
    ):
        Samples(store, ref, "train").valid(0)


def test_a_split_without_a_sample_is_an_error(root: Root) -> None:
    with pytest.raises(PipelineError, match=r"the split 'val' of .* is empty"):
        Samples(root.store, root.ref, "val")


def test_reading_leaves_no_file_open(root: Root) -> None:
    samples = root.samples()
    for position in range(3):
        samples.image(position)
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    assert not [link for link in links if link.is_symlink() and ".tar" in os.readlink(link)]


def test_samples_on_s3_are_read_by_ranges_and_checked(
    root: Root, moto_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(moto_root)
    for entry in root.store.list():
        store.write(entry.key, root.store.read(entry.key))
    images, masks = root.samples(store=store), root.samples("mask", store=store)
    monkeypatch.setattr(type(store), "download", None)  # no shard is fetched whole
    for position in range(3):
        assert (images.image(position) == root.images[position]).all()
        assert (masks.valid(position) == root.valid[position]).all()
    key = images.shard_key(2)
    data = bytearray(store.read(key))
    data[read_index(store, key)[1]["offset"] + 40] ^= 0xFF
    store.write(key, bytes(data))
    assert (images.image(1) == root.images[1]).all()
    with pytest.raises(PipelineError, match=r"sample s1 of s3://.*tar cannot be used \(its bytes"):
        images.image(2)


def test_a_stored_jpeg_that_claims_many_pixels_is_refused_from_its_header() -> None:
    data = bytearray(simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8), quality=95))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 50_000, 60_000)
    with pytest.raises(ItemError, match="it has 60000x50000 pixels, the limit is 178000000"):
        decode_image(bytes(data))
