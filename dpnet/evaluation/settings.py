"""Settings of evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Options that say where files are or how fast to work. The hash of a file is in the request.
_NOT_REQUESTED = {"threads", "lpips_weights", "allow_downloads"}


class EvaluateSettings(BaseModel):
    """The data that a model is evaluated on, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: Literal["val", "test"] = Field("test", description="Split that the images come from.")
    seed: int = Field(0, ge=0, lt=2**53, description="Another seed lays the masks on other images.")
    max_pairs: int = Field(
        12_000,
        ge=1,
        le=1_000_000,
        description="Largest number of pairs, spread evenly over the ratio bins.",
    )
    pictures: int = Field(
        2, ge=0, le=50, description="Example images of each ratio bin in the report."
    )
    threads: int = Field(
        0, ge=0, le=1024, description="Threads that read and measure. 0 means one for each core."
    )
    lpips_weights: str | None = Field(
        None,
        min_length=1,
        description="File with AlexNet's ImageNet weights under torchvision's names (.safetensors"
        " or .pth), for LPIPS. By default a file in ~/.cache/dpnet/weights, else torchvision's own"
        " copy, if one of them is there.",
    )
    allow_downloads: bool = Field(
        False,
        description="Whether missing weights of a metric may be downloaded to"
        " ~/.cache/dpnet/weights. Without weights the metric is not computed.",
    )

    def requested(self) -> dict[str, Any]:
        """Return the settings that change the result, for a request."""
        return self.model_dump(exclude=_NOT_REQUESTED)
