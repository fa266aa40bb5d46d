"""Train Patch-DiT and the texture encoder: python -m patchscaler.training.patch_dit --data DIR --out DIR --minutes 40

x₀ prediction on patches of (y₀ from the GRM, x₀), with the priors that the memory gives for y₀; one prompt in
ten is dropped. Most times are drawn below the T of the patch's group, since the paper's plan asks for no others. Both
networks are trained together, everything else is frozen.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from patchscaler.models.autoencoder import load_autoencoder
from patchscaler.models.grm import GRM
from patchscaler.models.patch_dit import PatchDiT, denoising_loss
from patchscaler.models.texture_classifier import TextureClassifier
from patchscaler.models.texture_encoder import TextureEncoder
from patchscaler.models.texture_memory import TextureMemory
from patchscaler.plan import SamplingPlan, assign, times_and_steps
from patchscaler.retrieval import retrieve
from patchscaler.sampling import alphas_cumprod
from patchscaler.training.data import ImageBank
from patchscaler.training.fit import bf16, fit, make_accelerator, parser, pool_size, save_component, step_generator
from patchscaler.training.pairs import draw_pairs
from patchscaler.training.pool import Pool

CONFIGS = {
    "compact": {"dit": {"width": 192, "depth": 8, "heads": 3}, "encoder": {"top_k": 4}},
    "paper": {"dit": {"width": 768, "depth": 12, "heads": 12}, "encoder": {"top_k": 4}},
}
CROP = 256  # gives four patches that do not overlap
DROPPED_PROMPTS = 0.1
ANY_TIME = 0.3  # share of samples at any time: for plans other than the paper's


def make_scheduler() -> DPMSolverMultistepScheduler:
    """DDPM's linear schedule: at τ = 1000 nothing is left of x₀, as Eq. 6 wants (√ᾱ = .44, .08, .006).

    DPM-Solver++ of second order: in as few steps DDIM leaves more of the detail out.
    """
    return DPMSolverMultistepScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type="sample", algorithm_type="dpmsolver++"
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


def train(args: argparse.Namespace, bank: ImageBank | None = None) -> dict[str, float]:
    """Train, save to OUT/transformer, OUT/texture_encoder and OUT/scheduler; return held-out losses."""
    accelerator = make_accelerator(args)
    device = accelerator.device
    batch = 4 if args.dry_run else args.batch or (64 if device.type == "cpu" else 1024)
    bank = bank or ImageBank(args.data, device)
    vae = load_autoencoder(args.out / "vae").to(device, memory_format=torch.channels_last)
    grm, classifier, memory = (
        kind.from_pretrained(args.out / name).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        for kind, name in ((GRM, "grm"), (TextureClassifier, "texture_classifier"), (TextureMemory, "texture_memory"))
    )
    config = CONFIGS[args.config]
    channels = vae.config.latent_channels
    torch.manual_seed(args.seed)
    encoder = TextureEncoder(channels, **config["encoder"])
    transformer = PatchDiT(channels, prompt_width=encoder.config.width, **config["dit"])
    model = Prompted(encoder, transformer).to(device)
    scheduler = make_scheduler()
    alphas = alphas_cumprod(scheduler).float().to(device)

    def draw(count: int, generator: torch.Generator, bank: ImageBank = bank) -> dict[str, Tensor]:
        return draw_patches(vae, grm, classifier, memory, bank, count, generator, encoder.config.top_k)

    on_cpu = device.type == "cpu"
    size, passes = (8, 1) if args.dry_run else (pool_size(args, 8192), 24) if on_cpu else (8192, 12)
    chunk = min(size, 32 if on_cpu else 1024)
    pool = Pool(
        draw, size=size, passes=passes, batch=batch, chunk=chunk, seed=args.seed, rank=accelerator.process_index
    )

    first = pool.samples(0)
    transformer.set_filter(alphas, (first["x0"].float() - first["y0"].float()).square().mean((0, 2, 3)))

    def denoise(model: nn.Module, rows: dict[str, Tensor], t: Tensor, noise: Tensor, drop: Tensor) -> Tensor:
        x0, y0, abar = rows["x0"].float(), rows["y0"].float(), alphas[t - 1]
        signal = abar.view(-1, 1, 1, 1)
        x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * noise  # Eq. 4
        priors = memory.patches(rows["indices"])
        with bf16(device):
            predicted = model(x_t, y0, t, priors, rows["similarities"], drop)
        return denoising_loss(predicted, x0, abar)

    def loss(model: nn.Module, step: int, progress: float) -> dict[str, Tensor]:
        rows = pool.samples(step)
        generator = step_generator(args.seed, step, accelerator.process_index, device)
        t = draw_times(rows["start"], len(alphas), generator)
        drop = torch.rand(batch, generator=generator, device=device) < DROPPED_PROMPTS
        noise = torch.randn(rows["x0"].shape, generator=generator, device=device)
        return {"loss": denoise(model, rows, t, noise, drop)}

    average = fit("patch_dit", model, loss, args, accelerator, batch=batch, peak_rate=1e-3)

    held_out = ImageBank(args.data, device, held_out=True)
    generator = step_generator(args.seed, 0, 1)
    rows = draw(8 if args.dry_run else 256, generator, held_out)
    noise = torch.randn(rows["x0"].shape, generator=generator).to(device)
    nothing = torch.zeros(len(noise), dtype=torch.bool, device=device)
    figures = {}
    with torch.inference_mode():
        for t in (400, 700, 1000):
            times = torch.full((len(noise),), t, device=device)
            figures[f"Patch-DiT, weighted error at t = {t}"] = denoise(average, rows, times, noise, nothing).item()
    if accelerator.is_main_process:
        save_component(average.transformer, args.out / "transformer")
        save_component(average.encoder, args.out / "texture_encoder")
        scheduler.save_pretrained(args.out / "scheduler")
    return figures


@torch.inference_mode()
def draw_patches(vae, grm, classifier, memory, bank: ImageBank, count: int, generator, top_k: int) -> dict[str, Tensor]:
    """`count` patches (a multiple of 4): y0 and x0 N×c×16×16 fp16, T_i by the paper's plan, and the priors found."""
    pairs = draw_pairs(vae, bank, count // 4, CROP, generator)
    with bf16(bank.device):
        restored = grm(pairs["y_lr"].float())
    y0 = _quarters(restored.latents.float())
    confidence = _quarters(restored.confidence).mean((1, 2, 3))
    plan = SamplingPlan.paper()
    start, _ = times_and_steps(plan, assign(confidence, plan))
    x0 = _quarters(pairs["x_hr"].float())
    priors = retrieve(classifier.features(y0), memory, min(top_k, memory.config.size))
    found = {"indices": priors.indices, "similarities": priors.similarities}
    return {"y0": y0.half(), "x0": x0.half(), "start": start, **found}


def _quarters(latents: Tensor) -> Tensor:
    """B×c×32×32 as patches 4B×c×16×16 that do not overlap."""
    parts = latents.unflatten(2, (2, -1)).unflatten(4, (2, -1))  # B×c×2×16×2×16
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def draw_times(start: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Times to train at, N integers: evenly in 1…T_i of each patch (`start`, N), `ANY_TIME` of them in 1…`most`."""
    anywhere, part = torch.rand(2, len(start), generator=generator, device=start.device)
    return (part * torch.where(anywhere < ANY_TIME, most, start)).long() + 1


if __name__ == "__main__":
    print(train(parser(__doc__).parse_args()))
