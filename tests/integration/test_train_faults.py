"""Training on a real Ray cluster in which each part dies once: it recovers by itself."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from clusters import (
    Cluster,
    alive,
    command_of,
    end_with_parent,
    family,
    find_process,
    free_port,
    ray_cluster,
    wait_until,
)
from PIL import Image
from servers import Server, fault_proxy
from sockets import interfaces, listening

from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.tracking.run_log import read_log

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.rotated(8),
]

STEPS, EVERY, VALIDATE, BATCH = 90, 10, 30, 4
SCRATCH = re.compile(r"/tmp/dpnet-ray-\w+")
DRIVER = f"{sys.executable} -m dpnet.ray_driver"
PATIENCE_S = 300.0  # most waits are far shorter on an idle machine
# The command without MLflow: that takes seconds and has tests of its own.
COMMAND = """
import sys
from dpnet.pipeline import chain
from dpnet.cli.main import main
chain.tracking_uri = lambda *_: None
"""
# Runs a command as a user without an entry in the list of users and without a folder to write to.
# It may read what we may read, such as the interpreter in our home.
UNKNOWN_USER = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
UNKNOWN_USER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
UNKNOWN_USER += ["env", "-u", "USER", "-u", "LOGNAME"]
# Give up on storage sooner than the product does.
HURRIED = """
from dpnet.training.ray import workers
real = workers.run_worker
def worker(config):
    from data_prep.core.storage import s3_requests
    from dpnet.training import checkpoints
    s3_requests.ATTEMPTS = s3_requests.ATTEMPTS_UNREACHED = 3
    checkpoints._WAIT_S = 1.0
    checkpoints.Writer.__init__.__kwdefaults__["patience"] = {patience}
    return real(config)
