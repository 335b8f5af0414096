"""Everything that a GPU should be asked, in one command and ten minutes.

    python benchmarks/gpu.py [--only NAME] [--quick] [--minutes 9] [--out DIR] [--photos DIR]

Each step is a process with a time limit. At its limit it is ended with all its children, and the
next step starts. A step's output is shown and written to OUT/NN-name.log, its figures to
OUT/NN-name.json, and OUT/table.md is written again after each step. So a run that is cut leaves
all results until then.

--quick makes everything small. It runs without a GPU too, and shows only that everything runs.

This file needs only the standard library. It runs in a checkout and in a folder that
`benchmarks/gpu_pack.py` made. The exit status is 1 if a step failed, and 2 if none could start.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

TOP = Path(__file__).resolve().parents[1]
DATA = TOP / "build/gpu/data"  # in a pack too
PACK, SITE = TOP / "pack.json", TOP / "site"  # only in a pack
MINUTES = 9  # of all limits together
PASSED, SKIPPED = "passed", "skipped"
STOPPED = "stopped by Ctrl-C"
OUTCOMES = {0: PASSED, 77: SKIPPED}  # of exit statuses; 77 is that of automake


@dataclass(frozen=True)
class Goal:
    """A figure of a step for the table, and the value that `docs/performance.md` wants.

    Attributes:
        figure: name of the row or ratio.
        least: the figure should be at least this.
        most: the figure should be at most this.
    """

    figure: str
    least: float | None = None
    most: float | None = None

    def judge(self, figures: Mapping[str, float], *, compare: bool) -> str:
        """Return the figure in words. Compare it with the goal only if `compare`."""
        value = figures.get(self.figure)
        if value is None:
            return f"{self.figure}: not measured"
        text = f"{self.figure} {value:,.4g}"
        if not compare or (self.least is None and self.most is None):
            return text
        if self.least is not None:
            met, goal = value >= self.least, f"≥ {self.least:g}"
        else:
            assert self.most is not None
            met, goal = value <= self.most, f"≤ {self.most:g}"
        return f"{text} (goal {goal}: {'met' if met else 'missed'})"


@dataclass(frozen=True)
class Step:
    """One script, its options and its time limit.

    Attributes:
        name: for --only and the table.
        script: file in `benchmarks/`.
        seconds: the limit, if all limits together are MINUTES.
        full: the options. `{device}`, `{data}`, `{compiled}` and `{seconds}` are replaced.
        quick: the options with --quick.
        goals: the figures for the table.
        needs_data: whether it reads the prepared shards.
        own_code: whether its compiled code is kept apart from that of the other steps.
    """

    name: str
    script: str
    seconds: float
    full: str
    quick: str
    goals: tuple[Goal, ...]
    needs_data: bool = False
    own_code: bool = False


STEPS = (
    Step(
        "correctness", "gpu_tests.py", 60, "", "",
        (Goal("passed"), Goal("failed"), Goal("skipped")), own_code=True,
    ),
    Step(
        "attention", "attention.py", 55, "--json", "--side 8 --batch 1 --repeats 1 --json",
        (Goal("vs_plain_bf16", 2), Goal("vs_sdpa", 5), Goal("vs_plain_fp32", 8)), own_code=True,
    ),
    Step(
        "first-step", "first_step.py", 105, "--batch 16 --cache {compiled} --json",
        "--preset tiny --size 64 --batch 1 --cache {compiled} --json",
        (Goal("cold_s", most=45), Goal("warm_s", most=10)),
    ),
    Step(
        "step", "step.py", 70, "--batch 16 --steps 5 --repeats 3 --json",
        "--preset tiny --size 64 --batch 1 --steps 1 --repeats 1 --json",
        (Goal("vs_eager_fp32", 3), Goal("ours: speed", 400), Goal("of_matmul_rate", 0.25)),
    ),
    Step(
        "profile", "kernels.py", 30, "--batch 16 --steps 5 --json",
        "--preset tiny --size 64 --batch 1 --steps 1 --json",
        (Goal("a step"), Goal("of_step")),
    ),
    Step(
        "inpaint", "inpaint.py", 30, "--device {device} --json",
        "--device {device} --preset tiny --sides 64 --tile 64 --json",
        (Goal("cuda 2048^2", most=1), Goal("cuda 2048^2, peak memory", most=4)),
    ),
    Step(
        "loader", "training.py", 45,
        "--data {data}/256 --preset base --batch 16 --repeats 3 --turn 3 --json",
        "--data {data}/64 --preset tiny --batch 4 --repeats 1 --turn 3 --json",
        (Goal("of_device_only", 0.97), Goal("step, with the loader")), needs_data=True,
    ),
    Step(
        "training", "learning.py", 145,
        "--data {data}/256 --preset base --batch 16 --seconds {seconds} --json",
        "--data {data}/64 --batch 4 --rate 1e-3 --steps 60 --seconds {seconds} --json",
        (Goal("loss_of_start", most=1), Goal("speed")), needs_data=True,
    ),
)  # fmt: skip
TRAINING_SHARE = 120 / 145  # of the limit of `training`; the rest is its start and end
PREPARING = Step("data", "gpu_data.py", 120, "--out {data}", "--out {data}", (), own_code=True)


@dataclass(frozen=True)
class Result:
    """The outcome of a step, as OUT/NN-name.json has it."""

    name: str
    result: str  # "passed", "skipped", or what went wrong
    seconds: float
    limit_s: float
    command: list[str]
    rows: list[dict[str, Any]]
    ratios: dict[str, float]

    @property
    def figures(self) -> dict[str, float]:
        """Return all figures by their names."""
        return {**{row["name"]: row["value"] for row in self.rows}, **self.ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen steps. Return the exit status."""
    options = parse_arguments(arguments)
    steps = chosen(options.only)
    if isinstance(steps, str):
        return refuse(steps)
    machine = about_the_machine()
    if isinstance(machine, str):
        return refuse(machine)
    if not (machine["gpu"] or options.quick):
        return refuse(
            "torch sees no GPU on this machine: run this where one is, or add --quick"
            ' (make gpu ARGS="--quick") to try all steps in small.'
        )
    if any(step.needs_data for step in steps) and not (DATA / "ready").exists():
        steps = [PREPARING, *steps]
    out = options.out or TOP / f"build/gpu/results-{datetime.now():%Y%m%d-%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "machine.json").write_text(json.dumps(machine, indent=1))
    work = Path(tempfile.mkdtemp(prefix="dpnet-gpu-"))
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        results = run_all(steps, options, machine, out, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{(out / 'table.md').read_text()}\nThe results are in {out}")
    if results[-1].result == STOPPED:
        return 130
    return int(any(result.result not in (PASSED, SKIPPED) for result in results))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = ", ".join(step.name for step in STEPS)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help=f"steps to run, with commas: {names}"
    )
    parser.add_argument("--quick", action="store_true", help="everything small; without a GPU too")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"all limits together (default: {MINUTES})"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: build/gpu/results-TIME)")
    parser.add_argument("--photos", metavar="DIR", help="(default: the sample photos)")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error("--minutes: give more than 0")
    return options


