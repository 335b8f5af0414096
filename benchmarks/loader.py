"""B2: read one epoch of image shards and mask shards as uint8 batches, on two cores.

    python benchmarks/loader.py [--check-order] [--photos DIR] [--repeats 5] [--s3 URI] [--json]
    python benchmarks/loader.py --pairs [--repeats 5] [--json]    (see pairs.py)

Each contender runs in its own process. All decode the same 256 x 256 JPEGs of quality 95, with a
mask for each, in random order, into batches for the device: image N H W 3 uint8 and valid N H W
uint8 in {0, 1}.

* dpnet: `ours`, which also checks each sample by its hash, and flips and turns samples.
* webdataset: WebLoader, 2 workers, our image shards zipped with the mask shards; by simplejpeg and
  by Pillow.
* mosaicml-streaming: the same bytes as MDS, 2 workers.
* litdata: the same bytes optimized, 0 and 2 workers. The better one counts.
* ray data: `read_webdataset` of our shards, 2 CPUs. Only the order of the files is random.
* decode limit: 2 processes decode from memory into one batch each, and send nothing back.

No other loader is slower because of its decoder: all but one use simplejpeg, and workers decode
straight into shared memory. In the formats of MDS and litdata an image and its mask are one record,
so these loaders need no pairing. The conversion is not timed.

The time is that from the request for the first batch to the last batch, without the imports. Each
contender reads all images and, in another process, a quarter of them. The rate is the difference in
images divided by the difference in time. So fixed costs do not count (start of workers, first fill
of buffers). They are shown in a row of their own; Ray starts before, so its fixed cost is small.
The processor time of an image is the best figure if other programs use the machine. It is missing
for Ray, because its processes are not children of this one.

With --s3 the data is copied to URI, read from there with empty caches, and removed at the end.
webdataset cannot read S3, so it is left out. So is mosaicml-streaming, which read wrong bytes as a
sample in two of two runs here. It needs numpy < 2.2, so it and litdata get their own environment,
with 6 GB for torch.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from compare import Row, in_a_process, ratio, report, take_turns
from pairs import measure_pairs

# torchvision installs the torch that fits it. The decoders have the versions installed here.
PEERS = ("mosaicml-streaming==0.13.0", "litdata==0.2.76", "torchvision==0.29.1")
NOT_ON_S3 = ("webdataset", "mosaicml")
DECODERS = ("simplejpeg", "opencv-python-headless", "pydantic")
SIZE, QUALITY, WORKERS, BATCH, LANES = 256, 95, 2, 32, 64
IMAGE, VALID = (SIZE, SIZE, 3), (SIZE, SIZE)
SHARDS = 8  # of images and of masks; an equal number for each worker
CHUNK = 16 << 20  # bytes in a file of the other formats: about 500 images, as in our shards
BUFFER = 1000  # samples that webdataset shuffles
RAY_BATCH = 256  # images in a call of Ray Data: the fastest of 32, 256 and a whole block
CROPS = 300  # of each sample photo
WORLDS, EPOCHS = (1, 2, 3, 8), 2  # for the check of the order
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dpnet-benchmarks"
Sample = tuple[bytes, bytes]  # a JPEG and the PNG of its mask
Batches = Iterable[tuple[Any, Any]]  # image and valid, arrays or tensors
Decode = Callable[[bytes, Any], None]  # into an array
Counted = tuple[int, float, float]  # images, seconds, and seconds of the processor


@dataclass(frozen=True)
class Data:
    """The data of an epoch, and its place."""

    root: str  # a folder or an S3 URI
    images: str  # folders under it
    masks: str
    count: int  # of images, and of masks

    def keys(self, folder: str) -> list[str]:
        from data_prep.core.storage.open import open_store
        from data_prep.shards.shards import split_shards

        return split_shards(open_store(self.root), folder, "train")

    def shards(self, folder: str) -> list[str]:
        return [f"{self.root}/{key}" for key in self.keys(folder)]

    def samples(self) -> Iterator[Sample]:
        """Yield each image with a mask, in the order of the shards."""
        from data_prep.core.storage.open import open_store
        from data_prep.shards.shards import iterate_shard

        store = open_store(self.root)

        def payloads(folder: str) -> Iterator[bytes]:
            for key in self.keys(folder):
                yield from (next(iter(files.values())) for _, files in iterate_shard(store, key))

        return zip(payloads(self.images), payloads(self.masks), strict=True)


def sets_of(data: Data) -> list[Any]:
    """Return our shards of images and of masks."""
    from data_prep.core.manifest import load_reference
    from data_prep.core.storage.open import open_store
    from dpnet.loading.shard_files import find_shards

    store = open_store(data.root)
    folders = (data.images, data.masks)
    return [find_shards(store, load_reference(store, folder), "train") for folder in folders]


def ours(data: Data) -> Batches:
    """Yield the batches of an epoch from our loader."""
    from data_prep.core.storage.open import open_store
    from dpnet.loading.loader import Loader
    from dpnet.loading.shard_files import ShardFiles

    images, masks = sets_of(data)
    options: dict[str, Any] = {"size": SIZE, "seed": 0, "lanes": LANES, "threads": WORKERS}
    files = ShardFiles(open_store(data.root), None)
    loader = Loader(images, masks, files, batch=BATCH, **options)
    for _, made in loader.batches(0, images.samples // BATCH):
        yield made.image, made.valid


def check_order(data: Data) -> int:
    """Read two epochs with several numbers of ranks. Return the number of samples read.

    Exits with an error unless all of this holds: each sample comes once an epoch for every number
    of ranks, no two ranks have the same cursor, and one rank reads a shard in an epoch if the
    number of ranks divides the lanes.
    """
    from concurrent.futures import ThreadPoolExecutor

    from data_prep.core.storage.open import open_store
    from data_prep.shards.shards import iterate_shard
    from dpnet.loading.lanes import Lanes
    from dpnet.loading.order import ShardOrder, rank_cursors
    from dpnet.loading.shard_files import ShardFiles

    store, came = open_store(data.root), 0
    for shards in sets_of(data):
        every = {key for s in shards.shards for key, _ in iterate_shard(store, s.key)}
        order = ShardOrder(shards.digest, 0, [s.samples for s in shards.shards], LANES)
        steps = math.ceil((EPOCHS + 1) * len(every) / BATCH)  # an epoch ends within the next one
        epochs = order.samples_at(0, steps * BATCH)[:, 0]
        first: list[str] = []
        for world in WORLDS:
            keys, readers = [""] * (steps * BATCH), dict[tuple[int, str], set[int]]()
            for rank in range(world):
                with ThreadPoolExecutor(WORKERS) as pool:
                    files, place = ShardFiles(store, None), {"rank": rank, "world": world}
                    lanes = Lanes(order, shards, files, pool, 0, steps * BATCH, **place)
                    for step in range(steps):
                        for cursor in rank_cursors(step, BATCH, rank, world):
                            shard, position = lanes.at(cursor)
                            assert not keys[cursor], f"cursor {cursor} is of two ranks"
                            keys[cursor] = shard.keys[position].as_py()
                            visit = (int(epochs[cursor]), shard.shard.key)
                            readers.setdefault(visit, set()).add(rank)
            for epoch in range(EPOCHS):
                seen = [key for key, its in zip(keys, epochs, strict=True) if its == epoch]
                if len(seen) != len(every) or set(seen) != every:
                    sys.exit(
                        f"epoch {epoch} of {shards.uri} has {len(seen)} samples of {len(every)}"
                    )
                came += len(seen)
            first = first or keys
            if keys != first:
                sys.exit(f"{world} ranks read {shards.uri} in another order than one")
            if order.lanes % world == 0 and any(len(ranks) > 1 for ranks in readers.values()):
                sys.exit(f"a shard of {shards.uri} is read by several of {world} ranks")
    return came


def simplejpeg(data: bytes, out: Any) -> None:
    from simplejpeg import decode_jpeg

    decode_jpeg(data, colorspace="RGB", buffer=out)


def pillow(data: bytes, out: Any) -> None:
    import numpy as np
    from PIL import Image

    out[:] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def mask(data: bytes, out: Any) -> None:
    from data_prep.masks.codec import valid_from_png

    out[:] = valid_from_png(data)


def decoded(encoded: Sequence[bytes], decode: Decode, out: Any) -> Any:
    for place, data in zip(out, encoded, strict=True):
        decode(data, place)
    return out


def as_tensors(samples: Sequence[Sample], decode: Decode = simplejpeg) -> tuple[Any, Any]:
    """Return a batch of another loader. In a worker it is in shared memory, to avoid a copy."""
    import torch
    from torch.utils.data import get_worker_info

    jpegs, pngs = zip(*samples, strict=True)
    image = torch.empty((len(jpegs), *IMAGE), dtype=torch.uint8)
    valid = torch.empty((len(pngs), *VALID), dtype=torch.uint8)
    if get_worker_info() is not None:
        image, valid = (t.share_memory_() for t in (image, valid))  # type: ignore[no-untyped-call]
    decoded(jpegs, decode, image.numpy())
    decoded(pngs, mask, valid.numpy())
    return image, valid


def of_records(records: Sequence[dict[str, bytes]]) -> tuple[Any, Any]:
    return as_tensors([(record["jpg"], record["png"]) for record in records])


def with_dpnet(data: Data, scratch: Path) -> Batches:
    import pyarrow.parquet  # noqa: F401

    import dpnet.loading.loader  # noqa: F401

    return ours(data)


def with_webdataset(data: Data, scratch: Path, decode: Decode) -> Batches:
    import webdataset as wds
    from torch.utils.data import IterableDataset

    def stream(folder: str, extension: str) -> Any:
        shards = data.shards(folder)
        # Skip the other file of a sample.
        only = {"select_files": lambda name: name.endswith(extension)}
        return wds.WebDataset(shards, shardshuffle=SHARDS, **only)

    class Pairs(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            images = stream(data.images, ".jpg").shuffle(BUFFER)
            # The shards of a worker can hold a few masks less than images.
            masks = stream(data.masks, ".png").repeat().shuffle(BUFFER)
            pairs = ((a["jpg"], b["png"]) for a, b in zip(images, masks, strict=False))
            while batch := list(islice(pairs, BATCH)):
                yield as_tensors(batch, decode)

    batches: Batches = wds.WebLoader(Pairs(), batch_size=None, num_workers=WORKERS)
    return batches


def with_mosaicml(data: Data, scratch: Path) -> Batches:
    from streaming import StreamingDataset  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader

    place = f"{data.root}/mds"
    dataset = StreamingDataset(local=place, batch_size=BATCH, shuffle=True)
    return DataLoader(dataset, BATCH, num_workers=WORKERS, collate_fn=of_records)


def with_litdata(data: Data, scratch: Path, workers: int) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found]
    from litdata.streaming import downloader  # type: ignore[import-not-found]

    # Its public options do not allow an S3 server without TLS.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"
    place = f"{data.root}/litdata"
    where = {"cache_dir": str(scratch)} if "://" in place else {}
    dataset = StreamingDataset(place, shuffle=True, **where)
    options = {"num_workers": workers, "collate_fn": of_records}
    batches: Batches = StreamingDataLoader(dataset, batch_size=BATCH, **options)
    return batches


def with_ray_data(data: Data, scratch: Path) -> Batches:
    import numpy as np
    import ray
    import ray.data

    ray.init(
        address="local",
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2 << 30,
        _temp_dir=str(scratch),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False

    def pixels(shards: list[str], extension: str, decode: Decode, shape: tuple[int, ...]) -> Any:
        def decode_rows(rows: dict[str, Any]) -> dict[str, Any]:
            out = np.empty((len(rows[extension]), *shape), np.uint8)
            return {"pixels": decoded(rows[extension], decode, out)}

        only = {"decoder": None, "fileselect": [f"*.{extension}"], "shuffle": "files"}
        rows = ray.data.read_webdataset(shards, **only)
        rows = rows.map_batches(decode_rows, batch_size=RAY_BATCH)
        return (batch["pixels"] for batch in rows.iter_batches(batch_size=BATCH))

    images, masks = data.shards(data.images), data.shards(data.masks)
    # The start of its processes takes a variable time, so start them before the measurement.
    for _ in pixels(images[:2], "jpg", simplejpeg, IMAGE):
        pass
    both = pixels(images, "jpg", simplejpeg, IMAGE), pixels(masks, "png", mask, VALID)
    return zip(*both, strict=True)


HELD: dict[str, Any] = {}  # data that the processes of the limit inherit


def decode_held(first: int) -> int:
    jpegs, pngs = zip(*HELD["samples"][first : first + BATCH], strict=True)
    decoded(jpegs, simplejpeg, HELD["image"][: len(jpegs)])
    decoded(pngs, mask, HELD["valid"][: len(pngs)])
    return len(jpegs)


def with_decode_alone(data: Data, scratch: Path) -> Iterable[int]:
    import multiprocessing

    import numpy as np

    HELD["samples"] = list(data.samples())
    HELD["image"], HELD["valid"] = (np.empty((BATCH, *shape), np.uint8) for shape in (IMAGE, VALID))

    def counts() -> Iterator[int]:
        with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
            yield from pool.imap_unordered(decode_held, range(0, data.count, BATCH))

    return counts()


CONTENDERS: dict[str, Callable[[Data, Path], Batches | Iterable[int]]] = {
    "dpnet": with_dpnet,
    "webdataset, simplejpeg": partial(with_webdataset, decode=simplejpeg),
    "webdataset, Pillow": partial(with_webdataset, decode=pillow),
    "mosaicml-streaming": with_mosaicml,
    "litdata, 0 workers": partial(with_litdata, workers=0),
    "litdata, 2 workers": partial(with_litdata, workers=2),
    "ray data": with_ray_data,
    "decode limit": with_decode_alone,
}


def checked(image: Any, valid: Any) -> int:
    """Check a batch. Return its number of images."""
    import numpy as np

    assert (image.shape[1:], valid.shape) == (IMAGE, image.shape[:3])
    assert all(str(pixels.dtype).endswith("uint8") for pixels in (image, valid))
    # Use NumPy: torch would start threads that take time from the decoders.
    assert np.asarray(valid[0]).max() <= 1
    return len(image)


def processor() -> float:
    """Return the processor seconds of this process and of its finished children."""
    used = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def run_one(name: str, data: Data, scratch: Path) -> None:
    """Run a contender in this process. Print a `Counted`."""
    import cv2  # noqa: F401
    import PIL.Image  # noqa: F401
    import simplejpeg  # noqa: F401

    import data_prep.masks.stage  # noqa: F401

    batches = CONTENDERS[name](data, scratch)
    images, start, before = 0, perf_counter(), processor()
    end = start
    for batch in batches:
        end = perf_counter()
        images += batch if isinstance(batch, int) else checked(*batch)
    print(json.dumps([images, end - start, processor() - before]))  # its workers have ended by now


def records(data: Data, _: int = 0) -> Iterator[dict[str, bytes]]:
    for jpeg, png in data.samples():
        yield {"jpg": jpeg, "png": png}


def convert(data: Data) -> None:
    """Write the formats of the other loaders with their own tools, next to the shards."""
    from litdata import optimize
    from streaming import MDSWriter

    columns = {"jpg": "bytes", "png": "bytes"}
    with MDSWriter(out=f"{data.root}/mds", columns=columns, size_limit=CHUNK) as writer:
        for record in records(data):
            writer.write(record)
    made = {"output_dir": f"{data.root}/litdata", "chunk_bytes": CHUNK}
    optimize(fn=partial(records, data), inputs=[0], num_workers=1, **made)
    print("true")


def crops_of_sample_photos(folder: Path) -> list[Path]:
    """Cut random squares from the photos in scikit-image."""
    import cv2
    import numpy as np

    from data_prep.raw.sample_photos import write_sample_photos

    write_sample_photos(folder / "whole")
    random = np.random.default_rng(0)
    made = []
    for path in photos_in(folder / "whole"):
        image: Any = cv2.imread(str(path))
        for number in range(CROPS):
            top, left = (int(random.integers(side - SIZE + 1)) for side in image.shape[:2])
            made.append(folder / f"{path.stem}-{number}.png")
            cv2.imwrite(str(made[-1]), image[top : top + SIZE, left : left + SIZE])
    return made


def photos_in(folder: Path) -> list[Path]:
    suffixes = (".jpg", ".jpeg", ".png")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def prepare(photos: Sequence[Path], folder: Path, name: str, python: str) -> Data:
    """Write shards of images and of as many masks, and the same data in the other formats."""
    from data_prep.core.storage.local import LocalStore
    from data_prep.images.settings import ImagesSettings
    from data_prep.images.stage import prepare_images
    from data_prep.masks.settings import MasksSettings
    from data_prep.masks.stage import prepare_masks

    source, store = folder / "photos" / name, LocalStore(folder / "data" / name)
    one = photos[:1]
    for split, chosen in {"train": photos, "val": one, "test": one}.items():
        (source / split).mkdir(parents=True)
        for number, path in enumerate(chosen):
            (source / split / f"{number:06d}{path.suffix}").symlink_to(path.absolute())
    config: dict[str, Any] = {"source": str(source), "size": SIZE, "quality": QUALITY}
    config |= {"mode": "center-crop", "dedupe": "off", "near_duplicates": "off"}
    config |= {"shard_samples": math.ceil(len(photos) / SHARDS), "workers": WORKERS}
    images = prepare_images(ImagesSettings.model_validate(config), store)
    count = images.summary["splits"]["train"]["samples"]
    config = {"size": SIZE, "train": count, "eval_per_bin": 1}
    config |= {"shard_samples": math.ceil(count / SHARDS)}
    masks = prepare_masks(MasksSettings.model_validate(config), store)
    data = Data(str(store.folder), images.folder, masks.folder, count)
    in_a_process([python, __file__, "--convert", json.dumps(asdict(data))], environment())
    return data


def environment() -> dict[str, str]:
    own = {"RAY_USAGE_STATS_ENABLED": "0", "LITDATA_DISABLE_VERSION_CHECK": "1"}
    return {**os.environ, **own, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


def peers_python(cache: Path) -> str:
    """Return the Python of an environment with the other loaders. Create it if needed."""
    packages = " ".join([*PEERS, *(f"{name}=={version(name)}" for name in DECODERS)])
    home = cache / f"loader-{hashlib.sha256(packages.encode()).hexdigest()[:12]}"
    python, ready = home / "bin" / "python", home / "ready"
    if not ready.exists():
        print(f"installing {', '.join(PEERS)} into {home}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        in_a_process(["bash", "-c", f"'{python}' -m pip install -q {packages} >&2 && echo true"])
        ready.touch()
    return str(python)


def measure(name: str, python: str, data: Data, scratch: Path) -> Counted:
    """Measure an epoch of a contender. Exit if images are missing or come twice."""
    own = scratch / "own"
    own.mkdir()
    command = [python, __file__, "--run", name, json.dumps(asdict(data)), str(own)]
    try:
        images, seconds, work = in_a_process(command, environment())
    finally:
        shutil.rmtree(own, ignore_errors=True)
    # A loader can drop its last batch, or fill it up.
    if abs(images - data.count) >= BATCH * WORKERS:
        sys.exit(f"{name} gave {images} images of {data.count}")
    return images, seconds, work


@contextmanager
def put(folder: Path, uri: str) -> Iterator[None]:
    """Copy a folder to `uri`, and delete the copy at the end."""
    from data_prep.core.storage.local import LocalStore
    from data_prep.core.storage.open import open_store

    here, there = LocalStore(folder), open_store(uri)
    keys = [entry.key for entry in here.list()]
    try:
        for key in keys:
            there.upload(key, here.path(key))
        yield
    finally:
        for key in keys:
            there.delete(key)


def measure_all(
    photos: Path | None, repeats: int, s3: str | None, cache: Path, *, check: bool
) -> dict[str, list[tuple[Counted, Counted]]]:
    """Return the quarter and the whole epoch of each contender, for each repeat."""
    if len(os.sched_getaffinity(0)) > WORKERS:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:WORKERS])
    peers = peers_python(cache)
    scratch = Path(
        tempfile.mkdtemp(prefix="dpnet-bench-", dir="/tmp")
    )  # a short path, for Ray's sockets
    try:
        found = photos_in(photos) if photos else crops_of_sample_photos(scratch / "crops")
        some = prepare(found[::4], scratch, "quarter", peers)
        every = prepare(found, scratch, "all", peers)
        if check:
            print(
                f"order: {check_order(every)} samples, each once an epoch, in each of {EPOCHS}"
                f" epochs, of images and of masks, for {', '.join(map(str, WORLDS))} ranks"
            )
        if s3:
            some, every = (replace(d, root=f"{s3}/{Path(d.root).name}") for d in (some, every))

        def turn(name: str) -> Callable[[], tuple[Counted, Counted]]:
            python = peers if name.startswith(("mosaicml", "litdata")) else sys.executable
            return lambda: (
                measure(name, python, some, scratch),
                measure(name, python, every, scratch),
            )

        names = [name for name in CONTENDERS if not (s3 and name.startswith(NOT_ON_S3))]
        with put(scratch / "data", s3) if s3 else nullcontext():
            return take_turns({name: turn(name) for name in names}, repeats)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of photos (default: samples)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--s3", metavar="URI", help="copy the data there and read it from there")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder of the environment of other loaders"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON at the end")
    parser.add_argument(
        "--check-order", action="store_true", help="first check that an epoch has each sample once"
    )
    parser.add_argument(
        "--pairs", action="store_true", help="measure evaluation pairs instead (pairs.py)"
    )
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--convert", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, data, scratch = options.run
        run_one(name, Data(**json.loads(data)), Path(scratch))
        return
    if options.pairs:
        measure_pairs(options.repeats, as_json=options.json)
        return
    if options.convert:
        convert(Data(**json.loads(options.convert)))
        return
    cache = options.cache.expanduser().absolute()
    check = options.check_order
    timed = measure_all(options.photos, options.repeats, options.s3, cache, check=check)
    rates, rows = {}, list[Row]()
    for name, turns in timed.items():
        more = [[a - b for a, b in zip(every, some, strict=True)] for some, every in turns]
        rates[name] = [images / seconds for images, seconds, _ in more]
        rows.append(Row(name, rates[name], "images/s"))
        fixed = [every[1] - every[0] / r for (_, every), r in zip(turns, rates[name], strict=True)]
        rows.append(Row(f"{name}, fixed", fixed, "s"))
        if name != "ray data":
            work = [1000 * used / images for images, _, used in more]
            rows.append(Row(f"{name}, processor", work, "ms/image"))
    others = [name for name in rates if name not in ("dpnet", "decode limit")]
    ratios = {
        "vs_best_peer": min(ratio(rates["dpnet"], rates[name]) for name in others),
        "vs_ray_data": ratio(rates["dpnet"], rates["ray data"]),
        "of_decode_limit": ratio(rates["dpnet"], rates["decode limit"]),
    }
    count, where = timed["decode limit"][0][1][0], "S3" if options.s3 else "a folder"
    title = f"B2: {count} images and masks from {where}, {options.repeats} repeats"
    report(title, rows, ratios, as_json=options.json)


if __name__ == "__main__":
    main()
