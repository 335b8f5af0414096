"""A prefix of an S3 bucket as a store."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import posixpath
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from data_prep.core.errors import StorageError, storage_error
from data_prep.core.storage.range_reader import RangeReader
from data_prep.core.storage.s3_errors import (
    BrokenAnswerError,
    code_of,
    may_pass,
    s3_errors,
    status_of,
)
from data_prep.core.storage.s3_requests import S3Requests
from data_prep.core.storage.store import Entry, checked_key

BLOCK = 256 << 10  # bytes read from the network at once; a broken answer resumes after the last
PART = 16 << 20  # bytes; a larger object is sent in parts, and a failed part is read again
PARTS_AT_ONCE = 4  # so that an upload holds at most 64 MiB
MOST_PARTS = 10_000  # a limit of S3

_PROBE = ".probe-"
_UPLOAD = "?uploadId="  # between the key and the id of an unfinished upload
_WRITER = "writer"  # name of the metadata that every conditional write carries
# For writes, AWS compares the tag in quotes, as it reports it, and Ceph only without quotes.
_TAG_FORMS = ('"{}"', "{}")
_UNKNOWN_CONDITION = {"NotImplemented", "501", "InvalidArgument", "InvalidRequest", "BadRequest"}
log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Conditions:
    """The conditional writes that a server supports."""

    create: bool  # If-None-Match
    replace: str | None  # the form of the tag in If-Match; None if the server ignores If-Match


class S3Store:
    """A prefix of a bucket. Safe to use from several threads and to send to other processes.

    `create` and `replace` send conditional requests (If-None-Match, If-Match). Before the first
    one, the store tests whether the server supports them. If it does not, the store looks first and
    writes then. This is safe for one runner at a time only, and a warning says so.
    """

    def __init__(self, bucket: str, prefix: str, patience: float = 0.0) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{posixpath.join(bucket, prefix)}".rstrip("/")
        self._requests = S3Requests(bucket, patience)
        self._supported: _Conditions | None = None  # None: not tested yet
        self._lock = threading.RLock()

    @property
    def local_folder(self) -> None:
        return None

    @property
    def label(self) -> str:
        return self.uri

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}  # a lock cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def client(self) -> Any:
        """Return boto3's client."""
        return self._requests.client

    def open(self, key: str) -> BinaryIO:
        head = self._head(key)
        fetch = partial(self._read_part, key, tag=head["ETag"])
        return cast(BinaryIO, RangeReader(fetch, head["ContentLength"]))

    def read(self, key: str) -> bytes:
        return self.read_tagged(key)[0]

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        if size == 0:
            self._head(key)  # raises FileNotFoundError
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

    def receive(self, key: str, into: BinaryIO) -> None:
        self._receive(key, into)

    def entry(self, key: str) -> Entry:
        """Return the entry that `list` has for the object. Raises FileNotFoundError."""
        head = self._head(key)
        return Entry(key, head["ContentLength"], head["ETag"], _time(head))

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for entry in self._objects(prefix):
            # Other programs mark a "folder" by an object with a slash at its end.
            name = posixpath.basename(entry.key)
            if name and not name.startswith(_PROBE):
                yield entry

    def leftovers(self, before: float) -> Iterator[Entry]:
        for entry in self._objects(""):
            probe = posixpath.basename(entry.key).startswith(_PROBE)
            if probe and entry.modified is not None and entry.modified < before:
                yield entry
        yield from self._unfinished_uploads(before)

    def _unfinished_uploads(self, before: float) -> Iterator[Entry]:
        """Yield the multipart uploads below the prefix that began before a time."""
        top = f"{self.prefix}/" if self.prefix else ""
        request = {"Bucket": self.bucket, "Prefix": top}
        while True:
            try:
                page = self._call("", lambda: self.client.list_multipart_uploads(**request))
            except StorageError as error:
                # Listing them needs a right of its own, and other servers may not know it.
                log.warning("unfinished multipart uploads are not looked for: %s", error)
                return
            for upload in page.get("Uploads", []):
                begun = upload["Initiated"].timestamp()
                if begun < before and upload["Key"].startswith(top):
                    key = f"{upload['Key'][len(top) :]}{_UPLOAD}{upload['UploadId']}"
                    yield Entry(key, self._uploaded(upload), "", begun)
            if not page.get("IsTruncated"):
                return
            request["KeyMarker"] = page["NextKeyMarker"]
            request["UploadIdMarker"] = page["NextUploadIdMarker"]

    def _uploaded(self, upload: Mapping[str, Any]) -> int:
        """Return the bytes of an unfinished upload, as far as its first 1,000 parts tell."""
        at = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        try:
            page = self._call("", lambda: self.client.list_parts(**at))
        except (StorageError, FileNotFoundError):  # it ended meanwhile
            return 0
        return sum(part["Size"] for part in page.get("Parts", []))

    def delete_leftover(self, key: str) -> None:
        name, mark, upload = key.rpartition(_UPLOAD)
        if not mark:
            self.delete(key)
            return
        at = {**self._at(name), "UploadId": upload}

        def attempt() -> None:
            try:
                self.client.abort_multipart_upload(**at)
            except s3_errors() as error:
                if status_of(error) != 404:  # somebody has ended it
                    raise

        self._call(name, attempt)

    def _objects(self, prefix: str) -> Iterator[Entry]:
        """Yield every object under the folder `prefix`, in the order of their keys."""
        start = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(prefix):
            for item in page.get("Contents", []):  # S3 lists in key order
                yield Entry(item["Key"][start:], item["Size"], item["ETag"], _time(item))

    def folders(self, prefix: str = "") -> Iterator[str]:
        start = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(prefix, Delimiter="/"):
            for item in page.get("CommonPrefixes", []):
                yield item["Prefix"][start:].rstrip("/")

    def _pages(self, prefix: str, **more: str) -> Iterator[dict[str, Any]]:
        """Yield the answers to the requests that list the folder `prefix`."""
        top = posixpath.join(self.prefix, checked_key(prefix) if prefix else "").strip("/")
        # botocore requests URL-encoded names and decodes them, so every character survives.
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

    def delete_if(self, key: str, tag: str) -> bool:
        return False

    def hurried(self, seconds: float) -> S3Store:
        other = S3Store(self.bucket, self.prefix)
        other._requests = S3Requests(self.bucket, 0.0, timeout=seconds)
        other._supported = self._supported
        return other

    # Single requests.

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": posixpath.join(self.prefix, checked_key(key))}

    def _head(self, key: str) -> Any:
        at = self._at(key)
        return self._call(key, lambda: self.client.head_object(**at))

    def _tag(self, key: str) -> str:
        """Return the object's tag; the empty string if the object does not exist."""
        try:
            return str(self._head(key)["ETag"])
        except FileNotFoundError:
            return ""

    def _put(self, key: str, data: bytes) -> str:
        at = self._at(key)
        return str(self._call(key, lambda: self.client.put_object(**at, Body=data))["ETag"])

    def _put_if(self, key: str, data: bytes, **condition: str) -> str | None:
        """Write under a condition; return the new tag, or None if the condition is false."""
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
                # The server answers 404 to If-Match if the object does not exist.
                gone = code_of(error) in ("NoSuchKey", "404") and "IfMatch" in condition
                if gone or status_of(error) == 412:
                    return None
                raise

        tag = self._call(key, attempt)
        if tag is None and sent > 1:
            # Perhaps an earlier attempt succeeded and only its answer was lost. The mark shows it.
            try:
                stored = self._head(key)
            except FileNotFoundError:
                return None
            return str(stored["ETag"]) if stored.get("Metadata") == mark else None
        return tag

    def _conditions(self) -> _Conditions:
        with self._lock:
            if self._supported is None:
                self._supported = self._probe()
                if not self._supported.create or self._supported.replace is None:
                    log.warning(
                        "the S3 server of %s does not support conditional writes: two runners at"
                        " the same time can overwrite each other's work. Start only one.",
                        self.uri,
                    )
            return self._supported

    def _probe(self) -> _Conditions:
        """Find out which conditional writes the server supports, by means of a small object.

        Raises StorageError if nothing can be written at all.
        """
        key = f"{_PROBE}{secrets.token_hex(8)}"
        at = self._at(key)

        def accepts(**condition: str) -> bool | None:
            """Return whether the server writes then; None if it does not know the condition."""

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
            with suppress(StorageError):  # without the right to delete, an empty object remains
                self.delete(key)

    # Reading bodies.

    def _read_part(self, key: str, offset: int, size: int, tag: str = "") -> bytes:
        into = io.BytesIO()
        self._receive(key, into, offset, size, tag)
        return into.getvalue()

    def _receive(
        self, key: str, into: BinaryIO, start: int = 0, size: int | None = None, tag: str = ""
    ) -> str:
        """Copy bytes of an object into an empty file and return the object's tag.

        If the connection breaks, the next request resumes after the last byte. If the object
        changes meanwhile, the copy starts again.

        Args:
            key: The object.
            into: An empty file.
            start: Offset of the first byte in the object.
            size: Most bytes to copy; None for all.
            tag: The tag that the object must still have. Another tag raises StorageError.
        """
        at = self._at(key)
        given = tag
        position = start
        stop = None if size is None else start + size  # None: the size is not known yet

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
                    return  # the next attempt resumes here and may fail as often as the first one
            if status == 416 and begun == start:
                stop = position  # the range begins after the end
            elif given:
                raise StorageError(
                    f"{self._where(key)} was changed while it was read: run the same command again."
                )
            else:
                position, tag = start, ""
                stop = None if size is None else start + size
                into.seek(0)
                into.truncate()
                raise BrokenAnswerError("the object changed while it was read")

        while stop is None or position < stop:
            self._call(key, attempt)
        return tag

    # Writing in parts.

    def _put_parts(self, key: str, size: int, part: Callable[[int, int], bytes]) -> None:
        """Write `size` bytes as a multipart upload; `part(offset, size)` returns some of them."""
        at = self._at(key)
        length = max(PART, -(-size // MOST_PARTS))
        started = self._call(key, lambda: self.client.create_multipart_upload(**at))
        upload = {**at, "UploadId": started["UploadId"]}

        def send(offset: int) -> str:
            body = part(offset, length)
            if len(body) != min(length, size - offset):
                raise StorageError(
                    f"cannot write {self._where(key)}: its source became shorter meanwhile. Run the"
                    " same command again."
                )
            number = offset // length + 1
            request = {**upload, "PartNumber": number, "Body": body}
            return str(self._call(key, lambda: self.client.upload_part(**request))["ETag"])

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                tags = list(pool.map(send, range(0, size, length)))
            self._complete(key, upload, tags)
        except BaseException:
            with suppress(Exception):  # the first failure is the one to report
                self.client.abort_multipart_upload(**upload)
            raise

    def _complete(self, key: str, upload: dict[str, Any], tags: Sequence[str]) -> None:
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, start=1)]
        sent = 0

        def attempt() -> None:
            nonlocal sent
            sent += 1
            # After a lost answer the upload is complete, and the server no longer knows its id.
            if sent > 1 and self._tag(key) == _tag_of_parts(tags):
                return
            self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

        self._call(key, attempt)

    # All requests.

    def _call(self, key: str, attempt: Callable[[], _Result]) -> _Result:
        return self._requests.send(self._where(key), attempt)

    def _end(self, key: str, answer: Any, position: int) -> int | None:
        """Return the object's size, from the answer to a GET from `position`; None if unknown."""
        span = answer.get("ContentRange")  # "bytes 5-9/100"
        if span is None and position == 0:
            length: int | None = answer.get("ContentLength")
            return length
        first, _, total = str(span).removeprefix("bytes ").partition("/")
        if first.partition("-")[0] != str(position):
            raise StorageError(
                f"{self._where(key)}: the S3 server does not support range reads. Use another one."
            )
        return int(total) if total.isdecimal() else None

    def _where(self, key: str) -> str:
        """Return the object's URI on one line."""
        return "".join(c if c.isprintable() else "?" for c in f"{self.uri}/{key}".rstrip("/"))


def _time(answer: Any) -> float | None:
    """Return when an object was written, as the server reports it."""
    written = answer.get("LastModified")
    return written.timestamp() if written is not None else None


def _tag_of_parts(tags: Sequence[str]) -> str:
    """Return the tag that AWS and Ceph give to a multipart upload with these parts."""
    try:
        digests = b"".join(bytes.fromhex(tag.strip('"')) for tag in tags)
    except ValueError:  # some encryption gives other tags
        return ""
    return f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(tags)}"'
