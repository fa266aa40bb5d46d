"""What a pipeline is made of and given: autoencoders, schedulers, inputs, devices without float64."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from conftest import make_tiny_pipeline
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from patchscaler.adapters import group_sample
from patchscaler.images import ImageError, Picture, to_pil, write_png
from patchscaler.large import Bands
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.results import Result

PLAN = SamplingPlan(0.95, 0.75, start=(200, 500, 900), steps=(1, 2, 3))


def tiny_kl(**options):
    return AutoencoderKL(
        **options,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
    )


def tiny_taesd():
    return AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, latent_channels=4)


@pytest.mark.parametrize("make_vae", [tiny_kl, tiny_taesd])
def test_diffusers_autoencoders_in_the_vae_slot(make_vae):
    pipeline = make_tiny_pipeline(make_vae())
    first, again = (pipeline(Picture(torch.zeros(3, 20, 33)), PLAN) for _ in range(2))
    assert first.picture.rgb.shape == (3, 80, 132)
    assert torch.equal(first.picture.rgb, again.picture.rgb)


# What may be given


def test_inputs_and_seeds_of_call(tiny_pipeline, picture, tmp_path):
    small = Picture((picture.rgb[:, :20, :24] * 127.5 + 127.5).round() / 127.5 - 1)
    path = write_png(small, tmp_path / "small.png")
    expected = tiny_pipeline(small, PLAN).picture.rgb
    for image in (path, str(path), to_pil(small)):
        assert torch.equal(tiny_pipeline(image, PLAN, generator=0).picture.rgb, expected)
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    first, same = (tiny_pipeline(small, PLAN, generator) for generator in generators)
    second = tiny_pipeline(small, PLAN, generators[0])
    assert first.seed == same.seed != second.seed
    assert torch.equal(tiny_pipeline(small, PLAN, first.seed).picture.rgb, first.picture.rgb)
    with pytest.raises(ImageError):
        tiny_pipeline(tmp_path / "missing.png", PLAN)


def test_arrays_and_tensors_are_taken(tiny_pipeline, picture):
    rgb = (picture.rgb[:, :20, :24] * 127.5 + 127.5).round() / 127.5 - 1
    levels = (rgb * 127.5 + 127.5).round().byte().movedim(0, -1).numpy()
    expected = tiny_pipeline(Picture(rgb), PLAN).picture.rgb
    assert torch.equal(tiny_pipeline(rgb, PLAN).picture.rgb, expected)
    assert torch.equal(tiny_pipeline(rgb.double(), PLAN).picture.rgb, expected)
    assert torch.equal(tiny_pipeline(levels, PLAN).picture.rgb, expected)
    assert torch.equal(tiny_pipeline(levels[:, ::-1], PLAN).picture.rgb, tiny_pipeline(rgb.flip(-1), PLAN).picture.rgb)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 5, 3), np.float32), "an array 4×5×3 of float32"),
        (np.zeros((4, 5, 4), np.uint8), "an array 4×5×4 of uint8"),
        (np.zeros((4, 5), np.uint8), "an array 4×5 of uint8"),
        (np.zeros((0, 5, 3), np.uint8), "an array 0×5×3 of uint8"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), "a tensor 3×4×5 of uint8"),
        (torch.zeros(1, 3, 4, 5), "a tensor 1×3×4×5 of float32"),
        (torch.full((3, 4, 5), 255.0), "a tensor 3×4×5 of float32 from 255 to 255"),
        (torch.full((3, 4, 5), float("nan")), "a tensor 3×4×5 of float32 from nan to nan"),
        (b"bytes", "bytes"),
        (None, "NoneType"),
    ],
)
def test_anything_else_is_refused_with_what_is_taken(tiny_pipeline, image, said):
    with pytest.raises(TypeError, match=re.escape(said) + "; it must be .*H×W×3 of uint8.*3×H×W in"):
        tiny_pipeline(image)


def test_a_schedule_that_patch_dit_was_not_trained_with_is_refused(tiny_pipeline):
    """Both are named, here by abar at the time where they differ most; precision does not matter."""
    components = dict(tiny_pipeline.components)
    scaled = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample", clip_sample=False
    )
    said = r"at t=\d+ the scheduler \(scaled_linear betas from 0.00085 to 0.012\) has abar=0\.\d+, .* abar=0\.\d+"
    with pytest.raises(ValueError, match=said):
        PatchScalerPipeline(**{**components, "scheduler": scaled})
    with pytest.raises(ValueError, match="linear betas from 0.0001 to 0.021"):
        other = DDIMScheduler(beta_end=0.021, prediction_type="sample", clip_sample=False)
        PatchScalerPipeline(**{**components, "scheduler": other})
    for dtype in (torch.bfloat16, torch.float16):
        network = copy.deepcopy(tiny_pipeline.transformer).to(dtype)
        PatchScalerPipeline(**{**components, "transformer": network})
        with pytest.raises(ValueError, match=said):
            PatchScalerPipeline(**{**components, "transformer": network, "scheduler": scaled})
    swapped = make_tiny_pipeline()
    swapped.scheduler = scaled
    with pytest.raises(ValueError, match=said):
        swapped(Picture(torch.zeros(3, 8, 8)), PLAN)


# Devices that have less


class NoFloat64(TorchDispatchMode):
    """Fails on the first float64 tensor that an operation makes, as a device without it would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            assert not (isinstance(each, Tensor) and each.dtype == torch.float64), f"{func} makes float64"
        return made


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_nothing_is_float64(picture, plan, scheduler):
    """MPS has none."""
    pipeline = make_tiny_pipeline()
    pipeline.register_modules(scheduler=scheduler.from_config(pipeline.scheduler.config))
    with NoFloat64():
        analysis = pipeline.analyze(picture)
        events = pipeline.refine(analysis.restored(), plan, partial=True, by_hand={0: 0})
        assert isinstance([*events][-1], Result)
        pipeline.prior_images(analysis.priors.indices[0])
        given = analysis.latents, analysis.confidence, plan, pipeline.scheduler
        group_sample(lambda x_t, t, _: x_t, *given, size=16, stride=12)


def test_a_large_picture_through_autoencoder_kl_is_tiled():
    """1024×1024 out: no layer is given more than a tile of 256×256, and so no memory beyond that is needed."""
    vae = tiny_kl(sample_size=256)
    pipeline = make_tiny_pipeline(vae)
    largest = {"encoder": 0, "decoder": 0}
    for name in largest:
        for module in getattr(vae, name).modules():
            module.register_forward_hook(
                lambda _, inputs, out, name=name: largest.update(
                    {name: max(largest[name], *(each.numel() for each in (*inputs, out) if isinstance(each, Tensor)))}
                )
            )
    picture = Picture(torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0)) - 0.5)
    result = pipeline(picture, SamplingPlan(0.95, 0.75, start=(1, 1, 1), steps=(1, 1, 1)))
    assert result.picture.rgb.shape == (3, 1024, 1024) and result.picture.rgb.isfinite().all()
    assert 0 < max(largest.values()) <= 8 * 256 * 256  # eight channels at most
    with pytest.raises(ValueError, match="AutoencoderKL sees the whole picture"):
        next(iter(Bands(pipeline, picture, PLAN)))
