"""lm-evaluation-harness on everything that `textldm evaluate` judges.

    textldm evaluate harness --model textldm --model_args pretrained=export/textldm-xl --tasks lambada_openai

is `lm_eval` with one model more: its registry looks for none in other packages' entry points (0.4.13), so the name is entered here, and
its own command line goes on. In Python: `import pretrain.evaluate.harness`, then lm_eval.simple_evaluate(model="textldm", ...).

Log-likelihoods of a diffusion model are minus its bound. Whether a continuation would have been the greedy one is never known: False.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import key
from modeling.shapes import DEFAULT_NEW_TOKENS
from pretrain.evaluate.records import continuation_text, split_ids
from pretrain.evaluate.samples import Sample
from pretrain.evaluate.subjects import Sampling, Subject, open_subject

NAME = "textldm"
PACKED_TOKENS = 4096
"""Of requests that are computed together, in the order of their lengths: results are the same bits whatever batch size is asked for."""


class Requests:
    """What the harness asks, answered by a subject."""

    def __init__(self, subject: Subject, seed: int):
        self.subject, self.seed = subject, seed

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log p(continuation | context) in nats; white space at a context's end belongs to the continuation."""
        ids = []
        for context, continuation in pairs:
            kept = context.rstrip()
            ids.append(split_ids(self.subject.texts, Sample("", kept, context[len(kept) :] + continuation)))
        return [-value for value in self._nats(ids)]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """log p(text), in windows with the true text before them."""
        return [-value for value in self._nats([([], self.subject.texts.encode(text)) for text in texts])]

    def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """A continuation each, up to the first of its `until`."""
        prompts = [self.subject.texts.encode(context) for context, _ in requests]
        lengths = [int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS)) for _, options in requests]
        seeds = [key(self.seed, "generate", context) for context, _ in requests]

        def answer(places: list[int]) -> list[str]:
            found = self.subject.continuations(
                [prompts[i] for i in places], [lengths[i] for i in places], [seeds[i] for i in places]
            )
            return [
                _until(continuation_text(self.subject.texts, prompts[i], new), requests[i][1].get("until"))
                for i, new in zip(places, found)
            ]

        return packed([len(prompt) + length for prompt, length in zip(prompts, lengths)], answer)

    def _nats(self, ids: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        def answer(places: list[int]) -> list[float]:
            seeds = [key(self.seed, "nats", *map(str, ids[i])) for i in places]
            return self.subject.nats([ids[i][0] for i in places], [ids[i][1] for i in places], seeds)

        return packed([len(context) + len(target) for context, target in ids], answer)


def packed(lengths: Sequence[int], answer: Callable[[list[int]], list[Any]]) -> list[Any]:
    """Answers in the order of the requests, which are asked for together, as many as hold `PACKED_TOKENS`, the shortest first."""
    found: list[Any] = [None] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    while order:
        count, total = 0, 0
        while count < len(order) and (count == 0 or total + lengths[order[count]] <= PACKED_TOKENS):
            total += lengths[order[count]]
            count += 1
        places, order = order[:count], order[count:]
        for place, value in zip(places, answer(places), strict=True):
            found[place] = value
    return found


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    for end in [ends] if isinstance(ends, str) else ends or []:
        if end:
            text = text.split(end)[0]
    return text


def register() -> type:
    """Enter the model into the harness's registry; its class. Raises: UserError where the harness is missing."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import model_registry, register_model
    except ModuleNotFoundError as error:
        raise UserError(f"package {error.name} is missing: pip install 'textldm[eval]'") from None
    import lm_eval.models  # noqa: F401  (the registry imports it while it is empty, and would not any more)

    if NAME in model_registry:
        return model_registry.get(NAME)

    class HarnessModel(LM):
        """`--model_args pretrained=FOLDER_OR_ID[,seed=0,num_steps=50,guidance_scale=2,...]`, the fields of Sampling among them."""

        def __init__(
            self, pretrained: str, seed: int = 0, device: str | None = None, data: str | None = None, **options: Any
        ):
            super().__init__()
            for name in ("batch_size", "max_batch_size"):  # what is computed together does not depend on it
                options.pop(name, None)
            self._device = device_of(device)
            try:
                sampling = Sampling(**options)
            except TypeError as error:
                raise UserError(f"--model_args: {error}") from None
            subject = open_subject(pretrained, sampling, self._device, data, rows=20_000, order=4)
            if subject is None:
                raise UserError(f"pretrained={pretrained}: expected a model that gives probabilities to text")
            self.requests = Requests(subject, int(seed))

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            found = self.requests.loglikelihood([request.args for request in requests])
            return [(value, False) for value in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return self.requests.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self.requests.generate_until([request.args for request in requests])

    return register_model(NAME)(HarnessModel)


def main(argv: list[str]) -> int:
    """`lm_eval` with these arguments. Raises: UserError."""
    register()
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
