"""The files of the page, the page of the API, and the headers of every answer."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "webmanifest": "application/manifest+json",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
INDEX = "index.html"


class PageFile(NamedTuple):
    """A file of the page."""

    data: bytes
    media_type: str


def page_files() -> dict[str, PageFile]:
    """Return the files of the page by name. Only these names are served."""
    found = {}
    for entry in files("dpnet.serving").joinpath("page").iterdir():
        kind = _TYPES.get(entry.name.rpartition(".")[2])
        if kind and entry.is_file():
            found[entry.name] = PageFile(entry.read_bytes(), kind)
    return found


def api_page(schema: Mapping[str, Any]) -> str:
    """Return a plain page that lists the API of an OpenAPI schema."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            answers = "".join(
                f"<li><code>{escape(status)}</code> {escape(each.get('description', ''))}</li>"
                for status, each in about.get("responses", {}).items()
            )
            parts.append(
                f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
                f"<p>{escape(about.get('summary', ''))}</p>"
                f"<p>{escape(about.get('description', ''))}</p>"
                f"{_fields(about)}<p>Answers:</p><ul>{answers}</ul>"
            )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(schema['info']['title'])}</title></head><body>"
        f"<h1>{escape(schema['info']['title'])}</h1><p>{escape(schema['info']['description'])}</p>"
        f'<p><a href="/openapi.json">openapi.json</a> is the same for programs.</p>'
        f"{''.join(parts)}</body></html>"
    )


def _fields(about: Mapping[str, Any]) -> str:
    content = about.get("requestBody", {}).get("content", {})
    lists = []
    for kind, each in content.items():
        rows = "".join(
            f"<li><code>{escape(name)}</code> {escape(field.get('description', ''))}</li>"
            for name, field in each["schema"].get("properties", {}).items()
        )
        lists.append(f"<p>Fields of <code>{escape(kind)}</code>:</p><ul>{rows}</ul>")
    return "".join(lists)
