"""The shapes of the models: plain numbers, known without torch, stored in checkpoints and exported folders."""

from dataclasses import dataclass

DEFAULT_NEW_TOKENS = 128
"""Tokens that `generate` makes where nobody says how many."""


def check_heads(width: int, head_dim: int) -> None:
    """Raise ValueError for a width that is no number of whole heads, or heads that rotary pairs do not fill."""
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; expected an even number, because rotary embeddings turn pairs")
    if width <= 0 or width % head_dim:
        nearest = max(1, round(width / head_dim)) * head_dim
        raise ValueError(f"width {width} is not a multiple of head_dim {head_dim}: the nearest width is {nearest}")


@dataclass(kw_only=True)
class TextVAEConfig:
    """Shape of a TextVAE.

    Attributes:
        vocab_size: V, rows of the untied token embedding and LM head; at least the tokenizer's size.
        latent_dim: Z, channels of a token's latent.
        width: D of both Transformers.
        num_encoder_layers, num_decoder_layers: blocks.
        head_dim: K; width must be a multiple.
        rope_theta: base of the rotary embedding.
        qk_norm: LayerNorm of queries and keys per head.
    """

    vocab_size: int
    latent_dim: int = 64
    width: int = 768
    num_encoder_layers: int = 9
    num_decoder_layers: int = 9
    head_dim: int = 64
    rope_theta: float = 10_000.0
    qk_norm: bool = False

    def __post_init__(self) -> None:
        check_heads(self.width, self.head_dim)


@dataclass(kw_only=True)
class TextDiTConfig:
    """Shape of a TextDiT.

    Attributes:
        latent_dim: Z of the VAE.
        width, num_layers, head_dim: of the Transformer, 12 width^2 weights a layer.
        rope_theta: base of the rotary embedding; positions run over context and target together.
        qk_norm: LayerNorm of queries and keys per head.
        time_conditioning: "none" (the paper's appendix A), "additive" (an embedding added to the input) or "adaln_zero" (DiT's).
        role_embedding: add a learned vector that tells context from target tokens.
        head: what the Transformer's output becomes (heads.py): "velocity" (the paper), or "categorical", probabilities of tokens and the
            velocity that follows from them.
        self_conditioning: the network also reads its own earlier estimate of z (arXiv 2208.04202). When there is none: zeros, or with
            the categorical head what z_t tells by itself, which it always reads.
        token_embedding: with the categorical head, the network also reads a learned embedding of tokens, averaged over which token each
            latent may be, by itself (cf. CDCD, arXiv 2211.15089). It costs about as much as another LM head.
        neighbour_heads: an initialisation: some attention heads start by looking at the tokens beside their own (layers.look_at).
        vocab_size: V of the VAE; read only by the categorical head.
    """

    latent_dim: int = 64
    width: int = 768
    num_layers: int = 16
    head_dim: int = 64
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    time_conditioning: str = "none"
    role_embedding: bool = False
    head: str = "velocity"
    self_conditioning: bool = False
    token_embedding: bool = False
    neighbour_heads: bool = False
    vocab_size: int = 0

    def __post_init__(self) -> None:
        check_heads(self.width, self.head_dim)
        if self.time_conditioning not in ("none", "additive", "adaln_zero"):
            raise ValueError(f"time_conditioning {self.time_conditioning!r}: expected none, additive or adaln_zero")
        if self.neighbour_heads and self.qk_norm:
            raise ValueError(
                "neighbour_heads sets queries' and keys' biases, which qk_norm would normalise away: choose one"
            )
        if self.head not in ("velocity", "categorical"):
            raise ValueError(f"head {self.head!r}: expected velocity or categorical")
        if self.token_embedding and self.head != "categorical":
            raise ValueError(
                "token_embedding needs head=categorical, which knows what tokens a latent may be; this one knows none"
            )


@dataclass(kw_only=True)
class TokenTransformerConfig:
    """Shape of a TokenTransformer.

    Attributes:
        vocab_size: V, rows of the untied token embedding and LM head; at least the tokenizer's size.
        width, num_layers, head_dim: of the Transformer, 12 width^2 weights a layer.
        rope_theta: base of the rotary embedding; positions run over context and target together.
        qk_norm: LayerNorm of queries and keys per head.
        neighbour_heads: an initialisation: some attention heads start by looking at the tokens beside their own (layers.look_at).
    """

    vocab_size: int
    width: int = 768
    num_layers: int = 12
    head_dim: int = 64
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    neighbour_heads: bool = False

    def __post_init__(self) -> None:
        check_heads(self.width, self.head_dim)
        if self.neighbour_heads and self.qk_norm:
            raise ValueError(
                "neighbour_heads sets queries' and keys' biases, which qk_norm would normalise away: choose one"
            )
