"""The projector ``mlp_AR``: four patches of the vision tower become one token of the language model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

PROJECTOR_NORM_EPS = 1e-5  # not the tower's 1e-6


class Projector(nn.Module):
    """Norm on each patch, 2 x 2 merge, two matrices with the exact GELU between them."""

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        merged = 4 * vision_width
        self.pre_norm = nn.LayerNorm(vision_width, eps=PROJECTOR_NORM_EPS)
        self.linear_1 = nn.Linear(merged, merged)
        self.linear_2 = nn.Linear(merged, language_width)

    def forward(self, hidden: Tensor) -> Tensor:
        """States in block order [P, C] -> tokens [P / 4, language width]."""
        merged = self.pre_norm(hidden).view(-1, self.linear_1.in_features)
        return self.linear_2(F.gelu(self.linear_1(merged)))
