"""Look at what was prepared: one set of images or masks, and the versions of a dataset."""

from __future__ import annotations

import io
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import Manifest, read_manifest
from data_prep.core.paths import MANIFEST
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.core.text import aligned_table, count_of
from data_prep.images.versions import versions
from data_prep.shards.ledger import FAILURES, SOURCES, OldTableError, TableError, read_batches
from data_prep.shards.shards import index_key, read_index, split_shards

if TYPE_CHECKING:
    from PIL import Image

Kind = Literal["images", "masks"]

EDGES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
CELL = 96  # side of a picture on a contact sheet, in pixels
ACROSS, PER_SPLIT = 12, 36  # pictures in a line of it, and of a split
REASONS = 5  # that are told, the most frequent first
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def find_set(kind: Kind, what: str, root: str) -> tuple[Store, str]:
    """The store and the folder of the set that `what` names: its folder's path or URI, or a name,
    then its newest version under `root`. Raises PipelineError if there is no such set."""
    store = open_store(what.removesuffix(MANIFEST).rstrip("/") or ".")
    if not _NAME.fullmatch(what) or store.exists(MANIFEST):
        folder = "/".join(store.uri.rsplit("/", 3)[1:])
        top = open_store(store.uri.removesuffix(f"/{folder}"))
        if not folder.startswith(f"{kind}/") or not store.exists(MANIFEST):
            raise PipelineError(
                f"{what} is no folder of prepared {kind}: give one such as"
                f" ROOT/{kind}/NAME/0123456789ab, or a name together with --root."
            )
        return top, folder
    store = open_store(root)
    return store, committed(store, kind, what)[-1].folder


def committed(store: Store, kind: Kind, name: str) -> list[Manifest]:
    """Manifests of the versions of a set, oldest first. Raises PipelineError if there is none."""
    if not _NAME.fullmatch(name):
        raise PipelineError(f"{name!r} is no name of {kind}: give one as in {kind}/NAME.")
    found = versions(store, name) if kind == "images" else _by_date(store, f"{kind}/{name}")
    if not found:
        names = sorted({key.split("/")[1] for key in _manifests(store, kind)})
        there = f"there are {', '.join(names)}" if names else "it has none yet"
        raise PipelineError(f"{store.uri} has no {kind} named {name!r}: {there}.")
    return found


def _manifests(store: Store, folder: str) -> Iterator[str]:
    for entry in store.list(folder):
        if entry.key.count("/") == 3 and posixpath.basename(entry.key) == MANIFEST:
            yield entry.key


def _by_date(store: Store, top: str) -> list[Manifest]:
    found = [read_manifest(store, posixpath.dirname(key)) for key in _manifests(store, top)]
    return sorted(found, key=lambda manifest: (manifest.created, manifest.folder))


