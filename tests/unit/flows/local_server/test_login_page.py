"""The page that logs a browser in to Prefect's pages."""

from __future__ import annotations

import base64
import hashlib
import re

from flows.local_server.login_page import LOGIN_PAGE


def test_it_keeps_the_key_in_the_browser_and_allows_no_other_script() -> None:
    (script,) = re.findall(r"<script>(.*)</script>", LOGIN_PAGE.body.decode(), re.DOTALL)
    assert "location.hash" in script
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert LOGIN_PAGE.policy == f"default-src 'none'; script-src 'sha256-{allowed}'"
