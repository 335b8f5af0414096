"""Shared parts of the benchmarks: contenders in turns, medians with their spread, the table.

Each figure is a ratio of contenders measured in one run, because machines differ and are noisy.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """Several measurements of one thing."""

    name: str
    values: Sequence[float]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Return the range from lowest to highest, as a share of the median."""
        return (max(self.values) - min(self.values)) / abs(self.median) if self.median else 0.0


def take_turns(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """Measure all contenders in turn, `repeats` times. Return the measurements of each."""
    measured: dict[str, list[Any]] = {name: [] for name in contenders}
    for number in range(repeats):
        for name, measure in contenders.items():
            print(f"repeat {number + 1} of {repeats}: {name}", file=sys.stderr, flush=True)
            measured[name].append(measure())
    return measured


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios within each repeat, so that drift cancels out."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def in_a_process(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> Any:
    """Run a process and return the JSON in its last line.

    Raises SystemExit if it fails, or is not done after `limit` seconds and therefore killed.
    """
    name = " ".join(command)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=limit
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"{name} was not done after {limit:.0f} s.")
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().rsplit("\n", 1)[-1])


def report(title: str, rows: Sequence[Row], ratios: Mapping[str, float], *, as_json: bool) -> None:
    """Print the table, and with `as_json` one JSON line after it."""
    cores = len(os.sched_getaffinity(0))
    print(f"{title}\n{platform.machine()}, {cores} cores, Python {platform.python_version()}\n")
    width = max(len(name) for name in [*(row.name for row in rows), *ratios])
    for row in rows:
        spread = f"±{50 * row.spread:.0f} %" if len(row.values) > 1 else ""
        print(f"{row.name:<{width}}  {row.median:>12,.2f} {row.unit:<9} {spread}")
    for name, value in ratios.items():
        print(f"{name:<{width}}  {value:>12,.2f}")
    if as_json:
        listed = [
            {"name": r.name, "value": r.median, "unit": r.unit, "spread": r.spread} for r in rows
        ]
        print(json.dumps({"rows": listed, "ratios": dict(ratios)}))
