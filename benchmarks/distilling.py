"""What few steps cost: a distilled student beside its teacher, continuing the same prompts from the same noise.

    python -m benchmarks.distilling --student export/student

Models are exported folders, sampled as their generation_config.json says; the teacher is asked for each student's number of steps, and for
`--teacher-steps`. Prompts are the first tokens of held-out windows of `--data`. All models continue a batch of prompts before the next is
begun, so that a drift of the machine meets them alike.

`table`, for each: network evaluations a text (counted; a step under guidance is two), `generative_nll`, nats a token under the language
model `--judge`, `entropy` of the tokens' frequencies, `distinct_2`, seconds and processor seconds, and `agreement`: share of tokens
equal to those of the teacher with the most steps. `comparisons` of every student with every teacher: ratios of the first two by the same
prompts, and how many times faster. Figures with a list of three are (value, ends of the 95 % interval over prompts).
"""

import argparse
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measuring import ROOT, Spent, existing, print_figures
from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError, cli
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from modeling.textldm import TextLDM
from pretrain.diagnose.text_checks import distinct
from pretrain.evaluate.bootstrap import Interval, of_all, ratio_of_sums
from pretrain.evaluate.subjects import CausalSubject, Sampling, causal_subject
from pretrain.export.generate import load_exported

BATCH = 16
RESAMPLINGS = 200


@dataclass
class Contender:
    """A model with its number of steps, and what it wrote."""

    name: str
    model: TextLDM
    num_steps: int
    texts: list[list[int]] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    spent: list[Spent] = field(default_factory=list)
    evaluated: int = 0

    def write(self, prompts: Sequence[Tensor], first: int, new_tokens: int, seed: int) -> None:
        """Continue prompts, number `first` and following, each from the noise of its number."""

        def count(_: nn.Module, given: tuple[Any, ...]) -> None:
            self.evaluated += len(given[3].lengths)

        seeds = [seed + first + i for i in range(len(prompts))]
        options: dict[str, Any] = {"num_steps": self.num_steps, "seed": seeds, "eos_token_id": -1}
        hook = self.model.dit.register_forward_pre_hook(count)
        self.spent.append(
            Spent.by(lambda: self.texts.extend(self.model.generate(list(prompts), new_tokens, **options)))
        )
        hook.remove()

    @property
    def evaluations(self) -> float:
        """Of the network, for a text."""
        return self.evaluated / len(self.texts)

    def seconds(self) -> tuple[float, float]:
        """By the clock, and of the processor."""
        return sum(s.wall_s for s in self.spent), sum(s.cpu_s for s in self.spent)


def held_out_windows(data: str, length: int, count: int) -> list[Tensor]:
    """The first tokens of the first held-out windows that have as many. Raises: UserError."""
    manifest = Manifest.load(data)
    rows = TokenRows(data, manifest, "heldout")
    found: list[Tensor] = []
    for shard, info in enumerate(manifest.splits["heldout"]):
        tokens_BR, lengths = rows.read(Span(0, shard, 0, info.rows))
        for tokens_R, lengths_W in zip(tokens_BR, lengths):
            starts = np.cumsum(lengths_W) - lengths_W
            wanted = [start for start, own in zip(starts, lengths_W) if own >= length]
            found += [torch.from_numpy(tokens_R[start : start + length].astype(np.int64)) for start in wanted]
    if len(found) < count:
        raise UserError(
            f"{data} has {len(found)} held-out windows of {length} tokens; expected {count}: lower --prompts"
        )
    return found[:count]


def token_counts(texts: Sequence[Sequence[int]]) -> np.ndarray:
    """How often each token of the vocabulary, [N, V], occurs in each text."""
    counts_NV = np.zeros((len(texts), 1 + max(chain.from_iterable(texts))))
    for row, text in zip(counts_NV, texts):
        np.add.at(row, text, 1)
    return counts_NV


def entropy(weights_N: np.ndarray, counts_NV: np.ndarray) -> float:
    """Nats, of the tokens' frequencies over all texts."""
    shares = weights_N @ counts_NV
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * np.log(shares)).sum())


