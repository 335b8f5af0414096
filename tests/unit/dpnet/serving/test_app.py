"""The endpoints behind their guard, in this process and without a socket."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import small_root
from PIL import Image

from data_prep.core.asgi_guard import Guard
from data_prep.core.storage.local import LocalStore
from dpnet.serving.app import Service, guarded_app
from dpnet.serving.limits import ServeLimits
from dpnet.serving.login import login_cookie
from dpnet.serving.models import Models, open_source
from dpnet.serving.pages import page_files
from dpnet.serving.votes import Votes

PORT = 8400
OWN = f"127.0.0.1:{PORT}"
KEY = "a-long-token-of-this-test"
LIMITS = ServeLimits(bytes=100_000, pixels=10_000, queue=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a root with two versions; version 1 is champion."""
    folder = tmp_path_factory.mktemp("root")
    small_root.two_versions(LocalStore(folder))
    return str(folder)


@pytest.fixture
def service(root: str) -> Service:
    """Return a service whose thread was not started."""
    source = open_source(root, "")
    return Service(Models(source), LIMITS, Votes(source))


def ask(app: Guard, method: str, path: str, **options: Any) -> httpx.Response:
    """Return the answer to one request."""

    async def asking() -> httpx.Response:
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{OWN}") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asking())


def picture(mode: str = "RGB", colour: int = 0, size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def files(**changes: bytes) -> Mapping[str, Any]:
    given = {"image": picture(), "mask": picture("L"), **changes}
    return {name: (f"{name}.png", data) for name, data in given.items()}


def test_the_models_the_default_and_the_limits_are_listed(service: Service) -> None:
    service.models.get()
    found = ask(guarded_app(service, PORT), "GET", "/api/models").json()
    assert [each["id"] for each in found["models"]] == ["dpnet@2", "dpnet@1"]
    assert [each["champion"] for each in found["models"]] == [False, True]
    assert found["default"] == "champion"
    assert found["limits"] == {"bytes": 100_000, "pixels": 10_000, "seconds": 600.0}
    assert found["votes"] is True


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/static/nothing.js", 404),
        ("GET", "/static/..%2f__init__.py", 404),
        ("GET", "/api/inpaint", 405),
        ("GET", "/api/jobs/unknown-job", 404),
        ("GET", "/api/jobs/%3Cscript%3E", 404),
        ("DELETE", "/api/jobs/unknown-job", 404),
        ("GET", "/docs/oauth2-redirect", 404),
        ("GET", "/redoc", 404),
    ],
)
def test_every_error_is_one_sentence_in_json(
    service: Service, method: str, path: str, status: int
) -> None:
    answer = ask(guarded_app(service, PORT), method, path)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert "script" not in answer.text


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, 400, "has no hole"),
        ({"mask": picture("L", 255)}, 400, "white everywhere"),
        ({"mask": picture("L", 0, (31, 32))}, 400, "31 x 32 pixels but the image is 32 x 32"),
        ({"image": picture(size=(200, 51))}, 413, "the limit of this server is 10000"),
        ({"image": b"x" * 100_001}, 413, "more than 100,000 bytes"),
    ],
)
def test_a_request_that_cannot_be_filled_is_refused_and_leaves_nothing(
    service: Service, changes: dict[str, bytes], status: int, said: str
) -> None:
    answer = ask(guarded_app(service, PORT), "POST", "/api/inpaint", files=files(**changes))
    service.filling.close()
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
    room = service.filling.room
    assert (room.requests, room.bytes, room.pixels, service.work.waiting) == (0, 0, 0, 0)
    assert b'dpnet_serve_requests_total{outcome="refused"} 1.0' in service.metrics.text("")


def test_head_is_answered_as_get_is(service: Service) -> None:
    service.models.get()
    app = guarded_app(service, PORT)
    for path in ("/", "/healthz", "/livez", "/docs", "/api/models"):
        assert ask(app, "HEAD", path).status_code == 200
    assert ask(app, "HEAD", "/nothing").status_code == 404
    paths = ask(app, "GET", "/openapi.json").json()["paths"]
    assert not any("head" in methods for methods in paths.values())


