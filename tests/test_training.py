"""Training: data, sample pools, resuming, farthest point sampling, and the stages from end to end."""

from __future__ import annotations

import argparse
import tarfile

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from patchscaler.loading import load_pipeline
from patchscaler.training import weights
from patchscaler.training.build_memory import farthest_points
from patchscaler.training.data import ImageBank, is_held_out
from patchscaler.training.fit import fit, learning_rate, make_accelerator, parser, pool_size, step_generator
from patchscaler.training.optimizer import MuonAdamW
from patchscaler.training.pairs import draw_pairs
from patchscaler.training.patch_dit import ANY_TIME, draw_times
from patchscaler.training.pool import Pool
from patchscaler.training.synthetic import draw_page


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of sixty textures in two classes, a few of which fall into the held-out split."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "texture").mkdir()
    rng = np.random.default_rng(0)
    for index in range(60):
        name = f"{('bubbly', 'woven')[index % 2]}_{index:04d}.png"
        pixels = rng.integers(0, 256, (40 + index, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "texture" / name)
    return folder


def options(out, **changes) -> argparse.Namespace:
    values = {"vae": None, "data": None, "out": out, "config": "compact", "minutes": 30.0, "steps": None, "batch": None}
    return argparse.Namespace(**{**values, "seed": 0, "device": "cpu", "dry_run": False, **changes})


def test_splits_are_disjoint_and_complete(images):
    training, held_out = ImageBank(images), ImageBank(images, held_out=True)
    assert len(training) + len(held_out) == 60
    assert all(is_held_out(name) for name in held_out.names) and held_out.names
    assert not any(is_held_out(name) for name in training.names)


def test_shards_give_the_same_images_as_the_folder(images, tmp_path):
    with tarfile.open(tmp_path / "train-00.tar", "w") as archive:
        archive.add(images / "texture", "texture")
    from_shard, from_folder = ImageBank(tmp_path), ImageBank(images)
    both = dict(zip(from_folder.names, from_folder.images, strict=True))
    assert sorted(from_shard.names) == sorted(both)
    assert all(torch.equal(both[n], image) for n, image in zip(from_shard.names, from_shard.images, strict=True))


def test_no_images_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training images"):
        ImageBank(tmp_path)


@pytest.mark.parametrize("size", [16, 64, 200])
def test_crops_have_their_size_and_range_also_above_the_image(images, size):
    crops, indices = ImageBank(images).crops(5, size, step_generator(0, 0))
    assert crops.shape == (5, 3, size, size) and indices.shape == (5,)
    assert crops.min() >= -1 and crops.max() <= 1 and crops.std() > 0.1


def test_crops_follow_their_generator(images):
    bank = ImageBank(images)
    first, again, other = (bank.crops(4, 32, step_generator(0, step))[0] for step in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_drawn_crops_replace_photographs_and_hold_ink_on_a_ground(images):
    bank = ImageBank(images)
    plain, _ = bank.crops(40, 32, step_generator(0, 0))
    mixed, _ = bank.crops(40, 32, step_generator(0, 0), drawn=0.5)
    changed = (mixed != plain).flatten(1).any(1)
    assert 8 < changed.sum() < 32 and mixed.abs().max() <= 1
    pages = [draw_page(64, seed) for seed in range(20)]
    assert all(page.shape == (64, 64, 3) and page.dtype == np.uint8 for page in pages)
    assert sum(int(np.ptp(page, axis=(0, 1)).max()) > 60 for page in pages) >= 17  # a page may come out empty
    assert np.array_equal(draw_page(64, 3), pages[3])


def test_times_stay_mostly_within_the_groups_start():
    start = torch.tensor([400, 1000]).repeat_interleave(4000)
    times = draw_times(start, 1000, step_generator(0, 0))
    assert times.min() >= 1 and times.max() <= 1000
    assert (times[:4000] > 400).float().mean() == pytest.approx(ANY_TIME * 0.6, abs=0.03)
    assert times[4000:].float().mean() == pytest.approx(500, abs=20)


def test_classes_come_from_the_names(images):
    bank = ImageBank(images)
    classes = bank.classes()
    assert list(classes) == ["bubbly", "woven"]
    assert all("woven_" in bank.names[index] for index in classes["woven"])


class Double(nn.Module):
    """Stands for an autoencoder: an eighth of the size, three channels."""

    dtype, config = torch.float32, argparse.Namespace(latents_mean=None)

    def encode(self, images):
        return argparse.Namespace(latents=nn.functional.avg_pool2d(images, 8))


def test_pairs_are_aligned_and_degraded(images):
    pairs = draw_pairs(Double(), ImageBank(images), 20, 64, step_generator(0, 0))
    assert pairs["y_lr"].shape == pairs["x_hr"].shape == (20, 3, 8, 8)
    assert pairs["images"].shape == (20, 3, 64, 64) and pairs["images"].dtype == torch.uint8
    matched = (pairs["y_lr"].float() - pairs["x_hr"].float()).square().mean()
    crossed = (pairs["y_lr"].float() - pairs["x_hr"].float().roll(1, 0)).square().mean()
    assert 0 < matched < crossed


def make_pool(**changes) -> Pool:
    def draw(count, generator):
        return {"x": torch.rand(count, generator=generator)}

    return Pool(draw, **{"size": 8, "passes": 2, "batch": 4, "chunk": 2, **changes})


def test_a_pool_uses_every_row_once_per_pass_and_is_then_drawn_anew():
    pool = make_pool()
    steps = [pool.samples(step)["x"] for step in range(6)]
    first, second, third = (torch.cat(steps[i : i + 2]).sort().values for i in (0, 2, 4))
    assert torch.equal(first, second) and not torch.equal(steps[0], steps[2])
    assert not torch.isin(third, first).any()


def test_a_pool_gives_a_step_the_same_rows_however_it_got_there():
    walked = make_pool()
    rows = [walked.samples(step)["x"] for step in range(7)]
    assert torch.equal(make_pool().samples(6)["x"], rows[6])


def test_a_pool_refuses_uneven_sizes():
    with pytest.raises(ValueError, match="pool of 9"):
        make_pool(size=9)


def test_short_budgets_get_small_pools(tmp_path):
    assert pool_size(options(tmp_path, minutes=0.5), 2048) == 128
    assert pool_size(options(tmp_path, minutes=30), 2048) == 2048


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(1.0, p / 100) for p in range(101)]
    assert max(rates) == pytest.approx(1.0, abs=0.02) and rates.index(max(rates)) == 3
    assert rates[0] < 0.1 and rates[-1] == pytest.approx(0.02)


def toy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1))


