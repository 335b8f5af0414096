"""Every place that checks a change runs the same checks: make, .ci/run, GitHub, pre-commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[3]
MAKEFILE = (REPOSITORY / "Makefile").read_text("utf-8")


def loaded(name: str) -> Any:
    return yaml.safe_load((REPOSITORY / name).read_text("utf-8"))


def commands_of(target: str) -> list[str]:
    """The commands of a Makefile's target, without the folder of the program."""
    block = re.search(rf"^{target}:.*\n((?:\t.*\n?)+)", MAKEFILE, re.MULTILINE)
    assert block is not None
    return [line.strip().lstrip("@").removeprefix("$(BIN)/") for line in block[1].splitlines()]


def test_ci_runs_lint_the_fast_tests_and_the_slow_tests() -> None:
    lines = (REPOSITORY / ".ci/run").read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("make")] == [
        "make lint",
        "make test",
        "make test-all",
    ]


def test_github_runs_what_ci_runs_with_skips_as_failures() -> None:
    (job,) = loaded(".github/workflows/ci.yml")["jobs"].values()
    (step,) = [step for step in job["steps"] if "run" in step]
    assert step["run"].endswith("bash .ci/run")
    assert step["env"] == {"CI": "true"}


def test_pre_commit_runs_every_check_of_make_lint() -> None:
    (local,) = loaded(".pre-commit-config.yaml")["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/") for hook in local["hooks"]}
    lint = {command.split()[0] for command in commands_of("lint")}
    assert {entry.split()[0] for entry in hooks} == lint
    assert lint == {"ruff", "mypy", "lint-imports", "deptry"}


def test_every_test_belongs_to_one_of_the_two_test_commands() -> None:
    fast, slow = (re.search(r'-m "(.*?)"', " ".join(commands_of(t))) for t in ("test", "test-all"))
    assert fast is not None
    assert slow is not None
    assert fast[1] == "not slow and not e2e and not gpu"
    assert slow[1] == "slow or e2e"
