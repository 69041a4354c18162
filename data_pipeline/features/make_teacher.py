"""Train a small causal language model on prepared shards: a REPA teacher where no pretrained one is at hand.

    textldm teacher --data data/quickstart --output runs/quickstart/teacher --seconds 60

A Qwen3-shaped decoder of one to two million parameters with tied embeddings, saved as a Hugging Face folder with the
data's tokenizer. Windows are sequences of their own, padded on the right. With `--seconds`, the learning rate follows
the elapsed share of the time.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from data_pipeline.core.devices import device_of, multiplies_bf16
from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.keys import generator, key
from data_pipeline.core.storage import atomic_folder, read_bytes
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from data_pipeline.text.tokenization import TOKENIZER_FILES

HEAD_DIM = 32
IGNORED = -100  # label that cross-entropy leaves out
MAX_TRAIN_TOKENS = 20_000_000  # more than a short training reads; they are held in memory
WARMUP_SHARE, FINAL_LR_SHARE = 0.05, 0.05


@dataclass(frozen=True)
class Recipe:
    """Size and optimisation of the small teacher."""

    width: int = 128
    layers: int = 5
    seconds: float | None = 60
    """Stop after this time, or ..."""
    steps: int | None = None
    """... after this many steps."""
    min_steps: int = 0
    """With `seconds`: not before this many, so that a machine that is busy with other things takes longer and does not teach less."""
    batch_tokens: int = 1024
    lr: float = 4e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise UserError("give either --seconds or --steps: one of them ends the training")
        if self.min_steps < 0 or (self.min_steps and self.seconds is None):
            raise UserError(f"--min-steps {self.min_steps}: expected at least 0, and --seconds with it")
        if (self.seconds or self.steps or 0) <= 0:
            raise UserError(f"--seconds {self.seconds} --steps {self.steps}: expected a positive number")
        if self.width % HEAD_DIM or self.width <= 0 or self.layers < 3:
            raise UserError(
                f"--width {self.width} --layers {self.layers}: expected a multiple of {HEAD_DIM} and at least 3 layers "
                "(REPA uses the third-to-last hidden state)"
            )

    def progress(self, step: int, elapsed_s: float) -> float:
        """Share of the training that is over."""
        if self.steps is not None:
            return step / self.steps
        return min(elapsed_s / (self.seconds or 1), step / self.min_steps if self.min_steps else math.inf)

    def lr_at(self, progress: float) -> float:
        """Linear warm-up, then half a cosine."""
        if progress < WARMUP_SHARE:
            return self.lr * max(progress / WARMUP_SHARE, 0.01)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE))))
        return self.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


class Windows:
    """Windows of a split in memory, as padded batches of about equal numbers of tokens: of its first shards, up to the one
    that reaches `max_tokens`.
    """

    def __init__(
        self, data: str, manifest: Manifest, split: Literal["train", "heldout"], max_tokens: int | None = None
    ):
        reader = TokenRows(data, manifest, split)
        self.windows: list[np.ndarray] = []
        self.num_tokens = 0
        for index, shard in enumerate(manifest.splits[split]):
            tokens_BR, lengths = reader.read(Span(0, index, 0, shard.rows))
            for row, row_lengths in zip(tokens_BR, lengths, strict=True):
                pieces = np.split(row, np.cumsum(row_lengths))[: len(row_lengths)]
                self.windows += [piece.copy() for piece in pieces if len(piece) > 1]
                self.num_tokens += int(row_lengths.sum())
            if max_tokens is not None and self.num_tokens >= max_tokens:
                break

    def batches(self, batch_tokens: int, seed: int, epoch: int) -> Iterator[torch.Tensor]:
        """Batches [W, L] of windows of similar length, `IGNORED` behind each, in keyed random order."""
        rng = generator("teacher batches", seed, epoch)
        # A little noise on the lengths that sort them, so that batches are not the same in every epoch.
        noisy = np.array([len(window) for window in self.windows]) * rng.uniform(0.95, 1.05, len(self.windows))
        order = np.argsort(noisy)
        groups: list[list[int]] = [[]]
        for index in order.tolist():
            if groups[-1] and len(self.windows[index]) * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
            groups[-1].append(index)
        for group in rng.permutation(len(groups)).tolist():
            yield self._pad([self.windows[index] for index in groups[group]])

    def _pad(self, windows: list[np.ndarray]) -> torch.Tensor:
        padded_WL = torch.full((len(windows), max(map(len, windows))), IGNORED)
        for row_L, window in zip(padded_WL, windows, strict=True):
            row_L[: len(window)] = torch.from_numpy(window.astype(np.int64))
        return padded_WL


def build(manifest: Manifest, recipe: Recipe) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3-shaped decoder for the data's vocabulary and windows."""
    torch.manual_seed(key("teacher weights", recipe.seed) % 2**63)
    heads = recipe.width // HEAD_DIM
    config = Qwen3Config(
        vocab_size=manifest.tokenizer.vocab_size,
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=manifest.max_window,
        tie_word_embeddings=True,
        # Measured on TinyStories at width 96, held-out nats after 120 steps: 3.62 with a range of 0.06, 3.66 with 0.1, and 4.29
        # with the library's 0.02, at which so short a training begins on a plateau.
        initializer_range=0.6 / math.sqrt(recipe.width),
        bos_token_id=None,
        eos_token_id=manifest.tokenizer.eos_id,
    )
    return Qwen3ForCausalLM(config)


