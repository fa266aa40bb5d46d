"""Train the texture classifier.

    python -m patchscaler.training.texture_classifier --data DIR --out DIR --minutes 3

Cross-entropy over the texture classes (`ImageBank.classes`) on latents of 128×128 crops. Half of the crops are
blurred by shrinking and enlarging first, since the queries at run time are restored, not pristine, patches.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchscaler.images import bicubic
from patchscaler.models.autoencoder import encode_latents, load_autoencoder
from patchscaler.models.texture_classifier import TextureClassifier
from patchscaler.training.data import image_bank
from patchscaler.training.fit import bf16, fit, parser, pool_size, save_component, step_generator
from patchscaler.training.pool import Pool
from patchscaler.training.start import component, start_pipeline, take_weights

CONFIGS = {"compact": {"widths": (64, 128, 192)}, "paper": {"widths": (128, 256, 384)}}
CROP = 128
ZOOM = 1.5


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train, save to OUT/texture_classifier and return its top-1 accuracy on crops of held-out images."""
    device = torch.device(args.device)
    batch = 2 if args.dry_run else args.batch or 64
    bank = image_bank(args.data, device)
    classes = bank.classes()
    if len(classes) < 2:
        raise ValueError(f"{len(classes)} texture classes in {args.data}; name images texture/CLASS_NUMBER.png")
    vae = load_autoencoder(component(args, "vae")).to(device)
    torch.manual_seed(args.seed)
    model = TextureClassifier(vae.config.latent_channels, tuple(classes), **CONFIGS[args.config])
    start = start_pipeline(args)
    if start:
        take_weights(model, start.texture_classifier)
    model.to(device)

    def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return labelled_latents(vae, bank, classes, count, generator)

    size, passes = (64, 1) if args.dry_run else (pool_size(args, 8192), 10)
    pool = Pool(draw, size=size, passes=passes, batch=batch, seed=args.seed)

    def loss(model: nn.Module, step: int) -> dict[str, Tensor]:
        rows = pool.samples(step)
        generator = step_generator(args.seed, step)
        flips = [axis for axis in (-1, -2) if torch.rand((), generator=generator) < 0.5]
        noise = torch.randn(rows["latents"].shape, generator=generator)
        latents = rows["latents"].flip(flips) + 0.1 * noise.to(device)
        targets = F.one_hot(rows["labels"], len(classes)).float()
        # Mixup (Zhang et al. 2018): there are few images per class, which are soon memorised.
        part = torch.rand(batch, generator=generator).to(device)
        latents = torch.lerp(latents, latents.roll(1, 0), part.view(-1, 1, 1, 1))
        targets = torch.lerp(targets, targets.roll(1, 0), part.view(-1, 1))
        with bf16(device):
            logits = model(latents.contiguous(memory_format=torch.channels_last))
        return {"loss": F.cross_entropy(logits.float(), targets)}

    average = fit("texture_classifier", model, loss, args, batch=batch, peak_rate=1e-4 if start else 1e-3)
    held_out = image_bank(args.data, device, "held-out")
    generator = step_generator(args.seed, 0, 1)
    rows = labelled_latents(vae, held_out, classes, 32 if args.dry_run else 1024, generator, augmented=False)
    with torch.inference_mode():
        hits = average(rows["latents"]).argmax(1) == rows["labels"]
    accuracy = {"texture classifier, top-1 on held-out crops": hits.float().mean().item()}
    save_component(average, args.out / "texture_classifier")
    return accuracy


@torch.inference_mode()
def labelled_latents(vae, bank, classes, count, generator, augmented: bool = True) -> dict[str, Tensor]:
    """Latents count×c×16×16 of random crops, every class of the bank's equally often, and their labels in `classes`."""
    held = [bank.classes().get(name, []) for name in classes]  # image indices of each class
    present = torch.tensor([label for label, indices in enumerate(held) if indices])
    labels = present[torch.randint(len(present), (count,), generator=generator)]
    picks = torch.rand(count, generator=generator)
    among = torch.tensor([
        held[label][int(pick * len(held[label]))] for label, pick in zip(labels.tolist(), picks.tolist())
    ])  # fmt: skip
    images, _ = bank.crops(count, CROP, generator, among, ZOOM)
    if augmented:
        images = _recolor(images, generator)
        soft = torch.rand(count, generator=generator) < 0.5
        images[soft] = bicubic(bicubic(images[soft], 0.25), 4)
    with bf16(images.device):
        latents = encode_latents(vae, images)
    return {"latents": latents.half().float(), "labels": labels.to(images.device)}


def _recolor(images: Tensor, generator: torch.Generator) -> Tensor:
    """Swap the colours of B×3×H×W, fade them and change the contrast: a class is known by its pattern alone."""
    count = len(images)
    order = torch.rand(count, 3, generator=generator).argsort(1).to(images.device)  # B×3
    images = images.gather(1, order.view(count, 3, 1, 1).expand_as(images))
    fade, contrast = torch.rand(2, count, 1, 1, 1, generator=generator).to(images.device)
    images = images.lerp(images.mean(1, keepdim=True).expand_as(images), fade)
    mean = images.mean((1, 2, 3), keepdim=True)
    return (mean + (images - mean) * (0.5 + contrast)).clamp(-1, 1)


if __name__ == "__main__":
    print(train(parser(__doc__).parse_args()))
