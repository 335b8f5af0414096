"""The runner of `make gpu`: time limits, results step by step, the table."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[3] / "benchmarks/gpu.py"
MACHINE = {
    "gpu": None, "torch": "2.11", "triton": "3.6", "python": "3.12", "cores": 2, "commit": "abc",
    "time": "now",
}  # fmt: skip
REPORT = """
from pathlib import Path
print('{"rows": [{"name": "speed", "value": 5.0}], "ratios": {"vs": 2.0}}')
print("later text")
"""


@pytest.fixture(scope="module")
def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_runner", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runner(loaded: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the runner in a folder of its own, without steps and on a machine without a GPU."""
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(loaded, "TOP", tmp_path)
    monkeypatch.setattr(loaded, "DATA", tmp_path / "out")
    monkeypatch.setattr(loaded, "STEPS", ())
    monkeypatch.setattr(loaded, "about_the_machine", lambda: dict(MACHINE))
    return loaded


def add(runner: Any, name: str, script: str, seconds: float = 20, *goals: Any) -> None:
    """Add a step that runs a script, with the folder of the results as its only argument."""
    (runner.TOP / f"benchmarks/{name}.py").write_text(script)
    runner.STEPS += (runner.Step(name, f"{name}.py", seconds, "{data}", "{data}", goals),)


def run(runner: Any, *options: str) -> int:
    return int(runner.main(["--quick", "--out", str(runner.TOP / "out"), *options]))


