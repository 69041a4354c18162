"""How many steps a solver needs: tokens of a trained model's samples against those of a very fine solution from the same noise.

    python -m benchmarks.sampling --run runs/quickstart/dit

Prompts are the first held-out windows of the run; weights are the EMA of its newest checkpoint. The reference is Heun's method with
1,000 steps on the training schedule's quantiles. Agreement: share of generated tokens equal to the reference's.

`agreement_16`: the second-order multistep solver at 16 steps (16 evaluations). `agreement_euler50`: Euler at 50, the paper's
setting. `table`: agreement by solver, time grid and steps, with evaluations of the network and seconds.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import ROOT, existing, print_figures
from data_pipeline.errors import UserError, cli
from modeling.flow import GRIDS
from modeling.sampler import SOLVERS
from pretrain.diagnose import heldout, load_run, load_stage
from pretrain.latents import checkpoint_of
from pretrain.stages import DiTStage
from pretrain.text_checks import Prompt, prompts_of, sample


def measure(
    stage: DiTStage, prompts: list[Prompt], scale: float, steps: list[int], reference_steps: int, seed: int
) -> dict[str, Any]:
    """Agreement of every solver, grid and number of steps with the reference."""

    def tokens(solver: str, num_steps: int, grid: str = "training") -> list[int]:
        _, texts = sample(stage, prompts, scale, num_steps, solver, seed=seed, grid=grid)
        return [token for text in texts for token in text]

    reference = tokens("heun", reference_steps)
    table = []
    for solver, grid, num_steps in itertools.product(SOLVERS, GRIDS, steps):
        started = time.perf_counter()
        found = tokens(solver, num_steps, grid)
        table.append(
            {
                "solver": solver, "grid": grid, "steps": num_steps,
                "evaluations": num_steps if solver != "heun" else 2 * num_steps - 1,
                "agreement": sum(a == b for a, b in zip(found, reference, strict=True)) / len(reference),
                "seconds": round(time.perf_counter() - started, 2),
            }
        )  # fmt: skip
        print(
            "{solver:>10} {grid:>9} {steps:>4} steps  {agreement:.4f}  {seconds:.2f} s".format(**table[-1]), flush=True
        )
    by = {(row["solver"], row["grid"], row["steps"]): row["agreement"] for row in table}
    return {
        "agreement_16": by["multistep", "training", 16],
        "agreement_euler50": by["euler", "training", 50],
        "tokens": len(reference),
        "table": table,
    }


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description="Token agreement by solver and steps."
    )
    run = ROOT / "runs/quickstart/dit"
    parser.add_argument("--run", type=Path, default=run, help="folder of a stage-2 run (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, help="(the run's diagnose.guidance_scale)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the windows, contexts included (%(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 25, 50], help="beside 16 and 50 (%(default)s)")
    parser.add_argument("--reference-steps", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    config = load_run(existing(args.run, "--run"), [])
    device = torch.device(args.device)
    if config.stage != "dit":
        raise UserError(f"--run {args.run} is a run of stage {config.stage}; expected one of stage dit")
    stage = load_stage(config, checkpoint_of(args.run), device)
    assert isinstance(stage, DiTStage)
    prompts = prompts_of(heldout(config, device), args.tokens)
    scale = config.diagnose.guidance_scale if args.guidance_scale is None else args.guidance_scale
    steps = sorted({*args.steps, 16, 50})
    figures = measure(stage, prompts, scale, steps, args.reference_steps, args.seed)
    print_figures(figures | {"run": str(args.run), "guidance_scale": scale, "reference_steps": args.reference_steps})
    return 0


if __name__ == "__main__":
    sys.exit(main())
