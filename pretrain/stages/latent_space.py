"""The frozen VAE as stage 2 and the diagnosis see it: loaded from a stage-1 run, with its latents' statistics and floors measured.

Shape letters: T packed tokens, M target tokens of several batches, Z latent dim.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import SUFFIX, Batch
from data_pipeline.reading.loader import TrainLoader, heldout_batches
from modeling.attention import Segments
from modeling.floors import NAMES, Floors, measure_floors
from modeling.text_vae import TextVAE, TextVAEConfig
from modeling.token_posterior import TokenPosterior, token_statistics
from pretrain.checkpoint.find import checkpoint_of, saved_steps
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.checkpoint.storage import Checkpoint
from pretrain.config.load import micro_batch_size
from pretrain.config.schema import RunConfig

if TYPE_CHECKING:
    from pretrain.stages.dit import DiTRun

LATENTS_NAME = "latents.safetensors"
POSTERIOR_PREFIX = "posterior."
MIN_STD = 1e-4
FLOOR_SAMPLES = 8192


def vae_fingerprint(run: str | Path) -> str:
    """Hash of the checkpoint that `load_vae` takes: which VAE a DiT was trained with. Raises: UserError."""
    return read_manifest(checkpoint_of(run)).fingerprint


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: Checkpoint) -> None:
    """`load_state_dict` whose mismatches are one message. Raises: UserError."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted(wanted | found)
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source} does not fit the model: {'; '.join(wrong[:3])}{more}; check the sizes in its config")
    model.load_state_dict(tensors)


def load_vae(run: str | Path, manifest: Manifest | None = None, weights: str = "ema") -> TextVAE:
    """The TextVAE of a stage-1 run, frozen, in eval mode, with EMA weights.

    Raises: UserError when the run is not of stage 1, has no complete checkpoint, or was trained with another tokenizer than
    that of `manifest`.
    """
    path = checkpoint_of(run)
    saved = read_manifest(path).extra
    config = saved["config"]
    if config["stage"] != "vae":
        raise UserError(
            f"{run} is a run of stage {config['stage']}; expected stage vae: set model.vae to a stage-1 run"
        )
    if manifest is not None and saved["tokenizer_sha256"] != manifest.tokenizer.sha256:
        raise UserError(
            f"the VAE in {run} was trained with tokenizer {saved['tokenizer_sha256'][:16]}, the data has"
            f" {manifest.tokenizer.sha256[:16]} ({manifest.tokenizer.name}): train a VAE on this data, or name other data"
        )
    tensors = read_tensors(path, weights)
    tensors = {name.removeprefix("vae."): t for name, t in tensors.items() if name.startswith("vae.")}
    fields = {field.name for field in dataclasses.fields(TextVAEConfig)}
    shape = {name: value for name, value in config["model"].items() if name in fields}
    shape["vocab_size"] = tensors["embedding.weight"].shape[0]
    with torch.device("meta"):
        vae = TextVAE(TextVAEConfig(**shape))
    vae.to_empty(device="cpu")
    load_weights(vae, tensors, path)
    return vae.eval().requires_grad_(False)


def posterior_mean(vae: TextVAE, batch: Batch) -> Tensor:
    """Posterior means fp32 [T, Z] with every segment encoded by itself; in bf16 on CUDA, where the kernels want it."""
    device = batch.tokens_T.device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return vae.encode(batch.tokens_T, Segments.from_lengths(batch.segment_lengths, device))[0]


