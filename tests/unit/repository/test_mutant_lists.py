"""The lists of mutants: each one fits the code, and names tests that exist."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "run_mutants", REPOSITORY / "tests/mutants/run.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def test_every_snippet_is_in_its_file_exactly_once(runner: ModuleType) -> None:
    mutants = runner.read_mutants()
    assert len(mutants) >= 80
    assert runner.problems(mutants) == []


def test_every_named_test_exists(runner: ModuleType) -> None:
    for mutant in runner.read_mutants():
        for test in mutant.tests:
            file, _, name = test.partition("::")
            text = (REPOSITORY / file).read_text("utf-8")
            assert not name or f"def {name.partition('[')[0]}(" in text, (mutant.name, test)


def test_a_mutated_file_is_still_python(runner: ModuleType) -> None:
    for mutant in runner.read_mutants():
        if not mutant.file.endswith(".py"):
            continue
        sound = (REPOSITORY / mutant.file).read_text("utf-8")
        compile(sound.replace(mutant.old, mutant.new), mutant.file, "exec")


def test_a_list_that_does_not_fit_the_code_is_reported(runner: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x = 1\ny = 1\n")
    (tmp_path / "test_code.py").write_text("")
    fits = runner.Mutant("a", "x is 1.", "code.py", "x = 1", "x = 2", ("test_code.py",), "list")

    def told(**changes: object) -> list[str]:
        return list(runner.problems([replace(fits, **changes)], tmp_path))

    assert told() == []
    assert "has the snippet 2 times" in told(old="= 1")[0]
    assert "has the snippet 0 times" in told(old="z = 1")[0]
    assert "no_such.py does not exist" in told(file="no_such.py")[0]
    assert "test_no_such.py::test_x does not exist" in told(tests=("test_no_such.py::test_x",))[0]
    assert "changes nothing" in told(new="x = 1")[0]
    assert len(runner.problems([fits, fits], tmp_path)) == 2


def test_a_sample_depends_on_its_seed_only(runner: ModuleType) -> None:
    mutants = runner.read_mutants()
    first, again, other = (runner.chosen(mutants, "", 20, seed) for seed in ("a", "a", "b"))
    assert len(first) == 20
    assert first == again != other
    assert {m.group for m in runner.chosen(mutants, "storage", None, "")} >= {"storage"}
