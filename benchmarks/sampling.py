"""How many steps a solver needs: tokens of a trained model's samples against those of a very fine solution from the same noise.

    python -m benchmarks.sampling --run runs/quickstart/dit

Prompts are the first held-out windows of the run; weights are the EMA of its newest checkpoint. The reference is `multistep` with
1,000 steps on the training schedule's quantiles. Agreement: share of generated tokens equal to the reference's.

By default the velocity is the one that was trained (token_temperature 1), under the run's guidance: a lower one bends each token's path
the more sharply where it is decided, and none of these solvers follows that in 16 evaluations (docs/decisions/sampling.md).

`agreement_16`: the best of the second-order solvers and grids at 16 steps, `best_16`; the even grid is measured on as many training
tokens. `agreement_euler50`: Euler at 50 on the training grid, the paper's setting. `evaluations_*`: of the network.
`difference_error`: standard error of the first minus the second, over prompts. `reference_agreement`: of the reference with itself
at half the steps; nothing can be told closer than that. `table`: agreement by solver, time grid and steps, with evaluations and
seconds.
"""

import argparse
import itertools
import math
import operator
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import ROOT, existing, print_figures
from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError, cli
from data_pipeline.reading.prompts import Prompt, prompts_of
from modeling.solvers import find_solver, integrate, solver_names
from modeling.times import GRIDS, EstimatePath
from pretrain.checkpoint.find import checkpoint_of
from pretrain.diagnose.diagnosis import heldout, training
from pretrain.runs.folder import config_of
from pretrain.stages.build import load_stage
from pretrain.stages.dit import DiTStage
from pretrain.stages.samples import sample


def evaluations_of(solver: str, num_steps: int) -> int:
    """Of the velocity in so many steps to t = 0, counted: the last step may need fewer."""
    calls: list[float] = []

    def still(z_TZ: torch.Tensor, t: float) -> torch.Tensor:
        calls.append(t)
        return torch.zeros_like(z_TZ)

    integrate(still, torch.zeros(1, 1), torch.linspace(1, 0, num_steps + 1).tolist(), solver)
    return len(calls)


def measure(
    stage: DiTStage, prompts: list[Prompt], scale: float, steps: list[int], reference_steps: int, seed: int
) -> dict[str, Any]:
    """Agreement of every solver, grid and number of steps with the reference."""

    def right(solver: str, num_steps: int, grid: str = "training") -> list[int]:
        """Number of tokens equal to the reference's, by prompt."""
        texts = sample(stage, prompts, scale, num_steps, solver, seed=seed, grid=grid).tokens
        return [sum(map(operator.eq, text, true)) for text, true in zip(texts, reference, strict=True)]

    reference = sample(stage, prompts, scale, reference_steps, "multistep", seed=seed).tokens
    num_tokens = sum(map(len, reference))
    halved = sum(right("multistep", reference_steps // 2)) / num_tokens
    print(f"reference against half its steps: {halved:.4f} of {num_tokens} tokens", flush=True)
    table: dict[tuple[str, str, int], dict[str, Any]] = {}
    agreeing = {}
    euler = ("euler", "training", 50)
    for solver, grid, num_steps in dict.fromkeys((euler, *itertools.product(solver_names(), GRIDS, steps))):
        started = time.perf_counter()
        key = solver, grid, num_steps
        agreeing[key] = right(solver, num_steps, grid)
        table[key] = {
            "solver": solver, "grid": grid, "steps": num_steps,
            "evaluations": evaluations_of(solver, num_steps),
            "agreement": sum(agreeing[key]) / num_tokens,
            "seconds": round(time.perf_counter() - started, 2),
        }  # fmt: skip
        print(
            "{solver:>10} {grid:>9} {steps:>4} steps  {agreement:.4f}  {seconds:.2f} s".format(**table[key]), flush=True
        )
    second_order = [key for key in table if find_solver(key[0]).order > 1 and key[2] == 16]
    ours = max(second_order, key=lambda key: (table[key]["agreement"], -table[key]["evaluations"]))
    differences = list(map(operator.sub, agreeing[ours], agreeing[euler]))
    return {
        "agreement_16": table[ours]["agreement"],
        "agreement_euler50": table[euler]["agreement"],
        "difference_error": math.sqrt(len(differences)) * statistics.pstdev(differences) / num_tokens,
        "best_16": f"{ours[0]}, {ours[1]} grid",
        "evaluations_16": table[ours]["evaluations"],
        "evaluations_euler50": table[euler]["evaluations"],
        "reference_agreement": halved,
        "tokens": num_tokens,
        "table": list(table.values()),
    }


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description="Token agreement by solver and steps."
    )
    run = ROOT / "runs/quickstart/dit"
    parser.add_argument("--run", type=Path, default=run, help="folder of a stage-2 run (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, help="(the run's diagnose.guidance_scale)")
    parser.add_argument(
        "--token-temperature",
        type=float,
        default=1.0,
        help="1 is the flow that was trained (%(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=1536, help="of the windows, contexts included (%(default)s)")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[8, 32], help="beside 16, and 50 of Euler's (%(default)s)"
    )
    parser.add_argument("--reference-steps", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    config = config_of(existing(args.run, "--run"), [f"diagnose.token_temperature={args.token_temperature}"])
    device = device_of(args.device)
    if config.stage != "dit":
        raise UserError(f"--run {args.run} is a run of stage {config.stage}; expected one of stage dit")
    stage = load_stage(config, checkpoint_of(args.run), device)
    assert isinstance(stage, DiTStage)
    prompts = prompts_of(heldout(config, device), args.tokens)
    scale = config.diagnose.guidance_scale if args.guidance_scale is None else args.guidance_scale
    path = EstimatePath()
    rows = training(config, device, config.diagnose.rows)
    sample(stage, prompts_of(rows, args.tokens), scale, 50, "euler", seed=args.seed + 1, path=path)
    stage.times = replace(stage.times, path=path.even_times())
    steps = sorted({*args.steps, 16})
    figures = measure(stage, prompts, scale, steps, args.reference_steps, args.seed)
    given = {"guidance_scale": scale, "token_temperature": config.diagnose.token_temperature, "seed": args.seed}
    print_figures(figures | given | {"run": str(args.run), "reference_steps": args.reference_steps})
    return 0


if __name__ == "__main__":
    sys.exit(main())
