"""The credentials for Kubernetes, and the errors of an API server that is not there."""

from __future__ import annotations

import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client.exceptions import ApiException

from data_prep.core.errors import ConfigError
from dpnet.training.ray import kube_client
from dpnet.training.ray.kube_client import Kube, KubeError, fatal


def write(file: Path, user: dict[str, Any], server: str = "https://127.0.0.1:9") -> Path:
    text = yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": user}],
            "contexts": [
                {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "train"}},
                {"name": "there", "context": {"cluster": "c", "user": "u"}},
            ],
        }
    )
    file.write_text(text)
    return file


@pytest.fixture
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    return write(tmp_path / "config", {"token": "t"})


def test_the_namespace_is_that_of_the_context_unless_another_is_given(kubeconfig: Path) -> None:
    assert Kube(None, None).namespace == "train"
    assert Kube("there", None).namespace == "default"
    assert Kube("there", "own").namespace == "own"


def test_in_a_pod_the_service_account_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    for name, text in (("namespace", "train\n"), ("token", "t1"), ("ca.crt", "certificate")):
        (tmp_path / name).write_text(text)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setattr(kube_client, "_IN_POD", tmp_path)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    kube = Kube(None, None)
    assert kube.namespace == "train"
    assert kube._api.configuration.host == "https://10.0.0.1:443"


@pytest.mark.parametrize("program", ["no-such-program", "./no-such-program"])
def test_a_missing_program_of_the_kubeconfig_is_named(kubeconfig: Path, program: str) -> None:
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": program}
    write(kubeconfig, {"exec": {**plugin, "installHint": "get it there"}})
    with pytest.raises(ConfigError, match=r"from the program '\S*no-such-program', which is not"):
        Kube(None, None)
    with pytest.raises(ConfigError, match=r"install it \(get it there\)"):
        Kube(None, None)


def test_a_program_next_to_the_kubeconfig_is_found(kubeconfig: Path) -> None:
    program = kubeconfig.with_name("login")
    status = '{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",'
    program.write_text(f'#!/bin/sh\necho \'{status} "status": {{"token": "t"}}}}\'\n')
    program.chmod(0o755)
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "./login"}
    write(kubeconfig, {"exec": plugin})
    assert Kube(None, None)._api.configuration.api_key["BearerToken"] == "Bearer t"


