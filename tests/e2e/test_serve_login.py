"""The login page of `dpnet serve` in a real browser: a server that needs a token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Page, expect  # noqa: E402

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.exists(CHROMIUM), reason="no chromium: install Debian's package of that name"
    ),
]
LONG = 60_000.0  # Playwright counts milliseconds


@pytest.fixture
def addresses(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Serve an empty root on all interfaces, and return its addresses on this machine."""
    (tmp_path / "root").mkdir()
    command = [sys.executable, "-m", "dpnet", "serve", "--root", str(tmp_path / "root"), "--json"]
    process = subprocess.Popen(
        [*command, "--host", "0.0.0.0"],
        env={**os.environ, "HOME": str(tmp_path)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        own = f"http://127.0.0.1:{found['url'].rpartition(':')[2]}"
        yield {"url": own, "login_url": found["login_url"].replace(found["url"], own)}
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


@pytest.fixture
def page() -> Iterator[Page]:
    """Return a page of a new browser."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        made = browser.new_page()
        made.set_default_timeout(LONG)
        yield made
        browser.close()


def test_the_printed_address_logs_in_and_a_wrong_token_does_not(
    addresses: dict[str, str], page: Page
) -> None:
    expect.set_options(timeout=LONG)
    page.goto(addresses["url"])
    expect(page.get_by_role("heading")).to_have_text("Log in")
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button").click()
    expect(page.get_by_role("status")).to_contain_text("The token is wrong")
    page.goto(addresses["login_url"])
    page.wait_for_url(f"{addresses['url']}/")
    expect(page).to_have_title("DPNet: fill a hole in a photo")
    assert page.evaluate("document.cookie") == ""  # no script can read it
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert cookie["value"] not in addresses["login_url"]
    page.goto(f"{addresses['url']}/docs")  # the browser stays logged in
    expect(page.get_by_role("heading", level=1)).to_have_text("DPNet: fill a hole in a photo")
