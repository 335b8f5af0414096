"""A real Kubernetes API server for tests, and a proxy before it that injects faults."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from clusters import alive, free_port, wait_until

from dpnet.training.ray.kube_client import role

_SHARED_SCRIPT = Path(__file__).parents[3] / "shared/tools/k8s/k8s.sh"
# install; start DIR, stop DIR. The variables PE, PA and PC are its ports, FRONT more flags.
K8S_SCRIPT = Path(os.environ.get("DPNET_K8S_SCRIPT") or _SHARED_SCRIPT)
ACCOUNT = "flows"  # the service account that launches
_AUDIT = """
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
"""


@dataclass
class KubeServer:
    """An API server with KubeRay's kinds. It has no nodes, so nothing runs the pods."""

    folder: Path
    url: str

    def client(self) -> Any:
        """Return a client of an administrator."""
        from kubernetes import config

        return config.new_client_from_config(str(self.folder / "admin.kubeconfig"))

    def make_namespace(self) -> Namespace:
        """Make a namespace with a service account that has exactly the launcher's rights."""
        from kubernetes import client

        api = self.client()
        core, rbac = client.CoreV1Api(api), client.RbacAuthorizationV1Api(api)
        name = f"t-{secrets.token_hex(4)}"
        core.create_namespace({"metadata": {"name": name}})
        for account in (ACCOUNT, "default"):
            core.create_namespaced_service_account(name, {"metadata": {"name": account}})
        rbac.create_namespaced_role(name, role(name))
        rbac.create_namespaced_role_binding(
            name,
            {
                "metadata": {"name": ACCOUNT},
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "Role",
                    "name": role(name)["metadata"]["name"],
                },
                "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": name}],
            },
        )
        return Namespace(self, name, api)

    def restart(self) -> None:
        """Kill the API server and start it again."""
        file = self.folder / "apiserver.pid"
        pid = int(file.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid), "it does not end")
        with (self.folder / "apiserver.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        file.write_text(f"{process.pid}\n")

    def used(self, namespace: str) -> set[tuple[str, str, str]]:
        """Return group, resource and verb of each request that the launcher made."""
        user = f"system:serviceaccount:{namespace}:{ACCOUNT}"
        found = set()
        for line in (self.folder / "audit.log").read_text().splitlines():
            event = json.loads(line)
            about = event.get("objectRef") or {}
            if event["user"]["username"] == user:
                kind = about.get("resource", "") + (
                    f"/{about['subresource']}" if about.get("subresource") else ""
                )
                found.add((about.get("apiGroup", ""), kind, event["verb"]))
        return found


@dataclass
class Namespace:
    """A namespace of a test, and its objects, seen by an administrator."""

    server: KubeServer
    name: str
    api: Any

    @property
    def core(self) -> Any:
        from kubernetes import client

        return client.CoreV1Api(self.api)

    @property
    def custom(self) -> Any:
        from kubernetes import client

        return client.CustomObjectsApi(self.api)

    def kinds(self, plural: str = "rayjobs") -> tuple[str, str, str, str]:
        return "ray.io", "v1", self.name, plural

    def objects(self, plural: str = "rayjobs") -> dict[str, dict[str, Any]]:
        """Return the objects of a kind of KubeRay's, by name."""
        found = self.custom.list_namespaced_custom_object(*self.kinds(plural))["items"]
        return {each["metadata"]["name"]: each for each in found}

    def token(self, bound_to: str | None = None) -> str:
        """Return a new token of the service account. It ends with the Secret it is bound to."""
        spec: dict[str, Any] = {"audiences": ["https://kubernetes.default.svc"]}
        if bound_to:
            made = self.core.create_namespaced_secret(self.name, {"metadata": {"name": bound_to}})
            uid = made.metadata.uid
            spec["boundObjectRef"] = {
                "kind": "Secret",
                "apiVersion": "v1",
                "name": bound_to,
                "uid": uid,
            }
        made = self.core.create_namespaced_service_account_token(ACCOUNT, self.name, {"spec": spec})
        return str(made.status.token)

    def kubeconfig(self, file: Path, url: str = "", **user: Any) -> Path:
        """Write a kubeconfig of the service account.

        Args:
            file: Where to write it.
            url: Address of a proxy; "": the server itself.
            user: Credentials instead of a new token.
        """
        text = yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "clusters": [
                    {
                        "name": "c",
                        "cluster": {
                            "server": url or self.server.url,
                            "certificate-authority": str(self.server.folder / "pki/ca.crt"),
                        },
                    }
                ],
                "users": [{"name": ACCOUNT, "user": user or {"token": self.token()}}],
                "contexts": [
                    {
                        "name": "here",
                        "context": {"cluster": "c", "user": ACCOUNT, "namespace": self.name},
                    }
                ],
            }
        )
        file.write_text(text)
        return file

    def event(
        self, about: str, reason: str, message: str, kind: str = "RayCluster", ahead: float = 0.0
    ) -> None:
        """Write a warning about an object, as a controller whose clock is ahead does."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + ahead))
        self.core.create_namespaced_event(
            self.name,
            {
                "metadata": {"name": f"e-{secrets.token_hex(4)}"},
                "involvedObject": {"kind": kind, "name": about, "namespace": self.name},
                "type": "Warning",
                "reason": reason,
                "message": message,
                "firstTimestamp": now,
                "lastTimestamp": now,
            },
        )

    def pod(self, cluster: str, name: str, status: dict[str, Any]) -> None:
        """Make a pod of a Ray cluster with a status, as the operator and a kubelet would."""
        spec = {"containers": [{"name": "ray", "image": "nowhere/dpnet:1"}]}
        labels = {"ray.io/cluster": cluster}
        self.core.create_namespaced_pod(
            self.name,
            {
                "metadata": {"name": name, "labels": labels},
                "spec": {**spec, "automountServiceAccountToken": False},
            },
        )
        self.core.patch_namespaced_pod_status(name, self.name, {"status": status})


@contextmanager
def kube_server() -> Iterator[KubeServer]:
    """Start an API server, in about 15 s. Skip the test if there is no script for it."""
    if not K8S_SCRIPT.exists():
        pytest.skip(f"no Kubernetes server script at {K8S_SCRIPT}: name one in DPNET_K8S_SCRIPT")
    command = ["bash", str(K8S_SCRIPT), "install"]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"the Kubernetes server cannot be installed: {installed.stderr[-200:]}")
    folder = Path(tempfile.mkdtemp(prefix="kube", dir="/tmp"))
    (folder / "audit.yaml").write_text(_AUDIT)
    # The servers are not children of this process. The keeper stops them when this process ends,
    # even if it is killed.
    stop = f"read -r _; kill -9 $(cat {folder}/*.pid); rm -rf {folder}"
    keeper = subprocess.Popen(["bash", "-c", stop], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield _start(folder)
    finally:
        assert keeper.stdin
        keeper.stdin.close()
        keeper.wait(timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path) -> KubeServer:
    ports = {"PE": _two_free_ports(), "PA": free_port(), "PC": free_port()}
    audit = f"--audit-policy-file={folder}/audit.yaml --audit-log-path={folder}/audit.log"
    with (folder / "out").open("w+b") as out:  # no pipe: the servers would keep it open
        started = subprocess.run(
            ["bash", str(K8S_SCRIPT), "start", str(folder)],
            env={
                **os.environ,
                **{name: str(port) for name, port in ports.items()},
                "FRONT": f"{audit} --audit-log-mode=blocking",
            },
            stdout=out,
            stderr=out,
            timeout=180,
            check=False,
        )
        out.seek(0)
        assert started.returncode == 0, out.read().decode(errors="replace")
    return KubeServer(folder, f"https://127.0.0.1:{ports['PA']}")


def _two_free_ports() -> int:
    """Return a free port that is followed by a free port."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


