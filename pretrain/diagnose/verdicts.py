"""From figures to verdicts: the thresholds of a configuration's section `diagnose`, and the table that a tired person can read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config.schema import RunConfig
from pretrain.diagnose.text_checks import COPY_WORDS
from pretrain.stages.vae import VAERun

Figures = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A line of the table; check is its number in docs/diagnosis.md, passed is None for what is only reported or could not be measured."""

    check: int
    name: str
    figure: str
    threshold: str = ""
    passed: bool | None = None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(figures: Figures, config: RunConfig) -> list[Verdict]:
    """All verdicts, by check."""
    verdicts = vae_verdicts(figures, config)
    if config.stage == "dit":
        verdicts += dit_verdicts(figures, config)
    return sorted(verdicts, key=lambda verdict: verdict.check)


def vae_verdicts(figures: Figures, config: RunConfig) -> list[Verdict]:
    """Is the latent space fit for diffusion?"""
    limits = config.diagnose
    verdicts = [
        at_most(2, "noise in sampled latents", figures["posterior_noise_share"], limits.max_posterior_noise_share),
        Verdict(2, "channels that are mostly noise (s > 10)", f"{figures['dead_channels']}"),
        at_least(3, "VAE token accuracy", figures["vae_token_accuracy"], limits.min_token_accuracy, ".4f"),
        at_least(3, "decoder basin, radius for 90 %", figures["basin_radius"], limits.min_basin_radius, ".2f"),
    ]
    if figures.get("repa_cosine_excess") is not None or (isinstance(config, VAERun) and config.repa.weight):
        excess = figures.get("repa_cosine_excess")
        verdicts.append(at_least(4, "REPA cosine above shuffled pairs", excess, limits.min_repa_excess))
    else:
        verdicts.append(Verdict(4, "REPA cosine above shuffled pairs", "no teacher"))
    if config.stage == "vae":
        verdicts += [
            Verdict(1, "unigram floor of the latents, by t", quarters(figures["unigram_floor"])),
            Verdict(1, "variance within tokens", f"{figures['within_token_variance']:.3f}"),
            Verdict(9, "token accuracy on training rows", f"{figures['training_token_accuracy']:.4f}"),
        ]
    return verdicts


def dit_verdicts(figures: Figures, config: RunConfig) -> list[Verdict]:
    """Does it model language?"""
    limits = config.diagnose
    unigram, gaps = figures["unigram_floor_removed"], figures["context_gap"]
    lengths = list(figures["loss_by_target_length"].values())
    ratio = max(lengths) / (sum(figures["flow_loss"]) / len(figures["flow_loss"])) if lengths else None
    verdicts = [
        Verdict(1, "flow loss, by t", quarters(figures["flow_loss"])),
        at_least(1, "blind floor removed, mean", figures["blind_floor_removed_mean"], limits.min_blind_floor_removed),
        Verdict(1, "covariance floor removed, by t", quarters(figures["covariance_floor_removed"])),
        Verdict(1, "unigram floor removed, by t", quarters(unigram)),
        Verdict(1, "strict unigram floor removed, by t", quarters(figures["strict_unigram_floor_removed"])),
        above(1, "unigram floor removed, first quarter", unigram[0], limits.min_unigram_floor_removed),
        at_least(
            3, "one-step estimate decoded at t = 0.05", figures["estimate_accuracy"][0], limits.min_estimate_accuracy
        ),
        Verdict(5, "loss of a foreign context, by t", quarters(gaps, "+.4f")),
        above(5, "loss of a foreign context, least of q1-q3", _least(gaps[:3]), limits.min_context_gap, ".4f"),
        at_most(6, "loss of the worst length / mean", ratio, limits.max_length_ratio, ".2f"),
        at_most(9, "held-out / training loss - 1", figures["generalisation_gap"], limits.max_generalisation_gap),
    ]
    if "latent_rms" not in figures:
        return [*verdicts, Verdict(7, "generated text", "not measured")]
    at_scale = f" at guidance {figures['guidance_scale']:g}"
    verdicts += [
        at_most(7, "rms of latents" + at_scale, figures["latent_rms"], limits.max_latent_rms, ".2f"),
        at_least(8, "distinct-2 / that of true text", figures["distinct_2_ratio"], limits.min_distinct_ratio, ".2f"),
        at_least(8, "entropy / that of true text", figures["entropy_ratio"], limits.min_entropy_ratio, ".2f"),
    ]
    verdicts += [
        Verdict(
            7,
            f"guidance {row['guidance_scale']:g}: rms, distinct-2",
            f"{row['latent_rms']:.2f}  {row['distinct_2']:.3f}",
        )
        for row in figures["guidance_sweep"]
    ]
    if "real_word_share" in figures:
        own, true = figures["copied_share"], figures["true_copied_share"]
        excess = own - true if own is not None and true is not None else None
        verdicts += [
            at_least(8, "real words", figures["real_word_share"], limits.min_real_word_share),
            at_most(9, f"copied {COPY_WORDS}-word runs above true text", excess, limits.max_copied_excess),
        ]
    return verdicts


def at_least(check: int, name: str, value: float | None, limit: float, form: str = ".3f") -> Verdict:
    """Passes from the limit on; a value that is no number fails."""
    if value is None:
        return Verdict(check, name, "not measured", f">= {limit:g}")
    return Verdict(check, name, f"{value:{form}}", f">= {limit:g}", bool(value >= limit))


def above(check: int, name: str, value: float, limit: float, form: str = ".3f") -> Verdict:
    """Passes above the limit only."""
    return Verdict(check, name, f"{value:{form}}", f"> {limit:g}", bool(value > limit))


def at_most(check: int, name: str, value: float | None, limit: float, form: str = ".3f") -> Verdict:
    """Passes up to the limit; a value that is no number fails."""
    if value is None:
        return Verdict(check, name, "not measured", f"<= {limit:g}")
    return Verdict(check, name, f"{value:{form}}", f"<= {limit:g}", bool(value <= limit))


def quarters(values: Sequence[float], form: str = ".3f") -> str:
    """Four numbers in a row."""
    return "  ".join(f"{value:{form}}" for value in values)


def _least(values: Sequence[float]) -> float:
    """The minimum, nan if any is (min() would depend on the order)."""
    return min(values) if all(value == value for value in values) else float("nan")


def table(verdicts: Sequence[Verdict]) -> str:
    """Aligned columns: check, figure, threshold, verdict."""
    words = {True: "ok", False: "FAIL", None: ""}
    rows = [("check", "figure", "threshold", "verdict")]
    rows += [(f"{v.check} {v.name}", v.figure, v.threshold, words[v.passed]) for v in verdicts]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    note = "(four figures: the quarters of t, from data to noise)"
    return "\n".join([lines[0], "-" * (sum(widths) + 6), *lines[1:], note])
