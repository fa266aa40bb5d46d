"""Training: resuming, what each loss is given, and the stages from end to end."""

from __future__ import annotations

import argparse

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from patchscaler.loading import load_pipeline
from patchscaler.models import GRM, CompactAutoencoder, GRMOutput, PatchDiT, TextureClassifier
from patchscaler.models.autoencoder import decode_unclamped
from patchscaler.training import grm
from patchscaler.training import weights as all_stages
from patchscaler.training.build_memory import farthest_points
from patchscaler.training.data import ImageBank, part_of
from patchscaler.training.fit import fit, learning_rate, parser, pool_size, step_generator
from patchscaler.training.grm import calibrate
from patchscaler.training.optimizer import MuonAdamW
from patchscaler.training.patch_dit import Place, decode_in_place, sampling_inputs
from patchscaler.training.start import component, take_weights


def options(out, **changes) -> argparse.Namespace:
    values = {"vae": None, "data": None, "out": out, "config": "compact", "minutes": 30.0, "steps": None, "batch": None}
    return argparse.Namespace(**{**values, "start": None, "seed": 0, "device": "cpu", "dry_run": False, **changes})


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

    def loss(model, step):
        return {"loss": toy_error(model, step_generator(0, step))}

    args = options(out, steps=steps)
    return fit("toy", model, loss, args, batch=16, peak_rate=1e-2).state_dict()


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


def test_the_average_keeps_memory_order_and_follows_buffers(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x).mean()

    def loss(model, step):
        return {"loss": model(torch.ones(1, 2, 4, 4))}

    args, model = options(tmp_path, steps=5), Counting()
    average = fit("toy", model, loss, args, batch=1, peak_rate=1e-2)
    assert average.calls == 5 and not average.layer.weight.requires_grad
    assert average.layer.weight.is_contiguous(memory_format=torch.channels_last)
    behind = (average.layer.bias - model.layer.bias).abs().max()
    assert 0 < behind < 0.02


def test_logits_of_a_calibrated_grm_are_those_of_eta_over_the_error_to_a_power():
    """Before: log(η₀ / e²), with η₀ the error's 65th percentile, as Eq. 1 wants them where C is small."""

    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.confidence_head = nn.Sequential(nn.Conv2d(1, 1, 1))
            nn.init.ones_(self.confidence_head[0].weight)
            nn.init.zeros_(self.confidence_head[0].bias)

        def forward(self, latents):
            return GRMOutput(latents=latents, confidence_logits=self.confidence_head(middle - latents.square().log()))

        def register_to_config(self, eta):
            self.eta = eta

    model, generator = Known(), step_generator(0, 0)
    patches = torch.randn(24, 1, 2, 2, generator=generator).repeat_interleave(16, -1).repeat_interleave(16, -2)
    errors = (1.5 * patches + 0.5 * torch.randn(24, 1, 32, 32, generator=generator)).exp()
    middle = errors.quantile(0.65).log()
    figures = calibrate(model, errors.sqrt(), torch.zeros_like(errors))
    power = model.confidence_head[0].weight.item()
    logits = model(errors.sqrt()).confidence_logits
    assert power != pytest.approx(1, abs=0.05) and model.eta != pytest.approx(middle.exp().item(), rel=0.05)
    assert torch.allclose(logits, power * (model.eta / errors).log(), atol=1e-3)
    assert figures["share of hard patches"] == pytest.approx(0.3, abs=0.02)


