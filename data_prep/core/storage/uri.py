"""Read the address of a folder: a path, `file:///path` or `s3://bucket/prefix`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from data_prep.core.environment import has_stray_character
from data_prep.core.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_S3_WITHOUT_SLASHES = re.compile(r"s3:/?[^/]", re.IGNORECASE)
_FILE_WITHOUT_HOST = re.compile(r"file:(?=/)", re.IGNORECASE)  # RFC 8089: file:/path


def normal_uri(uri: str) -> str:
    """Return the one form of an address: an absolute path, or s3://bucket/prefix.

    Raises:
        ConfigError: It is not an address.
    """
    address = parse_uri(uri)
    if isinstance(address, S3Address):
        return f"s3://{address.bucket}/{address.prefix}".rstrip("/")
    return str(address.absolute())


class S3Address(NamedTuple):
    """A bucket and a prefix without slashes at its ends; the empty prefix is the whole bucket."""

    bucket: str
    prefix: str


def parse_uri(uri: str) -> Path | S3Address:
    """Return the folder or the S3 address that `uri` names; ask nothing of a server.

    Raises:
        ConfigError: It names neither. The message never repeats a password.
    """
    found = _SCHEME.match(uri)
    if found is None:
        if _SCHEME.match(uri.strip()) or _S3_WITHOUT_SLASHES.match(uri.strip()):
            raise ConfigError(f"the address {uri!r} is not valid. Write s3://bucket/prefix.")
        without_host = _FILE_WITHOUT_HOST.match(uri)
        return Path(unquote(uri[5:]) if without_host else uri).expanduser()
    scheme, rest = found[1].lower(), uri[found.end() :]
    host, slash, path = rest.partition("/")  # `urlsplit` would cut a key at its "?" or "#"
    if scheme == "s3":
        if "@" in host or ":" in host:
            raise ConfigError(
                "an s3:// address may not contain credentials, a host or a port. Write"
                " s3://bucket/prefix and set AWS_ENDPOINT_URL and the other AWS variables."
            )
        if not host:
            raise ConfigError(f"the address {uri!r} has no bucket. Write s3://bucket/prefix.")
        prefix = path.strip("/")
        if has_stray_character(uri):
            raise ConfigError(
                f"the address {uri!r} has a line break, or a blank at its end. Remove it. A value"
                " made with `echo` ends with one."
            )
        if "//" in prefix:
            raise ConfigError(
                f"the address {uri!r} has a part without a name between two slashes. Write"
                f" s3://{host}/{re.sub('/+', '/', prefix)}."
            )
        return S3Address(host, prefix)
    if scheme == "file":
        if host not in ("", "localhost"):
            raise ConfigError(
                "a file:// address may not contain a host. Write file:///absolute/path."
            )
        return Path(unquote(slash + path))
    raise ConfigError(
        f"{scheme}:// addresses cannot be used. Give a path, file:///path or s3://bucket/prefix."
        " Download photos from the web first, for example with img2dataset."
    )
