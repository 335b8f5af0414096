"""Rules for every test: a time limit, no silent skip of a real part in CI, and rotation.

`tests/conftest.py` imports these hooks.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
import subprocess
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from xdist.scheduler import LoadScopeScheduling

SKIPS = Path(__file__).parents[1] / "allowed_skips.txt"
# Slow tests that start `dpnet up` or a browser.
PLATFORMS = (
    "tests/e2e/test_other_pages.py", "tests/e2e/test_report_page.py",
    "tests/e2e/test_serve_login.py", "tests/e2e/test_serve_page.py", "tests/e2e/test_ui.py",
    "tests/integration/test_flow_faults.py", "tests/integration/test_kuberay_flow.py",
    "tests/integration/test_new_data.py", "tests/integration/test_up_running.py",
)  # fmt: skip
# Slow tests that start none of these, and no Ray.
ALONE = (
    "tests/e2e/test_image_steps.py", "tests/e2e/test_images_killed.py", "tests/e2e/test_wheel.py",
    "tests/integration/test_deadly_photos.py", "tests/integration/test_gpu_pack_alone.py",
    "tests/integration/test_images_s3.py", "tests/integration/test_k8s_apply.py",
    "tests/integration/test_k8s_servers.py", "tests/integration/test_k8s_worker.py",
    "tests/integration/test_kuberay.py", "tests/integration/test_mutants.py",
    "tests/integration/test_s3.py", "tests/integration/test_serve.py",
)  # fmt: skip
# Slow files that go through much of the same code: in CI, one of each line runs for each commit.
TURNS = (
    ("tests/e2e/test_kuberay_run.py", "tests/integration/test_kuberay_flow.py"),
    ("tests/e2e/test_train_killed.py", "tests/integration/test_ray_machines.py",
     "tests/integration/test_train_faults.py"),
    ("tests/integration/test_flow_faults.py", "tests/integration/test_new_data.py",
     "tests/integration/test_up_running.py"),
    ("tests/e2e/test_images_killed.py", "tests/integration/test_stages_killed.py"),
)  # fmt: skip
FAST_S, REAL_S, SLOW_S = 120, 300, 900  # on a loaded machine; a test takes a fraction of it


def allowed_skips(text: str) -> list[re.Pattern[str]]:
    """Return the patterns of the reasons for which a test may be skipped in CI.

    A line is `PATTERN  # why`, a regular expression for the whole reason. A line without a why is
    refused.
    """
    patterns = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pattern, mark, why = line.partition("  # ")
        if not mark or not why.strip():
            raise ValueError(f"{SKIPS.name}: {line!r} gives no reason: write PATTERN  # why.")
        patterns.append(re.compile(pattern.strip()))
    return patterns


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of tests that take turns in CI, and print CI's failures at once."""
    config.addinivalue_line("markers", "rotated(n): in CI, one in n of the file's tests runs")
    if os.environ.get("CI") == "true" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Failures(config))


class _Failures:
    """Prints a failure when it happens. A run that CI ends for time prints nothing at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal and report.failed:
            terminal.write_line("")
            terminal.write_line(f"{report.when} of {report.nodeid} failed:")
            terminal.write_line(report.longreprtext[-5000:])
            terminal.flush()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every test a time limit, and leave out the rotated tests whose turn it is not in CI."""
    _limit(items)
    if os.environ.get("CI") == "true" and (commit := _commit(config.rootpath)):
        left_out = not_this_time(items, commit)
        items[:] = [item for item in items if item not in left_out]
        if left_out:
            config.hook.pytest_deselected(items=left_out)


class Scheduler(LoadScopeScheduling):
    """Runs the tests that start Ray one after another, and those that start `dpnet up` as well.

    Two of a kind never run at the same time. The others run beside them, a file at a time.
    pytest-xdist's own groups come from markers, which it loses with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file.startswith("tests/unit/") or file in ALONE:
            return file
        return "platforms" if file in PLATFORMS else "clusters"


@pytest.hookimpl(optionalhook=True)  # pytest-xdist can be off
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler | None:
    """Choose the order for `pytest --dist loadgroup`."""
    return Scheduler(config, log) if config.getvalue("dist") == "loadgroup" else None


def not_this_time(items: Sequence[pytest.Item], commit: str) -> list[pytest.Item]:
    """Return the tests that do not run for this commit: of TURNS, and those marked `rotated`.

    Tests in which several clusters or servers die take minutes each, so CI runs some of them for
    each commit, and others for the next one. `make test-all` without CI=true runs all of them.
    """
    resting = {
        file for files in TURNS for file in sorted(files, key=lambda f: _rank(commit, f))[1:]
    }
    files: dict[Path, list[pytest.Item]] = {}
    left_out = []
    for item in items:
        if item.nodeid.partition("::")[0] in resting:
            left_out.append(item)
        elif item.get_closest_marker("rotated"):
            files.setdefault(item.path, []).append(item)
    for found in files.values():
        mark = found[0].get_closest_marker("rotated")
        assert mark
        share = -(-len(found) // mark.args[0])
        ranked = sorted(found, key=lambda item: _rank(commit, item.nodeid))
        left_out += ranked[share:]
    return left_out


def _rank(commit: str, name: str) -> str:
    return hashlib.sha256(f"{commit} {name}".encode()).hexdigest()


def _commit(folder: Path) -> str:
    """Return the commit of a working tree, or "" if it has none."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _limit(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            slow = item.get_closest_marker("slow") or item.get_closest_marker("e2e")
            real = item.get_closest_marker("integration")
            seconds = SLOW_S if slow else REAL_S if real else FAST_S
            item.add_marker(pytest.mark.timeout(seconds))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all tests without looking for garbage: that took a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Free what a file's tests leave, and let later searches for garbage not look at what stays.

    The imports of all tests have millions of objects: one whole search took two seconds.
    """
    done = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that is skipped in CI for a reason that is not on the list."""
    return _checked((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a file that is skipped whole in CI for a reason that is not on the list."""
    return _checked((yield))


_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)


def _checked(report: _Report) -> _Report:
    expected = hasattr(report, "wasxfail")
    if os.environ.get("CI") != "true" or not report.skipped or expected:
        return report
    assert isinstance(report.longrepr, tuple)
    reason = report.longrepr[2].removeprefix("Skipped: ")
    allowed = allowed_skips(SKIPS.read_text("utf-8"))
    if not any(pattern.fullmatch(reason) for pattern in allowed):
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid} was skipped in CI ({reason}): install the missing part in .ci/run,"
            f" or add the reason to tests/{SKIPS.name}."
        )
    return report