def test_an_error_of_ours_is_logged_and_shows_nothing_of_it(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the inner secret")

    monkeypatch.setattr(service.models, "health", fail)
    answer = ask(guarded_app(service, PORT), "GET", "/healthz")
    assert (answer.status_code, "inner secret" in answer.text) == (500, False)
    assert "the inner secret" in caplog.text


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/nothing", "/api/models"])
def test_every_answer_has_the_policy_and_no_answer_is_kept(service: Service, path: str) -> None:
    headers = ask(guarded_app(service, PORT), "GET", path).headers
    policy = headers.get_list("content-security-policy")
    assert policy == [
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
        " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8400"},
        {"origin": "http://evil.example"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_other_names_and_other_pages_are_refused(service: Service, headers: dict[str, str]) -> None:
    app = guarded_app(service, PORT)
    for method, path in (("GET", "/api/models"), ("POST", "/api/inpaint"), ("POST", "/api/votes")):
        answer = ask(app, method, path, headers=headers)
        assert (answer.status_code, list(answer.json())) == (403, ["error"])
        assert "content-security-policy" in answer.headers


def test_with_a_token_only_health_and_the_login_page_are_open(service: Service) -> None:
    app = guarded_app(service, PORT, token=KEY, names=["serve.example"])
    closed = ("/", "/docs", "/openapi.json", "/metrics", "/api/models", "/static/app.js")
    for path in closed:
        assert ask(app, "GET", path).status_code == 401
        assert ask(app, "GET", path, headers={"authorization": "Bearer x"}).status_code == 401
    assert ask(app, "POST", "/api/inpaint", files=files()).status_code == 401
    assert ask(app, "POST", "/login").status_code == 401
    for path in ("/livez", "/login", "/login.js"):
        assert ask(app, "GET", path).status_code == 200
    assert ask(app, "GET", "/healthz").status_code == 503  # no model was loaded yet
    bearer = {"authorization": f"Bearer {KEY}"}
    entered = ask(app, "POST", "/login", headers=bearer)
    assert entered.headers["set-cookie"] == login_cookie(KEY, PORT)
    cookie = {"cookie": login_cookie(KEY, PORT).partition(";")[0]}
    for headers in (bearer, cookie, bearer | {"host": "serve.example"}):
        assert ask(app, "GET", "/api/models", headers=headers).status_code == 200
    page = ask(app, "GET", "/", headers={"accept": "text/html"})
    assert (page.status_code, "<form" in page.text) == (401, True)


def test_without_a_token_there_is_no_login(service: Service) -> None:
    app = guarded_app(service, PORT)
    assert ask(app, "GET", "/login").status_code == 404
    assert ask(app, "POST", "/login").status_code == 404


def test_the_page_of_the_api_names_every_address_and_field(service: Service) -> None:
    app = guarded_app(service, PORT)
    page = ask(app, "GET", "/docs").text
    for path in ask(app, "GET", "/openapi.json").json()["paths"]:
        assert path.replace("{job}", "{job}") in page
    for word in ("<code>image</code>", "<code>mask</code>", "Retry-After", "POST /api/votes"):
        assert word in page
    assert "<script" not in page
    assert "http" not in page.replace("html", "")


def test_a_vote_without_a_registry_or_a_root_that_can_be_written_is_refused(root: str) -> None:
    vote = {"winner": "dpnet@2", "loser": "dpnet@1"}
    run = str(min((Path(root) / "runs").iterdir()))
    for reference, unwritable, said in (
        (run, "", "no registry"),
        ("", "it is read-only.", "read-on"),
    ):
        source = open_source(root, reference)
        service = Service(Models(source), LIMITS, Votes(source, unwritable))
        app = guarded_app(service, PORT)
        answer = ask(app, "POST", "/api/votes", json=vote)
        assert (answer.status_code, said in answer.json()["error"]) == (409, True)
        assert ask(app, "GET", "/api/models").json()["votes"] is False


def test_the_files_of_the_page_are_the_package_s_own() -> None:
    for name, file in page_files().items():
        assert "/" not in name
        assert file.media_type.split(";")[0] in (
            "text/html", "text/css", "text/javascript", "image/svg+xml", "image/png",
            "image/x-icon", "application/manifest+json",
        )  # fmt: skip
