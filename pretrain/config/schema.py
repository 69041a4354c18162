"""A run's configuration, and the sections that only one stage has: every key with its type, default, unit and meaning.

Marks: [paper] is stated by TextLDM (arXiv 2605.07748). Sections of both stages: config_sections.py.
Checks across keys: config_checks.py. Reading, overrides and messages: config.py.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Self

from pydantic import (
    Field,
    create_model,
    model_validator,
)

from data_pipeline.core.settings import Section
from pretrain.config import checks
from pretrain.config.sections import About, Data, Diagnose, TelemetrySection, Train
from pretrain.engine.optim import OptimizerSettings
from pretrain.engine.schedule import Schedule


class RunConfig(Section):
    """What both stages share; a loaded configuration is a `VAERun` or a `DiTRun`."""

    stage: str
    """Which model is trained."""
    about: About = About()
    """For readers."""
    data: Data
    optimizer: OptimizerSettings
    """In a loaded configuration the section of its kind (config/load.py)."""
    schedule: Schedule = Schedule()
    train: Train
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the DeepSpeed configuration that pretrain/engine.py generates."""
    telemetry: TelemetrySection = TelemetrySection()
    diagnose: Diagnose = Diagnose()

    @property
    def run_folder(self) -> Path:
        """The run's folder, e.g. runs/dit_xl."""
        return Path(self.train.run)

    def features_folder(self) -> str | None:
        """The feature cache that a run reads beside its tokens, if it has one."""
        return None

    @model_validator(mode="after")
    def _check(self) -> Self:
        checks.check_data(self.data)
        checks.check_schedule(self.schedule, self.train.steps)
        checks.check_sharding(self.train)
        checks.check_faults(self.train)
        return self


@functools.cache
def with_optimizer(kind: type[RunConfig], settings: type[OptimizerSettings]) -> type[RunConfig]:
    """A kind of run whose section `optimizer` is that of one optimizer."""
    return create_model(kind.__name__, __base__=kind, __module__=kind.__module__, optimizer=(settings, ...))


def inherited(section: Any, plain: type) -> dict[str, Any]:
    """The fields of a plain dataclass of modeling out of the section that inherits it."""
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(plain)}
