"""A prefix of an S3 bucket as a store.

Every request goes through `_call`, the only place that tries again: botocore's own retries end at
the answer's first byte, share one quota among threads, and hide whether a conditional write was
sent twice. Credentials come from the standard chain only.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from data_prep.core.errors import StorageError, storage_error
from data_prep.core.progress import say
from data_prep.core.storage.range_reader import RangeReader
from data_prep.core.storage.s3_errors import (
    BrokenAnswerError,
    code_of,
    explain,
    is_unreachable,
    may_pass,
    s3_errors,
    status_of,
)
from data_prep.core.storage.store import Entry, checked_key

ATTEMPTS = 10  # of one request: half a minute of waiting on average, a minute at most
ATTEMPTS_UNREACHED = 4  # while no server has answered yet: most likely the address is wrong
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 20.0
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0  # between two pieces of an answer
BLOCK = 256 << 10  # bytes read from the network at once; a broken answer goes on after the last
PART = 16 << 20  # bytes; more than this is sent in parts, and read again part by part on failure
PARTS_AT_ONCE = 4  # so that an upload holds at most 64 MiB
MOST_PARTS = 10_000  # a limit of S3

_PROBE = ".probe-"
_WRITER = "writer"  # name of the mark that every conditional write carries
# AWS compares the tag as it is given out, in quotes; Ceph, on writing, only without them.
_TAG_FORMS = ('"{}"', "{}")
_UNKNOWN_CONDITION = {"NotImplemented", "501", "InvalidArgument", "InvalidRequest", "BadRequest"}
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Conditions:
    """What a server honours: If-None-Match on writing, and the form of If-Match that it compares
    (None: none)."""

    create: bool
    replace: str | None


class S3Store:
    """A prefix of a bucket. Safe to use from several threads, and to send to other processes.

    `create` and `replace` are conditional requests (If-None-Match, If-Match) where the server
    honours them, which is found out before the first one. Where it does not, they look first and
    write then, which is safe for one runner at a time; a warning says so.
    """

    def __init__(self, bucket: str, prefix: str, patience: float = 0.0) -> None:
        self.bucket, self.prefix, self.patience = bucket, prefix, patience
        self.uri = f"s3://{posixpath.join(bucket, prefix)}".rstrip("/")
        self._reached = False  # whether the server has ever answered
        self._warned = False  # since it last did
        self._honoured: _Conditions | None = None  # None: not asked yet
        self._client: Any = None
        self._lock = threading.RLock()

    @property
    def local_folder(self) -> None:
        return None

    @property
    def label(self) -> str:
        return self.uri

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_lock": None}  # neither survives pickling

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def client(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _new_client()
            return self._client

    def open(self, key: str) -> BinaryIO:
        head = self._head(key)
        fetch = partial(self._read_part, key, tag=head["ETag"])
        return cast(BinaryIO, RangeReader(fetch, head["ContentLength"]))

    def read(self, key: str) -> bytes:
        return self.read_tagged(key)[0]

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        if size == 0:
            self._head(key)  # for its FileNotFoundError
            return b""
        return self._read_part(key, offset, size)

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        into = io.BytesIO()
        tag = self._receive(key, into)
        return into.getvalue(), tag

    def download(self, key: str, path: Path) -> None:
        partial_file = path.with_name(f"{path.name}.part")
        try:
            with partial_file.open("w+b") as file:
                self._receive(key, file)
            os.replace(partial_file, path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error(error, str(path)) from error
        finally:
            partial_file.unlink(missing_ok=True)

    def entry(self, key: str) -> Entry:
        """Return the object's entry, as `list` would. Raises FileNotFoundError."""
        head = self._head(key)
        return Entry(key, head["ContentLength"], head["ETag"])

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        start = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(prefix):
            for item in page.get("Contents", []):  # S3 lists in key order
                key = item["Key"][start:]
                # A name that ends in a slash marks a "folder" and is no object of ours.
                name = posixpath.basename(key)
                if name and not name.startswith(_PROBE):
                    yield Entry(key, item["Size"], item["ETag"])

    def folders(self, prefix: str = "") -> Iterator[str]:
        start = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(prefix, Delimiter="/"):
            for item in page.get("CommonPrefixes", []):
                yield item["Prefix"][start:].rstrip("/")

    def _pages(self, prefix: str, **more: str) -> Iterator[dict[str, Any]]:
        """The answers to the requests that list what is under the folder `prefix`."""
        top = posixpath.join(self.prefix, checked_key(prefix) if prefix else "").strip("/")
        # botocore asks for the names URL-encoded, and decodes them: any character survives.
        request = {"Bucket": self.bucket, "Prefix": f"{top}/" if top else "", **more}
        while True:
            page = self._call(prefix, lambda: self.client.list_objects_v2(**request))
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def write(self, key: str, data: bytes) -> None:
        if len(data) > PART:
            self._put_parts(key, len(data), lambda at, size: data[at : at + size])
        else:
            self._put(key, data)

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > PART:
                self._put_parts(key, size, lambda at, size: os.pread(file.fileno(), size, at))
            else:
                self._put(key, file.read())

    def create(self, key: str, data: bytes) -> str | None:
        if self._conditions().create:
            return self._put_if(key, data, IfNoneMatch="*")
        return None if self.exists(key) else self._put(key, data)

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        form = self._conditions().replace
        if form is not None:
            return self._put_if(key, data, IfMatch=form.format(tag.strip('"')))
        return self._put(key, data) if self._tag(key) == tag else None

    def delete(self, key: str) -> None:
        at = self._at(key)
        self._call(key, lambda: self.client.delete_object(**at))

    # Single requests

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": posixpath.join(self.prefix, checked_key(key))}

    def _head(self, key: str) -> Any:
        at = self._at(key)
        return self._call(key, lambda: self.client.head_object(**at))

    def _tag(self, key: str) -> str:
        """The object's tag, empty where it is absent."""
        try:
            return str(self._head(key)["ETag"])
        except FileNotFoundError:
            return ""

    def _put(self, key: str, data: bytes) -> str:
        at = self._at(key)
        return str(self._call(key, lambda: self.client.put_object(**at, Body=data))["ETag"])

    def _put_if(self, key: str, data: bytes, **condition: str) -> str | None:
        """The new tag, or None where the condition does not hold."""
        at = self._at(key)
        mark = {_WRITER: secrets.token_hex(8)}
        sent = 0

        def attempt() -> str | None:
            nonlocal sent
            sent += 1
            try:
                answer = self.client.put_object(**at, Body=data, Metadata=mark, **condition)
                return str(answer["ETag"])
            except s3_errors() as error:
                # 404 on If-Match: the object is gone.
                gone = code_of(error) in ("NoSuchKey", "404") and "IfMatch" in condition
                if gone or status_of(error) == 412:
                    return None
                raise

        tag = self._call(key, attempt)
        if tag is None and sent > 1:
            # An earlier attempt may have been done and only its answer lost: the mark tells.
            try:
                there = self._head(key)
            except FileNotFoundError:
                return None
            return str(there["ETag"]) if there.get("Metadata") == mark else None
        return tag

    def _conditions(self) -> _Conditions:
        with self._lock:
            if self._honoured is None:
                self._honoured = self._probe()
                if not self._honoured.create or self._honoured.replace is None:
                    say(
                        f"warning: the S3 server of {self.uri} does not honour conditional writes:"
                        " two runners at the same time are not kept apart, start only one."
                    )
            return self._honoured

    def _probe(self) -> _Conditions:
        """Which conditions the server honours, asked with an object of its own.

        Raises StorageError where nothing can be written at all.
        """
        key = f"{_PROBE}{secrets.token_hex(8)}"
        at = self._at(key)

        def accepts(**condition: str) -> bool | None:
            """Whether it writes under the condition; None if it knows no such condition."""

            def attempt() -> bool | None:
                try:
                    self.client.put_object(**at, Body=b"", **condition)
                except s3_errors() as error:
                    if status_of(error) == 412:
                        return False
                    if status_of(error) in (400, 501) and code_of(error) in _UNKNOWN_CONDITION:
                        return None
                    raise
                return True

            return self._call(key, attempt)

        def compares(form: str) -> bool:
            same, other = form.format(tag), form.format("0" * len(tag))
            return accepts(IfMatch=same) is True and accepts(IfMatch=other) is False

        tag = self._put(key, b"").strip('"')
        try:
            return _Conditions(
                create=accepts(IfNoneMatch="*") is False,
                replace=next((form for form in _TAG_FORMS if compares(form)), None),
            )
        finally:
            try:
                self.delete(key)
            except StorageError:  # no right to delete: it is empty, and listings leave it out
                pass

    # Bodies

    def _read_part(self, key: str, offset: int, size: int, tag: str = "") -> bytes:
        into = io.BytesIO()
        self._receive(key, into, offset, size, tag)
        return into.getvalue()

    def _receive(
        self, key: str, into: BinaryIO, start: int = 0, size: int | None = None, tag: str = ""
    ) -> str:
        """Put the object's bytes from `start`, all or at most `size` of them, into an empty file.

        Returns the object's tag. With `tag` given it must be that one still. An answer that breaks
        off is taken up where it broke; one that a change of the object overtakes starts again.
        """
        at = self._at(key)
        given = tag
        position = start
        stop = None if size is None else start + size  # None: not known yet

        def attempt() -> None:
            nonlocal position, stop, tag
            begun = position
            request = dict(at)
            if tag:
                request["IfMatch"] = tag
            if position or stop is not None:
                request["Range"] = f"bytes={position}-{'' if stop is None else stop - 1}"
            try:
                answer = self.client.get_object(**request)
                tag = answer["ETag"]
                end = self._end(key, answer, position)
                stop = end if stop is None or (end is not None and end < stop) else stop
                with closing(answer["Body"]) as body:
                    while stop is None or position < stop:
                        block = body.read(BLOCK if stop is None else min(BLOCK, stop - position))
                        if not block:
                            break
                        into.write(block)
                        position += len(block)
                if stop is not None and position < stop:
                    raise BrokenAnswerError("it ended early")
                stop = position
                return
            except s3_errors() as error:
                status = status_of(error)
                if status not in (412, 416):
                    if position - begun < BLOCK or not may_pass(error):
                        raise
                    return  # the next attempt goes on from here, with full patience
            if status == 416 and begun == start:
                stop = position  # the range begins beyond the end
            elif given:
                raise StorageError(
                    f"{self._where(key)} was changed while it was read: run the same command again."
                )
            else:
                position, tag = start, ""
                stop = None if size is None else start + size
                into.seek(0)
                into.truncate()
                raise BrokenAnswerError("the object was changed meanwhile")

        while stop is None or position < stop:
            self._call(key, attempt)
        return tag

    def _put_parts(self, key: str, size: int, part: Callable[[int, int], bytes]) -> None:
        """Write `size` bytes, of which `part(offset, size)` gives a part, as a multipart upload."""
        at = self._at(key)
        length = max(PART, -(-size // MOST_PARTS))
        started = self._call(key, lambda: self.client.create_multipart_upload(**at))
        upload = {**at, "UploadId": started["UploadId"]}

        def send(offset: int) -> str:
            body = part(offset, length)
            if len(body) != min(length, size - offset):
                raise StorageError(
                    f"what is stored as {self._where(key)} became shorter meanwhile: run the same"
                    " command again."
                )
            number = offset // length + 1
            request = {**upload, "PartNumber": number, "Body": body}
            return str(self._call(key, lambda: self.client.upload_part(**request))["ETag"])

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                tags = list(pool.map(send, range(0, size, length)))
            self._complete(key, upload, tags)
        except BaseException:
            try:
                self.client.abort_multipart_upload(**upload)
            except Exception:  # what went wrong first is what is told
                pass
            raise

    def _complete(self, key: str, upload: dict[str, Any], tags: Sequence[str]) -> None:
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, start=1)]
        sent = 0

        def attempt() -> None:
            nonlocal sent
            sent += 1
            # Where only the answer to an earlier attempt was lost, the upload is done and unknown.
            if sent > 1 and self._tag(key) == _tag_of_parts(tags):
                return
            self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

        self._call(key, attempt)

    # Trying again

    def _call(self, key: str, attempt: Callable[[], _Result]) -> _Result:
        """What `attempt` returns, which is tried again while its failure may pass.

        Waits grow exponentially with full jitter. Raises FileNotFoundError or StorageError.
        """
        failures, start = 0, time.monotonic()
        while True:
            try:
                result = attempt()
            except s3_errors() as error:
                failures += 1
                self._reached = self._reached or status_of(error) > 0
                few = is_unreachable(error) and not self._reached
                told: Exception | None = None
                often = failures >= (ATTEMPTS_UNREACHED if few else ATTEMPTS)
                if often or not may_pass(error):
                    told = explain(error, self._where(key), self.bucket, self._server())
                if told and may_pass(error) and time.monotonic() - start < self.patience:
                    self._warn(f"{told} It is tried on for {self.patience / 60:.0f} minutes.")
                    told = None
            else:
                self._reached, self._warned = True, False
                return result
            if told is not None:
                raise told  # out here it carries no chain: what the libraries say stays unseen
            longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (failures - 1))
            time.sleep(secrets.SystemRandom().uniform(0.0, longest))  # differs in forked processes

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            say(f"warning: {text}")

    def _end(self, key: str, answer: Any, position: int) -> int | None:
        """Where the object of an answer to a GET from `position` ends; None if it does not say."""
        span = answer.get("ContentRange")  # "bytes 5-9/100"
        if span is None and position == 0:
            length: int | None = answer.get("ContentLength")
            return length
        first, _, total = str(span).removeprefix("bytes ").partition("/")
        if first.partition("-")[0] != str(position):
            raise StorageError(
                f"{self._where(key)}: the S3 server does not honour range reads: use another one."
            )
        return int(total) if total.isdecimal() else None

    def _where(self, key: str) -> str:
        """The object's URI on one line."""
        return "".join(c if c.isprintable() else "?" for c in f"{self.uri}/{key}".rstrip("/"))

    def _server(self) -> str:
        """The server's host and port, without anything else that its address may hold."""
        address = urlsplit(self.client.meta.endpoint_url)
        return f"{address.hostname}:{address.port}" if address.port else str(address.hostname)


def _new_client() -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},  # `_call` tries again
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=32,
        tcp_keepalive=True,
        # Servers other than AWS refuse or mangle the newer default checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:  # ValueError: the address is none
        reason = type(error).__name__
    raise StorageError(
        f"the AWS settings cannot be used ({reason}): check AWS_ENDPOINT_URL (http://host:port),"
        " AWS_PROFILE, the credentials and ~/.aws."
    )


def _tag_of_parts(tags: Sequence[str]) -> str:
    """The tag of a finished multipart upload, as AWS and Ceph make it from those of its parts."""
    try:
        digests = b"".join(bytes.fromhex(tag.strip('"')) for tag in tags)
    except ValueError:  # encrypted in a way that makes other tags
        return ""
    return f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(tags)}"'
