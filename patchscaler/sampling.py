"""Shortcut sampling: start part-way down the diffusion from the coarse patch, then predict x0 step by step (Eq. 4-7).

Functions over explicit inputs. Time t runs from 1 to 1000 and abar_t is `alphas[t - 1]`, as diffusers counts from 0.
A group is sampled from `start` in `steps` evaluations, 1 <= steps <= start <= 1000.
N patches, C channels, V patch side, L prompt tokens, D width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from patchscaler.device import Stopwatch, is_out_of_memory, out_of_memory, release
from patchscaler.models import PatchDiT
from patchscaler.plan import MAX_TIMESTEP, SamplingPlan

Scheduler = DDIMScheduler | DPMSolverMultistepScheduler
Predict = Callable[[Tensor, int], Tensor]  # (x_t N×C×V×V, t) -> x0 prediction N×C×V×V

_SHARED = {"prediction_type": "sample", "num_train_timesteps": MAX_TIMESTEP, "thresholding": False}
_DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}
REQUIRED = {
    DDIMScheduler: {**_SHARED, "clip_sample": False},
    DPMSolverMultistepScheduler: {**_SHARED, **_DPM, "use_flow_sigmas": False},
}


# The schedule


def alphas_cumprod(scheduler: Scheduler) -> Tensor:
    """abar_t for t = 1..1000, a float32 tensor of 1000 on the CPU; abar_t is element t - 1.

    ValueError for a scheduler that `denoise` cannot follow: it must be DDIM or DPM-Solver++ (2M), predict
    the sample, know 1000 timesteps, and neither clip nor threshold (latents are not bounded by 1).
    """
    required = REQUIRED.get(type(scheduler))
    if required is None:
        raise ValueError(f"{type(scheduler).__name__} is none of {[kind.__name__ for kind in REQUIRED]}")
    for name, value in required.items():
        if scheduler.config[name] != value:
            raise ValueError(f"the scheduler has {name}={scheduler.config[name]!r}, it must be {value!r}")
    return scheduler.alphas_cumprod.float().cpu()


def check_schedule(network: PatchDiT, scheduler: Scheduler) -> None:
    """ValueError unless the scheduler has the abar that Patch-DiT's filter holds, as it was trained with that.

    Differences of the size that the filter's rounding to bfloat16 or float16 makes are let pass.
    """
    ours, theirs = network.signal.float().cpu(), alphas_cumprod(scheduler).sqrt()
    excess = (ours - theirs).abs() - 2**-8 * theirs - 1e-3
    if (excess > 0).any():
        t = int(excess.argmax())
        config = scheduler.config
        betas = f"{config.beta_schedule} betas from {config.beta_start} to {config.beta_end}"
        raise ValueError(
            f"at t={t + 1} the scheduler ({betas}) has abar={theirs[t] ** 2:.4f}, and the schedule that Patch-DiT was "
            f"trained with has abar={ours[t] ** 2:.4f}"
        )


def timesteps(start: int, steps: int) -> list[int]:
    """The `steps` times at which the network is evaluated: strictly decreasing from `start`, all >= 1."""
    if not 1 <= steps <= start <= MAX_TIMESTEP:
        raise ValueError(f"steps={steps}, start={start}: needs 1 <= steps <= start <= {MAX_TIMESTEP}")
    return [round(start * (steps - k) / steps) for k in range(steps)]


def check_seed(seed: int) -> None:
    """ValueError unless a seed is one that is taken."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is outside 0..2^63-1")


def noise_generator(seed: int) -> torch.Generator:
    """What the noise is drawn with: on the CPU, to be the same for every device. ValueError as from `check_seed`."""
    check_seed(seed)
    return torch.Generator("cpu").manual_seed(seed)


# One batch


def noised(clean: Tensor, noise: Tensor, abar: float | Tensor) -> Tensor:
    """Eq. 4: sqrt(abar) x + sqrt(1 - abar) noise, N×C×V×V. `abar` is a number, or N×1×1×1 of patches at times each."""
    return abar**0.5 * clean + (1 - abar) ** 0.5 * noise


def shortcut_start(y0: Tensor, noise: Tensor, start: int, alphas: Tensor) -> Tensor:
    """Eq. 6 and 7: y_tau = sqrt(abar) y0 + sqrt(1 - abar) noise at tau = `start`. All N×C×V×V."""
    return noised(y0, noise, alphas[start - 1].item())


def denoise(
    predict: Predict, y0: Tensor, noise: Tensor, start: int, steps: int, scheduler: Scheduler
) -> Iterator[Tensor]:
    """Sample from the shortcut start: x_t after every evaluation, of which the last is the result, x0.

    The scheduler's class chooses the solver, its betas the schedule. It is read, never stepped, so threads may share
    it. Arithmetic between evaluations is float32 on the device of `y0`, whatever dtype `predict` returns.
    """
    alphas = alphas_cumprod(scheduler)
    times = timesteps(start, steps)
    solver = ddim if isinstance(scheduler, DDIMScheduler) else dpm_solver
    return solver(predict, shortcut_start(y0.float(), noise.float(), start, alphas), times, alphas)


def ddim(predict: Predict, x_t: Tensor, times: list[int], alphas: Tensor) -> Iterator[Tensor]:
    """Deterministic DDIM (Song et al. 2021) from x_t N×C×V×V at times[0] down `times`, and to x0 at the end.

    Ours, as diffusers' DDIM only steps by 1000 // N.
    """
    for t, s in zip(times, [*times[1:], 0]):
        x0 = predict(x_t, t).float()  # N×C×V×V
        x_t = x0 if s == 0 else ddim_step(x_t, x0, alphas[t - 1].item(), alphas[s - 1].item())
        yield x_t


