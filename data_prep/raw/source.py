"""Raw sources of photos: list their items and read them. Nothing is unpacked to disk.

A source is a folder, an S3 prefix, one archive, one table or a list file, at a local path, file://
or s3://. Archives and tables in a folder are opened.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.storage.uri import S3Address, parse_uri
from data_prep.raw.files import escape
from data_prep.raw.folders import Folder, Known, empty_source, is_container, nothing_known
from data_prep.raw.layouts import check_layout
from data_prep.raw.listing import Item, Listing
from data_prep.raw.lists import ListFile, is_list
from data_prep.raw.local_files import LocalFiles, local_name
from data_prep.raw.s3_files import S3Files, s3_files


class Source(Protocol):
    """A place of items. Small and picklable."""

    @property
    def uri(self) -> str:
        """Return the source's address."""

    def list(self, known: Known = nothing_known) -> Listing:
        """Return every item, with its split if the layout or the list gives one.

        The fingerprint of a member is its container's, or 0 if the member has a problem. A broken
        container is an item of its own: its key is the container's key (or the file's name, if the
        container is the source), and its problem is the reason.

        Args:
            known: `known(container, fingerprint)` returns the items of an earlier listing for a
                container, which is then not opened. It returns None if any of them had another
                fingerprint. The container is named by its key, "" if it is the source.

        Raises:
            PipelineError: The source is missing, empty or unreadable.
        """

    def reader(self) -> Reader:
        """Return a reader of the items."""


class Reader(Protocol):
    """A reader of items in one process: a context manager, safe for several threads."""

    threads: int  # useful number of reads at the same time

    def read(self, item: Item, limit: int) -> bytes:
        """Return the item's bytes. A member with the offset -1 is found by its name.

        Raises:
            ItemError: The item itself is gone, broken or larger than `limit` bytes.
            PipelineError: There is a temporary problem, such as the network.
        """

    def head(self, item: Item, count: int) -> bytes:
        """Return the item's first bytes, with one small read. Raises as `read` does."""

    def __enter__(self) -> Reader: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_source(uri: str, layout: str = "auto", option: str = "the source") -> Folder | ListFile:
    """Return the source at a path or URI. Raises ConfigError or PipelineError.

    Args:
        uri: path or URI of the source.
        layout: of the source.
        option: the option that names the source, for messages.
    """
    check_layout(layout)
    files = open_files(uri)
    if isinstance(files, LocalFiles):
        if files.folder.is_dir():
            return Folder(files, "", layout)
        _check_local(files.folder, option)
        name = escape(local_name(files.folder).rpartition("/")[2])
        files = LocalFiles(files.folder.parent)
    else:
        above, _, name = files.store.prefix.rpartition("/")
        if not (is_container(name) or is_list(name)):
            return Folder(files, "", layout)
        files = s3_files(files.store.bucket, above)
    return ListFile(files, name, layout) if is_list(name) else Folder(files, name, layout)


def open_files(uri: str) -> LocalFiles | S3Files:
    """Return the files below a path, file:// URI or s3:// URI, without using the storage."""
    address = parse_uri(uri)
    if isinstance(address, S3Address):
        return s3_files(address.bucket, address.prefix)
    return LocalFiles(address)


def check_source(uri: str, layout: str = "auto", option: str = "the source") -> None:
    """Check that there is something to list. This is cheap.

    Args:
        uri: path or URI of the source.
        layout: of the source.
        option: the option that names the source, for messages.

    Raises:
        ConfigError: there is no such source, or it is of no known type.
        PipelineError: it is empty or cannot be read.
    """
    source = open_source(uri, layout, option)
    files, name = source.files, source.name
    if name:
        if files.look(name) is None:
            raise ConfigError(f"{option} {files.where(name)} does not exist. Correct the path.")
    elif isinstance(files, LocalFiles):
        _check_local(files.folder, option)
    elif next(iter(files.walk()), None) is None:
        raise empty_source(files)


def _check_local(path: Path, option: str) -> None:
    """Raise PipelineError unless it is a folder that is not empty, or a file of a known type."""
    if not path.exists():
        raise ConfigError(
            f"{option} {path.absolute()} does not exist. Correct the path. A relative path starts"
            " from the current folder."
        )
    if path.is_dir():
        try:
            holds_none = not any(path.iterdir())
        except OSError as error:
            raise PipelineError(
                f"cannot read {path}: {error.strerror}. Check its permissions."
            ) from error
        if holds_none:
            raise empty_source(LocalFiles(path))
    elif not (is_container(path.name) or is_list(path.name)):
        raise ConfigError(
            f"{option} {path} is not a source. Give a folder of photos, an archive (.zip, .tar,"
            " .tar.gz, .tgz), a Parquet table or a list file (.csv, .txt, .jsonl)."
        )
