"""Patch-adaptive Group Sampling for other diffusion models, without training (Table 3 of the paper).

A denoiser is any function that predicts x0 of patches; `unet_denoiser` makes one of a diffusers UNet. The confidence
may come from our GRM even where the latents are another autoencoder's: all that counts is 8 pixels per cell.

N patches, C channels, h w latents, V patch side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor, nn

from patchscaler.patches import PatchGrid, merge, split
from patchscaler.plan import GROUPS, MAX_TIMESTEP, SamplingPlan, assign
from patchscaler.sampling import Scheduler, denoise, make_batches, noise_generator

Denoiser = Callable[[Tensor, int, Tensor], Tensor]  # (x_t N×C×V×V, t in 1..1000, the patches' indices N) -> x0 N×C×V×V

_TO_X0 = {  # prediction type -> x0 from x_t, what the network gave, sqrt(abar) and sqrt(1 - abar)
    "epsilon": lambda x_t, output, signal, noise: (x_t - noise * output) / signal,
    "v_prediction": lambda x_t, output, signal, noise: signal * x_t - noise * output,
    "sample": lambda x_t, output, signal, noise: output,
}


@dataclass(frozen=True, eq=False)
class GroupSampled:
    """Latents C×h×w on the CPU, the group of each patch, and the evaluations made for them, in patches."""

    latents: Tensor
    assignment: Tensor
    evaluations: int


def x0_scheduler(scheduler: SchedulerMixin) -> DDIMScheduler:
    """DDIM over the noise schedule of a diffusers scheduler, as `patchscaler.sampling` takes it.

    ValueError if it has no `alphas_cumprod` of 1000 timesteps (those of flow matching have none).
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or len(alphas) != MAX_TIMESTEP:
        raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod of {MAX_TIMESTEP} timesteps")
    shared = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    betas = {name: scheduler.config[name] for name in shared if name in scheduler.config}
    ours = DDIMScheduler(**betas, prediction_type="sample", clip_sample=False)
    if not torch.allclose(ours.alphas_cumprod.cpu(), alphas.cpu(), atol=1e-6):
        raise ValueError(f"the noise schedule of {type(scheduler).__name__} cannot be told from its config")
    return ours


def unet_denoiser(unet: nn.Module, scheduler: SchedulerMixin, **conditions: Tensor) -> Denoiser:
    """A diffusers UNet as a predictor of x0, whether it predicts that, epsilon or v.

    Args:
        unet: called as `unet(x_t, t, **conditions).sample`, in its own dtype; t counts from 0, as diffusers does.
        scheduler: the one that the network was trained with: its `prediction_type` and `alphas_cumprod` count.
        conditions: such as `encoder_hidden_states` 1×L×D, for all patches alike.
    """
    kind = scheduler.config.prediction_type
    if kind not in _TO_X0:
        raise ValueError(f"prediction_type={kind!r} is none of {list(_TO_X0)}")
    alphas = scheduler.alphas_cumprod.cpu()

    def denoise(x_t: Tensor, t: int, indices: Tensor) -> Tensor:
        given = {name: value.to(unet.dtype).expand(len(x_t), *value.shape[1:]) for name, value in conditions.items()}
        time = torch.tensor([t - 1], device=x_t.device).expand(len(x_t))
        output = unet(x_t.to(unet.dtype), time, **given).sample.float()  # N×C×V×V
        abar = alphas[t - 1].item()
        if abar == 0 and kind == "epsilon":
            raise ValueError(f"x0 cannot be told from epsilon at t={t}, where abar is 0")
        return _TO_X0[kind](x_t, output, abar**0.5, (1 - abar) ** 0.5)

    return denoise


@torch.inference_mode()
def group_sample(
    denoiser: Denoiser,
    y0: Tensor,
    confidence: Tensor,
    plan: SamplingPlan,
    scheduler: Scheduler,
    seed: int = 0,
    size: int = 64,
    stride: int = 48,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
) -> GroupSampled:
    """GRM's latents, refined by any denoiser: grouping (Eq. 2), shortcut (Eq. 6) and blending as in the pipeline.

    A patch's result depends on its content, its group's (T, N) and the seed only.

    Args:
        y0: coarse latents C×h×w, at least V cells in each direction.
        confidence: 1×h×w in [0, 1].
        scheduler: as `x0_scheduler` gives it.
        size, stride: V of a patch, and how far apart patches begin at most. Stable Diffusion works best at V = 64.
        device: of the denoiser.
    """
    grid = PatchGrid(*y0.shape[-2:], size=size, stride=stride)
    assignment = assign(split(confidence, grid).mean((1, 2, 3)), plan)  # N
    noise = split(torch.randn(y0.shape, generator=noise_generator(seed)), grid)  # N×C×V×V
    patches = split(y0.float().cpu(), grid)  # N×C×V×V
    x0 = torch.empty_like(patches)
    for batch in make_batches(assignment, plan, batch_size):
        start = patches[batch.indices].to(device), noise[batch.indices].to(device)
        predict = lambda x_t, t, indices=batch.indices: denoiser(x_t, t, indices)  # noqa: E731
        *_, last = denoise(predict, *start, batch.start, batch.steps, scheduler)
        x0[batch.indices] = last.cpu()
    counts = assignment.bincount(minlength=len(GROUPS)).tolist()
    return GroupSampled(merge(x0, grid), assignment, plan.evaluations(counts))
