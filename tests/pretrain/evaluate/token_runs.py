"""Runs of the baselines, a few steps on the tiny pipeline's data."""

import json
import random
from pathlib import Path

from tests.pretrain import tiny_pipeline
from tests.pretrain.stages.test_token_stages import values_of


def train(stage: str, data: Path, folder: Path) -> Path:
    """A run folder of stage ar or mdlm."""
    return tiny_pipeline.start(folder, values_of(stage, data, folder / stage))


def write_texts(path: Path, count: int = 40) -> Path:
    """Documents of the tiny tokenizer's words."""
    drawn = random.Random(0)
    lines = [" ".join(f"w{drawn.randrange(1, 64)}" for _ in range(drawn.randrange(10, 24))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path
