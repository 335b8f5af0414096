"""The parts of an evaluation: some pairs of one mask shard, measured and kept until the commit.

A part is `parts/NAME.json` with the rows of metrics.parquet and their hash. If FID is wanted,
`parts/NAME.npy` has the Inception features, and the JSON file has its hash. The JSON file is
written last, so a part is there as a whole or not at all.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from data_prep.core.digest import sha256_bytes, sha256_json
from data_prep.core.errors import PipelineError
from data_prep.core.record import parse_json
from data_prep.core.storage.store import Store
from dpnet.evaluation.pairs import FrozenPairs, Pair
from dpnet.evaluation.protocol import Rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dpnet.evaluation.bench import Measured

KEYS = ("image", "mask", "ratio_bin", "hole_ratio")  # the columns of a row that name its pair
# Of one part: little work is lost with a worker, and features have about 13 MB. A multiple of the
# bench's batch, so that the batches are the same for any size of a shard.
PART_PAIRS = 256


@dataclass(frozen=True)
class Part:
    """Some pairs of one mask shard, in their order; `name` is that of the part's files."""

    name: str
    pairs: Sequence[Pair]


def split_into_parts(frozen: FrozenPairs) -> list[Part]:
    """Return the parts of an evaluation in the order of its pairs."""
    parts = []
    for shard, group in groupby(frozen.pairs, key=lambda pair: frozen.masks.shard_key(pair[1])):
        pairs, stem = list(group), PurePosixPath(shard).stem
        parts += [
            Part(f"{stem}-{start:06d}", pairs[start : start + PART_PAIRS])
            for start in range(0, len(pairs), PART_PAIRS)
        ]
    return parts


@dataclass(frozen=True)
class PartStore:
    """The parts in the folder of an evaluation.

    Attributes:
        store: the root.
        folder: key of the folder of parts.
        frozen: the pairs.
        methods: names of the methods, in the order of the rows.
        with_features: whether a part has features.
    """

    store: Store
    folder: str
    frozen: FrozenPairs
    methods: Sequence[str]
    with_features: bool

    def write(self, part: Part, measured: Measured) -> None:
        """Keep the measurements of a part."""
        body: dict[str, Any] = {"sha256": sha256_json(measured.rows), "rows": measured.rows}
        if measured.features is not None:
            data = _npy_bytes(measured.features)
            self.store.write(self._key(part, "npy"), data)
            body["features"] = sha256_bytes(data)
        self.store.write(self._key(part, "json"), json.dumps(body).encode())

    def read(self, part: Part) -> Rows | None:
        """Return the rows that an interrupted evaluation kept, if they are undamaged and as wanted.

        The features have to be there too, if they are wanted.
        """
        wanted = [self.frozen.keys(pair) for pair in part.pairs]
        try:
            body = parse_json(self.store.read(self._key(part, "json")))
            rows: Rows = body["rows"]
            names = [{name: row[name] for name in KEYS} for row in rows[:: len(self.methods)]]
            if sha256_json(rows) != body["sha256"] or names != wanted:
                return None
            if [row["method"] for row in rows] != [*self.methods] * len(wanted):
                return None
            if self.with_features:
                data = self.store.read(self._key(part, "npy"))
                if sha256_bytes(data) != body["features"]:
                    return None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return rows

    def features(self, parts: Sequence[Part]) -> Iterator[NDArray[np.float32]]:
        """Yield the features of each part.

        Raises:
            PipelineError: a file was changed or removed after it was written.
        """
        import numpy as np

        for part in parts:
            key = self._key(part, "npy")
            try:
                body = parse_json(self.store.read(self._key(part, "json")))
                data = self.store.read(key)
                if sha256_bytes(data) != body["features"]:
                    raise ValueError
                yield np.load(io.BytesIO(data), allow_pickle=False)
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                raise PipelineError(
                    f"{self.store.label}/{key} was changed or removed during the evaluation: run"
                    " the same command again. It measures this part again."
                ) from None

    def clear(self) -> None:
        """Remove all parts."""
        clear_parts(self.store, self.folder)

    def _key(self, part: Part, extension: str) -> str:
        return f"{self.folder}/{part.name}.{extension}"


def clear_parts(store: Store, folder: str) -> None:
    """Remove the parts in a folder, after the commit or if they are of no use."""
    for entry in list(store.list(folder)):
        store.delete(entry.key)


def _npy_bytes(features: NDArray[np.float32]) -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(features, dtype="<f4"), allow_pickle=False)
    return file.getvalue()
