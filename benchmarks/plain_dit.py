"""A plain DiT of the same size, trained the common way: every window padded to the longest length, SDPA with a padding mask.

Shape letters: B windows, L padded length, D width, H heads, K head dim, Z latent dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from modeling import flow

PADDED_WINDOWS = 4
"""Windows of a padded micro-batch: as many tokens and zeros together as the packed step has tokens."""


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP over [B, L, D]."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(
        self, x_BLD: torch.Tensor, cos_LK: torch.Tensor, sin_LK: torch.Tensor, mask_B11L: torch.Tensor
    ) -> torch.Tensor:
        batch, length, _ = x_BLD.shape
        qkv_3BHLK = (
            self.qkv(self.attention_norm(x_BLD)).view(batch, length, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        )
        q_BHLK, k_BHLK, v_BHLK = qkv_3BHLK.unbind(0)
        q_BHLK, k_BHLK = (_rope(x, cos_LK, sin_LK) for x in (q_BHLK, k_BHLK))
        out_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask_B11L)
        x_BLD = x_BLD + self.out(out_BHLK.transpose(1, 2).reshape(batch, length, -1))
        return x_BLD + self.mlp(self.mlp_norm(x_BLD))


def _rope(x_BHLK: torch.Tensor, cos_LK: torch.Tensor, sin_LK: torch.Tensor) -> torch.Tensor:
    first, second = x_BHLK.chunk(2, dim=-1)
    return x_BHLK * cos_LK + torch.cat((-second, first), dim=-1) * sin_LK


class PlainDiT(nn.Module):
    """Velocity [B, L, Z] of padded windows."""

    def __init__(self, latent_dim: int, width: int, num_layers: int, head_dim: int, length: int):
        super().__init__()
        self.from_latent, self.to_latent = nn.Linear(latent_dim, width), nn.Linear(width, latent_dim)
        self.blocks = nn.ModuleList(PlainBlock(width, head_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        frequencies_P = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles_LK = torch.outer(torch.arange(length), frequencies_P).repeat(1, 2)
        self.register_buffer("cos_LK", angles_LK.cos())
        self.register_buffer("sin_LK", angles_LK.sin())

    def forward(self, latents_BLZ: torch.Tensor, mask_B11L: torch.Tensor) -> torch.Tensor:
        x_BLD = self.from_latent(latents_BLZ)
        for block in self.blocks:
            x_BLD = block(x_BLD, self.cos_LK, self.sin_LK, mask_B11L)
        return self.to_latent(self.norm(x_BLD))


class PaddedStep:
    """One update on the given windows, in micro-batches of `PADDED_WINDOWS`; torch's AdamW, then the EMA."""

    def __init__(self, model: PlainDiT, lengths: Sequence[int], length: int, latent_dim: int):
        self.model, self.latent_dim, self.num_targets = model, latent_dim, sum(n - n // 2 for n in lengths)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.ema = [p.detach().clone() for p in model.parameters()]
        places_L = torch.arange(length)
        self.micro_batches = []
        for start in range(0, len(lengths), PADDED_WINDOWS):
            lengths_B1 = torch.tensor(lengths[start : start + PADDED_WINDOWS])[:, None]
            real_BL = places_L < lengths_B1
            self.micro_batches.append((real_BL, real_BL & (places_L >= lengths_B1 // 2)))

    def __call__(self) -> None:
        for real_BL, is_target_BL in self.micro_batches:
            data_BLZ, noise_BLZ = torch.randn(2, *real_BL.shape, self.latent_dim)
            time_B11 = torch.rand(len(real_BL), 1, 1)
            noisy_BLZ = flow.interpolate(data_BLZ, noise_BLZ, time_B11)
            inputs_BLZ = torch.where(is_target_BL[..., None], noisy_BLZ, data_BLZ)
            velocity_BLZ = self.model(inputs_BLZ, real_BL[:, None, None, :])
            error_BL = (velocity_BLZ - flow.velocity(data_BLZ, noise_BLZ)).square().mean(-1)
            ((error_BL * is_target_BL).sum() / self.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.model.parameters()], 1e-4)
