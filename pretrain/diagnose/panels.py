"""The panels of the diagnosis's page: what is measured against t, noise, length and guidance."""

from matplotlib.axes import Axes

from pretrain.diagnose.page import FLOOR_COLORS, FOREIGN, INK, MODEL, TRUE
from pretrain.diagnose.verdicts import Figures

QUARTER_LABELS = ("0-¼", "¼-½", "½-¾", "¾-1")


def draw_flow(axes: Axes, figures: Figures) -> None:
    """Check 1: the loss between the floors."""
    axes.bar(range(4), figures["flow_loss"], 0.5, color=MODEL, label="model")
    _floor_lines(axes, figures)
    axes.set_xticks(range(4), QUARTER_LABELS)
    axes.set_ylim(0, 1.35 * max(*figures["blind_floor"], *(loss for loss in figures["flow_loss"] if loss == loss)))
    axes.set_title("1  flow loss and floors, by t")
    axes.legend(ncols=2, loc="upper center")


def _floor_lines(axes: Axes, figures: Figures) -> None:
    for name, color in FLOOR_COLORS.items():
        left, right = ([x + side for x in range(4)] for side in (-0.4, 0.4))
        axes.hlines(figures[f"{name}_floor"], left, right, color=color, lw=2.2, label=name)


def draw_removed(axes: Axes, figures: Figures) -> None:
    """Check 1: fractions removed."""
    for i, (name, color) in enumerate(FLOOR_COLORS.items()):
        places = [x + 0.2 * (i - (len(FLOOR_COLORS) - 1) / 2) for x in range(4)]
        # A model far above a floor says "no" in any case: what is below -1 is cut off, so that the rest can be read.
        axes.bar(places, [max(value, -1) for value in figures[f"{name}_floor_removed"]], 0.18, color=color, label=name)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.22 * (high - low))
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_xticks(range(4), QUARTER_LABELS)
    axes.set_title("1  fraction of each floor removed, by t")
    axes.legend(ncols=len(FLOOR_COLORS), loc="upper center")


def draw_context(axes: Axes, figures: Figures) -> None:
    """Check 5: what a foreign context costs."""
    errors = [0.0 if error != error else error for error in figures["context_gap_error"]]
    colors = [TRUE if gap > 0 else FOREIGN for gap in figures["context_gap"]]
    axes.bar(range(4), figures["context_gap"], 0.5, yerr=errors, color=colors, error_kw={"lw": 1, "ecolor": INK})
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_xticks(range(4), QUARTER_LABELS)
    axes.set_title("5  loss added by a foreign context, by t")


def draw_estimates(axes: Axes, figures: Figures) -> None:
    """Check 3: tokens decoded from the one-step estimate."""
    axes.plot(figures["estimate_times"], figures["estimate_accuracy"], "o-", color=MODEL, ms=4)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("t of the noisy target")
    axes.set_title("3  tokens right in the one-step estimate")


def draw_basin(axes: Axes, figures: Figures) -> None:
    """Check 3: the decoder under noise."""
    axes.plot(figures["noise_levels"], figures["accuracy_at_noise"], "o-", color=MODEL, ms=4)
    axes.axvline(figures["basin_radius"], color=TRUE, lw=1, ls="--")
    axes.annotate(f" 90 % at {figures['basin_radius']:.2f}", (figures["basin_radius"], 0.05), color=TRUE)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("noise on latents, in standard deviations")
    axes.set_title("3  tokens that the decoder gives back")


def draw_noise(axes: Axes, figures: Figures) -> None:
    """Check 2: noise of every channel."""
    shares = sorted(ratio / (1 + ratio) for ratio in figures["posterior_noise_per_channel"])
    axes.bar(range(len(shares)), shares, 0.9, color=MODEL)
    axes.axhline(figures["posterior_noise_share"], color=FOREIGN, lw=1, ls="--", label="mean")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("channels, sorted")
    axes.set_title("2  share of noise in a sampled latent")
    axes.legend(loc="upper left")


def draw_lengths(axes: Axes, figures: Figures) -> None:
    """Check 6: loss by target length."""
    losses = figures["loss_by_target_length"]
    axes.bar(range(len(losses)), list(losses.values()), 0.6, color=MODEL)
    axes.axhline(sum(figures["flow_loss"]) / 4, color=INK, lw=1, ls="--")
    axes.set_xticks(range(len(losses)), list(losses))
    axes.set_xlabel("tokens of the target")
    axes.set_title("6  flow loss by target length")


def draw_guidance(axes: Axes, figures: Figures) -> None:
    """Check 7: latents and variety under guidance."""
    rows = figures["guidance_sweep"]
    scales = [row["guidance_scale"] for row in rows]
    axes.plot(scales, [row["latent_rms"] for row in rows], "o-", color=MODEL, ms=4, label="rms of latents (data: 1)")
    axes.plot(scales, [row["distinct_2"] for row in rows], "s-", color=FOREIGN, ms=4, label="distinct-2")
    axes.axhline(figures["true_distinct_2"], color=FOREIGN, lw=1, ls=":", label="distinct-2 of true text")
    axes.axhline(1, color=MODEL, lw=1, ls=":")
    axes.set_ylim(0)
    axes.set_xlabel("guidance scale")
    axes.set_title("7  guidance")
    axes.legend(loc="best")


def draw_vae_floors(axes: Axes, figures: Figures) -> None:
    """Check 1 for a VAE: what its latents give away to predictors without language."""
    _floor_lines(axes, figures)
    axes.set_ylim(0, 1.35 * max(figures["blind_floor"]))
    axes.set_xticks(range(4), QUARTER_LABELS)
    axes.set_title("1  floors of the flow loss, by t")
    axes.legend(ncols=len(FLOOR_COLORS), loc="upper center")
