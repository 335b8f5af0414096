"""B5 and B6: training with the real loader, and what Ray costs.

    python benchmarks/training.py [--photos DIR] [--preset tiny] [--size 64] [--batch 16] [--json]

B5 compares the GAN step fed by the loader (read whole shards, decode, pair, augment, copy to the
device) with the same step on one batch that is already on the device. Both take turns in one
process. `of_device_only` is the share of the latter's images/s that the former reaches.

B6 runs `dpnet.training.loop.train_loop` with two workers under Ray Train and under torchrun, in
turns. The rate comes from the loop's own log, without start, validation and checkpoints, and
without the first record. `ray_overhead` is the share of a step's time that Ray adds. Ray's
processes need a core too. If the workers use all cores, such as two workers on two cores, both wait
whenever a process of Ray runs. So the table has the processor time of a step too, for the workers
and for all other processes. With --spare-core the workers leave one core free.
Then one worker of a run under Ray is killed (kill -9). `recover_s` is the time until training has
made its next step, `steps_lost` the number of steps made twice. This run has a checkpoint every 10
steps.

Without --photos the photos are those of scikit-image, cut into tiles. Without Ray only B5 runs.
--data DIR takes shards of `benchmarks/gpu_data.py` instead, and only B5 runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compare import Row, ratio, report, take_turns
from gpu_data import load_sets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.core.manifest import StageRef
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from data_prep.raw.sample_photos import write_sample_photos
from dpnet.loading.batch import to_device
from dpnet.tracking.run_log import read_log, read_status
from dpnet.training.job import TrainJob, TrainRequest, requested, stage_request
from dpnet.training.loop import initial_state, open_loader, train_loop
from dpnet.training.settings import LossSettings, ModelSettings, TrainSettings
from dpnet.training.state import TrainState
from dpnet.training.step import Step

WORKERS = 2
WARM_UP = 3  # steps before the first turn
TURN_S = 8.0  # of one contender of B5
STEPS = 100  # of a run of B6; a record of the log every 25
EVERY = 10  # steps between checkpoints of the run whose worker is killed


class TorchSession:
    """The session of a rank under torchrun."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_world = int(os.environ["LOCAL_WORLD_SIZE"])
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
        self.node, self.attempt = "here", "torchrun"
        torch.distributed.init_process_group("nccl" if cuda else "gloo")

    def notice(self) -> bool:
        return False


class OneProcess:
    """The session of one rank in this process."""

    rank, world, local_world, node, attempt = 0, 1, 1, "here", "one"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def notice(self) -> bool:
        return False


def prepared(arguments: argparse.Namespace, root: Path) -> TrainJob:
    """Prepare real shards and return a job on them."""
    store = open_store(str(root))
    photos = arguments.photos or str(root / "photos")
    if not arguments.photos:
        write_sample_photos(root / "photos")
    images = prepare_images(
        ImagesSettings(
            source=photos, name="b", mode="tiles", size=arguments.size, tile=[128, 192],
            tile_stride=0.5, max_tiles=300, val=0.15, test=0.2, max_failure_ratio=0.5,
        ),
        store,
    )  # fmt: skip
    masks = prepare_masks(
        MasksSettings(name="b", size=arguments.size, train=4000, eval_per_bin=10), store
    )
    return job_on(store, images, masks, arguments.preset, arguments.batch)


def job_on(
    store: Store, images: StageRef, masks: StageRef, preset: str, batch: int, **changes: Any
) -> TrainJob:
    """Return a job of the benchmarks.

    Args:
        store: the root.
        images: its image shards.
        masks: its mask shards.
        preset: the network.
        batch: samples of a step.
        changes: other settings of training.
    """
    model, losses = ModelSettings(preset=preset), LossSettings(adversarial=0.005)
    fixed = {
        "steps": STEPS, "batch_size": batch, "warmup_steps": 2, "workers": WORKERS,
        "validate_every": 10**6, "validation_pairs": 4, "checkpoint_every": 10**6,
        "finetune_share": 0,
    }  # fmt: skip
    settings = TrainSettings(**{**fixed, **changes})
    what = (images, masks, model, losses, settings)
    asked = requested(stage_request(TrainRequest("b", *what)))
    return TrainJob(store.uri, "runs/b-000000000000", *what, asked)


