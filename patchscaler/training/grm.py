"""Train the global restoration module: python -m patchscaler.training.grm --data DIR --out DIR --minutes 40

Loss: Eq. 1. Its restoration term (in print the square of an L1 norm) is here the mean squared error of the latents, at
a small weight, since most of what latents hold cannot be known from y_LR. What leads goes beyond the paper: through the
frozen decoder, L1 of the pixels and the feature distance of `perceptual`. While training, η is the 65th percentile of
the batch's squared errors; `calibrate` then sets it.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchscaler.models.autoencoder import decode_unclamped, load_autoencoder
from patchscaler.models.grm import GRM, confidence_loss, squared_error
from patchscaler.plan import SamplingPlan, assign, times_and_steps
from patchscaler.training.data import image_bank
from patchscaler.training.fit import bf16, fit, parser, pool_size, save_component, step_generator, weighted
from patchscaler.training.pairs import CROP, clean_images, draw_pairs
from patchscaler.training.perceptual import PictureLoss
from patchscaler.training.pool import Pool
from patchscaler.training.start import component, start_pipeline, take_weights

CONFIGS = {
    "compact": {"widths": (128, 224), "depths": (4, 6, 8)},
    "paper": {"widths": (320, 512), "depths": (6, 8, 6)},
}
KEPT = 0.5  # share of the weights that a training starts from (`--from`) in what it returns
WEIGHTS = {"pixels": 1.0, "features": 1.0, "latents": 0.05, "confidence": 0.02}
ETA_QUANTILE = 0.65
VALIDATION_CROP = 256
# Targets for the paper's plan on held-out patches: its evaluations over those of uniform sampling, and the share of
# hard patches. Both are less on photographs: a quarter of these crops is degraded more than most of those.
EVALUATIONS = 0.67
HARD = 0.3


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train, save to OUT/grm and return its errors on held-out images."""
    device = torch.device(args.device)
    batch = 4 if args.dry_run else args.batch or (16 if device.type == "cpu" else 128)
    bank = image_bank(args.data, device)
    vae = load_autoencoder(component(args, "vae")).to(device, memory_format=torch.channels_last)
    pictures = PictureLoss().to(device)
    torch.manual_seed(args.seed)
    model = GRM(vae.config.latent_channels, **CONFIGS[args.config])
    start = start_pipeline(args)
    if start:
        take_weights(model, start.grm)
    model.to(device)

    def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return draw_pairs(vae, bank, count, CROP, generator)

    on_cpu = device.type == "cpu"
    size, passes = (8, 1) if args.dry_run else (pool_size(args, 1024), 6) if on_cpu else (2048, 6)
    chunk = min(size, 32 if on_cpu else 512)
    pool = Pool(draw, size=size, passes=passes, batch=batch, chunk=chunk, seed=args.seed)

    def loss(model: nn.Module, step: int) -> dict[str, Tensor]:
        rows = pool.samples(step)
        target, images = rows["x_hr"].float(), clean_images(rows)
        with bf16(device):
            output = model(rows["y_lr"].float().contiguous(memory_format=torch.channels_last))
            decoded = decode_unclamped(vae, output.latents.float())
        error = squared_error(output.latents, target)
        generator = step_generator(args.seed, step, device=device)
        terms = {
            **pictures(decoded, images, step, generator),
            "latents": error.mean(),
            "confidence": confidence_loss(output, target, error.detach().quantile(ETA_QUANTILE)),
        }
        return weighted(terms, WEIGHTS)

    begun = copy.deepcopy(model.state_dict()) if start else {}
    average = fit("grm", model, loss, args, batch=batch, peak_rate=1e-4 if start else 5e-4)
    if start:
        # Half the way keeps most of what is gained in features and loses nothing in pixels (Wortsman et al. 2022,
        # "Robust fine-tuning of zero-shot models").
        ended = average.state_dict()
        average.load_state_dict({name: torch.lerp(ended[name], begun[name], KEPT) for name in ended})
    held_out = image_bank(args.data, device, "held-out")
    pairs = draw_pairs(vae, held_out, 4 if args.dry_run else 96, VALIDATION_CROP, step_generator(args.seed, 0, 1))
    figures = calibrate(average, pairs["y_lr"].float(), pairs["x_hr"].float())
    save_component(average, args.out / "grm")
    return figures


@torch.inference_mode()
def calibrate(model: GRM, y_lr: Tensor, x_hr: Tensor) -> dict[str, float]:
    """Scale and shift the logits of C to the target sizes of the groups; measure errors on held-out pairs B×c×h×w.

    As trained, C estimates η₀ / e² where that is well below 1, with η₀ the `ETA_QUANTILE` of e². Logits a times as
    large and shifted by b make (η / e²)ᵃ of it, with η = η₀ exp(b / a): the power a spreads the patches over the
    groups, and b moves all of them. a and b are chosen so that the paper's plan takes `HARD` of the patches for hard
    and needs `EVALUATIONS` of those of uniform sampling. They go into the last layer, and η into the config. This
    calibration is all that knows a sampling plan; the training itself does not.
    """
    outputs = [model(part) for part in y_lr.split(16)]
    logits = torch.cat([output.confidence_logits.float() for output in outputs])  # B×1×h×w
    latents = torch.cat([output.latents for output in outputs])  # B×c×h×w
    errors = squared_error(latents, x_hr)  # B×1×h×w
    paper = SamplingPlan.paper()

    def groups_of(scale: float, shift: float) -> Tensor:
        confidence = F.avg_pool2d((scale * logits + shift).sigmoid(), 16)  # of patches that do not overlap
        return assign(confidence.flatten(), paper)

    def shift_for(scale: float) -> float:
        def spared(shift: float) -> float:
            steps = times_and_steps(paper, groups_of(scale, shift))[1]
            return 1 - steps.float().mean().item() / max(paper.steps)

        return _bisect(spared, 1 - EVALUATIONS, -20.0, 20.0)

    scale = _bisect(lambda scale: (groups_of(scale, shift_for(scale)) == 2).float().mean().item(), HARD, 0.1, 10.0)
    shift = shift_for(scale)
    groups = groups_of(scale, shift)
    model.confidence_head[-1].weight.mul_(scale)
    model.confidence_head[-1].bias.mul_(scale).add_(shift)
    eta = errors.flatten().quantile(ETA_QUANTILE).item() * math.exp(shift / scale)
    model.register_to_config(eta=eta)
    simple, _, hard = (groups.bincount(minlength=3) / len(groups)).tolist()
    return {
        "y_LR, squared latent error": squared_error(y_lr, x_hr).mean().item(),
        "y_HR, squared latent error": errors.mean().item(),
        "eta, squared latent error": eta,
        "share of simple patches": simple,
        "share of hard patches": hard,
    }


def _bisect(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a rising function of one number reaches `wanted`."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return middle


if __name__ == "__main__":
    print(train(parser(__doc__).parse_args()))