def ddim_step(x_t: Tensor, x0: Tensor, abar_t: float | Tensor, abar_s: float | Tensor) -> Tensor:
    """x_s N×C×V×V, with the noise that x_t has if x0 is true. abar as for `noised`."""
    noise = (x_t - abar_t**0.5 * x0) / (1 - abar_t) ** 0.5
    return noised(x0, noise, abar_s)


def dpm_solver(predict: Predict, x_t: Tensor, times: list[int], alphas: Tensor) -> Iterator[Tensor]:
    """DPM-Solver++ (2M) (Lu et al. 2022, Algorithm 2) from x_t N×C×V×V at times[0] down `times`, and to x0.

    With h the step in lambda = log(sqrt(abar) / sqrt(1 - abar)), x0 is extrapolated through the prediction before,
    but not in the first step, which has none. In the last one h is infinite, and the result is the prediction.
    """
    before = h_before = None
    for t, s in zip(times, [*times[1:], 0]):
        x0 = predict(x_t, t).float()  # N×C×V×V
        if s == 0:
            x_t = x0
        else:
            abar_t, abar_s = alphas[t - 1].item(), alphas[s - 1].item()
            (signal_t, noise_t), (signal_s, noise_s) = ((abar**0.5, (1 - abar) ** 0.5) for abar in (abar_t, abar_s))
            h = math.log(signal_s / noise_s) - math.log(signal_t / noise_t)
            end = x0 if before is None else x0 + h / (2 * h_before) * (x0 - before)
            x_t = noise_s / noise_t * x_t - signal_s * math.expm1(-h) * end
            before, h_before = x0, h
        yield x_t


# Many patches


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches to be sampled, on any device, and where their x0 and the seconds that these took go."""

    y0: Tensor  # N×C×V×V
    noise: Tensor  # N×C×V×V
    prompt: Tensor  # N×L×D
    x0: Tensor  # N×C×V×V
    seconds: Tensor  # float32 N, on the CPU: each patch's share of the time of its batch


@dataclass(frozen=True, eq=False)
class Batch:
    """Patches of one group that are sampled together, from `start` in `steps` evaluations."""

    group: int
    start: int
    steps: int
    indices: Tensor  # LongTensor, on the CPU

    def __len__(self) -> int:
        return len(self.indices)

    def parts(self, count: int) -> list[Batch]:
        """Up to `count` batches of nearly equal size, none empty."""
        return [replace(self, indices=part) for part in self.indices.tensor_split(min(count, len(self)))]


@dataclass(frozen=True, eq=False)
class Step:
    """One evaluation of a batch is done."""

    batch: Batch
    step: int  # 1..steps; 0 where memory ran out and the batch is made again, in halves
    evaluations: int  # in patches; negative where those of a batch did not count


def make_batches(assignment: Tensor, plan: SamplingPlan, size: int, chosen: Tensor | None = None) -> list[Batch]:
    """Batches of up to `size` patches of one group each, from simple to hard.

    `assignment` is the group of each patch, a LongTensor N; `chosen` the patches to be sampled, a BoolTensor N.
    """
    batches = []
    for group, (start, steps) in enumerate(zip(plan.start, plan.steps)):
        members = assignment == group if chosen is None else (assignment == group) & chosen
        parts = members.nonzero()[:, 0].split(size)
        batches += [Batch(group, start, steps, part) for part in parts if len(part)]
    return batches


def sample_batches(network: PatchDiT, scheduler: Scheduler, patches: Patches, todo: deque[Batch]) -> Iterator[Step]:
    """Sample batches on the network's device until none is left in `todo`, and yield a Step after every evaluation.

    Other threads may empty `todo` as well. A batch for which memory is short is made again in halves; a single patch
    for which it is raises OutOfMemory.
    """
    device = network.device
    while todo:
        try:
            batch = todo.popleft()
        except IndexError:  # another thread was faster
            return
        done, clock = 0, Stopwatch(device)
        try:
            for done, x_t in enumerate(denoise_batch(network, scheduler, patches, batch), 1):
                if done == batch.steps:
                    patches.x0[batch.indices.to(patches.x0.device)] = x_t.to(patches.x0.device)
                patches.seconds[batch.indices] += clock.lap() / len(batch)
                yield Step(batch, done, len(batch))
                clock.lap()
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Not within `except`: there the error still holds what the batch had made.
        if len(batch) == 1:
            raise out_of_memory(device)
        release(device)
        todo.extendleft(reversed(batch.parts(2)))
        yield Step(batch, 0, -done * len(batch))


def denoise_batch(network: PatchDiT, scheduler: Scheduler, patches: Patches, batch: Batch) -> Iterator[Tensor]:
    """`denoise` the patches of a batch with f_theta, on the network's device."""
    device = network.device
    y0, noise, prompt = (
        values[batch.indices.to(values.device)].to(device) for values in (patches.y0, patches.noise, patches.prompt)
    )
    keys = network.prompt_keys(prompt)  # once, not per step

    def predict(x_t: Tensor, t: int) -> Tensor:
        # One time for all: besides being cheaper, its products then have the same shape in every batch,
        # without which float32 results of a patch would depend on the size of its batch (by 2e-6).
        return network(x_t, y0, torch.full((1,), t, device=device), keys)

    return denoise(predict, y0, noise, batch.start, batch.steps, scheduler)
