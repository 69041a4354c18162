"""How fast the loader gives batches, beside the loaders that users would take instead; resuming; and what a training step sees of it.

    python -m benchmarks.loader
    python -m benchmarks.loader --data data/owt2 --quickstart runs/quickstart

All peers of loader_peers.py that are installed take part, the others are named in `missing`. webdataset and datasets come with
this project; `pip install litdata mosaicml-streaming` (in an environment of its own, if their versions disagree) adds the others.

Every contender gives two passes over the same rows, in turn with the others; a figure is tokens a second (the rows' places) between
the first batch of the second pass and its last, the best of the repetitions. Reading is from the page cache. The prepared folder is
made of random tokens, unless --data names one.

`loader_over_best_peer`: for the same job, batches as training takes them: a peer's rows go through this project's own code for
splits and keyed numbers (`finished` in loader_peers.py). `first_pass_over_best_peer`: its first pass, which hashes every shard,
over the peer's second; no peer hashes.
`loader_over_best_rows_alone`: this loader, still with all of its work, over the best peer that only gives rows and lengths.
`..._cpu`, `tokens_per_cpu_s`: by CPU time instead, which other programs on the same cores move less.
`resume_ratio`: time from nothing to the first batch at row 10,000,000 of a manifest of 4,000 shards over that at row 0, medians.
`wait_share`: of the time of stage 1's steps in the quickstart's shape, the part spent waiting for the loader; of --quickstart.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.loader_peers import PEERS, Job, Peer, finished
from benchmarks.measuring import ROOT, interleaved, print_figures
from benchmarks.plain_run import PlainRun, vae_config
from data_pipeline.core.errors import UserError, cli
from data_pipeline.format.manifest import Manifest, ShardInfo, TokenizerInfo, shard_name
from data_pipeline.format.shards import token_members, write_shard
from data_pipeline.reading.batch import Batch, Split
from data_pipeline.reading.loader import TrainLoader

ROW_TOKENS, VOCAB_SIZE, MIN_WINDOW, MAX_WINDOW = 4096, 151_936, 8, 1024
RESUME_SHARDS, RESUME_ROWS, RESUME_AT_ROW, RESUME_STREAMS, RESUME_ROWS_PER_STEP = 4000, 512, 10_000_000, 16, 64
OWN, FIRST_PASS, ROWS_ALONE = "loader", "loader_first_pass", ": rows alone"
SPLIT = Split(kind="context")


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description="Speed of the loader beside its peers'."
    )
    parser.add_argument("--data", type=Path, help="prepared folder (default: random tokens)")
    parser.add_argument("--shards", type=int, default=48, help="of the random tokens (%(default)s)")
    parser.add_argument("--shard-rows", type=int, default=256, help="rows of each (%(default)s)")
    parser.add_argument("--batch-rows", type=int, default=16, help="rows of a batch (%(default)s)")
    parser.add_argument("--streams", type=int, default=8, help="of the loader; must divide --batch-rows (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each contender, in turn (%(default)s)")
    parser.add_argument(
        "--resume-shards", type=int, default=RESUME_SHARDS, help="of the simulated manifest (%(default)s)"
    )
    parser.add_argument(
        "--quickstart",
        type=Path,
        default=ROOT / "runs/quickstart",
        help="folder of ./run.sh with data/features (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps whose waiting is measured (%(default)s)")
    return parser


def random_folder(folder: Path, shards: int, shard_rows: int, row_tokens: int, copies: int = 1) -> Manifest:
    """A prepared folder of random tokens, windows as long as web text's; each shard stands `copies` times in the manifest."""
    folder.mkdir(parents=True)
    rng, members, infos = np.random.default_rng(0), token_members(row_tokens, "uint32"), []
    for shard in range(shards):
        rows = []
        for _ in range(shard_rows):
            lengths, space = [], row_tokens
            while space >= 2 * MIN_WINDOW:
                length = min(MAX_WINDOW, space, max(MIN_WINDOW, int(rng.lognormal(6, 1))))
                lengths.append(length)
                space -= length
            tokens = rng.integers(0, VOCAB_SIZE, row_tokens, np.uint32)
            tokens[row_tokens - space :] = 0
            rows.append((tokens, np.array(lengths, np.int32)))
        first = folder / shard_name("train", shard * copies)
        written = write_shard(first, members, rows)
        windows, tokens_sum = sum(len(row[1]) for row in rows), sum(int(row[1].sum()) for row in rows)
        for copy in range(copies):
            name = shard_name("train", shard * copies + copy)
            if copy:
                os.link(first, folder / name)
            infos.append(ShardInfo(name=name, windows=windows, tokens=tokens_sum, **written._asdict()))
    tokenizer = TokenizerInfo(
        name="random", revision=None, sha256="0" * 64, vocab_size=VOCAB_SIZE, special_ids={}, eos_id=None
    )
    manifest = Manifest.create(
        row_tokens=row_tokens, token_dtype="uint32", min_window=MIN_WINDOW, max_window=MAX_WINDOW, seed=0,
        heldout_fraction=0.0, dedupe=False, tokenizer=tokenizer, splits={"train": infos, "heldout": []}, source="random",
        statistics={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def loader_batches(job: Job, streams: int) -> Generator[Batch]:
    """This project's loader with its defaults, one thread among them."""
    loader = TrainLoader(
        job.data, None, seed=0, streams=streams, rows_per_step=job.batch_rows, micro_batch_rows=job.batch_rows,
        split=SPLIT,
    )  # fmt: skip
    with loader:
        for [batch] in loader:
            yield batch


def finished_of(peer: Peer, job: Job) -> Generator[Batch]:
    """A peer's batches with what a user has to do for each."""
    yield from finished(peer.batches(job), SPLIT)


def rows_alone(peer: Peer, job: Job) -> Generator[torch.Tensor]:
    """Tokens int64 [B, R] of a peer's batches, checked to be that."""
    for tokens_BR, _ in peer.batches(job):
        if tokens_BR.dtype != torch.int64 or tokens_BR.dim() != 2:
            raise AssertionError(f"a batch of {tokens_BR.dtype}{list(tokens_BR.shape)}")
        yield tokens_BR


@dataclass(frozen=True)
class Rate:
    """Places a second, and a second of the process's CPU time."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, batches: Iterator[Batch | torch.Tensor]) -> "Rate":
        """The rate of a pass, measured from behind its first batch on."""
        next(batches)
        wall, cpu, places = time.perf_counter(), time.process_time(), 0
        for batch in batches:
            places += batch.tokens_T.numel() if isinstance(batch, Batch) else batch.numel()
        return cls(places / (time.perf_counter() - wall), places / (time.process_time() - cpu))


def compare_peers(data: Path, batch_rows: int, streams: int, repetitions: int, work: Path) -> dict[str, Any]:
    """Tokens a second of this loader and of all peers, and its ratios to the best of them."""
    manifest = Manifest.load(data)
    contenders: dict[str, Callable[[], Generator[Any]]] = {}
    missing = {}
    for peer in PEERS:
        job = Job(data, manifest, work / peer.name, batch_rows)
        if (reason := peer.missing()) is not None:
            missing[peer.name] = reason
            print(f"{peer.name} takes no part: {reason}", file=sys.stderr)
            continue
        peer.write(job)
        contenders[peer.name] = partial(finished_of, peer, job)
        contenders[peer.name + ROWS_ALONE] = partial(rows_alone, peer, job)
    if not contenders:
        raise UserError(f"no peer can be measured: {missing}")
    own = Job(data, manifest, work, batch_rows)
    contenders[OWN] = partial(loader_batches, own, streams)
    batches_per_pass = own.num_rows // batch_rows
    found: dict[str, list[Rate]] = {name: [] for name in (*contenders, FIRST_PASS)}
    with tqdm(total=repetitions * len(contenders), desc="passes", dynamic_ncols=True) as bar:
        for repetition in range(repetitions):
            for name in list(contenders)[:: 1 if repetition % 2 == 0 else -1]:
                bar.set_postfix_str(name)
                with closing(contenders[name]()) as batches:
                    first, second = (Rate.of(islice(batches, batches_per_pass)) for _ in range(2))
                found[name].append(second)
                if name == OWN:
                    found[FIRST_PASS].append(first)
                bar.update()
    wall = {name: max(rate.wall for rate in rates) for name, rates in found.items()}
    cpu = {name: max(rate.cpu for rate in rates) for name, rates in found.items()}
    peers = [name for name in wall if name not in (OWN, FIRST_PASS)]
    finishing = [name for name in peers if not name.endswith(ROWS_ALONE)]
    best = max(finishing, key=lambda name: wall[name])
    return {
        "loader_over_best_peer": wall[OWN] / wall[best],
        "loader_over_best_peer_cpu": cpu[OWN] / max(cpu[name] for name in finishing),
        "first_pass_over_best_peer": wall[FIRST_PASS] / wall[best],
        "loader_over_best_rows_alone": wall[OWN] / max(wall[name] for name in peers if name not in finishing),
        "best_peer": best,
        "tokens_per_s": wall,
        "tokens_per_s_medians": {name: statistics.median(r.wall for r in rates) for name, rates in found.items()},
        "tokens_per_cpu_s": cpu,
        "missing": missing,
        "rows": own.num_rows,
        "row_tokens": manifest.row_tokens,
        "batch_rows": batch_rows,
        "repetitions": repetitions,
    }


def resume_ratio(num_shards: int, repetitions: int, work: Path) -> dict[str, float]:
    """Seconds to the first batch when resuming far into training over seconds to the very first batch; shards are hashed in both."""
    data = work / "resume"
    random_folder(data, 4, RESUME_ROWS, 1024, copies=num_shards // 4)

    def first_batch(row: int) -> None:
        loader = TrainLoader(
            data, None, seed=0, streams=RESUME_STREAMS, rows_per_step=RESUME_ROWS_PER_STEP,
            micro_batch_rows=RESUME_ROWS_PER_STEP, split=Split(kind="context"), start_step=row // RESUME_ROWS_PER_STEP,
        )  # fmt: skip
        with loader:
            [batch] = loader.next_step()
            assert batch.rows[0].ticket == row // RESUME_ROWS_PER_STEP * RESUME_ROWS_PER_STEP

    contenders = {"far": lambda: first_batch(RESUME_AT_ROW), "start": lambda: first_batch(0)}
    spent = interleaved(contenders, 2 * repetitions + 1, "resume")
    return {
        "resume_ratio": spent["far"].wall_s / spent["start"].wall_s,
        "first_batch_s_at_row_0": spent["start"].wall_s,
        "first_batch_s_far": spent["far"].wall_s,
    }


def wait_share(quickstart: Path, steps: int) -> dict[str, Any]:
    """Share of its time that training in the quickstart's shape waits for data; None without the quickstart's data."""
    data = quickstart / "data"
    if not (data / "features/manifest.json").exists():
        print(
            f"no wait_share: {data}/features is missing; run ./run.sh, or name its folder with --quickstart",
            file=sys.stderr,
        )
        return {"wait_share": None}
    config = vae_config(
        "quickstart_vae", {"data.path": data, "repa.features": data / "features", "schedule.warmup_steps": 0}
    )
    with PlainRun(config, torch.device("cuda" if torch.cuda.is_available() else "cpu")) as run:
        for _ in range(2):
            run.step()
        waits, times = [run.loader.wait_seconds], [time.perf_counter()]
        for _ in tqdm(range(steps), desc="training steps", dynamic_ncols=True):
            run.step()
            waits.append(run.loader.wait_seconds)
            times.append(time.perf_counter())
    longest = max(after - before for before, after in pairwise(waits))
    return {
        "wait_share": (waits[-1] - waits[0]) / (times[-1] - times[0]),
        "step_s": (times[-1] - times[0]) / steps,
        "longest_wait_s": longest,
    }


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    if args.repetitions < 1:
        raise UserError(f"--repetitions {args.repetitions}: expected at least 1")
    with tempfile.TemporaryDirectory(prefix="benchmark-loader-") as folder:
        work = Path(folder)
        data = args.data or work / "data"
        if args.data is None:
            random_folder(data, args.shards, args.shard_rows, ROW_TOKENS)
        figures = compare_peers(data, args.batch_rows, args.streams, args.repetitions, work)
        print(json.dumps(figures["tokens_per_s"]), flush=True)
        figures |= resume_ratio(args.resume_shards, args.repetitions, work)
    figures |= wait_share(args.quickstart, args.steps)
    print_figures(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