def randomised(model: nn.Module) -> nn.Module:
    """No weight at zero, so that nothing is hidden."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def test_weights_are_taken_from_the_same_configuration_alone():
    start, model = randomised(TextureClassifier(4, ("brick", "grass"))), TextureClassifier(4, ("brick", "grass"))
    take_weights(model, start)
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="has classes="):
        take_weights(TextureClassifier(4, ("grass", "brick")), start)
    with pytest.raises(ValueError, match="heads=2, the one to be trained has heads=4"):
        take_weights(PatchDiT(4, width=32, depth=1, heads=4), PatchDiT(4, width=32, depth=1, heads=2))
    with pytest.raises(ValueError, match="GRM cannot start from TextureClassifier"):
        take_weights(GRM(4), start)
    with pytest.raises(ValueError, match=r"GRM has depths=\(1, 1, 2\)"):
        take_weights(GRM(4, (8, 16), (3, 1, 2)), GRM(4, (8, 16), (1, 1, 2)))


def test_a_stage_builds_on_what_out_holds_and_else_on_the_folder_to_start_from(tmp_path):
    (tmp_path / "out" / "vae").mkdir(parents=True)
    args = options(tmp_path / "out", start=tmp_path / "old")
    assert component(args, "vae") == tmp_path / "out" / "vae"
    assert component(args, "grm") == tmp_path / "old" / "grm"
    assert component(options(tmp_path / "out"), "grm") == tmp_path / "out" / "grm"


@torch.no_grad()
def test_a_patch_decoded_in_place_sees_its_surroundings():
    vae = randomised(CompactAutoencoder(4, (8, 16), (1, 1), (1, 1)))
    coarse, patches = torch.randn(2, 4, 20, 20), torch.randn(2, 4, 16, 16)
    before, place = coarse.clone(), Place(1, 3, 16)
    in_place = decode_in_place(vae, coarse, patches, place)
    assert torch.equal(coarse, before)
    merged = coarse.clone()
    merged[:, :, 1:17, 3:19] = patches
    assert torch.allclose(in_place, decode_unclamped(vae, merged)[:, :, 8:136, 24:152], atol=1e-5)
    alone = decode_unclamped(vae, patches)
    difference = (in_place - alone).abs().amax((0, 1))
    assert difference[:8].max() > 1e-3 and difference[:, -8:].max() > 1e-3
    assert difference[56:72, 56:72].max() < 1e-5  # further than these few convolutions reach


def test_inputs_are_noised_coarse_patches_or_lie_on_own_trajectories():
    count, asked = 6000, []
    y0 = -torch.ones(count, 1, 1, 1)
    weight = torch.ones((), requires_grad=True)

    def predict(x_t, t, chosen):
        asked.append((x_t, t, chosen))
        return 5 * weight * torch.ones_like(x_t)

    nearly_clean = torch.full((1000,), 1 - 1e-6)
    x_t, t = sampling_inputs(predict, y0, nearly_clean, step_generator(0, 0))
    own = asked[0][2]
    clean = torch.where(own, torch.tensor(5.0), x_t.flatten().round())
    shares = [(clean == value).float().mean().item() for value in (-1, 5)]
    assert shares == pytest.approx([0.2, 0.8], abs=0.02) and not x_t.requires_grad
    for value in (-1, 5):  # every time is as likely as any other, whatever x_t is noised from
        times = t[clean == value].float()
        assert times.min() >= 1 and times.max() <= 1000 and times.mean() == pytest.approx(500, abs=60)
        assert times.std() == pytest.approx(1000 / 12**0.5, abs=40)

    alphas = torch.linspace(0.99, 0.01, 1000)
    lengths = set()
    for seed in range(12):
        asked.clear()
        x_t, t = sampling_inputs(predict, y0, alphas, step_generator(0, seed))
        lengths.add(len(asked))
        begin, start, own = asked[0]
        assert (start >= t[own]).all() and start.max() <= 1000 and (start > t[own]).float().mean() > 0.9
        for (_, now, _), (_, then, _) in zip(asked, asked[1:]):
            assert (then <= now).all() and (then >= t[own]).all()
        # With one and the same prediction DDIM stays on the line through its start, whatever the number of steps.
        at_start, at_t = (alphas[each - 1].view(-1, 1, 1, 1) for each in (start, t[own]))
        noise = (begin - at_start.sqrt() * 5) / (1 - at_start).sqrt()
        expected = torch.where((start > t[own]).view(-1, 1, 1, 1), at_t.sqrt() * 5 + (1 - at_t).sqrt() * noise, begin)
        assert torch.allclose(x_t[own], expected, atol=1e-3)
    assert lengths == {1, 4, 8, 16, 20}


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The folder that a dry run of all stages leaves, and the parts of the images that each stage drew from."""
    out, drawn = tmp_path_factory.mktemp("trained"), {}

    def watched(name, stage):
        def run(args):
            drawn[name] = set()
            with pytest.MonkeyPatch.context() as patch:
                crops = ImageBank.crops

                def noted(bank, *args, **options):
                    drawn[name] |= {part_of(each) for each in bank.names}
                    return crops(bank, *args, **options)

                patch.setattr(ImageBank, "crops", noted)
                return stage(args)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, (stage, share) in list(all_stages.STAGES.items()):
            patch.setitem(all_stages.STAGES, name, (watched(name, stage), share))
        dry_run(images, out)
    return out, drawn


