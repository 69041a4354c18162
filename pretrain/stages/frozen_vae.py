"""The frozen VAE as later stages and the diagnosis see it: loaded from a stage-1 run, with EMA weights.

Shape letters: T packed tokens, Z latent dim.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import Batch
from modeling.attention import Segments
from modeling.text_vae import TextVAE, TextVAEConfig
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import load_weights, read_tensors
from pretrain.runs.record import RunRecord
from pretrain.stages.inputs import VAE_KEY


def load_vae(
    run: str | Path,
    manifest: Manifest | None = None,
    latent_dim: int | None = None,
    named_by: str = f"--set {VAE_KEY}=",
) -> TextVAE:
    """The TextVAE of a stage-1 run, frozen, in eval mode, with EMA weights.

    Raises: UserError when the run is not of stage 1, has no complete checkpoint, was trained with another tokenizer than
    that of `manifest`, or has another `latent_dim` than the one given.
    """
    path = checkpoint_of(run, named_by)
    record = RunRecord.of_checkpoint(read_manifest(path))
    if record.stage != "vae":
        raise UserError(f"{run} is a run of stage {record.stage}; expected stage vae: set model.vae to a stage-1 run")
    if manifest is not None and record.tokenizer_sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"the VAE in {run} was trained with tokenizer {record.tokenizer_sha256[:16]}, the data has"
            f" {manifest.tokenizer.sha256[:16]} ({manifest.tokenizer.name}): train a VAE on this data, or name other data"
        )
    tensors = read_tensors(path, "ema")
    tensors = {name.removeprefix("vae."): t for name, t in tensors.items() if name.startswith("vae.")}
    fields = {field.name for field in dataclasses.fields(TextVAEConfig)}
    shape = {name: value for name, value in record.config["model"].items() if name in fields}
    shape["vocab_size"] = tensors["embedding.weight"].shape[0]
    with torch.device("meta"):
        vae = TextVAE(TextVAEConfig(**shape))
    vae.to_empty(device="cpu")
    load_weights(vae, tensors, path)
    if latent_dim is not None and latent_dim != vae.config.latent_dim:
        raise UserError(
            f"model.latent_dim is {latent_dim}, but the VAE in {run} has latent_dim {vae.config.latent_dim}: set"
            f" model.latent_dim={vae.config.latent_dim}, or name another VAE"
        )
    return vae.eval().requires_grad_(False)


def posterior_mean(vae: TextVAE, batch: Batch) -> Tensor:
    """Posterior means fp32 [T, Z] with every segment encoded by itself; in bf16 on CUDA, where the kernels want it."""
    device = batch.tokens_T.device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return vae.encode(batch.tokens_T, Segments.from_lengths(batch.segment_lengths, device))[0]
