"""Figures of prepared data as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.core.text import aligned_table, count_of, joined
from data_prep.inspection.inspect import COUNTS

# Plain words for what only the program calls so: counts of items, and settings of a request.
_COUNTS = {"photographs": "photos", "near_duplicates": "near-duplicates"}
_SETTINGS = {"needed_side": "least side of a photo", "format_version": "version of dpnet"}


def images_text(found: Mapping[str, Any]) -> str:
    """Return the figures of `inspect_images` as text."""
    items = found["items"]
    version = f"version {found['version']}" if found["version"] else "version unknown"
    parent = f", child of {found['parent']}" if found["parent"] else ""
    names = ", ".join(f"{number:,} {_COUNTS.get(name, name)}" for name, number in items.items())
    lines = [f"{found['folder']}: {version} of {found['created']}{parent}", f"items    {names}"]
    for each in found["reasons"]:
        lines.append(f"failed   {each['items']:,} x {each['reason']} (first {each['first']!r})")
    lines += _split_lines(found["splits"], "image")
    if found["formats"]:
        formats = ", ".join(f"{number:,} {name}" for name, number in found["formats"].items())
        lines += [f"formats  {formats}", "shorter side of the photos, in pixels"]
        bounds = [
            f"{low}-{high - 1}" if high else f"{low} or more" for low, high, _ in found["sides"]
        ]
        lines += _bars(bounds, [number for _, _, number in found["sides"]])
    return joined(lines)


def _split_lines(splits: Mapping[str, Any], noun: str) -> list[str]:
    return [
        f"{split:<8} {count_of(n['samples'], noun)} in {count_of(n['shards'], 'shard')},"
        f" {n['bytes'] / 1e6:.1f} MB"
        for split, n in splits.items()
    ]


def _bars(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Return a bar chart of at most 50 characters a line."""
    most = max(numbers, default=0)
    wide = max((len(name) for name in names), default=0)
    return [
        f"  {name:>{wide}} {number:>11,} {'#' * -(-50 * number // most)}"
        for name, number in zip(names, numbers, strict=True)
    ]


def masks_text(found: Mapping[str, Any]) -> str:
    """Return the figures of `inspect_masks` as text."""
    lines = [f"{found['folder']}: of {found['created']}", *_split_lines(found["splits"], "mask")]
    for split, bins in found["bins"].items():
        recipes = sorted({recipe for own in bins.values() for recipe in own})
        rows = [["hole ratio", *recipes, "all"]]
        for name, own in bins.items():
            rows.append([name, *(f"{own.get(r, 0):,}" for r in recipes), f"{sum(own.values()):,}"])
        lines += ["", f"{split} masks", *aligned_table(rows)]
    if found["unreachable"]:
        lines += ["", f"no evaluation masks with {', '.join(found['unreachable'])} hole"]
    return joined(lines)


def log_text(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the versions of `log_images` as a table."""
    splits = list(dict.fromkeys(split for version in found for split in version["splits"]))
    rows = [["version", "digest", "date", *COUNTS, *splits, "new shards", "kept", "parent"]]
    for v in found:
        # With `size`, the least side is usually another one too.
        settings = [name for name in v["other_settings"] if name != "needed_side"]
        settings = [_SETTINGS.get(name, name) for name in settings or v["other_settings"]]
        other = f"- (other {', '.join(settings)})" if settings else "-"
        rows.append(
            [
                str(v["version"]),
                v["digest"],
                v["created"][:16].replace("T", " "),
                *("-" if v[what] is None else str(v[what]) for what in COUNTS),
                *(str(v["splits"].get(split, 0)) for split in splits),
                str(v["shards_written"]),
                str(v["shards_inherited"]),
                v["parent"] or other,
            ]
        )
    return "\n".join(aligned_table(rows))
