"""Ways to break a small valid file: its bytes, its JSON or YAML values, its lines, its table."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

MAGIC = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\xff\xff\xff\x7fWEBP", b"II*\0",
    b"MM\0*", b"BM", b"P6\n99999 99999\n255\n", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08",
    b"BZh9", b"\xfd7zXZ\0", b"PAR1", b"\0\0\0\x20ftypavif", b"\0\0\0\x0cjP  \r\n\x87\n", b"8BPS",
    b"DDS ", b"icns", b"%!PS-Adobe", b"\xef\xbb\xbf", b"\xff\xfe", b"<html>", b"{", b"---\n", b"#!",
)  # fmt: skip
HUGE = (0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0xFFFF, 0)
ODD = (
    None, True, False, -1, 0, 1, 10**30, -(10**30), 1e308, float("nan"), float("inf"), 0.5, "",
    " ", "x", "../../x", "/", "a/b", "\0", "line\nbreak", "\x1b[31m", "é", "\u202ename", "😀", "1",
    "true", "null", "s3://", "s3://b", "http://127.0.0.1:9", "x" * 5000, [], {}, [[]], [None],
    {"": None}, {"a": {"b": [1]}}, [1, "x"], "2026-13-45", "%", "${HOME}", "{{ x }}", "~",
)  # fmt: skip


def broken_bytes(data: bytes, random: random.Random) -> bytes:
    """Return the bytes with one to three kinds of damage."""
    for _ in range(random.choice((1, 1, 2, 3))):
        data = _broken_once(data, random)
    return data


def _broken_once(data: bytes, random: random.Random) -> bytes:
    size = len(data)
    # Half of the damage is near the start, where most formats have their sizes.
    at = random.randrange(min(size, 64) if random.random() < 0.5 else size) if size else 0
    match random.randrange(11):
        case 0:
            return data[:at]
        case 1:
            return data[at:]
        case 2:
            broken = bytearray(data)
            for _ in range(random.choice((1, 4, 32)) if size else 0):
                broken[random.randrange(size)] ^= 1 << random.randrange(8)
            return bytes(broken)
        case 3:
            a, b = sorted((at, random.randrange(size + 1)))
            return data[:a] + data[b:] + data[a:b]
        case 4:
            magic = random.choice(MAGIC)
            return magic + data[len(magic) * random.randrange(2) :]
        case 5:
            number = struct.pack(random.choice("<>") + "I", random.choice(HUGE))
            return data[:at] + number + data[at + 4 :]
        case 6:
            return data[:at] + random.randbytes(random.choice((1, 16, 300))) + data[at:]
        case 7:
            length = random.choice((1, 8, 64))
            return data[:at] + bytes(length) + data[at + length :]
        case 8:
            return random.choice((b"", b"\0", b"\n", bytes(512), random.randbytes(100)))
        case 9:
            return data + data[:at]
        case _:
            length = random.choice((2, 16, 200))
            return data[:at] + data[at + length :]


def broken_values(values: Any, random: random.Random) -> Any:
    """Return a copy of nested values with one to three wrong, missing or additional ones."""
    values = copy.deepcopy(values)
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(values)) if isinstance(values, (dict, list)) else []
        if not places:
            return random.choice(ODD)
        parent, key = random.choice(places)
        match random.randrange(8):
            case 0:
                del parent[key]
            case 1:
                other, its = random.choice(places)
                if its in other if isinstance(other, dict) else its < len(other):
                    parent[key] = copy.deepcopy(other[its])
            case 2 if isinstance(parent, dict):
                parent[random.choice(("", "x", "format", "version", "\0", "a" * 300))] = parent[key]
            case 3 if isinstance(parent, list):
                parent.append(parent[key])
            case 4 if isinstance(parent[key], (int, str)):
                parent[key] = str(parent[key]) if isinstance(parent[key], int) else [parent[key]]
            case 5 if isinstance(parent[key], (int, float)):
                parent[key] = random.choice((-parent[key], parent[key] + 1, parent[key] * 1.5))
            case _:
                parent[key] = random.choice(ODD)
    return values if random.random() > 0.04 else random.choice(ODD)


def _places(values: Any) -> Any:
    """Yield (dict or list, key) of every value inside."""
    keys = list(values) if isinstance(values, dict) else range(len(values))
    for key in keys:
        yield values, key
        if isinstance(values[key], (dict, list)) and values[key]:
            yield from _places(values[key])


def broken_json(data: bytes, random: random.Random) -> bytes:
    """Return JSON with broken values, fields that come twice, or broken bytes."""
    kind = random.random()
    if kind < 0.15:
        return broken_bytes(data, random)
    if kind < 0.2:
        return random.choice((b"[" * 3000, b'{"a":' * 3000, b"NaN", b'"\\ud800"', b"1" * 5000))
    text = json.dumps(broken_values(json.loads(data), random), indent=1)
    if kind < 0.3:  # a field that comes twice
        lines = text.splitlines()
        at = random.randrange(len(lines))
        text = "\n".join([*lines[: at + 1], *lines[at:]])
    if kind > 0.95:
        text = text.replace("e", "\\ud800", 1)
    return text.encode("utf-8", "surrogatepass")


def broken_yaml(values: Any, random: random.Random) -> bytes:
    """Return YAML with broken values, odd syntax or broken bytes."""
    kind = random.random()
    text = yaml.safe_dump(values if kind < 0.25 else broken_values(values, random))
    if kind < 0.1:
        return broken_bytes(text.encode(), random)
    if kind < 0.25:
        odd = (
            "\t- x", "a: &a [*a]", "<<: {a: 1}", "!!python/object:os.system {}", "? [a]\n: b",
            "a: b: c", "---\n...\n---", "%YAML 9.9\n---", "a: !!binary x", "1: 2", "null: 3", "'",
            "a: !!timestamp x", "a: " + "[" * 2000, "a: 1_0:90", "? ", "a: |\n\x07", "name: x",
            "2026-01-01: x", "{}: x", "a: 0o9", "a: !!float x", "a: !!int 0x", "*x", "true: x",
        )  # fmt: skip
        lines = text.splitlines()
        lines.insert(random.randrange(len(lines) + 1), random.choice(odd))
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


def broken_lines(data: bytes, random: random.Random) -> bytes:
    """Return a text file with broken lines, another encoding or broken bytes."""
    kind = random.random()
    if kind < 0.2:
        return broken_bytes(data, random)
    if kind < 0.35:
        coding = random.choice(("utf-16", "utf-8-sig", "utf-32", "cp037", "utf-16-be"))
        return data.decode().encode(coding)
    lines = data.splitlines()
    odd = (
        b"", b"\0", b",", b",,,,,,", b'"', b'"a', b"\xe9t\xe9.png", b"/etc/passwd", b"../../x.png",
        b"C:\\photos\\a.png", b"a" * 200_000, b"#", b"{}", b"[]", b'{"path": 1}', b'{"path": null}',
        b"s3://b/a.png", b"http://127.0.0.1:9/a.png", b"\xff\xfe", b"NaN", b"path,path", b"\r",
        b"file:///etc/hostname", b".", b"..", b"~", b"a.png,train,val", b'{"path": "\\ud800"}',
        b'{"path": "a\\u0000.png"}', b"\x1a", b"\xc2\x85", b"split", b"1e999",
    )  # fmt: skip
    for _ in range(random.choice((1, 2, 5))):
        at = random.randrange(len(lines) + 1)
        match random.randrange(4):
            case 0:
                lines.insert(at, random.choice(odd))
            case 1 if lines:
                lines[at - 1] = random.choice(odd)
            case 2 if lines:
                lines[at - 1] = broken_bytes(lines[at - 1], random)
            case _ if lines:
                lines.insert(at, random.choice(lines))
    return random.choice((b"\n", b"\n", b"\r\n", b"\r")).join(lines)


def broken_table(data: bytes, random: random.Random) -> bytes:
    """Return a Parquet file with broken bytes, or a readable one with other columns or values."""
    if random.random() < 0.4:
        return broken_bytes(data, random)
    table = pq.read_table(io.BytesIO(data))
    for _ in range(random.choice((1, 1, 2))):
        table = _other_table(table, random)
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def _other_table(table: pa.Table, random: random.Random) -> pa.Table:
    if not table.num_columns:
        return table
    at = random.randrange(table.num_columns)
    name, count = table.column_names[at], table.num_rows
    match random.randrange(7):
        case 0:
            return table.remove_column(at)
        case 1:
            return table.slice(0, 0)
        case 2:
            return pa.concat_tables([table, table])
        case 3:
            return table.append_column(random.choice((name, "x", "", "path")), table[at])
        case 4:
            other = random.choice(table.column_names)
            names = [other if each == name else each for each in table.column_names]
            return table.rename_columns(names)
        case 5:
            values = table[at].to_pylist()
            if values:
                values[random.randrange(count)] = None
            return table.set_column(at, name, pa.array(values, table.schema.field(at).type))
        case _:
            odd = [
                pa.nulls(count), pa.array([-1] * count), pa.array([2**62] * count),
                pa.array([float("nan")] * count), pa.array(["../../x"] * count),
                pa.array([b"\xff\0"] * count), pa.array([[1]] * count),
                pa.array([{"a": 1}] * count), pa.array([True] * count),
                pa.array([""] * count), pa.array(["a\0b"] * count),
            ]  # fmt: skip
            return table.set_column(at, name, random.choice(odd))
