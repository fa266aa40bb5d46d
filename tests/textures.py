"""Images for tests that need some content, of any size."""

from __future__ import annotations

import torch


def texture(height: int, width: int, seed: int) -> torch.Tensor:
    """Noise of several scales, as photographs have it, 3×H×W in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(1, 3, max(2, height // s), max(2, width // s), generator=generator) for s in (1, 4, 16)]
    return sum(torch.nn.functional.interpolate(x, (height, width), mode="bicubic")[0] for x in layers).tanh()
