"""What the parts of a pipeline are worth alone: its autoencoder, its confidence and its texture priors.

python -m patchscaler.evaluation.components --images DIR --priors DIR

N patches, C channels, V patch side, K priors, M entries of the texture memory, D width, L tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from patchscaler.evaluation.metrics import psnr_rgb
from patchscaler.images import FORMATS, MAX_INPUT_PIXELS, ImageError, Picture, bicubic, read_picture
from patchscaler.loading import DEFAULT_WEIGHTS, load_pipeline
from patchscaler.models import decode_latents, encode_latents
from patchscaler.patches import LATENT_PIXELS, PatchGrid, split
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.retrieval import retrieve
from patchscaler.sampling import alphas_cumprod, shortcut_start

MAX_TRUTH_PIXELS = SCALE**2 * MAX_INPUT_PIXELS
TIME = 400  # where the paper's simple patches start


@torch.inference_mode()
def autoencoder_psnr(pipeline: PatchScalerPipeline, folder: Path) -> dict[str, float]:
    """RGB PSNR in dB, per image of the folder, of what the autoencoder makes of it, as an 8-bit file holds it."""
    psnr = {}
    for name, image in _true_images(folder, least=LATENT_PIXELS):
        latents = encode_latents(pipeline.vae, image.to(pipeline.device))  # 1xCxhxw
        psnr[name] = psnr_rgb(to_8bit(decode_latents(pipeline.vae, latents)[0].cpu()), image[0])
    return psnr


@torch.inference_mode()
def prior_errors(pipeline: PatchScalerPipeline, folder: Path, seed: int = 0, batch_size: int = 64) -> dict[str, Tensor]:
    """Squared error of Patch-DiT's x0 at t = 400 for each patch of the folder's images, by its prompt.

    The prompt is made of the "retrieved" priors, of "random" entries of the memory with their own
    similarities, or is "none". Inputs are the images shrunk and enlarged by bicubic interpolation. All
    prompts see one noise, so that their errors can be compared patch by patch: N float32 each, on the CPU.
    """
    device, memory = pipeline.device, pipeline.texture_memory
    alphas, top_k = alphas_cumprod(pipeline.scheduler), pipeline.texture_encoder.config.top_k
    size = pipeline.transformer.config.size
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, list[Tensor]] = {"retrieved": [], "random": [], "none": []}
    for _, image in _true_images(folder, least=LATENT_PIXELS * size):
        # 1. The latents of the truth and of its coarse restoration, in patches.
        degraded = bicubic(bicubic(image, 1 / SCALE), SCALE)  # 1x3xHxW
        x_hr, y_lr = (encode_latents(pipeline.vae, each.to(device)) for each in (image, degraded))  # 1xCxhxw
        y_hr = pipeline.grm(y_lr).latents.float()  # 1xCxhxw
        grid = PatchGrid(*x_hr.shape[-2:], size=size)
        patches = split(x_hr[0], grid), split(y_hr[0], grid)  # NxCxVxV each
        # Drawn for all patches at once, so that the size of a batch changes nothing.
        noises = torch.randn(patches[0].shape, generator=generator).to(device)  # NxCxVxV
        draws = torch.rand(len(grid), len(memory.features), generator=generator).topk(top_k).indices.to(device)  # NxK
        for x0, y0, noise, drawn in zip(*(each.split(batch_size) for each in (*patches, noises, draws))):
            # 2. Eq. 4, which is Eq. 6 from x0 instead of y0.
            x_t = shortcut_start(x0, noise, TIME, alphas)  # NxCxVxV
            # 3. The prompts.
            queries = F.normalize(pipeline.texture_classifier.features(y0).float(), dim=-1)  # NxD
            found = retrieve(queries, memory, top_k)
            similarities = torch.einsum("nd,nkd->nk", queries, memory.features[drawn])  # NxK
            prompts = {
                "retrieved": pipeline.texture_encoder(found.values, found.similarities, y0),  # NxLxD
                "random": pipeline.texture_encoder(memory.patches(drawn), similarities, y0),  # NxLxD
                "none": None,
            }
            # 4. What the network makes of each.
            times = torch.full((len(x0),), TIME, device=device)  # N
            for name, prompt in prompts.items():
                prediction = pipeline.transformer(x_t, y0, times, prompt).float()  # NxCxVxV
                errors[name].append((prediction - x0).square().mean((1, 2, 3)).cpu())
    return {name: torch.cat(parts) for name, parts in errors.items()}


def prior_table(errors: dict[str, Tensor]) -> str:
    """`prior_errors` as Markdown: the mean of each prompt, and by how much it exceeds that of the retrieved.

    The standard error is that of the paired differences over patches, as if these were independent; patches
    overlap, so it is somewhat too small.
    """
    patches = len(errors["retrieved"])
    lines = [f"| priors | squared error at t = {TIME}, {patches} patches | above retrieved |", "|---|---|---|"]
    for name, values in errors.items():
        above = (values - errors["retrieved"]).double()
        excess = f"{above.mean():+.6f} ± {above.std() / patches**0.5:.6f}" if name != "retrieved" else ""
        lines.append(f"| {name} | {values.double().mean():.6f} | {excess} |")
    return "\n".join(lines)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors of N, in [-1, 1]; equal values share their mean rank. NaN for a constant."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    return (x @ y / (x.norm() * y.norm())).item()


def patch_errors(image: Tensor, truth: Tensor, grid: PatchGrid) -> Tensor:
    """Mean squared error in the pixels of each patch: two images 3xHxW -> N in the grid's order.

    H and W may be less than the grid's, as they are for an output that was padded to whole patches.
    """
    error = (image - truth).square().mean(0)  # HxW
    return torch.stack([patch.pixels(error).mean() for patch in grid.patches])


def find_images(folder: Path) -> dict[str, Path]:
    """Stem -> file of the images directly in a folder, by name. FileNotFoundError if there is none."""
    kinds, found = Image.registered_extensions(), {}
    for path in sorted(folder.iterdir()):
        if kinds.get(path.suffix.lower()) in FORMATS:
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path} have one stem")
            found[path.stem] = path
    if not found:
        raise FileNotFoundError(f"no {', '.join(FORMATS)} file in the folder {folder}")
    return found


def read_image(path: Path, max_input_pixels: int = MAX_INPUT_PIXELS) -> Picture:
    """`read_picture`, with the file named in the ImageError."""
    try:
        return read_picture(path, max_input_pixels)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def to_8bit(image: Tensor) -> Tensor:
    """What an 8-bit file of the image, of any shape and in [-1, 1], gives back."""
    return ((image + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def _true_images(folder: Path, least: int) -> Iterator[tuple[str, Tensor]]:
    """Name and 1x3xHxW of each image, cut at its right and lower edge to multiples of a latent cell."""
    for path in find_images(folder).values():
        image = read_image(path, MAX_TRUTH_PIXELS).rgb[None]
        height, width = (side - side % LATENT_PIXELS for side in image.shape[-2:])
        if min(height, width) < least:
            raise ImageError(f"{path} is {image.shape[3]}x{image.shape[2]}; at least {least}x{least} is needed")
        yield path.name, image[..., :height, :width]


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[place]  # the mean of the ranks that equals take up


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=Path, help="folder of images for the autoencoder")
    add("--priors", type=Path, help="folder of true images to compare retrieved, random and no priors on")
    add("--weights", default=DEFAULT_WEIGHTS, help="pipeline folder or Hub id (default: the repository's)")
    args = parser.parse_args(argv)
    if args.images is None and args.priors is None:
        parser.error("nothing to measure: give --images or --priors")
    try:
        pipeline = load_pipeline(args.weights)
        if args.images is not None:
            psnr = autoencoder_psnr(pipeline, args.images)
            print("| autoencoder | images | RGB PSNR |\n|---|---|---|")
            print(f"| `{args.images}` | {len(psnr)} | {sum(psnr.values()) / len(psnr):.2f} dB |\n")
        if args.priors is not None:
            print(prior_table(prior_errors(pipeline, args.priors)))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
