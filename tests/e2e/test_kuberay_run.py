"""The whole pipeline with training on Kubernetes, whose launcher is killed in the middle.

The API server, the S3 server, Prefect and Ray are real. In place of KubeRay's operator and of a
kubelet, ours starts the Ray cluster of the RayJob as processes of this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from clusters import end_with_parent, wait_until
from kube_operator import Operator, RealRay
from kube_server import KubeServer, Namespace
from PIL import Image
from servers import Server

from data_prep.core.storage.open import open_store

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.rotated(4), pytest.mark.timeout(1500)]
STEPS, EVERY = 60, 10
WAIT_S = 400.0  # far longer than needed on an idle machine


@dataclass
class Run:
    """`dpnet pipeline run` in a process of its own, started like a user does."""

    root: str
    process: subprocess.Popen[str]
    log: Path

    def status(self) -> dict[str, Any]:
        """Return the status of the training."""
        store = open_store(self.root)
        found = [entry.key for entry in store.list("runs") if entry.key.endswith("/status.json")]
        status: dict[str, Any] = json.loads(store.read(found[0])) if found else {}
        return status

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return bool(self.status().get("step", 0) >= step)

        wait_until(reached, "training makes no progress", WAIT_S)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Wait for the end, and return the stages by name."""
        out, _ = self.process.communicate(timeout=WAIT_S)
        assert self.process.returncode == 0, self.log.read_text()
        stages = json.loads(out.splitlines()[-1])["stages"]
        return {each["stage"]: each for each in stages}


