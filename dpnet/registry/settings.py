"""Settings of the registry."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_prep.core.paths import NAME


class RegisterSettings(BaseModel):
    """The name and the address under which a model is registered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "dpnet",
        pattern=NAME,
        max_length=80,
        description="Name in the registry.",
    )
    promote: Literal["gate", "always", "never"] = Field(
        "gate",
        description="When a new version becomes champion: if it passes the gate (it is better than"
        " the champion on the same pairs), always, or never (only by `dpnet registry promote`).",
    )
    mlflow_alias: Literal["report", "adopt"] = Field(
        "report",
        description="What a registration does if somebody moved the alias champion in MLflow:"
        " report it and set it back, or adopt it as a promotion by hand.",
    )
    tracking_uri: str | None = Field(
        None,
        description="MLflow's server or database. By default it is MLFLOW_TRACKING_URI, or else"
        " ROOT/mlflow.db (SQLite), or a file in ~/.cache/dpnet if ROOT is on a network disk.",
    )

    def requested(self) -> dict[str, Any]:
        """Return the settings that change a version. A default adds nothing to a digest."""
        return {"model": self.model} | ({} if self.promote == "gate" else {"promote": self.promote})
