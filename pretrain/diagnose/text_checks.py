"""What `textldm diagnose` asks of generated text: is it text at all, does it vary as text does, is it copied? (docs/diagnosis.md)

Every figure stands beside the same figure of the true continuations, equally long and of the same documents: most of these have no
meaning by themselves.

Shape letters: T packed tokens, Z latent dim.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import PREFIX, SUFFIX, Batch
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from data_pipeline.text.tokenization import load_prepared_tokenizer
from modeling.attention import Segments
from modeling.guidance import GuidedVelocity
from modeling.solvers import integrate
from modeling.times import EstimatePath
from pretrain.stages.dit import DiTStage

WORD = re.compile(r"[^\W\d_]+")
COPY_WORDS = 6
"""Shortest word sequence that counts as copied: shorter ones are common phrases."""
READ_ROWS = 64


@dataclass(frozen=True)
class Prompt:
    """Context (may be empty) and true target of a held-out window, int64 tokens on the CPU."""

    context_T: Tensor
    target_T: Tensor


def prompts_of(batches: Iterable[Batch], max_tokens: int) -> list[Prompt]:
    """The first windows with a context, until together they hold `max_tokens`; at least one, if there is any."""
    prompts: list[Prompt] = []
    tokens = 0
    for batch in batches:
        pieces = batch.tokens_T.cpu().split(batch.segment_lengths)
        roles = batch.segment_roles
        for i in range(len(pieces) - 1):
            same_window = batch.segment_windows[i] == batch.segment_windows[i + 1]
            if roles[i] != PREFIX or roles[i + 1] != SUFFIX or not same_window:
                continue
            length = len(pieces[i]) + len(pieces[i + 1])
            if prompts and tokens + length > max_tokens:
                return prompts
            prompts.append(Prompt(pieces[i], pieces[i + 1]))
            tokens += length
    return prompts


@torch.no_grad()
def sample(
    stage: DiTStage,
    prompts: Sequence[Prompt],
    guidance_scale: float,
    num_steps: int,
    solver: str,
    seed: int = 0,
    grid: str = "training",
    tick: Callable[[], None] = lambda: None,
    path: EstimatePath | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Generate a target of the true length for each prompt, at the run's diagnose.belief_scale; `path` is told of the estimates.

    Returns: latents of all targets [T, Z] and the tokens of each.
    """
    device = stage.latents_mean.device
    latent_dim = stage.vae.config.latent_dim
    contexts = [prompt.context_T for prompt in prompts]
    tokens_T = torch.cat(contexts).to(device)
    segments = Segments.from_lengths([len(context) for context in contexts], device)
    encoded_TZ = stage.vae.standardize(stage.vae.encode(tokens_T, segments)[0])
    pieces, is_target, noises, lengths = [], [], [], []
    generator = torch.Generator().manual_seed(seed)
    for prompt, context_TZ in zip(prompts, encoded_TZ.split([len(context) for context in contexts])):
        new = len(prompt.target_T)
        pieces += [context_TZ, context_TZ.new_zeros(new, latent_dim)]
        is_target += [torch.zeros(len(context_TZ), dtype=torch.bool), torch.ones(new, dtype=torch.bool)]
        noises.append(torch.randn(new, latent_dim, generator=generator))
        lengths.append(len(context_TZ) + new)
    latents_TZ, is_target_T = torch.cat(pieces), torch.cat(is_target).to(device)
    noise_TZ = torch.zeros_like(latents_TZ)
    noise_TZ[is_target_T] = torch.cat(noises).to(device)
    velocity = GuidedVelocity(
        stage.dit,
        latents_TZ,
        is_target_T,
        Segments.from_lengths(lengths, device),
        guidance_scale,
        belief_scale=stage.config.diagnose.belief_scale,
    )
    times = stage.times.grid(num_steps, grid).tolist()

    def on_step(step: int, t: float, estimate_TZ: Tensor) -> None:
        tick()
        if path is not None:
            path.add(t, estimate_TZ[is_target_T])

    sample_TZ = integrate(velocity, noise_TZ, times, solver, on_step)[is_target_T]
    targets = [len(prompt.target_T) for prompt in prompts]
    decoded_T = stage.vae.decode_tokens(sample_TZ, Segments.from_lengths(targets, device)).cpu()
    return sample_TZ, [part.tolist() for part in decoded_T.split(targets)]


