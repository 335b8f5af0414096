"""Settings of the pipeline itself."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CostSettings(BaseModel):
    """Prices for the estimated and the measured cost of training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu_hour: float = Field(0.0, ge=0, le=1e6, description="Price of one GPU for one hour.")
    cpu_hour: float = Field(
        0.0, ge=0, le=1e6, description="Price of one training worker without a GPU for one hour."
    )
    s3_reads_1000: float = Field(
        0.0, ge=0, le=1e6, description="Price of 1,000 requests that read or list objects on S3."
    )
    s3_writes_1000: float = Field(
        0.0, ge=0, le=1e6, description="Price of 1,000 requests that write objects on S3."
    )
    storage_gb_month: float = Field(
        0.0, ge=0, le=1e6, description="Price of storing 1 GB (10^9 bytes) for a month."
    )
    currency: str = Field(
        "USD", min_length=1, max_length=8, description="Currency of the prices, as it is shown."
    )
