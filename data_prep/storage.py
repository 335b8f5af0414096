"""Object storage: a local folder or an S3 prefix behind one small interface.

Keys are POSIX paths relative to the store. Every write is atomic: a reader sees the old object or
the new one, never a part. `create` and `replace` are conditional (compare-and-swap); leases and
commit markers are built on them. Credentials come from the standard chain only.
"""

from __future__ import annotations

import fcntl
import os
import posixpath
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from data_prep.digest import sha256_bytes
from data_prep.errors import StorageError, storage_error


@dataclass(frozen=True)
class Entry:
    """One object: its key, its size in bytes, and a mark that changes when it is rewritten."""

    key: str
    size: int
    fingerprint: str


class Store(Protocol):
    """What every stage needs of storage. Absent keys raise FileNotFoundError on reading."""

    uri: str

    def read(self, key: str) -> bytes: ...
    def read_range(self, key: str, offset: int, size: int) -> bytes: ...
    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """The object's bytes and the tag that `replace` compares."""

    def download(self, key: str, path: Path) -> None: ...
    def exists(self, key: str) -> bool: ...
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object under the folder `prefix`, sorted by key."""

    def write(self, key: str, data: bytes) -> None: ...
    def upload(self, key: str, path: Path) -> None:
        """Store a local file's bytes under `key`; the file itself stays."""

    def create(self, key: str, data: bytes) -> str | None:
        """Write only if absent: the new tag, or None if the key exists."""

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Write only if the tag is still `tag`: the new tag, or None if it is not."""

    def delete(self, key: str) -> None:
        """Remove the object; absent is fine."""


def open_store(uri: str) -> Store:
    """The store at `s3://bucket/prefix`, `file:///path` or a plain path."""
    parts = urlsplit(uri)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise StorageError(f"{uri!r} names no bucket: write s3://bucket/prefix.")
        return S3Store(parts.netloc, parts.path.strip("/"))
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise StorageError(f"{uri!r} is not a local path: write file:///absolute/path.")
        return LocalStore(Path(unquote(parts.path)))
    if "://" in uri:
        raise StorageError(f"{uri!r} has an unknown scheme: use a path, file:// or s3://.")
    return LocalStore(Path(uri))


def checked_key(key: str) -> str:
    """`key` itself, if it stays inside the store."""
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts or "\\" in key or "\0" in key:
        raise StorageError(f"{key!r} is not a key inside the store.")
    return key


class LocalStore:
    """A folder. `replace` holds a file lock for its compare-and-swap."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.uri = self.folder.as_uri()

    def path(self, key: str) -> Path:
        return self.folder / checked_key(key)

    def read(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        with self.path(key).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        data = self.read(key)
        return data, sha256_bytes(data)

    def download(self, key: str, path: Path) -> None:
        shutil.copyfile(self.path(key), path)

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        top = self.path(prefix) if prefix else self.folder
        found = (Path(folder, name) for folder, _, names in os.walk(top) for name in names)
        for path in sorted(found, key=lambda p: p.relative_to(self.folder).as_posix()):
            if path.name.startswith(_TEMPORARY) or path.name == _LOCK:
                continue
            stat = path.stat()
            key = path.relative_to(self.folder).as_posix()
            yield Entry(key, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")

    def write(self, key: str, data: bytes) -> None:
        with self._staged(key) as (file, path):
            file.write(data)
            _publish(file, path, self.path(key))

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._staged(key) as (file, staged):
            shutil.copyfileobj(source, file, 1 << 20)
            _publish(file, staged, self.path(key))

    def create(self, key: str, data: bytes) -> str | None:
        with self._staged(key) as (file, path):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            try:
                os.link(path, self.path(key))  # atomic, and fails where the key exists
            except FileExistsError:
                return None
        return sha256_bytes(data)

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        with self._locked(key):
            try:
                if self.read_tagged(key)[1] != tag:
                    return None
            except FileNotFoundError:
                return None
            self.write(key, data)
        return sha256_bytes(data)

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    @contextmanager
    def _staged(self, key: str) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file beside `key`, removed afterwards unless it was moved into place."""
        target = self.path(key)
        staged = target.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with staged.open("xb") as file:
                yield file, staged
        except OSError as error:
            raise storage_error(error, str(target)) from error
        finally:
            try:
                staged.unlink(missing_ok=True)
            except OSError:  # the parent is no folder, which is reported above
                pass

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with (self.path(key).parent / _LOCK).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


_TEMPORARY = ".staged-"
_LOCK = ".lock"


def _publish(file: BinaryIO, staged: Path, target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    os.replace(staged, target)


class S3Store:
    """A prefix of a bucket. Conditional writes use If-None-Match and If-Match."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{posixpath.join(bucket, prefix)}".rstrip("/")
        self._client: Any = None

    @property
    def client(self) -> Any:
        if self._client is None:
            import boto3
            from botocore.config import Config

            config = Config(
                retries={"max_attempts": 8, "mode": "standard"},
                connect_timeout=10,
                read_timeout=60,
                # Servers other than AWS refuse or mangle the newer default checksums.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            self._client = boto3.session.Session().client("s3", config=config)
        return self._client

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}  # a client does not survive pickling

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": posixpath.join(self.prefix, checked_key(key))}

    def read(self, key: str) -> bytes:
        return self.read_tagged(key)[0]

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        with self._errors(key):
            span = f"bytes={offset}-{offset + size - 1}"
            data: bytes = self.client.get_object(**self._at(key), Range=span)["Body"].read()
        return data

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        with self._errors(key):
            answer = self.client.get_object(**self._at(key))
            return answer["Body"].read(), answer["ETag"]

    def download(self, key: str, path: Path) -> None:
        with self._errors(key):
            at = self._at(key)
            self.client.download_file(at["Bucket"], at["Key"], str(path))

    def exists(self, key: str) -> bool:
        try:
            with self._errors(key):
                self.client.head_object(**self._at(key))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        top = posixpath.join(self.prefix, prefix).strip("/")
        start = len(self.prefix) + 1 if self.prefix else 0
        with self._errors(prefix or "."):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=f"{top}/" if top else ""
            )
            for page in pages:  # S3 lists in key order
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # a "folder" marker is no object of ours
                        yield Entry(item["Key"][start:], item["Size"], item["ETag"])

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self.client.put_object(**self._at(key), Body=data)

    def upload(self, key: str, path: Path) -> None:
        with self._errors(key):
            at = self._at(key)
            self.client.upload_file(str(path), at["Bucket"], at["Key"])

    def create(self, key: str, data: bytes) -> str | None:
        return self._put_if(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        return self._put_if(key, data, IfMatch=tag)

    def _put_if(self, key: str, data: bytes, **condition: str) -> str | None:
        from botocore.exceptions import ClientError

        with self._errors(key):
            try:
                tag: str = self.client.put_object(**self._at(key), Body=data, **condition)["ETag"]
            except ClientError as error:
                code = error.response["Error"]["Code"]
                # 412: the condition failed; 409: another conditional write won the race;
                # 404 on If-Match: the object is gone.
                if code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                    return None
                if code in ("NoSuchKey", "404") and "IfMatch" in condition:
                    return None
                raise
        return tag

    def delete(self, key: str) -> None:
        with self._errors(key):
            self.client.delete_object(**self._at(key))

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self.uri}/{key}"
        try:
            yield
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("NoSuchKey", "404", "NotFound"):
                raise FileNotFoundError(where) from error
            if code == "NoSuchBucket":
                raise StorageError(
                    f"bucket {self.bucket!r} does not exist: create it or change --root."
                ) from error
            if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
                raise StorageError(
                    f"{where}: access denied ({code}): check the AWS credentials and the rights."
                ) from error
            raise StorageError(f"{where}: the S3 server answered {code}: try again.") from error
        except (BotoCoreError, Boto3Error) as error:
            raise StorageError(
                f"{where}: {type(error).__name__}: check AWS_ENDPOINT_URL, the network and the"
                " credentials, then run the same command again."
            ) from error
