"""The page that logs a browser in to Prefect's pages."""

from __future__ import annotations

import base64
import hashlib

from data_prep.core.asgi_guard import Page

# The key is in the fragment of the address (after #), which no browser sends to a server. The
# storage belongs to this origin, port included. Prefect's pages take their password from there.
_SCRIPT = """
const key = location.hash.slice(1);
if (key) localStorage.setItem("prefect-password", btoa(decodeURIComponent(key)));
location.replace("/");
"""
_BODY = f"<!doctype html><title>Log in</title><script>{_SCRIPT}</script>".encode()
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
LOGIN_PAGE = Page(
    _BODY, "text/html; charset=utf-8", f"default-src 'none'; script-src 'sha256-{_HASH}'"
)
