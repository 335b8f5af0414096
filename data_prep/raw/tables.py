"""Parquet tables with a column of images: bytes, or a struct {bytes, path} (Hugging Face)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import ItemError
from data_prep.raw.files import Blob, escape, too_large
from data_prep.raw.listing import ROWS
from data_prep.raw.members import LONGEST_NAMES, Member, most_members, too_many

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content")
_KEYS = ("key", "__key__", "id", "path", "filename", "file_name")
LARGEST_IMAGE = 1 << 31  # bytes
_HELD = 48 << 20  # bytes; a smaller row group is read whole
_BATCH = 16  # rows read at the same time from a larger row group
_BUFFER = 1 << 20  # bytes; without a buffer, the whole column of a row group is read
_LARGEST_GROWTH = 100  # times that a row group may grow when it is decompressed; photos grow little


class NoImagesError(ItemError):
    """No column of a table can contain images."""


class Table:
    """A Parquet file. An offset is the number of a row, a block is the number of its row group.

    Read rows in ascending order: a step back in a large row group reads the group again.
    """

    weight = 2 * _HELD  # bytes in memory

    def __init__(self, blob: Blob) -> None:
        """Read the schema. Raises ItemError if it is not a Parquet file or has no images."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        options: Any = {"buffer_size": _BUFFER, "pre_buffer": False}
        try:
            self._file = pq.ParquetFile(blob.open(), **options)
            schema = self._file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise ItemError("it is not a Parquet table, or it is cut off") from error
        facts = self._file.metadata
        counts = (facts.row_group(group).num_rows for group in range(facts.num_row_groups))
        self._starts = list(accumulate(counts, initial=0))  # the first row of each group, the end
        if self._starts[-1] > most_members(blob.size):
            raise too_many(self._starts[-1], blob.size)
        column = _image_column(schema)
        self._is_struct = pa.types.is_struct(schema.field(column).type)
        self._leaf = f"{column}.bytes" if self._is_struct else column
        self._keys = [f"{column}.path"] if self._is_struct else []
        self._keys += [
            field.name
            for name in _KEYS
            for field in schema
            if field.name.lower() == name and field.name != column
        ]
        # A value that comes again is stored once. This file keeps it once in memory, too.
        self._shared = pq.ParquetFile(
            blob.open(), metadata=facts, read_dictionary=[self._leaf, *self._keys], **options
        )
        self._size = blob.size
        columns = self._file.schema
        self._columns = {columns.column(n).path: n for n in range(len(columns))}
        self._lock = Lock()
        self._group = -1  # the current row group
        self._rows: Any = None  # some rows of it
        self._first = 0  # the number of the first of these rows
        self._batches: Iterator[Any] = iter(())

    def members(self) -> Iterator[Member]:
        """Yield a member for each row, without reading an image."""
        names = self._names()
        for group in range(len(self._starts) - 1):
            for row in range(self._starts[group], self._starts[group + 1]):
                name = f"row-{row:09d}" if names is None else next(names)
                yield Member(name, -1, row, group)

    def read(self, offset: int, size: int, limit: int) -> bytes:
        """Return the row's image. Raises ItemError if there is none."""
        import pyarrow as pa

        if not 0 <= offset < self._starts[-1]:
            raise ItemError("the table has no such row")
        with self._lock:
            try:
                value = self._value(offset)
            except (pa.ArrowException, OSError) as error:
                self._group = -1
                raise ItemError("its part of the table is broken") from error
        if self._is_struct and value.is_valid:
            value = value["bytes"]
        if isinstance(value, pa.DictionaryScalar) and value.is_valid:
            value = value.value
        data = value.as_buffer() if value.is_valid else None
        if data is None or data.size == 0:
            raise ItemError("its row has no image")
        if data.size > limit:
            raise too_large(limit)
        return bytes(data)

    def head(self, offset: int, size: int, count: int) -> bytes:
        return self.read(offset, size, LARGEST_IMAGE)[:count]

    def _value(self, row: int) -> Any:
        """Return the Arrow scalar of a row's image."""
        if self._group < 0 or not self._first <= row < self._starts[self._group + 1]:
            self._enter(row)
        while row >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._rows = None  # free them before the next rows arrive
            self._rows = next(self._batches).column(0)
        return self._rows[row - self._first]

    def _enter(self, row: int) -> None:
        """Start to read the row group of the row."""
        group = next(n for n, end in enumerate(self._starts[1:]) if row < end)
        self._group, self._rows = -1, None
        size, packed = self._sizes(group, self._leaf)
        if size > _HELD and size > _LARGEST_GROWTH * packed:
            raise ItemError(
                f"its part of the table grows from {packed} to {size} bytes, more than"
                f" {_LARGEST_GROWTH} times, so it cannot be photos"
            )
        file, rows = self._reading(group, self._leaf)
        if size <= _HELD and rows == ROWS:
            self._batches = iter(())
            self._rows = file.read_row_group(group, columns=[self._leaf]).column(0)
        else:
            rows = min(rows, _BATCH)
            self._batches = file.iter_batches(rows, row_groups=[group], columns=[self._leaf])
            self._rows = next(self._batches).column(0)
        self._group, self._first = group, self._starts[group]

    def _chunk(self, group: int, leaf: str) -> Any:
        """Return what the file says about a column in a row group; None if there is none."""
        number = self._columns.get(leaf)
        return None if number is None else self._file.metadata.row_group(group).column(number)

    def _sizes(self, group: int, leaf: str) -> tuple[int, int]:
        """Return the bytes of a column in a row group, and the bytes that it has in the file."""
        chunk = self._chunk(group, leaf)
        return (chunk.total_uncompressed_size, chunk.total_compressed_size) if chunk else (0, 0)

    def _reading(self, group: int, leaf: str) -> tuple[Any, int]:
        """Return the file that reads a column in a row group, and how many rows fit in memory."""
        chunk = self._chunk(group, leaf)
        encodings = chunk.encodings if chunk else ()
        if "DELTA_BYTE_ARRAY" in encodings:
            # Each value can be nearly as long as all stored bytes: it repeats the one before.
            rows = _HELD // 4 // max(chunk.total_uncompressed_size, 1)
            return self._file, max(1, min(rows, ROWS))
        is_shared = any("DICTIONARY" in encoding for encoding in encodings)
        return (self._shared if is_shared else self._file), ROWS

    def _names(self) -> Iterator[str] | None:
        """Return the rows' names in order, from the first column with a unique text per row."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for leaf in self._keys:
            try:
                names = self._texts(leaf)
            except (pa.ArrowException, OSError):
                continue
            if names is None:
                continue
            unique = pc.count_distinct(names, mode="all").as_py() == len(names)
            if names.null_count == 0 and unique and not pc.any(pc.equal(names, "")).as_py():
                return (escape(name) for chunk in names.chunks for name in chunk.to_pylist())
        return None

    def _texts(self, leaf: str) -> pa.ChunkedArray | None:
        """Return a column of texts or numbers as texts; None for another or a too long one."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found, left = [], LONGEST_NAMES + self._size  # bytes; photos need more than their names
        for group in range(len(self._starts) - 1):
            if self._sizes(group, leaf)[0] > left:
                return None
            file, rows = self._reading(group, leaf)
            for batch in file.iter_batches(rows, row_groups=[group], columns=[leaf]):
                if not batch.num_columns:
                    return None
                column = batch.column(0)
                if pa.types.is_struct(column.type):
                    column = pc.struct_field(column, "path")
                if pa.types.is_dictionary(column.type):
                    lengths = pc.binary_length(column.dictionary).take(column.indices)
                    if (pc.sum(lengths).as_py() or 0) > left:
                        return None
                    column = column.dictionary_decode()
                if not (_is_text(column.type) or pa.types.is_integer(column.type)):
                    return None
                names = pc.utf8_ltrim(pc.cast(column, pa.large_string()), "/")
                left -= pc.sum(pc.binary_length(names)).as_py() or 0
                if left < 0:
                    return None
                found.append(names)
        return pa.chunked_array(found, pa.large_string())


def _image_column(schema: pa.Schema) -> str:
    """Return the column of images: one with a usual name, or the only column of bytes."""
    able = [field.name for field in schema if _holds_bytes(field.type)]
    for usual in _IMAGES:
        for name in able:
            if name.lower() == usual:
                return str(name)
    lists = [field.name for field in schema if _is_list(field.type)]
    if not able and lists:
        raise ItemError(
            f"its column {lists[0]!r} has a list of images in each row, which cannot be read. Write"
            " one row for each image"
        )
    if not able:
        raise NoImagesError("it has no column of images")
    if len(able) > 1:
        names = ", ".join(map(repr, able))
        raise ItemError(f"it has several columns of bytes, and none is called image: {names}")
    return str(able[0])


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_bytes(kind.field(at).type)
    return _is_bytes(kind)


def _is_list(kind: pa.DataType) -> bool:
    """Return whether each value is a list of images."""
    import pyarrow as pa

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_one(kind) for is_one in lists) and _holds_bytes(kind.value_type)


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_one(kind) for is_one in kinds)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_one(kind) for is_one in kinds)
