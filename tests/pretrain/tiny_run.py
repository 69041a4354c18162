"""A run in miniature for tests of the loop: random data, a stage of one embedding and one matrix, its configuration.

`main` is pretrain/train.py's with that stage. Environment variables inject faults, by rows, which are the same whatever
the ranks: TINY_NAN="40,41" gives a nan loss for these tickets, TINY_STOP="rank:ticket" freezes the process,
TINY_RAISE="rank:ticket" raises, TINY_TERM="rank:ticket" sends it SIGTERM; TINY_SLOW="rank:seconds" makes every forward
pass of a rank take so much longer; TINY_FULL="rank" lets its first write of a checkpoint fail.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.format.manifest import Manifest, ShardInfo, TokenizerInfo, shard_name
from data_pipeline.format.shards import token_members, write_shard
from data_pipeline.reading.batch import FILLER, Batch
from pretrain.stages.base import Stage

VOCABULARY, ROW_TOKENS, ROWS_PER_STEP = 64, 32, 8


def write_data(folder: Path, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """A prepared folder of random tokens: four train shards, one held-out, rows of three windows and a filler tail."""
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    splits: dict[str, list[ShardInfo]] = {"train": [], "heldout": []}
    for split, index, count in [*(("train", i, 12 + i) for i in range(4)), ("heldout", 0, 10)]:
        rows = []
        for _ in range(count):
            lengths = np.array([10, 12, 8], np.int32)
            tokens = rng.integers(1, vocabulary, ROW_TOKENS).astype(dtype)
            tokens[30:] = 0
            rows.append((tokens, lengths))
        written = write_shard(folder / shard_name(split, index), token_members(ROW_TOKENS, dtype), rows)
        info = ShardInfo(name=shard_name(split, index), windows=3 * count, tokens=30 * count, **written._asdict())
        splits[split].append(info)
    tokenizer = TokenizerInfo(
        name="x", revision=None, sha256="0" * 64, vocab_size=vocabulary, special_ids={}, eos_id=None
    )
    manifest = Manifest.create(
        row_tokens=ROW_TOKENS, token_dtype=dtype, min_window=4, max_window=32, seed=seed, heldout_fraction=0.1,
        dedupe=False, tokenizer=tokenizer, splits=splits, source="random", statistics={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


def say_tokenizer(data: Path, info: TokenizerInfo) -> None:
    """The manifest names the tokenizer that was put beside the shards."""
    manifest = Manifest.load(data)
    fields = manifest.model_dump(exclude={"fingerprint", "format_version"})
    fields["tokenizer"] = info
    (data / "manifest.json").write_text(Manifest.create(**fields).model_dump_json())


def config_values(data: Path, run: Path, **train: object) -> dict:
    """A configuration of stage vae without a teacher; keyword arguments go to its train section."""
    return {
        "stage": "vae",
        "model": {"latent_dim": 4, "width": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "head_dim": 16},
        "data": {
            "path": str(data), "streams": 4, "rows_per_step": ROWS_PER_STEP, "micro_batch_rows": 2,
            "split": {"kind": "none"},
        },
        "repa": {"weight": 0.0},
        "optimizer": {"lr": 0.01, "ema_decay": 0.9},
        "train": {
            "run": str(run), "steps": 6, "precision": "fp32", "checkpoint_every": 2, "eval_every": 3, "eval_rows": 6,
            "log_every": 1, "watchdog_s": 60, "timeout_s": 120, "grace_s": 30, **train,
        },
    }  # fmt: skip


def write_config(path: Path, values: dict) -> Path:
    """The configuration as a file."""
    path.write_text(json.dumps(values))
    return path


@dataclass
class TinyOutput:
    """What a stage returns."""

    loss: Tensor
    metrics: dict[str, Tensor]


class TinyStage(Stage):
    """Predicts every token from its own embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def token_counts(self, batch: Batch) -> dict[str, int]:
        """Tokens that are not filler."""
        return {"tokens": sum(batch.segment_lengths) - batch.num_tokens(FILLER)}

    def flops(self, batch: Batch) -> float:
        """Of the head."""
        return 6.0 * self.head.weight.numel() * batch.tokens_T.numel()

    def summarised(self, means: dict[str, float]) -> dict[str, float]:
        """The means themselves."""
        return means

    def forward(self, batch: Batch, counts: dict[str, int]) -> TinyOutput:
        inject_faults(batch)
        logits_TV = self.head(self.embedding(batch.tokens_T))
        losses_T = F.cross_entropy(logits_TV, batch.tokens_T, reduction="none") * (batch.roles_T != FILLER)
        if {row.ticket for row in batch.rows if row.split == "train"} & tickets("TINY_NAN"):
            losses_T = losses_T * torch.nan
        weight = torch.tensor(float((batch.roles_T != FILLER).sum()))
        return TinyOutput(losses_T.sum() / counts["tokens"], {"ce": torch.stack((losses_T.sum(), weight))})


def tickets(variable: str) -> set[int]:
    """Row tickets in an environment variable."""
    return {int(ticket) for ticket in os.environ.get(variable, "").split(",") if ticket}


def inject_faults(batch: Batch) -> None:
    """Slow a rank down, freeze it, raise or signal at a row of it, as the environment says."""
    slow, _, seconds = os.environ.get("TINY_SLOW", "").partition(":")
    if slow == os.environ.get("RANK", "0"):
        time.sleep(float(seconds))
    for variable in ("TINY_STOP", "TINY_RAISE", "TINY_TERM"):
        rank, _, ticket = os.environ.get(variable, "").partition(":")
        met = any(row.split == "train" and str(row.ticket) == ticket for row in batch.rows)
        here = met and rank == os.environ.get("RANK", "0")
        if here and variable == "TINY_STOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif here and variable == "TINY_RAISE":
            raise RuntimeError("injected")
        elif here:
            os.kill(os.getpid(), signal.SIGTERM)


def full_disk_once(write: Callable) -> Callable:
    """The same function, but the first call finds no space."""
    results: Iterator[Callable] = chain([full_disk], repeat(write))
    return lambda *arguments: next(results)(*arguments)


def full_disk(*_: object) -> None:
    """What a write meets there."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(argv: list[str]) -> int:
    """pretrain/train.py with `TinyStage` in the place of the configuration's stage."""
    import pretrain.session
    from pretrain import train
    from pretrain.checkpoint import write as checkpoint_writer

    if os.environ.get("TINY_FULL") == os.environ.get("RANK"):
        checkpoint_writer.write_slices = full_disk_once(checkpoint_writer.write_slices)
    pretrain.session.build_stage = lambda config, manifest, device: TinyStage()
    return train.main(argv)
