"""What each stage's export holds, by the names that the stage itself has for it (`StageKind.from_export`); read when they are asked for."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from data_pipeline.core.errors import UserError
from modeling.shapes import TextVAEConfig
from modeling.stock_language_model import our_name, our_weight
from modeling.text_vae import STATISTICS
from pretrain.checkpoint.tensor_files import renamed
from pretrain.config.schema import RunConfig
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.frozen_vae import open_vae


def of_vae(config: RunConfig, export: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Of a TextVAEModel; without the projection that aligned it with a teacher."""
    return tensors


def of_dit(config: RunConfig, export: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Of a TextLDM. Raises: UserError, if `model.vae` is not the VAE in it: its DiT would go on in another latent space."""
    assert isinstance(config, DiTRun)
    assert config.first_weights is not None
    with open_vae(config.model.vae) as vae:
        other = vae.shape != TextVAEConfig(**export["vae"])
        for name in () if other else vae.shapes():
            theirs = tensors[f"vae.{name}"]
            other = other or (name not in STATISTICS and not theirs.equal(vae.read(name).to(theirs.dtype)))
    if other:
        raise UserError(
            f"{' '.join(config.first_weights)} was trained on the latents of another VAE than model.vae {config.model.vae}: its"
            " DiT knows no other latent space; set model.vae to the VAE of that run"
        )
    names = {name: name for name in tensors if name.startswith("dit.")}
    return renamed(tensors, names | {name: f"vae.{name}" for name in STATISTICS})


def of_ar(config: RunConfig, export: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Of a GPT-NeoX."""
    head_dim = export["hidden_size"] // export["num_attention_heads"]
    names = {f"model.{our_name(name)}": name for name in tensors}
    return renamed(tensors, names, lambda name, tensor: our_weight(name, head_dim, tensor))


def of_mdlm(config: RunConfig, export: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Of a TextMDLM."""
    return tensors
