"""Schedules as cron: their check, and the next dates, computed as Prefect's server does."""

from __future__ import annotations

import asyncio
from datetime import datetime

SHOWN = 3  # dates


def check_cron(cron: str) -> None:
    """Check that a schedule has five fields and a next date.

    Prefect also accepts a sixth field for seconds, which makes a run of every second, and dates
    that never come.

    Raises:
        ValueError: it does not. The message says what is allowed.
    """
    if len(cron.split()) != 5:
        raise ValueError(
            "a cron expression of exactly five fields (minute, hour, day, month, weekday), such as"
            " */15 * * * *, or null for never"
        )
    try:
        next_dates(cron, "UTC", 1)
    except ValueError as error:
        if "failed to find next date" in str(error):
            raise ValueError(
                "a cron expression with a date that comes, or null for never"
            ) from None
        raise ValueError("a cron expression such as */15 * * * *") from None


def next_dates(cron: str, timezone: str, number: int = SHOWN) -> list[datetime]:
    """Return the next dates of a schedule. Raise ValueError if it is not cron or has none.

    Args:
        cron: the schedule.
        timezone: name of its time zone.
        number: how many dates.
    """
    from prefect.server.schemas.schedules import CronSchedule

    schedule = CronSchedule(cron=cron, timezone=timezone)
    return list(asyncio.run(schedule.get_dates(number)))


def dates_text(dates: list[datetime]) -> str:
    """Return dates as text: "2026-01-31 03:00, 2026-02-01 03:00"."""
    return ", ".join(f"{each:%Y-%m-%d %H:%M}" for each in dates)
