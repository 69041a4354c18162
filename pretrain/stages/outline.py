"""What a stage trains and computes, without weights, data or a teacher: its models on the meta device, for `textldm plan`.

Shape letters: T packed tokens, M target tokens, D width, Z latent dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from modeling import flow, losses
from modeling.attention import Segments
from modeling.heads import CategoricalHead, TokenHead, TokenTargets, VelocityHead
from modeling.repa import RepaHead
from modeling.shapes import TextVAEConfig
from modeling.text_dit import TextDiT
from modeling.text_vae import TextVAE
from modeling.token_transformer import TokenTransformer, causal_inputs
from pretrain.stages.distill_config import DistillRun
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.frozen_vae import ENCODER
from pretrain.stages.token_config import ARRun, TokenRun
from pretrain.stages.vae_config import VAERun
from pretrain.telemetry.flops import dit_flops, token_transformer_flops, vae_flops

VOCABULARY, TEACHER_FEATURES = 151_936, 2048
"""Of Qwen3-1.7B, where no prepared data and no cache say otherwise."""


@dataclass(frozen=True)
class Windows:
    """A micro-batch as far as memory and time go: lengths of its windows, each cut in the middle into context and target."""

    lengths: Sequence[int]

    @property
    def halves(self) -> list[int]:
        """Lengths of all segments, in order."""
        return [part for length in self.lengths for part in (length // 2, length - length // 2) if part]

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def num_targets(self) -> int:
        """Tokens of the second halves."""
        return sum(length - length // 2 for length in self.lengths)


@dataclass(frozen=True)
class Outline:
    """A stage as a planner sees it.

    Attributes:
        trained: module with every parameter that is trained, on one device.
        loss: the forward pass of a micro-batch on that device, with the loss as its result.
        flops: model FLOPs of a micro-batch's forward and backward pass, as the stage itself counts them.
        vocab_size, features: V, and F of the teacher, 0 without.
        frozen: modules that are only run forward; on every rank in full, in fp32.
        copied: those of them, or parts, that training in bf16 holds once more, in bf16.
    """

    trained: nn.Module
    loss: Callable[[Windows], Tensor]
    flops: Callable[[Windows], float]
    vocab_size: int
    features: int = 0
    frozen: list[nn.Module] = field(default_factory=list)
    copied: list[nn.Module] = field(default_factory=list)

    def frozen_bytes(self, bf16: bool) -> int:
        """Of everything frozen, on every rank."""
        return 4 * _elements(self.frozen) + 2 * _elements(self.copied) * bf16


def _elements(modules: list[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _tokens(windows: Windows, device: torch.device) -> Tensor:
    return torch.zeros(windows.num_tokens, dtype=torch.int64, device=device)


def of_vae(config: VAERun, device: torch.device, vocab_size: int = 0) -> Outline:
    """Stage 1."""
    shape = config.model.architecture()
    shape.vocab_size = shape.vocab_size or vocab_size or VOCABULARY
    features = TEACHER_FEATURES if config.repa.weight else 0
    with device:
        vae = TextVAE(shape)
        repa = RepaHead(shape.width, features) if features else None
    trained = nn.ModuleDict({"vae": vae} | ({"repa": repa} if repa else {}))

    def loss(windows: Windows) -> Tensor:
        segments, tokens_T = Segments.from_lengths(windows.halves, device), _tokens(windows, device)
        mean_TZ, log_variance_TZ, hidden_TD = vae.encode(tokens_T, segments)
        latents_TZ = mean_TZ + (0.5 * log_variance_TZ).exp() * torch.randn_like(mean_TZ)
        ones_T = torch.ones(windows.num_tokens, device=device)
        ce, _ = losses.linear_cross_entropy(
            vae.decode(latents_TZ, segments), vae.lm_head.weight, tokens_T, ones_T, _head_chunk(device)
        )
        total = ce + losses.kl_to_standard_normal(mean_TZ, log_variance_TZ).sum(-1).sum()
        if repa is not None:
            total = total - repa(hidden_TD, torch.zeros(windows.num_tokens, features, device=device)).sum()
        return total

    return Outline(trained, loss, lambda windows: vae_flops(shape, windows.halves), shape.vocab_size, features)


def of_dit(config: DiTRun, device: torch.device, vocab_size: int = 0) -> Outline:
    """Stage 2, with a frozen VAE of the default shape: which one a run will have is not known before it is trained."""
    shape = config.model.architecture()
    shape.vocab_size = vocab_size or VOCABULARY
    with device:
        dit = TextDiT(shape)
        vae = TextVAE(TextVAEConfig(vocab_size=shape.vocab_size, latent_dim=shape.latent_dim)).requires_grad_(False)
        wants_head = config.flow.token_loss_weight and isinstance(dit.head, VelocityHead) and config.stage == "dit"
        head = TokenHead(shape.width, shape.vocab_size) if wants_head else None
    if not isinstance(dit.head, VelocityHead):
        dit.head.through_mean = config.flow.through_tokens
    trained = nn.ModuleDict({"dit": dit} | ({"token_head": head} if head else {}))

    def loss(windows: Windows) -> Tensor:
        tokens_T, layout = _tokens(windows, device), Segments.from_lengths(windows.lengths, device)
        with torch.no_grad():
            latents_TZ = vae.encode(tokens_T, Segments.from_lengths(windows.halves, device))[0]
        noise_TZ, time_T = torch.randn_like(latents_TZ), torch.rand(windows.num_tokens, device=device)
        noisy_TZ = flow.interpolate(latents_TZ, noise_TZ, time_T[:, None])
        is_target_T = torch.ones(windows.num_tokens, dtype=torch.bool, device=device)
        targets = TokenTargets(torch.arange(windows.num_targets, device=device), tokens_T[: windows.num_targets])
        output = dit(noisy_TZ, is_target_T, time_T, layout, targets=targets)
        error_T = losses.squared_error(output.velocity_TZ, flow.velocity(latents_TZ, noise_TZ))
        total = (error_T * is_target_T).sum()
        if output.token_loss is not None:
            total = total + output.token_loss
        if head is not None:
            weights_T = is_target_T.float()
            total = total + losses.linear_cross_entropy(output.hidden_TD, head.weight, tokens_T, weights_T)[0]
        return total

    def flops(windows: Windows) -> float:
        return dit_flops(shape, vae.config, windows.lengths, windows.halves, windows.num_targets)

    copied = [vae.get_submodule(name.removesuffix(".")) for name in ENCODER]
    return Outline(trained, loss, flops, shape.vocab_size, frozen=[vae], copied=copied)


def of_distill(config: DistillRun, device: torch.device, vocab_size: int = 0) -> Outline:
    """A student, with its frozen teacher beside the VAE."""
    student = of_dit(config, device, vocab_size)
    dit = student.trained.get_submodule("dit")
    assert isinstance(dit, TextDiT)
    vae, shape, passes = student.frozen[0], dit.config, config.distill.teacher_passes
    assert isinstance(vae, TextVAE)
    if isinstance(dit.head, CategoricalHead):
        dit.head.through_mean = True
    with device:
        teacher = TextDiT(shape).requires_grad_(False)

    def flops(windows: Windows) -> float:
        return dit_flops(shape, vae.config, windows.lengths, windows.halves, windows.num_targets, passes)

    return replace(student, flops=flops, frozen=[vae, teacher])


def of_ar(config: ARRun, device: torch.device, vocab_size: int = 0) -> Outline:
    """The causal baseline."""
    return _of_tokens(config, device, vocab_size, causal=True)


def of_mdlm(config: TokenRun, device: torch.device, vocab_size: int = 0) -> Outline:
    """Masked diffusion."""
    return _of_tokens(config, device, vocab_size, causal=False)


def _of_tokens(config: TokenRun, device: torch.device, vocab_size: int, causal: bool) -> Outline:
    shape = config.model.architecture()
    shape.vocab_size = shape.vocab_size or vocab_size or VOCABULARY
    with device:
        model = TokenTransformer(shape) if causal else TokenTransformer(shape, num_marks=1, with_roles=True)

    def loss(windows: Windows) -> Tensor:
        segments = Segments.from_lengths(windows.lengths, device, causal)
        tokens_T, ones_T = _tokens(windows, device), torch.ones(windows.num_tokens, device=device)
        inputs_T = causal_inputs(tokens_T, segments, 0) if causal else tokens_T
        hidden_TD = model(inputs_T, segments) if causal else model(inputs_T, segments, ones_T.bool())
        return losses.linear_cross_entropy(hidden_TD, model.lm_head.weight, tokens_T, ones_T, _head_chunk(device))[0]

    def flops(windows: Windows) -> float:
        return token_transformer_flops(shape, windows.lengths, causal)

    return Outline(model, loss, flops, shape.vocab_size)


def _head_chunk(device: torch.device) -> int:
    """The meta device stands for a GPU."""
    return 2048 if device.type == "meta" else 0