def step_of(job: TrainJob, state: TrainState, device: torch.device) -> Step:
    """Return the step of a job, as the training loop runs it without Ray."""
    gpu = device.type == "cuda"
    backend = "inductor" if gpu else None
    return Step(state, job.losses, job.settings, bf16=gpu, backend=backend)


def loader_or_device(job: TrainJob, repeats: int, turn_s: float) -> dict[str, list[float]]:
    """Return the images/s of the step with the loader, and on a batch on the device."""
    session: Any = OneProcess()
    device = session.device
    loader = open_loader(job, session, open_store(job.root))
    state = initial_state(job, device)
    step = step_of(job, state, device)
    batches = loader.batches(0, 10**9)

    def fed() -> tuple[torch.Tensor, torch.Tensor]:
        return to_device(next(batches)[1], device)

    one = fed()

    def rate(feed: Any) -> float:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < turn_s:
            # Not by the loader's own number, so that both turns have the same schedule.
            step(0, *feed())
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        return count * job.settings.batch_size / (time.perf_counter() - start)

    for _ in range(WARM_UP):
        step(0, *fed())
    rates = take_turns({"loader": lambda: rate(fed), "device": lambda: rate(lambda: one)}, repeats)
    batches.close()
    return rates


def loop_rate(job: TrainJob) -> float:
    """Return the images/s of a finished run: the median of its records without the first."""
    records = read_log(open_store(job.root), job.folder)
    rates = [r["images"] / r["seconds"] for r in records if r["kind"] == "train"]
    return statistics.median(rates[1:])


class Loop(NamedTuple):
    """The result of a run of the loop: images/s, and core-seconds of a step."""

    rate: float
    workers: float
    others: float


def measured(process: subprocess.Popen[bytes], job: TrainJob, *, spare: bool) -> Loop:
    """Measure a run under `process` until it ends; with `spare`, workers leave a core free."""
    cores = sorted(os.sched_getaffinity(0))
    store = open_store(job.root)
    seen = dict[int, tuple[float, float]]()  # processor times when a step was first seen
    while process.poll() is None:
        status = read_status(store, job.folder)
        used = processor_times(process.pid)
        workers = {worker["pid"] for worker in status.get("workers", [])}
        for pid in used if spare and workers else ():
            place_on(cores[1:] if pid in workers else cores[:1], pid)
        if status.get("step") and workers <= used.keys():
            ours = sum(used[pid] for pid in workers)
            seen.setdefault(status["step"], (ours, sum(used.values()) - ours))
        time.sleep(0.2)
    if process.returncode:
        sys.exit("a run of the loop failed")
    steps, spent = list(seen), list(seen.values())
    of_a_step = [(b - a) / (steps[-1] - steps[0]) for a, b in zip(spent[0], spent[-1], strict=True)]
    return Loop(loop_rate(job), *of_a_step)


def place_on(cores: Sequence[int], pid: int) -> None:
    """Let every thread of a process run only on these cores."""
    with contextlib.suppress(OSError):  # one that has just ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), cores)


def processor_times(pid: int) -> dict[int, float]:
    """Return seconds of processor time of a process and all its descendants, by process."""
    parents, used = dict[int, int](), dict[int, float]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            own = int(stat.parent.name)
            parents[own] = int(fields[1])
            used[own] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def below(own: int) -> bool:
        return own == pid or (own in parents and below(parents[own]))

    return {own: seconds for own, seconds in used.items() if below(own)}


def under_torchrun(job: TrainJob, *, spare: bool) -> Loop:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as spec:
        json.dump(job.to_json(), spec)
        spec.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={WORKERS}", __file__, "--worker", spec.name]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            return measured(process, job, spare=spare)


class UnderRay:
    """A run under Ray on this machine, in a process of its own like the command's."""

    def __init__(self, job: TrainJob) -> None:
        self.job = job

    def __enter__(self) -> subprocess.Popen[bytes]:
        self._spec = tempfile.NamedTemporaryFile("w", suffix=".json")
        json.dump(self.job.to_json(), self._spec)
        self._spec.flush()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--ray", self._spec.name], stderr=subprocess.DEVNULL
        )
        return self._process

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._spec.close()


def under_ray(job: TrainJob, *, spare: bool) -> Loop:
    with UnderRay(job) as process:
        return measured(process, job, spare=spare)


