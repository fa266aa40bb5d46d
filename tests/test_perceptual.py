"""What decoded images are trained on: features against the package's own, what the views show, and the noise."""

from __future__ import annotations

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from skimage import data
from torch.nn import functional as F

from patchscaler.training.fit import bf16, step_generator
from patchscaler.training.perceptual import FILES, Features, PictureLoss, cover, feature_distance, masked_error, views

NAMES = ("efficientnet-lite0", "efficientnet-lite1")


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Four crops of 128×128 of a photograph, in [-1, 1]."""
    photo = torch.from_numpy(data.astronaut()[:256, :256].copy()).permute(2, 0, 1) / 127.5 - 1
    return photo.unfold(1, 128, 128).unfold(2, 128, 128).permute(1, 2, 0, 3, 4).reshape(-1, 3, 128, 128)


@pytest.fixture(scope="module")
def networks() -> dict[str, Features]:
    return {name: Features(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_stem_and_the_last_block_at_each_stride(networks, photos, name):
    found = networks[name](photos)
    assert [feature.shape[1] for feature in found] == [32, 16, 24, 40, 112, 192]
    assert [128 // feature.shape[-1] for feature in found] == [2, 2, 4, 8, 16, 32]
    package = EfficientNet.from_name(name).eval()  # unfolded
    package.load_state_dict(torch.load(FILES[name], weights_only=True))
    with torch.no_grad():
        expected = [F.relu6(package._bn0(package._conv_stem(photos)))]
        by_size = {}
        x = expected[0]
        for block in package._blocks[:-1]:  # the last widens for the head
            x = block(x)
            by_size[x.shape[-1]] = x  # the last of each size stays
    expected += [by_size[size] for size in (64, 32, 16, 8, 4)]
    assert all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_distance_is_0_for_equal_images_and_grows_with_blur(networks, photos, name):
    truth = networks[name](photos)
    assert feature_distance(truth, truth).tolist() == [0, 0, 0, 0]
    shrunk = [F.interpolate(photos, scale_factor=1 / n, mode="area") for n in (2, 4, 8)]
    soft = [F.interpolate(small, size=128, mode="bicubic") for small in shrunk]
    distances = torch.stack([feature_distance(networks[name](each), truth) for each in soft])  # 3×4
    assert (distances[0] > 0.01).all() and (distances[1:] > 1.1 * distances[:-1]).all() and distances.max() < 4


def test_views_show_the_same_part_of_both_at_every_place_turn_and_size():
    size, places = 128, torch.arange(128.0)
    ramps = torch.stack([places.expand(size, size), places.expand(size, size).T, torch.zeros(size, size)])[None]  # x, y
    sizes, corners, turns = [], set(), set()
    for step in range(400):
        first, second = views([ramps, 2 * ramps + 1], step_generator(0, step))
        assert torch.allclose(second, 2 * first + 1, atol=1e-4) and first.shape[-1] in (124, 144)
        x, y = first[0, :2]
        sizes.append(round((x.max() - x.min()).item()) + 1)
        corners.add((int(x.min()) % 8, int(y.min()) % 8))  # against a mesh of 8 pixels
        turns.add((*(x[0, 0] - x[[0, -1], [-1, 0]]).sign().tolist(), *(y[0, 0] - y[[0, -1], [-1, 0]]).sign().tolist()))
    shares = [sizes.count(side) / len(sizes) for side in (124, 96, 72)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.07)
    assert len(turns) == 8 and len(corners) > 50


def test_both_networks_take_turns_and_only_the_images_have_a_gradient(networks, photos):
    loss = PictureLoss()
    images = F.avg_pool2d(photos, 5, stride=1, padding=2).requires_grad_()
    values = [loss(images, photos, step, step_generator(0, 7)) for step in range(3)]
    assert values[0]["features"] == values[2]["features"] != values[1]["features"]
    for value, name in zip(values, NAMES):
        generator = step_generator(0, 7)
        noise = cover(photos, generator)
        with bf16(photos.device):
            seen = [networks[name](each) for each in views([images + noise, photos + noise], generator)]
        assert value["features"].item() == pytest.approx(feature_distance(*seen).mean().item(), rel=1e-3)
        assert value["pixels"] == masked_error(images, photos)
    values[0]["features"].backward()
    assert images.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_noise_of_a_drawn_strength_covers_each_image():
    noise = cover(torch.zeros(300, 3, 16, 16), step_generator(0, 0))
    deviations = noise.flatten(1).std(1)
    assert [deviations.min(), deviations.max()] == pytest.approx([0.4 * 0.06, 1.6 * 0.06], rel=0.1)
    assert deviations.mean() == pytest.approx(0.06, rel=0.05) and abs(noise.mean()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_below_the_noise_costs_next_to_nothing_and_one_above_it_does(networks, name):
    flat, generator = torch.full((2, 3, 128, 128), 0.2), step_generator(0, 0)
    mesh = torch.cos(torch.pi / 4 * torch.arange(128.0))  # of 8 pixels
    noise = 0.06 * torch.randn(flat.shape, generator=generator)

    def distance(strength, noise):
        shown = [flat + strength * mesh + noise, flat + noise]
        return feature_distance(*[networks[name](each) for each in shown]).mean().item()

    assert distance(0.01, noise) < 0.2 * distance(0.01, 0 * noise)
    assert distance(0.2, noise) > 5 * distance(0.01, noise)


def test_errors_count_most_where_nothing_masks_them():
    truth = torch.zeros(2, 3, 32, 64)
    truth[..., 32:] = 0.2 * torch.randn(2, 3, 32, 32, generator=step_generator(0, 0)).sign()  # contrast 0.2
    error = torch.full_like(truth, 0.1)
    assert masked_error(truth + error, truth).item() == pytest.approx(0.1)
    flat, textured = error.clone(), error.clone()
    flat[..., 32:], textured[..., :32] = 0, 0
    assert masked_error(truth - flat, truth) > 5 * masked_error(truth - textured, truth) > 0
