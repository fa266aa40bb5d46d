"""Global Restoration Module: degraded latents → coarse HR latents and a confidence map (Section 3.1, Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

from patchscaler.models.blocks import residual_stack


@dataclass
class GRMOutput(BaseOutput):
    """What the GRM gives.

    Attributes:
        latents: y_HR, B×c×h×w, zero mean and unit variance over natural images.
        confidence_logits: B×1×h×w; `confidence` is their sigmoid.
    """

    latents: Tensor
    confidence_logits: Tensor

    @property
    def confidence(self) -> Tensor:
        """C of Eq. 1, B×1×h×w in (0, 1), float32."""
        return self.confidence_logits.float().sigmoid()


class GRM(ModelMixin, ConfigMixin):
    """U-Net of plain residual blocks on latents; y_HR = y_LR + what the network adds (nothing at the start).

    Takes latents B×c×h×w of any size from 1×1, float32, bfloat16 or float16.

    Args:
        channels: c.
        widths: channels at full and at half latent size.
        depths: residual blocks before, at and after half size.
        eta: η, a squared latent error: where C is well below 1, it estimates (η / e²)ᵃ with the a that the
            calibration of the training chooses; 1 in Eq. 1. It plays no part in inference; it is kept here because it
            says what a confidence means.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        widths: tuple[int, int] = (96, 192),
        depths: tuple[int, int, int] = (2, 4, 2),
        eta: float | None = None,
    ):
        super().__init__()
        full, half = widths
        self.entry = nn.Conv2d(channels, full, 3, padding=1)
        self.before = residual_stack(full, depths[0])
        self.down = nn.Conv2d(full, half, 3, stride=2, padding=1)
        self.middle = residual_stack(half, depths[1])
        self.up = nn.Sequential(nn.Conv2d(half, full * 4, 1), nn.PixelShuffle(2))
        self.after = residual_stack(full, depths[2])
        self.restore = nn.Conv2d(full, channels, 3, padding=1)
        self.confidence_head = nn.Sequential(
            nn.Conv2d(full, full // 2, 3, padding=1), nn.SiLU(), nn.Conv2d(full // 2, 1, 3, padding=1)
        )
        nn.init.zeros_(self.restore.weight)
        nn.init.zeros_(self.restore.bias)

    def forward(self, y_lr: Tensor) -> GRMOutput:
        height, width = y_lr.shape[-2:]
        x = y_lr.to(self.dtype)
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")  # B×c×h'×w', both even
        wide = self.before(self.entry(x))  # B×D×h'×w'
        deep = self.middle(self.down(wide))  # B×D'×h'/2×w'/2
        features = self.after(wide + self.up(deep))  # B×D×h'×w'
        added = self.restore(features)[..., :height, :width]  # B×c×h×w
        logits = self.confidence_head(features)[..., :height, :width]  # B×1×h×w
        return GRMOutput(latents=y_lr + added.to(y_lr.dtype), confidence_logits=logits)


def squared_error(latents: Tensor, target: Tensor) -> Tensor:
    """e² = ‖y_HR − x_HR‖² of Eq. 1, averaged over channels: B×c×h×w twice → B×1×h×w, float32."""
    return (latents.float() - target.float()).square().mean(1, keepdim=True)


def confidence_loss(output: GRMOutput, target: Tensor, eta: float) -> Tensor:
    """The confidence term of Eq. 1: C e² − η log C, divided by η and averaged over the map.

    The gradient of e² is stopped, so the confidence describes the restoration and does not trade it; the minimum
    over C is min(1, η / e²).

    Args:
        output: of the GRM for B×c×h×w.
        target: x_HR, B×c×h×w.
        eta: η, in squared latent units, above 0.
    """
    error = squared_error(output.latents, target).detach() / eta
    log_confidence = F.logsigmoid(output.confidence_logits.float())
    return (log_confidence.exp() * error - log_confidence).mean()
