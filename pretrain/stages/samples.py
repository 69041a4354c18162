"""What a run writes at its held-out evaluations: continuations of the same contexts from the same noise every time.

Shape letters: N target tokens of all prompts, Z latent dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from data_pipeline.reading.prompts import Prompt, prompts_of
from data_pipeline.text.detokenizer import Detokenizer
from modeling.continuation import decode_targets, sample_targets
from modeling.times import EstimatePath
from pretrain.stages.base import Occasion
from pretrain.stages.dit import DiTStage
from pretrain.stages.rows import heldout_rows
from pretrain.stages.token_stage import TokenStage

NUM_STEPS, SOLVER = 16, "multistep"
"""A preview; `textldm diagnose` samples as the paper does."""


@dataclass(frozen=True)
class Samples:
    """Standardised latents of all targets [N, Z] and the tokens of each."""

    latents_NZ: Tensor
    tokens: list[list[int]]


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
) -> Samples:
    """Generate a target of the true length for each prompt, at the run's diagnose.token_temperature; `path` is told of the estimates."""
    generator = torch.Generator().manual_seed(seed)
    lengths, channels = [len(prompt.target_T) for prompt in prompts], stage.vae.config.latent_dim
    noise, offsets = [torch.randn(length, channels, generator=generator) for length in lengths], None
    if spread := stage.times.spread:
        offsets = [spread * torch.randn(length, generator=generator) for length in lengths]

    def on_step(step: int, t: float, estimate_NZ: Tensor) -> None:
        tick()
        if path is not None:
            path.add(t, estimate_NZ)

    latents_NZ = sample_targets(
        stage.vae,
        stage.dit,
        [prompt.context_T for prompt in prompts],
        noise,
        stage.times.grid(num_steps, grid).tolist(),
        solver=solver,
        guidance_scale=guidance_scale,
        token_temperature=stage.config.diagnose.token_temperature,
        on_step=on_step,
        offsets=offsets,
    )
    return Samples(latents_NZ, [tokens_T.tolist() for tokens_T in decode_targets(stage.vae, latents_NZ, lengths)])


def continuations(occasion: Occasion) -> list[dict[str, str]]:
    """Of stage 2, a preview's steps at the diagnosis's guidance scale. Collective."""
    stage = occasion.stage
    assert isinstance(stage, DiTStage)
    scale = stage.config.diagnose.guidance_scale
    return written(occasion, lambda prompts: sample(stage, prompts, scale, NUM_STEPS, SOLVER).tokens)


def student_continuations(occasion: Occasion) -> list[dict[str, str]]:
    """Of a distilled student, as it is made to be sampled. Collective."""
    stage = occasion.stage
    assert isinstance(stage, DiTStage)
    own = stage.config.diagnose
    return written(
        occasion, lambda prompts: sample(stage, prompts, own.guidance_scale, own.num_steps, own.solver).tokens
    )


def token_continuations(occasion: Occasion) -> list[dict[str, str]]:
    """Of the baselines over tokens. Collective."""
    stage = occasion.stage
    assert isinstance(stage, TokenStage)
    return written(occasion, lambda prompts: stage.generate(prompts, NUM_STEPS))


def written(occasion: Occasion, generate: Callable[[Sequence[Prompt]], list[list[int]]]) -> list[dict[str, str]]:
    """{"context", "generated", "true"} texts of the first held-out windows. Collective.

    Every rank generates all of them, because under ZeRO-3 it takes all of them to gather the weights.
    """
    config, count = occasion.config, occasion.config.train.eval_samples
    if not count:
        return []
    batches = islice(heldout_rows(config, config.train.eval_rows, micro_batch_rows=1), count)
    prompts = prompts_of(batches, max_tokens=config.diagnose.sample_tokens)[:count]
    if not prompts:
        return []
    generated = occasion.call(lambda: generate(prompts))
    if not occasion.is_main:
        return []
    detokenizer = Detokenizer(config.data.path, occasion.manifest)
    contexts, true = ([part.tolist() for part in parts] for parts in zip(*((p.context_T, p.target_T) for p in prompts)))
    columns = {"context": contexts, "generated": generated, "true": true}
    texts = {name: detokenizer.texts(tokens) for name, tokens in columns.items()}
    return [dict(zip(texts, row)) for row in zip(*texts.values())]
