"""Settings of evaluation."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dpnet.evaluation.protocol import METHODS

_PEER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,29}")
# Options that say where files are or how fast to work. The hash of a file is in the request.
OF_THIS_MACHINE = {"threads", "lpips_weights", "inception_weights", "allow_downloads"}
_NOT_REQUESTED = {*OF_THIS_MACHINE, "compare"}


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
    inception_weights: str | None = Field(
        None,
        min_length=1,
        description="File with the Inception weights of FID (pt_inception-2015-12-05-6726825d.pth,"
        " or its tensors as .safetensors), for FID, P-IDS and U-IDS. It is never downloaded."
        " Without it these are not computed.",
    )
    allow_downloads: bool = Field(
        False,
        description="Whether missing weights of a metric may be downloaded to"
        " ~/.cache/dpnet/weights. Without weights the metric is not computed.",
    )

    compare: dict[str, str] = Field(
        {},
        description="Other models to judge on the same pairs, each NAME: FOLDER with one picture"
        " for each pair, or NAME: models:/MODEL/VERSION for a registered version.",
    )

    @field_validator("compare")
    @classmethod
    def _names_are_short_and_free(cls, value: dict[str, str]) -> dict[str, str]:
        taken = {word.lower() for pair in METHODS.items() for word in pair}
        for name, place in value.items():
            if name.lower() in taken:
                raise ValueError(f"with another name than {name}, which every report has already")
            if not _PEER.fullmatch(name) or not place:
                raise ValueError(
                    "a mapping of names to folders, each name with at most 30 letters, digits, `.`,"
                    " `_` or `-`"
                )
        return value

    def requested(self) -> dict[str, Any]:
        """Return the settings that change the result, for a request."""
        return self.model_dump(exclude=_NOT_REQUESTED)
