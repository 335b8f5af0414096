"""The process group of the workers: in the network in which Ray is, loopback or not."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
from clusters import free_port
from ray.train.torch.config import _TorchBackend

from dpnet.training.ray import process_group
from dpnet.training.ray.process_group import (
    ProcessGroup,
    interface_of,
    keep_store_on_loopback,
    use_network_of_ray,
)

RANK = """
import importlib, os, torch
import torch.distributed as dist
from sockets import listening
from dpnet.training.ray.process_group import keep_store_on_loopback

keep_store_on_loopback()
dist.init_process_group("gloo", init_method="env://")
total = torch.ones(1)
dist.all_reduce(total)
print(int(total), *listening([os.getpid()]))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_meet_at_a_store_that_only_this_machine_can_reach() -> None:
    port = str(free_port())
    support = os.path.dirname(importlib.import_module("clusters").__file__ or "")
    path = os.pathsep.join([support, *filter(None, sys.path)])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    common |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [answer[0] for answer in answers] == ["2", "2"]
    assert f"127.0.0.1:{port}" in answers[0]
    assert {each.rpartition(":")[0] for answer in answers for each in answer[1:]} == {"127.0.0.1"}


@pytest.mark.parametrize(("host", "rank"), [("10.0.0.1", 0), ("127.0.0.1", 1)])
def test_torch_makes_the_store_of_a_cluster_and_the_clients(
    host: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    monkeypatch.setattr(rendezvous, "_create_c10d_store", lambda *given: calls.append(given))
    keep_store_on_loopback()
    rendezvous._create_c10d_store(host, 29500, rank, 2, timedelta(seconds=1), True)
    assert calls == [(host, 29500, rank, 2, timedelta(seconds=1), True)]


def test_every_worker_gets_the_store_before_the_process_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    class Workers:
        def execute(self, function: Any) -> None:
            calls.append(function)

    monkeypatch.setattr(_TorchBackend, "on_start", lambda *_: calls.append("process group"))
    config = ProcessGroup()
    config.backend_cls().on_start(Workers(), config)
    own = [process_group.keep_store_on_loopback, process_group.use_network_of_ray]
    assert calls == [*own, "process group"]


@pytest.mark.parametrize(("user", "used"), [(None, "lo"), ("eth7", "eth7")])
def test_a_rank_listens_where_ray_reaches_its_machine_unless_the_user_says_otherwise(
    user: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": user} if user else {})
    use_network_of_ray()
    assert os.environ["GLOO_SOCKET_IFNAME"] == used


def test_an_address_of_another_machine_has_no_interface() -> None:
    assert interface_of("192.0.2.1") is None
