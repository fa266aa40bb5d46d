"""The plain residual convolution that the autoencoder and the GRM are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(x))), B×D×h×w → B×D×h×w.

    No normalisation layer: on a CPU those cost more than the convolutions, and without one a patch's
    result does not depend on the rest of the image beyond the receptive field.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():  # a deep stack starts close to the identity, which replaces normalisation
            self.conv2.weight.mul_(0.2)
            self.conv2.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))  # B×D×h×w


def residual_stack(width: int, depth: int) -> nn.Sequential:
    """`depth` residual blocks in a row, B×width×h×w → B×width×h×w."""
    return nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
