"""The process group of Ray Train's workers: in the network in which Ray is, loopback or not.

torch keeps the addresses of the ranks in a store. That store listens on all interfaces and has no
password, whatever the address is under which the ranks reach it (seen with torch 2.15).
"""

from __future__ import annotations

import fcntl
import importlib
import os
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


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
        worker_group.execute(use_network_of_ray)
        super().on_start(worker_group, backend_config)


def use_network_of_ray() -> None:
    """Let this process listen for the other ranks where Ray reaches this machine.

    gloo takes the network that the machine's name stands for. On many machines the name stands for
    127.0.1.1, where no other machine reaches it. A user's GLOO_SOCKET_IFNAME stays.
    """
    import ray

    if interface := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """Return the name of this machine's network interface with an IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


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
