"""The process group of Ray Train's workers: on loopback where Ray is on loopback.

torch keeps the addresses of the ranks in a store. That store listens on all interfaces and has no
password, whatever the address is under which the ranks reach it (seen with torch 2.15).
"""

from __future__ import annotations

import importlib
import socket
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class ProcessGroup(TorchConfig):  # type: ignore[misc]
    """Ray's configuration of the process group, with our store."""

    @property
    def backend_cls(self) -> type[Any]:
        """Return the class that sets the process group up."""
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Set the process group up in all workers."""
        worker_group.execute(keep_store_on_loopback)
        super().on_start(worker_group, backend_config)


def keep_store_on_loopback() -> None:
    """Make torch's store of this process listen on loopback, if its address is on loopback."""
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    on_all_interfaces = rendezvous._create_c10d_store

    def create_store(
        host: str, port: int, rank: int, world: int, timeout: timedelta, use_libuv: bool = True
    ) -> Any:
        if rank != 0 or not ip_address(host).is_loopback:
            return on_all_interfaces(host, port, rank, world, timeout, use_libuv)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=world)
        return rendezvous.TCPStore(
            host,
            port,
            world,
            True,
            timeout,
            multi_tenant=True,
            master_listen_fd=listener.detach(),  # the store closes it
            use_libuv=use_libuv,
        )

    rendezvous._create_c10d_store = create_store
