"""pretrain/train.py, whose ranks write down what they train on: a line a row of every step, in <run>.trained/."""

import json
import os
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_pipeline.reading.batch import Batch
from pretrain import train
from pretrain.engine.engine import Engine


def main(argv: list[str]) -> int:
    """pretrain/train.py's."""
    config = json.loads(Path(argv[argv.index("--config") + 1]).read_text())
    folder = Path(f"{config['train']['run']}.trained")
    folder.mkdir(exist_ok=True)
    forward_backward = Engine.forward_backward
    with open(folder / f"{os.getpid()}.jsonl", "w") as file:

        def noted(engine: Engine, batch: Batch, counts: dict[str, int], last: bool) -> Any:
            for row in described(batch):
                file.write(json.dumps({"step": engine.stage.step, "counts": counts, **row}) + "\n")
            return forward_backward(engine, batch, counts, last)

        Engine.forward_backward = noted  # type: ignore[method-assign]
        return train.main(argv)


def described(batch: Batch) -> list[dict[str, Any]]:
    """Of every row its identity, tokens, segments with their roles, the numbers that give times, and the noise's key."""
    window_ends, segment_ends = accumulate(batch.window_lengths), accumulate(batch.segment_lengths)
    window_rows = [(end - 1) // batch.row_tokens for end in window_ends]
    segment_rows = [(end - 1) // batch.row_tokens for end in segment_ends]
    segments = list(zip(batch.segment_lengths, batch.segment_roles))
    uniforms, tokens = batch.window_uniforms_W2.tolist(), batch.tokens_T.view(-1, batch.row_tokens).tolist()
    return [
        {
            "row": list(row),
            "tokens": tokens[index],
            "segments": [list(segment) for segment, at in zip(segments, segment_rows) if at == index],
            "uniforms": [pair for pair, at in zip(uniforms, window_rows) if at == index],
            "key": int(batch.row_keys_B[index]),
        }
        for index, row in enumerate(batch.rows)
    ]


def global_batches(run: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> the rows on which all ranks together trained, in the order of their tickets."""
    found = defaultdict(list)
    for file in Path(f"{run}.trained").iterdir():
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found[row["step"]].append(row)
    return {step: sorted(rows, key=lambda row: row["row"]) for step, rows in found.items()}
