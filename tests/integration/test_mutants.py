"""A sample of the mutants dies; another commit gives another sample."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]
REPOSITORY = Path(__file__).parents[2]


def test_a_sample_of_the_mutants_dies() -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
    command = [sys.executable, "tests/mutants/run.py", "--sample", "8", "--seed", commit]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
