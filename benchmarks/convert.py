"""What an export of a large run takes: memory beside its largest file, time beside that of reading and writing the same bytes.

    python -m benchmarks.convert
    python -m benchmarks.convert --config dit_b --max-shard-size 200MB --folder /mnt/shared/tmp

Runs of a shipped VAE and DiT are made with random weights and without training: the ranges of every state that ZeRO 2 gives to each of
`--ranks`, in the checkpoints' own format by its own writer. `textldm convert` then runs in a process of its own.

`peak_ratio`: the most memory that it held (VmHWM) above what its imports hold, over the largest file that it wrote. `time_ratio`: its
seconds without imports over those that it takes to read the bytes of both checkpoints once and to write the export's;
`time_over_exported_bytes`: the same with the exported state's share of reading, which is what it does read and whose hashes it checks. What
is read is dropped from the page cache before, and what was written is on the disk; medians of interleaved repetitions.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measuring import ROOT, Spent, phase, print_figures
from data_pipeline.core.errors import UserError, cli
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare.__main__ import main as prepare
from pretrain.checkpoint.find import checkpoint_name
from pretrain.checkpoint.manifest import Manifest as CheckpointManifest
from pretrain.checkpoint.slices import BUFFER, write_slices
from pretrain.checkpoint.storage import Checkpoint, storage_of
from pretrain.config.load import load_config
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig
from pretrain.engine.adamw import AdamW
from pretrain.engine.optim import EMA, WEIGHT, parameter_groups
from pretrain.engine.parameter import Parameter
from pretrain.export.convert import convert
from pretrain.runs.folder import write_config
from pretrain.runs.record import RunRecord

STATES = (WEIGHT, *AdamW.states, EMA)
CHUNK_BYTES = 1 << 24
STEP = 1000


def make_data(folder: Path) -> Path:
    """A prepared folder of a few words: an export takes its tokenizer and fingerprint."""
    words = ["<|endoftext|>", *(f"w{i}" for i in range(1, 64))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:1])
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": words[0]}))
    texts = [json.dumps({"text": " ".join(words[1 + i % 50 : 12 + i % 50])}) for i in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(texts))
    place, tokens = str(folder / "texts.jsonl"), str(folder / "tokenizer")
    command = ["--source", place, "--tokenizer", tokens, "--output", str(folder / "data"), "--workers", "1"]
    if prepare([*command, "--row-tokens", "64", "--max-document-length", "32", "--shards", "1"]):
        raise UserError("the data of the benchmark could not be prepared")
    return folder / "data"


def ranges(module: nn.Module, ranks: int) -> Iterator[tuple[int, str, int, int]]:
    """(rank, parameter, first element, elements) of every range under ZeRO 1 and 2: each group's elements in a row, in equal parts."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in parameter_groups(module, 0.1):
        total = sum(parameter.numel() for parameter in group["params"])
        share, begin = -(-total // ranks), 0
        for parameter in group["params"]:
            for rank in range(begin // share, (begin + parameter.numel() - 1) // share + 1):
                low = max(begin, rank * share)
                high = min(begin + parameter.numel(), (rank + 1) * share)
                yield rank, names[id(parameter)], low - begin, high - low
            begin += parameter.numel()


def write_run(
    config: RunConfig, data: Path, ranks: int, buffers: Mapping[str, Tensor], inputs: dict[str, str]
) -> CheckpointManifest:
    """A run's folder with one checkpoint of random numbers, as `ranks` ranks write it at ZeRO 2."""
    outline = stage_kind(config.stage).load("outline")(config, torch.device("meta"))
    module: nn.Module = outline.trained
    shares = list(ranges(module, ranks))
    # Every range is a part of these numbers, so that no more of them need be in memory.
    pool = torch.randn(max(numel for *_, numel in shares) + 1024, generator=torch.Generator().manual_seed(0))
    decays = {id(p): group["decays"] for group in parameter_groups(module, 0.1) for p in group["params"]}
    parameters = {name: Parameter(tuple(p.shape), decays[id(p)], STATES) for name, p in module.named_parameters()}
    manifest = Manifest.load(str(data))
    config.run_folder.mkdir(parents=True)
    write_config(config)
    storage = storage_of(config.run_folder)
    partial = Checkpoint(storage, f"{checkpoint_name(STEP)}.partial")
    files = {}
    for rank in range(ranks):
        slices: list[tuple[str, Tensor]] = []
        for number, state in enumerate(STATES):
            for owner, name, start, numel in shares:
                if owner == rank:
                    offset = (len(slices) + number) % 1024
                    slices.append((f"{state}/{name}@{start}", pool[offset : offset + numel]))
        if rank == 0:
            slices += [(f"{BUFFER}/{name}", tensor) for name, tensor in buffers.items()]
        file = f"rank-{rank:05d}.safetensors"
        files[file] = write_slices(partial, file, slices)
    saved = CheckpointManifest(
        STEP,
        STEP,
        ranks,
        2,
        "bf16",
        parameters,
        {},
        files,
        RunRecord.of_run(config, manifest, inputs=inputs).extra(),
        {},
    )
    saved.save(partial)
    storage.commit(partial.name, checkpoint_name(STEP))
    return saved


def measured(run: Path, output: Path, largest: str) -> dict[str, float]:
    """Convert in this process; its seconds, and bytes of memory when its imports were done and at the most since."""
    stage_kind("dit").load("export")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    spent = Spent.by(lambda: convert(run, output, largest=largest))
    return {
        "seconds": spent.wall_s,
        "cpu_seconds": spent.cpu_s,
        "imports_bytes": before,
        "peak_bytes": _status("VmHWM"),
    }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def in_a_process(run: Path, output: Path, largest: str) -> dict[str, float]:
    """`measured`, in a process of its own. Raises: UserError with what it said."""
    code = (
        "import json, sys; from pathlib import Path; from benchmarks.convert import measured;"
        "print(json.dumps(measured(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, str(run), str(output), largest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"convert failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def forget(files: Iterable[Path]) -> None:
    """Put files on the disk and out of the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_s(files: Iterable[Path]) -> float:
    """Seconds of reading files once."""
    memory, began = memoryview(bytearray(CHUNK_BYTES)), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass
    return time.perf_counter() - began


def write_s(path: Path, num_bytes: int) -> float:
    """Seconds of writing so many bytes, as far as a program waits for it."""
    memory, began = memoryview(bytes(CHUNK_BYTES)), time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, num_bytes, CHUNK_BYTES):
            file.write(memory[: num_bytes - start])
    return time.perf_counter() - began


def plainly(files: Sequence[Path], num_bytes: int, scratch: Path) -> dict[str, float]:
    """Seconds of reading the files and of writing so many bytes."""
    forget(files)
    found = {"read_s": read_s(files), "write_s": write_s(scratch, num_bytes)}
    forget([scratch])
    scratch.unlink()
    return found


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures, in a folder on the file system to be measured."""
    data = make_data(folder / "made")
    places = [f"data.path={data}", "data.streams=1", "data.rows_per_step=1", "data.micro_batch_rows=1"]
    vae = load_config(given.vae, [*places, f"train.run={folder / 'vae'}", "repa.weight=0", "repa.features=null"])
    dit = load_config(given.config, [*places, f"train.run={folder / 'dit'}", f"model.vae={folder / 'vae'}"])
    channels: int = dit.model.latent_dim  # type: ignore[attr-defined]
    statistics_Z = {"latents_mean": torch.zeros(channels), "latents_std": torch.ones(channels)}
    with phase("writing checkpoints of random numbers"):
        of_vae = {f"vae.{name}": tensor for name, tensor in statistics_Z.items()}
        saved_vae = write_run(vae, data, given.ranks, of_vae, {})
        saved = write_run(dit, data, given.ranks, statistics_Z, {"model.vae": saved_vae.fingerprint})
    files = [path for run in ("vae", "dit") for path in sorted((folder / run / "checkpoints").rglob("*.safetensors"))]
    checkpoint_bytes = sum(path.stat().st_size for path in files)
    output, rounds = folder / "export", list[dict[str, float]]()
    num_bytes = 4 * sum(p.numel for made in (saved, saved_vae) for p in made.parameters.values())
    for repetition in tqdm(range(given.repetitions), desc="repetitions", dynamic_ncols=True):
        plain = plainly(files, num_bytes, folder / "scratch") if repetition % 2 else {}
        forget(files)
        converted = in_a_process(folder / "dit", output, given.max_shard_size)
        written = sorted(output.glob("*.safetensors"))
        sizes = [path.stat().st_size for path in written]
        forget(written)
        shutil.rmtree(output)
        rounds.append(converted | (plain or plainly(files, num_bytes, folder / "scratch")))
    largest, exported_bytes = max(sizes), sum(sizes)
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    peak = max(each["peak_bytes"] - each["imports_bytes"] for each in rounds)
    share = exported_bytes / checkpoint_bytes
    return {
        "peak_ratio": peak / largest,
        "time_ratio": median["seconds"] / (median["read_s"] + median["write_s"]),
        "time_over_exported_bytes": median["seconds"] / (share * median["read_s"] + median["write_s"]),
        "parameters": sum(p.numel for p in saved.parameters.values()),
        "vae_parameters": sum(p.numel for p in saved_vae.parameters.values()),
        "files": len(sizes),
        "largest_file_gb": largest / 1e9,
        "exported_gb": exported_bytes / 1e9,
        "checkpoints_gb": checkpoint_bytes / 1e9,
        "peak_gb": peak / 1e9,
        "imports_gb": median["imports_bytes"] / 1e9,
        **{name: median[name] for name in ("seconds", "cpu_seconds", "read_s", "write_s")},
    }


@cli
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert", description="What an export takes, in memory and time."
    )
    parser.add_argument("--config", default="dit_xl", help="a DiT's configuration (%(default)s, 767M parameters)")
    parser.add_argument("--vae", default="vae_base", help="a VAE's configuration (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="that wrote the checkpoints (%(default)s)")
    parser.add_argument("--max-shard-size", default="1GB", help="of the export's files (%(default)s)")
    parser.add_argument("--folder", type=Path, help="on the file system to be measured (that of temporary files)")
    parser.add_argument("--repetitions", type=int, default=2, help="(%(default)s)")
    given = parser.parse_args(argv)
    if given.repetitions < 1 or given.ranks < 1:
        raise UserError(f"--repetitions {given.repetitions} --ranks {given.ranks}: expected at least 1")
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="convert-benchmark-") as folder:
        print_figures(measure(given, Path(folder)))


if __name__ == "__main__":
    sys.exit(main(None))
