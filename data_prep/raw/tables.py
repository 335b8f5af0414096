"""Parquet tables with a column of images: bytes, or a struct {bytes, path} (Hugging Face).

A row may also have a list of images. Each of them is a member, named `ROW-N` after its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import ItemError
from data_prep.raw.files import Blob, escape, too_large
from data_prep.raw.listing import ROWS
from data_prep.raw.members import CUT, LONGEST_NAMES, Member, most_members, too_many

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content")
_KEYS = ("key", "__key__", "id", "path", "filename", "file_name")
LARGEST_IMAGE = 1 << 31  # bytes
_HELD = 48 << 20  # bytes; a smaller row group is read whole
_BATCH = 16  # rows read at the same time from a larger row group
_BUFFER = 1 << 20  # bytes; without a buffer, the whole column of a row group is read
_IN_ROW = 1 << 20  # images
_LARGEST_GROWTH = 100  # times that a row group may grow when it is decompressed; photos grow little


SEVERAL_COLUMNS = "it has several columns of bytes, and none is called image"
RENAME = "Rename the column of the images to image"


class NoImagesError(ItemError):
    """No column of a table can contain images."""


class Table:
    """A Parquet file. An offset is the number of a row, a block is the number of its row group.

    In a column of lists, an offset is the number of the row times `_IN_ROW`, and the number of the
    image in the row.

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
            if blob.read_at(0, 4) == b"PAR1":
                raise ItemError(CUT) from error
            raise ItemError("it is not a Parquet table, or it is cut off") from error
        facts = self._file.metadata
        counts = (facts.row_group(group).num_rows for group in range(facts.num_row_groups))
        self._starts = list(accumulate(counts, initial=0))  # the first row of each group, the end
        columns = self._file.schema
        self._columns = {columns.column(n).path: n for n in range(len(columns))}
        column = _image_column(schema)
        kind = schema.field(column).type
        self._is_list = _is_list(kind)
        self._is_struct = pa.types.is_struct(kind.value_type if self._is_list else kind)
        inside = [leaf for leaf in self._columns if leaf.startswith(f"{column}.")]
        if self._is_list:
            # Between the two names, the format has two more, which differ between writers.
            able = [leaf for leaf in inside if leaf.endswith(".bytes") or not self._is_struct]
            if not able:
                raise ItemError(f"its column {column!r} is not what its description says")
            self._leaf = able[0]
        else:
            self._leaf = f"{column}.bytes" if self._is_struct else column
        # A column that tells how many images a row has, without the images if possible.
        self._counts = next((leaf for leaf in inside if leaf != self._leaf), self._leaf)
        self._keys = [f"{column}.path"] if self._is_struct else []
        self._keys += [
            field.name
            for name in _KEYS
            for field in schema
            if field.name.lower() == name and field.name != column
        ]
        self._keys = [leaf for leaf in self._keys if leaf in self._columns]
        members = max(self._starts[-1], self._values() if self._is_list else 0)
        if members > most_members(blob.size):
            raise too_many(members, blob.size)
        # A value that comes again is stored once. This file keeps it once in memory, too.
        self._shared = pq.ParquetFile(
            blob.open(),
            metadata=facts,
            read_dictionary=[self._leaf, self._counts, *self._keys],
            **options,
        )
        self._size = blob.size
        self._lock = Lock()
        self._group = -1  # the current row group
        self._rows: Any = None  # some rows of it
        self._first = 0  # the number of the first of these rows
        self._batches: Iterator[Any] = iter(())

    def members(self) -> Iterator[Member]:
        """Yield a member for each image, and one for a row without, if possible unread."""
        names = self._names()
        for group in range(len(self._starts) - 1):
            counts = self._images_of_rows(group) if self._is_list else None
            for row in range(self._starts[group], self._starts[group + 1]):
                name = f"row-{row:09d}" if names is None else next(names)
                if counts is None:
                    yield Member(name, -1, row, group)
                    continue
                for number in range(max(1, next(counts))):
                    yield Member(f"{name}-{number}", -1, row * _IN_ROW + number, group)

    def _values(self) -> int:
        """Return how many images the rows have, and at least one for each row."""
        groups = range(len(self._starts) - 1)
        return sum(self._chunk(group, self._leaf).num_values for group in groups)

    def _images_of_rows(self, group: int) -> Iterator[int]:
        """Yield the number of images in each row of a group whose rows have lists."""
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            self._refuse_growth(group, self._counts)
            file, rows = self._reading(group, self._counts)
            if self._counts == self._leaf:
                rows = min(rows, _BATCH)
            for batch in file.iter_batches(rows, row_groups=[group], columns=[self._counts]):
                counts = pc.fill_null(pc.list_value_length(batch.column(0)), 0)
                if (pc.max(counts).as_py() or 0) >= _IN_ROW:
                    raise ItemError(f"a row has more than {_IN_ROW} images")
                yield from counts.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ItemError("its part of the table is broken") from error

    def read(self, offset: int, size: int, limit: int) -> bytes:
        """Return the image. Raises ItemError if there is none."""
        import pyarrow as pa

        row, number = divmod(offset, _IN_ROW) if self._is_list else (offset, 0)
        if not 0 <= row < self._starts[-1]:
            raise ItemError("the table has no such row")
        with self._lock:
            try:
                value = self._value(row)
            except (pa.ArrowException, OSError) as error:
                self._group = -1
                raise ItemError("its part of the table is broken") from error
        if self._is_list and value.is_valid:
            if number >= len(value):
                raise ItemError(
                    "its row has no image" if number == 0 else "its row has fewer images"
                )
            value = value.values[number]
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
        size = self._refuse_growth(group, self._leaf)
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

    def _refuse_growth(self, group: int, leaf: str) -> int:
        """Return the bytes of a column in a row group. Raises ItemError if few bytes make them."""
        size, packed = self._sizes(group, leaf)
        if size > _HELD and size > _LARGEST_GROWTH * packed:
            raise ItemError(
                f"its part of the table grows from {packed} to {size} bytes, more than"
                f" {_LARGEST_GROWTH} times, so it cannot be photos"
            )
        return size

    def _reading(self, group: int, leaf: str) -> tuple[Any, int]:
        """Return the file that reads a column in a row group, and how many rows fit in memory."""
        chunk = self._chunk(group, leaf)
        encodings = chunk.encodings if chunk else ()
        if "DELTA_BYTE_ARRAY" in encodings:
            # Each value can be nearly as long as all stored bytes: it repeats the one before.
            longest = max(chunk.total_uncompressed_size, 1)
            if self._is_list and leaf == self._leaf and chunk.num_values * longest > _HELD:
                raise ItemError(
                    "a row may have many images, each stored as its difference from the one before."
                    " Write the table with one row for each image, or without DELTA_BYTE_ARRAY"
                )
            return self._file, max(1, min(_HELD // 4 // longest, ROWS))
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
    able = able or [field.name for field in schema if _is_list(field.type)]
    if not able:
        raise NoImagesError("it has no column of images")
    usual = [name for each in _IMAGES for name in able if name.lower() in (each, f"{each}s")]
    if len(able) > 1 and not usual:
        names = ", ".join(map(repr, able))
        raise ItemError(f"{SEVERAL_COLUMNS}: {names}")
    column = str((usual or able)[0])
    if len(schema.get_all_field_indices(column)) > 1:
        raise ItemError(f"it has several columns called {column!r}. Give each its own name")
    return column


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
