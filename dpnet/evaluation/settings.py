"""Settings of evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
