"""The rules that `tests/support/policy.py` puts on every test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from policy import SKIPS, allowed_skips

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
        [*command, str(folder)], env=env, cwd=folder, capture_output=True, text=True
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


def test_every_line_of_the_list_gives_its_reason() -> None:
    assert allowed_skips(SKIPS.read_text("utf-8"))
    with pytest.raises(ValueError, match="gives no reason"):
        allowed_skips("no GPU\n")
