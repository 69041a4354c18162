"""The frozen VAE as later stages and the diagnosis see it: loaded from a stage-1 run, with EMA weights.

Shape letters: T packed tokens, Z latent dim.
"""

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import Batch
from modeling.attention import Segments
from modeling.text_vae import TextVAE, TextVAEConfig
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import check_weights, load_weights, read_tensors
from pretrain.checkpoint.storage import Checkpoint
from pretrain.runs.record import RunRecord
from pretrain.stages.exported_vae import WEIGHTS, export_config, exported_vae
from pretrain.stages.inputs import VAE_KEY


def load_vae(
    run: str | Path,
    manifest: Manifest | None = None,
    latent_dim: int | None = None,
    named_by: str = f"--set {VAE_KEY}=",
) -> TextVAE:
    """The TextVAE of a stage-1 run with EMA weights, or of an exported folder; frozen, in eval mode.

    Raises: UserError when the run is not of stage 1, or the export not of a VAE, when it has no complete checkpoint, was trained with
    another tokenizer than that of `manifest`, or has another `latent_dim` than the one given.
    """
    shape, tensors, tokenizer_sha256, place = _of_export(run, named_by) or _of_run(run, named_by)
    if manifest is not None and tokenizer_sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"the VAE in {run} was trained with tokenizer {tokenizer_sha256[:16]}, the data has"
            f" {manifest.tokenizer.sha256[:16]} ({manifest.tokenizer.name}): train a VAE on this data, or name other data"
        )
    with torch.device("meta"):
        vae = TextVAE(shape)
    check_weights(vae, tensors, place)  # before memory is taken for it
    vae.to_empty(device="cpu")
    load_weights(vae, tensors, place)
    if latent_dim is not None and latent_dim != vae.config.latent_dim:
        raise UserError(
            f"model.latent_dim is {latent_dim}, but the VAE in {run} has latent_dim {vae.config.latent_dim}: set"
            f" model.latent_dim={vae.config.latent_dim}, or name another VAE"
        )
    return vae.eval().requires_grad_(False)


def _of_run(run: str | Path, named_by: str) -> tuple[TextVAEConfig, dict[str, Tensor], str, Checkpoint | Path]:
    """Shape, weights, tokenizer's hash and place."""
    path = checkpoint_of(run, named_by)
    record = RunRecord.of_checkpoint(read_manifest(path))
    if record.stage != "vae":
        raise UserError(f"{run} is a run of stage {record.stage}; expected stage vae: set model.vae to a stage-1 run")
    tensors = read_tensors(path, "ema")
    tensors = {name.removeprefix("vae."): t for name, t in tensors.items() if name.startswith("vae.")}
    fields = {field.name for field in dataclasses.fields(TextVAEConfig)}
    shape = {name: value for name, value in record.config["model"].items() if name in fields}
    shape["vocab_size"] = tensors["embedding.weight"].shape[0]
    return TextVAEConfig(**shape), tensors, record.tokenizer_sha256, path


def _of_export(run: str | Path, named_by: str) -> tuple[TextVAEConfig, dict[str, Tensor], str, Path] | None:
    """The same of an exported folder, None where there is none."""
    folder = exported_vae(run, named_by)
    if folder is None:
        return None
    config = export_config(folder)
    try:
        shape = TextVAEConfig(**config["vae"])
        tensors = load_file(folder / WEIGHTS)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is not what textldm convert writes of a VAE ({error}): export it again") from None
    tensors = {name.removeprefix("vae."): tensor.float() for name, tensor in tensors.items()}
    return shape, tensors, str(config.get("tokenizer_sha256")), folder


def posterior_mean(vae: TextVAE, batch: Batch) -> Tensor:
    """Posterior means fp32 [T, Z]; see `posterior`."""
    return posterior(vae, batch)[0]


def posterior(vae: TextVAE, batch: Batch) -> tuple[Tensor, Tensor]:
    """Means and log-variances fp32 [T, Z] with every segment encoded by itself; in bf16 on CUDA, where the kernels want it."""
    device = batch.tokens_T.device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return vae.encode(batch.tokens_T, Segments.from_lengths(batch.segment_lengths, device))[:2]
