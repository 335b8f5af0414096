"""The rank, its device, and how ranks exchange small values."""

from __future__ import annotations

import os
import socket
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Session(Protocol):
    """The surroundings of one rank. Every rank makes the same calls in the same order."""

    rank: int
    world: int  # number of ranks
    local_world: int  # number of ranks on this machine
    device: torch.device
    node: str  # the launcher's name for this machine
    attempt: str  # names the start of training that this rank belongs to

    def notice(self) -> bool:
        """Return whether a rank's machine will soon be taken away, if that is new.

        The answer is the same on every rank.
        """


def share_from_first(value: T, session: Session) -> T:
    """Return rank 0's value on every rank."""
    if session.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=session.device)
    return values[0]


def gather(value: T, session: Session) -> list[T]:
    """Return the values of all ranks, in the order of ranks."""
    if session.world == 1:
        return [value]
    values: list[Any] = [None] * session.world
    dist.all_gather_object(values, value)
    return values


def describe_process(session: Session) -> dict[str, Any]:
    """Return rank, node, host and process id of this rank."""
    process = {"host": socket.gethostname(), "pid": os.getpid()}
    return {"rank": session.rank, "node": session.node, **process}
