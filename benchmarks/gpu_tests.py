"""Run the tests that need a GPU, and nothing else.

    python benchmarks/gpu_tests.py

It ends with one JSON line, as the benchmarks do. On a machine with a GPU it fails if a test is
skipped, or if none ran. Without a GPU it only imports them, and ends with status 77. The tests run
without `tests/conftest.py`, which needs much that is not there on a machine that is lent for
minutes. It needs torch, pytest and what the tests import.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compare import Row, report

TOP = Path(__file__).resolve().parents[1]
SKIPPED = 77  # exit status, as of automake


class Count:
    """A plugin of pytest that counts the outcomes."""

    def __init__(self) -> None:
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self.outcomes["failed"] += 1


def test_files(top: Path) -> list[Path]:
    """Return the files with tests that need a GPU."""
    found = sorted((top / "tests/unit").rglob("test_*.py"))
    return [file for file in found if "pytest.mark.gpu" in file.read_text("utf-8")]


def needed_files(top: Path) -> list[Path]:
    """Return these files and all modules of `tests` that they import, for a pack."""
    needed, waiting = set[Path](), test_files(top)
    while waiting:
        file = waiting.pop()
        needed.add(file)
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for folder in (file.parent, top / "tests/support"):
                beside = {folder / f"{name}.py" for name in names}
                waiting += [each for each in beside - needed if each.is_file()]
    return sorted(needed)


def verdict(outcomes: Mapping[str, int], status: int, *, gpu: bool) -> int | str:
    """Return the exit status, or the sentence with which the script fails.

    Args:
        outcomes: the numbers of tests that passed, failed and were skipped.
        status: the exit status of pytest.
        gpu: whether this machine has a GPU.
    """
    if status or outcomes["failed"]:
        return 1
    if gpu and (outcomes["skipped"] or not outcomes["passed"]):
        return "there is a GPU, but not every test that needs one ran"
    return 0 if gpu else SKIPPED


def main() -> None:
    """Run the tests and count them."""
    import pytest
    import torch

    count, files = Count(), test_files(TOP)
    if not files:
        sys.exit(f"there are no tests that need a GPU in {TOP / 'tests/unit'}")
    # Without `addopts`: some markers are declared in conftest.py only.
    options = ["--noconftest", "-p", "no:cacheprovider", "-o", "addopts=", f"--rootdir={TOP}"]
    status = pytest.main([*options, "-v", "-m", "gpu", *map(str, files)], plugins=[count])
    rows = [Row(name, [number], "tests") for name, number in count.outcomes.items()]
    report("Tests that need a GPU", rows, {}, as_json=True)
    sys.exit(verdict(count.outcomes, int(status), gpu=torch.cuda.is_available()))


if __name__ == "__main__":
    main()
