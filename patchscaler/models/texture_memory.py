"""Reference texture memory (RTM): the universal store of texture priors (Section 3.3)."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.nn import functional as F

CHANNELS_PER_BUFFER = 16


class TextureMemory(ModelMixin, ConfigMixin):
    """RTM-value and RTM-key as integer buffers, which no change of dtype touches.

    Values are latent patches in 8 bits with one scale per channel; the error of a value is at most half a scale.
    They lie in buffers of 16 channels, since a file holds whole buffers: 2,000 patches of 16×16×16 take 8 MB, under
    the 10 MB that the Hub takes without LFS. Keys are unit vectors in 16 bits.

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
        for part in range(0, channels, CHANNELS_PER_BUFFER):
            count = min(CHANNELS_PER_BUFFER, channels - part)
            self.register_buffer(_buffer(part), torch.zeros(size, count, patch, patch, dtype=torch.int8))
        self.register_buffer("key_codes", torch.zeros(size, width, dtype=torch.int16))

    @classmethod
    def from_patches(cls, patches: Tensor, features: Tensor) -> TextureMemory:
        """Build a memory from latent patches M×c×V×V and their classifier features M×D."""
        scales = patches.abs().amax((0, 2, 3)) / 127
        memory = cls(len(patches), patches.shape[1], patches.shape[2], features.shape[1], scales.tolist())
        codes = (patches / scales.view(1, -1, 1, 1)).round()
        for part, stored in zip(codes.split(CHANNELS_PER_BUFFER, dim=1), memory._value_codes(), strict=True):
            stored.copy_(part)
        memory.key_codes.copy_((F.normalize(features.float(), dim=1) * 32767).round())
        return memory

    @property
    def features(self) -> Tensor:
        """RTM-key, M×D, float32, each of length 1."""
        return F.normalize(self.key_codes.float(), dim=1)

    def patches(self, indices: Tensor) -> Tensor:
        """RTM-value at integer indices of any shape: …×c×V×V, float32."""
        scales = torch.tensor(self.config.scales, device=indices.device).view(-1, 1, 1)
        codes = torch.cat([stored[indices] for stored in self._value_codes()], dim=-3)
        return codes.float() * scales

    def _value_codes(self) -> list[Tensor]:
        """The buffers of RTM-value, M×(up to 16)×V×V each, in the order of the channels."""
        return [getattr(self, _buffer(part)) for part in range(0, self.config.channels, CHANNELS_PER_BUFFER)]


def _buffer(part: int) -> str:
    """Name of the buffer that begins at a channel."""
    return f"value_codes_{part}" if part else "value_codes"
