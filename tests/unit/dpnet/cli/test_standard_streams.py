"""The command with standard streams that are closed, full, or not UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpnet.cli.parser import build_parser

RUN = f"{sys.executable} -m dpnet"


def shell(line: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which DPNET is the command."""
    env = {**os.environ, **environ, "DPNET": RUN}
    return subprocess.run(line, shell=True, env=env, capture_output=True, timeout=120)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize("words", ["verify --help", "train demo --set train.x=\u2026"])
def test_every_text_is_printed_in_every_encoding(encoding: str, words: str) -> None:
    done = shell(f"$DPNET {words}", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert b"Traceback" not in done.stdout + done.stderr
    assert done.returncode == (0 if words.endswith("--help") else 2)
    if words == "verify --help":
        assert b"models:/\\u2026" in done.stdout
    (done.stdout + done.stderr).decode(encoding)


@pytest.mark.parametrize(
    ("words", "closed"),
    [
        ("masks build $CONFIG", "2>&-"),
        ("masks build $CONFIG", "<&- >&- 2>&-"),
        ("verify nosuch", "2>&-"),
        ("verify nosuch", ">&- 2>&-"),
        ("nosuch", "2>&-"),
        ("--help", ">&-"),
    ],
)
def test_closed_streams_change_nothing_but_the_text(
    words: str, closed: str, tmp_path: Path
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        f"name: small\nroot: {tmp_path / 'root'}\nimages: {{source: x, size: 32}}\n"
        "masks: {size: 32, train: 4, eval_per_bin: 1}\n"
    )
    done = shell(f"$DPNET {words} {closed}", CONFIG=str(config))
    status = {"verify nosuch": 2, "nosuch": 2}.get(words, 0)
    assert (done.returncode, b"Traceback" in done.stdout) == (status, False)
    if words.startswith("masks"):
        again = shell("$DPNET verify $ROOT --json", ROOT=str(tmp_path / "root"))
        assert json.loads(again.stdout)["ok"]


def test_an_event_from_a_closed_input_is_no_notification() -> None:
    done = shell("$DPNET notify demo --event - <&-")
    assert b"the event is not an S3 notification" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_does_not_fit_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "photos.txt").write_text("1.png\n")
    event = tmp_path / "event.json"
    event.write_text('{"Event": "s3:TestEvent"}')
    sets = f"--set images.source={tmp_path}/photos.txt"
    done = shell(f"$DPNET notify demo {sets} --event {event} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.decode().strip().splitlines() == [
        "dpnet: the result cannot be written to standard output: No space left on device. Send it"
        " elsewhere. The work itself is done."
    ]


@pytest.mark.parametrize("words", ["--version", "--help"])
@pytest.mark.parametrize("lost", ["> /dev/full", "| true"])
def test_help_that_nobody_reads_is_no_error(words: str, lost: str) -> None:
    assert shell(f"$DPNET {words} {lost}").stderr == b""


@pytest.mark.parametrize("lost", ["2> /dev/full", "2>&1 > /dev/full | true"])
def test_a_failure_that_nobody_reads_keeps_its_exit_status(lost: str) -> None:
    done = shell(f"bash -c '$DPNET verify nosuch {lost}; exit ${{PIPESTATUS[0]}}'")
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_the_help_has_letters_outside_of_ascii() -> None:
    verify = build_parser()._subparsers._group_actions[0].choices["verify"]  # type: ignore[union-attr,index,call-overload]
    assert not verify.format_help().isascii()
