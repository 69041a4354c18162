"""How fast text becomes shards, beside the tokenizer alone, and how full the rows are.

    python -m benchmarks.prepare
    python -m benchmarks.prepare --text a.jsonl b.jsonl --fill c.jsonl:4096 --tokenizer gpt2

`prepare_over_encode`: tokens a second of `textldm prepare` (reading, tokenising, hashing, shuffling, packing, writing,
SHA-256; starting its worker processes too) over those of `Tokenizer.encode_batch`, which gets the same documents out of memory,
1,000 at a time, on the same cores. Both are divided by the same number of tokens: what the tokenizer alone makes of the text.
`prepare_over_encode_fast`: the same with `encode_batch_fast`, which leaves out the offsets that nobody here needs.
`..._loaded`: without the time that prepare takes to load the tokenizer (`load_tokenizer_s`), since the tokenizer alone has it loaded:
what a text of hours comes near to, in which loading no longer counts.
`..._cpu`: a CPU second's tokens instead of a second's, which other programs on the same cores hardly move.
`row_fill`: the smallest share of the rows' places that windows fill, over the files given by --fill.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring import SHARED, existing, interleaved, print_figures
from data_pipeline.core.errors import UserError, cli
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.passes import prepare
from data_pipeline.text.sources import open_source
from data_pipeline.text.tokenization import encoder, load_tokenizer

CORPORA = SHARED / "corpora"
DOCUMENTS_PER_CALL = 1000


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prepare",
        description="Speed of prepare beside its tokenizer's, and how full rows are.",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[CORPORA / f"{name}.jsonl" for name in ("openwebtext", "wikipedia", "tinystories")],
        help="files whose preparation is timed (default: three of ../shared/corpora)",
    )
    parser.add_argument(
        "--fill",
        type=fill_case,
        nargs="+",
        metavar="FILE:ROW_TOKENS",
        default=[(CORPORA / "openwebtext.jsonl", 4096), (CORPORA / "tinystories.jsonl", 1024)],
        help="files whose rows' fill is measured (default: openwebtext at 4096 and tinystories at 1024)",
    )
    parser.add_argument(
        "--tokenizer", default=str(SHARED / "tokenizers/qwen"), help="folder, tokenizer.json or hub name (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="cores for both (%(default)s)"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="of each contender, in turn (%(default)s)")
    return parser


def fill_case(text: str) -> tuple[Path, int]:
    """FILE:ROW_TOKENS of the command line."""
    path, _, row_tokens = text.rpartition(":")
    if not path or not row_tokens.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected FILE:ROW_TOKENS, for example corpus.jsonl:4096")
    return Path(path), int(row_tokens)


def prepared(text: Path, tokenizer: str, output: Path, row_tokens: int, workers: int) -> Manifest:
    """Prepare into a new folder, with the defaults of the command."""
    manifest = prepare(
        PrepareOptions(
            source=str(text),
            tokenizer=tokenizer,
            output=output,
            row_tokens=row_tokens,
            max_document_length=min(row_tokens, PrepareOptions.max_document_length),
            workers=workers,
            follow_links=True,
        )
    )
    assert manifest is not None  # only `part` gives none
    return manifest


class Contest:
    """The same documents for prepare and for the tokenizer alone; each method is one repetition."""

    def __init__(self, files: list[Path], tokenizer: str, workers: int, work: Path):
        self.tokenizer, self.workers, self.work = tokenizer, workers, work
        self.source = work / "text"
        self.source.mkdir()
        for index, path in enumerate(files):
            (self.source / f"{index:03d}-{path.name}").symlink_to(path.resolve())
        self.documents = [text for text in open_source(str(self.source), follow_links=True) if text.strip()]
        self.backend = encoder(load_tokenizer(tokenizer))
        self.encoded_tokens = self.kept_tokens = 0
        self.numbers = itertools.count()

    def load(self) -> None:
        """Load the tokenizer, as `prepare` does first."""
        load_tokenizer(self.tokenizer)

    def encode(self) -> None:
        """Encode all documents with the tokenizer's `encode_batch`."""
        self._encode(self.backend.encode_batch)

    def encode_fast(self) -> None:
        """Encode all documents with the tokenizer's `encode_batch_fast`."""
        self._encode(self.backend.encode_batch_fast)

    def prepare(self) -> None:
        """Run the whole of `prepare`."""
        output = self.work / f"prepared-{next(self.numbers)}"
        manifest = prepared(self.source, self.tokenizer, output, 4096, self.workers)
        self.kept_tokens = sum(shard.tokens for shards in manifest.splits.values() for shard in shards)

    def _encode(self, encode_batch: Callable[..., Any]) -> None:
        count = 0
        for first in range(0, len(self.documents), DOCUMENTS_PER_CALL):
            encodings = encode_batch(self.documents[first : first + DOCUMENTS_PER_CALL], add_special_tokens=False)
            count += sum(len(encoding.ids) for encoding in encodings)
        self.encoded_tokens = count

    def run(self, repetitions: int) -> dict[str, Any]:
        """The figures, medians over the repetitions."""
        contenders = {
            "prepare": self.prepare,
            "load": self.load,
            "encode": self.encode,
            "encode_fast": self.encode_fast,
        }
        spent = interleaved(contenders, repetitions, "speed")
        if self.kept_tokens < 0.99 * self.encoded_tokens:
            raise UserError(
                f"prepare kept {self.kept_tokens} tokens of {self.encoded_tokens}: most documents of {self.source} are "
                f"shorter than {PrepareOptions.min_document_length} tokens, so that speeds cannot be compared; give other --text"
            )
        load, ours = spent.pop("load"), spent["prepare"]
        figures: dict[str, Any] = {"load_tokenizer_s": load.wall_s, "load_tokenizer_cpu_s": load.cpu_s}
        for peer in ("encode", "encode_fast"):
            figures[f"prepare_over_{peer}"] = spent[peer].wall_s / ours.wall_s
            figures[f"prepare_over_{peer}_cpu"] = spent[peer].cpu_s / ours.cpu_s
            figures[f"prepare_over_{peer}_loaded"] = spent[peer].wall_s / (ours.wall_s - load.wall_s)
            figures[f"prepare_over_{peer}_loaded_cpu"] = spent[peer].cpu_s / (ours.cpu_s - load.cpu_s)
        figures |= {f"{name}_tokens_per_s": self.encoded_tokens / taken.wall_s for name, taken in spent.items()}
        return figures | {
            "tokens": self.encoded_tokens,
            "documents": len(self.documents),
            "workers": self.workers,
            "repetitions": repetitions,
        }


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    texts = [existing(path, "--text") for path in args.text]
    fills = [(existing(path, "--fill"), row_tokens) for path, row_tokens in args.fill]
    # The tokenizer alone takes its threads from here; prepare's workers have one each.
    os.environ |= {"RAYON_NUM_THREADS": str(args.workers), "TOKENIZERS_PARALLELISM": "true"}
    with tempfile.TemporaryDirectory(prefix="benchmark-prepare-") as folder:
        work = Path(folder)
        filled = {
            f"{path.stem} at {row_tokens}": prepared(
                path, args.tokenizer, work / str(index), row_tokens, args.workers
            ).fill()
            for index, (path, row_tokens) in enumerate(fills)
        }
        figures = Contest(texts, args.tokenizer, args.workers, work).run(args.repetitions)
    print_figures(
        figures | {"row_fill": min(filled.values()), "row_fills": filled, "tokenizer": Path(args.tokenizer).name}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
