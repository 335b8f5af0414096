"""The manifest: the record of a committed stage.

`manifest.json` names the files of a stage, their hashes, and the stages they were made from. It is
written last. A stage without a manifest is not committed.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from data_prep.core import digest
from data_prep.core.errors import PipelineError
from data_prep.core.paths import manifest_key
from data_prep.core.record import known_fields, parse_json
from data_prep.core.storage.store import Store

FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = 256 << 10  # bytes of a manifest's start and of its end
# How `Manifest.to_bytes` begins and ends the list of files. No text in JSON holds a line break.
_FILES, _SUMMARY = b'\n "files": [', b'\n ],\n "summary": '
_ADVICE = "Delete its folder and run the stage again"


@dataclass(frozen=True)
class FileRecord:
    """A file that a stage made.

    Attributes:
        path: relative to the stage's folder; `../` leads to a file of an earlier version.
        size: in bytes.
        sha256: of the file's bytes, 64 hexadecimal digits.
        content: whether the file counts in the content digest. Files that hold times or
            fingerprints do not.
        samples: the number of samples in a tar. Training plans its order from these counts before
            it opens a shard. None for other files and in older manifests.
    """

    path: str
    size: int
    sha256: str
    content: bool = True
    samples: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON, without unknown values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> FileRecord:
        """Read a record; ignore fields of newer versions. Raise ValueError if it is damaged."""
        record = cls(**known_fields(cls, found))
        valid = (
            isinstance(record.path, str)
            and type(record.size) is int
            and isinstance(record.sha256, str)
            and _SHA256.fullmatch(record.sha256) is not None
            and isinstance(record.content, bool)
            and (record.samples is None or type(record.samples) is int)
        )
        if not valid:
            raise ValueError(record)
        return record


@dataclass(frozen=True)
class InputRef:
    """An input of a stage: the committed stage that its manifest names."""

    stage: str
    folder: str  # key of the stage's folder under the root
    request_digest: str
    content_digest: str

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> InputRef:
        """Read an input; ignore fields of newer versions. Raise ValueError if it is damaged."""
        ref = cls(**known_fields(cls, found))
        if not all(isinstance(value, str) for value in asdict(ref).values()):
            raise ValueError(ref)
        return ref


@dataclass(frozen=True)
class StageRef:
    """Reference to a committed stage: small, JSON, and enough for the next stage."""

    stage: str
    name: str
    folder: str  # key of the stage's folder under the root
    request_digest: str
    content_digest: str
    seconds: float  # the time of this call
    skipped: bool  # whether the stage was committed before this call
    summary: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the reference as JSON."""
        return asdict(self)


class MissingFactError(PipelineError, KeyError):
    """A manifest lacks a field: a KeyError for readers that can do without it."""

    def __str__(self) -> str:
        """Return the sentence, which a KeyError would show as a Python string."""
        return str(self.args[0])


class Facts(dict[str, Any]):
    """The settings or the summary of a manifest that was read: a missing field is damage."""

    def __missing__(self, name: str) -> Any:
        raise MissingFactError(
            f"a manifest was altered: it has no {name} where it is needed. Run `dpnet verify` on"
            " the root to find it, and restore the file."
        )


@dataclass(frozen=True)
class ManifestHead:
    """A manifest without its files, as `read_head` returns it. `Manifest` has the attributes."""

    stage: str
    name: str
    folder: str
    request_digest: str
    content_digest: str
    settings: dict[str, Any]
    inputs: dict[str, InputRef]
    sources: dict[str, str]
    summary: dict[str, Any]
    created: str
    seconds: float


