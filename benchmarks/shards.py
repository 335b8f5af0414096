"""B1: raw photos to 256 x 256 training shards, on two cores.

    python benchmarks/shards.py --photos DIR [--copies 4] [--repeats 5] [--json]

The contenders. Each runs in its own process, with 2 worker processes:

* dpnet: `prepare_images`: read, hash, check, crop, encode, index, find duplicates, commit.
* img2dataset 1.47.0: the same photos by file:// URL, center_crop, JPEG of quality 95, tars with
  sha256. It runs with its defaults and "lean": without extracting EXIF, and with 16 threads instead
  of 256. It needs webdataset < 0.3 and we need > 1, so it gets its own environment.
* ray data: `read_images`, crop and encode in `map`, `write_webdataset`, with sha256.
* opencv pool: read, decode, crop, resize by area and encode in a plain pool. It hashes and writes
  nothing, so it is the limit.

The time is that of the call, without importing libraries. Each contender prepares all photos, and
separately a quarter of them. The rate is the difference in photos divided by the difference in
time. So the fixed cost of a contender does not count: the start of worker processes, and nothing
for Ray, which is started before. The table also shows the fixed cost, and the processor time of a
photo. The latter is the most reliable figure when other programs use the machine; it is missing for
Ray, because Ray's processes are not children of this one. `--copies` makes more photos by mirroring
and turning, so that no two have the same bytes or look the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare import Row, in_a_process, ratio, report, take_turns

IMG2DATASET = "img2dataset==1.47.0"
Timed = tuple[float, float]  # seconds, and those of the processor
SIZE, QUALITY, WORKERS, SHARD = 256, 95, 2, 1000
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dpnet-benchmarks"


def crop_and_encode(data: bytes) -> bytes:
    """Do the work of the limit on a photo."""
    import cv2
    import numpy as np

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return encode(crop(image))


def crop(image: Any) -> Any:
    import cv2

    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    return cv2.resize(square, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def encode(image: Any) -> bytes:
    import cv2

    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])


def size_of_sample(path: str) -> int:
    import cv2

    cv2.setNumThreads(1)
    return len(crop_and_encode(Path(path).read_bytes()))


def with_dpnet(photos: Path, out: Path) -> Callable[[], None]:
    import cv2  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    from data_prep.core.storage.local import LocalStore
    from data_prep.images.settings import ImagesSettings
    from data_prep.images.stage import prepare_images

    settings = ImagesSettings.model_validate(
        {
            "source": str(photos),
            "name": "bench",
            "mode": "center-crop",
            "size": SIZE,
            "quality": QUALITY,
            "shard_samples": SHARD,
            "workers": WORKERS,
        }
    )
    return lambda: print(prepare_images(settings, LocalStore(out)).content_digest, file=sys.stderr)


def with_img2dataset(photos: Path, out: Path, **options: Any) -> Callable[[], None]:
    from img2dataset import download  # type: ignore[import-not-found]

    urls = out.with_suffix(".txt")
    urls.write_text("".join(f"{path.as_uri()}\n" for path in files(photos)))
    return lambda: download(
        url_list=str(urls),
        output_folder=str(out),
        output_format="webdataset",
        image_size=SIZE,
        resize_mode="center_crop",
        encode_quality=QUALITY,
        number_sample_per_shard=SHARD,
        compute_hash="sha256",
        processes_count=WORKERS,
        **options,
    )


def with_lean_img2dataset(photos: Path, out: Path) -> Callable[[], None]:
    return with_img2dataset(photos, out, extract_exif=False, thread_count=16)


def with_ray_data(photos: Path, out: Path) -> Callable[[], None]:
    import ray
    import ray.data

    ray.init(
        address="local",
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2 << 30,
        _temp_dir=str(out.parent / "ray"),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        data = encode(crop(row["image"][..., ::-1]))
        key = Path(row["path"]).with_suffix("").as_posix().strip("/").replace("/", "_")
        facts = {"sha256": hashlib.sha256(data).hexdigest(), "key": row["path"]}
        return {"__key__": key, "jpg": data, "json": json.dumps(facts).encode()}

    def run() -> None:
        images = ray.data.read_images(str(photos), mode="RGB", include_paths=True)
        images.map(sample).write_webdataset(str(out), encoder=None)

    return run


def with_opencv_pool(photos: Path, out: Path) -> Callable[[], None]:
    import multiprocessing

    paths = [str(path) for path in files(photos)]

    def run() -> None:
        with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
            for _ in pool.imap_unordered(size_of_sample, paths, chunksize=32):
                pass

    return run


CONTENDERS = {
    "dpnet": with_dpnet,
    "img2dataset": with_img2dataset,
    "img2dataset, lean": with_lean_img2dataset,
    "ray data": with_ray_data,
    "opencv pool": with_opencv_pool,
}


def run_one(name: str, photos: Path, out: Path) -> None:
    """Run a contender, and print its seconds; this is the main function of its process."""
    work = CONTENDERS[name](photos, out)
    start = time.perf_counter()
    work()
    print(json.dumps(time.perf_counter() - start))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.jpg") if path.is_file())


def make_photos(source: Path, copies: int, folder: Path) -> tuple[Path, Path]:
    """Make two folders of photos from those in `source`: all, and every fourth of them."""
    import cv2

    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not 1 <= copies <= 8:
        sys.exit("--copies must be 1 to 8: there are no more ways to mirror and turn a photo")
    if len(found) * copies < 4000:
        sys.exit(
            f"{source} has {len(found)} JPEG photos: give more, or raise --copies. With fewer than"
            " 4000 in all, starting processes takes most of the time."
        )
    every, some = folder / "all", folder / "quarter"
    print(f"making {len(found) * copies} photos", file=sys.stderr, flush=True)
    for number, path in enumerate(found):
        image = cv2.imread(str(path))
        for copy in range(copies):
            turned = cv2.transpose(image) if copy & 4 else image
            turned = turned if not copy & 3 else cv2.flip(turned, (copy & 3) - 2)
            target = every / f"{copy}" / f"{number:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target), turned, [cv2.IMWRITE_JPEG_QUALITY, 85])
    for path in files(every)[::4]:
        target = some / path.relative_to(every)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    return every, some


def img2dataset_python(cache: Path) -> str:
    """Make an environment with the pinned img2dataset if needed, and return its interpreter."""
    home = cache / IMG2DATASET.replace("==", "-")
    python, ready = home / "bin" / "python", home / "ready"
    if not ready.exists():
        print(f"installing {IMG2DATASET} into {home}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        in_a_process(["bash", "-c", f"'{python}' -m pip install -q {IMG2DATASET} >&2 && echo true"])
        ready.touch()
    return str(python)


def measure(name: str, python: str, photos: Path, scratch: Path) -> tuple[float, float]:
    """Measure a contender, and exit if samples are missing.

    Args:
        name: of the contender.
        python: the interpreter to use.
        photos: folder of the photos.
        scratch: folder for the output, which is deleted.

    Returns:
        Seconds, and processor seconds including the start of the interpreter.
    """
    out = scratch / "out"
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [python, __file__, "--run", name, str(photos), str(out)]
    try:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = float(in_a_process(command, environment))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if name != "opencv pool":
            made, wanted = samples_in(out), len(files(photos))
            if made != wanted:
                sys.exit(f"{name} made {made} samples of {wanted} photos")
        return seconds, processor
    finally:
        shutil.rmtree(out, ignore_errors=True)


def samples_in(folder: Path) -> int:
    count = 0
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as tar:
            count += sum(member.name.endswith(".jpg") for member in tar)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--photos",
        type=Path,
        default=os.environ.get("DPNET_BENCH_PHOTOS"),
        help="folder of JPEG photos",
    )
    parser.add_argument("--copies", type=int, default=4, help="photos made of each one, 1-8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where img2dataset is installed")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        name, photos, out = arguments.run
        run_one(name, Path(photos), Path(out))
        return
    if arguments.photos is None:
        parser.error("give --photos, a folder of JPEG photos, or set DPNET_BENCH_PHOTOS")
    if len(os.sched_getaffinity(0)) > WORKERS:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:WORKERS])
    peer = img2dataset_python(arguments.cache.expanduser().absolute())
    scratch = Path(tempfile.mkdtemp(prefix="dpnet-bench-", dir="/tmp"))  # short: for Ray's sockets
    try:
        everything, quarter = make_photos(arguments.photos, arguments.copies, scratch)
        counts = len(files(everything)), len(files(quarter))

        def turn(name: str) -> Callable[[], tuple[Timed, Timed]]:
            python = peer if name.startswith("img2dataset") else sys.executable
            return lambda: (
                measure(name, python, quarter, scratch),
                measure(name, python, everything, scratch),
            )

        timed = take_turns({name: turn(name) for name in CONTENDERS}, arguments.repeats)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    more = counts[0] - counts[1]
    rates, rows = {}, list[Row]()
    for name, turns in timed.items():
        each = [(every[0] - some[0]) / more for some, every in turns]
        rates[name] = [1 / seconds for seconds in each]
        rows.append(Row(name, rates[name], "images/s"))
        fixed = [every[0] - counts[0] * s for (_, every), s in zip(turns, each, strict=True)]
        rows.append(Row(f"{name}, fixed", fixed, "s"))
        if name != "ray data":
            work = [1000 * (every[1] - some[1]) / more for some, every in turns]
            rows.append(Row(f"{name}, processor", work, "ms/image"))
    ratios = {
        "vs_img2dataset": ratio(rates["dpnet"], rates["img2dataset"]),
        "vs_lean_img2dataset": ratio(rates["dpnet"], rates["img2dataset, lean"]),
        "vs_ray_data": ratio(rates["dpnet"], rates["ray data"]),
        "of_pool_limit": ratio(rates["dpnet"], rates["opencv pool"]),
    }
    title = f"B1: {counts[0]} photos to {SIZE} x {SIZE} shards, {arguments.repeats} repeats"
    report(title, rows, ratios, as_json=arguments.json)


if __name__ == "__main__":
    main()
