"""The frozen VAE as later stages and the diagnosis see it: loaded from a stage-1 run or its export, with EMA weights.

Shape letters: T packed tokens, Z latent dim.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from pretrain.checkpoint.read import SavedTensors, check_shapes
from pretrain.checkpoint.storage import Checkpoint
from pretrain.checkpoint.tensor_files import UNREADABLE, TensorFiles
from pretrain.config.sections import Train
from pretrain.runs.record import RunRecord
from pretrain.stages.blocks import prepare_blocks
from pretrain.stages.exported import export_config, export_fingerprint, exported_vae, weight_files
from pretrain.stages.inputs import VAE_KEY

ENCODER = ("embedding.", "encoder.", "to_mean.", "to_log_variance.")
"""Where the names of an encoder's parameters begin."""


@dataclass(frozen=True)
class SavedVAE:
    """A VAE where it lies, its weights read one by one when they are asked for.

    Attributes:
        tensors: of any float dtype, by `TextVAE`'s names behind "vae."; besides, what only training had.
    """

    shape: TextVAEConfig
    tensors: SavedTensors | TensorFiles
    tokenizer_sha256: str
    place: Checkpoint | Path

    @property
    def fingerprint(self) -> str:
        """Which VAE it is (inputs.vae_fingerprint)."""
        return export_fingerprint(self.place) if isinstance(self.place, Path) else read_manifest(self.place).fingerprint

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights and buffers, by `TextVAE`'s names."""
        found = self.tensors.shapes.items()
        return {name.removeprefix("vae."): shape for name, shape in found if name.startswith("vae.")}

    def read(self, name: str) -> Tensor:
        """The fp32 tensor that `TextVAE` calls so."""
        return self.tensors[f"vae.{name}"].float()


@contextmanager
def open_vae(
    run: str | Path, manifest: Manifest | None = None, named_by: str = f"--set {VAE_KEY}="
) -> Iterator[SavedVAE]:
    """The TextVAE of a stage-1 run with EMA weights, or of an exported folder; its files are open meanwhile.

    Raises: UserError when the run is not of stage 1, or the export not of a VAE, when it has no complete checkpoint, was trained with
    another tokenizer than that of `manifest`, or its weights do not have its shape.
    """
    folder = exported_vae(run, named_by)
    with ExitStack() as stack:
        found = _of_run(run, named_by, stack) if folder is None else _of_export(folder, stack)
        if manifest is not None and found.tokenizer_sha256 != manifest.tokenizer.sha256:
            raise UserError(
                f"the VAE in {run} was trained with tokenizer {found.tokenizer_sha256[:16]}, the data has"
                f" {manifest.tokenizer.sha256[:16]} ({manifest.tokenizer.name}): train a VAE on this data, or name other data"
            )
        with torch.device("meta"):
            check_shapes(TextVAE(found.shape), found.shapes(), found.place)
        yield found


def load_vae(run: str | Path, manifest: Manifest | None = None, latent_dim: int | None = None) -> TextVAE:
    """The VAE that `open_vae` finds, frozen, in eval mode. Raises: UserError, also when its latent_dim is another than the one given."""
    with open_vae(run, manifest) as saved:
        with torch.device("meta"):
            vae = TextVAE(saved.shape)
        if latent_dim is not None and latent_dim != vae.config.latent_dim:
            raise UserError(
                f"model.latent_dim is {latent_dim}, but the VAE in {run} has latent_dim {vae.config.latent_dim}: set"
                f" model.latent_dim={vae.config.latent_dim}, or name another VAE"
            )
        vae.load_state_dict({name: saved.read(name) for name in saved.shapes()}, assign=True)
    return vae.eval().requires_grad_(False)


def _of_run(run: str | Path, named_by: str, stack: ExitStack) -> SavedVAE:
    path = checkpoint_of(run, named_by)
    saved = read_manifest(path)
    record = RunRecord.of_checkpoint(saved)
    if record.stage != "vae":
        raise UserError(f"{run} is a run of stage {record.stage}; expected stage vae: set model.vae to a stage-1 run")
    tensors = stack.enter_context(SavedTensors(saved, "ema"))
    fields = {field.name for field in dataclasses.fields(TextVAEConfig)}
    shape = {name: value for name, value in record.config["model"].items() if name in fields}
    shape["vocab_size"] = tensors.shapes["vae.embedding.weight"][0]
    return SavedVAE(TextVAEConfig(**shape), tensors, record.tokenizer_sha256, path)


def _of_export(folder: Path, stack: ExitStack) -> SavedVAE:
    try:
        config = export_config(folder)
        shape = TextVAEConfig(**config["vae"])
        tensors = stack.enter_context(TensorFiles(weight_files(folder)))
    except UNREADABLE as error:
        raise UserError(f"{folder} is not what textldm convert writes of a VAE ({error}): export it again") from None
    return SavedVAE(shape, tensors, str(config.get("tokenizer_sha256")), folder)


def posterior_mean(vae: TextVAE, batch: Batch) -> Tensor:
    """Posterior means fp32 [T, Z]; see `posterior`."""
    return posterior(vae, batch)[0]


def posterior(vae: TextVAE, batch: Batch) -> tuple[Tensor, Tensor]:
    """Means and log-variances fp32 [T, Z] with every segment encoded by itself."""
    return encoded(vae, batch.tokens_T, batch.segment_lengths)


def encoded(vae: TextVAE, tokens_T: Tensor, segment_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same of any tokens; in bf16 on CUDA, where the kernels want it."""
    device = tokens_T.device
    rounds = device.type == "cuda" and vae.embedding.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=rounds):
        return vae.encode(tokens_T, Segments.from_lengths(segment_lengths, device))[:2]


def training_encoder(vae: TextVAE, train: Train, device: torch.device) -> TextVAE:
    """A frozen VAE's encoder as training asks for it in every micro-batch: in training's precision, its blocks prepared as training's are.

    In bf16 its weights are half as many bytes to read and need no conversion in each call, as fp32 weights under autocast do.
    Evaluation and diagnosis keep to `vae` itself. The decoder has no values.
    """
    dtype = torch.bfloat16 if train.computes_in(device) == "bf16" else torch.float32
    with torch.device("meta"):
        encoder = TextVAE(vae.config).eval().requires_grad_(False)
    state = {name: tensor.to(dtype) for name, tensor in vae.state_dict().items() if name.startswith(ENCODER)}
    encoder.load_state_dict(state, strict=False, assign=True)
    prepare_blocks(encoder, train)
    return encoder