workers.run_worker = worker
"""


@dataclass
class Training:
    """`dpnet train` in a process of its own, started like a user does."""

    store: Store
    process: subprocess.Popen[str]
    log: Path  # its standard error

    @property
    def run(self) -> str:
        keys = [entry.key for entry in self.store.list("runs")]
        return "/".join(keys[0].split("/")[:2])

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def wait_to_say(self, text: str) -> None:
        self._wait(lambda: self.said(text), text)

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.store.read(f"{self.run}/status.json"))
        except (OSError, IndexError):
            return {}
        return found

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.status()["workers"]
        return found

    def saved(self) -> list[int]:
        """Return the steps of the existing checkpoints."""
        marks = [e.key for e in self.store.list("runs") if e.key.endswith("/checkpoint.json")]
        return sorted(json.loads(self.store.read(mark))["step"] for mark in marks)

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: self.status().get("step", 0) >= step, f"step {step}")

    def wait_for(self, step: int) -> None:
        """Wait until the checkpoint of `step` or a later one exists."""
        self._wait(lambda: any(saved >= step for saved in self.saved()), f"step {step}")

    def _wait(self, true: Any, what: str) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return bool(true())

        try:
            wait_until(reached, what, PATIENCE_S)
        except AssertionError as error:
            error.add_note(self.log.read_text())
            raise

    def finish(self) -> dict[str, Any]:
        """Wait until training succeeds, check that it made every step, and return its summary."""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, self.log.read_text()
        summary: dict[str, Any] = json.loads(out.splitlines()[-1])["stages"][-1]["summary"]
        records = [record for record in self.records() if record["kind"] == "train"]
        steps = records[-1]["step"]
        assert sum(record["images"] for record in records) == steps * BATCH
        manifest = json.loads(self.store.read(f"{self.run}/manifest.json"))
        assert steps == summary["steps"] == manifest["settings"]["train"]["steps"]
        return summary

    def records(self) -> list[dict[str, Any]]:
        return read_log(self.store, self.run)

    def validations(self) -> dict[int, float]:
        return {r["step"]: r["hole_psnr"] for r in self.records() if r["kind"] == "validation"}

    def losses(self) -> dict[int, dict[str, float]]:
        """Return the mean losses of each record of the log, by its last step."""
        return {r["step"]: r["losses"] for r in self.records() if r["kind"] == "train"}

    def first_losses(self, after: int) -> tuple[int, dict[str, float]]:
        """Return the first record of the losses after a step."""
        return next((step, each) for step, each in self.losses().items() if step > after)

    def fail(self) -> str:
        """Wait until training fails, and return its error message."""
        self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 1, self.log.read_text()
        last = self.log.read_text().splitlines()[-1]
        assert last.startswith("dpnet: ")
        return last.removeprefix("dpnet: ")


@dataclass
class Trainer:
    """Starts trainings on the same data, and ends those that a test leaves running."""

    folder: Path
    started: list[Training] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)  # of each training

    def fill(self, root: str) -> None:
        """Put the data into a root."""
        data, store = LocalStore(self.folder / "data"), open_store(root)
        for entry in data.list():
            store.write(entry.key, data.read(entry.key))

    def start(
        self,
        root: Path | str,
        *options: str,
        environment: Mapping[str, str] | None = None,
        patience: float | None = None,
        prefix: Sequence[str] = (),
    ) -> Training:
        """Start a training. `patience` with storage is in seconds; None is the product's own."""
        hurried = "" if patience is None else HURRIED.format(patience=patience)
        code = f"{COMMAND}{hurried}sys.exit(main())"
        command = [
            *prefix,
            sys.executable,
            "-c",
            code,
            "train",
            str(self.folder / "config.yaml"),
            "--json",
        ]
        command += [f"--root={root}"]
        for option in options:
            command += ["--set", option]
        log = self.folder / f"{len(self.started)}.log"
        with log.open("w") as err:
            process = subprocess.Popen(
                command,
                env={**clean_environment(), **self.environment, **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self.started.append(Training(open_store(str(root)), process, log))
        return self.started[-1]

    def end(self) -> None:
        for training in self.started:
            if training.process.poll() is None:
                training.process.kill()
                training.process.wait()


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "DPNET_"))}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("faults")
    photos = folder / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for number in range(480):  # a shard is then enough for most of a training
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((40, 40), Image.Resampling.BICUBIC).save(photos / f"{number:03}.png")
    config = {
        "name": "faults",
        "images": {"source": str(photos), "name": "t", "size": 32, "val": 0.2, "test": 0.2},
        "masks": {"name": "t", "size": 32, "train": 400, "eval_per_bin": 2},
        "model": {"preset": "tiny"},
        "losses": {"adversarial": 0.01},
        "train": {
            "steps": STEPS,
            "batch_size": BATCH,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            "checkpoint_every": EVERY,
            "validate_every": VALIDATE,
            "validation_pairs": 6,
            "workers": 2,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for kind in ("images", "masks"):
        command = [sys.executable, "-m", "dpnet", kind, "build", str(folder / "config.yaml")]
        command += ["--root", str(folder / "data")]
        subprocess.run(command, env=clean_environment(), check=True, capture_output=True)
    trainer = Trainer(folder)
    yield trainer
    trainer.end()


@pytest.fixture
def root(trainer: Trainer, tmp_path: Path) -> Path:
    """A root with the data."""
    trainer.fill(str(tmp_path / "root"))
    return tmp_path / "root"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster(2) as cluster:
        yield cluster


@pytest.fixture
def job(cluster: Cluster, trainer: Trainer) -> Iterator[list[str]]:
    """Return the options for a job on the cluster, after making sure that it has two nodes."""
    trainer.environment = {"RAY_AUTH_TOKEN": cluster.token}
    yield job_on(cluster)
    trainer.environment = {}
    cluster.nodes = [node for node in cluster.nodes if node.process.poll() is None]
    while len(cluster.nodes) < 2:
        cluster.add_node()


def job_on(cluster: Cluster) -> list[str]:
    return [
        "launch.launcher=ray-job",
        f"launch.address={cluster.dashboard}",
        f"launch.python={sys.executable}",
    ]


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Return a run of two workers with no faults, only a request for their stacks."""
    root = str(tmp_path_factory.mktemp("undisturbed"))
    trainer.fill(root)
    training = trainer.start(root)
    training.wait_for(EVERY)
    os.kill(training.process.pid, signal.SIGUSR1)
    assert training.finish()["resumed_from"] == 0
    assert list(training.validations()) == [0, 30, 60, 90]
    return training


def test_a_signal_prints_what_every_thread_of_every_worker_is_doing(undisturbed: Training) -> None:
    text = undisturbed.log.read_text()
    for rank in range(2):
        _, found, stacks = text.partition(f"worker {rank}, process ")
        assert found
        assert "Thread 0x" in stacks
        assert " in train_loop" in stacks


def test_everything_that_a_local_training_starts_listens_on_loopback(
    trainer: Trainer, root: Path
) -> None:
    training = trainer.start(root)
    training.wait_for(EVERY)
    members = family(training.process.pid)
    workers = [worker["pid"] for worker in training.workers()]
    assert set(workers) <= set(members)
    assert len(listening(workers)) > 3  # of Ray, and of the process group with its store
    assert interfaces(members) == {"127.0.0.1"}
    training.process.send_signal(signal.SIGINT)
    assert training.process.wait(PATIENCE_S) == 130


def test_a_killed_worker_restarts_from_the_last_checkpoint(
    trainer: Trainer, job: list[str], root: Path, undisturbed: Training
) -> None:
    training = trainer.start(root, *job)
    training.wait_for(2 * EVERY)
    os.kill(training.workers()[1]["pid"], signal.SIGKILL)
    assert training.finish()["resumed_from"] >= 2 * EVERY
    assert training.validations() == undisturbed.validations()
    assert training.said("-1: train: workers died: 1")
    assert training.said("train: resumes from the checkpoint of step ")


def test_training_restarts_at_once_if_ray_trains_controller_is_killed(
    trainer: Trainer, cluster: Cluster, job: list[str], root: Path, undisturbed: Training
) -> None:
    # With elastic workers: Ray reserves the resources of a dead one for three minutes.
    training = trainer.start(root, *job, "train.min_workers=2")
    training.wait_for(2 * EVERY)
    begun = time.monotonic()
    os.kill(cluster.process("ray::TrainController"), signal.SIGKILL)
    training.wait_to_say("Ray Train's controller died (a process died), training restarts")
    training.wait_to_say("resumes from the checkpoint")
    assert time.monotonic() - begun < 150
    assert training.finish()["resumed_from"] >= 2 * EVERY
    assert training.validations() == undisturbed.validations()


def test_when_the_jobs_driver_is_killed_the_launcher_submits_the_next_attempt(
    trainer: Trainer, cluster: Cluster, job: list[str], root: Path, undisturbed: Training
) -> None:
    training = trainer.start(root, *job, "train.min_workers=2")
    training.wait_for(2 * EVERY)
    os.kill(cluster.process(DRIVER), signal.SIGKILL)
    assert training.finish()["resumed_from"] >= 2 * EVERY
    assert training.validations() == undisturbed.validations()
    assert training.said("-1 died (Killed): it restarts from its last checkpoint")
    assert training.said("-2 is submitted to")


def test_the_job_outlives_its_launcher_and_the_next_one_attaches_to_it_and_stops_it(
    trainer: Trainer, cluster: Cluster, job: list[str], root: Path, undisturbed: Training
) -> None:
    first = trainer.start(root, *job)
    first.wait_for(EVERY)
    second = trainer.start(root, *job)
    second.wait_to_say("another runner")
    first.process.kill()
    second.wait_to_say("attached to the running job ")
    driver = cluster.process(DRIVER)
    second.wait_for(2 * EVERY)
    assert not second.said("submitted")
    begun = time.monotonic()
    second.process.send_signal(signal.SIGINT)
    second.process.communicate(timeout=PATIENCE_S)
    assert time.monotonic() - begun < 30
    assert second.process.returncode == 130
    assert not alive(driver)
    assert not second.store.exists(f"{second.run}/lease-training.json")  # it was given back
    assert jobs(cluster, first) == {1: "STOPPED"}
    third = trainer.start(root, *job)
    assert third.finish()["resumed_from"] >= 2 * EVERY
    assert jobs(cluster, first) == {1: "STOPPED", 2: "SUCCEEDED"}
    assert third.validations() == undisturbed.validations()


def test_a_local_training_waits_for_the_job_whose_launcher_was_killed(
    trainer: Trainer, cluster: Cluster, job: list[str], root: Path, undisturbed: Training
) -> None:
    first = trainer.start(root, *job)
    first.wait_for(EVERY)
    first.process.kill()
    second = trainer.start(root)
    second.wait_to_say("another runner")
    writers = set()
    while second.process.poll() is None:
        writers.add(second.status().get("attempt"))
        time.sleep(0.05)
    second.finish()
    (name,) = {writer for writer in writers if writer}  # only the job has trained
    assert str(name).startswith("dpnet-")
    assert not second.said("resumes from the checkpoint")
    assert jobs(cluster, first) == {1: "SUCCEEDED"}
    assert second.validations() == undisturbed.validations()


def jobs(cluster: Cluster, training: Training) -> dict[int, str]:
    """Return the state of each attempt that the cluster knows."""
    name = re.findall(r"the job (dpnet-\S+-)\d+ is", training.log.read_text())[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(
            cluster.dashboard, headers={"Authorization": f"Bearer {cluster.token}"}
        )
        found = [(str(job.submission_id), str(job.status.value)) for job in client.list_jobs()]
    return {int(each.removeprefix(name)): state for each, state in found if each.startswith(name)}


def test_if_a_machine_dies_training_continues_with_fewer_workers(
    trainer: Trainer, cluster: Cluster, job: list[str], root: Path, undisturbed: Training
) -> None:
    training = trainer.start(root, *job, "train.min_workers=1")
    training.wait_for(2 * EVERY)
    cluster.node_of(training.workers()[1]["pid"]).kill()
    summary = training.finish()
    assert summary["resumed_from"] >= 2 * EVERY
    assert len(training.workers()) == 1
    # The batches are the same, but their sums are rounded differently. That changes the losses of
    # the next steps by a millionth, and other batches would change them by a hundredth or more.
    step, losses = training.first_losses(after=summary["resumed_from"])
    assert losses == pytest.approx(undisturbed.losses()[step], rel=1e-3)


def test_if_a_machine_dies_training_waits_for_another_one(
    trainer: Trainer, cluster: Cluster, job: list[str], root: Path, undisturbed: Training
) -> None:
    training = trainer.start(root, *job)
    training.wait_for(2 * EVERY)
    dead = cluster.node_of(training.workers()[0]["pid"])
    dead.kill()
    cluster.nodes.remove(dead)
    training.wait_to_say("workers died")
    cluster.add_node()
    assert training.finish()["resumed_from"] >= 2 * EVERY
    assert training.validations() == undisturbed.validations()


def test_before_a_machine_is_taken_away_training_saves_and_then_continues_elsewhere(
    trainer: Trainer, cluster: Cluster, job: list[str], root: Path
) -> None:
    cluster.add_node()
    # Only that checkpoint and the last one.
    rare = ["train.checkpoint_every=1000", "train.validate_every=1000", "train.finetune_share=0"]
    training = trainer.start(root, *job, *rare)
    training.wait_for_step(3)
    taken = training.workers()[1]
    node = cluster.node_of(taken["pid"])
    cluster.drain(taken["node"], 120)
    training.wait_to_say("will be taken away soon, saving")
    training.wait_to_say("resumes from the checkpoint")
    assert taken["node"] not in [worker["node"] for worker in training.workers()]
    node.kill()
    (saved,) = [step for step in training.saved() if step < STEPS]
    assert training.finish()["resumed_from"] == saved
    assert len(training.workers()) == 2


def test_without_enough_free_workers_training_is_given_up_after_the_deadline(
    trainer: Trainer, job: list[str], root: Path
) -> None:
    training = trainer.start(root, *job, "train.workers=3", "launch.deadline_s=3")
    sentence = training.fail()
    assert "for 3 s" in sentence
    assert "3 free workers with one CPU each" in sentence
    assert "2 of 2" in sentence


def test_an_error_that_only_the_user_can_fix_ends_training_at_once(
    trainer: Trainer, root: Path
) -> None:
    (shard,) = root.glob("images/t/*/train-000000.tar")
    shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
    training = trainer.start(root)
    sentence = training.fail()
    assert shard.name in sentence
    assert "run `dpnet verify` on" in sentence
    assert not training.said("workers failed")


def test_a_head_without_the_interpreter_gives_one_sentence(
    trainer: Trainer, job: list[str], root: Path
) -> None:
    training = trainer.start(root, *job, "launch.python=/no/such/python")
    assert "has no dpnet (" in (sentence := training.fail())
    assert "set launch.python to the interpreter there" in sentence
    assert not training.said("it restarts from")


def test_an_address_without_a_cluster_gives_one_sentence(trainer: Trainer, root: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    training = trainer.start(root, "launch.launcher=ray-job", f"launch.address={address}")
    assert training.fail().startswith(f"cannot reach a Ray cluster at {address} (")


def test_a_cluster_accepts_only_its_token_and_gets_the_job_again_after_a_restart(
    trainer: Trainer, root: Path, tmp_path: Path
) -> None:
    home = {"HOME": str(tmp_path)}  # without a token of the user's own
    with ray_cluster(1) as cluster:
        options = [*job_on(cluster), "train.workers=1"]
        missing = trainer.start(root, *options, environment=home)
        assert f"{cluster.dashboard} requires its token" in missing.fail()
        wrong = trainer.start(
            root, *options, environment={**home, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        )
        assert f"{cluster.dashboard} requires its token" in wrong.fail()
        # Ray's own client would prefer an address in the environment.
        right = {**home, "RAY_AUTH_TOKEN": cluster.token, "RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
        training = trainer.start(root, *options, environment=right)
        training.wait_for(2 * EVERY)
        cluster.kill()
        training.wait_to_say("does not answer")
        cluster.start_head()
        cluster.add_node()
        assert training.finish()["resumed_from"] >= 2 * EVERY
        assert training.said("is unknown now, because the cluster was replaced: it restarts")


def test_a_local_training_survives_its_controller_and_a_command_leaves_nothing_behind(
    trainer: Trainer, root: Path, undisturbed: Training
) -> None:
    first = trainer.start(root)
    first.wait_for(EVERY)
    os.kill(find_process(first.process.pid, "ray::TrainController"), signal.SIGKILL)
    first.wait_to_say("resumes from the checkpoint")
    members, all_of_first = at_work(first), family(first.process.pid)
    assert len(members) > 5
    left = scratch_of(first)
    first.process.kill()
    wait_until(lambda: not any(map(alive, members)), "processes stay", PATIENCE_S)
    second = trainer.start(root)
    wait_until(lambda: len(at_work(second)) > 5, "Ray does not start", PATIENCE_S)
    assert left.parent == Path("/tmp")
    assert not left.exists()  # the second one has removed it
    members = family(second.process.pid)
    scratch = scratch_of(second)
    second.process.send_signal(signal.SIGINT)
    assert second.process.wait(PATIENCE_S) == 130
    wait_until(lambda: not any(map(alive, members)), "processes stay", PATIENCE_S)
    assert not scratch.exists()
    third = trainer.start(root)
    assert third.finish()["resumed_from"] >= EVERY
    assert third.validations() == undisturbed.validations()
    wait_until(lambda: not any(map(alive, all_of_first)), "processes stay", PATIENCE_S)


def scratch_of(training: Training) -> Path:
    """Return the folder of its Ray."""
    commands = map(command_of, family(training.process.pid))
    (found,) = {each for command in commands for each in SCRATCH.findall(command)}
    assert Path(found).is_dir()
    return Path(found)


def at_work(training: Training) -> list[int]:
    """Return its processes, without two of Ray's that end a minute after their parent."""
    return [
        pid
        for pid in family(training.process.pid)
        if command_of(pid).strip() not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    ]


@pytest.mark.parametrize("home", ["HOME=/", "-uHOME"])
def test_training_runs_for_a_user_without_a_name_and_a_home(
    trainer: Trainer, root: Path, home: str
) -> None:
    if subprocess.run([*UNKNOWN_USER, "true"], capture_output=True).returncode:
        pytest.skip("only root may run a command as another user")
    subprocess.run(["chown", "-R", "54321:54321", str(root)], check=True)
    training = trainer.start(root, prefix=[*UNKNOWN_USER, home])
    training.wait_for(EVERY)
    assert {Path(f"/proc/{pid}").stat().st_uid for pid in family(training.process.pid)} == {54321}
    training.process.send_signal(signal.SIGINT)
    assert training.process.wait(PATIENCE_S) == 130


class Memory:
    """The memory of the machine as a training sees it: a file in the place of /proc/meminfo."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.file.write_text(self._text(free=0.75))
        script = f'mount --bind {file} /proc/meminfo && exec "$@"'
        self.prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
        if subprocess.run([*self.prefix, "true"], capture_output=True).returncode:
            pytest.skip("a lack of memory can only be shown where file systems may be mounted")

    def leave(self, free: float) -> None:
        """Change the share of the memory that other programs leave free."""
        with self.file.open("r+") as file:
            file.write(self._text(free))  # of the same length

    def _text(self, free: float) -> str:
        total = 8 << 20  # KiB
        sizes = {"MemTotal": total, "MemFree": total * free, "MemAvailable": total * free}
        sizes |= dict.fromkeys(("Buffers", "Cached", "SReclaimable", "Shmem"), 0)
        return "".join(f"{name + ':':16}{size:8.0f} kB\n" for name, size in sizes.items())


def test_training_recovers_when_rays_memory_monitor_ends_its_processes(
    trainer: Trainer, root: Path, tmp_path: Path, undisturbed: Training
) -> None:
    memory = Memory(tmp_path / "meminfo")
    training = trainer.start(root, prefix=memory.prefix)
    training.wait_for(2 * EVERY)
    memory.leave(0.01)
    training.wait_to_say("ran out of memory, and Ray ended a process there")
    memory.leave(0.75)
    assert training.finish()["resumed_from"] >= 2 * EVERY
    assert training.validations() == undisturbed.validations()


def test_a_lasting_lack_of_memory_is_one_sentence_without_other_programs(
    trainer: Trainer, root: Path, tmp_path: Path
) -> None:
    memory = Memory(tmp_path / "meminfo")
    training = trainer.start(root, "train.max_failures=2", prefix=memory.prefix)
    training.wait_for(EVERY)
    memory.leave(0.01)
    sentence = training.fail()
    assert "a machine ran out of memory, and Ray ended a process there" in sentence
    assert "run the same command again, it resumes from the last checkpoint" in sentence.lower()
    assert len(sentence) < 300
    assert sys.executable not in training.log.read_text()  # Ray's list of programs


def test_training_continues_without_storage_and_writes_the_checkpoint_later(
    trainer: Trainer, moto: Server
) -> None:
    root = moto.fresh_root()
    with fault_proxy(moto) as proxy, pytest.MonkeyPatch.context() as patch:
        moto.use(patch)
        trainer.fill(root)
        training = trainer.start(
            root,
            "train.workers=1",
            "train.validate_every=1000",  # which reads
            environment=proxy.server.environment(),
            patience=PATIENCE_S,
        )
        training.wait_for(2 * EVERY)
        with proxy.outage():
            training.wait_to_say("cannot be written yet")
            time.sleep(10)
        training.wait_to_say("is written now.")
        training.finish()


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dpnet-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a small disk can only be made where file systems may be mounted")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        folder.rmdir()


def fill(file: Path) -> None:
    """Fill the disk."""
    with file.open("wb", buffering=0) as ballast:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                pass


def test_training_continues_on_a_full_disk_and_a_permanently_full_one_is_reported(
    trainer: Trainer,
) -> None:
    with small_disk(128) as folder:
        trainer.fill(str(folder))
        ballast = folder / "ballast"
        first = trainer.start(folder, "train.workers=1", patience=10)
        first.wait_for(EVERY)
        fill(ballast)
        first.wait_to_say("the disk is full")
        assert first.said("Training continues")
        ballast.unlink()
        first.wait_to_say("is written now.")
        fill(ballast)
        sentence = first.fail()
        assert "the disk is full. Free some space and run the same command again" in sentence
        assert not first.said("workers failed")
        ballast.unlink()
        second = trainer.start(folder, "train.workers=1")
        assert second.finish()["resumed_from"] >= EVERY
        verify = [sys.executable, "-m", "dpnet", "verify", str(folder)]
        subprocess.run(verify, env=clean_environment(), check=True)
