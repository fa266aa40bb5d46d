"""Reference texture memory (RTM): the universal store of texture priors (Section 3.3)."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.nn import functional as F


class TextureMemory(ModelMixin, ConfigMixin):
    """RTM-value and RTM-key as integer buffers, which no change of dtype touches.

    Values are latent patches in 8 bits with one scale per channel: 2,000 of 16×16×16 take 8 MB and so lie in
    one file of under 10 MB; the error of a value is at most half a scale. Keys are unit vectors in 16 bits.

    Args:
        size: M, number of patches.
        channels, patch: c and V of a patch.
        width: D, length of a key.
        scales: c numbers, the value of one step of the 8-bit code.
    """

    @register_to_config
    def __init__(
        self,
        size: int = 2000,
        channels: int = 16,
        patch: int = 16,
        width: int = 192,
        scales: list[float] | None = None,
    ):
        super().__init__()
        self.register_buffer("value_codes", torch.zeros(size, channels, patch, patch, dtype=torch.int8))
        self.register_buffer("key_codes", torch.zeros(size, width, dtype=torch.int16))

    @classmethod
    def from_patches(cls, patches: Tensor, features: Tensor) -> TextureMemory:
        """Build a memory from latent patches M×c×V×V and their classifier features M×D."""
        scales = patches.abs().amax((0, 2, 3)) / 127
        memory = cls(len(patches), patches.shape[1], patches.shape[2], features.shape[1], scales.tolist())
        memory.value_codes.copy_((patches / scales.view(1, -1, 1, 1)).round())
        memory.key_codes.copy_((F.normalize(features.float(), dim=1) * 32767).round())
        return memory

    @property
    def features(self) -> Tensor:
        """RTM-key, M×D, float32, each of length 1."""
        return F.normalize(self.key_codes.float(), dim=1)

    def patches(self, indices: Tensor) -> Tensor:
        """RTM-value at integer indices of any shape: …×c×V×V, float32."""
        scales = torch.tensor(self.config.scales, device=indices.device).view(-1, 1, 1)
        return self.value_codes[indices].float() * scales
