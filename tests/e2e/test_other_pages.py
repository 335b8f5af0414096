"""The pages of other sites, in the browser of a user who is logged in to everything.

A real Chromium opens a hostile page, which tries all ways in which a page can send requests to
another address.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from platforms import Platform, platform

from data_prep.core.web_guard import basic_auth

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import BrowserContext, Page, expect  # noqa: E402

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.exists(CHROMIUM), reason="no chromium: install Debian's package of that name"
    ),
]

SECOND = 1000.0  # Playwright counts milliseconds
REBOUND = "evil.example"  # a domain name that leads to this machine
# Each attack ends with the text that it could read or "opened"; "" means that it got nothing.
ATTACKS = """
const wait = (ms) => new Promise((done) => setTimeout(() => done(""), ms));
const element = (kind, source) => new Promise((done) => {
  const made = document.createElement(kind);
  made.onload = () => done(kind === "iframe" ? "" : "opened");
  made.onerror = () => done("");
  made.src = source;
  document.body.append(made);
});
const get = (url, how) => fetch(url, how).then((answer) => answer.text()).catch(() => "");
const form = (url) => {
  const frame = document.createElement("iframe");
  frame.name = "frame" + Math.random();
  const made = document.createElement("form");
  [made.method, made.action, made.target, made.enctype] = ["POST", url, frame.name, "text/plain"];
  made.innerHTML = `<input name='{"name": "pwned", "x": "' value='"}'>`;
  document.body.append(frame, made);
  made.submit();
  return wait(1000);
};
const socket = (url) => new Promise((done) => {
  const made = new WebSocket(url.replace("http", "ws"), ["prefect"]);
  made.onopen = () => done("opened");
  made.onerror = () => done("");
});
window.attack = async (read, write, stream) => {
  const json = {"Content-Type": "application/json"};
  const body = JSON.stringify({name: "pwned"});
  const tries = [
    get(read), get(read, {mode: "no-cors"}), get(read, {credentials: "include"}),
    get(read, {mode: "no-cors", credentials: "include"}),
    get(write, {method: "POST", headers: json, body}),
    get(write, {method: "POST", headers: json, body, credentials: "include"}),
    get(write, {method: "POST", mode: "no-cors", credentials: "include", body}),
    get(write, {method: "POST", mode: "no-cors", body: new Blob([body])}),
    get(write, {method: "DELETE"}),
    form(write), element("iframe", read), element("img", read), element("script", read),
    socket(stream),
  ];
  return Promise.all(tries.map((each) => Promise.race([each, wait(20000)])));
};
"""
COUNT = 14


class Hostile(BaseHTTPRequestHandler):
    """A server of another origin with the hostile page."""

    def do_GET(self) -> None:
        page = f"<!doctype html><title>x</title><body><script>{ATTACKS}</script>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Log no requests."""


@pytest.fixture(scope="module")
def hostile() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with platform(tmp_path_factory.mktemp("pages") / "root") as found:
        found.ask("/flows/", {"name": "a-flow-of-the-user"})
        yield found


@pytest.fixture(scope="module")
def logged_in(up: Platform) -> Iterator[BrowserContext]:
    """A browser that has the password of every server."""
    user, _, password = up.password.partition(":")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-background-networking",
                f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1",
            ],
        )
        context = browser.new_context(
            viewport={"width": 1400, "height": 1000},
            http_credentials={"username": user, "password": password},
        )
        page = context.new_page()
        for address in (up.login_url, up.running.mlflow_url, up.running.metrics_url):
            answer = page.goto(address)
            assert answer is not None
            assert answer.status == 200
        page.close()
        yield context
        browser.close()


@pytest.fixture
def page(logged_in: BrowserContext) -> Iterator[Page]:
    page = logged_in.new_page()
    page.set_default_timeout(60 * SECOND)
    expect.set_options(timeout=60 * SECOND)
    yield page
    page.close()


def stored(up: Platform) -> Any:
    """Return what a page could have changed in Prefect and MLflow."""
    search = f"{up.running.mlflow_url}/api/2.0/mlflow/experiments/search"
    headers = {"Authorization": basic_auth(up.password), "Content-Type": "application/json"}
    request = urllib.request.Request(search, b'{"max_results": 50}', headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        experiments = json.load(answer)["experiments"]
    kinds = ("flows", "flow_runs", "deployments", "work_pools")
    found = {kind: len(up.ask(f"/{kind}/filter", {})) for kind in kinds}
    return found | {"experiments": [each["name"] for each in experiments]}


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", REBOUND])
def test_a_page_of_another_origin_reads_nothing_and_changes_nothing(
    name: str, page: Page, up: Platform, hostile: int
) -> None:
    targets = {
        up.running.ui_url: ("/api/flows/count", "/api/flows/", "/api/events/in"),
        up.running.mlflow_url: (
            "/api/2.0/mlflow/experiments/get?experiment_id=0",
            "/api/2.0/mlflow/experiments/create",
            "/",
        ),
        up.running.metrics_url.removesuffix("/metrics"): ("/metrics", "/metrics", "/metrics"),
    }
    before = stored(up)
    page.goto(f"http://{name}:{hostile}/")
    answers: list[int] = []
    page.on("response", lambda answer: answers.append(answer.status))
    for address, paths in targets.items():
        answers.clear()
        urls = [f"{address}{path}" for path in paths]
        read = page.evaluate("(urls) => window.attack(...urls)", urls)
        assert read == [""] * COUNT, address
        assert answers, address
        assert set(answers) == {403}, address
    assert stored(up) == before


def test_a_domain_name_that_leads_to_this_machine_gets_no_page(page: Page, up: Platform) -> None:
    for address in (up.login_url, up.running.mlflow_url, up.running.metrics_url):
        answer = page.goto(address.replace("127.0.0.1", REBOUND))
        assert answer is not None
        assert answer.status == 403


def test_the_login_address_opens_prefects_pages_without_a_prompt(page: Page, up: Platform) -> None:
    page.goto(up.login_url)
    page.wait_for_url("**/dashboard*")
    assert up.password not in page.url
    page.get_by_role("link", name="Flows").first.click()
    expect(page.get_by_text("a-flow-of-the-user").first).to_be_visible()


def test_a_link_on_another_page_opens_mlflow_and_the_metrics(
    page: Page, up: Platform, hostile: int
) -> None:
    for address in (up.running.mlflow_url, up.running.metrics_url):
        page.goto(f"http://localhost:{hostile}/")
        with page.expect_navigation() as opened:
            page.evaluate("(url) => { location.href = url; }", address)
        answer = opened.value
        assert answer is not None
        assert answer.status == 200


def test_without_the_password_prefects_pages_show_nothing(
    logged_in: BrowserContext, up: Platform
) -> None:
    assert logged_in.browser is not None
    page = logged_in.browser.new_context().new_page()
    page.goto(f"{up.running.ui_url}/flows")
    expect(page.locator("input[type=password]").first).to_be_visible(timeout=60 * SECOND)
    assert page.get_by_text("a-flow-of-the-user").count() == 0
    page.context.close()
