"""The diagnosis of the baselines over tokens: nats a token, beside what knows no neighbours and what knows no context; their text."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import SUFFIX, Batch
from data_pipeline.reading.prompts import prompts_of
from modeling.likelihood import per_token
from pretrain.diagnose.diagnosis import Diagnosis, heldout, phase, say, training
from pretrain.diagnose.model_checks import exchange_contexts
from pretrain.diagnose.nats import draw_nats, nats_verdicts, unigram_figures
from pretrain.diagnose.page import Panel
from pretrain.diagnose.texts import variety_figures, variety_verdicts, word_figures, word_verdicts
from pretrain.diagnose.verdicts import Figures, Verdict
from pretrain.stages.token_config import TokenRun
from pretrain.stages.token_stage import TokenStage

NUM_DRAWS = 16
"""Estimates of each window's nats that are averaged, where they are estimates."""


def measure(stage: TokenStage, device: torch.device) -> Figures:
    """Nats of held-out targets, with their own contexts and with others' (checks 1 and 5), training rows (9), and texts (8, 9)."""
    config = stage.config
    manifest, batches = config.data.manifest(), heldout(config, device)
    tokens_N = torch.cat([target_tokens(batch) for batch in batches])
    has_targets_N = tokens_N > 0
    if not has_targets_N.any():
        raise UserError(f"the first {config.diagnose.rows} held-out rows of {config.data.path} are empty")
    with phase("nats of the targets, true and foreign contexts", len(batches)) as tick:
        true_N, foreign_N = (
            torch.cat(parts) for parts in zip(*(both_contexts(stage, batch, tick) for batch in batches))
        )
    chosen_N = tokens_N[has_targets_N]
    nats, error = per_token(true_N[has_targets_N], chosen_N)
    worth, worth_error = per_token((foreign_N - true_N)[has_targets_N], chosen_N)
    rows = training(config, device, max(1, config.diagnose.rows // 2))
    with phase("nats of training rows", len(rows)) as tick:
        training_N = torch.cat([_ticked(stage.window_nats(batch, NUM_DRAWS).cpu(), tick) for batch in rows])
    figures: Figures = {
        "nats_per_token": nats, "nats_per_token_error": error,
        "context_nats": worth, "context_nats_error": worth_error, "target_tokens": int(chosen_N.sum()),
        "training_nats": float(training_N.sum() / sum(batch.num_tokens(SUFFIX) for batch in rows)),
    }  # fmt: skip
    figures |= unigram_figures(config, batches)[0]
    return figures | text_figures(stage, manifest, batches)


def target_tokens(batch: Batch) -> torch.Tensor:
    """Number of target tokens of each window, int64 [W]."""
    tokens_W = torch.zeros(len(batch.window_lengths), dtype=torch.int64)
    for window, length, role in zip(batch.segment_windows, batch.segment_lengths, batch.segment_roles):
        tokens_W[window] += length * (role == SUFFIX)
    return tokens_W


def both_contexts(stage: TokenStage, batch: Batch, tick: Callable[[], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of each window's targets with its own context and with another document's, float64 [W] on the CPU."""
    foreign_T = exchange_contexts(batch, batch.tokens_T[:, None])[:, 0]
    found = [stage.window_nats(shown, NUM_DRAWS).cpu() for shown in (batch, replace(batch, tokens_T=foreign_T))]
    tick()
    return found[0], found[1]


def text_figures(stage: TokenStage, manifest: Manifest, batches: Sequence[Batch]) -> Figures:
    """Checks 8 and 9 on generated continuations of held-out contexts."""
    settings = stage.config.diagnose
    prompts = prompts_of(batches, settings.sample_tokens)
    if not prompts:
        say("  no held-out window has a context: generated text is not measured")
        return {}
    with phase("text", settings.num_steps) as tick:
        generated = stage.generate(prompts, settings.num_steps, tick=tick)
    truth = [prompt.target_T.tolist() for prompt in prompts]
    figures = variety_figures(generated, truth) | {"num_steps": settings.num_steps}
    return figures | word_figures(stage.config, manifest, prompts, generated)


def judge(figures: Figures, config: TokenRun) -> list[Verdict]:
    """Does it know language, and does it read the context? Two standard errors must lie between it and what does not."""
    limits = config.diagnose
    verdicts = [
        *nats_verdicts(figures),
        Verdict(9, "nats per token on training rows", f"{figures['training_nats']:.4f}"),
    ]
    if "entropy_ratio" not in figures:
        return [*verdicts, Verdict(8, "generated text", "not measured")]
    return [*verdicts, *variety_verdicts(figures, limits), *word_verdicts(figures, limits)]


def panels(figures: Figures) -> list[Panel]:
    """What the page draws."""
    return [draw_nats]


def _ticked(nats_W: torch.Tensor, tick: Callable[[], None]) -> torch.Tensor:
    tick()
    return nats_W


DIAGNOSIS = Diagnosis(measure, judge, panels)
