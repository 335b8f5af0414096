"""The launcher `kuberay` on a mock of the Kubernetes API: what it decides, without a server.

`tests/integration/test_kuberay.py` has the same on a real API server, with its faults.
"""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.training.ray import follow_rayjob, job_driver, launch_kuberay
from dpnet.training.ray.kube_client import KubeError
from dpnet.training.ray.launch_job import EXPLAINED, SPEC
from dpnet.training.ray.launch_kuberay import KubeRayLauncher
from dpnet.training.ray.launchers import choose_launcher
from dpnet.training.settings import LaunchSettings, TrainSettings

DIED = "failed with exit code 137, last available logs:\nKilled"


class MockKube:
    """An API server in memory: RayJobs by name, and a list of what happened to them."""

    namespace, address = "train", "https://mock"

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.changes: list[tuple[str, dict[str, Any]]] = []
        self.errors: dict[str, list[KubeError]] = {}
        self.reasons: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.oldest = 0  # version from which a watch can begin

    def _ask(self, verb: str) -> None:
        self.asked.append(verb)
        if errors := self.errors.get(verb):
            raise errors.pop(0) if len(errors) > 1 else errors[0]

    def note(self, kind: str, job: Mapping[str, Any]) -> None:
        copied = copy.deepcopy(dict(job))
        copied["metadata"]["resourceVersion"] = str(len(self.changes) + 1)
        self.changes.append((kind, copied))

    def create(self, job: dict[str, Any]) -> dict[str, Any]:
        self._ask("create")
        name = job["metadata"]["name"]
        if name in self.found:
            raise KubeError(409, "it exists")
        self.found[name] = copy.deepcopy(job)
        self.found[name]["metadata"]["uid"] = f"{name}-{len(self.changes)}"
        self.note("ADDED", self.found[name])
        return copy.deepcopy(self.found[name])

    def get(self, name: str) -> dict[str, Any]:
        return copy.deepcopy(self.found[name])

    def jobs(self, labels: str = "", name: str = "") -> tuple[list[dict[str, Any]], str]:
        self._ask("list")
        key, _, value = labels.partition("=")
        found = [
            copy.deepcopy(each)
            for each in self.found.values()
            if (not name or each["metadata"]["name"] == name)
            and (not labels or each["metadata"].get("labels", {}).get(key) == value)
        ]
        return found, str(len(self.changes))

    def watch(self, name: str, since: str) -> Iterator[dict[str, Any]]:
        self._ask("watch")
        if int(since) < self.oldest:
            raise KubeError(410, "too old")
        time.sleep(0.02)
        for kind, job in self.changes[int(since) :]:
            if job["metadata"]["name"] == name:
                yield {"type": kind, "object": copy.deepcopy(job)}

    def delete(self, name: str) -> None:
        self._ask("delete")
        if job := self.found.pop(name, None):
            self.note("DELETED", job)

    def pods(self, labels: str) -> list[dict[str, Any]]:
        self._ask("pods")
        return self.reasons

    def events(self) -> list[dict[str, Any]]:
        return []

    def move(self, number: int, deployment: str, state: str = "", message: str = "") -> None:
        """Change the status of an attempt's RayJob, as KubeRay does."""
        (name,) = [each for each in self.found if each.endswith(f"-{number}")]
        status = {"jobDeploymentStatus": deployment, "jobStatus": state, "message": message}
        self.found[name]["status"] = {**status, "rayClusterName": "c"}
        self.note("MODIFIED", self.found[name])


@pytest.fixture
def kube(monkeypatch: pytest.MonkeyPatch) -> MockKube:
    kube = MockKube()
    monkeypatch.setattr(launch_kuberay, "Kube", lambda context, namespace: kube)
    monkeypatch.setattr(launch_kuberay, "TRY_S", 0.0)
    monkeypatch.setattr(launch_kuberay, "EXPLAIN_S", 0.0)
    monkeypatch.setattr(launch_kuberay, "STOP_S", 0.5)
    monkeypatch.setattr(follow_rayjob, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(launch_kuberay, "_show_log", lambda address, job: None)
    return kube


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., KubeRayLauncher]]:
    """Return a function that makes a launcher; they stop following at the end."""
    made = []

    def launcher(**launch: Any) -> KubeRayLauncher:
        job: Any = SimpleNamespace(to_json=dict, settings=TrainSettings(max_failures=1))
        work: Any = SimpleNamespace(
            store=LocalStore(tmp_path),
            folder="runs/a",
            request=SimpleNamespace(digest="0123456789abcdef"),
            key="runs/a/{}".format,
        )
        settings = LaunchSettings(launcher="kuberay", image="i", **launch)
        chosen = choose_launcher(job, settings, work)
        assert isinstance(chosen, KubeRayLauncher)
        made.append(chosen)
        return chosen

    yield launcher
    for each in made:
        if each._follower:
            each._follower.stop()


