"""What `textldm evaluate` costs beyond the network: seconds of writing texts over those within the DiT's own evaluations.

    python -m benchmarks.evaluating                          # dit_b's shape, random weights
    python -m benchmarks.evaluating --steps 50 --samples 1000 --device cuda

`overhead_ratio`: of everything from token ids to the text, with guidance, over the evaluations alone. Encoding and decoding are done once a
text, so fewer steps than the paper's 50 (`--steps`) give an upper bound; `fixed_s`, `evaluation_s`, so that it can be computed for
any number: `overhead_at_50`.
"""

import argparse
import dataclasses
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measuring import print_figures
from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError, cli
from modeling.textldm import TextLDM, TextLDMConfig
from pretrain.config.load import load_config
from pretrain.evaluate.records import Work
from pretrain.evaluate.samples import Sample
from pretrain.evaluate.subjects import FlowSubject, Sampling
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.vae_config import VAERun

PAPER_STEPS = 50


class Numbers:
    """A tokenizer whose texts are numbers."""

    def encode(self, text: str) -> list[int]:
        """Of a text of numbers."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        """As a text of numbers."""
        return " ".join(map(str, ids))


def make_model(dit: str, vae: str, vocab_size: int, device: torch.device) -> TextLDM:
    """Random weights in the shapes of two configurations."""
    dit_run, vae_run = load_config(dit), load_config(vae)
    if not isinstance(dit_run, DiTRun) or not isinstance(vae_run, VAERun):
        raise UserError(f"--dit {dit} --vae {vae}: expected a configuration of stage dit and one of stage vae")
    shapes = [dataclasses.asdict(run.model.architecture()) for run in (dit_run, vae_run)]
    vocabulary = {"vocab_size": vocab_size}
    dit_shape = shapes[0] | (vocabulary if shapes[0]["head"] == "categorical" else {})
    config = TextLDMConfig(vae=shapes[1] | vocabulary, dit=dit_shape, max_window=1024)
    return TextLDM(config).eval().to(device)


def measure(model: TextLDM, samples: int, tokens: int, steps: int, batch_size: int) -> dict[str, Any]:
    """The figures."""
    vocab_size, device = model.vae.config.vocab_size, next(model.parameters()).device
    words = torch.randint(vocab_size, (samples, 2, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    made = [Sample(str(i), *(" ".join(map(str, half)) for half in words[i])) for i in range(samples)]
    subject = FlowSubject(model, Numbers(), Sampling(num_steps=steps, guidance_scale=2.0, solver="euler"))
    subject.nats = lambda prompts, targets, seeds: [0.0] * len(prompts)  # type: ignore[method-assign]
    work = Work(made, subject, "model", 0, batch_size)
    within, evaluate = [], model.dit.forward

    def timed(*args: Any, **options: Any) -> Any:
        started = _now(device)
        found = evaluate(*args, **options)
        within.append(_now(device) - started)
        return found

    model.dit.forward = timed  # type: ignore[method-assign]
    work.batch(0)  # compiles what it compiles, and fills caches
    within.clear()
    started = _now(device)
    for number in tqdm(range(len(work.batches())), "batches"):
        work.batch(number)
    total, inside = _now(device) - started, sum(within)
    fixed, evaluation = (total - inside) / samples, inside / samples / (steps * 2)
    return {
        "overhead_ratio": total / inside,
        "overhead_at_50": 1 + fixed / (evaluation * PAPER_STEPS * 2),
        "fixed_s": fixed,
        "evaluation_s": evaluation,
        "network_calls": len(within),
        "samples": samples,
        "tokens": tokens,
        "steps": steps,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@cli
def main(argv: list[str] | None = None) -> None:
    """Build, measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluating", description="Seconds of writing texts over those of the network."
    )
    parser.add_argument("--dit", default="dit_b", help="configuration (%(default)s)")
    parser.add_argument("--vae", default="vae_base", help="configuration (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="(%(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of each text's context, and new ones (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of Euler (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--device", help="(a GPU if there is one)")
    args = parser.parse_args(argv)
    for name in ("samples", "tokens", "steps", "batch_size", "vocab_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    model = make_model(args.dit, args.vae, args.vocab_size, device_of(args.device))
    print_figures(measure(model, args.samples, args.tokens, args.steps, args.batch_size))


if __name__ == "__main__":
    sys.exit(main())
