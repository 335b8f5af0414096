"""The stage: skip it if it is committed, resume it if it was started, commit at the end.

A stage's folder is named by its request digest, so the same request always uses the same folder.
`manifest.json` is written last. Without it the stage is not committed, and leftover files are
checked and reused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.core import digest
from data_prep.core.errors import PipelineError
from data_prep.core.lease import HEARTBEAT_S, Lease
from data_prep.core.manifest import (
    FORMAT,
    FileRecord,
    InputRef,
    Manifest,
    StageRef,
    content_digest,
    read_head,
    reference,
)
from data_prep.core.paths import lease_key, manifest_key
from data_prep.core.storage.store import Store


@dataclass(frozen=True)
class Request:
    """A request for a stage: everything that decides its output.

    Attributes:
        stage: name of the stage, such as "images".
        name: name of the dataset, run or model.
        top: the folder under the root that contains the stage's folder ("images/demo").
        settings: the part of the config that changes the output, and nothing else.
        inputs: the committed stages it is made from, by role.
        sources: content digests of inputs without a stage (raw data, weight files), by role.
        slug: text in front of the digest in the folder's name.
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
        """Return the request digest."""
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
        """Return the key of the stage's folder."""
        return f"{self.top}/{self.slug}{self.digest[: digest.SHORT]}"

    def draft(self) -> Manifest:
        """Return the manifest before the commit, without files, summary and content digest."""
        return Manifest(
            stage=self.stage,
            name=self.name,
            folder=self.folder,
            request_digest=self.digest,
            content_digest="",
            settings=dict(self.settings),
            inputs={
                role: InputRef(ref.stage, ref.folder, ref.request_digest, ref.content_digest)
                for role, ref in self.inputs.items()
            },
            sources=dict(self.sources),
            files=[],
            summary={},
            created="",
            seconds=0.0,
        )


@dataclass(frozen=True)
class Work:
    """The tools of a stage's build function, which writes files under `folder`."""

    store: Store
    folder: str
    request: Request
    lease: Lease

    def key(self, path: str) -> str:
        """Return the key of a path in the stage's folder."""
        return f"{self.folder}/{path}"


@dataclass(frozen=True)
class Produced:
    """The result of a build function: its files, and figures worth showing."""

    files: list[FileRecord]
    summary: dict[str, Any]


def run_stage(
    store: Store,
    request: Request,
    build: Callable[[Work], Produced],
    interval: float = HEARTBEAT_S,
) -> StageRef:
    """Return the committed stage for `request`; build it if it is not committed.

    One runner builds, the others wait for its result. An error of `build` passes through, and
    nothing is committed. The next call finds the files of this one in the same folder.

    Args:
        store: the root.
        request: what to build.
        build: builds it. Its loops call `check_leases`, which ends a build that lost the lease.
        interval: of the lease, in seconds; see `Lease`.
    """
    start = time.monotonic()
    key = manifest_key(request.folder)

    def done() -> bool:
        return store.exists(key)

    if done():
        return _skipped(store, request, start)
    with Lease(store, lease_key(request.folder), done=done, interval=interval) as lease:
        if not lease.held or done():
            return _skipped(store, request, start)
        produced = build(Work(store, request.folder, request, lease))
        files = sorted(produced.files, key=lambda f: f.path)
        seconds = time.monotonic() - start
        manifest = replace(
            request.draft(),
            content_digest=content_digest(files),
            files=files,
            summary=produced.summary,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=round(seconds, 3),
        )
        lease.check()
        if store.create(key, manifest.to_bytes()) is None:
            return _skipped(store, request, start)
    return reference(manifest, seconds, skipped=False)


def find_committed(store: Store, request: Request) -> StageRef | None:
    """Return the committed stage for `request`, or None if it is not committed."""
    if not store.exists(manifest_key(request.folder)):
        return None
    return _skipped(store, request, time.monotonic())


def _skipped(store: Store, request: Request, start: float) -> StageRef:
    manifest = read_head(store, request.folder)
    if manifest.request_digest != request.digest:
        raise PipelineError(
            f"{store.label}/{manifest_key(request.folder)} was altered: it has another request"
            " digest. Delete its folder and run the stage again."
        )
    return reference(manifest, time.monotonic() - start, skipped=True)
