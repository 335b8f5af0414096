"""Settings of evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.uint8]


class EvaluateSettings(BaseModel):
    """What a model is evaluated on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: Literal["val", "test"] = Field("test", description="Split of the pictures.")
    seed: int = Field(0, ge=0, lt=2**53, description="Another seed lays masks on other pictures.")
    max_pairs: int = Field(
        12_000,
        ge=1,
        le=1_000_000,
        description="At most so many pairs, spread evenly over the ratio bins.",
    )
    pictures: int = Field(2, ge=0, le=50, description="Pictures of each ratio bin in the report.")
    threads: int = Field(
        0, ge=0, le=1024, description="Threads that read and measure; 0 means one for each core."
    )
