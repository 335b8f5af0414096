"""Apply one-line mutations of the guarantees, one at a time, and report those that no test sees.

    python tests/mutants/run.py                       # all of them
    python tests/mutants/run.py --only lease          # those with this text in name, file or list
    python tests/mutants/run.py --sample 20 --seed 7  # twenty, chosen by the seed

The lists are the `*.toml` files in this folder. A mutant names a file, a snippet that the file has
exactly once, the snippet to put there, and the tests that must then fail. Mutants are applied in
temporary copies of the tree, never in the tree itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from queue import Queue

FOLDER = Path(__file__).resolve().parent
TREE = FOLDER.parents[1]
PACKAGES = ("data_prep", "dpnet", "flows")
TIMEOUT_S = 240.0  # for the tests of one mutant; without it most take seconds
FAILED = 1  # pytest's exit status if a test failed; others mean that the tests did not run
# New processes start from one that has these, so that each mutant does not load them again.
PRELOADED = ["boto3", "cv2", "hypothesis", "numpy", "PIL.Image", "pyarrow.parquet", "torch", "yaml"]
PROCESSES = multiprocessing.get_context("forkserver")
OPTIONS = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line")


@dataclass(frozen=True)
class Mutant:
    """A mutation of one guarantee.

    Attributes:
        name: short and unique.
        guarantee: the behaviour that it breaks, in one sentence.
        file: the file it changes, relative to the tree.
        old: a snippet that the file has exactly once.
        new: the snippet that replaces it.
        tests: test files or test ids. One of them must fail.
        group: name of the list without ".toml".
    """

    name: str
    guarantee: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    group: str


def read_mutants(folder: Path = FOLDER) -> list[Mutant]:
    """Read the lists. Raise ValueError if a mutant has a missing or an unknown field."""
    names = {field.name for field in fields(Mutant)} - {"group"}
    found = []
    for file in sorted(folder.glob("*.toml")):
        for record in tomllib.loads(file.read_text("utf-8"))["mutant"]:
            if record.keys() != names:
                raise ValueError(f"{file.name}: {record.get('name')!r} needs exactly {names}")
            texts = {name: record[name] for name in names - {"tests"}}
            found.append(Mutant(**texts, tests=tuple(record["tests"]), group=file.stem))
    return found


def problems(mutants: Sequence[Mutant], tree: Path = TREE) -> list[str]:
    """Return what is wrong with the lists: each problem in one sentence."""
    found = []
    names = [mutant.name for mutant in mutants]
    for mutant in mutants:
        where = f"{mutant.group}.toml: {mutant.name}"
        if names.count(mutant.name) > 1:
            found.append(f"{where}: the name is used twice.")
        if mutant.old == mutant.new or not mutant.guarantee or not mutant.tests:
            found.append(f"{where}: it changes nothing, or names no guarantee or no test.")
        try:
            count = (tree / mutant.file).read_text("utf-8").count(mutant.old)
        except FileNotFoundError:
            found.append(f"{where}: {mutant.file} does not exist. Correct the list.")
            continue
        if count != 1:
            found.append(f"{where}: {mutant.file} has the snippet {count} times. Correct the list.")
        for test in mutant.tests:
            if not (tree / test.partition("::")[0]).is_file():
                found.append(f"{where}: the test {test} does not exist. Correct the list.")
    return found


def chosen(mutants: Sequence[Mutant], only: str, sample: int | None, seed: str) -> list[Mutant]:
    """Return the mutants to run: those that contain `only`, or a sample of these."""
    found = [m for m in mutants if only in f"{m.group} {m.name} {m.file}"]
    if sample is None or sample >= len(found):
        return found
    return random.Random(seed).sample(found, sample)


def copy_tree(to: Path) -> None:
    """Copy the files that git knows or would add, and compile the packages.

    The compiled files are checked by the hash of their source, so a mutated file is read again
    even if its size and its time are those of the original.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TREE, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (TREE / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(TREE / name, to / name)
    compile_all = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
    subprocess.run([*compile_all, *PACKAGES, "tests"], cwd=to, check=True)


def run_tests(tree: Path, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """Run tests in a copy of the tree; end all their processes with them.

    Returns:
        pytest's exit status, or None if the tests did not end in time; and their output.
    """
    with tempfile.TemporaryDirectory(prefix="dpnet-mutant-", ignore_cleanup_errors=True) as scratch:
        process = PROCESSES.Process(target=_pytest, args=(str(tree), scratch, tuple(tests)))
        process.start()
        assert process.pid  # 0 would be our own group
        process.join(timeout)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status = process.exitcode
        process.join()
        process.close()
        output = Path(scratch, "output")
        return status, output.read_text("utf-8", "replace") if output.exists() else ""


def _pytest(tree: str, scratch: str, tests: tuple[str, ...]) -> None:
    """Run pytest in this new process, and exit with its status."""
    os.setsid()
    output = os.open(f"{scratch}/output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(tree)
    os.environ.update(PYTHONPATH=tree, PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.path[:] = [tree, *(path for path in sys.path if Path(path).resolve() != TREE)]
    import pytest

    status = pytest.main([*OPTIONS, f"--basetemp={scratch}/tests", *tests])
    sys.stdout.flush()
    os._exit(status)  # at once: threads of a mutant may never end


def check(mutant: Mutant, tree: Path) -> str:
    """Apply a mutant in a copy of the tree and run its tests. Return "" if it dies, else why not.

    A test that waits for ever fails by its own time limit. Tests without a result are no proof.
    """
    file = tree / mutant.file
    sound = file.read_text("utf-8")
    file.write_text(sound.replace(mutant.old, mutant.new), "utf-8")
    try:
        status, output = run_tests(tree, mutant.tests, TIMEOUT_S)
    finally:
        file.write_text(sound, "utf-8")
    if status == FAILED:
        return ""
    if status is None:
        return f"its tests did not end within {TIMEOUT_S:.0f} s: name faster ones"
    if status == 0:
        return f"survives: {mutant.guarantee}"
    return f"its tests cannot run (pytest's status {status}):\n{output[-2000:]}"


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants. Return 0 if all of them die."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a text in the name, the file or the list")
    parser.add_argument("--sample", type=int, metavar="N", help="run N of them (default: all)")
    parser.add_argument("--seed", default="0", help="chooses the sample (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--trust", action="store_true", help="do not run the tests unmutated first")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    args = parser.parse_args(arguments)
    mutants = read_mutants()
    if found := problems(mutants):
        print("\n".join(found), file=sys.stderr)
        return 2
    mutants = chosen(mutants, args.only, args.sample, args.seed)
    if args.list:
        print("\n".join(f"{m.group:10} {m.name:40} {m.guarantee}" for m in mutants))
        return 0
    if not mutants:
        print(f"no mutant contains {args.only!r}", file=sys.stderr)
        return 2
    PROCESSES.set_forkserver_preload(PRELOADED)
    started = time.monotonic()
    survivors = []
    with tempfile.TemporaryDirectory(prefix="dpnet-mutants-") as folder:
        trees: Queue[Path] = Queue()
        for number in range(args.parallel):
            copy_tree(tree := Path(folder, str(number)))
            trees.put(tree)
        tree = trees.get()
        # Tests that fail anyway would let every mutant die.
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        print(f"{len(tests)} tests or files of tests without a mutation", flush=True)
        status, output = run_tests(tree, tests, TIMEOUT_S * 5) if not args.trust else (0, "")
        trees.put(tree)
        if status != 0:
            print(f"{output[-4000:]}\nthe tests fail without a mutation", file=sys.stderr)
            return 2

        def run_one(mutant: Mutant) -> tuple[Mutant, str, float]:
            begun, tree = time.monotonic(), trees.get()
            try:
                return mutant, check(mutant, tree), time.monotonic() - begun
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(args.parallel) as pool:
            for mutant, problem, seconds in pool.map(run_one, mutants):
                print(f"{seconds:5.1f} s  {mutant.name}: {problem or 'dies'}", flush=True)
                if problem:
                    survivors.append(f"{mutant.group}.toml: {mutant.name}: {problem}")
    print(f"{len(mutants)} mutants, {len(survivors)} survivors, {time.monotonic() - started:.0f} s")
    print("\n".join(survivors), end="\n" if survivors else "")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
