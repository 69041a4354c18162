"""How close a training step comes to the machine's matrix products, and what packing and the chunked LM head save.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --openwebtext a.jsonl --tinystories b.jsonl --tokenizer gpt2 --rows 8

dit_b's width at 4 layers, fp32, rows of 1,024 tokens filled with windows of real text's lengths; latents are random, since speed
does not depend on them. A step is forward, backward, clipping, AdamW and EMA.

`cpu_utilisation`: model FLOPs a second of a step (attention by true segment lengths, the optimizer's own left out) over those of
the plain matrix products of the blocks, forward and backward, on the same number of tokens. Its sample of rows is the one whose
number of windows comes nearest to the text's average.
`padded_over_packed_...`: step time of a plain DiT of the same size on the same windows, padded to 1,024 (plain_dit.py), over ours.
`head_memory_ratio`, `head_time_ratio`: see lm_head.py. `..._cpu`: seconds of processor time instead, which other programs hardly move.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lm_head import Head
from benchmarks.measuring import SHARED, Spent, existing, interleaved, print_figures
from benchmarks.plain_dit import PaddedStep, PlainDiT
from data_pipeline.core.errors import UserError, cli
from data_pipeline.prepare.pack import pack_rows, window_lengths
from data_pipeline.text.sources import open_source
from data_pipeline.text.tokenization import encoder, load_tokenizer
from modeling import flow
from modeling.attention import Segments
from modeling.losses import squared_error
from modeling.text_dit import TextDiT, TextDiTConfig
from pretrain.engine.optim import build_optimizer
from pretrain.engine.optimizer_settings import AdamWSettings
from pretrain.telemetry.flops import transformer_flops

MIN_WINDOW = 8
LR, EMA_DECAY = 3e-4, 0.999


def rows_of(text: Path, tokenizer: str, row_tokens: int, num_rows: int) -> list[list[int]]:
    """Window lengths of the `num_rows` neighbouring packed rows whose number of windows is nearest to the text's average."""
    backend = encoder(load_tokenizer(tokenizer))
    documents = [document for document in open_source(str(text)) if document.strip()]
    counts = [len(encoding.ids) for encoding in backend.encode_batch_fast(documents, add_special_tokens=False)]
    lengths = np.array([n for count in counts for n in window_lengths(count, MIN_WINDOW, row_tokens)])
    np.random.default_rng(0).shuffle(lengths)
    rows = [row for row in (lengths[row].tolist() for row in pack_rows(lengths, row_tokens)) if sum(row) == row_tokens]
    if len(rows) < num_rows:
        raise UserError(
            f"{text} fills {len(rows)} rows of {row_tokens} tokens; expected at least {num_rows}: lower --rows"
        )
    sizes = np.convolve([len(row) for row in rows], np.ones(num_rows), "valid")
    start = int(np.abs(sizes - num_rows * np.mean([len(row) for row in rows])).argmin())
    return rows[start : start + num_rows]