def toy_error(model, generator) -> torch.Tensor:
    x = torch.randn(16, 2, 4, 4, generator=generator)
    return (model(x) - x[:, :, 1:3, 1:3].sum((1, 2, 3)).unsqueeze(1)).square().mean()


def run_fit(out, steps) -> dict[str, torch.Tensor]:
    model = toy_model()

    def loss(model, step, progress):
        return {"loss": toy_error(model, step_generator(0, step))}

    args = options(out, steps=steps)
    return fit("toy", model, loss, args, make_accelerator(args), batch=16, peak_rate=1e-2).state_dict()


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    """Cut off after 12 of 30 steps by a fault, then resumed: the same average, bit by bit."""
    monkeypatch.setattr("patchscaler.training.fit.CHECKPOINT_SECONDS", 0)
    whole = run_fit(tmp_path / "whole", 30)

    monkeypatch.setattr("patchscaler.training.fit.learning_rate", _fails_after(12))
    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path / "cut", 30)
    monkeypatch.setattr("patchscaler.training.fit.learning_rate", learning_rate)
    resumed = run_fit(tmp_path / "cut", 30)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def _fails_after(steps):
    calls = iter(range(steps))

    def rate(peak, progress):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return learning_rate(peak, progress)

    return rate


def test_training_lowers_the_loss(tmp_path):
    model = toy_model()
    before = toy_error(model, step_generator(1, 0))
    model.load_state_dict(run_fit(tmp_path, 300))
    assert toy_error(model, step_generator(1, 0)) < 0.2 * before


def test_the_optimizer_refuses_kernels_that_it_could_not_update():
    with pytest.raises(ValueError, match="channels_last"):
        MuonAdamW(nn.Conv2d(2, 8, 3), 1e-3)


def test_farthest_points_against_brute_force():
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    chosen = farthest_points(points, 10).tolist()
    assert chosen[0] == 0 and len(set(chosen)) == 10
    for taken in range(1, 10):
        nearest = torch.cdist(points, points[chosen[:taken]]).min(1).values
        assert nearest[chosen[taken]] == pytest.approx(nearest.max().item(), rel=1e-5)


def test_farthest_points_stay_distinct_among_duplicates():
    assert sorted(farthest_points(torch.zeros(5, 2), 5).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="6 points wanted of 5"):
        farthest_points(torch.zeros(5, 2), 6)


def test_all_stages_leave_a_pipeline_that_upscales(images, tmp_path):
    arguments = ["--data", str(images), "--out", str(tmp_path), "--dry-run", "--device", "cpu"]
    weights.run(parser(weights.__doc__).parse_args(arguments))
    result = load_pipeline(tmp_path, device="cpu")(Image.new("RGB", (20, 12), "teal"))
    assert result.picture.rgb.shape == (3, 48, 80)
    assert "grm/config.json" in (tmp_path / "SHA256SUMS").read_text()
    card = (tmp_path / "README.md").read_text()
    assert f"{len(ImageBank(images))} training images" in card
    assert "| patch_dit |" in card and "top-1 on held-out crops" in card


def test_the_paper_configuration_builds_steps_and_saves_on_a_diffusers_autoencoder(images, tmp_path):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "given")
    arguments = ["--data", str(images), "--out", str(tmp_path / "out"), "--dry-run", "--device", "cpu"]
    arguments += ["--config", "paper", "--vae", str(tmp_path / "given")]
    weights.run(parser(weights.__doc__).parse_args(arguments))
    pipeline = load_pipeline(tmp_path / "out", device="cpu")
    assert type(pipeline.vae) is AutoencoderKL and pipeline.transformer.config.width == 768
