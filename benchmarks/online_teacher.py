"""How much longer a step of stage 1 takes with the teacher in the loop than with its cached features: Qwen3-1.7B and vae_base.

On a GPU at full size, elsewhere scaled down: every width, the heads' dimension, the vocabulary and the windows' length are divided
by the same factor s, depths and numbers of heads stay. A token's FLOPs are made of products of two of these (width x width, width x
vocabulary, width x length), so each falls by s^2, in the teacher as in the VAE: their ratio, and with it what the step would cost
at equal efficiency (`online_over_cached_by_flops`), stays that of the full size.

Both run the same batches through the same code as training does (loader, `VAEStage`, AdamW with EMA), in turn. Weights are random:
speed does not depend on them. The cached side decodes the dearest codec that one would choose (full rank, 4 bits, n-grams of 3);
on a GPU nothing is compiled here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, Qwen3Config

from benchmarks.measuring import interleaved
from benchmarks.plain_run import PlainRun, vae_config
from data_pipeline.core.keys import key
from data_pipeline.features.job import CodecOptions, FeatureJob
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.passes import prepare
from data_pipeline.text.sources import open_source
from pretrain.telemetry.flops import transformer_flops

SCALES = (1, 2, 4, 8, 16, 32)
ROWS = 24
# Of Qwen3-1.7B and vae_base.
VOCAB_SIZE, WINDOW_TOKENS, ROW_TOKENS = 151_936, 1024, 4096
TEACHER = {"hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128}
TEACHER_LAYERS, HEADS, KEY_VALUE_HEADS, LAYER = 28, 16, 8, -3
VAE = {"width": 768, "latent_dim": 64, "head_dim": 64}


def write_data(text: Path, tokenizer: Path, scale: int, folder: Path) -> Manifest:
    """Enough of the text for a few rows, in rows and windows of the scale."""
    row_tokens = ROW_TOKENS // scale
    documents, characters = [], 0
    for document in open_source(str(text)):
        documents.append(json.dumps({"text": document}))
        characters += len(document)
        if characters > 4 * ROWS * row_tokens:
            break
    folder.mkdir(parents=True)
    (folder / "text.jsonl").write_text("\n".join(documents))
    manifest = prepare(
        PrepareOptions(
            source=str(folder / "text.jsonl"),
            tokenizer=str(tokenizer),
            output=folder / "data",
            row_tokens=row_tokens,
            max_document_length=WINDOW_TOKENS // scale,
            shards=2,
            heldout_fraction=0.0,
        )
    )
    assert manifest is not None
    return manifest


def write_teacher(data: Path, manifest: Manifest, scale: int, dtype: torch.dtype, folder: Path) -> None:
    """Qwen3-1.7B's shape with random weights and the data's tokenizer. A vocabulary costs a teacher no FLOPs: it has no head."""
    torch.manual_seed(key("benchmark teacher", scale) % 2**63)
    shape: dict[str, Any] = {name: size // scale for name, size in TEACHER.items()}
    config = Qwen3Config(
        vocab_size=manifest.tokenizer.vocab_size,
        num_hidden_layers=TEACHER_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=WINDOW_TOKENS,
        **shape,
    )
    AutoModel.from_config(config, dtype=dtype).save_pretrained(folder)
    shutil.copytree(data / "tokenizer", folder, dirs_exist_ok=True)


def teacher_flops(scale: int, window_lengths: list[int]) -> float:
    """Of one forward pass up to the used layer, without what the causal mask leaves out of a window's square."""
    hidden, intermediate, head_dim = (size // scale for size in TEACHER.values())
    projections = (2 * HEADS + 2 * KEY_VALUE_HEADS) * head_dim * hidden + 3 * hidden * intermediate
    layers = TEACHER_LAYERS + 1 + LAYER
    squares = 4.0 * layers * HEADS * head_dim * sum(length * length for length in window_lengths)
    return transformer_flops(projections * layers, layers, HEADS * head_dim, window_lengths, passes=1) - squares / 2


def compare_speed(
    text: Path, tokenizer: Path, scale: int, repetitions: int, device: torch.device, work: Path
) -> dict[str, Any]:
    """Seconds of a step with the online teacher and with the cache, measured in turn, and their ratio."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    manifest = write_data(text, tokenizer, scale, work)
    data, teacher, features = work / "data", work / "teacher", work / "features"
    write_teacher(data, manifest, scale, dtype, teacher)
    job = FeatureJob.open(
        data=str(data),
        output=features,
        teacher=str(teacher),
        revision=None,
        layer=LAYER,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        token_budget=16384,
        options=CodecOptions(bits=4, sample_tokens=ROWS * manifest.row_tokens),
    )
    codec = job.codec_for(rank=0, world_size=1, timeout_s=0)
    assert codec is not None
    job.run(codec, rank=0, world_size=1)
    common = {"data.path": data, "data.streams": 2, "data.rows_per_step": 2, "data.micro_batch_rows": 2}
    common |= {f"model.{name}": size // scale for name, size in VAE.items()}
    common |= {"model.vocab_size": VOCAB_SIZE // scale, "repa.layer": LAYER}
    cached = vae_config("vae_base", common | {"repa.features": features})
    online = vae_config("vae_base", common | {"repa.features": None, "repa.online_teacher": teacher})
    with PlainRun(cached, device, dtype) as cached_run, PlainRun(online, device, dtype) as online_run:
        runs = {"cached": cached_run.step, "online": online_run.step}
        for step in runs.values():  # first steps pick kernels and make the optimizer's states
            step()
        batch = cached_run.loader.build(cached_run.num_steps)[0]
        spent = interleaved(runs, repetitions, "steps")
        by_flops = 1 + teacher_flops(scale, batch.window_lengths) / cached_run.stage.flops(batch)
    return {
        "online_over_cached": spent["online"].wall_s / spent["cached"].wall_s,
        "online_over_cached_cpu": spent["online"].cpu_s / spent["cached"].cpu_s,
        "online_over_cached_by_flops": by_flops,
        "online_over_cached_scale": scale,
        "online_step_s": spent["online"].wall_s,
        "cached_step_s": spent["cached"].wall_s,
        "step_tokens": len(batch.tokens_T),
    }
