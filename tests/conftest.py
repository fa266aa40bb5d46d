from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from command import QUICK
from diffusers import DDIMScheduler
from PIL import Image

from patchscaler.__main__ import main
from patchscaler.images import Picture, read_picture, write_png
from patchscaler.models import (
    GRM,
    CompactAutoencoder,
    PatchDiT,
    TextureClassifier,
    TextureEncoder,
    TextureMemory,
)
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.ui.run import Runner
from patchscaler.ui.state import dials_of


def make_tiny_pipeline(vae=None, channels: int = 4) -> PatchScalerPipeline:
    """Every component at its smallest, with random weights: fast, and no output is trivially zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {
            "vae": vae or CompactAutoencoder(channels, (16, 24), (1, 1), (1, 1)),
            "grm": GRM(channels, (16, 24), (1, 1, 1)),
            "transformer": PatchDiT(channels, width=32, depth=2, heads=2, prompt_width=16),
            "texture_classifier": TextureClassifier(channels, ("brick", "grass"), (8, 12, 16)),
            "texture_encoder": TextureEncoder(channels, patch=8, width=16, heads=2, top_k=3),
            "texture_memory": TextureMemory.from_patches(torch.randn(20, channels, 16, 16), torch.randn(20, 16)),
        }
        for model in models.values():
            for parameter in model.parameters():
                if not parameter.any():  # zero-initialised layers would hide what lies before them
                    torch.nn.init.normal_(parameter, std=0.1)
        scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
        models["transformer"].set_filter(scheduler.alphas_cumprod, torch.full((channels,), 0.5))
    pipeline = PatchScalerPipeline(**models, scheduler=scheduler)
    for model in models.values():
        model.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_pipeline() -> PatchScalerPipeline:
    """A random pipeline in float32 on the CPU. Shared: do not change it."""
    return make_tiny_pipeline()


@pytest.fixture(scope="session")
def weights(tiny_pipeline, tmp_path_factory) -> Path:
    """A pipeline folder of the tiny pipeline. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("weights")
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture() -> Picture:
    """64×80 of smooth colour on the left and noise on the right: nine different patches."""
    generator = torch.Generator().manual_seed(3)
    smooth = torch.linspace(-0.8, 0.8, 64)[None, :, None].expand(3, 64, 80)
    noise = torch.rand(3, 64, 80, generator=generator) - 0.5
    return Picture((smooth + noise * torch.linspace(-0.2, 1, 80).clamp(0)).clamp(-1, 1))


@pytest.fixture
def read(tmp_path):
    """`read_picture` of the bytes of a file."""

    def read_bytes(data: bytes, **options) -> Picture:
        path = tmp_path / "input"
        path.write_bytes(data)
        return read_picture(path, **options)

    return read_bytes


@pytest.fixture
def memory_for(monkeypatch):
    """`memory_for(n)`: Patch-DiT has memory for n patches at once. Gives the list of the sizes that are asked for."""
    forward = PatchDiT.forward

    def limit(most: int) -> list[int]:
        sizes = []

        def short(self, x_t, *args, **options):
            sizes.append(len(x_t))
            if len(x_t) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, x_t, *args, **options)

        monkeypatch.setattr(PatchDiT, "forward", short)
        return sizes

    return limit


@pytest.fixture
def no_collector():
    """Reference cycles stay alive, as on a server between two collections."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def upload_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))


@pytest.fixture(scope="session")
def plan(tiny_pipeline, picture):
    """A quick plan under which no group is empty, though random weights give nearly equal confidences."""
    confidence = tiny_pipeline.analyze(picture).patch_confidence.sort().values.tolist()
    return SamplingPlan(confidence[5], confidence[1], (100, 200, 300), (1, 2, 3))


@pytest.fixture(scope="session")
def dials(plan):
    """The nine dials of `plan`, seed 7."""
    return (*dials_of(plan), 7)


@pytest.fixture
def runner(tiny_pipeline, upload_folder):
    """The page's runs over random weights, with a folder of their own for results."""
    return Runner(tiny_pipeline)


@pytest.fixture
def image(picture, tmp_path):
    """An uploaded image as the page's events are given it."""
    return {"path": str(write_png(picture, tmp_path / "some picture.png"))}


@pytest.fixture
def upscale(weights, tmp_path):
    """Run the command on names inside tmp_path, writing to tmp_path/out."""

    def run(*names, options=()):
        paths = [str(tmp_path / name) for name in names]
        options = [str(option) for option in (*QUICK, *options)]
        out = str(tmp_path / "out")
        return main(["upscale", *paths, "-o", out, "--device", "cpu", "--weights", str(weights), *options])

    return run


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of sixty textures in two classes to train on, a few of which fall into the held-out split."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "texture").mkdir()
    rng = np.random.default_rng(0)
    for index in range(60):
        name = f"{('bubbly', 'woven')[index % 2]}_{index:04d}.png"
        pixels = rng.integers(0, 256, (40 + index, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "texture" / name)
    return folder