def chosen(only: Sequence[str] | None) -> list[Step] | str:
    """Return the steps with these names in their usual order, or why that is impossible."""
    names = [name for each in only or () for name in each.split(",") if name]
    known = [step.name for step in STEPS]
    unknown = [name for name in names if name not in known]
    if unknown:
        return f"--only names {unknown[0]!r}, which is not a step: give one of {', '.join(known)}."
    return [step for step in STEPS if step.name in names or not names]


def refuse(why: str) -> int:
    """Say in one sentence why nothing starts. Return the exit status."""
    print(f"benchmarks/gpu.py: {why}", file=sys.stderr)
    return 2


def about_the_machine() -> dict[str, Any] | str:
    """Return the facts that belong to every figure, or why nothing can run here."""
    pack = json.loads(PACK.read_text()) if PACK.exists() else {}
    python = ".".join(map(str, sys.version_info[:2]))
    if pack and pack["python"] != python:
        return (
            f"this folder was made for Python {pack['python']}, and this is Python {python}: use"
            f' that Python, or make the folder again with ARGS="--python {python}".'
        )
    code = (
        "import json, importlib.metadata as m, torch\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "names = ('triton', 'numpy', 'pillow', 'pyarrow')\n"
        "gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None\n"
        "print(json.dumps({'torch': torch.__version__, 'gpu': gpu,"
        " **{n: version(n) for n in names}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        return f"{sys.executable} cannot use torch ({reason}): use a Python that has it."
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        "python": python,
        "cores": len(os.sched_getaffinity(0)),
        "commit": pack.get("commit") or commit(),
        "time": f"{datetime.now():%Y-%m-%d %H:%M}",
    }


def commit() -> str:
    """Return the commit of this checkout, or "unknown"."""
    command = ["git", "-C", str(TOP), "describe", "--always", "--dirty"]
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    return "unknown"


