"""Shortcut sampling: start part-way down the diffusion from the coarse patch, then predict x0 step by step.

Samplers are functions over explicit inputs. Time t runs from 1 to 1000 and abar_t is ``alphas[t - 1]``, as
diffusers counts from 0. A schedule is any pair (start, steps) with 1 <= steps <= start <= 1000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
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
    path = _Path(scheduler, start, steps)
    x_t = path.start(y0, noise)  # NxCxVxV
    for k, t in enumerate(path.times):
        x0 = predict(x_t, t).float()  # NxCxVxV
        x_t = path.step(k, x_t, x0)
        yield k, x0, x_t


def nested(schedules: Sequence[tuple[int, int]]) -> bool:
    """Whether the times of each (start, steps) are the last ones of the schedule before it."""
    grids = [timesteps(*schedule) for schedule in schedules]
    return all(later == grid[-len(later) :] for grid, later in zip(grids, grids[1:]))


def denoise_together(
    predict: Predict,
    y0: Tensor,
    noise: Tensor,
    counts: Sequence[int],
    schedules: Sequence[tuple[int, int]],
    scheduler: Scheduler,
) -> Iterator[tuple[Tensor, ...]]:
    """Groups on one grid of times as one batch, which grows when the next group's time has come.

    Yield the x0 predictions of the groups under way after every evaluation. Those of a group are bit by bit what
    `denoise` gives for it alone, if ``predict`` treats patches alone. Raises ValueError for schedules that are not
    `nested`.

    Args:
        y0, noise: NxCxVxV, the patches of the first group first.
        counts: patches of each group; their sum is N.
        schedules: (start, steps) of each group. ``predict`` is given the first patches, up to those under way.
    """
    if not nested(schedules):
        raise ValueError(f"the schedules {list(schedules)} do not share one grid of times")
    paths = [_Path(scheduler, *schedule) for schedule in schedules]
    parts = list(zip(y0.split(list(counts)), noise.split(list(counts)), strict=True))
    states: list[Tensor] = []  # x_t of the groups under way
    for k, t in enumerate(paths[0].times):
        for path, part in zip(paths[len(states) :], parts[len(states) :]):
            if path.times[0] == t:
                states.append(path.start(*part))
        x_t = states[0] if len(states) == 1 else torch.cat(states)
        predictions = predict(x_t, t).float().split(list(counts[: len(states)]))
        late = [len(paths[0].times) - len(path.times) for path in paths]  # steps before a group's first
        states = [path.step(k - wait, *pair) for path, wait, *pair in zip(paths, late, states, predictions)]
        yield predictions


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


class _Path:
    """One schedule on its way from x_start to x0: what is added at its start, and what each step does."""

    def __init__(self, scheduler: Scheduler, start: int, steps: int):
        self.alphas = alphas_cumprod(scheduler)
        self.times = timesteps(start, steps)
        is_dpm = isinstance(scheduler, DPMSolverMultistepScheduler)
        self._solve = _dpm_step(scheduler, self.times) if is_dpm else _ddim_step

    def start(self, y0: Tensor, noise: Tensor) -> Tensor:
        return shortcut_start(y0.float(), noise.float(), self.times[0], self.alphas)

    def step(self, k: int, x_t: Tensor, x0: Tensor) -> Tensor:
        """x at the time after step ``k``; after the last one that is x0."""
        if k + 1 == len(self.times):
            return x0
        return self._solve(x_t, x0, self.times[k], self.times[k + 1], self.alphas)


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