def token_loss(model: Qwen3ForCausalLM, padded_WL: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, nats per predicted token."""
    logits_WLV = model(input_ids=padded_WL.clamp_min(0), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_WLV[:, :-1].flatten(0, 1).float(), padded_WL[:, 1:].flatten(), ignore_index=IGNORED
    )


def train(model: Qwen3ForCausalLM, windows: Windows, recipe: Recipe, device: torch.device) -> int:
    """AdamW until the recipe's time or steps are over; returns the number of steps."""
    if not windows.windows:
        raise UserError("the training split has no window of two tokens or more: prepare more text")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    model.train()
    started, step, epoch, num_tokens = time.monotonic(), 0, 0, 0
    batches = windows.batches(recipe.batch_tokens, recipe.seed, epoch)
    with tqdm(
        total=100,
        desc="teacher",
        unit="%",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
    ) as bar:
        while (progress := recipe.progress(step, time.monotonic() - started)) < 1:
            padded_WL = next(batches, None)
            if padded_WL is None:
                epoch += 1
                batches = windows.batches(recipe.batch_tokens, recipe.seed, epoch)
                continue
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(progress)
            with autocast(device, recipe.width):
                loss = token_loss(model, padded_WL.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            num_tokens += int((padded_WL != IGNORED).sum())
            bar.update(100 * progress - bar.n)
            if step % 10 == 0:
                rate = num_tokens / (time.monotonic() - started)
                bar.set_postfix_str(
                    f"step {step}, epoch {epoch}, loss {loss.item():.3f}, {rate:,.0f} tok/s", refresh=False
                )
        bar.update(100 - bar.n)
    return step


@torch.inference_mode()
def evaluate(model: Qwen3ForCausalLM, windows: Windows, batch_tokens: int, device: torch.device) -> float:
    """Held-out nats per token."""
    model.eval()
    total = count = 0.0
    for padded_WL in windows.batches(batch_tokens, 0, 0):
        predicted = int((padded_WL[:, 1:] != IGNORED).sum())
        total += float(token_loss(model, padded_WL.to(device))) * predicted
        count += predicted
    return total / count if count else math.nan


def autocast(device: torch.device, width: int) -> AbstractContextManager:
    """bfloat16 where it is faster: GPUs, and CPUs that multiply it once the matrices are large.

    At width 128 on one core with AMX, a step takes 0.29 s in float32 and 0.31 s in bfloat16: casting eats the gain.
    """
    if multiplies_bf16(device) and (device.type == "cuda" or width >= 512):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def save(model: Qwen3ForCausalLM, data: str, output: Path) -> None:
    """Write weights, configuration and tokenizer."""
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            (folder / name).write_bytes(read_bytes(f"{data}/tokenizer", name))


def make_teacher(data: str, output: Path, recipe: Recipe, device: torch.device) -> float:
    """Train, judge and save; returns held-out nats per token."""
    if output.exists():
        raise UserError(f"{output} exists: delete it or give another --output")
    manifest = Manifest.load(data)
    rows = {split: sum(shard.rows for shard in shards) for split, shards in manifest.splits.items()}
    if not all(rows.values()):
        raise UserError(
            f"{data} has {rows['train']} rows to train on and {rows['heldout']} held out, expected some of each: too few"
            " documents. Prepare more text, or a larger --heldout-fraction"
        )
    model = build(manifest, recipe)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
    windows = Windows(data, manifest, "train", MAX_TRAIN_TOKENS)
    held = Windows(data, manifest, "heldout", max_tokens=200_000)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"teacher: {size:,} parameters, {windows.num_tokens:,} training tokens, {device}", flush=True)
    steps = train(model, windows, recipe, device)
    nats = evaluate(model, held, 4 * recipe.batch_tokens, device)
    save(model.cpu(), data, output)
    print(f"teacher: {nats:.4f} nats per token on {held.num_tokens:,} held-out tokens after {steps} steps -> {output}")
    return nats


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm teacher", description="Train a small causal language model as REPA teacher."
    )
    parser.add_argument("--data", required=True, help="prepared folder")
    parser.add_argument("--output", required=True, type=Path, help="Hugging Face folder to write")
    parser.add_argument("--seconds", type=float, help="training time (default 60)")
    parser.add_argument("--steps", type=int, help="training steps, instead of a time")
    parser.add_argument("--min-steps", type=int, default=0, help="with a time: not fewer than these (%(default)s)")
    parser.add_argument("--width", type=int, default=Recipe.width)
    parser.add_argument("--layers", type=int, default=Recipe.layers)
    parser.add_argument("--batch-tokens", type=int, default=Recipe.batch_tokens)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = make_parser().parse_args(argv)
    seconds = Recipe.seconds if args.seconds is None and args.steps is None else args.seconds
    recipe = Recipe(
        width=args.width, layers=args.layers, seconds=seconds, steps=args.steps, min_steps=args.min_steps,
        batch_tokens=args.batch_tokens, lr=args.lr, seed=args.seed,
    )  # fmt: skip
    make_teacher(args.data, args.output, recipe, device_of(args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
