"""Check the token of a server: programs send it in a header, browsers in a cookie.

The token is in the fragment of the login address (after #), which no browser sends to a server. A
script of the login page sends it once in a header, and gets a cookie that no script can read.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote

from data_prep.core.asgi_guard import Page
from data_prep.core.password_file import USER
from data_prep.core.web_guard import Headers, has_password
from dpnet.serving.pages import POLICY

LOGIN, LOGIN_SCRIPT = "/login", "/login.js"
TOKEN = "DPNET_SERVE_TOKEN"  # the variable with the token
WRONG = (
    "the token is missing or wrong: open the address that `dpnet serve` or `dpnet up` printed, or"
    " send the header Authorization: Bearer TOKEN"
)
_MONTH_S = 30 * 24 * 3600
_BODY = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Log in</title></head><body><h1>Log in</h1>
<form id="form"><label>Token: <input id="token" type="password" autocomplete="off"></label>
<button>Log in</button></form><p id="message" role="status"></p>
<script src="/login.js"></script></body></html>
"""
_SCRIPT = """"use strict";
const message = document.getElementById("message");
async function logIn(token) {
  const answer = await fetch("/login", {
    method: "POST", headers: {Authorization: `Bearer ${token}`},
  });
  if (answer.ok) location.replace("/");
  else message.textContent = "The token is wrong: open the printed address of dpnet serve or up.";
}
document.getElementById("form").addEventListener("submit", (event) => {
  event.preventDefault();
  logIn(document.getElementById("token").value.trim());
});
const key = decodeURIComponent(location.hash.slice(1));
history.replaceState(null, "", location.pathname);
if (key) logIn(key);
"""
LOGIN_PAGE = Page(_BODY.encode(), "text/html; charset=utf-8", POLICY)
LOGIN_PAGES = {
    LOGIN: LOGIN_PAGE,
    LOGIN_SCRIPT: Page(_SCRIPT.encode(), "text/javascript; charset=utf-8", POLICY),
}


def cookie_name(port: int) -> str:
    """Return the name of the cookie. Browsers do not separate cookies by port, so it has it."""
    return f"dpnet-serve-{port}"


def _cookie_value(token: str) -> str:
    """Return what the cookie holds: not the token itself, which other programs use too."""
    return hashlib.sha256(f"cookie of dpnet serve: {token}".encode()).hexdigest()


def login_cookie(token: str, port: int) -> str:
    """Return the header Set-Cookie that logs a browser in."""
    value = f"{cookie_name(port)}={_cookie_value(token)}"
    return f"{value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={_MONTH_S}"


def login_address(url: str, token: str) -> str:
    """Return the address that logs a browser in."""
    return f"{url}{LOGIN}#{quote(token, safe='')}"


def has_token(token: str, port: int) -> Callable[[Headers], bool]:
    """Return a check of a request's headers: do they carry the token?

    It is in `Authorization: Bearer`, in HTTP basic authentication as the password of the user
    `dpnet`, or in the cookie of the login page.
    """

    def check(headers: Headers) -> bool:
        given = headers.get("authorization", ())
        if len(given) == 1 and given[0][:7].lower() == "bearer ":
            return _same(given[0][7:].strip(), token)
        if given:
            return has_password(headers, f"{USER}:{token}")
        cookies = _cookies(headers, cookie_name(port))
        return any(_same(value, _cookie_value(token)) for value in cookies)

    return check


def _cookies(headers: Headers, name: str) -> list[str]:
    found = []
    for line in headers.get("cookie", ()):
        try:
            cookies = SimpleCookie(line)
        except CookieError:
            continue
        if name in cookies:
            found.append(cookies[name].value)
    return found


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
