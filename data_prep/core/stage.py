"""The stage: skip what is done, take up what was begun, commit at the end.

A stage's folder is named by its request digest, so the same request always lands on the same
folder. `manifest.json` is written last: without it the stage did not happen, whatever lies there.
"""

from __future__ import annotations

import json
import posixpath
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.core import digest
from data_prep.core.errors import PipelineError
from data_prep.core.lease import Lease
from data_prep.core.storage.store import Store

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """A file that a stage made, its path relative to the stage's folder (`../` leads to one of an
    earlier version).

    `content` says whether it counts in the content digest: files that hold times or fingerprints
    do not. `samples` is how many samples a tar has: the order of training is made of these counts
    before any shard is opened.
    """

    path: str
    size: int
    sha256: str
    content: bool = True
    samples: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class StageRef:
    """Reference to a committed stage: small, JSON, and all that the next stage needs."""

    stage: str
    name: str
    folder: str  # key of the stage's folder under the root
    request_digest: str
    content_digest: str
    seconds: float  # this call's own time
    skipped: bool  # whether it was there already
    summary: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """What is asked of a stage.

    `settings` is the part of the config that changes the output, nothing else. `inputs` are
    committed stages; `sources` are content digests of what has no stage (raw data, weight files).
    `top` is the folder under the root ("images/demo"); `slug` goes before the digest in the name.
    """

    stage: str
    name: str
    top: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, StageRef] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    slug: str = ""

    @property
    def digest(self) -> str:
        return digest.sha256_json(
            {
                "stage": self.stage,
                "format": FORMAT,
                "settings": dict(self.settings),
                "inputs": {k: v.content_digest for k, v in self.inputs.items()},
                "sources": dict(self.sources),
            }
        )

    @property
    def folder(self) -> str:
        return f"{self.top}/{self.slug}{self.digest[: digest.SHORT]}"


@dataclass(frozen=True)
class Work:
    """What a stage's build function works with; `folder` is the key it writes under."""

    store: Store
    folder: str
    request: Request
    lease: Lease

    def key(self, path: str) -> str:
        return f"{self.folder}/{path}"


@dataclass(frozen=True)
class Produced:
    """What a build function made: its files, and figures worth showing."""

    files: list[FileRecord]
    summary: dict[str, Any]


def run_stage(
    store: Store,
    request: Request,
    build: Callable[[Work], Produced],
    say: Callable[[str], None] = lambda message: None,
) -> StageRef:
    """Return the committed stage for `request`, building it unless it is there.

    One runner works, others wait for its result. Raises whatever `build` raises; nothing is
    committed then, and the next call finds what was begun in the same folder.
    """
    start = time.monotonic()
    manifest_key = f"{request.folder}/{MANIFEST}"

    def done() -> bool:
        return store.exists(manifest_key)

    if done():
        return _skipped(store, request, start)
    with Lease(store, f"{request.folder}/lease.json", done=done, waiting=say) as lease:
        if not lease.held or done():
            return _skipped(store, request, start)
        produced = build(Work(store, request.folder, request, lease))
        files = sorted(produced.files, key=lambda f: f.path)
        seconds = time.monotonic() - start
        manifest = {
            "format": FORMAT,
            "stage": request.stage,
            "name": request.name,
            "folder": request.folder,
            "request_digest": request.digest,
            "content_digest": content_digest(files),
            "settings": dict(request.settings),
            "inputs": {
                role: {
                    "stage": ref.stage,
                    "folder": ref.folder,
                    "request_digest": ref.request_digest,
                    "content_digest": ref.content_digest,
                }
                for role, ref in request.inputs.items()
            },
            "sources": dict(request.sources),
            "files": [f.to_json() for f in files],
            "summary": produced.summary,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 3),
        }
        lease.check()
        if store.create(manifest_key, json.dumps(manifest, indent=1).encode()) is None:
            return _skipped(store, request, start)
    return _reference(manifest, seconds, skipped=False)


def content_digest(files: Iterable[FileRecord]) -> str:
    """Digest of what a stage made. A file of an earlier version that it refers to counts by its
    name alone: the same shards are the same content whichever version holds them."""
    return digest.content_digest(
        (posixpath.basename(f.path) if f.path.startswith("../") else f.path, f.sha256)
        for f in files
        if f.content
    )


def read_manifest(store: Store, folder: str) -> dict[str, Any]:
    """The manifest of a committed stage. Raises PipelineError if absent or unreadable."""
    where = f"{store.uri}/{folder}/{MANIFEST}"
    try:
        manifest = json.loads(store.read(f"{folder}/{MANIFEST}"))
    except FileNotFoundError:
        raise PipelineError(f"{where} is missing: that stage was never finished.") from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("folder") != folder:
        raise PipelineError(f"{where} was altered: delete its folder and run the stage again.")
    if manifest.get("format") != FORMAT:
        raise PipelineError(
            f"{where} has format {manifest.get('format')!r}, this version reads {FORMAT}:"
            " use the version of dpnet that wrote it, or build the stage again."
        )
    return manifest


def load_reference(store: Store, folder: str) -> StageRef:
    """Reference to the stage committed in `folder`."""
    return _reference(read_manifest(store, folder), 0.0, skipped=True)


def _skipped(store: Store, request: Request, start: float) -> StageRef:
    manifest = read_manifest(store, request.folder)
    if manifest["request_digest"] != request.digest:
        raise PipelineError(
            f"{store.uri}/{request.folder}/{MANIFEST} answers another request: it was altered;"
            " delete its folder and run the stage again."
        )
    return _reference(manifest, time.monotonic() - start, skipped=True)


def _reference(manifest: Mapping[str, Any], seconds: float, *, skipped: bool) -> StageRef:
    return StageRef(
        stage=manifest["stage"],
        name=manifest["name"],
        folder=manifest["folder"],
        request_digest=manifest["request_digest"],
        content_digest=manifest["content_digest"],
        seconds=seconds,
        skipped=skipped,
        summary=manifest["summary"],
    )