def run_all(
    steps: Sequence[Step],
    options: argparse.Namespace,
    machine: Mapping[str, Any],
    out: Path,
    work: Path,
) -> list[Result]:
    """Run the steps in order, and write the results after each. Ctrl-C ends after that step.

    Args:
        steps: what to run.
        options: those of the command line.
        machine: facts for the head of the table.
        out: folder of the results.
        work: folder of compiled code, empty.
    """
    results: list[Result] = []
    for number, step in enumerate(steps, 1):
        limit = step.seconds * options.minutes / MINUTES
        if not machine["gpu"]:
            limit *= 2  # a CPU is often busy with other work
        words = (step.quick if options.quick else step.full).format(
            device="cuda" if machine["gpu"] else "cpu",
            data=DATA,
            compiled=work / "compiled",
            seconds=int(limit * TRAINING_SHARE),
        )
        command = [sys.executable, f"benchmarks/{step.script}", *words.split()]
        if step is PREPARING and options.photos:
            command += ["--photos", os.path.abspath(options.photos)]
        print(f"\n== {step.name}, at most {limit:.0f} s: {' '.join(command[1:])}", flush=True)
        # Small sizes on a CPU: more threads only wait for each other.
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} if options.quick else {}
        environment = {**threads, **os.environ, **surroundings(work, step)}
        files = out / f"{number:02}-{step.name}"
        result = run_step(step.name, command, limit, files, environment)
        results.append(result)
        text = table(results, machine, compare=not options.quick)
        (out / "table.md").write_text(text)
        if result.result == STOPPED:
            break
    return results


def surroundings(work: Path, step: Step) -> dict[str, str]:
    """Return the variables of a step: where our code is, and where compiled code is kept."""
    code = work / (step.name if step.own_code else "compiled")
    return {
        "PYTHONPATH": os.pathsep.join([str(SITE)] * SITE.exists() + [str(TOP)]),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(code),
        "TRITON_CACHE_DIR": str(code / "triton"),
    }


def run_step(
    name: str, command: list[str], limit: float, files: Path, environment: Mapping[str, str]
) -> Result:
    """Run one step in a process group of its own, and write its log and its result.

    Args:
        name: name of the step.
        command: the command; it may end with one JSON line of `compare.report`.
        limit: seconds after which the whole group is killed.
        files: path of the log and of the result, without `.log` and `.json`.
        environment: its variables.
    """
    start = time.monotonic()
    log = files.with_name(f"{files.name}.log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=TOP,
            start_new_session=True,
        )  # fmt: skip
        try:
            in_time = show(process, file, start + limit)
            outcome = "" if in_time else f"over its limit of {limit:.0f} s"
        except KeyboardInterrupt:
            outcome = STOPPED
        finally:
            kill_group(process)
    if not outcome:
        outcome = OUTCOMES.get(process.returncode, f"failed with status {process.returncode}")
    found = last_report(log.read_text(errors="replace"))
    seconds = round(time.monotonic() - start, 1)
    result = Result(name, outcome, seconds, limit, command, found["rows"], found["ratios"])
    record = json.dumps(vars(result), indent=1)
    files.with_name(f"{files.name}.json").write_text(record)
    print(f"== {name}: {outcome}, {seconds:.0f} s", flush=True)
    return result


def show(process: subprocess.Popen[bytes], log: BinaryIO, deadline: float) -> bool:
    """Copy the output to the log and to the screen. Return whether it ended before the deadline."""
    assert process.stdout is not None
    pipe, is_open = process.stdout.fileno(), True
    while time.monotonic() < deadline:
        ready, _, _ = select.select([pipe] if is_open else [], [], [], 0.1)
        if ready:
            data = os.read(pipe, 1 << 16)
            is_open = bool(data)
            log.write(data)
            log.flush()
            print(data.decode(errors="replace"), end="", flush=True)
        elif has_ended(process):  # a child that it left may still hold the pipe
            return True
    return False


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether it has ended. Its number stays its own, so that its group can be killed."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, flags) is not None


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, if it runs, and all children that it left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def last_report(text: str) -> dict[str, Any]:
    """Return the last JSON line of `compare.report` in a log, or an empty one."""
    for line in reversed(text.splitlines()):
        if line.startswith('{"rows"'):
            with suppress(ValueError):
                found: dict[str, Any] = json.loads(line)
                return found
    return {"rows": [], "ratios": {}}


def table(results: Sequence[Result], machine: Mapping[str, Any], *, compare: bool) -> str:
    """Return the table of the results in Markdown. With `compare` it has the goals."""
    goals = {step.name: step.goals for step in STEPS}
    facts = ("torch", "triton", "python", "cores", "commit", "time")
    head = [machine["gpu"] or "no GPU", *(f"{fact} {machine[fact]}" for fact in facts)]
    lines = [", ".join(head) + ".", ""]
    if not compare:
        lines += ["--quick: all sizes are small, so no goal is compared.", ""]
    lines += ["| step | result | seconds | figures |", "|---|---|---|---|"]
    for result in results:
        figures = "; ".join(
            goal.judge(result.figures, compare=compare) for goal in goals.get(result.name, ())
        )
        lines.append(f"| {result.name} | {result.result} | {result.seconds:.0f} | {figures} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # between two steps
        sys.exit(130)
