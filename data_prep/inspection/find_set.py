"""Find a committed set of images or masks by its name or its folder."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_prep.core.errors import ConfigError
from data_prep.core.manifest import ManifestHead, read_head
from data_prep.core.paths import MANIFEST, NAME
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.images.versions import versions

Kind = Literal["images", "masks"]

_NAME = re.compile(NAME)


def find_set(kind: Kind, place: str, root: str) -> tuple[Store, str]:
    """Find the set at `place`.

    Args:
        kind: images or masks.
        place: path or URI of the set's folder or manifest; or a name, which stands for the newest
            version of that name under `root`.
        root: path or URI of the root.

    Returns:
        The store of the root, and the key of the set's folder.

    Raises:
        PipelineError: there is no such set.
    """
    store = open_store(place.removesuffix(MANIFEST).rstrip("/") or ".")
    if not _NAME.fullmatch(place) or store.exists(MANIFEST):
        folder = "/".join(store.uri.rsplit("/", 3)[1:])
        top = open_store(store.uri.removesuffix(f"/{folder}"))
        if not folder.startswith(f"{kind}/") or not store.exists(MANIFEST):
            raise ConfigError(
                f"{place} is not a folder of prepared {kind}. Give a folder such as"
                f" ROOT/{kind}/NAME/0123456789ab, or a name together with --root."
            )
        return top, folder
    store = open_store(root)
    return store, committed(store, kind, place)[-1].folder


def find_named_set(kind: Kind, name: str, root: str) -> tuple[Store, str] | None:
    """Find the newest version of a name under `root`; return None if `name` is a folder or URI.

    Raises:
        PipelineError: the folder or the name does not exist.
    """
    store = open_store(root)
    if not _NAME.fullmatch(name):
        return None
    if Path(name).exists() and not any(store.folders(f"{kind}/{name}")):
        return None
    return store, committed(store, kind, name)[-1].folder


def committed(store: Store, kind: Kind, name: str) -> list[ManifestHead]:
    """Return the manifests of all versions of a set, oldest first.

    Raises:
        PipelineError: there is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a name of {kind}. Give the NAME of {kind}/NAME.")
    found = versions(store, name) if kind == "images" else _by_date(store, f"{kind}/{name}")
    if not found:
        names = sorted({key.split("/")[1] for key in _manifests(store, kind)})
        known = f"it has {', '.join(names)}" if names else "it has none yet"
        raise ConfigError(f"{store.label} has no {kind} named {name!r}: {known}.")
    return found


def _manifests(store: Store, folder: str) -> Iterator[str]:
    for entry in store.list(folder):
        if entry.key.count("/") == 3 and posixpath.basename(entry.key) == MANIFEST:
            yield entry.key


def _by_date(store: Store, top: str) -> list[ManifestHead]:
    found = [read_head(store, posixpath.dirname(key)) for key in _manifests(store, top)]
    return sorted(found, key=lambda manifest: (manifest.created, manifest.folder))
