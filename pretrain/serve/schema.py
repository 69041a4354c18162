"""What requests may ask for, as OpenAI's API names it, and what of that API cannot be honoured here."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modeling.beyond_window import SEEDS

MOST_STOPS = 4
CHANGE_NOTHING = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
"""Fields of OpenAI's API that do not change an answer: accepted, whatever they say."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "frequency_penalty": (None, 0), "function_call": (None, "none", "auto"), "functions": (None, []),
    "logit_bias": (None, {}), "logprobs": (None, False), "modalities": (None, ["text"]), "presence_penalty": (None, 0),
    "reasoning_effort": (None,), "response_format": (None, {"type": "text"}), "suffix": (None, ""), "tool_choice": (None, "none", "auto"),
    "tools": (None, []), "top_k": (None, -1, 0), "top_logprobs": (None, 0), "top_p": (None, 1), "verbosity": (None,),
}  # fmt: skip
"""Fields that a text drawn at once cannot honour, and the values at which they ask for nothing."""

Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    """Nothing is converted: "5" is no number, 1 no truth."""

    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(_Strict):
    """How a stream is told."""

    include_usage: bool = False


class Sampling(_Strict):
    """What both kinds of request share; None takes the exported model's default."""

    model: str | None = None
    max_tokens: Count | None = None
    n: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    num_steps: Count | None = None
    guidance_scale: Annotated[Number, Field(ge=0, le=100)] | None = None
    solver: str | None = None
    grid: str | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None


class StepsRequest(Sampling):
    """POST /v1/steps: one text, watched on its way from noise."""

    prompt: str


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """All that it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None


def refused_field(body: Sampling) -> tuple[str, str] | None:
    """The first field that this server cannot honour, and what is wrong with it."""
    for name, value in (body.model_extra or {}).items():
        if name in CHANGE_NOTHING:
            continue
        if name in NEUTRAL:
            if not any(
                value == neutral and isinstance(value, bool) <= isinstance(neutral, bool) for neutral in NEUTRAL[name]
            ):
                return name, f"{name} cannot be honoured: this model draws all tokens of a text at once; leave it out"
            continue
        near = difflib.get_close_matches(name[:80], type(body).model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return name, f"unknown field {name[:80]!r}{hint}"
    return None
