from __future__ import annotations

import copy
import json
import pickle
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_pipeline
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import patchscaler
from patchscaler.color import wavelet_color_fix
from patchscaler.images import Picture, bicubic, read_picture, to_pil, write_png
from patchscaler.models import decode_latents
from patchscaler.patches import merge, split
from patchscaler.plan import GROUPS, SamplingPlan
from patchscaler.results import Partial, Progress, Result

PLAN = SamplingPlan(0.95, 0.75, start=(200, 500, 900), steps=(1, 2, 3))


@pytest.fixture(scope="module")
def analysis(tiny_pipeline, picture):
    return tiny_pipeline.analyze(picture)


@pytest.fixture(scope="module")
def plan(analysis):
    """PLAN with thresholds that put three patches into each group."""
    ordered = analysis.patch_confidence.sort().values.double()
    return replace(PLAN, gamma1=ordered[5].item(), gamma2=ordered[2].item())


def run(pipeline, analysis, plan, **options) -> Result:
    *_, result = pipeline.refine(analysis, plan, **options)
    return result


def sampled_patches(monkeypatch, pipeline, analysis, plan, **options):
    """The x0 of every patch, before they are blended."""
    caught = []
    real = patchscaler.pipeline.merge
    monkeypatch.setattr(patchscaler.pipeline, "merge", lambda x0, grid: caught.append(x0) or real(x0, grid))
    run(pipeline, analysis, plan, **options)
    monkeypatch.undo()
    return caught[0]


