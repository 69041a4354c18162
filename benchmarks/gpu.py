"""Everything that is measured on a GPU, by one command that takes twelve minutes; with --dry each part in miniature on the CPU.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --dry

What is measured: gpu_parts.py. Each part runs in a process of its own, which may fail, run out of memory or hang: what it had measured
until then is kept, the rest of its rows say why they are not measured, and the next part starts. Parts come in order of importance;
none runs beyond its own seconds, nor all of them together beyond --seconds. After each, the tables so far are written, with card, date
and commit, above those of earlier days: into benchmarks/results/gpu_<card>.json and its page.

--dry says of every row whether its code ran; no figure of a CPU stands in a table of a GPU. It writes what --output names, if anything.
"""

import argparse
import itertools
import json
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import gpu_parts, results
from benchmarks.measuring import print_figures, surroundings
from data_pipeline.core.errors import UserError, cli, reason
from data_pipeline.core.storage import atomic_write
from modeling.attention import IMPLEMENTATIONS

NOT_MEASURED = "not measured"
LEAST_SECONDS = 20.0
"""With less left no part is begun."""
DRY = "no GPU was there: in miniature, on a CPU, its code ran"
COLUMNS = {
    "card": ["what", "figure"],
    "training": [
        "configuration", "parameters trained", "tokens/s", "TFLOP/s", "MFU", "MFU of the measured peak", "step, ms",
        "peak memory, GB", "first step, s",
    ],
    "split": [
        "ms of a step", "attention", "matrix products", "optimizer", "compiled", "copies", "communication", "other", "idle", "all",
        "largest of the others",
    ],
    "attention": ["kernel", "TFLOP/s", "ms", "largest relative error"],
    "losses": ["loss", "ms", "peak GB"],
    "encoder": ["frozen encoder", "tokens/s", "ms a micro-batch", "error over deviation"],
    "loader": ["loader", "tokens/s"],
}  # fmt: skip
TITLES = {
    "card": "Products and copies",
    "training": "A training step, one GPU of the eight that a configuration is for",
    "split": "Where its time goes",
    "attention": "Attention, forward and backward, bf16",
    "losses": "Losses over the vocabulary, forward and backward, 4,096 tokens",
    "encoder": "Stage 2's frozen encoder, a micro-batch of dit_b",
    "loader": "The loader, a rank of eight of dit_b",
}


@dataclass(frozen=True)
class Part:
    """One process: its table, the rows that are expected of it there, its time, and the function of gpu_parts.py."""

    name: str
    table: str
    seconds: float
    expected: Sequence[str]
    function: str
    argument: str = ""


def parts_of(models: Sequence[str]) -> list[Part]:
    """In order of importance."""
    kernels = itertools.product(IMPLEMENTATIONS, gpu_parts.HEAD_DIMS, gpu_parts.LAYOUTS)
    first, *others = [
        Part(name, "training", 210 if "xl" in name else 150, [name, gpu_parts.SPLIT + name], "training", name)
        for name in models
    ]
    return [
        Part("card", "card", 45, gpu_parts.PRODUCTS + gpu_parts.COPIES, "card"),
        first,
        *others[:1],
        Part("attention", "attention", 75, [f"{a}, head dim {b}, {c}" for a, b, c in kernels], "attention_rows"),
        Part("losses", "losses", 45, gpu_parts.LOSSES, "loss_rows"),
        Part("encoder", "encoder", 75, gpu_parts.ENCODERS, "encoder_rows"),
        Part("loader", "loader", 45, gpu_parts.LOADERS, "loader_rows"),
        *others[1:],
    ]


def measure(part: Part, found: Path, is_dry: bool, seconds: float) -> None:
    """The part, in this process: each row becomes a line of the file `found` as soon as it is there."""
    until = time.monotonic() + seconds

    def write(**line: Any) -> None:
        with found.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    try:
        device, size = torch.device("cuda", 0), gpu_parts.Size()
        if is_dry:
            device, size = torch.device("cpu"), gpu_parts.Size.dry()
        write(card="no GPU" if is_dry else torch.cuda.get_device_name(device))
        function: Callable[..., Any] = getattr(gpu_parts, part.function)
        for row in (function(part.argument) if part.argument else function)(device, size):
            write(**asdict(row))
            if time.monotonic() > until:
                write(error=f"the part's {seconds:.0f} s were over")
                return
    except BaseException as error:
        traceback.print_exc()
        write(error=reason(error)[:300])
        sys.exit(1)


def run(part: Part, seconds: float, is_dry: bool, method: str = "fork") -> list[dict[str, Any]]:
    """Lines that the part wrote in a process of its own, which ends after so many seconds at the latest."""
    with TemporaryDirectory() as folder:
        found = Path(folder) / "rows.jsonl"
        found.touch()
        # Forked, it starts at once: this process has imported everything, and has not touched the GPU.
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=measure, args=(part, found, is_dry, seconds))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        lines = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
        if process.exitcode and not any("error" in line for line in lines):
            killed = process.exitcode == -signal.SIGKILL
            how = f"ended after {seconds:.0f} s" if killed else f"its process ended with {process.exitcode}"
            lines.append({"error": how})
        return lines


