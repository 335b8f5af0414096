"""Watch how many units a progress counts as finished by an earlier run."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.core.progress import Progress


def record_resumed(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the resumed units of each title; the dictionary is filled while stages run."""
    found: dict[str, int] = {}
    real = Progress.update

    def update(self: Progress, count: int, *note: str, **more: Any) -> None:
        found[self.title] = found.get(self.title, 0) + more.get("resumed", 0)
        real(self, count, *note, **more)

    monkeypatch.setattr(Progress, "update", update)
    return found