def start(
    root: str, config: Path, environment: Mapping[str, str], *options: str, whole: bool = True
) -> Run:
    """Start the whole pipeline, or only the stages up to training."""
    log = config.with_name(f"{len(list(config.parent.glob('*.log')))}.log")
    words = ["pipeline", "run"] if whole else ["train"]
    command = [sys.executable, "-m", "dpnet", *words, str(config), "--json"]
    command += ["--root", root, *options]
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DPNET_", "PREFECT_"))
    }
    with log.open("w") as err:
        process = subprocess.Popen(
            command,
            env={**clean, "HOME": str(config.parent), **environment},
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    return Run(root, process, log)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("pods")
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for number in range(60):
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((40, 40), Image.Resampling.BICUBIC).save(photos / f"{number:03}.png")
    text = {
        "name": "pods",
        "images": {"source": str(photos), "name": "p", "size": 32, "val": 0.2, "test": 0.2},
        "masks": {"name": "p", "size": 32, "train": 60, "eval_per_bin": 1},
        "model": {"preset": "tiny"},
        "losses": {"adversarial": 0.01},
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "warmup_steps": 5,
            "checkpoint_every": EVERY,
            "validate_every": 60,
            "validation_pairs": 2,
            "workers": 2,
        },
        "evaluate": {"pictures": 1},
        "register": {"promote": "always", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump(text))
    return tmp_path / "pods.yaml"


@pytest.fixture(scope="module")
def undisturbed(config: Path, ceph: Server) -> dict[str, dict[str, Any]]:
    """Return the stages of a run on this machine, up to training."""
    return start(ceph.fresh_root(), config, ceph.environment(), whole=False).finish()


@pytest.fixture
def namespace(kubernetes_api: KubeServer, ceph: Server) -> Namespace:
    """A namespace with a Secret for the storage."""
    found = kubernetes_api.make_namespace()
    secret = {"metadata": {"name": "storage"}, "stringData": ceph.environment()}
    found.core.create_namespaced_secret(found.name, secret)
    return found


@pytest.fixture
def operator(namespace: Namespace, config: Path) -> Iterator[Operator]:
    operator = Operator(namespace, lambda: RealRay(namespace, config.with_name("token")))
    yield operator
    operator.close()


@pytest.fixture
def pods(namespace: Namespace, config: Path, ceph: Server) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the options of a command that trains in pods."""
    environment = {
        **ceph.environment(),
        "KUBECONFIG": str(namespace.kubeconfig(config.with_name("kubeconfig"))),
        "RAY_AUTH_TOKEN_PATH": str(config.with_name("token")),
    }
    options = ["--launcher", "kuberay", "--set", "launch.image=registry/dpnet:test"]
    return environment, [*options, "--set", "launch.secrets=[storage]"]


def test_a_launcher_that_is_killed_and_started_again_ends_with_the_bytes_of_an_undisturbed_run(
    config: Path,
    s3_root: str,
    ceph: Server,
    namespace: Namespace,
    operator: Operator,
    pods: tuple[dict[str, str], list[str]],
    undisturbed: dict[str, dict[str, Any]],
) -> None:
    environment, options = pods
    first = start(s3_root, config, environment, *options)
    first.wait_for_step(2 * EVERY)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    ((name, job),) = namespace.objects().items()  # it goes on training
    killed_at = first.status()["step"]
    second = start(s3_root, config, environment, *options)
    stages = second.finish()
    assert f"attached to the RayJob {namespace.name}/{name}" in second.log.read_text()
    assert stages["train"]["summary"]["steps"] == STEPS > killed_at
    assert list(operator.rays) == [name]
    # Its log came through Ray's dashboard.
    assert f"{name}-" in first.log.read_text() + second.log.read_text()
    wait_until(lambda: is_clean(namespace), "something is left")
    assert ceph.secret_key not in json.dumps(job)
    assert ceph.secret_key not in first.log.read_text() + second.log.read_text()
    assert digests(stages) == digests(undisturbed)


def test_a_head_that_is_lost_is_followed_by_another_attempt_that_resumes(
    config: Path,
    s3_root: str,
    namespace: Namespace,
    operator: Operator,
    pods: tuple[dict[str, str], list[str]],
    undisturbed: dict[str, dict[str, Any]],
) -> None:
    environment, options = pods
    training = start(s3_root, config, environment, *options, whole=False)
    training.wait_for_step(2 * EVERY)
    ((name, ray),) = operator.rays.items()
    ray.cluster.kill()
    stages = training.finish()
    assert stages["train"]["summary"]["resumed_from"] >= EVERY
    said = training.log.read_text()
    assert f"{name} lost the head of its Ray cluster, which did not answer" in said
    assert [each.rpartition("-")[2] for each in operator.rays] == ["1", "2"]
    wait_until(lambda: is_clean(namespace), "something is left")
    assert digests(stages) == digests(undisturbed)


def is_clean(namespace: Namespace) -> bool:
    return not namespace.objects() and not namespace.objects("rayclusters")


def digests(stages: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Return the content digests of the data and of the trained weights."""
    return {each: stages[each]["content_digest"] for each in ("images", "masks", "train")}


CLUSTER = ("DPNET_TEST_CONTEXT", "DPNET_TEST_IMAGE", "DPNET_TEST_ROOT")


@pytest.mark.skipif(
    not all(os.environ.get(each) for each in CLUSTER),
    reason=f"no Kubernetes cluster: set {', '.join(CLUSTER)} to a context of the kubeconfig, an"
    " image, and a root on S3 for which the Secret `storage` of the namespace has the credentials",
)
def test_the_same_on_a_real_cluster(config: Path) -> None:
    context, image, root = (os.environ[each] for each in CLUSTER)
    environment = {
        "KUBECONFIG": os.environ.get("KUBECONFIG", str(Path("~/.kube/config").expanduser()))
    }
    options = ["--launcher", "kuberay", "--set", f"launch.image={image}"]
    options += ["--set", "launch.secrets=[storage]", "--set", f"launch.context={context}"]
    options += ["--set", f"train.seed={os.getpid()}"]
    first = start(f"{root}/killed-{os.getpid()}", config, environment, *options)
    first.wait_for_step(2 * EVERY)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    second = start(first.root, config, environment, *options)
    stages = second.finish()
    assert "attached to the RayJob" in second.log.read_text()
    alone = start(f"{root}/alone-{os.getpid()}", config, environment, *options, whole=False)
    assert alone.finish()["train"]["content_digest"] == stages["train"]["content_digest"]
