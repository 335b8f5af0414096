"""stub"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.forms import Evaluate, Images, Launch, Train


@flow(name="watch-raw-data")
def watch_raw_data(
    config: str = "demo",
    root: str = "",
    images: Images = Images(),
    min_new: int = 1,
    quiet_minutes: float = 0,
    overrides: list[str] = [],
) -> None:
    """x"""


@flow(name="retrain")
def retrain(
    config: str = "demo",
    root: str = "",
    images: Images = Images(),
    train: Train = Train(),
    launch: Launch = Launch(),
    evaluate: Evaluate = Evaluate(),
    overrides: list[str] = [],
    event: dict[str, Any] | None = None,
) -> None:
    """x"""