Make = Callable[..., KubeRayLauncher]


def running(kube: MockKube, launcher: KubeRayLauncher) -> KubeRayLauncher:
    """Start a launcher and its job."""
    launcher.start()
    kube.move(1, "Running", "RUNNING")
    until(launcher, lambda: launcher._kind == "running")
    return launcher


def until(launcher: KubeRayLauncher, true: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not come so far"
        assert launcher.is_running()
        time.sleep(0.01)


def ends(launcher: KubeRayLauncher, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while launcher.is_running():
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.01)


def fails(launcher: KubeRayLauncher) -> str:
    with pytest.raises(PipelineError) as found:
        ends(launcher)
    return str(found.value)


def test_the_same_command_attaches_to_the_running_rayjob(
    kube: MockKube, make: Make, tmp_path: Path
) -> None:
    first = running(kube, make())
    LocalStore(tmp_path).write(f"runs/a/{SPEC}", b"of the first")
    again = make()
    again.start()
    assert again.attempt == first.attempt
    assert kube.asked.count("create") == 1
    assert LocalStore(tmp_path).read(f"runs/a/{SPEC}") == b"of the first"


def test_a_rayjob_made_at_the_same_moment_is_attached_to(
    kube: MockKube, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(), make()
    first.start()
    monkeypatch.setattr(second, "_ours", list)
    second.start()
    assert second.attempt == first.attempt
    assert len(kube.found) == 1


def test_a_foreign_rayjob_is_never_attached_to_or_deleted(kube: MockKube, make: Make) -> None:
    launcher = make()
    name = f"{launcher.name}-1"
    labels = {"dpnet-pipeline/run": launcher.name}  # copied together with the name
    kube.found[name] = {"metadata": {"name": name, "uid": "u", "labels": labels}, "spec": {}}
    with pytest.raises(PipelineError, match="is not of this training"):
        launcher.start()
    launcher.cancel()
    assert name in kube.found


def test_a_dead_attempt_is_followed_by_the_next_up_to_the_allowed_number(
    kube: MockKube, make: Make
) -> None:
    launcher = running(kube, make())
    kube.move(1, "Failed", "FAILED", DIED)
    until(launcher, lambda: launcher.attempt.startswith(f"{launcher.name}-2-"))
    first = f"The RayJob train/{launcher.name}-1 died (Killed)."
    assert launcher.facts == [first, f"The RayJob train/{launcher.name}-2 waits for its pods."]
    kube.move(2, "Failed", "FAILED", DIED)
    assert "-2 died (Killed), and train.max_failures is 1: " in fails(launcher)
    assert kube.asked.count("create") == 2


def test_the_facts_say_where_the_dashboard_is_and_how_to_reach_it(
    kube: MockKube, make: Make
) -> None:
    launcher = running(kube, make())
    (job,) = kube.found.values()
    job["metadata"]["namespace"] = "train"
    job["status"]["dashboardURL"] = "a-head-svc.train.svc.cluster.local:8265"
    kube.note("MODIFIED", job)
    label = f"The RayJob train/{launcher.name}-1 trains. Ray dashboard"
    inside = "inside of the cluster: http://a-head-svc.train.svc.cluster.local:8265"
    outside = "(outside: kubectl -n train port-forward service/a-head-svc 8265)"
    until(launcher, lambda: launcher.facts == [f"{label} {inside} {outside}"])
    job["status"]["dashboardURL"] = "10.0.0.7:8265"
    kube.note("MODIFIED", job)
    until(launcher, lambda: launcher.facts == [f"{label}: http://10.0.0.7:8265"])


def test_a_clock_of_this_machine_that_is_set_moves_no_deadline(
    kube: MockKube, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = make(pending_s=60)
    launcher.start()
    kube.move(1, "Initializing")
    until(launcher, lambda: launcher._kind == "waiting")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 5 * 3600)
    assert launcher.is_running()
    kube.move(1, "Running", "RUNNING")
    until(launcher, lambda: launcher._kind == "running")


def test_an_explained_end_is_not_tried_again(kube: MockKube, make: Make) -> None:
    launcher = running(kube, make())
    kube.move(1, "Failed", "FAILED", f"exit code\nfailed with exit code {EXPLAINED}, logs\nfull.")
    assert fails(launcher) == "full."
    launcher.cancel()
    assert not kube.found


def test_a_finished_rayjob_whose_launcher_was_killed_is_not_run_again(
    kube: MockKube, make: Make, tmp_path: Path
) -> None:
    first = running(kube, make())
    status = f'{{"attempt": "{first.attempt}"}}'
    LocalStore(tmp_path).write("runs/a/status.json", status.encode())
    kube.move(1, "Complete", "SUCCEEDED")
    again = make()
    again.start()
    ends(again)
    assert kube.asked.count("create") == 1


def test_a_finished_rayjob_of_a_run_that_is_gone_is_run_again(kube: MockKube, make: Make) -> None:
    first = running(kube, make())
    kube.move(1, "Complete", "SUCCEEDED")
    again = make()
    again.start()
    assert again.attempt.startswith(f"{first.name}-2-")


def test_cancelling_deletes_every_attempt_and_nothing_else(kube: MockKube, make: Make) -> None:
    launcher = running(kube, make())
    kube.found["other"] = {"metadata": {"name": "other", "uid": "u"}}
    kube.move(1, "Failed", "FAILED", DIED)
    until(launcher, lambda: launcher.attempt.startswith(f"{launcher.name}-2-"))
    launcher.cancel()
    assert list(kube.found) == ["other"]


def test_cancelling_goes_on_while_the_server_is_busy(
    kube: MockKube, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_kuberay, "STOP_S", 10.0)
    launcher = running(kube, make())
    kube.errors["delete"] = [KubeError(429, "busy")]
    threading.Timer(0.2, kube.errors.clear).start()
    launcher.cancel()
    assert not kube.found


def test_a_failed_rayjob_stays_only_if_asked(kube: MockKube, make: Make) -> None:
    launcher = running(kube, make(ttl_s=60))
    launcher.cancel()  # by a person: nothing stays
    assert not kube.found
    launcher = running(kube, make(ttl_s=60))
    kube.move(1, "ValidationFailed")
    fails(launcher)
    launcher.cancel()
    assert len(kube.found) == 1


def test_a_deleted_rayjob_ends_training(kube: MockKube, make: Make) -> None:
    launcher = running(kube, make())
    kube.delete(f"{launcher.name}-1")
    assert "was deleted, by hand or with its namespace" in fails(launcher)
    assert kube.asked.count("create") == 1


def test_another_rayjob_under_the_same_name_is_not_followed(kube: MockKube, make: Make) -> None:
    launcher = running(kube, make())
    name = f"{launcher.name}-1"
    other = copy.deepcopy(kube.found[name])
    other["metadata"]["uid"] = "another"
    kube.found[name] = other
    kube.note("ADDED", other)
    assert "was deleted" in fails(launcher)


def test_a_watch_that_begins_too_late_lists_again(kube: MockKube, make: Make) -> None:
    launcher = running(kube, make())
    kube.oldest = 10**6  # no watch can begin: every change is seen in a list
    watches = kube.asked.count("watch")
    until(launcher, lambda: kube.asked.count("watch") > watches + 1)
    kube.move(1, "Complete", "SUCCEEDED")
    ends(launcher)


def test_the_end_of_a_rayjob_that_is_gone_is_seen_by_the_next_watch(
    kube: MockKube, make: Make
) -> None:
    launcher = running(kube, make())
    kube.errors["watch"] = [KubeError(0, "away")]
    until(launcher, lambda: launcher._follower and launcher._follower.error)
    kube.move(1, "Complete", "SUCCEEDED")
    kube.delete(f"{launcher.name}-1")
    kube.errors.clear()
    ends(launcher)


def test_no_answer_is_waited_for_until_the_deadline(kube: MockKube, make: Make) -> None:
    launcher = running(kube, make(deadline_s=1))
    kube.errors = {each: [KubeError(0, "Connection refused")] for each in ("list", "watch")}
    began = time.monotonic()
    assert "has not answered for 1 s (Connection refused)" in fails(launcher)
    assert time.monotonic() - began >= 1


def test_the_server_says_how_long_to_wait(kube: MockKube, make: Make) -> None:
    kube.errors["create"] = [KubeError(429, "busy", wait=0.5)]
    launcher = make()
    launcher.start()
    began = time.monotonic()
    kube.errors.clear()
    until(launcher, lambda: launcher.attempt)
    assert 0.4 < time.monotonic() - began < 5


def test_a_follower_waits_as_long_as_the_server_says(kube: MockKube, make: Make) -> None:
    launcher = running(kube, make())
    kube.errors = {each: [KubeError(429, "busy", wait=0.5)] for each in ("list", "watch")}
    until(launcher, lambda: launcher._follower and launcher._follower.error)
    asked = len(kube.asked)
    time.sleep(0.3)
    assert len(kube.asked) == asked


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_at_the_start_ends_at_once(kube: MockKube, make: Make, status: int) -> None:
    advice = "give it" if status == 403 else ""
    kube.errors["list"] = [KubeError(status, "refused", advice=advice)]
    with pytest.raises(PipelineError, match=r"cannot start the RayJob \(refused\)"):
        make().start()


def test_a_refusal_while_it_trains_may_pass(
    kube: MockKube, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = running(kube, make())
    refused = {each: [KubeError(404, "no kind", advice="install")] for each in ("list", "watch")}
    kube.errors = dict(refused)
    until(launcher, lambda: launcher._refused)
    kube.errors.clear()
    until(launcher, lambda: not launcher._refused)
    monkeypatch.setattr(launch_kuberay, "SETTLE_S", 0.2)
    kube.errors = refused
    assert "cannot follow the RayJob" in fails(launcher)


def test_pods_that_do_not_start_end_at_the_deadline_with_their_reason(
    kube: MockKube, make: Make
) -> None:
    launcher = make(pending_s=1)
    launcher.start()
    state = {"waiting": {"reason": "ImagePullBackOff"}}
    status = {"containerStatuses": [{"state": state}]}
    kube.reasons = [{"metadata": {"name": "head"}, "status": status}]
    kube.move(1, "Initializing")
    assert "did not start in 1 s, because it waits for its pods (pod head: ImagePull" in fails(
        launcher
    )


def test_a_job_that_was_suspended_has_its_whole_time_to_start_again(
    kube: MockKube, make: Make
) -> None:
    launcher = running(kube, make(pending_s=1, queue="q"))
    time.sleep(1.1)
    kube.move(1, "Suspended")
    until(launcher, lambda: launcher._kind == "waiting")
    kube.move(1, "Running", "RUNNING")
    until(launcher, lambda: launcher._kind == "running")


def test_a_driver_that_is_lost_without_a_word_ends_training(
    kube: MockKube, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_kuberay, "QUIET", 1)
    launcher = running(kube, make(deadline_s=1))
    assert "has had no sign of it for 1 s" in fails(launcher)


def test_a_rayjob_is_followed_in_a_thread_that_ends(kube: MockKube, make: Make) -> None:
    launcher = running(kube, make())
    assert launcher._follower
    thread = launcher._follower._thread
    launcher.cancel()
    thread.join(5)
    assert not thread.is_alive()
    assert thread is not threading.current_thread()


def test_a_driver_of_another_version_refuses_with_both_versions(
    kube: MockKube, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dpnet

    launcher = make()
    launcher.start()
    assert SPEC in [entry.key.rpartition("/")[2] for entry in LocalStore(tmp_path).list("runs/a")]
    mine = re.escape(dpnet.__version__)
    monkeypatch.setattr(job_driver.dpnet, "__version__", "0.0.9", raising=False)
    with pytest.raises(
        PipelineError, match=rf"has dpnet {mine}, and the cluster's head has 0\.0\.9"
    ):
        job_driver._train("a", LocalStore(tmp_path).uri, "runs/a", only_stacks=False)


def test_the_log_names_the_rayjob_the_server_that_is_away_and_how_long_it_is_tried(
    kube: MockKube, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    kube.errors["list"] = [KubeError(0, "Connection refused")]
    launcher = make(deadline_s=77)
    launcher.start()
    told = "Kubernetes at https://mock does not do as asked (Connection refused): trying again"
    assert f"{told} for 77 s" in caplog.text
    kube.errors.clear()
    assert launcher.is_running()
    assert f"train: created the RayJob train/{launcher.name}-1" in caplog.text


def test_pods_that_may_not_be_looked_at_are_said_without_a_bracket(
    kube: MockKube, make: Make
) -> None:
    launcher = running(kube, make())
    kube.errors["pods"] = [KubeError(403, "this user may not list pods", advice="ask.")]
    launcher._follower.job.setdefault("status", {})["rayClusterName"] = "c"  # type: ignore[union-attr]
    assert launcher._with_pods("waits for its pods") == (
        "waits for its pods, and its pods cannot be looked at, because this user may not list pods"
    )
