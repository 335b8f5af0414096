"""Raw sources: whatever holds photographs, as items that are listed and read. Nothing is unpacked.

A source is a folder or an S3 prefix (archives and tables in it are opened), one archive, one table
or a list file; local, file:// or s3://.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol

from data_prep.core.errors import PipelineError
from data_prep.core.storage.uri import S3Address, parse_uri
from data_prep.raw.files import escape
from data_prep.raw.folders import Folder, Known, empty, is_container, nothing_known
from data_prep.raw.layouts import check_layout
from data_prep.raw.listing import Item, Listing
from data_prep.raw.lists import ListFile, is_list
from data_prep.raw.local_files import LocalFiles
from data_prep.raw.s3_files import S3Files, s3_files


class Source(Protocol):
    """Where items come from. Small and picklable."""

    @property
    def uri(self) -> str: ...
    def list(self, known: Known = nothing_known) -> Listing:
        """Every item, with its split where the layout or the list says it.

        `known(container, fingerprint)` gives the items that an earlier listing had for a container
        (by its key; "" for the source itself), or None where any of them had another fingerprint:
        they are taken over, and the container is not opened. A member's fingerprint is its
        container's, or 0 if it has a problem. A container that is broken, or from somewhere on, is
        an item of the container's key (its file's name, where it is the source) with the reason.
        Raises PipelineError when the source is missing, empty or cannot be read.
        """

    def reader(self) -> Reader: ...


class Reader(Protocol):
    """Reads items in one process. A context manager; safe from several threads."""

    threads: int  # reads at once that pay

    def read(self, item: Item, limit: int) -> bytes:
        """The item's bytes. A member whose offset is -1 is found by its name.

        Raises ItemError for a fault of its own (gone, broken, larger than `limit` bytes) and
        PipelineError for what may pass.
        """

    def __enter__(self) -> Reader: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_source(uri: str, layout: str = "auto") -> Folder | ListFile:
    """The source at a path, file:// or s3:// URI. Raises ConfigError or PipelineError."""
    check_layout(layout)
    files = open_files(uri)
    if isinstance(files, LocalFiles):
        if files.folder.is_dir():
            return Folder(files, "", layout)
        _check_local(files.folder)
        name = escape(files.folder.name)
        files = LocalFiles(files.folder.parent)
    else:
        above, _, name = files.store.prefix.rpartition("/")
        if not (is_container(name) or is_list(name)):
            return Folder(files, "", layout)
        files = s3_files(files.store.bucket, above)
    return ListFile(files, name, layout) if is_list(name) else Folder(files, name, layout)


def open_files(uri: str) -> LocalFiles | S3Files:
    """The files below a path, a file:// URI or an s3:// URI. Asks nothing of the storage."""
    address = parse_uri(uri)
    if isinstance(address, S3Address):
        return s3_files(address.bucket, address.prefix)
    return LocalFiles(address)


def check_source(uri: str, layout: str = "auto") -> None:
    """Raise PipelineError unless there is something to list: cheap, asked before all work."""
    source = open_source(uri, layout)
    files, name = source.files, source.name
    if name:
        if files.look(name) is None:
            raise PipelineError(f"{files.where(name)} does not exist: correct its path.")
    elif isinstance(files, LocalFiles):
        _check_local(files.folder)
    elif next(iter(files.walk()), None) is None:
        raise empty(files)


def _check_local(path: Path) -> None:
    """Raise PipelineError unless there is a folder with something in it, or a file that is read."""
    if not path.exists():
        raise PipelineError(
            f"the source {path.absolute()} does not exist: correct its path (a relative one counts"
            " from the folder that the command runs in)."
        )
    if path.is_dir():
        try:
            holds_none = not any(path.iterdir())
        except OSError as error:
            raise PipelineError(
                f"cannot read {path}: {error.strerror}: check its permissions."
            ) from error
        if holds_none:
            raise empty(LocalFiles(path))
    elif not (is_container(path.name) or is_list(path.name)):
        raise PipelineError(
            f"{path} is no source: give a folder of photographs, an archive (.zip,"
            " .tar, .tar.gz, .tgz), a Parquet table or a list file (.csv, .txt, .jsonl)."
        )
