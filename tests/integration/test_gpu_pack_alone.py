"""The folder of `make gpu-pack` needs nothing but torch, NumPy, Pillow, OpenCV, PyArrow, pytest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from photo_files import smooth
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# Python imports this at its start, as `sitecustomize`. Only the listed packages are found outside
# of the folder itself: those that a machine with a GPU has, and what these need.
NOTHING_ELSE = """
from importlib.machinery import PathFinder
from pathlib import Path

INSTALLED = {
    "torch", "torchgen", "functorch", "triton", "nvidia", "numpy", "PIL", "cv2", "pyarrow",
    "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy",
    "pytest", "_pytest", "iniconfig", "packaging", "pluggy", "py", "pygments",
}
HERE = str(Path(__file__).parent)
found = PathFinder.find_spec.__func__

def find_spec(cls, name, path=None, target=None):
    spec = found(cls, name, path, target)
    place = spec and (spec.origin or str(list(spec.submodule_search_locations or [""])[0]))
    if not place or "site-packages" not in place or place.startswith(HERE):
        return spec
    return spec if name.partition(".")[0] in INSTALLED else None

PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder from a few photos, and let no other library be imported there."""
    top = tmp_path_factory.mktemp("gpu")
    photos = top / "photos"
    photos.mkdir()
    for number in range(40):
        Image.fromarray(smooth(256, 256, number)).save(photos / f"{number}.png")
    command = [sys.executable, "benchmarks/gpu_pack.py", "--photos", str(photos)]
    command += ["--out", str(top / "pack"), "--python", PYTHON]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "copy it to the machine" in done.stdout
    (top / "pack/site/sitecustomize.py").write_text(NOTHING_ELSE)
    return top / "pack"


def run(pack: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins of this environment
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(pack / "out"), *options]
    return subprocess.run(command, cwd=pack, env=environment, capture_output=True, text=True)


pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_the_folder_runs_alone(pack: Path) -> None:
    done = run(pack, "--quick", "--only", "correctness,inpaint,loader", "--minutes", "45")
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(file.read_text()) for file in sorted((pack / "out").glob("0*.json"))]
    assert [result["name"] for result in results] == ["correctness", "inpaint", "loader"]
    tests, _, loader = ({row["name"]: row["value"] for row in each["rows"]} for each in results)
    assert tests["passed"] + tests["skipped"] >= 5
    assert tests["failed"] == 0
    assert loader["step, with the loader"] > 0
    table = (pack / "out/table.md").read_text()
    assert table in done.stdout
    assert "| loader | passed |" in table


def test_the_folder_is_small_and_has_no_photo_as_a_file(pack: Path) -> None:
    files = [path for path in pack.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50e6
    assert [path for path in files if path.suffix in (".jpg", ".png")] == []


def test_what_is_missing_there_is_really_missing(pack: Path) -> None:
    site = f"{pack / 'site'}{os.pathsep}{pack}"
    code = "import {}"
    for name, status in (("pydantic", 0), ("simplejpeg", 0), ("ray", 1), ("yaml", 1), ("boto3", 1)):
        command = [sys.executable, "-c", code.format(name)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": site}, capture_output=True)
        assert done.returncode == status, (name, done.stderr)
