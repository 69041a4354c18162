"""What every section of a configuration is made of, wherever it lives: a section stands beside what it configures."""

from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the configuration. Unknown keys, wrong types and non-finite numbers are errors."""

    model_config = STRICT


class OnResume(Enum):
    """Whether a resumed run may change a key: metadata of the field, `Annotated[int, OnResume.FREE]`. Without it: only by leave."""

    FREE = "moves no weight, or only by rounding: where things run, how they are sharded, watched and recorded"
    NEVER = "decides which rows and noise a step sees: the run would no longer be the function that its checkpoints belong to"
