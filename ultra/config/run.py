"""RunConfig: everything that one YAML file says."""

from __future__ import annotations

import logging
from typing import Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator

from ultra.config.fields import Fields
from ultra.config.model import UltraConfig
from ultra.config.training import TrainingConfig
from ultra.config.yaml12 import Dumper

log = logging.getLogger("ultra")


class RunConfig(Fields):
    """One training run: model class, architecture, training."""

    model_class: Literal["frankenstein", "mini"] = Field(
        "frankenstein", description="mini always factorises the embedding; otherwise the two are the same."
    )
    model: UltraConfig = Field(default_factory=UltraConfig, description="UltraConfig")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="TrainingConfig and run time")

    @field_validator("model")
    @classmethod
    def _mini_factorises(cls, model: UltraConfig, info: ValidationInfo) -> UltraConfig:
        if info.data.get("model_class") == "mini" and not model.use_factorized_embedding:
            log.info("model_class mini turns use_factorized_embedding on")
            return model.model_copy(update={"use_factorized_embedding": True})
        return model

    def to_yaml(self) -> str:
        """Every field in the documented layout; `load_config` reads it back to an equal RunConfig."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