def dry_run(images, out, *more):
    arguments = ["--data", str(images), "--out", str(out), "--dry-run", "--device", "cpu", *more]
    all_stages.run(parser(all_stages.__doc__).parse_args(arguments))


@pytest.mark.slow
def test_all_stages_leave_a_pipeline_that_upscales(images, trained):
    out, _ = trained
    result = load_pipeline(out, device="cpu")(Image.new("RGB", (20, 12), "teal"))
    assert result.picture.rgb.shape == (3, 48, 80)
    assert "grm/config.json" in (out / "SHA256SUMS").read_text()
    card = (out / "README.md").read_text()
    assert "| 48 training images; " in card and "Trained from scratch" in card
    assert "top-1 on held-out crops" in card and "goes beyond the paper" in card
    assert [line.split(" |")[0][2:] for line in card.splitlines() if line.split(" |")[0][2:] in all_stages.STAGES] == [
        "autoencoder", "texture_classifier", "grm", "build_memory", "patch_dit"
    ]  # fmt: skip


@pytest.mark.slow
def test_no_network_is_trained_on_the_images_behind_the_texture_memory(trained):
    _, drawn = trained
    assert drawn.pop("build_memory") == {"memory"}
    assert len(drawn) == 4 and all(parts == {"training", "held-out"} for parts in drawn.values())


@pytest.mark.slow
def test_training_starts_from_the_weights_of_a_folder(images, trained, tmp_path):
    start, _ = trained
    dry_run(images, tmp_path, "--from", str(start), "--seed", "1")
    old, new = (load_pipeline(folder, "cpu", torch.float32) for folder in (start, tmp_path))
    for name in ("vae", "grm", "texture_classifier", "texture_encoder", "transformer"):
        weights = dict(getattr(old, name).named_parameters())
        for key, value in getattr(new, name).named_parameters():
            if not key.startswith("confidence_head.2"):  # calibrated again
                assert torch.allclose(value, weights[key], atol=2e-3), (name, key)
    assert torch.equal(new.transformer.gain, old.transformer.gain)
    assert f"Trained from the weights in `{start}`" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_grm_trained_on_is_averaged_with_the_one_it_began_with(images, trained, tmp_path, monkeypatch):
    def moved(stage, model, *args, **options):  # in place of training: every weight of the restoration by 0.2
        with torch.no_grad():
            for parameter in model.before.parameters():
                parameter.add_(0.2)
        return model.eval()

    monkeypatch.setattr(grm, "fit", moved)
    start, _ = trained
    grm.train(options(tmp_path, data=images, start=start, dry_run=True))
    begun, ended = (dict(GRM.from_pretrained(folder / "grm").before.named_parameters()) for folder in (start, tmp_path))
    assert all(torch.allclose(ended[name], begun[name] + 0.1, atol=2e-3) for name in begun) and len(begun) > 2


@pytest.mark.slow
def test_the_paper_configuration_builds_steps_and_saves_on_a_diffusers_autoencoder(images, tmp_path):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "given")
    arguments = ["--data", str(images), "--out", str(tmp_path / "out"), "--dry-run", "--device", "cpu"]
    arguments += ["--config", "paper", "--vae", str(tmp_path / "given")]
    all_stages.run(parser(all_stages.__doc__).parse_args(arguments))
    pipeline = load_pipeline(tmp_path / "out", device="cpu")
    assert type(pipeline.vae) is AutoencoderKL and pipeline.transformer.config.width == 768
