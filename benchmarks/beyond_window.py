"""Texts beyond the window, block by block; and what ending early and choosing the best of several gain. On an exported model.

    python -m benchmarks.beyond_window --run runs/quickstart/dit --model runs/quickstart/export --teacher runs/quickstart/teacher

`later_minus_first`: the bound in nats a token of true text in later blocks minus that in the first, within held-out documents of
`--windows` windows and more (`--seen`: of the training split), of which the first four are read, each block half a window long behind half
a window of true text; with its standard error over documents, and the bound of every block. How hard the text itself is, which other parts
of a document need not be as the first, is in it: `teacher_later_minus_first` is the same difference of the teacher's nats for the same
places, `beside_teacher` ours minus the teacher's, document by document. `later_minus_as_first`: the later blocks of a long target, as `nll`
measures it whole, minus the same text, each block the first behind the same latest tokens, with other noise: what being later costs.

`patience`: of texts drawn with the model's own settings, the share of evaluations that a text does without when it ends where its
estimates have decoded to the same tokens in so many steps running, and the share of its tokens that differ from those of all steps.

`best_of`: nats a token that the teacher gives to the continuation with the least bound among the first 1, 2 and 4, and the differences
to the first one with their standard errors over prompts.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks.measuring import print_figures
from data_pipeline.core.errors import UserError, cli
from data_pipeline.text.sources import open_source
from modeling.textldm import TextLDM
from pretrain.config.schema import RunConfig
from pretrain.evaluate.subjects import Sampling, causal_subject
from pretrain.export.generate import load_exported
from pretrain.runs.folder import config_of
from pretrain.stages.rows import heldout_rows

HEAD = 16
"""Tokens by which a document is recognised."""
WINDOWS = 4
"""Of a document, at most."""
SEEDS_APART = 1 << 32
"""Between those of whole documents and those of single blocks."""
PATIENCES = (2, 3, 4, 6, 8)
CHOICES = (1, 2, 4)
BATCH = 16


def heldout_windows(config: RunConfig) -> list[list[int]]:
    """Tokens of all held-out windows."""
    return [
        piece.tolist()
        for batch in heldout_rows(config, 1 << 20, micro_batch_rows=1)
        for piece in batch.tokens_T.split(batch.window_lengths)
    ]


def long_documents(
    source: str, tokenizer: Any, windows: Sequence[Sequence[int]], tokens: int, most: int, seen: bool
) -> Iterator[list[int]]:
    """The first `most` tokens of the source's documents of at least `tokens` that begin as a held-out window; or, if `seen`, as none."""
    known = {tuple(window[:HEAD]) for window in windows}
    for text in open_source(source):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if len(ids) >= tokens and (tuple(ids[:HEAD]) in known) != seen:
            yield ids[:most]


