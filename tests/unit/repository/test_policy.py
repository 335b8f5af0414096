"""The rules that `tests/support/policy.py` puts on every test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from policy import ALONE, PLATFORMS, SKIPS, TURNS, allowed_skips, not_this_time

SUPPORT = Path(__file__).parents[2] / "support"
SKIPPED = "import pytest\n\n@pytest.mark.skip(reason={reason!r})\ndef test_it(): pass\n"


def run(
    folder: Path, text: str, *options: str, ci: bool = True
) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n    e2e\n    integration\n")
    env = {**os.environ, "PYTHONPATH": str(SUPPORT), "CI": "true" if ci else ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "policy", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *options, str(folder)], env=env, cwd=folder, capture_output=True, text=True
    )


def test_ci_fails_on_a_skipped_real_part(tmp_path: Path) -> None:
    done = run(tmp_path, SKIPPED.format(reason="Ceph is not installed (radosgw)"))
    assert done.returncode == 1
    assert "was skipped in CI (Ceph is not installed (radosgw)): install the missing" in done.stdout


def test_ci_fails_on_a_file_that_is_skipped_whole(tmp_path: Path) -> None:
    text = "import pytest\npytest.importorskip('no_such_module_at_all')\ndef test_it(): pass\n"
    done = run(tmp_path, text)
    assert done.returncode != 0
    assert "install the missing part in .ci/run" in done.stdout


def test_ci_allows_a_skip_whose_reason_is_on_the_list(tmp_path: Path) -> None:
    done = run(tmp_path, SKIPPED.format(reason="no GPU"))
    assert (done.returncode, "1 skipped" in done.stdout) == (0, True), done.stdout


def test_elsewhere_any_test_may_be_skipped(tmp_path: Path) -> None:
    done = run(tmp_path, SKIPPED.format(reason="Ceph is not installed (radosgw)"), ci=False)
    assert (done.returncode, "1 skipped" in done.stdout) == (0, True), done.stdout


def test_a_test_that_hangs_is_ended(tmp_path: Path) -> None:
    text = "import time, policy\npolicy.FAST_S = 1\n\ndef test_it(): time.sleep(60)\n"
    done = run(tmp_path, text)
    assert done.returncode == 1
    assert "Timeout (>1.0s)" in done.stdout


def test_ci_prints_a_failure_when_it_happens(tmp_path: Path) -> None:
    text = "import os\n\ndef test_a(): assert 1 == 2\n\ndef test_b(): os.kill(os.getpid(), 9)\n"
    done = run(tmp_path, text, "-p", "no:xdist")
    assert done.returncode == -9, done.stdout
    assert "call of test_it.py::test_a failed:" in done.stdout
    assert "assert 1 == 2" in done.stdout


ROTATED = """
import pytest
pytestmark = pytest.mark.rotated(4)

@pytest.mark.parametrize("number", range(10))
def test_it(number): pass
"""


@pytest.mark.parametrize(("ci", "passed"), [(True, "3 passed, 7 deselected"), (False, "10 passed")])
def test_rotated_tests_take_turns_in_ci_only(tmp_path: Path, ci: bool, passed: str) -> None:
    commit = ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "a"]
    for words in (["init", "-q"], commit):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    done = run(tmp_path, ROTATED, ci=ci)
    assert passed in done.stdout, done.stdout


def test_other_commits_run_other_rotated_tests() -> None:
    class Item:
        path = Path("test_it.py")

        def __init__(self, number: int) -> None:
            self.nodeid = f"test_it.py::test_it[{number}]"

        def get_closest_marker(self, name: str) -> pytest.Mark | None:
            return pytest.mark.rotated(4).mark if name == "rotated" else None

    items = [Item(number) for number in range(10)]
    turns = []
    for commit in range(40):
        left_out = not_this_time(items, str(commit))  # type: ignore[arg-type]
        turns.append({item.nodeid for item in items if item not in left_out})
    assert {len(turn) for turn in turns} == {3}
    assert set().union(*turns) == {item.nodeid for item in items}


def test_one_file_of_each_line_runs_and_other_commits_run_the_others() -> None:
    class Item:
        def __init__(self, file: str) -> None:
            self.path, self.nodeid = Path(file), f"{file}::test_it"

        def get_closest_marker(self, name: str) -> None:
            return None

    items = [Item(file) for files in TURNS for file in files]
    turns = []
    for commit in range(60):
        left_out = not_this_time(items, str(commit))  # type: ignore[arg-type]
        turns.append({str(item.path) for item in items if item not in left_out})
    for files in TURNS:
        assert {len(turn & set(files)) for turn in turns} == {1}
    assert set().union(*turns) == {file for files in TURNS for file in files}


def test_every_line_of_the_list_gives_its_reason() -> None:
    assert allowed_skips(SKIPS.read_text("utf-8"))
    with pytest.raises(ValueError, match="gives no reason"):
        allowed_skips("no GPU\n")


def test_tests_of_one_kind_run_in_one_process_and_the_others_beside_them(tmp_path: Path) -> None:
    text = "import os, pathlib\n"
    for name in "abc":
        text += f"def test_{name}():\n    path = pathlib.Path(__file__ + '.{name}')\n"
        text += "    path.write_text(os.environ['PYTEST_XDIST_WORKER'])\n"
    files = ["tests/integration/test_one.py", "tests/e2e/test_two.py", "tests/unit/test_other.py"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "policy", "-p", "no:cacheprovider"]
    command += ["-n", "2", "--dist", "loadgroup", f"--rootdir={tmp_path}", "."]
    env = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True)
    workers = [
        {path.read_text() for path in (tmp_path / file).parent.glob("*.py.?")} for file in files
    ]
    assert len(workers[0]) == 1
    assert workers[0] == workers[1] != workers[2]


def test_the_slow_tests_that_are_sorted_by_kind_exist() -> None:
    top = Path(__file__).parents[3]
    sorted_ones = [*ALONE, *PLATFORMS, *(file for files in TURNS for file in files)]
    assert [file for file in sorted_ones if not (top / file).is_file()] == []


def test_the_rules_hold_without_xdist(tmp_path: Path) -> None:
    text = "def test_it(): pass\n"
    assert run(tmp_path, text, "-p", "no:xdist").returncode == 0