def recovery(job: TrainJob) -> tuple[float, int]:
    """Return seconds from a worker's death to the next step, and the steps made twice."""
    settings = job.settings.model_copy(update={"checkpoint_every": EVERY, "steps": 10_000})
    job = replace(job, settings=settings)
    store = open_store(job.root)
    with UnderRay(job) as process:
        while (status := read_status(store, job.folder)).get("step", 0) < 2 * EVERY + EVERY // 2:
            assert process.poll() is None
            time.sleep(0.05)
        worker = next(each for each in status["workers"] if each["rank"] == WORKERS - 1)
        os.kill(worker["pid"], signal.SIGKILL)
        killed = time.perf_counter()
        before = read_status(store, job.folder)["step"]
        while True:
            assert process.poll() is None
            status = read_status(store, job.folder)
            if status["resumed_from"] and status["step"] > status["resumed_from"]:
                return time.perf_counter() - killed, before - status["resumed_from"]
            time.sleep(0.05)


def ray_is_installed() -> bool:
    """Return whether B6 can run, and print why not."""
    if importlib.util.find_spec("ray") is None:
        print("Ray is not installed: B6 does not run", file=sys.stderr)
        return False
    return True


def run_ray(job: TrainJob) -> None:
    from dpnet.training.ray.launch_local import LocalLauncher
    from dpnet.training.settings import LaunchSettings

    launcher = LocalLauncher(job, LaunchSettings())
    try:
        launcher.start()
        while launcher.is_running():
            threading.Event().wait(0.1)
    finally:
        launcher.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", metavar="DIR")
    parser.add_argument("--preset", default="tiny", choices=["tiny", "base", "large"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turn", type=float, default=TURN_S, help="B5: seconds of a turn")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared shards; only B5 runs")
    parser.add_argument("--spare-core", action="store_true", help="B6: workers leave a core free")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--worker", metavar="SPEC", help=argparse.SUPPRESS)
    parser.add_argument("--ray", metavar="SPEC", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if spec := arguments.worker or arguments.ray:
        job = TrainJob.from_json(json.loads(Path(spec).read_text()))
        if arguments.ray:
            run_ray(job)
            return
        session: Any = TorchSession()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // session.local_world))
        train_loop(job, session)
        torch.distributed.destroy_process_group()
        return

    with tempfile.TemporaryDirectory(prefix="dpnet-training-") as root:
        if arguments.data:
            sets = load_sets(arguments.data)
            job = job_on(*sets, arguments.preset, arguments.batch)
        else:
            job = prepared(arguments, Path(root))
        number = iter(range(10**6))

        def fresh() -> TrainJob:
            return replace(job, folder=f"runs/b-{next(number):012x}")

        fed = loader_or_device(job, arguments.repeats, arguments.turn)
        rows = [
            Row("step, with the loader", fed["loader"], "images/s"),
            Row("step, batch on the device", fed["device"], "images/s"),
        ]
        ratios = {"of_device_only": ratio(fed["loader"], fed["device"])}
        if arguments.data is None and ray_is_installed():
            spare = arguments.spare_core
            both = {
                "Ray": lambda: under_ray(fresh(), spare=spare),
                "torchrun": lambda: under_torchrun(fresh(), spare=spare),
            }
            loops = take_turns(both, arguments.repeats)
            for name, runs in loops.items():
                rate, workers, others = zip(*runs, strict=True)
                rows += [
                    Row(f"loop, 2 workers under {name}", rate, "images/s"),
                    Row(f"{name}: a step of the workers", workers, "core-s"),
                    Row(f"{name}: a step of all others", others, "core-s"),
                ]
            under = {name: [run.rate for run in runs] for name, runs in loops.items()}
            ratios["ray_overhead"] = ratio(under["torchrun"], under["Ray"]) - 1
            recovered = take_turns({"killed": lambda: recovery(fresh())}, arguments.repeats)[
                "killed"
            ]
            rows += [
                Row("a killed worker to the next step", [s for s, _ in recovered], "s"),
                Row("steps made twice", [float(lost) for _, lost in recovered], "steps"),
            ]
            ratios["recover_s"] = statistics.median(s for s, _ in recovered)
            ratios["steps_lost"] = max(lost for _, lost in recovered)
    report("B5, B6: training", rows, ratios, as_json=arguments.json)


if __name__ == "__main__":
    main()
