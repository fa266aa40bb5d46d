"""PGS around a tiny random Stable Diffusion UNet: a uniform plan must be diffusers' own DDIM."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from PIL import Image

from patchscaler.adapters import group_sample, unet_denoiser, x0_scheduler
from patchscaler.patches import PatchGrid, merge, split
from patchscaler.plan import SamplingPlan
from patchscaler.sampling import shortcut_start

ROOT = Path(__file__).parent.parent
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
UNIFORM = SamplingPlan.uniform()


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=8,
        ).eval()


@pytest.fixture(scope="module")
def prompt():
    return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))


def latents(height, width, seed=2):
    return torch.randn(4, height, width, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def plain_ddim(unet, prompt, kind, x_t, steps=20):
    """20 steps of diffusers' own sampler over whole latents 1×C×h×w."""
    scheduler = DDIMScheduler(**SD, prediction_type=kind, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x_t = scheduler.step(unet(x_t, t, prompt).sample, t, x_t).prev_sample
    return x_t


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_uniform_plan_is_the_plain_sampler(unet, prompt, kind):
    """One patch as large as the latent, every step: epsilon and v are turned into x0 and lose nothing."""
    theirs = DDIMScheduler(**SD, prediction_type=kind)
    scheduler = x0_scheduler(theirs)
    y0, confidence = latents(16, 16), torch.full((1, 16, 16), 0.9)
    denoiser = unet_denoiser(unet, theirs, encoder_hidden_states=prompt)
    result = group_sample(denoiser, y0, confidence, UNIFORM, scheduler, seed=4, size=16, stride=12)
    assert result.evaluations == 20 and result.assignment.tolist() == [1]

    noise = torch.randn(y0.shape, generator=torch.Generator().manual_seed(4))
    start = shortcut_start(y0, noise, 1000, scheduler.alphas_cumprod)[None]
    expected = plain_ddim(unet, prompt, kind, start)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(result.latents, expected, atol=2e-3, rtol=2e-3)


def test_patches_are_independent_and_blended(unet, prompt):
    """Uniform over several patches: the plain sampler on each alone, then blended; the batch does not matter."""
    theirs = DDIMScheduler(**SD, prediction_type="v_prediction")
    scheduler, denoiser = x0_scheduler(theirs), unet_denoiser(unet, theirs, encoder_hidden_states=prompt)
    y0, confidence = latents(16, 40), torch.rand(1, 16, 40, generator=torch.Generator().manual_seed(5))
    given = denoiser, y0, confidence, UNIFORM, scheduler, 4, 16, 12
    results = [group_sample(*given, batch_size=size).latents for size in (1, 3)]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)

    grid = PatchGrid(16, 40, 16, 12)
    noise = split(torch.randn(y0.shape, generator=torch.Generator().manual_seed(4)), grid)
    starts = shortcut_start(split(y0, grid), noise, 1000, scheduler.alphas_cumprod)
    alone = torch.cat([plain_ddim(unet, prompt, "v_prediction", start[None]) for start in starts])
    torch.testing.assert_close(results[0], merge(alone, grid), atol=2e-3, rtol=2e-3)


def test_groups_get_their_own_start_and_steps():
    """A denoiser that notes what it is asked: sky gets 8 evaluations from 400, the rest 20 from 1000."""
    asked: dict[int, list[int]] = {}

    def denoiser(x_t, t, indices):
        for index in indices.tolist():
            asked.setdefault(index, []).append(t)
        return x_t * 0

    confidence = torch.ones(1, 16, 40)
    confidence[..., 26:] = 0
    plan, scheduler = SamplingPlan.paper(), x0_scheduler(DDIMScheduler(**SD))
    result = group_sample(denoiser, latents(16, 40), confidence, plan, scheduler, size=16, stride=12)
    assert result.assignment.tolist() == [0, 1, 2]  # the middle patch has 2 of 16 columns unsure
    assert [asked[index] for index in range(3)] == [list(range(n, 0, -50)) for n in (400, 700, 1000)]
    assert result.evaluations == 8 + 14 + 20
    assert not result.latents.any()


@pytest.mark.parametrize("kind", [DDPMScheduler, PNDMScheduler, DPMSolverMultistepScheduler])
def test_any_schedule_of_a_thousand_steps_will_do(kind):
    betas = {name: SD[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    theirs = kind(**betas)
    assert torch.equal(x0_scheduler(theirs).alphas_cumprod, theirs.alphas_cumprod)


def test_what_cannot_be_sampled_is_refused(unet):
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        x0_scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="no alphas_cumprod of 1000"):
        x0_scheduler(DDIMScheduler(num_train_timesteps=500))
    theirs = DDIMScheduler(**SD, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="epsilon at t=1000"):
        unet_denoiser(unet, theirs, encoder_hidden_states=torch.zeros(1, 1, 8))(latents(8, 8)[None], 1000, None)
    theirs.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        unet_denoiser(unet, theirs)
    with pytest.raises(ValueError, match="smaller than a patch of 64"):
        group_sample(None, latents(16, 80), torch.ones(1, 16, 80), UNIFORM, x0_scheduler(theirs))


@pytest.mark.slow
def test_the_example_on_a_folder_of_a_tiny_model(unet, tiny_pipeline, tmp_path, capsys):
    """examples/pgs_diffusers.py from a Stable Diffusion folder to a picture, V = 64, with the time ratio."""
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    for name, part in {"unet": unet, "vae": vae, "scheduler": DDIMScheduler(**SD)}.items():
        part.save_pretrained(tmp_path / "model" / name)
    tiny_pipeline.save_pretrained(tmp_path / "weights")
    spec = importlib.util.spec_from_file_location("pgs_diffusers", ROOT / "examples" / "pgs_diffusers.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    image, out = ROOT / "examples" / "2-cat.png", tmp_path / "cat.png"  # 150×100: 75×50 cells, padded to 75×64
    options = ["--model", tmp_path / "model", "--weights", tmp_path / "weights", "--plan", "fast", "--device", "cpu"]
    example.main([str(value) for value in (image, "-o", out, *options)])
    with Image.open(out) as written:
        assert written.size == (600, 400)
    printed = capsys.readouterr().out
    assert "evaluations, PGS / unified" in printed and "seconds, PGS / unified" in printed
    assert "unified in StableSR's 2 tiles: 0." in printed  # 32 cells apart over 75×64
