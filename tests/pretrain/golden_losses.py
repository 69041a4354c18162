"""One hundred steps of each stage in miniature through the real loop, whose losses tests/golden/ keeps.

    python -m tests.pretrain.golden_losses        writes them anew: only when a change is meant to alter what is learned

One thread and fp32: then the losses are the same bits on every CPU whose kernels are the same (`kernels`).
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3Model

from pretrain.telemetry.sinks import read_metrics
from tests.pretrain import tiny_pipeline, tiny_run

STEPS = 100
FOLDER = Path(__file__).resolve().parents[1] / "golden"
STAGES = ("vae", "dit", "ar", "mdlm")


def values_of(stage: str, folder: Path) -> dict[str, Any]:
    """Stage 1 with every term of its loss, REPA to a random teacher among them; stage 2 on the VAE that it leaves; the baselines."""
    schedule: dict[str, Any] = {"steps": STEPS, "eval_every": 0, "checkpoint_every": STEPS}
    if stage == "vae":
        values = tiny_run.config_values(folder / "data", folder / "vae", **schedule)
        values["data"]["split"] = {"kind": "truncate", "min_tokens": 2}
        values["repa"] = {"online_teacher": str(folder / "teacher"), "layer": 1, "warmup_steps": 10}
        values["kl"] = {"warmup_steps": 10}
        return values
    values = tiny_pipeline.dit_values(folder / "data", folder / "vae", folder / stage)
    values["train"] |= schedule
    if stage != "dit":
        del values["flow"]
        values |= {"stage": stage, "model": {"width": 32, "num_layers": 2, "head_dim": 16}}
    return values


def write_teacher(folder: Path) -> None:
    """A causal language model with random weights and the data's tokenizer."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=tiny_run.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    Qwen3Model(shape).save_pretrained(folder / "teacher")
    for file in (folder / "data" / "tokenizer").iterdir():
        (folder / "teacher" / file.name).write_bytes(file.read_bytes())


def curves(folder: Path) -> dict[str, list[float]]:
    """The loss of every step, by stage."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tiny_pipeline.write_data(folder / "data")
        write_teacher(folder)
        runs = {stage: tiny_pipeline.start(folder, values_of(stage, folder)) for stage in STAGES}
    finally:
        torch.set_num_threads(threads)
    return {stage: [line["loss"] for line in read_metrics(run)] for stage, run in runs.items()}


def kernels() -> dict[str, str]:
    """What the last bits of a loss depend on: torch, and the instructions for which it and its BLAS choose their kernels."""
    flags = sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id")]
    return {
        "torch": torch.__version__,
        "vendor": found[0].partition(":")[2].strip() if found else "unknown",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": " ".join(flags),
    }


def main() -> int:
    """Write the files."""
    with tempfile.TemporaryDirectory() as folder:
        for stage, losses in curves(Path(folder)).items():
            record = {"stage": stage, "steps": STEPS, "kernels": kernels(), "losses": losses}
            (FOLDER / f"{stage}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
