"""Remove credentials from texts that people or other programs can see.

Everything goes through `redact` that can reach a page, a name, a log, an alert or an error message.
It knows two kinds of credentials: those with a known form (a user and a password in an address, a
token in a query, an `Authorization` header, an AWS key), and the values of this process's
environment variables whose names say that they are secret, also encoded.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote, quote_plus, unquote, urlsplit

HIDDEN = "***"
_SHORTEST = 8  # characters of a value of the environment; a shorter one is also a common word
_WORD = r"(?:token|password|passwd|passphrase|secret|signature|credential|auth_string|api[-_]?key)"
_RULES = (
    # The user and the password of an address. A path may contain "@" too, as in "photo@2x.png".
    (re.compile(r"://(?!USER:PASSWORD@)[^\s/\"<>]*@"), "://"),
    # A password that contains "/": what follows the ":" is not a port.
    (re.compile(r"://[^\s/@:\[\"<>]+:(?!\d{1,5}(?:[/\s]|$))(?!PASSWORD@)[^\s\"<>]*@"), "://"),
    # The same in an address that was taken for a path, which has one "/" there.
    (re.compile(r"(?i)\b(https?|ftp|postgres\w*|mysql)((?:\+\w+)?:/)(?!/)[^\s/\"<>]*@"), r"\1\2"),
    (re.compile(r"(?<=\w\w):/(?!/)[^\s/@:\"<>]+:[^\s/\"<>]+@"), ":/"),
    # The same in an address that is part of another address.
    (re.compile(r"(?i)(%3A%2F%2F)(?:(?!%2F)[^\s&/\"<>])*%40"), r"\1"),
    # A token in the query of an address.
    (
        re.compile(
            rf"(?i)([?&;](?:[\w.-]*(?:{_WORD}|access[-_]?key(?:[-_]?id)?|auth|pwd)|sig|key)=)"
            r"[^&\s\"'<>#;]+"
        ),
        rf"\g<1>{HIDDEN}",
    ),
    # An assignment, or a field of JSON.
    (
        re.compile(
            rf"(?i)\b([\w.-]*(?:{_WORD}|secret_access_key)(?:=|[\"']\s*:\s*[\"']))[^\s\"',;&]+"
        ),
        rf"\g<1>{HIDDEN}",
    ),
    (
        re.compile(
            r"(?i)\b((?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?:(?:basic|bearer|digest)\s+)?)"
            r"[^\s\"',;]+"
        ),
        rf"\g<1>{HIDDEN}",
    ),
    (re.compile(r"\b(Basic|Bearer)\s+(?=[\w+/=.~-]*[\d=+/])[\w+/=.~-]{12,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), HIDDEN),
)
_SECRET_NAME = re.compile(
    r"(?:PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|AUTH_STRING|API_KEY|SECRET_ACCESS_KEY"
    r"|ENCRYPTION_KEY)$"
)
_URL_PASSWORD = re.compile(r"://[^\s/@:]*:([^\s@]+)@")
_SECRET_URLS = ("DPNET_ALERT_URL",)  # the path of a webhook is its password


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a text without credentials.

    Args:
        text: Any text.
        environ: The environment with secret values.
    """
    for secret in _secrets(environ):
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def has_credentials(text: str) -> bool:
    """Return whether a text contains credentials."""
    return redact(text) != text


def _secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the secret values of the environment and their encoded forms, the longest first."""
    values = {value for name, value in environ.items() if _SECRET_NAME.search(name)}
    # A user may be known, the password may not.
    values |= {value.partition(":")[2] for value in values}
    for url in filter(None, map(environ.get, _SECRET_URLS)):
        values.add(urlsplit(url).path.strip("/") if "://" in url else url)
    for url in environ.values():
        if "://" in url and (password := _URL_PASSWORD.search(url)):
            values |= {password[1], unquote(password[1])}
    forms: set[str] = set()
    for value in values:
        if len(value) >= _SHORTEST and not value.startswith("/"):  # "/" begins a file's name
            raw = value.encode("utf-8", "surrogateescape")
            forms |= {value, json.dumps(value)[1:-1], repr(value)[1:-1]}
            forms |= {quote(raw, safe=""), quote_plus(raw)}
            forms |= {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
    yield from sorted(forms, key=len, reverse=True)
