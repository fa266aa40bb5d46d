"""What training draws from: images in their parts, crops, pairs, and pools of samples."""

from __future__ import annotations

import argparse
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from patchscaler.training.data import ImageBank, part_of
from patchscaler.training.fit import step_generator
from patchscaler.training.pairs import draw_pairs
from patchscaler.training.pool import Pool
from patchscaler.training.synthetic import draw_page
from patchscaler.training.texture_classifier import labelled_latents


def test_parts_are_disjoint_and_complete(images):
    parts = [ImageBank(images, part=part).names for part in ("training", "memory", "held-out")]
    assert sorted(sum(parts, [])) == sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    assert [len(names) for names in parts] == [48, 7, 5]
    with pytest.raises(ValueError, match="part 'test': expected one of training, memory, held-out"):
        ImageBank(images, part="test")


def test_a_name_alone_decides_the_part_on_every_machine():
    # crc32: 3604693795, 507235411, 2376479100
    assert [part_of(f"any/{name}.png") for name in ("brick_0", "brick_5", "woven_0019")] == [
        "training", "memory", "held-out"
    ]  # fmt: skip
    parts = [part_of(f"{index}.jpg") for index in range(20_000)]
    shares = [parts.count(part) / len(parts) for part in ("held-out", "memory", "training")]
    assert shares == pytest.approx([0.05, 0.095, 0.855], abs=0.005)


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


@pytest.mark.parametrize(("zoom", "smaller"), [(1.0, 0), (1.5, 0.25), (2.0, 0.375)])
def test_the_share_of_crops_from_smaller_copies(tmp_path, zoom, smaller):
    ramp = np.tile(np.linspace(0, 255, 256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    crops, _ = ImageBank(tmp_path).crops(2000, 64, step_generator(0, 0), zoom=zoom)
    spans = (crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))) * 127.5  # 63 levels at the image's own size
    assert (spans > 70).float().mean() == pytest.approx(smaller, abs=0.03)


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


def test_crops_for_the_classifier_are_of_the_classes_that_there_are(tiny_pipeline, images):
    """The part held out may lack most classes; labels stay places among all of them."""
    bank = ImageBank(images)
    classes = dict.fromkeys(("bark", "bubbly", "canvas", "fabric", "gravel", "leather", "sand", "wood", "woven"))
    rows = labelled_latents(tiny_pipeline.vae, bank, classes, 32, step_generator(0, 0), augmented=False)
    assert rows["latents"].shape == (32, 4, 16, 16)
    assert set(rows["labels"].tolist()) == {1, 8}
