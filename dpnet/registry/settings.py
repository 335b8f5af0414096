"""Settings of the registry."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RegisterSettings(BaseModel):
    """The name and the address under which a model is registered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "dpnet",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=80,
        description="Name in the registry: letters, digits, '_', '.' and '-'.",
    )
    tracking_uri: str | None = Field(
        None,
        description="MLflow's server or database. By default it is MLFLOW_TRACKING_URI, or else"
        " ROOT/mlflow.db (SQLite), or a file in ~/.cache/dpnet if ROOT is on a network disk.",
    )
