"""Start Ray on this machine: its private folder, token, environment and arguments.

Every Ray that starts here listens on loopback only, and refuses a request without its token. The
token is made for the start, in a folder that other users cannot open. This module is cheap to
import: it imports Ray only when Ray starts.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.core.environment import THREADS
from data_prep.core.scratch import scratch_folder

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **THREADS,
}
_LOOPBACK = {
    # Ray takes this machine for one without a network, so that each of its ports is on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # The ports of the workers' process group: else on the network that the host's name is in.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
# The user's settings for another cluster.
_FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")


@dataclass(frozen=True)
class RayStart:
    """A way to start Ray on this machine: in this process, or as a process of its own.

    Attributes:
        folder: A private folder with the token and everything that Ray writes.
    """

    folder: Path

    @property
    def files(self) -> Path:
        """Return Ray's own folder. Ray opens it to all users, so the private one is around it."""
        return self.folder / "ray"

    @property
    def token_file(self) -> Path:
        """Return the file of the token that this Ray asks for."""
        return self.folder / "token"

    @property
    def credentials(self) -> dict[str, str]:
        """Return the variables with which a process may use this Ray."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def environ(self, user: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of this Ray: the user's without other clusters' settings."""
        own = {name: value for name, value in user.items() if name not in _FOREIGN}
        if os.path.expanduser("~") == "~":  # Ray Train does not load for a user without a home
            own["HOME"] = str(self.folder)
        return {**DEFAULTS, **own, **_LOOPBACK, **self.credentials}

    @contextmanager
    def in_this_process(self) -> Iterator[None]:
        """Give this process the environment of this Ray, and the user's again at the end."""
        names = (*_FOREIGN, *_LOOPBACK, *self.credentials, "HOME")
        before = {name: os.environ[name] for name in names if name in os.environ}
        _replace(names, self.environ(os.environ))
        try:
            yield
        finally:
            _replace(names, before)

    def init_options(self, cpus: int, gpus: int | None = None) -> dict[str, Any]:
        """Return the arguments of `ray.init`. With `gpus` None, Ray counts the GPUs itself."""
        return {
            "address": "local",
            "num_cpus": cpus,
            "num_gpus": gpus,
            "include_dashboard": False,
            "object_store_memory": 128 << 20,  # nothing large passes through it
            "_temp_dir": str(self.files),
        }

    def head_command(self, port: int, agent_port: int) -> list[str]:
        """Return the command that runs the head of a cluster of this machine.

        Args:
            port: Port of the dashboard, which takes jobs.
            agent_port: Port of the dashboard's agent.
        """
        command = [sys.executable, "-m", "dpnet.training.ray.head", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", "--port=0", f"--temp-dir={self.files}"]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent_port}"]
        return command


@contextmanager
def prepare_start(purpose: str = "") -> Iterator[RayStart]:
    """Prepare a start of Ray on this machine. At the end, remove its folder.

    Args:
        purpose: Part of the folder's name, such as "up-".
    """
    with scratch_folder(f"ray-{purpose}") as folder:
        start = RayStart(folder)
        start.token_file.touch(0o600)
        start.token_file.write_text(secrets.token_hex(32))
        yield start


def _replace(names: tuple[str, ...], values: Mapping[str, str]) -> None:
    """Replace variables of the environment, and make a loaded Ray read them again."""
    for name in names:
        os.environ.pop(name, None)
        if name in values:
            os.environ[name] = values[name]
    if "ray._raylet" in sys.modules:
        from ray import _raylet
        from ray._private import ray_constants

        library: Any = _raylet  # compiled, without types
        library.Config.initialize("")  # before the token is forgotten: a thread may ask for it
        library.AuthenticationTokenLoader.instance().reset_cache()
        ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(next(iter(_LOOPBACK))) != "0"


def forbid_other_starts() -> None:
    """Forbid Ray to start by itself in this process.

    After a shutdown, any call of Ray would start another one: without a token, on all interfaces.
    """
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False


def connect(**options: Any) -> None:
    """Call `ray.init` without Ray's own output, and keep this process's signal handlers."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray

    forbid_other_starts()
    logging.getLogger("ray").setLevel(logging.ERROR)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        for each, handler in handlers.items():  # Ray's own handler of SIGTERM aborts the process
            signal.signal(each, handler)
