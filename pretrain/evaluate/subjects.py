"""What is judged: whatever continues prompts or gives probabilities to text, behind one small protocol.

| `--model` | continuations | nats |
|---|---|---|
| an exported TextLDM (folder, hub id) | the flow | its bound |
| a causal language model (folder, hub id), or a run of stage ar | token by token | exact |
| a run of stage mdlm | masked diffusion | its bound |
| `ngram` | interpolated Kneser-Ney on the training shards | exact |
| `reference` | the true continuations: the upper bound of what text is | none |
| `chance` | another document's true continuation | none |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from data_pipeline.core.errors import ENDINGS, UserError, reason
from data_pipeline.core.hub import find_model
from data_pipeline.core.keys import key
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import load_prepared_tokenizer
from modeling.attention import Segments
from modeling.masked_diffusion import sample_targets, window_nats
from modeling.stock_language_model import stock_language_model
from modeling.textldm import TextLDM, TextLDMConfig
from modeling.token_transformer import TokenTransformer
from pretrain.checkpoint.find import checkpoint_of
from pretrain.diagnose.teacher import load_causal
from pretrain.evaluate.ngram import NGram
from pretrain.evaluate.windows import continued, pieces
from pretrain.export.generate import load_exported
from pretrain.runs.folder import CONFIG_NAME, config_of
from pretrain.stages.ar import ARStage
from pretrain.stages.build import load_stage
from pretrain.stages.mdlm import MDLMStage

TRUTHS = ("reference", "chance")
NGRAM = "ngram"


class Subject(Protocol):
    """A model with its tokenizer."""

    kind: str
    """What it is, in a word or two."""
    exact: bool
    """Whether `nats` is -log p itself, not an upper bound on it."""
    sampling: dict[str, Any]
    """Everything that changes its continuations, besides seeds."""

    texts: "Texts"
    """Its tokenizer."""

    def continuations(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """New tokens of each prompt, as many as its length says."""

    def nats(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[float]:
        """-log p(target | prompt) of each, or a bound on it."""


@dataclass(frozen=True)
class Sampling:
    """What a user asks of TextLDMs, or of language models; None takes the model's default."""

    num_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    solver: str | None = None
    grid: str | None = None
    token_temperature: float | None = None
    temperature: float = 1.0
    top_p: float = 1.0

    def of_flow(self) -> dict[str, Any]:
        """Arguments of `TextLDM.generate`."""
        names = ("num_steps", "guidance_scale", "guidance_interval", "solver", "grid", "token_temperature")
        return {name: getattr(self, name) for name in names}


class Texts(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids; what looks like a special token is text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, without special tokens."""


class StockTexts:
    """By a tokenizer of transformers."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class PreparedTexts:
    """By the tokenizer of prepared data. Raises: UserError where it is missing or another."""

    def __init__(self, data: str, manifest: Manifest):
        self.backend = load_prepared_tokenizer(data, manifest.tokenizer).backend

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)


