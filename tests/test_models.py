"""One contract for all models: shapes, determinism, dtypes, save and load, declared sizes."""

from __future__ import annotations

import inspect

import pytest
import torch

from patchscaler.models import (
    GRM,
    CompactAutoencoder,
    PatchDiT,
    TextureClassifier,
    TextureEncoder,
    TextureMemory,
    decode_latents,
    encode_latents,
)
from patchscaler.models.autoencoder import decode_unclamped
from patchscaler.models.grm import GRMOutput, confidence_loss
from patchscaler.models.texture_encoder import match_statistics

N, K, C, V = 3, 2, 4, 16


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _autoencoder() -> tuple:
    model = CompactAutoencoder(C, (8, 16), (1, 1), (1, 1))
    return model, lambda m: m.decode(m.encode(_random(2, 3, 32, 40).to(m.dtype)).latents).sample


def _grm() -> tuple:
    model = GRM(C, (8, 16), (1, 1, 1))
    torch.nn.init.normal_(model.restore.weight, std=0.1)

    def run(m: GRM) -> torch.Tensor:
        output = m(_random(2, C, 5, 7))
        return torch.cat([output.latents, output.confidence_logits.to(output.latents.dtype)], dim=1)

    return model, run


def _patch_dit() -> tuple:
    model = PatchDiT(C, V, 2, 32, 2, 2, 16)
    for layer in (model.modulation, model.final, *(block.cross_out for block in model.blocks)):  # not the identity
        torch.nn.init.normal_(layer.weight, std=0.1)
    times = torch.tensor([1, 400, 1000])
    return model, lambda m: m(_random(N, C, V, V), _random(N, C, V, V), times, _random(N, 6, 16))


def _classifier() -> tuple:
    return TextureClassifier(C, ("bubbly", "woven"), (8, 8, 16)), lambda m: m(_random(N, C, V, V))


def _encoder() -> tuple:
    model = TextureEncoder(C, V, 4, 16, 2, K)
    return model, lambda m: m(_random(N, K, C, V, V), _random(N, K).clamp(-1, 1), _random(N, C, V, V))


def _memory() -> tuple:
    return TextureMemory.from_patches(_random(9, C, V, V), _random(9, 12)), lambda m: m.patches(torch.arange(9))


MODELS = {f.__name__[1:]: f for f in (_autoencoder, _grm, _patch_dit, _classifier, _encoder, _memory)}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    model, run = MODELS[request.param]()
    return model.eval(), run


@torch.no_grad()
def test_the_same_input_gives_the_same_output(case):
    model, run = case
    assert torch.equal(run(model), run(model))


@torch.no_grad()
def test_save_and_load_round_trip(case, tmp_path):
    model, run = case
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, use_safetensors=True)
    for name in inspect.signature(type(model)).parameters:
        assert loaded.config[name] == model.config[name] or list(loaded.config[name]) == list(model.config[name])
    assert torch.equal(run(loaded), run(model))


@torch.no_grad()
def test_bfloat16_stays_close_to_float32(case):
    model, run = case
    exact = run(model).float()
    model.to(torch.bfloat16)
    close = run(model).float()
    assert (close - exact).abs().mean() < 0.03 * exact.abs().mean().clamp(min=0.1)


def test_every_parameter_gets_a_gradient(case):
    model, run = case
    if list(model.parameters()):  # the memory has none
        run(model.train()).float().square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == ({"null_prompt"} if isinstance(model, PatchDiT) else set())


def test_the_token_of_no_prompt_gets_a_gradient_where_there_is_no_prompt():
    model, _ = _patch_dit()
    y0 = _random(N, C, V, V)
    model(y0, y0, torch.tensor([5]), None).square().sum().backward()
    assert model.null_prompt.grad.any()


def test_autoencoder_refuses_sizes_off_the_grid():
    with pytest.raises(ValueError, match="33×40.*multiples of 8"):
        CompactAutoencoder(C, (8, 16), (1, 1), (1, 1)).encode(torch.zeros(1, 3, 33, 40))


@torch.no_grad()
def test_latent_statistics_are_applied_and_undone():
    vae = CompactAutoencoder(2, (8, 16), (1, 1), (1, 1), latents_mean=[1.0, -2.0], latents_std=[2.0, 0.5])
    images = _random(1, 3, 16, 16).clamp(-1, 1)
    raw = vae.encode(images).latents
    latents = encode_latents(vae, images)
    assert torch.allclose(latents[:, 1], (raw[:, 1] + 2) / 0.5, atol=1e-5)
    assert torch.allclose(decode_latents(vae, latents), vae.decode(raw).sample.clamp(-1, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 3), (16, 16)])
def test_grm_takes_any_size_and_starts_as_the_identity(size):
    latents = _random(1, C, *size)
    output = GRM(C, (8, 16), (1, 1, 1))(latents)
    assert torch.equal(output.latents, latents)
    assert output.confidence.shape == (1, 1, *size)
    assert 0 < output.confidence.min() and output.confidence.max() < 1


def test_confidence_loss_is_least_at_eta_over_error():
    target = torch.zeros(1, C, 1, 1)
    latents = torch.full_like(target, 2.0)  # e² = 4
    confidences = torch.linspace(0.01, 0.99, 99)
    losses = [
        confidence_loss(GRMOutput(latents=latents, confidence_logits=c.logit().view(1, 1, 1, 1)), target, eta=1.0)
        for c in confidences
    ]
    assert confidences[torch.stack(losses).argmin()] == pytest.approx(0.25, abs=0.011)


