"""A training on Kubernetes that Prefect started: what its page shows, and how it is cancelled.

Prefect is that of a real `dpnet up`, and the API server and its rights are real. In place of
KubeRay's operator, one of ours moves the RayJobs through KubeRay's states; no Ray runs here.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from clusters import end_with_parent, wait_until
from kube_operator import Operator, Script
from kube_server import KubeServer, Namespace
from PIL import Image
from platforms import ENDED, Platform, environment, platform

from dpnet.training.ray.kube_client import read_template

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]
NO_NODE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }
    ],
}  # fmt: skip


@dataclass
class Place:
    """A namespace whose operator starts no pods before it is told to, and a platform."""

    namespace: Namespace
    operator: Operator
    up: Platform
    config: Path

    def rayjob(self) -> str:
        """Wait for the RayJob whose pods do not run, and return its name."""
        wait_until(self.namespace.objects, "no RayJob", 240)
        (name,) = self.namespace.objects()
        wait_until(lambda: self.operator.rays.get(name), "no Ray cluster")
        return name

    def is_clean(self) -> bool:
        return not self.namespace.objects() and not self.namespace.objects("rayclusters")

    def page(self, run: str) -> str:
        """Return what the page of a run says about its training."""
        about = {"artifacts": {"key": {"any_": ["training"]}}}
        found = self.up.ask("/artifacts/filter", {**about, "flow_runs": {"id": {"any_": [run]}}})
        return "\n".join(each["data"] for each in found)


def unready() -> Script:
    script = Script()
    script.ready = False
    return script


def with_volume(root: Path) -> Path:
    """Write a template whose pods mount a shared volume at the root, and return its path."""
    template = json.loads(json.dumps(read_template(None)))  # its pods share parts
    cluster = template["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        claim = {"claimName": "dpnet"}
        pod.setdefault("volumes", []).append({"name": "root", "persistentVolumeClaim": claim})
        for container in pod["containers"]:
            mount = {"name": "root", "mountPath": str(root)}
            container.setdefault("volumeMounts", []).append(mount)
    file = root.with_name("template.yaml")
    file.write_text(yaml.safe_dump(template))
    return file


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40)).save(folder / "photos" / f"{number}.png")
    source = str(folder / "photos")
    text = {
        "name": "flow",
        "images": {"source": source, "name": "f", "size": 32, "val": 0.2, "test": 0.2},
        "masks": {"name": "f", "size": 32, "train": 30, "eval_per_bin": 1},
        "model": {"preset": "tiny"},
        "train": {"steps": 10, "batch_size": 1, "warmup_steps": 2, "validation_pairs": 1},
        "launch": {
            "launcher": "kuberay", "image": "registry/dpnet:1",
            "template": str(with_volume(folder / "root")),
        },
    }  # fmt: skip
    (folder / "flow.yaml").write_text(yaml.safe_dump(text))
    return folder / "flow.yaml"


@pytest.fixture(scope="module")
def place(kubernetes_api: KubeServer, config: Path) -> Iterator[Place]:
    namespace = kubernetes_api.make_namespace()
    file = namespace.kubeconfig(config.with_name("kubeconfig"))
    operator = Operator(namespace, unready)
    with platform(config.parent / "root", KUBECONFIG=str(file)) as up:
        up.deploy("watch=null", "retrain=null")
        yield Place(namespace, operator, up, config)
    operator.close()


@pytest.fixture(autouse=True)
def nothing_stays(place: Place) -> Iterator[None]:
    yield
    wait_until(place.is_clean, "something is left")


def test_the_page_names_the_rayjob_and_why_it_waits_and_cancelling_then_deletes_it(
    place: Place,
) -> None:
    run = place.up.run("train", {"config": str(place.config)})
    name = place.rayjob()
    (cluster,) = place.namespace.objects("rayclusters")
    place.namespace.pod(cluster, "head", NO_NODE)
    wait_until(lambda: "Unschedulable" in place.page(run), "the page does not say why")
    assert f"The RayJob {place.namespace.name}/{name} waits for its pods" in place.page(run)
    assert not place.operator.rays[name].stopped  # no pod has run
    place.up.set_state(run, type="CANCELLING")
    wait_until(place.is_clean, "the RayJob stays", 60)
    place.up.wait_for(run, "CANCELLED")
    assert "CRASHED" not in place.up.states(run)
    place.namespace.core.delete_namespaced_pod("head", place.namespace.name)


def test_the_page_has_ray_s_dashboard_and_why_each_attempt_ended(place: Place) -> None:
    run = place.up.run("train", {"config": str(place.config)})
    first = place.rayjob()
    place.operator.rays[first].ready = True
    link = "(http://127.0.0.1:9)"
    wait_until(lambda: link in place.page(run), "the page has no link")
    place.operator.rays[first].fail(137, "Killed")
    second = first.removesuffix("1") + "2"
    wait_until(lambda: place.operator.rays.get(second), "no second attempt", 60)
    wait_until(lambda: second in place.page(run), "not on the page")
    assert f"{first} died (Killed)." in place.page(run)
    place.up.set_state(run, type="CANCELLING")
    place.up.wait_for(run, *ENDED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_whose_pods_did_not_start_deletes_its_rayjob(
    place: Place, number: int
) -> None:
    words = ["train", str(place.config), "--root", str(place.up.root)]
    file = str(place.config.with_name("kubeconfig"))
    process = subprocess.Popen(
        [sys.executable, "-m", "dpnet", *words],
        env=environment({"KUBECONFIG": file}),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    place.rayjob()
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert place.is_clean()
    assert "Traceback" not in said
