"""Model FLOPs of a batch, and devices' peaks: MFU = model FLOPs a second and device / the device's dense peak.

Model FLOPs count a multiply-add as two, forward once and backward twice, attention over true segment lengths in both directions,
the output layer, and frozen models' forward; embedding look-ups, norms and recomputed activations count nothing.
"""

import re
from collections.abc import Sequence

from modeling.shapes import TextDiTConfig, TextVAEConfig, TokenTransformerConfig

# Vendors' dense peaks in TFLOP/s: (bf16 with fp32 accumulation, fp32 without TF32). The longest name found as whole words counts.
PEAK_TFLOPS = {
    "A100": (312.0, 19.5), "A800": (312.0, 19.5), "A10G": (70.0, 31.2), "A10": (125.0, 31.2), "L4": (121.0, 30.3),
    "L40S": (362.0, 91.6), "A40": (150.0, 37.4), "H100 PCIe": (756.0, 51.0), "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0), "H800": (989.0, 67.0), "H200": (989.0, 67.0), "GH200": (989.0, 67.0), "H20": (148.0, 44.0),
    "B200": (2250.0, 75.0),
    "GB200": (2500.0, 80.0), "RTX 3090": (71.0, 35.6), "RTX 4090": (165.0, 82.6), "RTX 5090": (210.0, 105.0),
}  # fmt: skip


def transformer_flops(
    weights: float, layers: int, width: int, lengths: Sequence[int], passes: int = 3, causal: bool = False
) -> float:
    """FLOPs of Transformer layers over packed segments, bidirectional unless `causal`.

    2 FLOPs per weight and token, and 2 x 2 x length^2 x width per layer and segment for q k^T and the sum of values; half of that
    if no token looks at what comes after it.

    Args:
        weights: of the matrices that every token passes through (no embedding table).
        lengths: tokens of each segment.
        passes: 3 for forward and backward, 1 for a frozen model's forward.
    """
    tokens, squares = float(sum(lengths)), float(sum(length * length for length in lengths))
    return passes * (2.0 * weights * tokens + (2.0 if causal else 4.0) * layers * width * squares)


def vae_flops(vae: TextVAEConfig, segment_lengths: Sequence[int]) -> float:
    """Of a training step of stage 1: both stacks, the latents' projections and the LM head."""
    layers = vae.num_encoder_layers + vae.num_decoder_layers
    weights = 12 * vae.width**2 * layers + vae.width * (3 * vae.latent_dim + vae.vocab_size)
    return transformer_flops(weights, layers, vae.width, segment_lengths)


def dit_flops(
    dit: TextDiTConfig,
    vae: TextVAEConfig,
    window_lengths: Sequence[int],
    segment_lengths: Sequence[int],
    num_targets: int,
    teacher_passes: int = 0,
) -> float:
    """Of a training step of stage 2 over windows, with the frozen VAE's encoder over their contexts and targets, and in distillation so
    many forward passes of a frozen DiT of the same shape."""
    weights = 12 * dit.width**2 * dit.num_layers + 2 * dit.width * dit.latent_dim
    own = transformer_flops(weights, dit.num_layers, dit.width, window_lengths, passes=3 + teacher_passes)
    if dit.head == "categorical":
        # Learned logits forward and backward; forward alone the known ones and the mean latent, with the network and before it.
        known, learned = 2 * 2 * (3 * dit.latent_dim + 1), 2 * dit.width
        own += float(num_targets) * vae.vocab_size * ((3 + teacher_passes) * learned + (1 + teacher_passes) * known)
    if dit.token_embedding:
        # Before the network all tokens are asked, contexts too: known logits and the mean of the embedding, once more in the backward pass.
        asked = 2 * (3 * dit.latent_dim + 1 + dit.width) * (2 + teacher_passes) * float(sum(window_lengths))
        own += vae.vocab_size * (asked - (1 + teacher_passes) * num_targets * known / 2)
    encoder = 12 * vae.width**2 * vae.num_encoder_layers
    return own + transformer_flops(encoder, vae.num_encoder_layers, vae.width, segment_lengths, passes=1)


def token_transformer_flops(shape: TokenTransformerConfig, window_lengths: Sequence[int], causal: bool) -> float:
    """Of a training step of a baseline over tokens: 12 D^2 weights a layer and the LM head."""
    weights = 12 * shape.width**2 * shape.num_layers + shape.width * shape.vocab_size
    return transformer_flops(weights, shape.num_layers, shape.width, window_lengths, causal=causal)


def peak_flops(device_name: str, precision: str, configured_tflops: float | None = None) -> float | None:
    """A device's dense peak in FLOP/s at this precision; None for devices that nobody described (CPUs)."""
    if configured_tflops is not None:
        return configured_tflops * 1e12
    matches = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE)]
    if not matches:
        return None
    return PEAK_TFLOPS[max(matches, key=len)][0 if precision == "bf16" else 1] * 1e12