class FlowSubject:
    """An exported TextLDM."""

    kind, exact = "TextLDM", False

    def __init__(self, model: TextLDM, texts: Texts, sampling: Sampling):
        self.texts = texts
        self.model, self.options = model, sampling.of_flow()
        self.sampling = model.defaults() | {name: value for name, value in self.options.items() if value is not None}

    def continuations(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        found = self.model.generate(
            prompts, max_new_tokens=list(lengths), seed=list(seeds), eos_token_id=-1, **self.options
        )
        return [ids.tolist() for ids in found]

    def nats(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[float]:
        return self.model.nll(prompts, targets, seed=list(seeds)).tolist()


class CausalSubject:
    """A causal language model. A text begins with its start token, so that its first token has a probability too.

    Shape letters: L tokens of one text, V vocabulary.
    """

    kind, exact = "causal language model", True

    def __init__(self, model: Any, texts: Texts, start_id: int | None, sampling: Sampling):
        self.model, self.texts, self.start_id = model, texts, start_id
        limit = getattr(model.config, "max_position_embeddings", None)
        self.window = None if limit is None else limit - (start_id is not None)
        self.temperature, self.top_p = sampling.temperature, sampling.top_p
        self.sampling = {"temperature": self.temperature, "top_p": self.top_p, "start_id": start_id}

    @torch.no_grad()
    def continuations(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        def one_round(places: list[int], contexts: list[list[int]], new: list[int], number: int) -> list[list[int]]:
            rows = [self._started(context) for context in contexts]
            longest = max(map(len, rows))
            ids_BL = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self.model.device)
            mask_BL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=ids_BL.device)
            found = self.model.generate(
                ids_BL,
                attention_mask=mask_BL,
                max_new_tokens=max(new),
                do_sample=False,  # the greatest of what is drawn below
                logits_processor=transformers.LogitsProcessorList([self._drawing(places, seeds, number)]),
                eos_token_id=None,
                pad_token_id=0,
            )
            return [row[longest : longest + n].tolist() for row, n in zip(found, new)]

        return continued(prompts, lengths, self.window, one_round)

    def _drawing(self, places: list[int], seeds: Sequence[int], number: int) -> Any:
        """Logits plus Gumbel noise, whose greatest is a draw from their distribution; a generator for each text, so that what is drawn
        for it is a function of its own seed."""
        drawn = [torch.Generator().manual_seed(key(seeds[i], "round", number) % 2**63) for i in places]
        top_p = transformers.TopPLogitsWarper(self.top_p) if self.top_p < 1 else None

        def processor(ids_BL: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            logits_BV = logits_BV.float() / self.temperature
            if top_p is not None:
                logits_BV = top_p(ids_BL, logits_BV)
            uniform_BV = torch.stack([torch.rand(logits_BV.shape[1], generator=one) for one in drawn]).to(
                logits_BV.device
            )
            return logits_BV - (-uniform_BV.clamp_min(1e-30).log()).log()

        return processor

    @torch.no_grad()
    def nats(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[float]:
        del seeds  # nothing is drawn
        parts = _parts(prompts, targets, self.window)
        found = []
        for part in parts:
            ids_L = torch.tensor(self._started([*part.context, *part.target]), device=self.model.device)
            logits_LV = self.model(input_ids=ids_L[None]).logits[0, -len(part.target) - 1 : -1].float()
            nats_L = torch.nn.functional.cross_entropy(logits_LV, ids_L[-len(part.target) :], reduction="none")
            found.append(float(nats_L.double().sum()))
        return _sums(parts, found, len(prompts))

    def _started(self, ids: Sequence[int]) -> list[int]:
        if self.start_id is None and len(ids) == 0:
            raise UserError(
                "this language model has no token to begin a text with; expected one with a bos or eos token"
            )
        return [*([] if self.start_id is None else [self.start_id]), *ids]


class MaskedSubject:
    """A run of stage mdlm. Shape letters: T packed tokens, W windows."""

    kind, exact = "masked diffusion", False
    DRAWS = 16
    """Numbers of masks a window of which its bound is the mean."""

    def __init__(self, model: TokenTransformer, texts: Texts, window: int, sampling: Sampling):
        self.model, self.texts, self.window = model, texts, window
        self.num_steps = sampling.num_steps or 64
        self.sampling = {"num_steps": self.num_steps}

    def continuations(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        def one_round(places: list[int], contexts: list[list[int]], new: list[int], number: int) -> list[list[int]]:
            found = []
            for i, context, length in zip(places, contexts, new):
                drawn = torch.Generator().manual_seed(key(seeds[i], "round", number) % 2**63)
                context_T = torch.tensor(context, dtype=torch.int64)
                found += sample_targets(self.model, [context_T], [length], min(self.num_steps, length), [drawn])
            return [ids.tolist() for ids in found]

        return continued(prompts, lengths, self.window, one_round)

    def nats(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[float]:
        parts = _parts(prompts, targets, self.window)
        return _sums(
            parts, [self._bound(part, key(seeds[part.text], "piece", part.number)) for part in parts], len(prompts)
        )

    def _bound(self, part: "_Part", seed: int) -> float:
        device = self.model.lm_head.weight.device
        tokens_T = torch.tensor([*part.context, *part.target], device=device)
        is_target_T = torch.arange(len(tokens_T), device=device) >= len(part.context)
        drawn = torch.Generator().manual_seed(seed % 2**63)
        scores = [torch.rand(len(tokens_T), generator=drawn).to(device) for _ in range(self.DRAWS)]
        uniform_W = torch.rand(1, generator=drawn).to(device)
        windows = Segments.from_lengths([len(tokens_T)], device)
        return float(
            window_nats(self.model, tokens_T, is_target_T, windows, uniform_W, lambda i: scores[i], self.DRAWS)[0]
        )


class NGramSubject:
    """What counting the training shards' neighbouring tokens gives without a network."""

    kind, exact = "Kneser-Ney n-grams", True

    def __init__(self, model: NGram, texts: Texts):
        self.model, self.texts = model, texts
        self.sampling = {"order": model.order, "tokens_counted": model.num_tokens}

    def continuations(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        return [self.model.sample(*given) for given in zip(prompts, lengths, seeds, strict=True)]

    def nats(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[float]:
        del seeds  # nothing is drawn
        return [self.model.nats(prompt, target) for prompt, target in zip(prompts, targets)]


@dataclass(frozen=True)
class _Part:
    """The `number`-th piece of a text."""

    text: int
    number: int
    context: list[int]
    target: list[int]


def _parts(prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], window: int | None) -> list[_Part]:
    return [
        _Part(text, number, *part)
        for text, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
        for number, part in enumerate(pieces(prompt, target, window))
        if part[1]
    ]


def _sums(parts: Sequence[_Part], nats: Sequence[float], count: int) -> list[float]:
    totals = [0.0] * count
    for part, value in zip(parts, nats, strict=True):
        totals[part.text] += value
    return totals


def open_subject(
    name: str, sampling: Sampling, device: torch.device, data: str | None, rows: int, order: int
) -> Subject | None:
    """The model of `--model`; None for what only has texts (`TRUTHS`).

    Args:
        data: folder of prepared data, for `ngram`; rows of it that are counted; order of its n-grams.

    Raises: UserError.
    """
    if name in TRUTHS:
        return None
    if name == NGRAM:
        if data is None:
            raise UserError(f"--model {NGRAM} counts the shards of prepared data: name them with --data")
        manifest = Manifest.load(data)
        return NGramSubject(NGram.count(data, manifest, rows, order), PreparedTexts(data, manifest))
    if (Path(name) / CONFIG_NAME).is_file() and (Path(name) / "checkpoints").exists():
        return _of_run(Path(name), sampling, device)
    find_model(name, "--model", "an exported folder, a run of stage ar or mdlm, a hub id, reference, chance or ngram")
    try:
        kind = transformers.PretrainedConfig.get_config_dict(name, trust_remote_code=False)[0].get("model_type")
    except ENDINGS:
        raise
    except BaseException as error:  # what transformers and the hub raise cannot be listed
        raise UserError(
            f"--model {name} cannot be loaded ({reason(error)}); expected what textldm convert wrote, or a causal language model"
        ) from None
    if kind == TextLDMConfig.model_type:
        model, tokenizer = load_exported(name, device)
        return FlowSubject(model, StockTexts(tokenizer), sampling)
    return causal_subject(name, sampling, device)


def causal_subject(name: str, sampling: Sampling, device: torch.device) -> CausalSubject:
    """A causal language model of the hub or a folder, in fp32. Raises: UserError."""
    model: Any = load_causal(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ENDINGS:
        raise
    except BaseException as error:
        raise UserError(f"{name} has no tokenizer that can be loaded: {reason(error)}") from None
    starts = (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id, model.config.eos_token_id)
    start_id = next((id_ for id_ in starts if isinstance(id_, int)), None)
    return CausalSubject(model.to(device), StockTexts(tokenizer), start_id, sampling)


def _of_run(run: Path, sampling: Sampling, device: torch.device) -> Subject:
    """Raises: UserError for stages that are not judged as runs."""
    config = config_of(run)
    if config.stage not in ("ar", "mdlm"):
        raise UserError(
            f"--model {run} is a run of stage {config.stage}; expected what textldm convert makes of it, or a run of stage ar or mdlm"
        )
    manifest = config.data.manifest()
    stage, texts = load_stage(config, checkpoint_of(run), device), PreparedTexts(config.data.path, manifest)
    if isinstance(stage, ARStage):
        stock: Any = stock_language_model(stage.model, stage.start_id, stage.max_window)
        return CausalSubject(stock.to(device), texts, stage.start_id, sampling)
    assert isinstance(stage, MDLMStage)
    return MaskedSubject(stage.model, texts, manifest.max_window, sampling)
