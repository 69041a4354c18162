"""The diagnosis of stage 1: is its latent space fit for diffusion?"""

import torch

from pretrain.config.sections import Diagnose
from pretrain.diagnose import model_checks
from pretrain.diagnose.diagnosis import Diagnosis, heldout, phase, training
from pretrain.diagnose.page import Panel
from pretrain.diagnose.panels import draw_basin, draw_noise, draw_vae_floors
from pretrain.diagnose.verdicts import Figures, Verdict, at_least, at_most, quarters
from pretrain.stages.vae import VAEStage
from pretrain.stages.vae_config import VAERun


def measure(stage: VAEStage, device: torch.device) -> Figures:
    """Checks 1 to 4 and 9 on a stage-1 run by itself."""
    figures, posterior = space_figures(stage, device, set_statistics=True)
    with phase("VAE: floors of its latents"):
        floors = posterior.floors()
    figures |= {f"{name}_floor": values for name, values in model_checks.by_quarter(floors).items()}
    figures["within_token_variance"] = floors.within_token_variance
    rows = training(stage.config, device, max(1, stage.config.diagnose.rows // 2))
    with phase("VAE: training rows", len(rows)) as tick:
        figures["training_token_accuracy"] = model_checks.heldout_metrics(stage, rows, tick)["token_accuracy"]
    return figures


def space_figures(
    stage: VAEStage, device: torch.device, set_statistics: bool
) -> tuple[Figures, model_checks.Posterior]:
    """Checks 2 to 4, and the posteriors of the held-out rows.

    set_statistics: standardise the latents by these rows, because no stage 2 has measured their statistics.
    """
    batches = heldout(stage.config, device)
    with phase("VAE: reconstruction and REPA", len(batches)) as tick:
        metrics, errors = model_checks.heldout_metrics_with_errors(stage, batches, tick)
    figures: Figures = {"vae_token_accuracy": metrics["token_accuracy"]}
    figures |= {"vae_token_accuracy_error": errors["token_accuracy"]}
    figures |= {"repa_cosine_excess_error": errors.get("repa_cosine_excess")}
    for name in ("ce", "kl_per_token", "repa_cosine", "repa_cosine_excess"):
        figures[name if name.startswith("repa") else f"vae_{name}"] = metrics.get(name)
    with phase("VAE: posterior and decoder", len(batches)) as tick:
        posterior = model_checks.Posterior.of(stage.vae, batches)
        if set_statistics:
            posterior.standardise(stage.vae)
        accuracies = model_checks.decoder_basin(stage.vae, batches, tick)
    figures |= posterior.noise()
    figures |= {"noise_levels": list(model_checks.NOISE_LEVELS), "accuracy_at_noise": accuracies}
    figures["basin_radius"] = model_checks.basin_radius(accuracies)
    return figures, posterior


def space_verdicts(figures: Figures, limits: Diagnose, expects_teacher: bool) -> list[Verdict]:
    """Is the latent space fit for diffusion? With `expects_teacher`, REPA must have been measured."""
    accuracy, accuracy_error = figures["vae_token_accuracy"], figures.get("vae_token_accuracy_error")
    verdicts = [
        at_most(2, "noise in sampled latents", figures["posterior_noise_share"], limits.max_posterior_noise_share),
        Verdict(2, "channels that are mostly noise (s > 10)", f"{figures['dead_channels']}"),
        at_least(3, "VAE token accuracy", accuracy, limits.min_token_accuracy, ".4f", accuracy_error),
        at_least(3, "decoder basin, radius for 90 %", figures["basin_radius"], limits.min_basin_radius, ".2f"),
    ]
    if figures.get("repa_cosine_excess") is not None or expects_teacher:
        excess = figures.get("repa_cosine_excess")
        error = figures.get("repa_cosine_excess_error")
        verdicts.append(at_least(4, "REPA cosine above shuffled pairs", excess, limits.min_repa_excess, error=error))
    else:
        verdicts.append(Verdict(4, "REPA cosine above shuffled pairs", "no teacher"))
    return verdicts


def judge(figures: Figures, config: VAERun) -> list[Verdict]:
    """The latent space, its floors, and the training rows beside the held-out ones."""
    return [
        *space_verdicts(figures, config.diagnose, expects_teacher=config.repa.weight > 0),
        Verdict(1, "covariance floor of the latents, by t", quarters(figures["covariance_floor"])),
        Verdict(1, "variance within tokens", f"{figures['within_token_variance']:.3f}"),
        Verdict(9, "token accuracy on training rows", f"{figures['training_token_accuracy']:.4f}"),
    ]


def panels(figures: Figures) -> list[Panel]:
    """What the page draws."""
    return [draw_vae_floors, draw_noise, draw_basin]


DIAGNOSIS = Diagnosis(measure, judge, panels)