class PackedStep:
    """One update of a TextDiT on packed windows, the first half of each its context."""

    def __init__(self, model: TextDiT, lengths: Sequence[int]):
        self.model, self.windows = model, Segments.from_lengths(lengths)
        self.optimizer, self.num_steps = build_optimizer(model, AdamWSettings(lr=LR)), 0
        self.is_target_T = self.windows.positions_T >= torch.tensor([n // 2 for n in lengths])[self.windows.ids_T]

    def __call__(self) -> None:
        data_TZ, noise_TZ = torch.randn(2, self.windows.num_tokens, self.model.config.latent_dim)
        time_T = torch.rand(len(self.windows.lengths))[self.windows.ids_T]
        noisy_TZ = flow.interpolate(data_TZ, noise_TZ, time_T[:, None])
        inputs_TZ = torch.where(self.is_target_T[:, None], noisy_TZ, data_TZ)
        velocity_TZ = self.model(inputs_TZ, self.is_target_T, time_T, self.windows).velocity_TZ
        error_T = squared_error(velocity_TZ, flow.velocity(data_TZ, noise_TZ))
        ((error_T * self.is_target_T).sum() / self.is_target_T.sum()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.num_steps += 1
        self.optimizer.prepare(self.num_steps, LR, EMA_DECAY, min(1.0, 1.0 / (float(norm) + 1e-6)))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def flops(self) -> float:
        """FLOPs of a forward and backward pass, a multiply-add being two."""
        shape = self.model.config
        weights = 12 * shape.width**2 * shape.num_layers + 2 * shape.width * shape.latent_dim
        return transformer_flops(weights, shape.num_layers, shape.width, self.windows.lengths)


class Products:
    """The matrix products of the blocks' four linear maps: forward, by inputs and by weights."""

    def __init__(
        self,
        tokens: int,
        width: int,
        num_layers: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self.num_layers = num_layers
        shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        self.operands = [(random(tokens, i), random(o, i), random(tokens, o)) for i, o in shapes]

    def __call__(self) -> None:
        for _ in range(self.num_layers):
            for x_TI, weight_OI, grad_TO in self.operands:
                x_TI @ weight_OI.T
                grad_TO @ weight_OI
                grad_TO.T @ x_TI

    def flops(self) -> float:
        """FLOPs of all the products, a multiply-add being two."""
        return sum(6.0 * len(x_TI) * weight_OI.numel() for x_TI, weight_OI, _ in self.operands) * self.num_layers


def ratio(one: Spent, other: Spent, name: str, factor: float = 1.0) -> dict[str, float]:
    """Ratio of two spans of time: of wall time, and of processor time."""
    return {name: factor * one.wall_s / other.wall_s, f"{name}_cpu": factor * one.cpu_s / other.cpu_s}


def compare_steps(name: str, rows: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Ours beside the matrix products and the padded step, on the windows of one text."""
    lengths = [length for row in rows for length in row]
    torch.manual_seed(0)
    config = TextDiTConfig(latent_dim=64, width=args.width, num_layers=args.layers, head_dim=64)
    packed = PackedStep(TextDiT(config).train(), lengths)
    products = Products(sum(lengths), args.width, args.layers)
    plain = PlainDiT(config.latent_dim, config.width, config.num_layers, config.head_dim, args.row_tokens)
    padded = PaddedStep(plain, lengths, args.row_tokens, config.latent_dim)
    for first in (packed, products):  # what the first call costs nobody pays again
        first()
    spent = interleaved({"packed": packed, "products": products, "padded": padded}, args.repetitions, name)
    figures = ratio(spent["padded"], spent["packed"], f"padded_over_packed_{name}")
    figures |= ratio(spent["products"], spent["packed"], f"utilisation_{name}", packed.flops() / products.flops())
    return figures | {
        f"windows_{name}": len(lengths),
        f"tokens_per_s_{name}": sum(lengths) / spent["packed"].wall_s,
        f"gflops_{name}": packed.flops() / spent["packed"].wall_s / 1e9,
        f"products_gflops_{name}": products.flops() / spent["products"].wall_s / 1e9,
    }


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="Utilisation of a training step; packed against padded; LM head.",
    )
    for name in ("openwebtext", "tinystories"):
        path = SHARED / f"corpora/{name}.jsonl"
        parser.add_argument(f"--{name}", type=Path, default=path, help="text of these lengths (%(default)s)")
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizers/qwen"), help="folder or hub name (%(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step (%(default)s)")
    parser.add_argument("--row-tokens", type=int, default=1024, help="and longest window (%(default)s)")
    parser.add_argument("--width", type=int, default=768, help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="of the LM head (%(default)s)")
    parser.add_argument("--head-tokens", type=int, default=4096, help="of the LM head (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each contender, in turn (%(default)s)")
    parser.add_argument("--part", choices=("all", "steps", "head"), default="all", help="(%(default)s)")
    return parser


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    if args.part != "head":
        for name in ("openwebtext", "tinystories"):
            text = existing(getattr(args, name), f"--{name}")
            figures |= compare_steps(name, rows_of(text, args.tokenizer, args.row_tokens, args.rows), args)
        figures = {"cpu_utilisation": figures["utilisation_openwebtext"]} | figures
    if args.part != "steps":
        head = Head(args.head_tokens, args.width, args.vocab_size, torch.device("cpu"), torch.float32)
        figures |= head.figures(max(1, args.repetitions // 2))
    settings = {name: getattr(args, name) for name in ("rows", "row_tokens", "width", "layers", "threads")}
    print_figures(figures | {"settings": settings})
    return 0


if __name__ == "__main__":
    sys.exit(main())
