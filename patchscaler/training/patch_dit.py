"""Train Patch-DiT and the texture encoder: python -m patchscaler.training.patch_dit --data DIR --out DIR --minutes 40

x₀ prediction, as in the paper, on patches of (y₀ from the GRM, x₀), with the priors that the memory gives for y₀; one
prompt in ten is dropped. Beyond the paper, which names neither, are

- the loss: most of what a patch of latents holds cannot be known from y₀, and the squared error of latents alone leaves
  grain. x̂₀ is put into the coarse latents around it and goes through the frozen decoder; L1 of the pixels and the
  feature distance of `perceptual` lead, the squared error of the latents keeps a small weight;
- the inputs, which are what sampling has (`sampling_inputs`), and none is noised truth: from that, a network learns to
  read x_t for a truth that is not there in sampling, which starts from y₀. With a twentieth of it in the training, one
  patch in forty took its noise for texture; as DDIM keeps its noise, every further step confirmed that, and the patch
  became grain.

Times are drawn evenly from 1…1000 for every patch: no sampling plan enters the training. Both networks are trained
together, everything else is frozen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from patchscaler.loading import load_component
from patchscaler.models.autoencoder import decode_unclamped, load_autoencoder
from patchscaler.models.grm import GRM
from patchscaler.models.patch_dit import PatchDiT
from patchscaler.models.texture_classifier import TextureClassifier
from patchscaler.models.texture_encoder import TextureEncoder
from patchscaler.models.texture_memory import TextureMemory
from patchscaler.patches import LATENT_PIXELS
from patchscaler.retrieval import retrieve
from patchscaler.sampling import alphas_cumprod, check_schedule, ddim_step, noised
from patchscaler.training.data import image_bank
from patchscaler.training.fit import bf16, fit, parser, pool_size, save_component, step_generator, weighted
from patchscaler.training.pairs import clean_images, draw_restored
from patchscaler.training.perceptual import PictureLoss, feature_distance
from patchscaler.training.pool import Pool
from patchscaler.training.start import component, start_pipeline, take_weights

CONFIGS = {
    "compact": {"dit": {"width": 192, "depth": 8, "heads": 3}, "encoder": {"top_k": 4}},
    "paper": {"dit": {"width": 768, "depth": 12, "heads": 12}, "encoder": {"top_k": 4}},
}
WEIGHTS = {"pixels": 1.5, "features": 2.0, "latents": 0.02}
DROPPED_PROMPTS = 0.1
FROM_COARSE = 0.2  # share of `sampling_inputs`; the rest are own trajectories
EVALUATIONS = (1, 4, 8, 16, 20)  # of an own trajectory

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t n×c×V×V, t n, chosen N booleans, n of them true) → x̂₀


def make_scheduler() -> DDIMScheduler:
    """DDPM's linear schedule: at τ = 1000 nothing is left of x₀, as Eq. 6 wants (√ᾱ = .44, .08, .006).

    DDIM, as the own trajectories of the training: DPM-Solver++ extrapolates through the prediction before, and its
    errors, which the network has not met, grow in long runs.
    """
    return DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type="sample", clip_sample=False
    )


class Prompted(nn.Module):
    """Texture encoder and Patch-DiT as one network, so that they are trained together."""

    def __init__(self, encoder: TextureEncoder, transformer: PatchDiT):
        super().__init__()
        self.encoder, self.transformer = encoder, transformer

    def forward(self, x_t: Tensor, y0: Tensor, t: Tensor, priors: Tensor, scores: Tensor, drop: Tensor) -> Tensor:
        """x_t, y0 N×c×V×V, t N, priors N×K×c×V×V, scores N×K, drop N booleans → x̂₀ N×c×V×V."""
        prompt = self.encoder(priors, scores, y0)  # N×L×D
        nothing = self.transformer.null_prompt.to(prompt.dtype)
        return self.transformer(x_t, y0, t, torch.where(drop.view(-1, 1, 1), nothing, prompt))


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train, save to OUT/transformer, OUT/texture_encoder and OUT/scheduler; return distances on held-out crops."""
    device = torch.device(args.device)
    batch = 4 if args.dry_run else args.batch or (16 if device.type == "cpu" else 256)
    bank = image_bank(args.data, device)
    vae = load_autoencoder(component(args, "vae")).to(device, memory_format=torch.channels_last)
    grm, classifier, memory = (
        load_component(component(args, name), kind, torch.float32)
        .to(device, memory_format=torch.channels_last)
        .requires_grad_(False)
        for kind, name in ((GRM, "grm"), (TextureClassifier, "texture_classifier"), (TextureMemory, "texture_memory"))
    )
    pictures = PictureLoss().to(device)
    config = CONFIGS[args.config]
    channels = vae.config.latent_channels
    torch.manual_seed(args.seed)
    encoder = TextureEncoder(channels, **config["encoder"])
    transformer = PatchDiT(channels, prompt_width=encoder.config.width, **config["dit"])
    start = start_pipeline(args)
    if start:
        take_weights(encoder, start.texture_encoder)
        take_weights(transformer, start.transformer)
    model = Prompted(encoder, transformer).to(device)
    scheduler = make_scheduler()
    if start:
        check_schedule(transformer, scheduler)
    alphas = alphas_cumprod(scheduler).to(device)

    def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return draw_restored(vae, grm, bank, count, generator)

    on_cpu = device.type == "cpu"
    size, passes = (8, 1) if args.dry_run else (pool_size(args, 2048), 8) if on_cpu else (8192, 8)
    chunk = min(size, 32 if on_cpu else 512)
    pool = Pool(draw, size=size, passes=passes, batch=batch, chunk=chunk, seed=args.seed)
    if not start:
        first = pool.samples(0)
        transformer.set_filter(alphas, (first["x_hr"].float() - first["y_hr"].float()).square().mean((0, 2, 3)))

    def predict_with(model: nn.Module, y0: Tensor, drop: Tensor) -> Predict:
        with torch.no_grad(), bf16(device):
            priors = retrieve(classifier.features(y0), memory, min(encoder.config.top_k, memory.config.size))
            values = memory.patches(priors.indices)  # N×K×c×V×V

        def predict(x_t: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
            given = (y0[chosen], t, values[chosen], priors.similarities[chosen], drop[chosen])
            with bf16(device):
                return model(x_t, *given).float()

        return predict

    def loss(model: nn.Module, step: int) -> dict[str, Tensor]:
        rows = pool.samples(step)
        coarse, truth, images = rows["y_hr"].float(), rows["x_hr"].float(), clean_images(rows)
        generator = step_generator(args.seed, step, device=device)
        place = Place.draw(coarse.shape[-1], transformer.config.size, generator)
        x0, y0 = place.of(truth), place.of(coarse)
        drop = torch.rand(batch, generator=generator, device=device) < DROPPED_PROMPTS
        predict = predict_with(model, y0, drop)
        x_t, t = sampling_inputs(predict, y0, alphas, generator)
        predicted = predict(x_t, t, torch.ones_like(drop))
        with bf16(device):
            decoded = decode_in_place(vae, coarse, predicted, place)
        terms = {
            **pictures(decoded, place.of(images, LATENT_PIXELS), step, generator),
            "latents": (predicted - x0).square().mean(),
        }
        return weighted(terms, WEIGHTS)

    average = fit("patch_dit", model, loss, args, batch=batch, peak_rate=1.5e-4 if start else 5e-4)

    generator = step_generator(args.seed, 0, 1)
    held_out = image_bank(args.data, device, "held-out")
    rows = draw_restored(vae, grm, held_out, 4 if args.dry_run else 96, generator)
    coarse, images = rows["y_hr"].float(), clean_images(rows)
    place = Place(*[(coarse.shape[-1] - transformer.config.size) // 2] * 2, transformer.config.size)
    y0 = place.of(coarse)
    noise = torch.randn(y0.shape, generator=generator).to(device)
    everything = torch.ones(len(y0), dtype=torch.bool, device=device)
    figures = {}
    with torch.inference_mode():
        predict = predict_with(average, y0, ~everything)

        def distance(patches: Tensor) -> float:
            with bf16(device):
                ours = decode_in_place(vae, coarse, patches, place)
                seen = [pictures.networks[0](each) for each in (ours, place.of(images, LATENT_PIXELS))]
            return feature_distance(*seen).mean().item()

        figures["feature distance of the training (Lite0), coarse patches"] = distance(y0)
        for start_time in (250, 500, 1000):
            times = torch.full((len(y0),), start_time, device=device)
            predicted = predict(noised(y0, noise, abar_at(times, alphas)), times, everything)
            figures[f"the same, Patch-DiT, one evaluation from T = {start_time}"] = distance(predicted)
    save_component(average.transformer, args.out / "transformer")
    save_component(average.encoder, args.out / "texture_encoder")
    scheduler.save_pretrained(args.out / "scheduler")
    return figures


@dataclass(frozen=True)
class Place:
    """Where a patch of V×V latents stands in larger ones, the same for a whole batch."""

    top: int
    left: int
    size: int

    @classmethod
    def draw(cls, side: int, size: int, generator: torch.Generator) -> Place:
        """Anywhere in latents side×side."""
        return cls(*torch.randint(side - size + 1, (2,), generator=generator, device=generator.device).tolist(), size)

    def of(self, values: Tensor, scale: int = 1) -> Tensor:
        """The part of …×h×w, or of images `scale` times as large."""
        top, left, size = self.top * scale, self.left * scale, self.size * scale
        return values[..., top : top + size, left : left + size]


def decode_in_place(vae: nn.Module, coarse: Tensor, patches: Tensor, place: Place) -> Tensor:
    """Patches N×c×V×V decoded inside the coarse latents around them, N×c×h×w → N×3×8V×8V about [-1, 1].

    Alone, their surroundings would be the decoder's zero padding, and Patch-DiT would learn to undo that: the decoder
    reaches about 80 pixels.
    """
    latents = coarse.clone(memory_format=torch.channels_last)
    place.of(latents).copy_(patches)
    return place.of(decode_unclamped(vae, latents), LATENT_PIXELS)


def abar_at(t: Tensor, alphas: Tensor) -> Tensor:
    """ᾱ at times t, N integers, for patches N×c×V×V: N×1×1×1."""
    return alphas[t - 1].view(-1, 1, 1, 1)


def sampling_inputs(
    predict: Predict, y0: Tensor, alphas: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the network meets in sampling: x_t N×c×V×V and t, N integers drawn evenly from 1…1000.

    x_t is noised from y₀ in `FROM_COARSE` of the patches, the shortcut start of Eq. 7. The others are on the network's
    own trajectory: out of such a start at some T ≥ t, in one of `EVALUATIONS` (as many for all patches of a batch) of
    DDIM, without a gradient. With few evaluations only, errors that the network has not met grow in long runs.
    """
    count, most = len(y0), len(alphas)
    kind, early, late = torch.rand(3, count, generator=generator, device=y0.device)
    t = (early * most).long() + 1
    start = t + (late * (most + 1 - t)).long()
    noise = torch.randn(y0.shape, generator=generator, device=y0.device)
    own = kind >= FROM_COARSE
    x_t = noised(y0, noise, abar_at(t, alphas))
    if own.any():
        steps = EVALUATIONS[torch.randint(len(EVALUATIONS), (), generator=generator, device=generator.device).item()]
        times = [start + ((t - start) * k / steps).round().long() for k in range(steps + 1)]
        x = noised(y0, noise, abar_at(start, alphas))[own]
        with torch.no_grad():
            for now, then in zip(times, times[1:]):
                now, then = now[own], then[own]
                stepped = ddim_step(x, predict(x, now, own), abar_at(now, alphas), abar_at(then, alphas))
                x = torch.where((then < now).view(-1, 1, 1, 1), stepped, x)
        x_t[own] = x
    return x_t, t


if __name__ == "__main__":
    print(train(parser(__doc__).parse_args()))
