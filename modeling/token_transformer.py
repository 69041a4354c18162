"""TokenTransformer: the VAE's and the DiT's blocks from token ids to logits of tokens; what both baselines are made of.

`causal_inputs` and segments with `causal` make a language model of it, masked_diffusion.py a masked diffusion model.

Shape letters: T packed tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .attention import Segments
from .layers import Transformer, initialize
from .shapes import TokenTransformerConfig

LOGIT_TOKENS = 2048
"""Tokens whose logits exist at a time, where no gradient is wanted."""


class TokenTransformer(nn.Module):
    """Input ids [T] -> hidden states [T, D] -> logits of the vocabulary.

    Args:
        num_marks: input ids behind the vocabulary's, which stand for no token, such as a mask's.
        with_roles: the network is told which tokens are targets.
    """

    def __init__(self, config: TokenTransformerConfig, num_marks: int = 0, with_roles: bool = False):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + num_marks, config.width)
        self.role = nn.Embedding(2, config.width) if with_roles else None
        self.transformer = Transformer(
            config.num_layers,
            config.width,
            config.head_dim,
            config.rope_theta,
            config.qk_norm,
            neighbour_heads=config.neighbour_heads,
        )
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.lm_head.zero_init = True  # type: ignore[assignment]
        initialize(self)

    def forward(
        self, inputs_T: torch.Tensor, segments: Segments, is_target_T: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The hidden states [T, D] after the final norm, of which `lm_head` makes logits."""
        x_TD = self.embedding(inputs_T)
        if self.role is not None:
            assert is_target_T is not None
            x_TD = x_TD + self.role(is_target_T.long())
        return self.transformer(x_TD, segments)

    def token_nats(self, hidden_TD: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
        """-log p of each token, fp32 [T], without the [T, V] logits; for use without gradients."""
        parts = zip(hidden_TD.split(LOGIT_TOKENS), tokens_T.split(LOGIT_TOKENS), strict=True)
        return torch.cat([F.cross_entropy(self.lm_head(h).float(), ids, reduction="none") for h, ids in parts])


def causal_inputs(tokens_T: torch.Tensor, windows: Segments, start_id: int) -> torch.Tensor:
    """What a language model reads where it predicts `tokens_T`: the token before, and `start_id` where a window begins."""
    return torch.where(windows.positions_T == 0, start_id, tokens_T.roll(1))