def rows_of(part: Part, lines: Sequence[dict[str, Any]], is_dry: bool) -> dict[str, list[list[Any]]]:
    """Rows by table, one for each that was expected: its figures, or why there are none."""
    error = next((line["error"] for line in lines if "error" in line), "its code gave no such row")
    by_name = {line["name"]: line for line in lines if "name" in line}
    assert by_name.keys() <= set(part.expected), f"{part.name} measures what it does not announce: {list(by_name)}"
    tables: dict[str, list[list[Any]]] = {}
    for name in part.expected:
        table = "split" if name.startswith(gpu_parts.SPLIT) else part.table
        line = by_name.get(name, {"why": error})
        why = line.get("why", DRY if is_dry else None)
        empty = [None] * (len(COLUMNS[table]) - 2)
        cells = [NOT_MEASURED, *empty, why] if why else [*line["figures"], ""]
        tables.setdefault(table, []).append([name.removeprefix(gpu_parts.SPLIT), *cells])
    return tables


def start_method() -> str | None:
    """How parts are started on a GPU: forked, unless something imported here has touched it already; None where torch sees none."""
    if torch.backends.cuda.is_built():
        for method in ("fork", "spawn"):
            process: Any = multiprocessing.get_context(method).Process(target=touch_gpu)  # type: ignore[attr-defined]
            process.start()
            process.join()
            if process.exitcode == 0:
                return method
    return None


def touch_gpu() -> None:
    """Ends the process with 0 where it can compute on a GPU."""
    try:
        torch.ones(1, device="cuda").item()
    except (AssertionError, RuntimeError):
        sys.exit(1)


class Book:
    """The tables so far, and the file that they are written into above those of earlier days."""

    def __init__(self, args: argparse.Namespace, found: dict[str, Any]):
        self.args, self.found, self.card = args, found, "no GPU"
        self.tables: dict[str, list[list[Any]]] = {}
        self._earlier: list[Any] | None = None

    def write(self, parts: Sequence[Part], lines_of: dict[str, list[dict[str, Any]]]) -> None:
        """What all parts found until now."""
        self.tables = {name: [] for name in COLUMNS}
        for part in parts:
            lines = lines_of[part.name]
            self.card = next((line["card"] for line in lines if "card" in line), self.card)
            for name, rows in rows_of(part, lines, self.args.dry).items():
                self.tables[name] += rows
        path = self.args.output
        if path is None and not self.args.dry:
            path = results.FOLDER / f"gpu_{file_name(self.card)}.json"
        if path is None:
            return
        if self._earlier is None:
            self._earlier = results.read(path)["tables"] if path.exists() else []
        text = {"title": f"On a GPU: {self.card}", "tables": self.page() + self._earlier}
        with atomic_write(path) as file:
            file.write((json.dumps(text, indent=1) + "\n").encode())
        if path.parent == results.FOLDER:
            results.main([])

    def page(self) -> list[dict[str, Any]]:
        """The tables as results.py reads them."""
        common = {
            "date": self.found["date"][:10],
            "commit": self.found["commit"],
            "machine": f"{self.card}; torch {self.found['versions']['torch']}",
            "command": "python -m benchmarks.gpu" + " --dry" * self.args.dry,
        }
        return [
            {"title": TITLES[name], **common, "columns": [*COLUMNS[name], "why not"], "rows": rows}
            for name, rows in self.tables.items()
        ]

    def shown(self) -> str:
        """The tables as Markdown."""
        lines = []
        for table in self.page():
            lines += ["", table["title"], "", *results.table_of(table["columns"], table["rows"])]
        return "\n".join([*lines, ""])


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Everything that is measured on a GPU, in twelve minutes."
    )
    parser.add_argument("--dry", action="store_true", help="every part in miniature on the CPU: does its code run?")
    parser.add_argument("--seconds", type=float, default=720, help="for all of it (%(default)s)")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["dit_b", "dit_xl", "vae_base", "dit_b_hd128"],
        help="configurations (%(default)s)",
    )
    parser.add_argument("--output", type=Path, help="file (benchmarks/results/gpu_<card>.json; with --dry: none)")
    return parser


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    method = "fork" if args.dry else start_method()
    if method is None:
        raise UserError("torch sees no GPU here; --dry runs every part in miniature on the CPU")
    began, parts, found = time.monotonic(), parts_of(args.models), surroundings()
    lines_of = {part.name: [{"error": "its turn did not come"}] for part in parts}
    book = Book(args, found)
    for part in parts:
        left = args.seconds - (time.monotonic() - began)
        if left < min(LEAST_SECONDS, part.seconds):
            lines_of[part.name] = [{"error": f"the {args.seconds:g} s were over"}]
        else:
            print(f"{part.name} ...", flush=True)
            lines_of[part.name] = run(part, min(part.seconds, left), args.dry, method)
        book.write(parts, lines_of)
    print(book.shown())
    failed = [f"{name}: {line['error']}" for name, lines in lines_of.items() for line in lines if "error" in line]
    print("\n".join(failed))
    rows = [row for rows in book.tables.values() for row in rows]
    measured, seconds = sum(row[1] != NOT_MEASURED for row in rows), round(time.monotonic() - began, 1)
    figures = {"card": book.card, "rows": len(rows), "measured": measured, "failed": failed, "seconds": seconds}
    print_figures(figures)
    return 1 if failed else 0


def file_name(card: str) -> str:
    """A card's name as part of a file's."""
    return "".join(letter if letter.isalnum() else "_" for letter in card.lower().removeprefix("nvidia ")).strip("_")


if __name__ == "__main__":
    sys.exit(main())
