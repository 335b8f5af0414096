"""Image shards built on Ray: the same bytes as without Ray, and Ray Data reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_sets import (
    SPLITS,
    all_samples,
    crops,
    files_of,
    photograph,
    photographs,
    record,
    table,
    tiles,
)

from data_prep.core.pool import run_tasks
from data_prep.core.storage.local import LocalStore
from data_prep.images.stage import prepare_images
from data_prep.shards.shards import split_shards
from dpnet.pipeline.ray_map import ray_map
from dpnet.pipeline.verify import verify
from dpnet.training.ray.start import connect, prepare_start

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    """Start a real Ray on this machine."""
    import ray

    with prepare_start("test-") as start, start.in_this_process():
        connect(**start.init_options(2))
        yield ray
        ray.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photographs(tmp_path / "photos", 40)
    (tmp_path / "photos/copy.png").write_bytes((tmp_path / "photos/trip 1/4.png").read_bytes())
    (tmp_path / "photos/broken.jpg").write_bytes(b"broken")
    return tmp_path / "photos"


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("make", [crops, tiles])
def test_ray_and_the_pool_make_the_same_bytes_in_every_version(
    folder: Path, tmp_path: Path, make: object
) -> None:
    config = make(folder, shard_samples=6 if make is crops else 200)  # type: ignore[operator]
    for generation in range(2):
        made = []
        for name, run in (("pool", run_tasks), ("ray", ray_map("local"))):
            store = LocalStore(tmp_path / name)
            ref = prepare_images(config, store, run)
            assert not ref.skipped
            made.append(
                (
                    ref.content_digest,
                    ref.summary,
                    files_of(store, ref),
                    table(store, ref, "sources"),
                )
            )
            assert verify(store).problems == []
        assert made[0] == made[1]
        (folder / "trip 1/7.png").unlink(missing_ok=True)
        photograph(folder / "trip 2/5.png", 300)
        for number in range(8):
            photograph(folder / f"{generation}/{number}.png", 200 + number)


@pytest.mark.usefixtures("ray")
def test_ray_data_reads_the_shards(folder: Path, tmp_path: Path) -> None:
    import ray.data

    store = LocalStore(tmp_path / "root")
    ref = prepare_images(crops(folder, shard_samples=6), store)
    shards = [key for split in SPLITS for key in split_shards(store, ref.folder, split)]
    dataset = ray.data.read_webdataset([str(store.path(key)) for key in shards], decoder=None)
    found = {row["__key__"]: row for row in dataset.take_all()}
    expected = dict(all_samples(store, ref))
    assert found.keys() == expected.keys()
    for key, files in expected.items():
        assert found[key]["jpg"] == files["jpg"]
        assert json.loads(found[key]["json"]) == record(files)