def result(runner: Any, name: str) -> dict[str, Any]:
    (file,) = (runner.TOP / "out").glob(f"*-{name}.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int) -> bool:
    """Wait at most 5 s until a process has ended."""
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def shell(runner: Any, script: str, limit: float, files: Path) -> Any:
    return runner.run_step("a", ["sh", "-c", script], limit, files, dict(os.environ))


def test_at_its_limit_a_step_ends_with_all_its_children(runner: Any, tmp_path: Path) -> None:
    done = shell(runner, "sleep 20 & echo $!; wait", 0.3, tmp_path / "01-a")
    assert done.result == "over its limit of 0 s"
    assert done.seconds < 5
    assert gone(int((tmp_path / "01-a.log").read_text()))


def test_a_child_that_a_step_leaves_holds_up_nothing(runner: Any, tmp_path: Path) -> None:
    done = shell(runner, "sleep 20 & echo $!", 30, tmp_path / "01-a")
    assert done.result == "passed"
    assert done.seconds < 5
    assert gone(int((tmp_path / "01-a.log").read_text()))


def test_a_step_that_closes_its_output_still_has_its_limit(runner: Any, tmp_path: Path) -> None:
    done = shell(runner, "exec >&- 2>&-; sleep 20", 0.3, tmp_path / "01-a")
    assert done.result == "over its limit of 0 s"


def test_each_step_finds_the_results_of_those_before_it(
    runner: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    add(runner, "one", REPORT)
    add(runner, "two", "import os, sys; print(sorted(os.listdir(sys.argv[1])))")
    assert run(runner) == 0
    shown = capfd.readouterr().out
    assert "['01-one.json', '01-one.log', '02-two.log', 'machine.json', 'table.md']" in shown
    assert "later text" in shown
    assert result(runner, "one")["ratios"] == {"vs": 2.0}
    assert result(runner, "one")["rows"][0]["value"] == 5.0
    assert json.loads((runner.TOP / "out/machine.json").read_text()) == MACHINE


def test_after_a_failed_step_the_next_one_runs_and_the_status_is_1(runner: Any) -> None:
    add(runner, "one", "import sys; sys.exit('it broke')")
    add(runner, "two", "")
    add(runner, "three", "import sys; sys.exit(77)")
    assert run(runner) == 1
    found = [result(runner, name)["result"] for name in ("one", "two", "three")]
    assert found == ["failed with status 1", "passed", "skipped"]
    assert (runner.TOP / "out/01-one.log").read_text() == "it broke\n"
    assert "| one | failed with status 1 |" in (runner.TOP / "out/table.md").read_text()


def test_ctrl_c_ends_with_the_table_so_far(runner: Any, capfd: pytest.CaptureFixture[str]) -> None:
    add(runner, "one", REPORT)
    add(
        runner,
        "two",
        "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(20)",
    )
    add(runner, "three", "")
    assert run(runner) == 130
    shown = capfd.readouterr().out
    assert "| one | passed |" in shown
    assert "| two | stopped by Ctrl-C |" in shown
    assert "three" not in shown


@pytest.mark.parametrize(("gpu", "limit"), [("a GPU", 18), (None, 36)])
def test_the_limits_follow_the_minutes(
    runner: Any, monkeypatch: pytest.MonkeyPatch, gpu: str | None, limit: float
) -> None:
    monkeypatch.setattr(runner, "about_the_machine", lambda: {**MACHINE, "gpu": gpu})
    add(runner, "one", "", 9)
    assert run(runner, "--minutes", "18") == 0
    assert result(runner, "one")["limit_s"] == limit


@pytest.mark.parametrize(
    ("least", "most", "value", "expected"),
    [
        (2, None, 2.5, "vs 2.5 (goal ≥ 2: met)"),
        (2, None, 1.5, "vs 1.5 (goal ≥ 2: missed)"),
        (None, 45, 44.0, "vs 44 (goal ≤ 45: met)"),
        (None, 45, 50.0, "vs 50 (goal ≤ 45: missed)"),
        (None, None, 3.0, "vs 3"),
        (2, None, None, "vs: not measured"),
    ],
)
def test_the_table_compares_figures_with_goals(
    runner: Any, least: float | None, most: float | None, value: float | None, expected: str
) -> None:
    runner.STEPS = (runner.Step("one", "one.py", 1, "", "", (runner.Goal("vs", least, most),)),)
    ratios = {} if value is None else {"vs": value}
    found = runner.Result("one", "passed", 3.2, 9, [], [], ratios)
    text = runner.table([found], MACHINE, compare=True)
    assert f"| one | passed | 3 | {expected} |" in text
    assert "goal ≥" not in runner.table([found], MACHINE, compare=False)


@pytest.mark.parametrize("only", [["--only", "two,one"], ["--only", "one", "--only", "two"]])
def test_only_takes_several_names_and_keeps_the_order(runner: Any, only: list[str]) -> None:
    for name in ("one", "two", "three"):
        add(runner, name, "")
    assert run(runner, *only) == 0
    names = sorted(file.name for file in (runner.TOP / "out").glob("*.log"))
    assert names == ["01-one.log", "02-two.log"]


def test_a_wrong_name_is_refused_in_one_sentence(
    runner: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    add(runner, "one", "")
    add(runner, "two", "")
    assert run(runner, "--only", "speed") == 2
    assert capsys.readouterr().err == (
        "benchmarks/gpu.py: --only names 'speed', which is not a step: give one of one, two.\n"
    )
    assert not (runner.TOP / "out").exists()


def test_without_a_gpu_only_quick_runs(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    add(runner, "one", "")
    assert runner.main(["--out", str(runner.TOP / "out")]) == 2
    assert "torch sees no GPU on this machine" in capsys.readouterr().err
    assert not (runner.TOP / "out").exists()


def test_the_shards_are_prepared_first_if_they_are_missing(runner: Any) -> None:
    add(runner, "one", "")
    (runner.TOP / "benchmarks/gpu_data.py").write_text("import sys; print(sys.argv[1:])")
    (only,) = runner.STEPS
    runner.STEPS = (runner.Step(**{**vars(only), "needs_data": True}),)
    assert run(runner, "--photos", "mine") == 0
    log = (runner.TOP / "out/01-data.log").read_text()
    assert log == f"{['--out', str(runner.DATA), '--photos', os.path.abspath('mine')]}\n"


def test_a_pack_for_another_python_is_refused(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pack.json"
    file.write_text(json.dumps({"python": "3.2", "commit": "abc"}))
    monkeypatch.setattr(loaded, "PACK", file)
    assert "this folder was made for Python 3.2" in loaded.about_the_machine()


def test_all_limits_together_are_nine_minutes(loaded: Any) -> None:
    assert sum(step.seconds for step in loaded.STEPS) == 60 * loaded.MINUTES == 540


def test_every_step_has_a_script_and_options_that_it_takes(loaded: Any) -> None:
    for step in loaded.STEPS:
        text = (FILE.parent / step.script).read_text("utf-8")
        shared = (FILE.parent / "step.py").read_text("utf-8") if "from step" in text else ""
        options = [word for word in f"{step.full} {step.quick}".split() if word.startswith("--")]
        assert [each for each in options if f'"{each}"' not in text + shared] == [], step.name
