"""Single samples by position, as validation and evaluation read them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_shards import stage_of

from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.loading.samples import Samples


class Root:
    """A store with pictures of these sizes (width, height) in two shards."""

    def __init__(self, folder: Path, *sizes: tuple[int, int]) -> None:
        self.store = LocalStore(folder)
        random = np.random.default_rng(0)
        self.pictures = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]
        pngs = []
        for picture in self.pictures:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            pngs.append(file.getvalue())
        self.folder = stage_of(self.store, "images", [pngs[:1], pngs[1:]]).folder


def test_a_larger_image_is_cut_to_the_square_in_its_middle(tmp_path: Path) -> None:
    root = Root(tmp_path, (16, 16), (21, 40))
    whole = Samples(root.store, root.folder, "train")
    assert len(whole) == 2
    assert all((whole.image(i) == root.pictures[i]).all() for i in range(2))
    cut = Samples(root.store, root.folder, "train", 16)
    assert (cut.image(0) == root.pictures[0]).all()
    assert (cut.image(1) == root.pictures[1][12:28, 2:18]).all()


def test_a_smaller_image_is_told_in_a_sentence(tmp_path: Path) -> None:
    root = Root(tmp_path, (16, 16), (40, 15))
    samples = Samples(root.store, root.folder, "train", 16)
    with pytest.raises(
        PipelineError, match=r"sample s0 of .*train-000001\.tar cannot be decoded"
    ) as e:
        samples.image(1)
    assert "it is 40 x 15 pixels, smaller than the masks' 16" in str(e.value)


@pytest.mark.parametrize("harm", ["missing", "shorter than its index says"])
def test_a_shard_that_is_not_whole_is_named(tmp_path: Path, harm: str) -> None:
    root = Root(tmp_path, (16, 16), (16, 16))
    samples = Samples(root.store, root.folder, "train")
    path = root.store.path(samples.shards[1])
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(PipelineError, match=rf"train-000001\.tar is {harm}: run `dpnet verify`"):
        samples.image(1)


def test_a_split_without_a_sample_is_an_error(tmp_path: Path) -> None:
    root = Root(tmp_path, (16, 16), (16, 16))
    root.store.write(f"{root.folder}/val.urls", b"")
    with pytest.raises(PipelineError, match=r"the split 'val' of .* is empty"):
        Samples(root.store, root.folder, "val")
