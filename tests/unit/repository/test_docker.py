"""The image: its Dockerfile, what is sent to the builder, and its locked packages."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[3]
DOCKER = REPOSITORY / "infra" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text("utf-8")
PACKAGE: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
STAGES = re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)[1:]
BUILDS = ("cpu", "cuda")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text: str) -> dict[str, str]:
    """The version of each package, without the suffix of a build."""
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s+]+)", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def lock(build: str) -> str:
    return (DOCKER / f"requirements-{build}.lock").read_text("utf-8")


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).parent / "hadolint"
    found = str(program) if program.exists() else shutil.which("hadolint")
    assert found, "hadolint is not installed: run `make setup`"
    done = subprocess.run([found, str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("build", BUILDS)
def test_every_package_of_a_lock_has_hashes_and_the_version_that_is_tested(build: str) -> None:
    blocks = re.split(r"^(?=[A-Za-z0-9])", lock(build), flags=re.MULTILINE)[1:]
    assert len(blocks) > 150
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]
    tested = pinned((REPOSITORY / "constraints.txt").read_text("utf-8"))
    locked = pinned(lock(build))
    only_cuda = {name for name in locked if re.match(r"(nvidia|cuda)-|triton$", name)}
    assert bool(only_cuda) == (build == "cuda")
    different = {
        name: (version, tested.get(name))
        for name, version in locked.items()
        if name not in only_cuda and tested.get(name) != version
    }
    assert different == {}, "run: .venv/bin/python infra/docker/lock.py"


@pytest.mark.parametrize("build", BUILDS)
def test_a_lock_has_everything_that_the_package_needs(build: str) -> None:
    project = PACKAGE["project"]
    extras = project["optional-dependencies"]
    needed = [Requirement(each) for each in project["dependencies"]]
    needed += [Requirement(each) for name in ("kubernetes", "export") for each in extras[name]]
    needed += [Requirement(each) for each in PACKAGE["build-system"]["requires"]]
    locked = pinned(lock(build))
    for each in needed:
        version = locked.get(normal(each.name))
        assert version is not None, f"{each.name} is missing: run infra/docker/lock.py"
        assert each.specifier.contains(version), each


def test_the_two_locks_differ_only_in_torch_and_cuda() -> None:
    cpu, cuda = pinned(lock("cpu")), pinned(lock("cuda"))
    assert cpu.items() <= cuda.items()
    assert re.search(r"^torch==[\d.]+\+cpu ", lock("cpu"), re.MULTILINE)
    assert re.search(r"^torch==[\d.]+ ", lock("cuda"), re.MULTILINE)


def test_the_cpu_build_of_torch_has_its_own_hash() -> None:
    spec = importlib.util.spec_from_file_location("lock", DOCKER / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    version = pinned(lock("cpu"))["torch"]
    assert f"--hash=sha256:{module.TORCH_CPU[version]}" in lock("cpu")


def test_the_image_runs_as_nobody_and_has_labels_and_a_health_check() -> None:
    last = STAGES[-1]
    assert re.findall(r"^USER (.+)$", last, re.MULTILINE) == ["10001:10001"]
    assert last.index("USER 10001") > last.rindex("RUN "), "root runs nothing after USER"
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in last
    assert "HEALTHCHECK " in last
    version = re.search(r"^ARG VERSION=(.+)$", last, re.MULTILINE)
    assert version is not None
    assert version[1] == PACKAGE["project"]["version"]


def test_the_image_has_no_package_manager_of_python_no_caches_and_one_compiler_for_cuda() -> None:
    last = STAGES[-1]
    assert "pip uninstall -y --no-input pip" in last
    assert "rm -rf /var/lib/apt/lists/* /var/cache/apt/*" in last
    assert 'if [ "$BUILD" = cuda ]; then apt-get install' in last
    assert "gcc" not in last.split('if [ "$BUILD" = cuda ]')[0].split("RUN ")[-1]
    for path in re.findall(r"(?:HOME|_CACHE_DIR|PREFECT_HOME)=(\S+)", last):
        assert path == "/tmp" or path.startswith("/tmp/")


def test_every_base_image_has_a_version() -> None:
    version = re.search(r"^ARG PYTHON=(.+)$", DOCKERFILE, re.MULTILINE)
    assert version is not None
    assert re.fullmatch(r"3\.11\.\d+-slim-bookworm", version[1])
    python = re.search(r'^PYTHON, PLATFORM = "([\d.]+)"', (DOCKER / "lock.py").read_text(), re.M)
    assert python is not None
    assert version[1].startswith(f"{python[1]}-"), "the locks are for another Python"
    assert {stage.split()[1] for stage in STAGES} == {"python:${PYTHON}"}


def ignored(path: str) -> bool:
    """Return whether .dockerignore leaves a path out. The last line that fits decides."""
    result = False
    for line in (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        expression = "".join(
            {"**/": "(?:.*/)?", "*": "[^/]*"}.get(part, re.escape(part))
            for part in re.split(r"(\*\*/|\*)", pattern)
        )
        if re.fullmatch(f"{expression}(?:/.*)?", path):
            result = not line.startswith("!")
    return result


def test_only_what_the_dockerfile_copies_is_sent_to_the_builder() -> None:
    copied = [
        source
        for words in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in words.split()[:-1]
    ]
    copied = [each.replace("${BUILD}", build) for each in copied for build in BUILDS]
    top = [path for path in REPOSITORY.iterdir() if path.name not in (".git", ".venv")]
    paths = [each for path in top for each in (path.rglob("*") if path.is_dir() else [path])]
    files = [each.relative_to(REPOSITORY).as_posix() for each in paths if each.is_file()]
    sent = {name for name in files if not ignored(name)}
    wanted = {
        name
        for name in files
        if any(name == each or name.startswith(f"{each}/") for each in copied)
    }
    assert wanted
    assert sent == {name for name in wanted if "/." not in name and "__pycache__" not in name}
    for secret in (".env", "dpnet/.env", ".git/config", ".venv/bin/python", "tests/conftest.py"):
        assert ignored(secret), secret
