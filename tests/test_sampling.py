from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from patchscaler.sampling import alphas_cumprod, denoise, shortcut_start, timesteps

PAIRS = [(1, 1), (2, 1), (2, 2), (7, 7), (7, 3), (400, 8), (700, 14), (1000, 20), (1000, 1), (999, 31)]


def ddim(**options):
    return DDIMScheduler(prediction_type="sample", clip_sample=False, **options)


def dpm(**options):
    return DPMSolverMultistepScheduler(prediction_type="sample", **options)


def noised(x0, noise, t, scheduler):
    """Eq. 4, by diffusers' own schedule."""
    abar = scheduler.alphas_cumprod[t - 1]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def sample(*args):
    *_, x0 = denoise(*args)
    return x0


def draws(n=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, 16, 16, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(("start", "steps"), [*PAIRS, (1000, 1000)])
def test_timesteps_fall_strictly_from_start(start, steps):
    times = timesteps(start, steps)
    assert len(times) == steps
    assert times[0] == start and times[-1] >= 1
    assert times == sorted(set(times), reverse=True)


def test_timesteps_exhaustively_for_small_starts():
    for start in range(1, 60):
        for steps in range(1, start + 1):
            times = timesteps(start, steps)
            assert times == sorted(set(times), reverse=True) and len(times) == steps and min(times) >= 1


def test_paper_groups_share_one_grid():
    hard = timesteps(1000, 20)
    assert timesteps(400, 8) == hard[-8:] and timesteps(700, 14) == hard[-14:]


@pytest.mark.parametrize(("start", "steps"), [(0, 0), (10, 0), (10, 11), (10, -1), (1001, 10)])
def test_timesteps_refuses(start, steps):
    with pytest.raises(ValueError, match=f"steps={steps}, start={start}"):
        timesteps(start, steps)


def test_shortcut_start_is_eq6():
    y0, noise, _ = draws()
    alphas = torch.linspace(0.9999, 0.0001, 1000, dtype=torch.float64)
    expected = alphas[399].sqrt() * y0.double() + (1 - alphas[399]).sqrt() * noise.double()
    torch.testing.assert_close(shortcut_start(y0, noise, 400, alphas), expected.float())


@pytest.mark.parametrize(("start", "steps"), PAIRS)
@pytest.mark.parametrize(
    "scheduler",
    [ddim(), ddim(beta_schedule="scaled_linear"), dpm(), dpm(beta_schedule="scaled_linear")],
    ids=["ddim", "ddim-scaled", "dpm", "dpm-scaled"],
)
def test_oracle_keeps_every_intermediate_on_the_path(scheduler, start, steps):
    """With the true x0 predicted and y0 = x0, x_t = sqrt(abar) x0 + sqrt(1 - abar) noise at every t."""
    x0, noise, _ = draws()
    asked = []

    def oracle(x_t, t):
        torch.testing.assert_close(x_t, noised(x0, noise, t, scheduler), atol=2e-4, rtol=1e-4)
        asked.append(t)
        return x0

    result = sample(oracle, x0, noise, start, steps, scheduler)
    assert asked == timesteps(start, steps)
    assert torch.equal(result, x0)


def test_ddim_from_a_coarse_start_keeps_the_implied_noise():
    """From y0 != x0 the first step sees another noise; DDIM then keeps exactly that one."""
    x0, noise, y0 = draws()
    scheduler = ddim()
    abar = scheduler.alphas_cumprod[699].item()
    implied = (noised(y0, noise, 700, scheduler) - abar**0.5 * x0) / (1 - abar) ** 0.5
    times = timesteps(700, 14)
    *states, last = denoise(lambda x_t, t: x0, y0, noise, 700, 14, scheduler)
    assert torch.equal(last, x0)
    for t, x_t in zip(times[1:], states, strict=True):
        torch.testing.assert_close(x_t, noised(x0, implied, t, scheduler), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("start", "steps"), [(1, 1), (2, 2), (7, 7), (400, 8), (700, 14), (1000, 20), (999, 31)])
@pytest.mark.parametrize("betas", [{}, {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}])
def test_dpm_solver_is_diffusers_at_every_step(start, steps, betas):
    y0, noise, _ = draws()
    scheduler, theirs = dpm(**betas), dpm(**betas)
    times = timesteps(start, steps)
    theirs.set_timesteps(timesteps=[t - 1 for t in times])
    x_t = noised(y0, noise, start, theirs)

    def predict(x_t, t):
        return torch.tanh(x_t) * (1 - t / 2000) + t / 5000

    for t, ours in zip(times, denoise(predict, y0, noise, start, steps, scheduler), strict=True):
        x_t = theirs.step(predict(x_t, t), t - 1, x_t, return_dict=False)[0]
        torch.testing.assert_close(ours, x_t, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [ddim(), dpm()], ids=["ddim", "dpm"])
def test_one_step_is_one_evaluation_at_t(scheduler):
    y0, noise, _ = draws()
    asked = []

    def predict(x_t, t):
        asked.append(t)
        torch.testing.assert_close(x_t, noised(y0, noise, 700, scheduler))
        return x_t + 1

    (result,) = denoise(predict, y0, noise, 700, 1, scheduler)
    assert asked == [700]
    torch.testing.assert_close(result, noised(y0, noise, 700, scheduler) + 1)


def test_the_second_order_is_the_better_solver():
    """For x0 ~ N(0, 0.25) the ideal prediction is linear, and exactly x_t keeps its size in deviations."""
    noise = draws()[1]
    prior = 0.25

    def spread(t, alphas):
        return (alphas[t - 1] * prior + 1 - alphas[t - 1]).sqrt().item()

    errors = {}
    for name, scheduler in {"ddim": ddim(), "dpm": dpm()}.items():
        alphas = scheduler.alphas_cumprod

        def ideal(x_t, t, alphas=alphas):
            return x_t * (alphas[t - 1].sqrt() * prior / spread(t, alphas) ** 2).item()

        start, steps, zero = 900, 12, torch.zeros_like(noise)
        states = [*denoise(ideal, zero, noise, start, steps, scheduler)]
        t = timesteps(start, steps)[-1]
        begin = noise * (1 - alphas[start - 1]).sqrt()
        errors[name] = (states[-2] - begin * spread(t, alphas) / spread(start, alphas)).abs().max().item()
    assert errors["dpm"] < 0.5 * errors["ddim"]


@pytest.mark.parametrize("scheduler", [ddim(), dpm()], ids=["ddim", "dpm"])
def test_batches_runs_and_interleaving_do_not_matter(scheduler):
    y0, noise, _ = draws(4)

    def predict(x_t, t):
        return torch.tanh(x_t) * (1 - t / 2000)

    whole = sample(predict, y0, noise, 500, 9, scheduler)
    assert torch.equal(whole, sample(predict, y0, noise, 500, 9, scheduler))
    runs = [denoise(predict, y0[i : i + 1], noise[i : i + 1], 500, 9, scheduler) for i in range(4)]
    *_, last = zip(*runs, strict=True)
    assert torch.equal(whole, torch.cat(last))


def test_half_precision_predictions_do_not_lower_the_state():
    y0, noise, _ = draws()
    for scheduler in (ddim(), dpm()):
        for x_t in denoise(lambda x, t: x.bfloat16(), y0, noise, 100, 4, scheduler):
            assert x_t.dtype == torch.float32


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(prediction_type="sample"), "DDPMScheduler"),
        (DDIMScheduler(clip_sample=False), "prediction_type='epsilon'"),
        (DDIMScheduler(prediction_type="sample"), "clip_sample=True"),
        (ddim(num_train_timesteps=500), "num_train_timesteps=500"),
        (ddim(thresholding=True), "thresholding=True"),
        (dpm(algorithm_type="sde-dpmsolver++"), "algorithm_type='sde-dpmsolver"),
        (dpm(solver_order=3), "solver_order=3"),
        (dpm(solver_type="heun"), "solver_type='heun'"),
    ],
)
def test_unfit_schedulers_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        alphas_cumprod(scheduler)
