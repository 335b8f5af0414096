"""The build steps of the image run in an empty folder, as the builder runs them.

There is no builder of images here. The files that are copied and the commands are those of
infra/docker/Dockerfile. Only the download of the locked packages is left out: pip's own check of a
lock would take gigabytes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = (REPOSITORY / "infra/docker/Dockerfile").read_text("utf-8")


def steps_of_the_build() -> list[tuple[str, str]]:
    """The instructions of the first stage: COPY with its words, RUN with its name and command."""
    stage = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1].replace("\\\n", " ")
    found, title = [], ""
    for line in stage.splitlines():
        if line.startswith("# step: "):
            title = line.removeprefix("# step: ")
        elif line.startswith("COPY "):
            found.append(("COPY", line.removeprefix("COPY ").replace("${BUILD}", "cpu")))
        elif line.startswith("RUN "):
            found.append((title, line.removeprefix("RUN ")))
    return found


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the last stage copies to /usr/local, without the locked packages."""
    top = tmp_path_factory.mktemp("image")
    source, made = top / "source", top / "install"
    source.mkdir()
    site = made / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    site.mkdir(parents=True)
    ran = []
    for kind, words in steps_of_the_build():
        if kind == "COPY":
            *given, target = words.split()
            for name in given:
                if (REPOSITORY / name).is_dir():
                    shutil.copytree(REPOSITORY / name, source / target)
                else:
                    shutil.copy(REPOSITORY / name, source / target)
            continue
        ran.append(kind)
        if kind == "install the locked packages":
            # The packages of this environment instead: a .pth file would not do in a prefix.
            shutil.copytree(Path(sysconfig.get_path("purelib")) / "setuptools", site / "setuptools")
            continue
        environ = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(top)}
        environ |= {"PREFIX": str(made), "SOURCE": str(source), "PIP_NO_CACHE_DIR": "1"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", words],
            cwd=source,
            env=environ,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert ran == ["install the locked packages", "install dpnet"]
    return made


def run(prefix: Path, *words: str) -> str:
    """Run a command of the image in an empty folder, with this environment's other packages."""
    (site,) = prefix.glob("lib/python3*/site-packages")
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ["PYTHONPATH"] = f"{site}:{sysconfig.get_path('purelib')}"
    done = subprocess.run(
        [sys.executable, *words], env=environ, capture_output=True, text=True, cwd=prefix
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_image_has_the_command_and_every_file_of_the_packages(prefix: Path) -> None:
    (site,) = prefix.glob("lib/python3*/site-packages")
    assert (prefix / "bin/dpnet").is_file()
    for package in ("data_prep", "dpnet", "flows"):
        wanted = {
            path.relative_to(REPOSITORY).as_posix()
            for path in (REPOSITORY / package).rglob("*")
            if path.suffix in (".py", ".yaml", ".typed") and "/." not in path.as_posix()
        }
        missing = {name for name in wanted if not (site / name).is_file()}
        assert missing == set()


def test_the_health_check_and_the_servers_of_the_image_start(prefix: Path) -> None:
    where = run(prefix, "-c", "import dpnet; print(dpnet.__file__)")
    assert where.startswith(str(prefix))
    assert run(prefix, str(prefix / "bin/dpnet"), "--version").startswith("dpnet ")
    assert "--host" in run(prefix, "-m", "dpnet.exporter", "--help")


def test_nothing_of_tests_docs_or_secrets_is_in_the_image(prefix: Path) -> None:
    names = {path.name for path in prefix.rglob("*")}
    assert not names & {"tests", "docs", ".git", ".env", "constraints.txt", "conftest.py"}
