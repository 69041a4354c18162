"""Nats a token of the latent diffusion models and of the baselines of the same blocks, after the same tokens.

    python -m benchmarks.baselines                               # on what ./run.sh left: its data and its VAE
    python -m benchmarks.baselines --seconds 600                 # instead of the same steps, the same time of training each

Trains `ar`, `mdlm` and the DiT with both heads, `velocity` and `categorical`, each from its start on the quickstart's data; all with
the optimizer and the schedule of the quickstart's DiT, whose blocks they share. Figures are of the EMA weights on the same held-out
targets given the same contexts: exact for `ar`, upper bounds for the others.

`nats`, `errors`: per target token, and its standard error over documents. `parameters`: trained ones; the frozen VAE is beside them,
`vae_parameters`, and so are its seconds. `seconds`: of training steps. `tokens`: of training rows. `unigram`: entropy of the same
targets.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import ROOT, existing, phase, print_figures
from data_pipeline.core.errors import UserError, cli
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import SUFFIX
from modeling.likelihood import per_token
from pretrain import train
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.diagnose.model_checks import nats_figures
from pretrain.diagnose.nats import unigram_figures
from pretrain.diagnose.tokens import NUM_DRAWS, target_tokens
from pretrain.runs.folder import config_of
from pretrain.stages.build import load_stage
from pretrain.stages.dit import DiTStage
from pretrain.stages.rows import heldout_rows
from pretrain.stages.token_stage import TokenStage
from pretrain.telemetry.sinks import read_metrics

MODELS = {
    "velocity": (
        "quickstart_dit",
        ["model.head=velocity", "model.token_embedding=false", "diagnose.token_temperature=1.0"],
    ),
    "categorical": ("quickstart_dit", []),
    "mdlm": ("quickstart_mdlm", []),
    "ar": ("quickstart_ar", []),
}
"""Configuration of each, and what differs from it."""


class Figures(NamedTuple):
    """Of one model."""

    nats: float
    error: float
    parameters: int
    seconds: float
    tokens: int


def trained(name: str, quickstart: Path, folder: Path, steps: int) -> Path:
    """Train a model from its start; the run folder. Raises: UserError if that fails."""
    config, settings = MODELS[name]
    overrides = [
        f"data.path={quickstart / 'data'}", f"train.steps={steps}", "train.eval_every=0", f"train.checkpoint_every={steps}",
        f"schedule.warmup_steps={min(100, max(1, steps // 10))}", *settings,
    ]  # fmt: skip
    if config == "quickstart_dit":
        overrides.append(f"model.vae={quickstart / 'vae'}")
    flags = [flag for override in overrides for flag in ("--set", override)]
    code = train.main(["--config", config, "--run", str(folder), *flags])
    if code:
        raise UserError(f"training {name} in {folder} ended with exit code {code}; see above")
    return folder


def step_seconds(run: Path) -> float:
    """Of a training step, the mean over the logged lines but the first, which warms up."""
    lines = read_metrics(run)
    return sum(line["step_s"] for line in lines[1:] or lines) / len(lines[1:] or lines)


@torch.no_grad()
def nats_of(run: Path, rows: int) -> tuple[float, float, int]:
    """Nats a token on the first held-out rows, their standard error, and the number of trained parameters."""
    config = config_of(run)
    stage = load_stage(config, checkpoint_of(run), torch.device("cpu"))
    batches = [batch for batch in heldout_rows(config, rows) if batch.num_tokens(SUFFIX)]
    parameters = sum(p.numel() for p in stage.parameters())
    if isinstance(stage, DiTStage):
        bound = nats_figures(stage, batches).bound
        return bound.nats, bound.error, parameters
    assert isinstance(stage, TokenStage)
    tokens_N = torch.cat([target_tokens(batch) for batch in batches])
    nats_N = torch.cat([stage.window_nats(batch, NUM_DRAWS) for batch in batches])
    return *per_token(nats_N[tokens_N > 0], tokens_N[tokens_N > 0]), parameters


def measure(
    quickstart: Path, folder: Path, steps: int, seconds: float | None, rows: int, names: Sequence[str]
) -> dict[str, Any]:
    """The figures; runs go to `folder`. With `seconds`, each model's steps are those that fit, by a short run before."""
    found: dict[str, Figures] = {}
    for name in names:
        planned = steps
        if seconds is not None:
            with phase(f"{name}: how long a step takes"):
                planned = max(
                    10, round(seconds / step_seconds(trained(name, quickstart, folder / f"{name}-first", 60)))
                )
        with phase(f"{name}: {planned} steps"):
            run = trained(name, quickstart, folder / name, planned)
        with phase(f"{name}: nats a token"):
            nats, error, parameters = nats_of(run, rows)
        config, manifest = config_of(run), Manifest.load(str(quickstart / "data"))
        tokens = planned * config.data.rows_per_step * manifest.row_tokens
        found[name] = Figures(nats, error, parameters, step_seconds(run) * planned, tokens)
        print(f"{name}: {nats:.4f} +- {error:.4f} nats a token", flush=True)
    of_vae = read_manifest(checkpoint_of(quickstart / "vae")).parameters
    config = config_of(folder / names[0])
    unigram = unigram_figures(config, heldout_rows(config, rows))[0]["unigram_nats"]
    columns = {field: {name: getattr(figures, field) for name, figures in found.items()} for field in Figures._fields}
    return {
        "nats": columns["nats"], "errors": columns["error"], "parameters": columns["parameters"],
        "vae_parameters": sum(p.numel for name, p in of_vae.items() if name.startswith("vae.")), "seconds": columns["seconds"],
        "tokens": columns["tokens"], "unigram": unigram, "heldout_rows": rows,
    }  # fmt: skip


@cli
def main(argv: list[str] | None = None) -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.baselines", description=__doc__.partition("\n")[0])
    parser.add_argument("--quickstart", type=Path, default=ROOT / "runs" / "quickstart", help="what ./run.sh left")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each model (2000)")
    parser.add_argument("--seconds", type=float, help="instead: seconds of training steps of each model")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows that are measured (64)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--folder", type=Path, help="for the runs; default: a temporary one")
    args = parser.parse_args(argv)
    for part in ("data", "vae"):
        existing(args.quickstart / part, "--quickstart")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        print_figures(measure(args.quickstart, folder, args.steps, args.seconds, args.rows, args.models))


if __name__ == "__main__":
    sys.exit(main())
