"""Requests into draws, and tokens into answers."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from modeling.shapes import DEFAULT_NEW_TOKENS
from modeling.solvers import solver_names
from modeling.textldm import TextLDM
from modeling.times import GRIDS, TimeDistribution
from pretrain.serve.batcher import Batcher, Closed, QueueFull, Ticket
from pretrain.serve.metrics import Metrics
from pretrain.serve.replies import ApiError, error_body, event
from pretrain.serve.sampler import Draw, Settings, Watch
from pretrain.serve.schema import ChatRequest, CompletionRequest, Sampling, StepsRequest, refused_field


@dataclass(frozen=True)
class Limits:
    """Of one request: its texts, their solver's steps, and tokens of a text with its prompt (None: four windows)."""

    max_choices: int
    max_steps: int
    max_text_tokens: int | None = None


@dataclass(frozen=True)
class Choice:
    """A text of an answer; `num_new` tokens before its end."""

    text: str
    num_new: int
    finish_reason: str


@dataclass(frozen=True)
class Asked:
    """A request that can be honoured: its texts, and how they are told."""

    draws: tuple[Draw, ...]
    prompts: tuple[tuple[int, ...], ...]
    echoes: tuple[str, ...]
    stop: tuple[str, ...]
    seed: int


class Completions:
    """One model's answers."""

    def __init__(self, model: TextLDM, tokenizer: Any, name: str, batcher: Batcher, metrics: Metrics, limits: Limits):
        self.config, self.name, self.batcher, self.limits = model.config, name, batcher, limits
        self._tokenizer, self._metrics = tokenizer, metrics
        self._categorical = model.dit.config.head == "categorical"
        self._vocab_size = model.vae.config.vocab_size
        self._times = TimeDistribution(**model.config.times)
        self._defaults = model.defaults()
        self._most = limits.max_text_tokens or 4 * model.config.max_window
        self._created = int(time.time())
        self._text_thread = ThreadPoolExecutor(
            1, thread_name_prefix="tokenizer"
        )  # the library's objects serve one at a time

    def about(self) -> dict[str, Any]:
        """The model as /v1/models lists it, with what its settings may be."""
        defaults = {name: self._defaults[name] for name in ("num_steps", "guidance_scale", "solver", "grid")}
        return {
            "id": self.name, "object": "model", "created": self._created, "owned_by": "textldm", "max_window": self.config.max_window,
            "max_text_tokens": self._most,
            "max_steps": self.limits.max_steps, "max_choices": self.limits.max_choices, "has_temperature": self._categorical,
            "solvers": solver_names(), "grids": [grid for grid in GRIDS if grid != "even" or self._times.path],
            "defaults": defaults | {"temperature": self._defaults["token_temperature"], "max_tokens": DEFAULT_NEW_TOKENS},
        }  # fmt: skip

    async def completion(self, body: CompletionRequest) -> Asked:
        """Raises: ApiError."""
        given: list[Any] = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
        if given and isinstance(given[0], int):
            given = [given]
        if not given:
            raise ApiError(
                400, "prompt is an empty list; expected a text (which may be empty), ids, or a list of these", "prompt"
            )
        return await self._asked(body, given, body.max_tokens, echo=bool(body.echo))

    async def steps(self, body: StepsRequest) -> Asked:
        """Raises: ApiError."""
        if body.n not in (None, 1):
            raise ApiError(400, f"n is {body.n}; one text can be watched at a time", "n")
        return await self._asked(body, [body.prompt], body.max_tokens)

    async def chat(self, body: ChatRequest) -> Asked:
        """The tokenizer's chat template, or without one the messages' texts between blank lines. Raises: ApiError."""
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        prompt: str | list[int]
        if getattr(self._tokenizer, "chat_template", None):
            try:
                prompt = await self._in_text_thread(
                    lambda: self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                )
            except Exception as error:  # templates raise what they like
                raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from None
        else:
            prompt = "".join(f"{message['content']}\n\n" for message in messages)
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")
        return await self._asked(body, [prompt], body.max_completion_tokens or body.max_tokens)

    async def _asked(self, body: Sampling, given: list[Any], max_tokens: int | None, echo: bool = False) -> Asked:
        if refused := refused_field(body):
            raise ApiError(400, refused[1], refused[0])
        if body.model not in (None, self.name):
            raise ApiError(
                404, f"there is no model {body.model!r} here; this server has {self.name!r}", "model", "model_not_found"
            )
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options are for streams: set stream", "stream_options")
        num_choices = body.n or 1
        if len(given) * num_choices > self.limits.max_choices:
            raise ApiError(
                400,
                f"{len(given)} prompts and n = {num_choices} are more than the {self.limits.max_choices} texts of a request",
                "n",
            )
        settings = self._settings(body)
        prompts = await self._in_text_thread(lambda: [self._ids(prompt) for prompt in given])
        seed = secrets.randbits(32) if body.seed is None else body.seed
        draws = []
        for ids in prompts:
            left = self.config.max_window - len(ids)
            usual = min(DEFAULT_NEW_TOKENS, left if left > 0 else max(1, self.config.max_window // 2))
            num_new = usual if max_tokens is None else max_tokens
            if len(ids) + num_new > self._most:
                raise ApiError(
                    400,
                    f"a prompt of {len(ids)} tokens and {num_new} new ones are more than the {self._most} that a text may have here;"
                    " shorten the prompt, or ask for fewer new tokens",
                    "max_tokens" if max_tokens and max_tokens > 1 else "prompt",
                    "context_length_exceeded",
                )
            window, end_id = self.config.max_window, getattr(self.config, "eos_token_id", None)
            draws += [Draw(ids, num_new, seed, choice, settings, window, end_id) for choice in range(num_choices)]
        stop = () if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        echoes = tuple(self._decode(ids) if echo else "" for ids in prompts for _ in range(num_choices))
        return Asked(tuple(draws), tuple(prompts), echoes, stop, seed)

    def _settings(self, body: Sampling) -> Settings:
        default = self._defaults
        temperature = default["token_temperature"] if body.temperature is None else body.temperature
        if temperature == 0:
            raise ApiError(
                400,
                "temperature is 0; expected more than 0: draws are made of noise (the same seed gives the same text)",
                "temperature",
            )
        if temperature != 1 and not self._categorical:
            raise ApiError(
                400,
                f"temperature is {temperature:g}; this model has no probabilities to sharpen: leave it out, or 1",
                "temperature",
            )
        num_steps = default["num_steps"] if body.num_steps is None else body.num_steps
        if num_steps > self.limits.max_steps:
            raise ApiError(400, f"num_steps is {num_steps}; expected at most {self.limits.max_steps}", "num_steps")
        solver = default["solver"] if body.solver is None else body.solver
        grid = default["grid"] if body.grid is None else body.grid
        if solver not in solver_names():
            raise ApiError(400, f"solver {solver!r} is unknown; expected one of {', '.join(solver_names())}", "solver")
        try:
            self._times.grid(num_steps, grid)
        except ValueError as error:
            raise ApiError(400, str(error), "grid") from None
        scale = default["guidance_scale"] if body.guidance_scale is None else body.guidance_scale
        interval = tuple(default["guidance_interval"])
        return Settings(num_steps, float(scale), interval, solver, grid, float(temperature))

    def _ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            try:
                prompt = list(self._tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids)
            except Exception as error:  # of the library; half a surrogate pair, for one
                raise ApiError(400, f"the tokenizer refuses the prompt: {type(error).__name__}", "prompt") from None
        beyond = [id_ for id_ in prompt if not 0 <= id_ < self._vocab_size]
        if beyond:
            raise ApiError(
                400, f"token id {str(beyond[0])[:30]} is beyond the vocabulary of {self._vocab_size}", "prompt"
            )
        return tuple(prompt)

    def submit(self, asked: Asked, watch: Callable[[int, float, str], None] | None = None) -> Ticket:
        """Its texts' places in the queue; the first is watched. Raises: ApiError."""

        def told(step: int, t: float, tokens: list[int]) -> None:
            assert watch is not None
            watch(step, t, self._decode(tokens))

        watches: Sequence[Watch] = [told] * len(asked.draws) if watch else ()
        try:
            return self.batcher.submit(asked.draws, watches)
        except QueueFull as full:
            raise ApiError(
                429,
                f"as many texts wait as may; ask again in {full.retry_after_s} s",
                code="queue_full",
                retry_after=str(full.retry_after_s),
            ) from None
        except Closed:
            raise ApiError(503, "this server is ending", retry_after="10") from None

    async def choices(self, asked: Asked, ticket: Ticket) -> list[Choice]:
        """Raises: ApiError."""
        try:
            texts = await ticket.texts()
        except Closed:
            raise ApiError(503, "this server is ending", retry_after="10") from None
        except Exception as error:
            logging.getLogger("uvicorn.error").error("drawing failed", exc_info=error)
            raise ApiError(500, "drawing failed; the server's log says why") from None
        found = [self._choice(tokens, asked.stop) for tokens in texts]
        self._metrics.prompt_tokens.inc(sum(map(len, asked.prompts)))
        self._metrics.new_tokens.inc(sum(choice.num_new for choice in found))
        return found

    def _choice(self, tokens: list[int], stop: tuple[str, ...]) -> Choice:
        eos = getattr(self.config, "eos_token_id", None)
        reason = "length"
        if eos is not None and eos in tokens:
            tokens, reason = tokens[: tokens.index(eos)], "stop"
        text = self._decode(tokens)
        ends = [place for word in stop if (place := text.find(word)) >= 0]
        return Choice(text[: min(ends)], len(tokens), "stop") if ends else Choice(text, len(tokens), reason)

    def usage(self, asked: Asked, choices: Sequence[Choice]) -> dict[str, int]:
        """Tokens of an answer."""
        prompt, new = sum(map(len, asked.prompts)), sum(choice.num_new for choice in choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def answer(self, asked: Asked, choices: Sequence[Choice], chat: bool) -> dict[str, Any]:
        """The whole of it, as one JSON object."""
        listed = []
        for index, (choice, echo) in enumerate(zip(choices, asked.echoes)):
            said: dict[str, Any] = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            said = said if chat else {"text": echo + choice.text}
            listed.append({"index": index, **said, "logprobs": None, "finish_reason": choice.finish_reason})
        kind = "chat.completion" if chat else "text_completion"
        return {**self._head(asked, kind, chat), "choices": listed, "usage": self.usage(asked, choices)}

    async def stream(
        self, asked: Asked, ticket: Ticket, chat: bool, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events: each text in one piece, because it is drawn in one."""
        head = self._head(asked, "chat.completion.chunk" if chat else "text_completion", chat)
        try:
            choices = await self.choices(asked, ticket)
        except ApiError as error:
            yield event(_broken(error))
            return
        for index, (choice, echo) in enumerate(zip(choices, asked.echoes)):
            said: dict[str, Any] = {"delta": {"role": "assistant", "content": choice.text}}
            said = said if chat else {"text": echo + choice.text}
            ended: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            for what, reason in ((said, None), (ended, choice.finish_reason)):
                yield event({**head, "choices": [{"index": index, **what, "logprobs": None, "finish_reason": reason}]})
        if include_usage:
            yield event({**head, "choices": [], "usage": self.usage(asked, choices)})
        yield event("[DONE]")

    async def watched(
        self, asked: Asked, ticket: Ticket, steps: "asyncio.Queue[dict[str, Any]]"
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the text at every step as it would be decoded there, then the text itself."""
        working = asyncio.ensure_future(self.choices(asked, ticket))
        try:
            while not working.done() or not steps.empty():
                waiting = asyncio.ensure_future(steps.get())
                await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    yield event(waiting.result())
                else:
                    waiting.cancel()
            (choice,) = working.result()
            yield event({
                "t": 0.0, "text": choice.text, "finish_reason": choice.finish_reason, "seed": asked.seed,
                "usage": self.usage(asked, [choice]),
            })  # fmt: skip
            yield event("[DONE]")
        except ApiError as error:
            yield event(_broken(error))
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    def _head(self, asked: Asked, kind: str, chat: bool) -> dict[str, Any]:
        id_ = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        return {"id": id_, "object": kind, "created": int(time.time()), "model": self.name, "seed": asked.seed}

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    async def _in_text_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, work)


def _broken(error: ApiError) -> dict[str, Any]:
    return error_body(error.status, error.message, error.param, error.code)
