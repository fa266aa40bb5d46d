"""Patch-DiT compiled ahead of time for ZeroGPU, where a process lives for one call: too short a time to compile in.

Off unless PATCHSCALER_AOT is 1. Not measured: it needs a Space on ZeroGPU hardware.
"""

from __future__ import annotations

import os

import spaces
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from patchscaler.models import PatchDiT
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui.gpu import zero_gpu

SECONDS = 600  # of a device, once, when the Space starts


def compile_ahead(pipeline: PatchScalerPipeline) -> None:
    """Put a compiled forward into Patch-DiT if PATCHSCALER_AOT asks for it. RuntimeError off ZeroGPU."""
    if os.environ.get("PATCHSCALER_AOT") != "1":
        return
    if not zero_gpu():
        raise RuntimeError("PATCHSCALER_AOT=1 is for ZeroGPU Spaces; elsewhere there is upscale --compile")
    network = pipeline.transformer

    @spaces.GPU(duration=SECONDS)
    def compiled():
        return spaces.aoti_compile(export(network))

    use(network, compiled())


@torch.no_grad()
def export(network: PatchDiT) -> ExportedProgram:
    """The forward as samplers call it, one time for all and the prompt as its keys, for any two patches or more."""
    config, device = network.config, network.device
    # Of sizes that nothing else has, and two tensors, or the graph would take what is equal here to be equal always.
    x_t, y0 = (torch.zeros(3, config.channels, config.size, config.size, device=device) for _ in range(2))
    keys = network.prompt_keys(torch.zeros(3, 5, config.prompt_width, device=device))
    count, length = Dim("count", min=2, max=4096), Dim("length", min=2, max=4096)
    each = {0: count, 2: length}
    shapes = {0: count}, {0: count}, None, [(each, each) for _ in keys]
    return torch.export.export(network, (x_t, y0, torch.tensor([500], device=device), keys), dynamic_shapes=shapes)


def use(network: PatchDiT, compiled) -> None:
    """Have ``network`` call what was made of its `export`. It keeps its weights, as `prompt_keys` needs them."""

    def forward(x_t: Tensor, y0: Tensor, t: Tensor, prompt: list[tuple[Tensor, Tensor]]) -> Tensor:
        if len(x_t) > 1:
            return compiled(x_t, y0, t, prompt)
        # A single patch comes with a copy of itself: graphs are never exported for sizes of both one and more.
        x_t, y0 = (values.expand(2, -1, -1, -1) for values in (x_t, y0))
        return compiled(x_t, y0, t, [tuple(part.expand(2, -1, -1, -1) for part in pair) for pair in prompt])[:1]

    network.forward = forward