def guidance_sweep(
    stage: DiTStage,
    prompts: Sequence[Prompt],
    scales: Sequence[float],
    num_steps: int,
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Check 7: rms of the latents (1 in the data) and distinct-2 of the tokens at each guidance scale, with second-order steps."""
    rows = []
    for scale in scales:
        sample_TZ, tokens = sample(stage, prompts, scale, num_steps, "multistep", tick=tick)
        rows.append({"guidance_scale": scale, "latent_rms": rms(sample_TZ), "distinct_2": distinct(tokens, 2)})
    return rows


def rms(latents_TZ: Tensor) -> float:
    """Root mean square."""
    return latents_TZ.double().square().mean().sqrt().item()


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of all texts (distinct-n)."""
    grams = Counter(gram for text in texts for gram in ngrams(text, n))
    return len(grams) / max(grams.total(), 1)


def entropy(texts: Sequence[Sequence[int]]) -> float:
    """Entropy in nats of the tokens' frequencies over all texts."""
    counts = Counter(token for text in texts for token in text)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


def ngrams(text: Sequence, n: int) -> Iterator[tuple]:
    """All runs of n items."""
    return (tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def words(text: str, whole: bool = True) -> list[str]:
    """Lower-cased alphabetic runs; without those at the text's very ends, which may be parts of words, unless it is `whole`."""
    found = WORD.finditer(text.lower())
    length = len(text.lower())
    return [match[0] for match in found if whole or (match.start() > 0 and match.end() < length)]


class Reader:
    """Token ids to text by the tokenizer that the data was made with. Raises: UserError when its folder is not there."""

    def __init__(self, data: str, manifest: Manifest):
        self._backend = load_prepared_tokenizer(data).backend
        self._eos = manifest.tokenizer.eos_id
        self._special = set(manifest.tokenizer.special_ids.values())

    def texts(self, tokens: Iterable[Sequence[int]]) -> list[str]:
        """The texts up to the end-of-text token; other special tokens become spaces."""
        parts = [self._parts(ids) for ids in tokens]
        decoded = iter(self._backend.decode_batch([part for of_text in parts for part in of_text]))
        return [" ".join(next(decoded) for _ in of_text) for of_text in parts]

    def _parts(self, ids: Sequence[int]) -> list[list[int]]:
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == self._eos:
                break
            if token in self._special:
                parts.append([])
            else:
                parts[-1].append(token)
        return parts


@dataclass
class TrainingText:
    """What was found when the training text was read: its words, and which of the wanted word sequences it holds."""

    words: set[str]
    found: set[tuple[str, ...]]
    rows: int

    @classmethod
    def read(
        cls,
        folder: str,
        manifest: Manifest,
        reader: Reader,
        wanted: set[tuple[str, ...]],
        max_rows: int,
        tick: Callable[[int], None] = lambda rows: None,
        **options: Any,
    ) -> "TrainingText":
        """Read `max_rows` rows of the train split, in pieces spread evenly over it; keeps no n-gram that is not wanted.

        options: of `TokenRows`.
        """
        rows = TokenRows(folder, manifest, "train", **options)
        result = cls(set(), set(), 0)
        for span in spread_spans([shard.rows for shard in manifest.splits["train"]], max_rows):
            tokens_BR, lengths = rows.read(span)
            windows = [
                piece.tolist()
                for row, row_lengths in zip(tokens_BR, lengths)
                for piece in _split(row, row_lengths.tolist())
            ]
            for text in reader.texts(windows):
                found = words(text, whole=False)  # a window may begin or end inside a word, and that is none
                result.words.update(found)
                if wanted:
                    result.found.update(wanted.intersection(ngrams(found, COPY_WORDS)))
            result.rows += span.stop - span.start
            tick(span.stop - span.start)
        return result


def spread_spans(shard_rows: Sequence[int], max_rows: int) -> list[Span]:
    """Spans of at most `READ_ROWS` rows with at most `max_rows` in all, evenly spaced over the shards; every row if there are no more."""
    spans = [
        Span(0, shard, start, min(start + READ_ROWS, rows))
        for shard, rows in enumerate(shard_rows)
        for start in range(0, rows, READ_ROWS)
    ]
    count = min(len(spans), -(-max_rows // READ_ROWS))
    chosen, left = [], max_rows
    for i in range(count):
        span = spans[i * len(spans) // count]
        chosen.append(span._replace(stop=min(span.stop, span.start + left)))
        left -= chosen[-1].stop - span.start
    return chosen


def _split(row, lengths: Sequence[int]) -> Iterator:  # type: ignore[no-untyped-def]
    start = 0
    for length in lengths:
        yield row[start : start + length]
        start += length


def copied_share(texts: Sequence[Sequence[str]], found: set[tuple[str, ...]]) -> float | None:
    """Check 9: share of the texts' `COPY_WORDS`-word sequences that the training text holds; None if they are too short for any."""
    grams = [gram for text in texts for gram in ngrams(text, COPY_WORDS)]
    return sum(gram in found for gram in grams) / len(grams) if grams else None


def real_word_share(texts: Sequence[Sequence[str]], vocabulary: set[str]) -> float | None:
    """Check 8: share of words that occur in the training text; None if there is not one word."""
    everything = [word for text in texts for word in text]
    return sum(word in vocabulary for word in everything) / len(everything) if everything else None
