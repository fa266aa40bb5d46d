"""What lies under fully transparent pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def spread_colors(rgb: Tensor, alpha: Tensor) -> Tensor:
    """Give the pixels of alpha 0 the colours of the visible ones near them, so that what hides there shows nowhere.

    rgb is 3×H×W in [-1, 1], alpha 1×H×W in [0, 1]; visible pixels stay as they are. This is push-pull interpolation
    (Gortler et al., "The Lumigraph", SIGGRAPH 1996): means over 2×2 pixels, weighted by alpha, on ever smaller
    pictures; then every pixel without a weight takes the colour of the smaller picture there. Without any visible
    pixel all become grey.
    """
    if alpha.all():
        return rgb
    weighted, levels = torch.cat([rgb * alpha, alpha])[None], []  # 1×4×H×W
    while not weighted[:, 3].all() and max(weighted.shape[-2:]) > 1:
        levels.append(weighted)
        weighted = F.avg_pool2d(weighted, 2, ceil_mode=True)  # of the pixels there are, at an odd edge
    colors = weighted[:, :3] / weighted[:, 3:].clamp_min(1e-12)
    for weighted in reversed(levels):
        smaller = F.interpolate(colors, weighted.shape[-2:], mode="bilinear", align_corners=False)
        weight = weighted[:, 3:]
        colors = torch.where(weight > 0, weighted[:, :3] / weight.clamp_min(1e-12), smaller)
    return torch.where(alpha > 0, rgb, colors[0].clamp(-1, 1))
