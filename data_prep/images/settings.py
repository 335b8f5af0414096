"""Settings of the images stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_prep.pictures.cutting import Cutting, Format
from data_prep.pictures.limits import MAX_PIXELS
from data_prep.raw.layouts import LAYOUTS

_FORMAT = 1  # raise it when the same items would give other bytes


Side = Annotated[int, Field(ge=16, le=8192)]


def _sides(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class ImagesSettings(BaseModel):
    """Which photographs, and how they are cut and stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        description="Folder, zip, tar, Parquet file or list (csv, txt, jsonl) of photographs, or a"
        " prefix of s3:// with any of them.",
    )
    layout: Literal[tuple(LAYOUTS)] = Field(  # type: ignore[valid-type]
        default="auto",
        description="How the source is laid out: a published dataset, or auto: folders train, val"
        " and test are splits if they are there.",
    )
    name: str = Field(
        default="photographs",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=60,
        description="Name of the dataset; its versions lie under images/NAME.",
    )
    mode: Literal["center-crop", "short-side", "keep", "tiles"] = Field(
        default="center-crop",
        description="center-crop: one centred square of each photograph; short-side: all of it, its"
        " shorter side `size` pixels; keep: its file as it is; tiles: many squares.",
    )
    size: int = Field(
        default=256, ge=16, le=4096, description="Side of a stored sample, in pixels."
    )
    resample: Literal["area", "lanczos"] = Field(
        default="area", description="Filter that makes photographs smaller; both antialias."
    )
    tile: Annotated[tuple[Side, ...], BeforeValidator(_sides)] = Field(
        default=(256,),
        min_length=1,
        description="Sides of the tiles in the photograph, in pixels, before resizing to `size`.",
    )
    tile_stride: float = Field(
        default=1.0,
        gt=0.05,
        le=1,
        description="Distance of neighbouring tiles, as a share of their side.",
    )
    max_tiles: int = Field(
        default=64, ge=1, le=10_000, description="Most tiles of one photograph, drawn by hash."
    )
    format: Format = Field(default="jpeg", description="File format of the samples.")
    quality: int = Field(default=95, ge=1, le=100, description="Of jpeg and webp.")
    shard_samples: int = Field(
        default=1000, ge=1, le=100_000, description="Most samples in a shard."
    )
    val: float = Field(
        default=0.05,
        gt=0,
        le=0.4,
        description="Share of photographs for validation, where the source has no such split.",
    )
    test: float = Field(
        default=0.05,
        gt=0,
        le=0.4,
        description="Share of photographs for the final test, where the source has no such split.",
    )
    min_side: int = Field(
        default=0,
        ge=0,
        description="Least pixels of a photograph's shorter side; 0: nothing is enlarged, so"
        " `size` for center-crop and short-side. Tiles always need their own side.",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=178_000_000,
        description="Most pixels of a photograph. More than the default may take a worker process"
        " above 700 MB.",
    )
    max_bytes: int = Field(
        default=128_000_000,
        ge=1,
        le=2_000_000_000,
        description="Most bytes of a photograph's file.",
    )
    max_failure_ratio: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of image files that may be unusable; a single one always may.",
    )
    dedupe: Literal["content", "off"] = Field(
        default="content",
        description="content: of identical files the one with the lowest key stays, and none is in"
        " two splits; off: all stay, and copies may lie in different splits.",
    )
    near_duplicates: Literal["report", "drop", "off"] = Field(
        default="report",
        description="Pictures of train that are nearly the same as one of val or test: report them,"
        " also drop them from train, or do not look.",
    )
    workers: int = Field(default=0, ge=0, le=256, description="Processes; 0: one per core.")

    @model_validator(mode="after")
    def _leave_enough_for_train(self) -> Self:
        if self.val + self.test > 0.5:
            raise ValueError("val and test together are at most 0.5")
        return self

    @property
    def needed_side(self) -> int:
        """Least pixels of a photograph's shorter side."""
        if self.mode == "tiles":
            return max(self.min_side, min(self.tile))
        return self.min_side or (1 if self.mode == "keep" else self.size)

    @property
    def cutting(self) -> Cutting:
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
        """Most photographs in a shard."""
        return max(1, self.shard_samples // (self.max_tiles if self.mode == "tiles" else 1))

    def request_settings(self) -> dict[str, Any]:
        """The part that changes the output."""
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
            del settings["near_duplicates"]  # looking changes no shard
        return settings
