"""The event of a new champion: when it is sent, what it says, and how a command sends it."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import small_root

from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.cli.main import main
from dpnet.model_store.history import find_champion, read_history
from dpnet.registry.promotion import promote, rollback
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register
from flows.champion_events import ChampionEvent, champion_events, post

MODEL = "dpnet"


class Api:
    """A server that keeps the events that it gets. It is not Prefect's."""

    def __init__(self, status: int = 204) -> None:
        self.events: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status = status
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/api/events"
                outer.events += json.loads(body)
                outer.headers.append(dict(self.headers))
                self.send_response(outer.status)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/api"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    found = Api()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [n for n in os.environ if n.startswith(("PREFECT_", "MLFLOW_"))]:
        del os.environ[name]
    os.environ["PREFECT_API_URL"] = found.url
    yield found
    found.server.shutdown()
    found.server.server_close()


def registered(store: LocalStore, psnr: float) -> None:
    run, evaluation = small_root.run_and_evaluation(store, psnr)
    register(RegisterSettings(), run, evaluation, store)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Return a root with the champion 2, promoted by the gate, and the challenger 3."""
    store = small_root.new_store(tmp_path / "root")
    for psnr in (20.0, 21.0, 19.0):
        registered(store, psnr)
    return store


def test_each_change_in_the_block_is_one_event(store: LocalStore) -> None:
    sent: list[ChampionEvent] = []
    with champion_events(store, MODEL, sent.append):
        promote(store, MODEL, 3, "It looks better.")
        promote(store, MODEL, 3, "It is champion already.")
        rollback(store, MODEL)
    assert [each.payload["version"] for each in sent] == [3, 2]
    first, second = (each.payload for each in sent)
    assert first == {
        "model": MODEL,
        "version": 3,
        "hole_psnr": 19.0,
        "champion": {"version": 2, "hole_psnr": 21.0},
        "how": "promote",
        "by": read_history(store, MODEL)[2].by,
        "why": "It looks better.",
        "reason": f"dpnet version 3 is champion now, by {first['by']}. It looks better.",
        "root": store.label,
    }
    assert (second["how"], second["champion"]["version"]) == ("rollback", 3)
    with champion_events(store, MODEL, sent.append):
        registered(store, 18.0)
    assert len(sent) == 2  # a challenger


def test_the_first_champion_and_the_gates_are_events_too(tmp_path: Path) -> None:
    store = small_root.new_store(tmp_path / "root")
    sent: list[ChampionEvent] = []
    for psnr in (20.0, 21.0):
        with champion_events(store, MODEL, sent.append):
            registered(store, psnr)
    assert [each.payload["champion"] for each in sent] == [None, {"version": 1, "hole_psnr": 20.0}]
    assert [each.payload["by"] for each in sent] == ["gate", "gate"]


def test_a_failure_after_the_change_does_not_hide_it(store: LocalStore) -> None:
    sent: list[ChampionEvent] = []

    def change_and_fail() -> None:
        with champion_events(store, MODEL, sent.append):
            promote(store, MODEL, 3, "It looks better.")
            raise KeyError

    with pytest.raises(KeyError):
        change_and_fail()
    assert len(sent) == 1


def test_the_derived_history_of_an_old_root_is_no_event(store: LocalStore) -> None:
    for entry in list(store.list("registry/dpnet/history")):
        store.delete(entry.key)
    sent: list[ChampionEvent] = []
    with champion_events(store, MODEL, sent.append):
        promote(store, MODEL, 3, "It looks better.")
    assert any(entry.derived for entry in read_history(store, MODEL))
    assert [each.payload["version"] for each in sent] == [3]


def test_a_damaged_history_fails_as_without_events(store: LocalStore) -> None:
    store.write("registry/dpnet/history/000001.json", b"{}")
    sent: list[ChampionEvent] = []
    with (
        pytest.raises(PipelineError, match="restore it from a backup"),
        champion_events(store, MODEL, sent.append),
    ):
        promote(store, MODEL, 3, "It looks better.")
    assert sent == []


def test_a_command_sends_it_with_the_password_and_the_same_id_for_the_same_change(
    store: LocalStore, api: Api
) -> None:
    os.environ["PREFECT_API_AUTH_STRING"] = "dpnet:secret"
    root = ["--root", str(store.folder)]
    assert main(["registry", "promote", "3", "--why", "It looks better.", *root]) == 0
    (event,) = api.events
    assert event["event"] == "dpnet.model.promoted"
    assert event["resource"]["prefect.resource.id"] == "dpnet.model.dpnet"
    assert event["payload"]["why"] == "It looks better."
    login = base64.b64encode(b"dpnet:secret").decode()
    assert api.headers[0]["Authorization"] == f"Basic {login}"
    assert main(["registry", "rollback", *root]) == 0
    assert [each["payload"]["version"] for each in api.events] == [3, 2]
    again: list[ChampionEvent] = []
    with champion_events(store, MODEL, again.append):
        promote(store, MODEL, 3, "Again.")
    assert len({*(each["id"] for each in api.events), *(str(each.id) for each in again)}) == 3
    post(again[0])
    post(again[0])
    assert api.events[-1]["id"] == api.events[-2]["id"]


@pytest.mark.parametrize("status", [401, 500, 0])
def test_a_server_that_refuses_or_is_away_does_not_stop_the_promotion(
    store: LocalStore, api: Api, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    api.status = status
    if not status:
        api.server.server_close()
    assert main(["registry", "rollback", "--root", str(store.folder)]) == 0
    said = capsys.readouterr().err
    assert "the Prefect API did not accept the event dpnet.model.promoted" in said
    assert (f"status {status}" in said) == bool(status)
    champion = find_champion(store, MODEL)
    assert champion is not None
    assert champion["version"] == 1


def test_without_an_address_nothing_is_sent(
    store: LocalStore, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    del os.environ["PREFECT_API_URL"]
    assert main(["registry", "rollback", "--root", str(store.folder)]) == 0
    assert api.events == []
    assert "Prefect" not in capsys.readouterr().err


@pytest.mark.parametrize("url", ["not-a-url", "http://[::1", "ftp://127.0.0.1/x", "http://a b/"])
def test_an_address_that_is_none_is_one_sentence(
    store: LocalStore, api: Api, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["PREFECT_API_URL"] = url
    assert main(["registry", "rollback", "--root", str(store.folder)]) == 0
    assert "did not accept the event" in capsys.readouterr().err