def test_confidence_does_not_trade_the_restoration():
    latents = torch.full((1, C, 1, 1), 2.0, requires_grad=True)
    output = GRMOutput(latents=latents, confidence_logits=torch.zeros(1, 1, 1, 1))
    loss = confidence_loss(output, torch.zeros_like(latents), eta=1.0) + 0 * latents.sum()
    loss.backward()
    assert torch.equal(latents.grad, torch.zeros_like(latents))


def test_unclamped_images_have_a_gradient_outside_the_range_that_the_clamped_lack():
    model = CompactAutoencoder(C, (8, 16), (1, 1), (1, 1)).eval()
    torch.nn.init.constant_(model.decoder[-2].bias, 3.0)
    latents = _random(1, C, 2, 2).requires_grad_()
    assert decode_unclamped(model, latents).min() > 1 and decode_latents(model, latents).max() == 1
    decode_unclamped(model, latents).sum().backward()
    assert latents.grad.abs().max() > 0


@torch.no_grad()
def test_prompt_keys_equal_the_prompt_they_were_made_from():
    model, _ = _patch_dit()
    x, y0, t, prompt = _random(N, C, V, V), _random(N, C, V, V), torch.tensor([5, 5, 5]), _random(N, 6, 16)
    assert torch.equal(model(x, y0, t, prompt), model(x, y0, t, model.prompt_keys(prompt)))
    assert not torch.allclose(model(x, y0, t, prompt), model(x, y0, t, None))


@torch.no_grad()
def test_patches_of_a_batch_do_not_see_each_other():
    model, _ = _patch_dit()
    x, y0, t, prompt = _random(N, C, V, V), _random(N, C, V, V), torch.tensor([5, 400, 1000]), _random(N, 6, 16)
    together = model(x, y0, t, prompt)
    alone = torch.cat([model(x[i : i + 1], y0[i : i + 1], t[i : i + 1], prompt[i : i + 1]) for i in range(N)])
    assert torch.allclose(together, alone, atol=1e-5)


@torch.no_grad()
def test_one_time_for_all_patches_is_the_same_as_theirs_also_under_autocast():
    model, _ = _patch_dit()
    x, y0, prompt = _random(N, C, V, V), _random(N, C, V, V), _random(N, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        one, each = (model(x, y0, torch.full((count,), 400), prompt) for count in (1, N))
    assert torch.allclose(one, each, atol=0.05) and not torch.allclose(one, y0, atol=0.5)


@torch.no_grad()
def test_the_filter_is_the_best_linear_estimate_of_the_clean_patch():
    generator = torch.Generator().manual_seed(0)
    alphas, variance = torch.linspace(0.999, 0.001, 1000), torch.tensor([0.01, 0.1, 1.0, 4.0])
    model = PatchDiT(C, V, 2, 32, 1, 2, 16)
    model.set_filter(alphas, variance)
    y0, noise = (torch.randn(64, C, V, V, generator=generator) for _ in range(2))
    x0 = y0 + variance.sqrt().view(-1, 1, 1) * torch.randn(y0.shape, generator=generator)
    for t in (1, 300, 1000):
        signal = alphas[t - 1]
        x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * noise  # Eq. 4
        error = (model(x_t, y0, torch.tensor([t])) - x0).square().mean((0, 2, 3))
        assert torch.allclose(error, 1 / (1 / variance + signal / (1 - signal)), rtol=0.05)


def test_what_the_network_adds_falls_with_the_noise():
    model = PatchDiT(C, V, 2, 32, 1, 2, 16)
    alphas = torch.linspace(0.99, 0.01, 1000)
    model.set_filter(alphas, torch.ones(C))
    torch.nn.init.constant_(model.final.bias, 1)
    y0, times = _random(N, C, V, V), torch.tensor([1, 500, 1000])
    with torch.no_grad():
        added = model(alphas[times - 1].sqrt().view(-1, 1, 1, 1) * y0, y0, times) - y0  # the linear estimate is y0
    assert torch.allclose(added.std((1, 2, 3)), torch.zeros(N), atol=1e-5)
    assert added.mean((1, 2, 3)).tolist() == pytest.approx([0.709, 0.995, 1.0], abs=0.002)


def test_patch_dit_starts_as_y0():
    y0 = _random(N, C, V, V)
    assert torch.equal(PatchDiT(C, V, 2, 32, 2, 2, 16)(_random(N, C, V, V), y0, torch.tensor([1, 2, 3])), y0)


def test_priors_take_the_statistics_of_their_query():
    priors, query = 3 + 5 * _random(N, K, C, V, V), _random(N, C, V, V)
    matched = match_statistics(priors, query)
    assert torch.allclose(matched.mean((-2, -1)), query.mean((-2, -1))[:, None].expand(-1, K, -1), atol=1e-4)
    assert torch.allclose(matched.std((-2, -1)), query.std((-2, -1))[:, None].expand(-1, K, -1), rtol=1e-2)


def test_memory_keeps_values_within_half_a_step_and_unit_keys():
    patches, features = _random(9, 20, V, V), 7 * _random(9, 12)
    memory = TextureMemory.from_patches(patches, features)
    assert memory.value_codes.shape[1] == 16 and memory.value_codes_16.shape[1] == 4
    scales = torch.tensor(memory.config.scales).view(1, -1, 1, 1)
    assert ((memory.patches(torch.arange(9)) - patches).abs() <= 0.501 * scales).all()
    assert torch.allclose(memory.features, torch.nn.functional.normalize(features, dim=1), atol=1e-4)