def target_latents(vae: TextVAE, batches: Iterable[Batch], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior means [M, Z], tokens [M] and segments [M] (numbered from 0) of the target segments, on the CPU."""
    latents, tokens, segments, num_segments = [], [], [], 0
    for batch in batches:
        is_target_T = batch.roles_T == SUFFIX
        latents.append(posterior_mean(vae, batch.to(device)).cpu()[is_target_T])
        tokens.append(batch.tokens_T[is_target_T])
        lengths_S = torch.tensor([n for n, role in zip(batch.segment_lengths, batch.segment_roles) if role == SUFFIX])
        segments.append(num_segments + torch.arange(len(lengths_S)).repeat_interleave(lengths_S.long()))
        num_segments += len(lengths_S)
    return torch.cat(latents), torch.cat(tokens), torch.cat(segments)


def set_statistics(vae: TextVAE, latents_MZ: Tensor) -> Tensor:
    """Set the VAE's `latents_mean` and `latents_std` from posterior means; returns the standardised latents [M, Z]."""
    vae.latents_mean.copy_(latents_MZ.double().mean(0))
    vae.latents_std.copy_(latents_MZ.double().std(0).clamp_min(MIN_STD))
    return standardised(vae, latents_MZ)


def standardised(vae: TextVAE, latents_MZ: Tensor) -> Tensor:
    """`TextVAE.standardize` for latents on the CPU, wherever the VAE is."""
    return vae.standardize(latents_MZ.to(vae.latents_mean.device)).cpu()


def training_batches(config: RunConfig, num_rows: int, micro_batch_rows: int = 1) -> list[Batch]:
    """About `num_rows` of the run's training rows, split as in training, with its features: whole steps from the first on."""
    data = config.data
    steps = max(1, -(-num_rows // data.rows_per_step))
    arguments: dict[str, Any] = {
        "seed": config.train.seed,
        "streams": data.streams,
        "rows_per_step": data.rows_per_step,
        "micro_batch_rows": micro_batch_rows,
    }
    split = data.split
    with TrainLoader(
        data.path,
        config.features_folder(),
        split=split,
        workers=0,
        **arguments,
        **data.reading(),
    ) as loader:
        return [batch for _ in range(steps) for batch in loader.next_step()]


def heldout_rows(
    config: RunConfig, max_rows: int, *, micro_batch_rows: int | None = None, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """A rank's batches of the run's first held-out rows, split as in training, with its features."""
    data = config.data
    return heldout_batches(
        data.path,
        config.features_folder(),
        split=data.split,
        seed=config.train.seed,
        micro_batch_rows=micro_batch_rows or micro_batch_size(config, world_size),
        rank=rank,
        world_size=world_size,
        max_rows=max_rows,
        **data.reading(),
    )


def measured_latents(vae: TextVAE, config: "DiTRun", manifest: Manifest, device: torch.device) -> None:
    """Statistics and floors of the run's first rows, into a file of the run folder. Call on one rank, then read with `read_latents`.

    Raises: UserError when the run has checkpoints and its latents were measured for another VAE or other data: a DiT cannot go on in
    another latent space than it began in.
    """
    path = config.run_folder / LATENTS_NAME
    key = _latents_key(config, manifest)
    if path.is_file():
        try:
            read_latents(path, vae, key)
            return
        except UserError:
            if saved_steps(config.run_folder):
                raise
            path.unlink()
    latents_MZ, tokens_M, segments_M = target_latents(
        vae, training_batches(config, config.flow.statistics_rows), device
    )
    standardised_MZ = set_statistics(vae, latents_MZ)
    if manifest.splits["heldout"]:
        # Fitted to training rows, measured on held-out ones, as the DiT is.
        rows = min(config.train.eval_rows, max(config.flow.statistics_rows // 4, 1))
        held_NZ, held_tokens_N, _ = target_latents(vae, heldout_rows(config, rows), device)
        stride = max(len(held_NZ) // FLOOR_SAMPLES, 1)
        held_NZ, held_tokens_N = standardised(vae, held_NZ[::stride]), held_tokens_N[::stride]
        floors = measure_floors(
            torch.cat((standardised_MZ, held_NZ)), torch.cat((tokens_M, held_tokens_N)), num_samples=len(held_NZ)
        )
    else:
        floors = measure_floors(standardised_MZ, tokens_M)
    tensors = {f"{name}_G": getattr(floors, f"{name}_G") for name in ("times", *NAMES)}
    tensors |= {"latents_mean": vae.latents_mean.cpu(), "latents_std": vae.latents_std.cpu()}
    tensors |= {"within_token_variance": torch.tensor(floors.within_token_variance, dtype=torch.float64)}
    if config.model.prediction == "posterior":
        statistics = token_statistics(standardised_MZ, tokens_M, segments_M, vae.config.vocab_size)
        tensors |= {f"{POSTERIOR_PREFIX}{name}": tensor for name, tensor in statistics.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"key": key})
    partial.replace(path)


def read_latents(path: Path, vae: TextVAE, key: str | None = None) -> Floors:
    """Set the VAE's statistics from a file of `measured_latents` and return the floors. Raises: UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("key")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, it is measured again at the next start") from None
    if key is not None and found != key:
        raise UserError(
            f"{path} was measured for another VAE (has it been trained on?) or other data than model.vae, data and"
            " flow.statistics_rows name now, and the run's checkpoints belong to it: set them back, or start over with --fresh"
        )
    vae.latents_mean.copy_(tensors["latents_mean"])
    vae.latents_std.copy_(tensors["latents_std"])
    grids = {f"{name}_G": tensors[f"{name}_G"] for name in ("times", *NAMES)}
    return Floors(**grids, within_token_variance=float(tensors["within_token_variance"]))


def read_posterior(path: Path, posterior: TokenPosterior) -> None:
    """Set the statistics of a DiT's token posterior from a file of `measured_latents`."""
    with safe_open(path, framework="pt") as file:
        for name, buffer in posterior.named_buffers():
            buffer.copy_(file.get_tensor(f"{POSTERIOR_PREFIX}{name}"))


def _latents_key(config: "DiTRun", manifest: Manifest) -> str:
    """What the statistics depend on: the VAE's checkpoint, the data, and how the rows are drawn."""
    vae = read_manifest(checkpoint_of(config.model.vae))
    parts = [
        vae.step,
        vae.fingerprint,
        manifest.fingerprint,
        config.data.split.model_dump(),
        [config.train.seed, config.data.streams, config.data.rows_per_step, config.flow.statistics_rows],
        config.model.prediction == "posterior",
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
