"""Texture classifier: its features are the space in which priors are retrieved (T of Algorithm 1)."""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class TextureClassifier(ModelMixin, ConfigMixin):
    """Small convolutional classifier of latent patches.

    Takes latents N×c×V×V (V at least 4; trained at 16), float32, bfloat16 or float16.

    Args:
        channels: c.
        classes: names of the texture classes, in the order of the logits.
        widths: channels at full, half and quarter size; the last is the width of the features.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        classes: tuple[str, ...] = ("texture",),
        widths: tuple[int, int, int] = (64, 128, 192),
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, width) in enumerate(zip((channels, *widths[:-1]), widths, strict=True)):
            for inputs, stride in ((before, 2 if index else 1), (width, 1), (width, 1)):
                convolution = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], len(classes))

    def features(self, latents: Tensor) -> Tensor:
        """N×c×V×V → N×D, the mean of the last feature map; not normalised."""
        return self.trunk(latents.to(self.dtype)).mean((-2, -1))

    def forward(self, latents: Tensor) -> Tensor:
        """N×c×V×V → logits, N×classes."""
        return self.head(self.features(latents))
