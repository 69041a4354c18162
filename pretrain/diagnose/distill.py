"""The diagnosis of a distilled student: does it go where its teacher goes, and does it write as text is written?

A student says where a guided teacher's path leads, not what text is likely: its bound in nats is no figure of merit. Its teacher's
diagnosis says what the two know of language.
"""

import torch
from matplotlib.axes import Axes

from pretrain.diagnose import model_checks, panels
from pretrain.diagnose.diagnosis import Diagnosis, heldout, phase
from pretrain.diagnose.dit import stage_of_vae, written_figures, written_verdicts
from pretrain.diagnose.page import FOREIGN, MODEL, Panel
from pretrain.diagnose.vae import space_figures, space_verdicts
from pretrain.diagnose.verdicts import Figures, Verdict, above
from pretrain.stages.distill import DistillStage
from pretrain.stages.distill_config import DistillRun


def measure(stage: DistillStage, device: torch.device) -> Figures:
    """The VAE's checks, the student's errors beside its teacher's unguided step, and what it writes."""
    figures: Figures = {"vae_run": stage.config.model.vae, "teacher_run": stage.config.distill.teacher}
    figures |= space_figures(stage_of_vae(stage, device), device, set_statistics=False)[0]
    batches = heldout(stage.config, device)
    batches = batches[: -(-len(batches) // stage.config.distill.num_steps)]  # each is measured at all steps
    with phase("student: steps beside its teacher's", len(batches)) as tick:
        found, errors = model_checks.heldout_metrics_with_errors(stage, batches, tick)
    figures |= {f"{name}_error": errors[name] for name in ("distill", "distill_teacher")} | found
    return figures | written_figures(stage, device)


def judge(figures: Figures, config: DistillRun) -> list[Verdict]:
    """Is it nearer to its teacher's guided steps than it was when it began, and does it write text?"""
    limits, to_one = config.diagnose, config.distill.teacher_steps
    return [
        *space_verdicts(figures, limits, expects_teacher=False),
        Verdict(1, f"error of a step, teacher's {to_one} guided steps being right", f"{figures['distill']:.4f}"),
        above(1, "share gone of the teacher's own unguided step's", figures["distilled"], 0.0),
        *written_verdicts(figures, limits),
    ]


def draw_errors(axes: Axes, figures: Figures) -> None:
    """Check 1: the student beside what it was."""
    axes.bar(
        ["teacher, one step", "student"], [figures["distill_teacher"], figures["distill"]], 0.6, color=[FOREIGN, MODEL]
    )
    axes.set_title("1  error of a step")


def page_panels(figures: Figures) -> list[Panel]:
    """What the page draws."""
    return [draw_errors, panels.draw_basin, panels.draw_noise]


DIAGNOSIS = Diagnosis(measure, judge, page_panels)
