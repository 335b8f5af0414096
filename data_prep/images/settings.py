"""Settings of the images stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_prep.core.paths import NAME
from data_prep.pictures.cutting import Cutting, Format
from data_prep.pictures.limits import MAX_PIXELS, MOST_PIXELS
from data_prep.raw.layouts import LAYOUTS

_FORMAT = 1  # raise it when the same items give other bytes

Side = Annotated[int, Field(ge=16, le=8192)]


def _sides(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class ImagesSettings(BaseModel):
    """Settings that say which photos to use, and how to cut and store them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        description="Folder, zip, tar, Parquet file or list (csv, txt, jsonl) of photos, or an s3://"
        " prefix with any of them.",
    )
    layout: Literal[tuple(LAYOUTS)] = Field(  # type: ignore[valid-type]
        default="auto",
        description="Layout of the source: a published dataset, or auto: folders train, val and"
        " test are splits if they exist.",
    )
    name: str = Field(
        default="photographs",
        pattern=NAME,
        max_length=60,
        description="Name of the dataset; its versions are stored under images/NAME.",
    )
    mode: Literal["center-crop", "short-side", "keep", "tiles"] = Field(
        default="center-crop",
        description="center-crop: one centred square of each photo; short-side: the whole photo,"
        " with `size` pixels on its shorter side; keep: the unchanged file; tiles: many squares.",
    )
    size: int = Field(
        default=256, ge=16, le=4096, description="Side of a stored sample, in pixels."
    )
    resample: Literal["area", "lanczos"] = Field(
        default="area", description="Filter that makes photos smaller; both antialias."
    )
    tile: Annotated[tuple[Side, ...], BeforeValidator(_sides)] = Field(
        default=(256,),
        min_length=1,
        description="Sides of the tiles in pixels of the photo, before resizing to `size`.",
    )
    tile_stride: float = Field(
        default=1.0,
        gt=0.05,
        le=1,
        description="Distance of neighbouring tiles, as a share of their side.",
    )
    max_tiles: int = Field(
        default=64, ge=1, le=10_000, description="Most tiles of one photo, chosen by hash."
    )
    format: Format = Field(default="jpeg", description="File format of the samples.")
    quality: int = Field(default=95, ge=1, le=100, description="Quality of jpeg and webp.")
    shard_samples: int = Field(
        default=1000, ge=1, le=100_000, description="Most samples in a shard."
    )
    val: float = Field(
        default=0.05,
        gt=0,
        le=0.4,
        description="Share of photos for validation, if the source has no such split.",
    )
    test: float = Field(
        default=0.05,
        gt=0,
        le=0.4,
        description="Share of photos for the final test, if the source has no such split.",
    )
    min_side: int = Field(
        default=0,
        ge=0,
        description="Least pixels of a photo's shorter side. 0: no photo is enlarged, so the limit"
        " is `size` for center-crop and short-side. Tiles always need their own side.",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=MOST_PIXELS,
        description="Most pixels of a photo. With more than the default, a worker process may need"
        " more than 700 MB.",
    )
    max_bytes: int = Field(
        default=128_000_000,
        ge=1,
        le=2_000_000_000,
        description="Most bytes of a photo's file.",
    )
    max_failure_ratio: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of image files that may be unusable; one always may.",
    )
    dedupe: Literal["content", "off"] = Field(
        default="content",
        description="content: of identical files only one stays, in the split test, else val, else"
        " train; off: all stay, and copies may be in different splits.",
    )
    near_duplicates: Literal["report", "drop", "off"] = Field(
        default="report",
        description="Photos of train that are nearly the same as one of val or test. report: list"
        " them; drop: also remove them from train; off: do not search for them.",
    )
    workers: int = Field(default=0, ge=0, le=256, description="Processes; 0: one per core.")

    @model_validator(mode="after")
    def _leave_enough_for_train(self) -> Self:
        if self.val + self.test > 0.5:
            raise ValueError("val and test together must be at most 0.5")
        return self

    @property
    def needed_side(self) -> int:
        """Return the least pixels of a photo's shorter side."""
        if self.mode == "tiles":
            return max(self.min_side, min(self.tile))
        return self.min_side or (1 if self.mode == "keep" else self.size)

    @property
    def smaller_photos(self) -> str:
        """Return what to change so that photos below `needed_side` can be used."""
        if self.mode == "tiles" and self.min_side <= min(self.tile):
            return "lower the smallest side in images.tile (--set tile=[N])"
        if self.min_side:
            return "lower images.min_side (--set min_side=N)"
        return (
            "lower --size (images.size), or set images.min_side (--set min_side=N) to the least"
            " side that may be enlarged"
        )

    @property
    def cutting(self) -> Cutting:
        """Return the description of the samples to cut."""
        return Cutting(
            mode=self.mode,
            size=self.size,
            format=self.format,
            quality=self.quality,
            resample=self.resample,
            max_pixels=self.max_pixels,
            min_side=self.needed_side,
            tile=tuple(sorted(set(self.tile))),
            tile_stride=self.tile_stride,
            max_tiles=self.max_tiles,
        )

    @property
    def shard_items(self) -> int:
        """Return the most photos in a shard."""
        return max(1, self.shard_samples // (self.max_tiles if self.mode == "tiles" else 1))

    def request_settings(self) -> dict[str, Any]:
        """Return the part that changes the output."""
        common = {"mode", "shard_samples", "val", "test", "max_pixels", "max_bytes", "layout"}
        settings = self.model_dump(mode="json", include=common | {"dedupe", "near_duplicates"})
        settings |= {"needed_side": self.needed_side, "format_version": _FORMAT}
        if self.mode == "tiles":
            settings |= {"tile": sorted(set(self.tile)), "tile_stride": self.tile_stride}
            settings["max_tiles"] = self.max_tiles
        if self.mode != "keep":
            settings |= {"size": self.size, "resample": self.resample, "format": self.format}
            if self.format != "png":
                settings["quality"] = self.quality
        if self.near_duplicates != "drop":
            del settings["near_duplicates"]  # a report changes no shard
        return settings
