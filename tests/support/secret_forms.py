"""The forms in which a text can be stored: as it is, and encoded for pages and databases."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from urllib.parse import quote, quote_plus


def forms(secret: str) -> Iterator[str]:
    """Yield a secret in every form in which a text, a page or a database can hold it."""
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(json.dumps(secret))[3:-3]
    yield secret.replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    for raw in (secret, f"me:{secret}"):
        yield quote(raw, safe="")
        yield quote(quote(raw, safe=""), safe="")
        yield quote_plus(raw)
        # In base64 a text has one of three forms: it depends on what is before it.
        for before in range(3):
            data = b"." * before + raw.encode()
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                yield encode(data)[4:-4].decode()
