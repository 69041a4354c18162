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

    def forward(self, hidden_TD: torch.Tensor, directions_TF: torch.Tensor) -> torch.Tensor:
        """Cosine of proj(h_i) and the frozen y_i, fp32 [T]; L_REPA is minus its mean.

        directions_TF: y_i / |y_i|. A lossy cache gives its mean over all features with the same code, which is shorter than 1.
        Its length stays as it is: the product is then the mean of the exact cosines, for a student that does not know what the
        code left out. A cosine with the mean itself would be larger by what the codec lost, 1 % at a mean cosine of 0.99.
        """
        projected_TF = F.normalize(self.projection(hidden_TD).float(), dim=-1)
        return (projected_TF * directions_TF.detach().float()).sum(-1)