def row_of(one: Contender, reference: Contender) -> dict[str, Any]:
    """A line of the table."""
    counts_NV = token_counts(one.texts)
    equal = [sum(map(operator.eq, own, other)) for own, other in zip(one.texts, reference.texts)]
    seconds, cpu_seconds = one.seconds()
    lengths = list(map(len, one.texts))
    return {
        "model": one.name,
        "steps": one.num_steps,
        "evaluations": one.evaluations,
        "generative_nll": shown(ratio_of_sums(one.nats, lengths)),
        "entropy": shown(of_all(lambda weights_N: entropy(weights_N, counts_NV), len(counts_NV), RESAMPLINGS)),
        "distinct_2": distinct(one.texts, 2),
        "agreement": sum(equal) / sum(lengths),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
    }


def comparison(student: Contender, teacher: Contender) -> dict[str, Any]:
    """Ratios, student's over teacher's, and how many times as fast it is."""
    own_NV, their_NV = token_counts(student.texts), token_counts(teacher.texts)

    def ratio(weights_N: np.ndarray) -> float:
        return entropy(weights_N, own_NV) / entropy(weights_N, their_NV)

    own_s, their_s = student.seconds(), teacher.seconds()
    return {
        "student": student.name,
        "student_evaluations": student.evaluations,
        "teacher_evaluations": teacher.evaluations,
        "nll_ratio": shown(ratio_of_sums(student.nats, teacher.nats)),
        "entropy_ratio": shown(of_all(ratio, len(own_NV), RESAMPLINGS)),
        "times_faster": their_s[0] / own_s[0],
        "times_faster_cpu": their_s[1] / own_s[1],
    }


def shown(interval: Interval) -> list[float]:
    """Value and ends."""
    return [round(float(x), 4) for x in interval[:3]]


def measure(
    contenders: list[Contender], prompts: list[Tensor], new_tokens: int, seed: int, judge: CausalSubject
) -> None:
    """Let all write and be judged."""
    for number, first in enumerate(range(0, len(prompts), BATCH)):
        for one in contenders[:: 1 if number % 2 == 0 else -1]:
            one.write(prompts[first : first + BATCH], first, new_tokens, seed)
            print(f"{one.name}, {one.num_steps} steps: {len(one.texts)} of {len(prompts)} texts", flush=True)
    for one in contenders:
        one.texts = [list(map(int, text)) for text in one.texts]
        one.nats = judge.nats([ids.tolist() for ids in prompts], one.texts, [0] * len(prompts))


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distilling", description="A student beside its teacher."
    )
    quickstart = ROOT / "runs/quickstart"
    parser.add_argument("--student", type=Path, nargs="+", required=True, help="exported folders of stage distill")
    parser.add_argument("--teacher", type=Path, default=quickstart / "export", help="exported folder (%(default)s)")
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[50], help="beside the students' (%(default)s)")
    parser.add_argument("--data", default=str(quickstart / "data"), help="prepared folder (%(default)s)")
    parser.add_argument("--judge", default=str(quickstart / "teacher"), help="causal language model (%(default)s)")
    parser.add_argument("--prompts", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's noise (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    device = device_of(args.device)
    prompts = held_out_windows(args.data, args.prompt_tokens, args.prompts)
    teacher = load_exported(existing(args.teacher, "--teacher"), device)[0]
    students = []
    for place in args.student:
        model = load_exported(existing(place, "--student"), device)[0]
        students.append(Contender(place.name, model, model.defaults()["num_steps"]))
    steps = sorted({one.num_steps for one in students} | set(args.teacher_steps))
    teachers = [Contender("teacher", teacher, n) for n in steps]
    judge = causal_subject(args.judge, Sampling(), device)
    measure([*students, *teachers], prompts, args.new_tokens, args.seed, judge)
    figures = {
        "table": [row_of(one, teachers[-1]) for one in (*students, *teachers)],
        "comparisons": [comparison(student, one) for student in students for one in teachers],
    }
    for row in figures["table"]:
        print(row, flush=True)
    given = {
        "prompts": len(prompts),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "seed": args.seed,
    }
    print_figures(figures | given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
