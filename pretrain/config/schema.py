"""A run's configuration: what all stages share. A stage adds its own sections by inheriting (pretrain/stages)."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, create_model, model_validator

from data_pipeline.core.settings import OnResume, Section
from data_pipeline.core.telling import without_passwords
from data_pipeline.reading.settings import Data
from pretrain.config.sections import About, Diagnose, TelemetrySection, Train
from pretrain.engine.optimizer_settings import OptimizerSettings
from pretrain.engine.schedule import Schedule
from pretrain.engine.settings import check_overrides


class RunConfig(Section):
    """What all stages share; a loaded configuration is of the stage's own class."""

    stage: Annotated[str, OnResume.NEVER]
    """Which model is trained."""
    about: Annotated[About, OnResume.FREE] = About()
    """For readers."""
    data: Data
    optimizer: OptimizerSettings
    """In a loaded configuration the section of its kind (config/load.py)."""
    schedule: Schedule = Schedule()
    train: Train
    deepspeed: Annotated[dict[str, Any], OnResume.FREE] = Field(default_factory=dict)
    """Merged over the DeepSpeed configuration that pretrain/engine/settings.py makes."""
    telemetry: Annotated[TelemetrySection, OnResume.FREE] = TelemetrySection()
    diagnose: Annotated[Diagnose, OnResume.FREE] = Diagnose()

    @property
    def run_folder(self) -> Path:
        """The run's folder, e.g. runs/dit_xl."""
        return Path(self.train.run)

    def told(self) -> dict[str, Any]:
        """The configuration as JSON for run folders, checkpoints, cards and recorders: without passwords in URLs."""
        return without_passwords(self.model_dump(mode="json"))

    def without_deletions(self) -> Self:
        """This configuration, which somebody else may have written, without the folder that it would let us delete from."""
        self.data.cache_dir = None
        return self

    @property
    def first_weights(self) -> tuple[str, str] | None:
        """Key and value that name the run whose EMA weights a new run starts from; None: from weights of its own."""
        return ("train.init_from", self.train.init_from) if self.train.init_from else None

    @property
    def earlier_stages(self) -> tuple[str, ...]:
        """Of which stages that run may be."""
        return (self.stage,)

    def features_folder(self) -> str | None:
        """The feature cache that a run reads beside its tokens, if it has one."""
        return None

    def free_on_resume(self) -> set[str]:
        """Keys that other keys' values set free, beside those that are marked so."""
        return {"train.steps"} if self.schedule.can_be_prolonged else set()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        self.schedule.check_fits(self.train.steps)
        check_overrides(self.deepspeed, self.train.zero_stage)
        return self


@functools.cache
def with_optimizer(kind: type[RunConfig], settings: type[OptimizerSettings]) -> type[RunConfig]:
    """A kind of run whose section `optimizer` is that of one optimizer."""
    return create_model(kind.__name__, __base__=kind, __module__=kind.__module__, optimizer=(settings, ...))


def inherited(section: Any, plain: type) -> dict[str, Any]:
    """The fields of a plain dataclass of modeling out of the section that inherits it."""
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(plain)}
