"""Fixtures shared by the tests of pretrain."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

KNOWN, APART = 8, 20
"""Words in the pairs' contexts, and how far their targets are from them."""


class Trained(NamedTuple):
    """Folders of the prepared data and of the runs of both stages."""

    data: Path
    vae: Path
    dit: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Both stages, two steps each. Read only: copy what you change."""
    from tests.pretrain import tiny_pipeline

    return Trained(*tiny_pipeline.train_both(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder of `trained`. Read only."""
    from pretrain.export.convert import convert

    return convert(trained.dit, tmp_path_factory.mktemp("export") / "textldm-tiny")


@pytest.fixture(scope="session")
def pairs(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared pairs: the target is another word for the context's last one. Read only."""
    from data_pipeline.prepare.__main__ import main as prepare
    from tests.pretrain import tiny_run

    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = []
    for _ in range(400):
        numbers = rng.integers(2, 2 + KNOWN, int(rng.integers(1, 5)))
        prompt = " ".join(f"w{number}" for number in numbers)
        lines.append(json.dumps({"prompt": prompt, "response": f"w{numbers[-1] + APART}"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    arguments = {
        "--source": folder / "pairs.jsonl", "--tokenizer": trained.data / "tokenizer", "--output": folder / "out",
        "--context-field": "prompt", "--target-field": "response", "--row-tokens": tiny_run.ROW_TOKENS,
        "--max-document-length": 16, "--min-document-length": 3, "--heldout-fraction": 0.1, "--shards": 4, "--workers": 1,
    }  # fmt: skip
    assert not prepare([str(word) for item in arguments.items() for word in item])
    return folder / "out"