@pytest.mark.parametrize(
    ("user", "why"),
    [
        ({"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "false"}}, True),
        ({}, False),
    ],
)
def test_a_user_without_credentials_is_not_anonymous(
    kubeconfig: Path, user: dict[str, Any], why: bool
) -> None:
    write(kubeconfig, user)
    with pytest.raises(ConfigError, match=r"there are no credentials of the user .*Log in") as told:
        Kube(None, None)
    assert ("the program 'false' failed" in str(told.value)) == why
    assert str(kubeconfig) in str(told.value)


def test_refused_credentials_and_a_missing_namespace_have_their_own_advice() -> None:
    refused = fatal(KubeError(401, "refused"), "cannot start")
    assert str(refused).endswith("or choose another context with launch.context.")
    missing = KubeError(404, "there is no namespace train", advice="make it.")
    assert isinstance(fatal(missing, "cannot start"), ConfigError)


@pytest.mark.parametrize("text", [None, "{", "a: 1"])
def test_a_kubeconfig_that_cannot_be_read_is_an_error_of_the_config(
    kubeconfig: Path, text: str | None
) -> None:
    kubeconfig.unlink() if text is None else kubeconfig.write_text(text)
    with pytest.raises(ConfigError, match="credentials for Kubernetes cannot be read from") as told:
        Kube(None, None)
    assert str(kubeconfig) in str(told.value)


def status(code: int, message: str, **details: Any) -> tuple[int, str]:
    body = {"kind": "Status", "code": code, "message": message, "details": details}
    return code, json.dumps(body)


@pytest.mark.parametrize(
    ("answer", "told", "advice"),
    [
        (status(401, "Unauthorized"), "refuses the credentials of this user", ""),
        (
            status(403, "rayjobs is forbidden"),
            "may not create rayjobs",
            "the verb create on rayjobs",
        ),
        (status(403, "forbidden: exceeded quota: a, requested: 1"), "exceeded quota: a", ""),
        (
            status(403, "forbidden", causes=[{"reason": "NamespaceTerminating"}]),
            "the namespace train is being deleted",
            "wait until it is gone",
        ),
        (status(404, "no namespace", kind="namespaces"), "there is no namespace train", "make it"),
        ((404, "404 page not found\n"), "knows no rayjobs", "install KubeRay"),
        (status(404, 'rayjobs "a" not found', kind="rayjobs"), "not found", ""),
        (status(409, "already exists"), "already exists", ""),
        (status(410, "too old"), "too old", ""),
        (status(422, "spec.a is invalid"), "spec.a is invalid", "correct launch.template"),
        (status(400, "unknown field"), "unknown field", "correct launch.template"),
        ((429, "Too many requests, please try again later.\n"), "Too many requests", ""),
        ((503, "upstream connect error"), "upstream connect error", ""),
        (status(500, "etcdserver: request timed out"), "timed out", ""),
        (status(415, "no such media type"), "no such media type", "ask who runs the cluster"),
    ],
)
def test_every_answer_of_the_api_server_has_a_sentence_and_says_whether_it_can_pass(
    kubeconfig: Path, answer: tuple[int, str], told: str, advice: str
) -> None:
    error = ApiException(status=answer[0], reason="r")
    error.body, error.headers = answer[1], {"Retry-After": "7"}
    found = Kube(None, None)._explained(error, "create", "rayjobs")
    assert told in str(found)
    assert found.passes is (advice == "")
    assert advice in found.advice
    if answer[0] in (429, 503):
        assert found.wait == 7


@pytest.mark.parametrize(
    ("ahead", "said"),
    [(7200, " (its clock is 2 h 0 min ahead of"), (-7200, " (its clock is 2 h 0 min behind")],
)
def test_refused_credentials_name_a_clock_that_is_off(
    kubeconfig: Path, ahead: float, said: str
) -> None:
    kube = Kube(None, None)
    error = ApiException(status=401, reason="r")
    error.headers = {"Date": formatdate(time.time() + ahead + 5, usegmt=True)}
    assert said in str(kube._explained(error, "list", "rayjobs"))
    error.headers = {"Date": formatdate(time.time() + 5, usegmt=True)}
    assert "clock" not in str(kube._explained(error, "list", "rayjobs"))


@pytest.mark.parametrize("reason", ["certificate has expired", "certificate is not yet valid"])
def test_a_certificate_of_another_time_names_the_clock(kubeconfig: Path, reason: str) -> None:
    text = f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {reason} (_ssl.c:1006)"
    found = Kube(None, None)._untrusted(OSError(text))
    rest = reason.removeprefix("certificate ")
    start = f"the certificate of https://127.0.0.1:9 {rest}, by the clock of this machine: 20"
    assert str(found).startswith(start)
    assert found.advice.startswith("set the clock")
    assert not found.passes


def test_no_server_can_make_the_launcher_wait_for_hours(kubeconfig: Path) -> None:
    error = ApiException(status=429, reason="r")
    error.headers = {"Retry-After": "86400"}
    assert Kube(None, None)._explained(error, "list", "rayjobs").wait == 60


def test_refused_credentials_are_read_again_once(kubeconfig: Path) -> None:
    kube = Kube(None, None)
    asked: list[str] = []

    def ask() -> str:
        asked.append(kube._api.configuration.api_key["BearerToken"])
        write(kubeconfig, {"token": "new"})
        if asked[-1] == "Bearer t":
            raise ApiException(status=401, reason="Unauthorized")
        return "answer"

    assert kube._request("list", "rayjobs", ask) == "answer"
    assert asked == ["Bearer t", "Bearer new"]


def test_no_answer_is_an_error_that_passes_and_comes_at_once(kubeconfig: Path) -> None:
    began = time.monotonic()
    with pytest.raises(KubeError, match="Connection refused") as found:
        Kube(None, None).jobs()
    assert time.monotonic() - began < 5
    assert (found.value.status, found.value.passes) == (0, True)


def test_a_busy_server_is_not_asked_again_by_the_library(kubeconfig: Path) -> None:
    asked: list[str] = []

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(429)
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        write(kubeconfig, {"token": "t"}, f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(KubeError) as found:
            Kube(None, None).jobs()
        server.shutdown()
    assert (found.value.status, found.value.wait) == (429, 1)
    assert len(asked) == 1