def error(values: Sequence[float]) -> float:
    """Standard error of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def by_block(model: TextLDM, teacher: Any, documents: Sequence[list[int]]) -> dict[str, Any]:
    """Nats a token of every block of true text behind half a window of it, and of the later ones as `nll` measures long texts."""
    half = model.config.max_window // 2
    ours, theirs, chained = [], [], []
    for number, ids in enumerate(tqdm(documents, desc="documents", dynamic_ncols=True)):
        starts = range(half, len(ids) - half + 1, half)
        contexts = [ids[start - half : start] for start in starts]
        targets = [ids[start : start + half] for start in starts]
        seeds = [2 * number, *(SEEDS_APART + number * WINDOWS * 2 + i for i in range(1, len(starts)))]
        nats = [float(value) / half for value in model.nll(contexts, targets, seed=seeds)]
        whole = model.nll(contexts[:1], [ids[half : half + half * len(starts)]], seed=seeds[:1], block_size=half)
        ours.append(nats)
        chained.append((float(whole[0]) / half - nats[0]) / (len(starts) - 1))
        theirs.append([value / half for value in teacher.nats(contexts, targets, [0] * len(targets))])
    found: dict[str, Any] = {
        "documents": len(documents),
        "block_tokens": half,
        "later_blocks": sum(map(len, ours)) - len(ours),
    }
    gaps = {}
    for name, nats_of in (("", ours), ("teacher_", theirs)):
        blocks = [[nats[i] for nats in nats_of if len(nats) > i] for i in range(max(map(len, nats_of)))]
        gaps[name] = [statistics.fmean(later) - first for first, *later in nats_of]
        found |= {f"{name}nats_by_block": [round(statistics.fmean(block), 4) for block in blocks]}
        found |= {f"{name}later_minus_first": statistics.fmean(gaps[name]), f"{name}error": error(gaps[name])}
    beside = [own - other for own, other in zip(*gaps.values(), strict=True)]
    found |= {"beside_teacher": statistics.fmean(beside), "beside_teacher_error": error(beside)}
    as_first = [later - statistics.fmean(nats[1:]) for later, nats in zip(chained, ours, strict=True)]
    return found | {"later_minus_as_first": statistics.fmean(as_first), "as_first_error": error(as_first)}


def ending_early(model: TextLDM, prompts: Sequence[list[int]], new: int) -> list[dict[str, float]]:
    """What each patience saves and changes, told from the tokens of every step of the same texts."""
    steps: list[list[list[int]]] = [[] for _ in prompts]
    last: list[list[int]] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="patience", dynamic_ncols=True):
        some = prompts[start : start + BATCH]

        def seen(step: int, t: float, tokens: list[torch.Tensor], start: int = start) -> None:
            for i, ids in enumerate(tokens):
                steps[start + i].append(ids.tolist())

        seeds = range(start, start + len(some))
        last += [ids.tolist() for ids in model.generate(some, new, seed=seeds, eos_token_id=-1, on_step=seen)]
    rows = []
    for patience in PATIENCES:
        saved, changed = [], []
        for path, final in zip(steps, last, strict=True):
            end = next(
                (i for i in range(patience - 1, len(path)) if all(path[i - k] == path[i] for k in range(patience))),
                len(path),
            )
            tokens = path[end] if end < len(path) else final
            saved.append(1 - min(end + 1, len(path)) / len(path))
            changed.append(sum(a != b for a, b in zip(tokens, final, strict=True)) / len(final))
        rows.append(
            {
                "patience": patience, "evaluations_saved": statistics.fmean(saved), "saved_error": error(saved),
                "tokens_changed": statistics.fmean(changed), "changed_error": error(changed),
            }
        )  # fmt: skip
    return rows


def choosing(
    model: TextLDM, teacher: Any, prompts: Sequence[list[int]], new: int, num_steps: int
) -> list[dict[str, float]]:
    """The teacher's nats a token of the best of 1, 2 and 4 by the bound."""
    most = max(CHOICES)
    given = [prompt for prompt in prompts for _ in range(most)]
    texts: list[list[int]] = []
    bounds: list[float] = []
    for start in tqdm(range(0, len(given), BATCH), desc="best of", dynamic_ncols=True):
        some = given[start : start + BATCH]
        seeds = range(start, start + len(some))
        drawn = model.generate(some, new, num_steps=num_steps, seed=seeds, eos_token_id=-1)
        texts += [ids.tolist() for ids in drawn]
        bounds += model.nll(some, drawn, seed=[2**64 - 1 - seed for seed in seeds]).tolist()
    nats = teacher.nats(given, texts, [0] * len(given))
    by_prompt: dict[int, list[float]] = {}
    for count in CHOICES:
        by_prompt[count] = [
            nats[min(range(i, i + count), key=bounds.__getitem__)] / new for i in range(0, len(given), most)
        ]
    rows = []
    for count, values in by_prompt.items():
        gains = [value - first for value, first in zip(values, by_prompt[1], strict=True)]
        rows.append(
            {
                "best_of": count, "teacher_nats": statistics.fmean(values), "error": error(values),
                "minus_first": statistics.fmean(gains), "minus_first_error": error(gains),
            }
        )  # fmt: skip
    return rows


@cli
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beyond_window", description="Texts beyond the window, ending early, the best of n."
    )
    parser.add_argument("--run", type=Path, required=True, help="the DiT's run, whose held-out text is used")
    parser.add_argument("--model", type=Path, required=True, help="its export")
    parser.add_argument("--teacher", required=True, help="a causal language model with the same tokenizer")
    parser.add_argument("--data", help="the prepared data folder, if it moved since training")
    parser.add_argument("--source", help="where the data's documents are (as the data's manifest says)")
    parser.add_argument("--documents", type=int, default=64, help="long ones, at most (%(default)s)")
    parser.add_argument("--windows", type=int, default=2, help="that a long one has at least, 2 to 4 (%(default)s)")
    parser.add_argument(
        "--seen", action="store_true", help="long documents of the training split, where few are held out"
    )
    parser.add_argument(
        "--prompts", type=int, default=64, help="of short continuations; 0: long texts alone (%(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--num-steps", type=int, default=16, help="of the texts that are chosen among (%(default)s)")
    given = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = config_of(given.run, [f"data.path={given.data}"] if given.data else [])
    model, tokenizer = load_exported(given.model)
    teacher = causal_subject(given.teacher, Sampling(), torch.device("cpu"))
    windows = heldout_windows(config)
    if not 2 <= given.windows <= WINDOWS:
        raise UserError(f"--windows is {given.windows}; expected 2 to {WINDOWS}")
    long, most = (count * model.config.max_window for count in (given.windows, WINDOWS))
    source = given.source or config.data.manifest().source
    documents = list(islice(long_documents(source, tokenizer, windows, long, most, given.seen), given.documents))
    short = given.prompt_tokens + given.new_tokens
    prompts = [window[: given.prompt_tokens] for window in windows if len(window) >= short][: given.prompts]
    if len(documents) < 2 or (given.prompts and len(prompts) < 2):
        raise UserError(
            f"{source} has {len(documents)} held-out documents of {long} tokens and {len(prompts)} windows of {short}; expected two of each"
        )
    figures = {"seen": given.seen} | by_block(model, teacher, documents)
    if not prompts:
        print_figures(figures)
        return
    print(figures, flush=True)
    print(best := choosing(model, teacher, prompts, given.new_tokens, given.num_steps), flush=True)
    patience = ending_early(model, prompts, given.new_tokens)
    print_figures({**figures, "prompts": len(prompts), "best_of": best, "patience": patience})


if __name__ == "__main__":
    sys.exit(main(None))
