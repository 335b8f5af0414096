"""Every command of docs/operations.md is run by a test, or is marked as needing a cluster."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from k8s_manifests import K8S, REPOSITORY, kustomize, rendered
from small_root import new_store, real_data, run_and_evaluation

from dpnet.cli.main import main
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register

PAGE = (REPOSITORY / "docs/operations.md").read_text("utf-8")
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["version"]
MARK = "# needs a cluster"
# Commands that serve until they are stopped, or need a server: the tests that run them.
ELSEWHERE = {
    "dpnet up": "tests/integration/test_up_running.py",
    "dpnet deploy": "tests/e2e/test_ui.py",
    "dpnet serve": "tests/integration/test_serve.py",
    "prefect worker start": "tests/e2e/test_ui.py",
    "python -m dpnet.exporter": "tests/unit/dpnet/pipeline/test_exporter.py",
    "export ": "",
}


def blocks() -> Iterator[list[str]]:
    """Yield the commands of each block; a line that ends with a backslash goes on."""
    for found in re.finditer(r"(?:^ {4,}\S.*\n(?:\n(?= {4,}\S))?)+", PAGE, re.MULTILINE):
        text = found[0].replace("\\\n", " ")
        yield [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def in_checkout(path: str) -> Path:
    """Return the file or folder from which the page has copied `path`."""
    return K8S / path.removeprefix("../dpnet-k8s/")


COMMANDS = [line for block in blocks() if block[0] != MARK for line in block]
CLUSTER = [line for block in blocks() if block[0] == MARK for line in block[1:]]


def test_there_are_commands_of_both_kinds() -> None:
    assert len(COMMANDS) > 12
    assert len(CLUSTER) > 30
    assert not any(MARK in line for line in COMMANDS), "the mark is the first line of a block"


def test_every_command_that_needs_a_cluster_uses_one() -> None:
    programs = ("kubectl ", "docker ", "prefect ", "export PREFECT_API_URL")
    assert [line for line in CLUSTER if not line.startswith(programs)] == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with two registered versions, made of files that only a registration reads."""
    store = new_store(tmp_path / "root")
    for psnr in (20.0, 21.0):
        run, evaluation = run_and_evaluation(store, psnr)
        register(RegisterSettings(promote="always"), run, evaluation, store)
    return tmp_path / "root"


def commands_of(*starts: str) -> list[str]:
    found = [line.partition("  #")[0] for line in COMMANDS if line.startswith(starts)]
    assert found, starts
    return list(dict.fromkeys(found))


def test_the_commands_of_the_registry_work_in_the_order_of_the_page(root: Path) -> None:
    for line in commands_of("dpnet registry"):
        words = shlex.split(line.replace("/data/dpnet", str(root)))
        words = ["1" if word == "3" else word for word in words[1:]]
        assert main(words) == 0, line


def test_the_commands_that_check_and_clean_a_root_work(tmp_path: Path) -> None:
    store = new_store(tmp_path / "root")
    real_data(store)
    for line in commands_of("dpnet verify", "dpnet gc"):
        words = shlex.split(line.replace("/data/dpnet", str(tmp_path / "root")))[1:]
        assert main(words) == 0, line


def test_the_commands_of_planning_and_rendering_work() -> None:
    for line in commands_of("dpnet plan"):
        assert main(shlex.split(line)[1:]) == 0, line
    for line in commands_of("kubectl kustomize"):
        assert "kind: Deployment" in kustomize(in_checkout(line.split()[-1]))


def copied(folder: Path, image: str) -> str:
    """Copy the manifests as the page does, and return the overlay `gpu` with all its images."""
    (line,) = commands_of("infra/k8s/copy.sh")
    words = shlex.split(line)
    subprocess.run(["bash", folder / words[0], folder / "own", image], check=True)
    return kustomize(folder / "own/overlays/gpu") + kustomize(folder / "own/jobs/mlflow-upgrade")


def images_in(text: str) -> set[str]:
    return set(re.findall(r"[\w./-]+/dpnet:[\w.-]+", text))


def test_the_manifests_are_copied_with_all_images_of_the_own_registry(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "infra/k8s")
    made = copied(tmp_path, "ghcr.io/team/dpnet")
    assert "registry.example.com" not in made
    tag = f"ghcr.io/team/dpnet:{VERSION}"
    assert images_in(made) == {f"{tag}-cpu", f"{tag}-cuda"}


