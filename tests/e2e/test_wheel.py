"""A built wheel, installed outside of the checkout, works.

The environment is new and holds the wheel alone. The libraries that the wheel depends on are
borrowed from the environment of the tests, since to install them again takes minutes and gigabytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from image_sets import photographs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("data_prep", "dpnet", "flows")
IMPORT_ALL = """
import importlib, pathlib, sys
import dpnet
folder = pathlib.Path(dpnet.__file__).parents[1]
assert str(folder).startswith(sys.prefix), folder
names = []
for package in {packages}:
    for file in sorted((folder / package).rglob("*.py")):
        name = ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__"):
            importlib.import_module(name)
            names.append(name)
print(len(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that git knows."""
    top = tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if name.startswith(PACKAGES) or "/" not in name:
            (top / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (top / "source" / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(top), str(top / "source")], check=True, cwd=top)
    (built,) = top.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel and borrowed libraries."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    (site,) = home.glob("lib/python3*/site-packages")
    # A line of a .pth file adds a folder, but not what .pth files there name: no checkout.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", "-q", str(wheel)]
    subprocess.run(command, check=True, cwd=home)
    return home / "bin"


def run(*words: str | Path, folder: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith(PACKAGES)}
    wanted = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".typed")
    }
    assert {name for name in wanted if "/." not in name} <= held
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_every_module_of_the_wheel_can_be_imported(installed: Path, tmp_path: Path) -> None:
    code = IMPORT_ALL.format(packages=PACKAGES)
    assert int(run(installed / "python", "-c", code, folder=tmp_path)) > 100


def test_the_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    version = run(installed / "dpnet", "--version", folder=tmp_path).split()[-1]
    code = "import dpnet, importlib.metadata as m; print(dpnet.__version__, m.version('{}'))"
    both = run(installed / "python", "-c", code.format("dpnet-pipeline"), folder=tmp_path)
    assert both.split() == [version, version]
    assert "inpaint" in run(installed / "dpnet", "--help", folder=tmp_path)
    described = run(installed / "dpnet", "model", "describe", "--preset", "tiny", folder=tmp_path)
    assert "GMac" in described


def test_the_installed_command_builds_shards(installed: Path, tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos", 6)
    words = ("images", "build", photos, "--name", "few", "--size", "32", "--json")
    line = run(installed / "dpnet", *words, "--root", tmp_path / "root", folder=tmp_path)
    built = json.loads(line.splitlines()[-1])
    assert built["ok"]
    assert (tmp_path / "root" / "images" / "few").is_dir()
