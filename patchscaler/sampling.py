"""Shortcut sampling: start part-way down the diffusion from the coarse patch, then predict x0 step by step.

Samplers are functions over explicit inputs. Time t runs from 1 to 1000 and abar_t is ``alphas[t - 1]``, as
diffusers counts from 0. A schedule is any pair (start, steps) with 1 <= steps <= start <= 1000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from patchscaler.grouping import MAX_TIMESTEP

Scheduler = DDIMScheduler | DPMSolverMultistepScheduler
Predict = Callable[[Tensor, int], Tensor]  # (x_t NxCxVxV, t) -> x0 prediction NxCxVxV
Callback = Callable[[int, Tensor, Tensor], None]  # (step from 0, x0 prediction, x_next)

_SHARED = {"prediction_type": "sample", "num_train_timesteps": MAX_TIMESTEP, "thresholding": False}
REQUIRED = {
    DDIMScheduler: {**_SHARED, "clip_sample": False},
    DPMSolverMultistepScheduler: {**_SHARED, "algorithm_type": "dpmsolver++"},
}


def alphas_cumprod(scheduler: Scheduler) -> Tensor:
    """abar_t for t = 1..1000, a float64 tensor of 1000 on the CPU; abar_t is element t - 1.

    ValueError for a scheduler that :func:`sample` cannot follow: it must be DDIM or DPM-Solver++, predict
    the sample, know 1000 timesteps, and neither clip nor threshold (latents are not bounded by 1).
    """
    required = REQUIRED.get(type(scheduler))
    if required is None:
        raise ValueError(f"{type(scheduler).__name__} is none of {[kind.__name__ for kind in REQUIRED]}")
    for name, value in required.items():
        if scheduler.config[name] != value:
            raise ValueError(f"the scheduler has {name}={scheduler.config[name]!r}, it must be {value!r}")
    return scheduler.alphas_cumprod.double().cpu()


def timesteps(start: int, steps: int) -> list[int]:
    """The ``steps`` times at which the network is evaluated: strictly decreasing from ``start``, all >= 1."""
    if not 1 <= steps <= start <= MAX_TIMESTEP:
        raise ValueError(f"steps={steps}, start={start}: needs 1 <= steps <= start <= {MAX_TIMESTEP}")
    return [round(start * (steps - k) / steps) for k in range(steps)]


def shortcut_start(y0: Tensor, noise: Tensor, start: int, alphas: Tensor) -> Tensor:
    """Eq. 6 and 7: y_tau = sqrt(abar) y0 + sqrt(1 - abar) noise at tau = ``start``. All NxCxVxV."""
    abar = alphas[start - 1].item()
    return abar**0.5 * y0 + (1 - abar) ** 0.5 * noise


def denoise(
    predict: Predict, y0: Tensor, noise: Tensor, start: int, steps: int, scheduler: Scheduler
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step from 0, x0 prediction, x_next) after every evaluation; the last x_next is the prediction.

    ``scheduler`` is read, never stepped: each call follows a fresh copy, so threads may share it. Arithmetic
    between evaluations is float32 on the device of ``y0``, whatever dtype ``predict`` returns.
    """
    alphas = alphas_cumprod(scheduler)
    times = timesteps(start, steps)
    is_dpm = isinstance(scheduler, DPMSolverMultistepScheduler)
    step = _dpm_step(scheduler, times) if is_dpm else _ddim_step
    x_t = shortcut_start(y0.float(), noise.float(), start, alphas)  # NxCxVxV
    for k, t in enumerate(times):
        x0 = predict(x_t, t).float()  # NxCxVxV
        x_t = step(x_t, x0, t, times[k + 1], alphas) if k + 1 < steps else x0
        yield k, x0, x_t


def sample(
    predict: Predict,
    y0: Tensor,
    noise: Tensor,
    start: int,
    steps: int,
    scheduler: Scheduler,
    callback: Callback | None = None,
) -> Tensor:
    """Run :func:`denoise` to its end. ``y0``, ``noise`` and the returned x0 are NxCxVxV.

    ``callback(step, x0_prediction, x_next)`` is called after every evaluation and may raise to stop.
    """
    for k, x0, x_next in denoise(predict, y0, noise, start, steps, scheduler):
        if callback is not None:
            callback(k, x0, x_next)
    return x0


def _ddim_step(x_t: Tensor, x0: Tensor, t: int, s: int, alphas: Tensor) -> Tensor:
    """Deterministic DDIM from t to s < t. Ours, as diffusers' DDIM only steps by 1000 // N."""
    abar_t, abar_s = alphas[t - 1].item(), alphas[s - 1].item()
    noise = (x_t - abar_t**0.5 * x0) / (1 - abar_t) ** 0.5
    return abar_s**0.5 * x0 + (1 - abar_s) ** 0.5 * noise


def _dpm_step(scheduler: DPMSolverMultistepScheduler, times: list[int]) -> Callable[..., Tensor]:
    """The multistep solver on ``times``. It remembers earlier predictions, hence a copy per run."""
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
    solver.set_timesteps(timesteps=[t - 1 for t in times])

    def step(x_t: Tensor, x0: Tensor, t: int, s: int, alphas: Tensor) -> Tensor:
        return solver.step(x0, t - 1, x_t, return_dict=False)[0]

    return step