def test_a_copy_after_an_upgrade_keeps_the_overlay_and_names_the_new_images(tmp_path: Path) -> None:
    checkout = tmp_path / "infra/k8s"
    shutil.copytree(K8S, checkout)
    copied(tmp_path, "ghcr.io/team/dpnet")
    own = tmp_path / "own/overlays/gpu/deploy.yaml"
    own.write_text(own.read_text("utf-8").replace("train.workers=8", "train.workers=3"))
    for file in checkout.rglob("*.*"):
        if file.is_file():
            file.write_text(file.read_text("utf-8").replace(VERSION, "9.1.0"))
    made = copied(tmp_path, "ghcr.io/team/dpnet")
    assert "train.workers=3" in made
    assert images_in(made) == {"ghcr.io/team/dpnet:9.1.0-cpu", "ghcr.io/team/dpnet:9.1.0-cuda"}


@pytest.mark.parametrize("words", [[], ["own"], ["own", "ghcr.io/team/dpnet:0.2.0"]])
def test_a_copy_without_an_image_or_with_a_tag_is_refused(words: list[str], tmp_path: Path) -> None:
    command = ["bash", K8S / "copy.sh", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: infra/k8s/copy.sh FOLDER IMAGE")
    assert not (tmp_path / "own").exists()


def test_promtool_accepts_the_rules() -> None:
    (line,) = commands_of("promtool")
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(shlex.split(line), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 rules found" in done.stdout


def test_every_other_command_is_run_by_a_test_that_names_it() -> None:
    run_here = ("dpnet registry", "dpnet verify", "dpnet gc", "dpnet plan", "kubectl kustomize",
                "infra/k8s/copy.sh", "promtool")  # fmt: skip
    for line in COMMANDS:
        if line.startswith(run_here):
            continue
        found = [start for start in ELSEWHERE if line.startswith(start)]
        assert found, f"no test runs {line!r}: run it, or begin its block with {MARK!r}"
        for start in found:
            if file := ELSEWHERE[start]:
                word = start.split()[-1].removeprefix("dpnet.")
                assert word in (REPOSITORY / file).read_text("utf-8"), f"{file} runs no {start}"


def test_the_objects_that_the_commands_name_are_in_the_manifests() -> None:
    existing = {(each["kind"].lower(), each["metadata"]["name"]) for each in rendered("gpu")}
    named = {
        (kind, name)
        for line in CLUSTER
        for kind, name in re.findall(r"\b(deployment|statefulset|service|job)/([a-z][\w-]*)", line)
    }
    assert len(named) > 6
    assert named <= existing
    for line in CLUSTER:
        if line.startswith("kubectl -n dpnet delete job "):
            jobs = line.partition("delete job ")[2].split(" --")[0].split()
            assert {("job", name) for name in jobs} <= existing
        for path in re.findall(r"(?:-k|-f) (\.\./\S+)", line):
            assert in_checkout(path).exists(), path


@pytest.mark.parametrize("title", ["upgrade", "rotate credentials"])
def test_everything_that_reads_the_storage_key_is_started_again(title: str) -> None:
    section = PAGE.split(f"## Kubernetes: {title}")[1].split("\n## ")[0]
    readers = {
        (each["kind"], each["metadata"]["name"])
        for each in rendered("gpu")
        if "dpnet-storage" in str(each) and each["kind"] not in ("ConfigMap", "Job")
    }
    clusters = {name for kind, name in readers if kind == "RayCluster"}
    assert {kind for kind, _ in readers} == {"Deployment", "RayCluster"}
    assert "kubectl -n dpnet rollout restart deployment\n" in section
    for name in clusters:  # KubeRay does not replace the pods of a changed cluster
        assert f"kubectl -n dpnet delete raycluster {name}" in section


def test_every_apply_takes_back_what_another_command_has_changed() -> None:
    applied = [line for line in CLUSTER if "kubectl apply" in line]
    assert len(applied) > 4
    for line in applied:
        assert "kubectl apply --server-side --force-conflicts -" in line


def test_every_alert_has_a_line_that_says_what_to_do() -> None:
    rules = yaml.safe_load((REPOSITORY / "infra/grafana/alerts.yml").read_text("utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    section = PAGE.split("### What each alert means")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(Dpnet\w+)` \|", section, re.MULTILINE)) == alerts
