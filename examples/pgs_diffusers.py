"""PGS and our GRM around another diffusion model, without training it, as the paper does with StableSR (Table 3).

    python examples/pgs_diffusers.py examples/1-astronaut.png -o out.png --model FOLDER

FOLDER is a Stable Diffusion pipeline in diffusers' format, of which `unet`, `vae` and `scheduler` are read. Without
--model, a UNet and an autoencoder of Stable Diffusion 2.1's size get random weights: the picture is then noise, and
only the times mean something (*work-only*).

The picture is restored by our GRM, which also gives the confidence; the model's own latents of that coarse picture
are y0. The unified run gives every patch 20 steps from T 1000, so at least 0.40 of its evaluations remain under the
paper's plan. Of StableSR's own, which also has more tiles than there are patches here, it is less: both are printed.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from patchscaler import Picture, SamplingPlan, load_pipeline, read_picture, write_png
from patchscaler.adapters import group_sample, unet_denoiser, x0_scheduler
from patchscaler.device import pick_device, pick_dtype
from patchscaler.evaluation.standins import STANDINS, materialise
from patchscaler.loading import DEFAULT_WEIGHTS
from patchscaler.models import decode_latents, encode_latents, load_autoencoder
from patchscaler.patches import LATENT_PIXELS
from patchscaler.plan import GROUPS, PRESETS

SIZE, STRIDE = 64, 48  # V of a patch, in latent cells: what Stable Diffusion was trained at
TILE_STRIDE = 32  # StableSR's released code
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def load(folder: Path | None, device: torch.device) -> tuple:
    """UNet, autoencoder and scheduler."""
    dtype = pick_dtype(device)
    if folder is None:
        with torch.device("meta"):
            parts = STANDINS["sd"].build()
        unet, vae = (materialise(part, device, dtype) for part in parts)
        return unet, vae, diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtype, use_safetensors=True)
    kind = diffusers.DDIMScheduler.load_config(folder / "scheduler")["_class_name"]
    scheduler = getattr(diffusers, kind).from_pretrained(folder / "scheduler")
    return unet.eval().to(device), load_autoencoder(folder / "vae").to(device), scheduler


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("image", type=Path)
    add("-o", "--out", type=Path, required=True, help="the PNG to write")
    add("--model", type=Path, help="folder of a Stable Diffusion pipeline (default: random weights)")
    add("--condition", type=Path, help="safetensors with prompt_embeds 1×L×D (default: zeros, 77 tokens)")
    add("--plan", choices=[name for name in PRESETS if name != "uniform"], default="paper")
    add("--weights", default=DEFAULT_WEIGHTS, help="our pipeline, of which the GRM is used")
    add("--device", help="auto, cpu or cuda (default: the fastest there is)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)

    # 1. Our coarse restoration and its confidence.
    begin = time.perf_counter()
    analysis = load_pipeline(args.weights, device).analyze(read_picture(args.image))
    height, width = analysis.coarse.shape[-2:]

    # 2. y0: the model's latents of the coarse picture, filled up to whole cells and one patch.
    unet, vae, theirs = load(args.model, device)
    rows, columns = (max(SIZE, -(-side // LATENT_PIXELS)) for side in (height, width))
    fill = (0, columns * LATENT_PIXELS - width, 0, rows * LATENT_PIXELS - height)
    with torch.inference_mode():
        y0 = encode_latents(vae, F.pad(analysis.coarse[None], fill, mode="replicate").to(device))[0]  # C×h×w
    h, w = analysis.confidence.shape[-2:]
    more = (0, max(0, columns - w), 0, max(0, rows - h))
    confidence = F.pad(analysis.confidence[None], more, mode="replicate")[0, :, :rows, :columns]  # 1×h×w
    print(f"restored and encoded in {time.perf_counter() - begin:.1f} s, loading included")

    # 3. Both ways of sampling, with the same denoiser.
    shape = 1, 77, unet.config.cross_attention_dim
    condition = load_file(args.condition)["prompt_embeds"] if args.condition else torch.zeros(shape)
    denoiser = unet_denoiser(unet, theirs, encoder_hidden_states=condition.to(device))
    runs, seconds = {}, {}
    for name, plan in (("unified", SamplingPlan.uniform()), ("PGS", PRESETS[args.plan])):
        begin = time.perf_counter()
        runs[name] = group_sample(
            denoiser, y0, confidence, plan, x0_scheduler(theirs), size=SIZE, stride=STRIDE, device=device
        )
        seconds[name] = time.perf_counter() - begin
        groups = runs[name].assignment.bincount(minlength=len(GROUPS)).tolist()
        print(f"{name}: {groups} patches, {runs[name].evaluations} evaluations, {seconds[name]:.1f} s")
    print(f"evaluations, PGS / unified: {runs['PGS'].evaluations / runs['unified'].evaluations:.2f}")
    print(f"seconds, PGS / unified: {seconds['PGS'] / seconds['unified']:.2f}")
    tiles = math.prod(1 + math.ceil((side - SIZE) / TILE_STRIDE) for side in (rows, columns))
    ratio = runs["PGS"].evaluations / SamplingPlan.uniform().steps[0] / tiles
    print(f"evaluations, PGS / unified in StableSR's {tiles} tiles: {ratio:.2f} (the paper's seconds: 0.24)")

    # 4. The picture.
    with torch.inference_mode():
        image = decode_latents(vae, runs["PGS"].latents[None].to(device))[0, :, :height, :width].cpu()
    write_png(Picture(image), args.out)


if __name__ == "__main__":
    main()
