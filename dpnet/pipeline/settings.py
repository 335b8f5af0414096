"""Settings of the pipeline itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:  # the config is composed of this module's settings
    pass


class CostSettings(BaseModel):
    """Prices, for the estimate and the account of training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu_hour: float = Field(0.0, ge=0, le=1e6, description="Price of an hour of one GPU.")
    cpu_hour: float = Field(
        0.0, ge=0, le=1e6, description="Price of an hour of one training worker without a GPU."
    )
    currency: str = Field(
        "USD", min_length=1, max_length=8, description="What prices are in, as it is shown."
    )