def _looked_at(store: Store, folder: str) -> Manifest:
    """The manifest, with the parts that are shown. Raises PipelineError if it lacks one."""
    manifest = read_manifest(store, folder)
    try:
        for numbers in manifest.summary["splits"].values():
            int(numbers["samples"]), int(numbers["shards"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise PipelineError(
            f"{store.uri}/{folder}/{MANIFEST} was altered: `dpnet verify` says what is wrong."
        ) from None
    return manifest


def _described(manifest: Manifest) -> dict[str, Any]:
    """What is told of images and masks alike."""
    splits = {}
    for split, numbers in manifest.summary["splits"].items():
        own = [f for f in manifest.files if _split_of(f.path) == split]
        splits[split] = {
            "samples": numbers["samples"],
            "shards": numbers["shards"],
            "bytes": sum(file.size for file in own if file.path.endswith(".tar")),
        }
    return {
        "folder": manifest.folder,
        "name": manifest.name,
        "created": manifest.created,
        "content_digest": manifest.content_digest,
        "splits": splits,
    }


def _split_of(path: str) -> str:
    return posixpath.basename(path).rpartition("-")[0]


def inspect_images(store: Store, folder: str) -> dict[str, Any]:
    """Figures of one version: items, samples and bytes by split, why some failed, original sizes.

    `sides` counts the photographs by their shorter side: [least, below, number], in pixels; `below`
    is None for the last. Raises PipelineError if a table is damaged.
    """
    manifest = _looked_at(store, folder)
    summary = manifest.summary
    counted = ("listed", "photographs", "failed", "ignored", "duplicates", "near_duplicates")
    sides, formats = _originals(store, folder)
    return {
        **_described(manifest),
        "version": summary.get("version"),
        "parent": _parent(manifest),
        "items": {name: summary[name] for name in counted if name in summary},
        "reasons": _reasons(store, folder),
        "sides": sides,
        "formats": formats,
    }


def _parent(manifest: Manifest) -> str | None:
    parent = manifest.inputs.get("parent")
    return posixpath.basename(parent.folder) if parent else None


def _table(store: Store, folder: str, name: str, columns: Sequence[str]) -> Iterator[Any]:
    try:
        yield from read_batches(store, f"{folder}/{name}", columns)
    except OldTableError:
        return
    except TableError as error:
        raise PipelineError(
            f"{store.uri}/{folder}/{name} {error}: `dpnet verify` says what else is wrong."
        ) from None


def _originals(store: Store, folder: str) -> tuple[list[list[int | None]], dict[str, int]]:
    """Shorter sides and file formats of the photographs that became samples."""
    import numpy as np

    sides, formats = np.zeros(len(EDGES), np.int64), Counter[str]()
    for batch in _table(store, folder, SOURCES, ("outcome", "width", "height", "format")):
        stored = np.array([outcome == "sample" for outcome in batch["outcome"]], np.bool_)
        width, height = (
            np.array([n or 0 for n in batch[c]], np.int64) for c in ("width", "height")
        )
        short = np.minimum(width, height)[stored]
        sides += np.bincount(np.searchsorted(EDGES, short, "right") - 1, minlength=len(EDGES))
        formats.update(str(f) for f, s in zip(batch["format"], stored, strict=True) if s)
    bounds: list[int | None] = [*EDGES[1:], None]
    found = zip(EDGES, bounds, sides.tolist(), strict=True)
    return [list(row) for row in found if row[2]], dict(formats.most_common())


def _reasons(store: Store, folder: str) -> list[dict[str, Any]]:
    """The most frequent reasons of failures, their numbers left out, each with its first item."""
    counts, first = Counter[str](), dict[str, str]()
    for batch in _table(store, folder, FAILURES, ("key", "kind", "reason")):
        for key, kind, reason in zip(batch["key"], batch["kind"], batch["reason"], strict=True):
            if kind == "failed":
                pattern = re.sub(r"\d+", "#", str(reason))
                counts[pattern] += 1
                first.setdefault(pattern, key)
    return [
        {"reason": reason, "items": number, "first": first[reason]}
        for reason, number in counts.most_common(REASONS)
    ]


def inspect_masks(store: Store, folder: str) -> dict[str, Any]:
    """Figures of a set of masks: how many by split, and by ratio bin and recipe."""
    manifest = _looked_at(store, folder)
    counts: dict[str, Counter[tuple[str, str]]] = {}
    for split in manifest.summary["splits"]:
        own = counts.setdefault(split, Counter())
        for tar in split_shards(store, folder, split):
            try:
                rows = read_index(store, tar, ("ratio_bin", "recipe"))
                own.update((row["ratio_bin"], row["recipe"]) for row in rows)
            except (FileNotFoundError, ValueError, KeyError):  # ArrowInvalid is a ValueError
                raise PipelineError(
                    f"{store.uri}/{index_key(tar)} is missing or damaged: run `dpnet verify` for"
                    " details."
                ) from None
    return {
        **_described(manifest),
        "bins": {split: _nested(own) for split, own in counts.items()},
        "unreachable": manifest.summary.get("unreachable", []),
    }


def _nested(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """{ratio bin: {recipe: number}}, both sorted."""
    found: dict[str, dict[str, int]] = {}
    for (name, recipe), number in sorted(counts.items()):
        found.setdefault(name, {})[recipe] = number
    return found


def image_sheet(store: Store, folder: str) -> Image.Image:
    """A contact sheet of some samples of each split, from as many of its shards as there are
    places; the same every time. Raises PipelineError if a sample cannot be decoded."""
    from data_prep.inspection.contact_sheet import contact_sheet

    rows = []
    for split, numbers in _looked_at(store, folder).summary["splits"].items():
        tars = split_shards(store, folder, split)
        pictures = [picture for tar in tars_for(tars) for picture in _some(store, *tar)]
        samples, shards = int(numbers["samples"]), int(numbers["shards"])
        caption = f"{split}: {count_of(samples, 'image')} in {count_of(shards, 'shard')}"
        rows.append((caption, pictures))
    return contact_sheet(rows, CELL, ACROSS)


def tars_for(tars: Sequence[str]) -> list[tuple[str, int]]:
    """Evenly spread tars, each with how many pictures it gives."""
    places = [number * len(tars) // PER_SPLIT for number in range(PER_SPLIT if tars else 0)]
    return [(tars[place], number) for place, number in sorted(Counter(places).items())]


def _some(store: Store, tar: str, number: int) -> Iterator[Image.Image]:
    """At most `number` pictures of a shard, evenly spread, each by a range read."""
    from PIL import Image

    key = ""
    try:
        rows = read_index(store, tar)
        number = min(number, len(rows))
        for row in (rows[(2 * n + 1) * len(rows) // (2 * number)] for n in range(number)):
            key = str(row["key"])
            data = store.read_range(tar, row["offset"], row["size"])
            picture = Image.open(io.BytesIO(data))
            picture.draft("RGB", (CELL, CELL))  # a large JPEG is decoded small
            yield picture.convert("RGB")
    except FileNotFoundError:
        raise PipelineError(f"{tar} or its index is missing: `dpnet verify` says more.") from None
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, Image.DecompressionBombError):
        what = f"sample {key} of {tar} cannot be decoded" if key else f"the index of {tar} is lost"
        raise PipelineError(f"{what}: `dpnet verify` says what is wrong.") from None


def save_sheet(sheet: Callable[[], Image.Image], path: Path) -> None:
    """Write a sheet as PNG. Raises PipelineError where that cannot be done."""
    if not path.parent.is_dir() or path.is_dir():
        raise PipelineError(f"{path} cannot be written: name a PNG file in a folder that is there.")
    sheet().save(path, "PNG")


def log_images(store: Store, name: str) -> list[dict[str, Any]]:
    """Every version of a dataset, oldest first: what it holds, and what it added to its parent.

    `other_settings` names the settings in which a version without a parent differs from the one
    before it. Raises PipelineError if there is no such dataset.
    """
    found, before = [], None
    for manifest in committed(store, "images", name):
        summary, parent = manifest.summary, _parent(manifest)
        tars = [file.path for file in manifest.files if file.path.endswith(".tar")]
        inherited = sum(path.startswith("../") for path in tars)
        settings = manifest.settings
        other = [
            option
            for option in sorted(settings.keys() | (before or {}).keys())
            if before is not None and settings.get(option) != before.get(option)
        ]
        found.append(
            {
                "digest": posixpath.basename(manifest.folder),
                "version": summary["version"],
                "created": manifest.created,
                "parent": parent,
                "splits": {s: n["samples"] for s, n in summary["splits"].items()},
                **{what: summary.get(what) for what in ("listed", "added", "removed", "changed")},
                "shards_written": len(tars) - inherited,
                "shards_inherited": inherited,
                "other_settings": other if parent is None else [],
            }
        )
        before = settings
    return found


def images_text(found: Mapping[str, Any]) -> str:
    """`inspect_images` for people."""
    items = found["items"]
    version = f"version {found['version']}" if found["version"] else "version unknown"
    parent = f", child of {found['parent']}" if found["parent"] else ""
    names = ", ".join(f"{number:,} {name.replace('_', '-')}" for name, number in items.items())
    lines = [f"{found['folder']}: {version} of {found['created']}{parent}", f"items    {names}"]
    for each in found["reasons"]:
        lines.append(f"failed   {each['items']:,} x {each['reason']} (first {each['first']!r})")
    lines += _split_lines(found["splits"], "images")
    if found["formats"]:
        formats = ", ".join(f"{number:,} {name}" for name, number in found["formats"].items())
        lines += [f"formats  {formats}", "shorter side of the originals, in pixels"]
        bounds = [
            f"{low}-{high - 1}" if high else f"{low} and more" for low, high, _ in found["sides"]
        ]
        lines += _bars(bounds, [number for _, _, number in found["sides"]])
    return "\n".join(lines)


def _split_lines(splits: Mapping[str, Any], what: str) -> list[str]:
    return [
        f"{split:<8} {n['samples']:,} {what} in {count_of(n['shards'], 'shard')},"
        f" {n['bytes'] / 1e6:.1f} MB"
        for split, n in splits.items()
    ]


def _bars(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    most = max(numbers, default=0)
    wide = max((len(name) for name in names), default=0)
    return [
        f"  {name:>{wide}} {number:>11,} {'#' * -(-50 * number // most)}"
        for name, number in zip(names, numbers, strict=True)
    ]


def masks_text(found: Mapping[str, Any]) -> str:
    """`inspect_masks` for people."""
    lines = [f"{found['folder']}: of {found['created']}", *_split_lines(found["splits"], "masks")]
    for split, bins in found["bins"].items():
        recipes = sorted({recipe for own in bins.values() for recipe in own})
        rows = [["hole ratio", *recipes, "all"]]
        for name, own in bins.items():
            rows.append([name, *(f"{own.get(r, 0):,}" for r in recipes), f"{sum(own.values()):,}"])
        lines += ["", f"{split} masks", *aligned_table(rows)]
    if found["unreachable"]:
        lines += ["", f"no evaluation masks with {', '.join(found['unreachable'])} hole"]
    return "\n".join(lines)


def log_text(found: Sequence[Mapping[str, Any]]) -> str:
    """`log_images` for people."""
    splits = list(dict.fromkeys(split for version in found for split in version["splits"]))
    changes = ("listed", "added", "removed", "changed")
    rows = [["version", "digest", "date", *changes, *splits, "new shards", "kept", "parent"]]
    for v in found:
        other = f"- (other {', '.join(v['other_settings'])})" if v["other_settings"] else "-"
        rows.append(
            [
                str(v["version"]),
                v["digest"],
                v["created"][:16].replace("T", " "),
                *(str(v[what]) for what in changes),
                *(str(v["splits"].get(split, 0)) for split in splits),
                str(v["shards_written"]),
                str(v["shards_inherited"]),
                v["parent"] or other,
            ]
        )
    return "\n".join(aligned_table(rows))
