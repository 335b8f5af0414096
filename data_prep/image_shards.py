"""One image shard: photographs cut, encoded and written, in whichever process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep import pictures
from data_prep.digest import canonical_json, sha256_bytes
from data_prep.errors import PipelineError
from data_prep.image_plan import Box
from data_prep.shards import Folder, finished_shard, write_shard
from data_prep.sources import Source, read_item
from data_prep.stage import FileRecord

if TYPE_CHECKING:
    from PIL.Image import Image

_DECODED = pictures.DecodedPictures(max_bytes=512 << 20)  # of this process, across its shards


@dataclass(frozen=True)
class Cutting:
    """How samples are stored; `size` is their side in pixels."""

    size: int
    format: pictures.Format
    quality: int
    max_pixels: int


@dataclass(frozen=True)
class Sample:
    key: str
    source: Source
    box: Box | None  # None: the centre crop


@dataclass(frozen=True)
class Shard:
    """One task of a worker."""

    place: Folder
    name: str
    split: str
    samples: Sequence[Sample]
    cutting: Cutting


def build_shard(shard: Shard) -> list[FileRecord]:
    """Write the shard, unless it is there whole. Each photograph is decoded at most once for it."""
    if records := finished_shard(shard.place, shard.name):
        return records
    of_photograph: dict[str, list[Sample]] = {}
    for sample in shard.samples:
        of_photograph.setdefault(sample.source.sha256, []).append(sample)
    stored: dict[str, bytes] = {}
    for sha256 in sorted(of_photograph, key=lambda sha256: sha256 not in _DECODED):
        stored |= _cut(of_photograph[sha256], shard.cutting)
    extension = pictures.FILE_EXTENSION[shard.cutting.format]
    rows = [_row(shard, sample) for sample in shard.samples]
    samples = (
        (sample.key, {extension: stored[sample.key], "json": _sidecar(row, sample)}, row)
        for sample, row in zip(shard.samples, rows, strict=True)
    )
    return write_shard(shard.place, shard.name, samples)


def forget_decoded() -> None:
    """Free the photographs that this process holds decoded."""
    _DECODED.clear()


def _cut(samples: Sequence[Sample], how: Cutting) -> dict[str, bytes]:
    """Encoded samples, by key, of one photograph."""
    source, stored = samples[0].source, {}
    for sample in samples:
        if sample.box is None:
            # A JPEG much larger than the sample is decoded at a fraction of its size.
            image = _decode(source, how.max_pixels, at_least=2 * how.size)
            square = pictures.center_crop(image, how.size)
        else:
            whole = _DECODED.get(source.sha256, lambda: _decode(source, how.max_pixels))
            square = pictures.cut(whole, *sample.box, how.size)
        stored[sample.key] = pictures.encode(square, how.format, how.quality)
    return stored


def _decode(source: Source, max_pixels: int, at_least: int | None = None) -> Image:
    where = source.item.location
    data = read_item(source.item)
    if sha256_bytes(data) != source.sha256:
        raise PipelineError(f"{where} changed while it was prepared: run the same command again.")
    try:
        return pictures.decode(data, max_pixels, at_least)
    except pictures.PictureError as error:  # the inspection found nothing wrong
        raise PipelineError(f"{where} cannot be decoded, {error}: remove the file.") from error


def _row(shard: Shard, sample: Sample) -> dict[str, Any]:
    """The sample's row in the index."""
    return {
        "key": sample.key,
        "width": shard.cutting.size,
        "height": shard.cutting.size,
        "split": shard.split,
        "relative_key": sample.source.key,
        "source_sha256": sample.source.sha256,
    }


def _sidecar(row: Mapping[str, Any], sample: Sample) -> bytes:
    source = sample.source
    record = {**row, "original_width": source.width, "original_height": source.height}
    if sample.box is not None:
        record["tile"] = sample.box  # left, top, side
    return canonical_json(record)
