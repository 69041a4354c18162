"""The diagnosis of stage 2: does the TextDiT model language, on a latent space that is fit for it?"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import torch

from data_pipeline.core.errors import UserError
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.prompts import prompts_of
from data_pipeline.reading.settings import Split
from modeling.times import EstimatePath
from modeling.token_statistics import log_frequencies
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.config.load import parse_config
from pretrain.config.sections import Diagnose
from pretrain.diagnose import model_checks, panels, text_checks
from pretrain.diagnose.diagnosis import Diagnosis, heldout, phase, say, training
from pretrain.diagnose.nats import draw_bound, nats_verdicts, unigram_figures
from pretrain.diagnose.page import Panel
from pretrain.diagnose.teacher import teacher_figures
from pretrain.diagnose.texts import variety_figures, variety_verdicts, word_figures, word_verdicts
from pretrain.diagnose.vae import space_figures, space_verdicts
from pretrain.diagnose.verdicts import Figures, Verdict, at_least, at_most, quarters
from pretrain.runs.record import RunRecord
from pretrain.stages.build import load_stage
from pretrain.stages.dit import DiTStage
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.exported import exported_vae
from pretrain.stages.inputs import FEATURES_KEY, VAE_KEY
from pretrain.stages.recorded import DATA_KEY, check_recorded
from pretrain.stages.samples import sample
from pretrain.stages.vae import VAEStage
from pretrain.stages.vae_config import VAERun

SWEEP_STEPS = 16


def measure(stage: DiTStage, device: torch.device) -> Figures:
    """All checks, those on its VAE included."""
    vae_stage = stage_of_vae(stage, device)
    figures, _ = space_figures(vae_stage, device, set_statistics=False)
    figures = {"vae_run": stage.config.model.vae} | figures | flow_figures(stage, vae_stage.config, device)
    return figures | text_figures(stage, device)


def stage_of_vae(stage: DiTStage, device: torch.device) -> VAEStage:
    """The stage-1 stage of a DiT's VAE, on its own data if that is still there, with its teacher's features if they are.

    Of an exported VAE, which does not say how it was trained: on the DiT's data, its windows cut as stage 1 cuts them, without a teacher.
    """
    vae = stage.config.model.vae
    if exported_vae(vae, f"--set {VAE_KEY}=") is not None:
        say(f"  {vae} is an export, which does not say how it was trained: judged on this run's data, REPA is left out")
        vae_stage = VAEStage(vae_config_of(stage), stage.config.data.manifest(), device)
        vae_stage.vae.load_state_dict(stage.vae.state_dict())
        return vae_stage.eval().requires_grad_(False).to(device)
    path = checkpoint_of(vae)
    record = RunRecord.of_checkpoint(read_manifest(path))
    config = record.run_config(str(path))
    assert isinstance(config, VAERun)  # load_vae has refused others
    config.diagnose = stage.config.diagnose
    try:
        check_recorded(config, record, {FEATURES_KEY})
    except UserError:
        config.data.path = stage.config.data.path
    try:
        check_recorded(config, record, {DATA_KEY})
        vae_stage = load_stage(config, path, device)
    except UserError as error:
        say(f"  REPA is left out: {error}")
        config.repa.weight = 0.0
        vae_stage = load_stage(config, path, device)
    assert isinstance(vae_stage, VAEStage)
    vae_stage.vae.latents_mean.copy_(stage.latents_mean)
    vae_stage.vae.latents_std.copy_(stage.latents_std)
    return vae_stage


def vae_config_of(stage: DiTStage) -> VAERun:
    """A configuration of stage 1 with the shape of a DiT's VAE, on the DiT's data."""
    values = stage.config.model_dump(mode="json", include={"data", "optimizer", "train", "diagnose"})
    values["data"]["split"] = Split(kind="truncate").model_dump(mode="json")
    model = dataclasses.asdict(stage.vae.config)
    config = parse_config(values | {"stage": "vae", "model": model, "repa": {"weight": 0.0}}, "the VAE's diagnosis")
    assert isinstance(config, VAERun)
    config.train.run = str(stage.config.run_folder)
    return config


def flow_figures(stage: DiTStage, vae: VAERun, device: torch.device) -> Figures:
    """Checks 1, 3, 5 and 6 on the DiT, its loss on training rows (check 9), and what the VAE's teacher knows of the same targets."""
    batches = heldout(stage.config, device)
    with phase("DiT: flow loss, true and foreign contexts", len(batches)) as tick:
        flow = model_checks.flow_figures(stage, batches, tick)
    if not flow.true:
        raise UserError(f"the first {stage.config.diagnose.rows} held-out rows of {stage.config.data.path} are empty")
    figures: Figures = {"flow_loss": flow.losses, "flow_loss_foreign_context": flow.foreign_losses}
    for name, values in flow.floors.items():
        figures |= {f"{name}_floor": values, f"{name}_floor_removed": flow.floors_removed[name]}
    figures |= likelihood_figures(stage, vae, batches)
    figures |= {"context_gap": flow.context_gap, "context_gap_error": flow.context_gap_error}
    figures["loss_by_target_length"] = flow.loss_by_length
    figures["within_token_variance"] = stage.floors.within_token_variance
    with phase("DiT: one-step estimates") as tick:
        accuracies, errors = model_checks.estimate_accuracy(stage, batches, tick)
    figures |= {"estimate_accuracy": accuracies, "estimate_accuracy_error": errors}
    figures["estimate_times"] = list(model_checks.TIMES)
    rows = training(stage.config, device, max(1, stage.config.diagnose.rows // 2))
    with phase("DiT: training rows", len(rows)) as tick:
        training_flow = model_checks.flow_figures(stage, rows, tick, with_foreign=False)
    held_out, trained = statistics.fmean(flow.losses), statistics.fmean(training_flow.losses)
    figures |= {"training_flow_loss": trained, "generalisation_gap": held_out / trained - 1}
    figures["generalisation_gap_error"] = (
        math.hypot(flow.loss_error, held_out / trained * training_flow.loss_error) / trained
    )
    return figures


def likelihood_figures(stage: DiTStage, vae: VAERun, batches: Sequence[Batch]) -> Figures:
    """Checks 1 and 5 in nats a token: the bound and its parts, what knows only frequencies, the teacher, and the context's worth."""
    with phase("DiT: nats per token, true and foreign contexts", len(batches)) as tick:
        found = model_checks.nats_figures(stage, batches, tick)
    unigram, counts_V = unigram_figures(stage.config, batches)
    bound, (worth, worth_error) = found.bound, found.context_worth
    figures: Figures = {
        "nats_per_token": bound.nats, "nats_per_token_error": bound.error, "nats_t0": bound.t0,
        "nats_cross_entropy": bound.cross_entropy, "nats_flow": bound.flow, "target_tokens": bound.tokens,
        "nats_times": list(found.together.times), "nats_curve": found.together.curve,
        "context_nats": worth, "context_nats_error": worth_error,
    }  # fmt: skip
    return figures | unigram | teacher_figures(vae, stage.config.data.path, batches, -log_frequencies(counts_V))


def text_figures(stage: DiTStage, device: torch.device) -> Figures:
    """Checks 7 to 9 on generated continuations of held-out contexts."""
    config, settings = stage.config, stage.config.diagnose
    path = EstimatePath()
    figures = written_figures(stage, device, path)
    if not figures:
        return {}
    few = prompts_of(heldout(config, device), settings.sample_tokens // 4)
    with phase("text: guidance sweep", SWEEP_STEPS * len(settings.sweep_scales)) as tick:
        figures["guidance_sweep"] = text_checks.guidance_sweep(stage, few, settings.sweep_scales, SWEEP_STEPS, tick)
    return figures | {"even_times": path.even_times()}


def written_figures(stage: DiTStage, device: torch.device, path: EstimatePath | None = None) -> Figures:
    """Of continuations as the run samples them, checks 7 to 9; nothing where no held-out window has a context."""
    config, settings = stage.config, stage.config.diagnose
    prompts = prompts_of(heldout(config, device), settings.sample_tokens)
    if not prompts:
        say("  no held-out window has a context: generated text is not measured")
        return {}
    scale, num_steps = settings.guidance_scale, settings.num_steps
    with phase(f"text: {num_steps} steps at guidance {scale:g}", num_steps) as tick:
        samples = sample(stage, prompts, scale, num_steps, settings.solver, tick=tick, path=path)
    generated = samples.tokens
    figures: Figures = {
        "guidance_scale": scale, "token_temperature": settings.token_temperature, "num_steps": num_steps, "solver": settings.solver,
        "generated_tokens": sum(map(len, generated)), "latent_rms": text_checks.rms(samples.latents_NZ),
    }  # fmt: skip
    figures |= variety_figures(generated, [prompt.target_T.tolist() for prompt in prompts])
    return figures | word_figures(config, config.data.manifest(), prompts, generated)


def judge(figures: Figures, config: DiTRun) -> list[Verdict]:
    """Does it model language, on a latent space that is fit for it?"""
    limits = config.diagnose
    lengths = list(figures["loss_by_target_length"].values())
    ratio = max(lengths) / (sum(figures["flow_loss"]) / len(figures["flow_loss"])) if lengths else None
    verdicts = [
        *space_verdicts(figures, limits, expects_teacher=False),
        *nats_verdicts(figures),
        Verdict(1, "flow loss, by t", quarters(figures["flow_loss"])),
        Verdict(1, "blind floor removed, by t", quarters(figures["blind_floor_removed"])),
        Verdict(1, "covariance floor removed, by t", quarters(figures["covariance_floor_removed"])),
        at_least(
            3,
            "one-step estimate decoded at t = 0.05",
            figures["estimate_accuracy"][0],
            limits.min_estimate_accuracy,
            error=figures.get("estimate_accuracy_error", [None])[0],
        ),
        Verdict(
            5, "loss of a foreign context, by t", quarters(figures["context_gap"], "+.4f", figures["context_gap_error"])
        ),
        at_most(6, "loss of the worst length / mean", ratio, limits.max_length_ratio, ".2f"),
        at_most(
            9,
            "held-out / training loss - 1",
            figures["generalisation_gap"],
            limits.max_generalisation_gap,
            error=figures.get("generalisation_gap_error"),
        ),
    ]
    verdicts += written_verdicts(figures, limits)
    return verdicts + [
        Verdict(
            7,
            f"guidance {row['guidance_scale']:g}: rms, distinct-2",
            f"{row['latent_rms']:.2f}  {row['distinct_2']:.3f}",
        )
        for row in figures.get("guidance_sweep", [])
    ]


def written_verdicts(figures: Figures, limits: Diagnose) -> list[Verdict]:
    """Checks 7 to 9 of `written_figures`."""
    if "latent_rms" not in figures:
        return [Verdict(7, "generated text", "not measured")]
    at_scale = f" at guidance {figures['guidance_scale']:g}"
    return [
        at_most(7, "rms of latents" + at_scale, figures["latent_rms"], limits.max_latent_rms, ".2f"),
        *variety_verdicts(figures, limits),
        *word_verdicts(figures, limits),
    ]


def page_panels(figures: Figures) -> list[Panel]:
    """What the page draws."""
    drawn: list[Panel] = [
        draw_bound,
        panels.draw_flow,
        panels.draw_removed,
        panels.draw_context,
        panels.draw_lengths,
        panels.draw_estimates,
        panels.draw_basin,
        panels.draw_noise,
    ]
    return [*drawn, panels.draw_guidance] if "guidance_sweep" in figures else drawn


DIAGNOSIS = Diagnosis(measure, judge, page_panels)