@dataclass(frozen=True)
class Manifest:
    """The record of a committed stage: its request, and what it made.

    Attributes:
        folder: key of the stage's folder under the root.
        settings: the part of the config that changes the output.
        inputs: the committed stages it was made from, by role.
        sources: content digests of inputs that have no stage (raw data, weight files), by role.
        files: its files, sorted by path.
        summary: figures worth showing.
        created: time of the commit, in UTC ("2026-01-31T12:00:00Z").
        seconds: duration of the build.
    """

    stage: str
    name: str
    folder: str
    request_digest: str
    content_digest: str
    settings: dict[str, Any]
    inputs: dict[str, InputRef]
    sources: dict[str, str]
    files: list[FileRecord]
    summary: dict[str, Any]
    created: str
    seconds: float
    format: int = FORMAT

    def head(self) -> ManifestHead:
        """Return everything but the files."""
        return ManifestHead(
            **{each.name: getattr(self, each.name) for each in fields(ManifestHead)}
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        return {
            "format": self.format,
            "stage": self.stage,
            "name": self.name,
            "folder": self.folder,
            "request_digest": self.request_digest,
            "content_digest": self.content_digest,
            "settings": self.settings,
            "inputs": {role: asdict(ref) for role, ref in self.inputs.items()},
            "sources": self.sources,
            "files": [file.to_json() for file in self.files],
            "summary": self.summary,
            "created": self.created,
            "seconds": self.seconds,
        }

    def to_bytes(self) -> bytes:
        """Return the bytes of `manifest.json`."""
        return json.dumps(self.to_json(), indent=1).encode()

    @classmethod
    def from_json(cls, found: Any) -> Manifest:
        """Read the content of `manifest.json`; ignore fields of newer versions.

        Raises:
            ValueError: it has another format number, or is not a whole manifest. The message
                continues the sentence that begins with the file's name.
        """
        if isinstance(found, dict) and isinstance(number := found.get("format"), int):
            if number != FORMAT:
                raise ValueError(
                    f"has format {number}, this version reads {FORMAT}. Use the version of dpnet"
                    " that wrote it, or build the stage again"
                )
            try:
                return cls._read(found)
            except (KeyError, TypeError, AttributeError, ValueError):
                pass
        raise ValueError(f"was altered: it is not a whole manifest. {_ADVICE}")

    @classmethod
    def _read(cls, found: Mapping[str, Any]) -> Manifest:
        manifest = cls(
            **known_fields(cls, found)
            | {name: _facts(found[name]) for name in ("settings", "summary")}
            | {
                "inputs": {r: InputRef.from_json(ref) for r, ref in found["inputs"].items()},
                "files": [FileRecord.from_json(file) for file in found["files"]],
            }
        )
        texts = ("stage", "name", "folder", "request_digest", "content_digest", "created")
        wrong = [name for name in texts if not isinstance(getattr(manifest, name), str)]
        mappings = ("settings", "sources", "summary")
        wrong += [name for name in mappings if not isinstance(getattr(manifest, name), dict)]
        if wrong or not isinstance(manifest.seconds, int | float):
            raise ValueError(wrong)
        return manifest


def _facts(value: Any) -> Any:
    """Return nested JSON values with each object as `Facts`."""
    if isinstance(value, dict):
        return Facts({name: _facts(each) for name, each in value.items()})
    return [_facts(each) for each in value] if isinstance(value, list) else value


def content_digest(files: Iterable[FileRecord]) -> str:
    """Return the digest of a stage's files.

    A file of an earlier version counts by its bare name: the same shards are the same content,
    whichever version holds them.
    """
    return digest.content_digest(
        (posixpath.basename(f.path) if f.path.startswith("../") else f.path, f.sha256)
        for f in files
        if f.content
    )


def read_manifest(store: Store, folder: str) -> Manifest:
    """Read the manifest of a committed stage. Raise PipelineError if it is absent or damaged."""
    where = f"{store.label}/{manifest_key(folder)}"
    try:
        data = store.read(manifest_key(folder))
    except FileNotFoundError:
        raise PipelineError(f"{where} is missing: that stage was never finished.") from None
    try:
        found = parse_json(data)
    except ValueError:
        found = None
    try:
        manifest = Manifest.from_json(found)
    except ValueError as error:
        raise PipelineError(f"{where} {error}.") from None
    if manifest.folder != folder:
        raise PipelineError(
            f"{where} was altered: it names the folder {manifest.folder}. {_ADVICE}."
        )
    return manifest


def read_head(store: Store, folder: str) -> ManifestHead:
    """Read a manifest without its list of files, which may have tens of megabytes.

    Only the first and the last part of a large manifest are read. Damage between them is not
    noticed: `read_manifest` notices it. Raises PipelineError as `read_manifest` does.
    """
    try:
        with store.open(manifest_key(folder)) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            start = file.read(_PART) if size > 2 * _PART else b""
            file.seek(max(0, size - _PART))
            end = file.read(_PART) if start else b""
    except FileNotFoundError:
        start = end = b""
    before, found, _ = start.partition(_FILES)
    _, found_end, after = end.rpartition(_SUMMARY)
    if found and found_end:
        try:
            text = before + _FILES + b"]," + _SUMMARY.lstrip(b"\n ],") + after
            manifest = Manifest.from_json(parse_json(text))
            if manifest.folder == folder:
                return manifest.head()
        except ValueError:
            pass
    return read_manifest(store, folder).head()


def load_reference(store: Store, folder: str) -> StageRef:
    """Return a reference to the stage committed in `folder`."""
    return reference(read_head(store, folder), 0.0, skipped=True)


def reference(manifest: Manifest | ManifestHead, seconds: float, *, skipped: bool) -> StageRef:
    """Return a reference to the stage of `manifest`; `seconds` is the time of this call."""
    return StageRef(
        stage=manifest.stage,
        name=manifest.name,
        folder=manifest.folder,
        request_digest=manifest.request_digest,
        content_digest=manifest.content_digest,
        seconds=seconds,
        skipped=skipped,
        summary=manifest.summary,
    )
