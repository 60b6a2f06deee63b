"""Patch dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchDropout(nn.Module):
    """In training, keep a random subset of each sample's patches, in random order (arXiv 2212.00794).

    Args:
        prob: Fraction of patches to drop, in [0, 1); at least one patch is kept.
        num_prefix_tokens: Number of leading tokens that are always kept.
    """

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        if not 0.0 <= prob < 1.0:
            raise ValueError(f"prob is {prob}; expected a share in [0, 1)")
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.prob:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        B, N, C = patches.shape
        # Draw as timm does, so that a seed keeps the same patches.
        order = torch.argsort(torch.randn(B, N, device=x.device), dim=-1)
        kept = order[:, : max(1, int(N * (1.0 - self.prob)))]
        return torch.cat([prefix, patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, C))], dim=1)