@dataclass
class Busy:
    """The answer of an API server that has too much to do, for the next `times` requests."""

    times: int
    method: str = ""
    wait: int = 1


@dataclass
class KubeProxy:
    """A proxy before an API server.

    Attributes:
        away: Whether it refuses all connections and breaks those that exist.
        busy: Requests that get the status 429, with text and Retry-After as the server's own.
        ahead: Seconds by which its clock is ahead of this machine's.
        old: Number of watches that begin at a version which the server has forgotten.
        requests: Methods and paths so far, with the time.
    """

    url: str = ""
    away: bool = False
    busy: Busy | None = None
    ahead: float = 0.0
    old: int = 0
    requests: list[tuple[float, str, str]] = field(default_factory=list)
    open: set[Any] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Be away inside the block."""
        self.away = True
        self.cut()
        try:
            yield
        finally:
            self.away = False

    def cut(self) -> None:
        """Break all connections, as a load balancer does that restarts."""
        with self.lock:
            for connection in self.open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def count(self, method: str, text: str = "") -> int:
        with self.lock:
            return sum(m == method and text in path for _, m, path in self.requests)


# Headers that a proxy does not pass on. It writes a date of its own.
_OF_THE_HOP = ("transfer-encoding", "content-length", "connection", "date", "server")


@contextmanager
def kube_proxy(server: KubeServer, key: Path | None = None) -> Iterator[KubeProxy]:
    """Run a proxy that passes requests to the server unless a fault was injected.

    Args:
        server: The API server.
        key: A file NAME.key with NAME.crt next to it; by default those of the server.
    """
    proxy = KubeProxy()
    address = urlsplit(server.url)
    pki = server.folder / "pki"
    trust = ssl.create_default_context(cafile=str(pki / "ca.crt"))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 300

        def setup(self) -> None:
            super().setup()
            with proxy.lock:
                proxy.open.add(self.connection)

        def finish(self) -> None:
            with proxy.lock:
                proxy.open.discard(self.connection)
            with suppress(OSError):
                super().finish()

        def act(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else None
            path = self.path
            with proxy.lock:
                proxy.requests.append((time.monotonic(), self.command, path))
            if proxy.away:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            busy = proxy.busy
            if busy and busy.times and busy.method in ("", self.command):
                busy.times -= 1
                text = b"Too many requests, please try again later.\n"
                self.send_response(429)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Retry-After", str(busy.wait))
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
                return
            if proxy.old and "watch=True" in path:
                proxy.old -= 1
                path = re.sub(r"resourceVersion=\d+", "resourceVersion=1", path)
            self.forward(path, body)

        do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = act

        def forward(self, path: str, body: bytes | None) -> None:
            upstream = http.client.HTTPSConnection(
                str(address.hostname), address.port, timeout=300, context=trust
            )
            headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
            try:
                upstream.request(self.command, path, body, headers)
                answer = upstream.getresponse()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in _OF_THE_HOP:
                        self.send_header(name, value)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while data := answer.read1(65536):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                self.close_connection = True
            finally:
                upstream.close()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(timestamp or time.time() + proxy.ahead)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def get_request(self) -> Any:
            # The handshake is made in the connection's own thread.
            connection, peer = super().get_request()
            wrapped = own.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            return wrapped, peer

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a broken connection is what a test asked for

    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key = key or pki / "apiserver.key"
    own.load_cert_chain(key.with_suffix(".crt"), key)
    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        proxy.url = f"https://127.0.0.1:{running.server_port}"
        yield proxy
        proxy.cut()
        running.shutdown()
