"""The weights in the repository: what they promise, on the pictures in `examples/`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patchscaler import Picture, SamplingPlan, load_pipeline, read_picture, write_png
from patchscaler.color import wavelet_color_fix
from patchscaler.evaluation.metrics import to_8bit
from patchscaler.evaluation.scores import find_scorer
from patchscaler.images import bicubic
from patchscaler.patches import split
from patchscaler.plan import GROUPS

pytestmark = pytest.mark.slow  # whole pictures with the repository's weights

EXAMPLES = Path(__file__).parent.parent / "examples"
ONE_STEP = SamplingPlan(0.95, 0.75, start=(400, 700, 1000), steps=(1, 1, 1))


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(device="cpu")


@pytest.fixture(scope="module")
def cat():
    picture = read_picture(EXAMPLES / "2-cat.png")
    return Picture(picture.rgb[:, :72, 10:90])


def levels(image: torch.Tensor) -> torch.Tensor:
    """[-1, 1] as the 8-bit levels of a file."""
    return image.add(1).mul(127.5).round()


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (130, 97), (512, 512)])
def test_any_size_comes_out_four_times_as_large(pipeline, size):
    generator = torch.Generator().manual_seed(0)
    picture = Picture(bicubic(torch.rand(1, 3, -(-size[0] // 4), -(-size[1] // 4), generator=generator) - 0.5, 4)[0])
    picture = Picture(picture.rgb[:, : size[0], : size[1]])
    result = pipeline(picture, ONE_STEP)
    assert result.picture.rgb.shape == (3, 4 * size[0], 4 * size[1])
    assert result.picture.rgb.isfinite().all()


def test_the_same_seed_writes_the_same_file_twice(pipeline, cat, tmp_path):
    files = [write_png(pipeline(cat, SamplingPlan.fast(), 7).picture, tmp_path / f"{i}.png") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = pipeline(cat, SamplingPlan.fast(), 8).picture
    assert not torch.equal(levels(other.rgb), levels(read_picture(files[0]).rgb))


def test_no_patch_runs_away_in_many_steps(pipeline):
    """A network that takes noise for texture confirms that at every further step, until the patch is grain."""
    analysis = pipeline.analyze(EXAMPLES / "2-cat.png")
    y0 = split(analysis.latents, analysis.grid)
    for seed in range(4):
        one, many = (
            ([*pipeline.refine(analysis, plan, seed)][-1].sampled.patches - y0).square().mean((1, 2, 3)).sqrt()  # N
            for plan in (SamplingPlan.fast(), SamplingPlan.uniform())
        )
        assert (many < 2 * one + 0.05).all()


def test_the_patch_batch_changes_no_pixel_by_more_than_one_level(pipeline, cat):
    whole, *others = (levels(pipeline(cat, SamplingPlan.fast(), 0, batch).picture.rgb) for batch in (64, 7, 1))
    assert all((other - whole).abs().max() <= 1 for other in others)


def test_the_final_image_tends_to_the_coarse_one_as_t_falls(pipeline, cat):
    """Eq. 7 at small T is y0 and hardly any noise; each group of the paper's plan changes more than a start at T 50."""
    analysis, paper = pipeline.analyze(cat), SamplingPlan.paper()
    distances = []  # root mean square, in levels of 8 bits
    for start, steps in ((1, 1), (10, 1), (50, 1), *zip(paper.start, paper.steps)):
        plan = SamplingPlan(0.95, 0.75, start=(start,) * 3, steps=(steps,) * 3)
        *_, result = pipeline.refine(analysis, plan, color_fix=False)
        distances.append(127.5 * (result.picture.rgb - analysis.coarse).square().mean().sqrt().item())
    first, second, third, *groups = distances
    assert first < 0.5 and first < second < third < min(groups), distances


@pytest.mark.parametrize("plan", [SamplingPlan.paper(), SamplingPlan.uniform()], ids=["paper", "uniform"])
def test_a_smooth_gradient_has_no_seam(pipeline, plan):
    """The largest step between neighbouring pixels across a patch's border is not above that elsewhere."""
    ramp = torch.linspace(-0.8, 0.8, 128)
    picture = Picture(torch.stack([ramp.expand(128, 128), ramp[:, None].expand(128, 128), -ramp.expand(128, 128)]))
    result = pipeline(picture, plan)
    grid = pipeline.analyze(picture).grid
    borders = sorted({8 * edge for patch in grid.patches for edge in (patch.left, patch.left + patch.size)} - {0, 512})
    luma = result.picture.rgb.mean(0)
    for steps in (luma.diff(dim=1).abs(), luma.diff(dim=0).abs().T):
        across = torch.zeros(511, dtype=torch.bool)
        across[[border - 1 for border in borders]] = True
        assert steps[:, across].max() <= steps[:, ~across].max()


def test_every_group_is_used_by_the_examples(pipeline):
    plan, counts = SamplingPlan.paper(), torch.zeros(len(GROUPS))
    for path in sorted(EXAMPLES.glob("*.png")):
        confidence = pipeline.analyze(read_picture(path)).patch_confidence
        simple, hard = (confidence > plan.gamma1).sum(), (confidence <= plan.gamma2).sum()
        counts += torch.stack([simple, len(confidence) - simple - hard, hard])
    assert (counts / counts.sum() >= 0.05).all(), counts


def test_the_pictures_are_better_than_bicubic(pipeline):
    """Examples shrunk to a quarter and brought back, by the measures that lead the tables; bicubic itself fails."""
    scorer = find_scorer(torch.device("cpu"), ("feature_distance", "haarpsi"))
    totals = {"bicubic": torch.zeros(2), "coarse": torch.zeros(2), "final": torch.zeros(2)}
    for name in ("1-astronaut", "2-cat", "4-rocket", "8-bicycle"):
        truth = read_picture(EXAMPLES / f"{name}.png").rgb
        truth = truth[:, : truth.shape[1] // 4 * 4, : truth.shape[2] // 4 * 4]
        analysis = pipeline.analyze(Picture(to_8bit(bicubic(truth[None], 0.25)[0])))
        *_, result = pipeline.refine(analysis, SamplingPlan.paper())
        images = {"bicubic": analysis.bicubic, "coarse": analysis.coarse, "final": result.picture.rgb}
        for method, image in images.items():
            totals[method] += torch.tensor(list(scorer(to_8bit(image), truth).values())) / 4
    (bicubic_distance, bicubic_haarpsi), coarse, final = totals.values()
    assert coarse[0] < 0.9 * bicubic_distance and final[0] < 0.96 * bicubic_distance, totals
    assert coarse[1] > 0.06 + bicubic_haarpsi and final[1] > 0.03 + bicubic_haarpsi, totals


def test_the_output_keeps_the_colours_of_the_input(pipeline, cat):
    """Shrunk back, the output is the input within a few levels: no colour drift, no invented structure."""
    result = pipeline(cat, SamplingPlan.paper())
    back = bicubic(result.picture.rgb[None], 0.25)[0]
    assert levels(back).sub(levels(cat.rgb)).abs().mean() < 8
    upscaled = bicubic(cat.rgb[None], 4)
    fixed = wavelet_color_fix(result.picture.rgb[None], upscaled)
    assert (fixed - result.picture.rgb[None]).abs().mean() < 0.01
