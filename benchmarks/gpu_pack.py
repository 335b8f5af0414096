"""Make the one folder that is taken to a machine with a GPU.

    python benchmarks/gpu_pack.py --photos DIR [--out build/gpu-pack] [--python 3.12]

The folder has our code, the tests that need a GPU, prepared shards of the photos (see
`benchmarks/gpu_data.py`), and the few libraries of ours that such a machine does not have. They
come from PyPI in the versions of constraints.txt, and are unpacked into the folder `site`. So the
code needs no other way without them. They fit one version of Python on x86-64 Linux. The machine
itself needs torch, triton, NumPy, Pillow, OpenCV, PyArrow and pytest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gpu import DATA, PACK, SITE, TOP, commit
from gpu_data import MOST, write_sets
from gpu_tests import needed_files

sys.path.insert(0, str(TOP))
from data_prep.core.errors import PipelineError

MOST_MB = 50
CODE = ("data_prep", "dpnet", "benchmarks")
FILES = ("pyproject.toml", "LICENSE")  # the first has the options of pytest
# Imported by training, the loader and the tests; with the libraries that pydantic needs.
LIBRARIES = (
    "annotated-types", "pydantic", "pydantic-core", "safetensors", "simplejpeg", "threadpoolctl",
    "typing-extensions", "typing-inspection",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MAKEFILE = """\
# make gpu        all checks and benchmarks, at most nine minutes (ARGS="--quick", "--only step")
PYTHON ?= python3
ARGS ?=
gpu:
\t@$(PYTHON) benchmarks/gpu.py $(ARGS)
"""
README = """\
# For a machine with a GPU

Made from {commit}, for Python {python}. The machine needs torch, triton, numpy, pillow,
opencv-python-headless, pyarrow and pytest.

    python3 benchmarks/gpu.py            # or: make gpu. At most nine minutes
    python3 benchmarks/gpu.py --quick    # first, and without a GPU: everything in small
    python3 benchmarks/gpu.py --only attention,step

It prints where the results are: a folder in build/gpu. Send back that whole folder.
"""


def pack(out: Path, photos: Path, python: str, most: int) -> float:
    """Make the folder. Return its size in MB.

    Args:
        out: the folder; it must not exist.
        photos: folder of photos.
        python: version of Python on the machine, as 3.12.
        most: photos to take.

    Raises:
        PipelineError: the folder exists or would be too large, a library cannot be had, or the
            photos cannot be used.
    """
    if out.exists():
        raise PipelineError(f"{out} exists: delete it, or choose another folder with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        copy_code(folder)
        unpack_libraries(folder / SITE.name, python)
        write_sets(folder / DATA.relative_to(TOP), photos, most)
        made_from = commit()
        (folder / PACK.name).write_text(json.dumps({"python": python, "commit": made_from}))
        (folder / "README.md").write_text(README.format(commit=made_from, python=python))
        (folder / "Makefile").write_text(MAKEFILE)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        if size > MOST_MB:
            raise PipelineError(
                f"the folder would have {size:.0f} MB, more than {MOST_MB}: take fewer photos with"
                f" --most {int(0.9 * most * MOST_MB / size)}."
            )
        folder.rename(out)
    return size


def copy_code(folder: Path) -> None:
    """Copy our packages, the benchmarks, and the tests that need a GPU with what they import."""
    for name in CODE:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(TOP / name, folder / name, ignore=ignored)
    for file in [*needed_files(TOP), *(TOP / name for name in FILES)]:
        target = folder / file.relative_to(TOP)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def unpack_libraries(site: Path, python: str) -> None:
    """Download the libraries for a version of Python, and unpack them. Raises PipelineError."""
    with tempfile.TemporaryDirectory(prefix="dpnet-wheels-") as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--implementation", "cp",
            "--python-version", python, *(f"--platform={name}" for name in PLATFORMS),
            "--constraint", str(TOP / "constraints.txt"), "--dest", scratch, *LIBRARIES,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = (lines or ["no message"])[-1].removeprefix("ERROR: ")
            raise PipelineError(
                f"pip cannot download the libraries for Python {python} ({reason}): check the"
                " network and the version in --python."
            )
        for wheel in sorted(Path(scratch).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)


def main() -> None:
    """Make the folder, or end with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=TOP / "build/gpu-pack", metavar="DIR")
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="(default: 3.12)")
    parser.add_argument("--most", type=int, default=MOST, help=f"photos to take (default: {MOST})")
    options = parser.parse_args()
    try:
        size = pack(options.out.absolute(), options.photos, options.python, options.most)
    except PipelineError as error:
        sys.exit(f"make gpu-pack: {error}")
    print(f"{options.out} has {size:.0f} MB: copy it to the machine, and run `make gpu` in it.")


if __name__ == "__main__":
    main()