def test_analysis_is_complete_and_on_the_cpu(analysis, picture):
    count, (height, width) = len(analysis.grid), (256, 320)
    assert analysis.picture is picture and count == 9
    assert analysis.latents.shape == (4, height // 8, width // 8)
    assert analysis.confidence.shape == (1, height // 8, width // 8)
    assert analysis.bicubic.shape == analysis.coarse.shape == (3, height, width)
    assert analysis.priors.indices.shape == analysis.priors.similarities.shape == (count, 3)
    assert analysis.prompt.shape == (count, 12, 16)
    expected = split(analysis.confidence, analysis.grid).mean((1, 2, 3))
    torch.testing.assert_close(analysis.patch_confidence, expected)
    assert set(analysis.seconds) == {"encode", "restore", "retrieve", "decode"}
    for name in ("latents", "confidence", "patch_confidence", "prompt", "bicubic", "coarse"):
        tensor = getattr(analysis, name)
        assert tensor.device.type == "cpu" and tensor.dtype == torch.float32


def test_events_count_up_to_the_plans_cost(tiny_pipeline, analysis, plan):
    *events, result = tiny_pipeline.refine(analysis, plan, batch_size=2)
    assert isinstance(result, Result) and all(isinstance(event, Progress) for event in events)
    total = plan.evaluations([3, 3, 3])
    assert {event.total for event in events} == {total}
    done = [sum(event.patches for event in events[: i + 1]) for i in range(len(events))]
    assert [event.done for event in events] == done and done[-1] == total
    # groups, then batches of two and one patches, then steps
    seen = [(event.group, event.patches, event.step) for event in events]
    assert seen == [(g, n, s + 1) for g in range(3) for n in (2, 1) for s in range(plan.steps[g])]


def test_result_reports_what_was_done(tiny_pipeline, analysis, plan):
    result = run(tiny_pipeline, analysis, plan, seed=5)
    report = json.loads(json.dumps(result.report(), allow_nan=False))
    assert report["version"] == patchscaler.__version__
    assert SamplingPlan.from_json(json.dumps(report["plan"])) == plan
    assert (report["seed"], report["device"], report["dtype"]) == (5, "cpu", "float32")
    assert [group["name"] for group in report["groups"]] == list(GROUPS)
    assert [group["evaluations"] for group in report["groups"]] == [3 * steps for steps in plan.steps]
    assert list(report["stages"]) == ["encode", "restore", "retrieve", "refine", "decode", "color"]
    assert report["stages"]["refine"] >= sum(group["seconds"] for group in report["groups"]) > 0
    assert result.assignment.bincount().tolist() == [3, 3, 3]


def test_same_seed_is_bit_equal_and_another_is_not(tiny_pipeline, analysis, plan):
    before = torch.get_rng_state()
    first, again = (run(tiny_pipeline, analysis, plan, seed=1) for _ in range(2))
    other = run(tiny_pipeline, analysis, plan, seed=2)
    assert torch.equal(first.picture.rgb, again.picture.rgb)
    assert not torch.equal(first.picture.rgb, other.picture.rgb)
    assert torch.equal(before, torch.get_rng_state())


def test_an_analysis_survives_a_change_of_process(tiny_pipeline, analysis, plan):
    sent = pickle.loads(pickle.dumps(analysis))
    result = pickle.loads(pickle.dumps(run(tiny_pipeline, sent, plan)))
    assert torch.equal(result.picture.rgb, run(tiny_pipeline, analysis, plan).picture.rgb)


def test_batch_size_does_not_matter(tiny_pipeline, picture, plan):
    results = [run(tiny_pipeline, tiny_pipeline.analyze(picture, size), plan, batch_size=size) for size in (1, 7, 64)]
    for result in results[1:]:
        torch.testing.assert_close(result.picture.rgb, results[0].picture.rgb, atol=1e-4, rtol=1e-4)


def test_one_group_alone_equals_the_full_run(monkeypatch, tiny_pipeline, analysis, plan):
    """Only its own (T, N) matters to a patch: other groups may change or be empty."""
    full = sampled_patches(monkeypatch, tiny_pipeline, analysis, plan)
    groups = run(tiny_pipeline, analysis, plan).assignment
    alone = {0: (0.01, 0.0), 1: (1.0, 0.0), 2: (1.0, 0.99)}
    for group, (gamma1, gamma2) in alone.items():
        other = replace(plan, gamma1=gamma1, gamma2=gamma2)
        assert set(run(tiny_pipeline, analysis, other).assignment.tolist()) == {group}
        x0 = sampled_patches(monkeypatch, tiny_pipeline, analysis, other)
        members = groups == group
        torch.testing.assert_close(x0[members], full[members], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(x0[~members], full[~members], atol=1e-3)


def test_a_patch_does_not_see_its_neighbours(monkeypatch, tiny_pipeline, analysis, plan):
    full = sampled_patches(monkeypatch, tiny_pipeline, analysis, plan)
    latents = analysis.latents.clone()
    latents[:, :4, :4] += 3  # only the first patch reaches there
    changed = sampled_patches(monkeypatch, tiny_pipeline, replace(analysis, latents=latents), plan)
    torch.testing.assert_close(changed[1:], full[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed[0], full[0], atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (130, 97)])
def test_any_size(tiny_pipeline, height, width):
    picture = Picture(torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    result = tiny_pipeline(picture, PLAN)
    rgb = result.picture.rgb
    assert rgb.shape == (3, 4 * height, 4 * width) and rgb.dtype == torch.float32
    assert rgb.isfinite().all() and rgb.min() >= -1 and rgb.max() <= 1
    assert result.picture.alpha is None


def test_alpha_and_notes_come_back(tiny_pipeline):
    alpha = torch.zeros(1, 10, 12)
    alpha[:, :, 6:] = 1
    result = tiny_pipeline(Picture(torch.zeros(3, 10, 12), alpha, ("a note",)), PLAN)
    upscaled = result.picture.alpha
    assert upscaled.shape == (1, 40, 48) and upscaled.min() == 0 and upscaled.max() == 1
    assert upscaled[:, :, :20].max() < 0.05 and upscaled[:, :, 28:].min() > 0.95
    assert result.picture.notes == ("a note",)
    assert to_pil(result.picture).mode == "RGBA"


def test_color_fix_keeps_the_inputs_low_frequencies(tiny_pipeline, analysis, plan):
    def error(result):
        blurred = bicubic((result.picture.rgb - analysis.bicubic)[None], 1 / 32)
        return blurred.abs().mean().item()

    fixed, raw = (run(tiny_pipeline, analysis, plan, color_fix=fix) for fix in (True, False))
    assert error(fixed) < 0.2 * error(raw)


def test_whether_colors_were_fixed_stands_in_result_report_and_png(tiny_pipeline, picture):
    for fix, text in ((True, None), (False, "off")):
        result = tiny_pipeline(picture, PLAN, color_fix=fix)
        assert result.color_fix is fix and result.report()["color_fix"] is fix
        assert result.png_text().get("color_fix") == text


def test_without_the_color_fix_the_picture_is_what_the_decoder_makes_of_the_refined_latent(
    tiny_pipeline, analysis, plan
):
    result = run(tiny_pipeline, analysis, plan, color_fix=False)
    with torch.inference_mode():
        decoded = decode_latents(tiny_pipeline.vae, merge(result.sampled.patches, analysis.grid)[None])[0]
    torch.testing.assert_close(result.picture.rgb, decoded, atol=1e-5, rtol=0)
    fixed = run(tiny_pipeline, analysis, plan).picture.rgb
    expected = wavelet_color_fix(decoded[None], analysis.bicubic[None]).clamp(-1, 1)[0]
    torch.testing.assert_close(fixed, expected, atol=1e-5, rtol=0)


def test_closing_the_generator_stops_at_once(tiny_pipeline, analysis, plan):
    calls = []
    handle = tiny_pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        events = tiny_pipeline.refine(analysis, plan, batch_size=1)
        next(events), next(events)
        events.close()
        assert len(calls) == 2 and list(events) == []
    finally:
        handle.remove()
    assert not torch.is_inference_mode_enabled()


def test_paper_plan_is_the_default(tiny_pipeline):
    assert tiny_pipeline(Picture(torch.zeros(3, 4, 4))).plan == SamplingPlan.paper()


def test_batch_size_below_one_is_refused(tiny_pipeline, analysis, plan):
    with pytest.raises(ValueError, match="batch_size=0"):
        run(tiny_pipeline, analysis, plan, batch_size=0)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(tiny_pipeline, analysis, plan, seed):
    with pytest.raises(ValueError, match=rf"seed={seed} is outside 0\.\.2\^63-1"):
        run(tiny_pipeline, analysis, plan, seed=seed)


def test_analyze_takes_what_a_call_takes(tiny_pipeline, picture, tmp_path):
    path = write_png(picture, tmp_path / "photo.png")
    by_path, by_picture = tiny_pipeline.analyze(str(path)), tiny_pipeline.analyze(read_picture(path))
    assert torch.equal(by_path.latents, by_picture.latents)
    with pytest.raises(TypeError, match="the image is int; it must be a path"):
        tiny_pipeline.analyze(3)


@pytest.mark.parametrize("part", ["grm", "transformer", "vae"])
def test_nan_raises_instead_of_a_black_image(part):
    pipeline = make_tiny_pipeline()
    with torch.no_grad():
        list(getattr(pipeline, part).parameters())[-1].fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        pipeline(Picture(torch.zeros(3, 8, 8)), PLAN)


def test_threads_may_share_a_pipeline(tiny_pipeline, analysis, plan):
    expected = [run(tiny_pipeline, analysis, plan, seed=seed).picture.rgb for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: run(tiny_pipeline, analysis, plan, seed=seed), range(4)))
    for result, rgb in zip(results, expected, strict=True):
        assert torch.equal(result.picture.rgb, rgb)


def test_dpm_solver_in_the_scheduler_slot(tiny_pipeline, analysis, plan):
    pipeline = copy.copy(tiny_pipeline)
    config = tiny_pipeline.scheduler.config
    pipeline.register_modules(scheduler=DPMSolverMultistepScheduler.from_config(config))
    many = replace(plan, steps=(20, 40, 60))
    result, reference = (run(pipe, analysis, many) for pipe in (pipeline, tiny_pipeline))
    assert not torch.equal(result.picture.rgb, reference.picture.rgb)
    assert (result.picture.rgb - reference.picture.rgb).abs().mean() < 0.05


def test_bfloat16_stays_close(picture):
    pipeline = make_tiny_pipeline()
    reference = pipeline(picture, PLAN)
    result = pipeline.to(torch.bfloat16)(picture, PLAN)
    assert result.report()["dtype"] == "bfloat16" and result.picture.rgb.dtype == torch.float32
    assert (result.picture.rgb - reference.picture.rgb).abs().mean() < 0.02


def test_prior_images_are_the_decoded_rows_of_the_memory(tiny_pipeline, analysis):
    indices = analysis.priors.indices[0]
    images = tiny_pipeline.prior_images(indices)
    assert images.shape == (3, 3, 128, 128) and images.abs().max() <= 1
    for image, index in zip(images, indices):
        alone = decode_latents(tiny_pipeline.vae, tiny_pipeline.texture_memory.patches(index)[None])
        torch.testing.assert_close(image, alone[0], atol=1e-5, rtol=0)


# Runs over parts


def test_after_each_group_there_is_the_picture_so_far(tiny_pipeline, analysis, plan):
    events = [e for e in tiny_pipeline.refine(analysis, plan, partial=True) if not isinstance(e, Progress)]
    simple, medium, result = events
    assert [type(event) for event in events] == [Partial, Partial, Result]
    coarse, final = split(analysis.latents, analysis.grid), result.sampled.patches
    for event, groups in ((simple, 1), (medium, 2)):
        ready = result.assignment < groups
        assert torch.equal(event.sampled.patches[ready], final[ready])
        assert torch.equal(event.sampled.patches[~ready], coarse[~ready])
        assert torch.equal(event.sampled.start > 0, ready) and torch.equal(event.sampled.steps > 0, ready)
        assert event.picture.rgb.shape == result.picture.rgb.shape
    assert torch.equal(result.picture.rgb, run(tiny_pipeline, analysis, plan).picture.rgb)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_changed_is_sampled_and_the_result_is_that_of_a_full_run(analysis, plan, dtype):
    pipeline = make_tiny_pipeline().to(dtype)
    ordered = analysis.patch_confidence.sort().values.double()
    first = run(pipeline, analysis, plan)
    evaluated = []
    pipeline.transformer.register_forward_hook(lambda _, inputs, out: evaluated.append(len(out)))
    for other, anew in [
        (replace(plan, gamma1=ordered[4].item()), 1),  # one patch from medium to simple
        (replace(plan, gamma2=ordered[0].item()), 2),  # two from hard to medium
        (replace(plan, start=(300, 500, 900)), 3),
        (replace(plan, start=(300, 500, 900), steps=(1, 2, 4)), 6),
        (plan, 0),
    ]:
        evaluated.clear()
        again = run(pipeline, analysis, other, earlier=first.sampled)
        assert again.rendered.sum() == anew
        reported = sum(group.evaluations for group in again.groups)
        assert sum(evaluated) == reported == again.sampled.steps[again.rendered].sum()
        full = run(pipeline, analysis, other)
        assert torch.equal(again.picture.rgb, full.picture.rgb)
        assert torch.equal(again.sampled.patches, full.sampled.patches)
    assert run(pipeline, analysis, plan, seed=1, earlier=first.sampled).rendered.all()


def test_a_stopped_run_is_taken_up_where_it_was_left(tiny_pipeline, analysis, plan):
    left = next(e for e in tiny_pipeline.refine(analysis, plan, partial=True) if isinstance(e, Partial)).sampled
    *_, result = events = [*tiny_pipeline.refine(analysis, plan, earlier=pickle.loads(pickle.dumps(left)))]
    assert {event.group for event in events[:-1]} == {1, 2}
    assert events[-2].done == events[-2].total == plan.evaluations([0, 3, 3])
    assert torch.equal(result.picture.rgb, run(tiny_pipeline, analysis, plan).picture.rgb)


@pytest.mark.parametrize("companions", [1, 2, 3, 5, 8])
def test_no_bit_of_a_patch_depends_on_the_size_of_its_batch(tiny_pipeline, analysis, plan, companions):
    alone = run(tiny_pipeline, analysis, plan, batch_size=companions)
    assert torch.equal(alone.sampled.patches, run(tiny_pipeline, analysis, plan, batch_size=64).sampled.patches)


def test_patches_put_into_a_group_by_hand(tiny_pipeline, analysis, plan):
    plain = run(tiny_pipeline, analysis, plan)
    moved = {int((plain.assignment == 0).nonzero()[0]): 2}
    result = run(tiny_pipeline, analysis, plan, by_hand=moved, earlier=plain.sampled)
    assert result.assignment.bincount().tolist() == [2, 3, 4]
    assert result.rendered.nonzero().flatten().tolist() == list(moved)
    assert torch.equal(result.picture.rgb, run(tiny_pipeline, analysis, plan, by_hand=moved).picture.rgb)
    assert json.loads(result.png_text()["by_hand"]) == {str(index): 2 for index in moved}
    assert "by_hand" not in plain.png_text()
    for bad in ({9: 0}, {-1: 0}, {0: 3}):
        with pytest.raises(ValueError, match="9 patches, 3 groups"):
            run(tiny_pipeline, analysis, plan, by_hand=bad)


# How it is built


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_from_refine_to_patch_dit_there_are_four_calls(picture, scheduler):
    """refine -> sample_batches -> the solver -> predict -> forward, the calls that a reader of the method follows."""
    pipeline = make_tiny_pipeline()
    pipeline.register_modules(scheduler=scheduler.from_config(pipeline.scheduler.config))
    analysis, stacks = pipeline.analyze(picture), []
    pipeline.transformer.register_forward_pre_hook(lambda *_: stacks.append(traceback.extract_stack()))
    run(pipeline, analysis, PLAN)
    home = Path(patchscaler.__file__).parent
    for stack in stacks:
        ours = [frame for frame in stack if home in Path(frame.filename).parents]
        calls = ours[[frame.name for frame in ours].index("refine") :]
        assert len(calls) <= 4 and {Path(call.filename).name for call in calls} == {"pipeline.py", "sampling.py"}
