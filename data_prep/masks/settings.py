"""Settings of the masks stage."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from data_prep.core.errors import ConfigError
from data_prep.core.paths import NAME
from data_prep.masks.recipes import EXTERNAL, RECIPES, RECIPES_VERSION

KNOWN = (*RECIPES, EXTERNAL)
Polarity = Literal["white-hole", "black-hole"]
Border = Literal["any", "inside", "touching"]


class MasksSettings(BaseModel):
    """Settings that say which masks to draw, and how many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        "mixed",
        pattern=NAME,
        max_length=60,
        description="Name of the mask set: its folder under masks/.",
    )
    size: int = Field(256, ge=16, le=4096, description="Side of a mask in pixels.")
    recipes: dict[str, float] = Field(
        default_factory=lambda: {"free-form": 1.0, "strokes": 1.0},
        description=f"Weights of the recipes of training masks. Known: {', '.join(KNOWN)}.",
    )
    eval_recipes: dict[str, float] = Field(
        default_factory=dict,
        description="Weights of the recipes of evaluation masks; empty means the same.",
    )
    train: int = Field(20_000, ge=1, le=10_000_000, description="Number of training masks.")
    eval_per_bin: int = Field(
        2_000, ge=1, le=100_000, description="Number of evaluation masks in each ratio bin."
    )
    eval_border: Border = Field(
        "any",
        description="Evaluation masks inside the image's border (by 50 pixels at a side of 512),"
        " touching it, or any.",
    )
    max_attempts: int = Field(
        2_000,
        ge=1,
        le=1_000_000,
        description="Evaluation masks in a row outside a ratio bin before it is given up.",
    )
    external: str | None = Field(
        None,
        min_length=1,
        description="Mask files for the recipe `external`: a folder, an archive or an s3:// address"
        " of black and white images. If both splits draw from them, each gets half.",
    )
    external_polarity: Literal["auto", "white-hole", "black-hole"] = Field(
        "auto", description="The colour of the holes in the mask files; auto finds and reports it."
    )
    external_dilate: int = Field(
        0, ge=0, le=256, description="Pixels by which the holes of mask files grow on every side."
    )
    external_flips: bool = Field(
        False, description="Flip mask files at random, left to right and upside down."
    )
    seed: int = Field(0, ge=0, le=2**53, description="Another seed draws other masks.")
    shard_samples: int = Field(2_000, ge=1, le=100_000, description="Masks in one shard.")
    workers: int = Field(0, ge=0, le=256, description="Processes; 0: one per core.")

    @field_validator("recipes", "eval_recipes")
    @classmethod
    def _known_recipes(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        """Check the names and weights of recipes. Raises ConfigError."""
        for name, weight in weights.items():
            if name not in KNOWN:
                raise ConfigError(
                    f"masks.{info.field_name}: {name!r} is not a mask recipe: choose from"
                    f" {', '.join(KNOWN)}."
                )
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"masks.{info.field_name}.{name} is {weight}: a weight must be above 0. To do"
                    " without the recipe, leave it out."
                )
        if not weights and info.field_name == "recipes":
            raise ConfigError(f"masks.recipes is empty: name at least one of {', '.join(KNOWN)}.")
        return weights

    @model_validator(mode="after")
    def _files_and_recipe_go_together(self) -> Self:
        """Check that `external` is set only together with its recipe. Raises ConfigError."""
        if self.file_splits and self.external is None:
            raise ConfigError(
                "masks.external is missing: the recipe external needs a folder or archive of mask"
                " files."
            )
        if self.external is not None and not self.file_splits:
            raise ConfigError(
                "masks.external is set, but no recipe draws from it: add external to masks.recipes"
                " or masks.eval_recipes, for example with --set masks.eval_recipes.external=1."
            )
        return self

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """Return the weights of the recipes of each split."""
        return {"train": self.recipes, "eval": self.eval_recipes or self.recipes}

    @property
    def file_splits(self) -> list[str]:
        """Return the splits that draw from mask files."""
        return [split for split, weights in self.weights.items() if EXTERNAL in weights]

    def request_settings(self, polarity: Polarity | None) -> dict[str, Any]:
        """Return the part that changes the output; `polarity` is that of the mask files, if any."""
        common = {"size", "recipes", "train", "eval_per_bin", "max_attempts", "seed"}
        settings = self.model_dump(include={*common, "shard_samples"})
        settings["eval_recipes"] = self.weights["eval"]
        settings["recipes_version"] = RECIPES_VERSION
        if self.eval_border != "any":
            settings["eval_border"] = self.eval_border
        if polarity is not None:
            settings |= self.model_dump(include={"external_dilate", "external_flips"})
            settings["external_polarity"] = polarity
        return settings
