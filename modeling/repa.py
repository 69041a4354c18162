"""Representation alignment (REPA) of the VAE's encoder with a frozen language model, TextLDM's L_REPA.

Shape letters: T packed tokens, D width, F teacher features.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .layers import initialize


class RepaHead(nn.Module):
    """One linear projection on the student's side; used in training only and left out of every export."""

    def __init__(self, width: int, feature_dim: int):
        super().__init__()
        self.projection = nn.Linear(width, feature_dim)
        initialize(self)

    def forward(self, hidden_TD: torch.Tensor, features_TF: torch.Tensor) -> torch.Tensor:
        """Cosine of proj(h_i) and the frozen y_i, fp32 [T]; L_REPA is minus its mean."""
        return F.cosine_similarity(self.projection(hidden_TD).float(), features_TF.detach().float(), dim=-1)
