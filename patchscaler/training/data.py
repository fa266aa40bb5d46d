"""Training images: tar shards or a folder, decoded once into memory, cropped where the model lives."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from patchscaler.training.synthetic import draw_page

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DRAWN = 0.07  # share of text and line art where images are restored
PAGES, GPU_PAGES = 64, 1024  # how many are drawn: a GPU takes a thousand times as many crops of them
PAGE = 320  # their side
PARTS = ("training", "memory", "held-out")
HOLD_OUT = 20  # one image of twenty is kept for validation
RESERVE = 10  # one of ten others is for the texture memory
ZOOMS = (1.0, 1.3, 1.6, 2.0)  # an image shrunk by these factors is sharper than most photographs are at full size


class ImageBank:
    """The images of one part of a source, at every one of `ZOOMS`, as uint8 tensors 3×H×W on one device.

    Args:
        source: a folder with `*.tar` shards, or a folder of images (searched through its subfolders).
        device: where the images, and so the crops, live.
        part: "training"; "memory" for those behind the texture memory, which no network is trained on (the paper
            takes them from other data sets); "held-out" for validation. See `part_of`.

    Raises:
        ValueError: there is no such part.
        FileNotFoundError: no image was found.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu", part: str = "training"):
        if part not in PARTS:
            raise ValueError(f"part {part!r}: expected one of {', '.join(PARTS)}")
        entries = [(name, data) for name, data in _files(Path(source)) if part_of(name) == part]
        if not entries:
            raise FileNotFoundError(f"no {part} images in {source}")
        with ThreadPoolExecutor() as pool:
            arrays = list(pool.map(lambda entry: _decode(entry[1]), entries))
        self.names = [name for name, _ in entries]
        self.device = torch.device(device)
        self.images = [torch.tensor(array).permute(2, 0, 1).contiguous().to(device) for array in arrays]
        self._photographs = _Store(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def classes(self) -> dict[str, list[int]]:
        """Texture classes: the part of the file name before `_`, for images in a folder named `texture`."""
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            path = Path(name)
            if path.parent.name == "texture" and "_" in path.stem:
                found.setdefault(path.stem.split("_")[0], []).append(index)
        return dict(sorted(found.items()))

    def crops(
        self,
        count: int,
        size: int,
        generator: torch.Generator,
        among: Tensor | None = None,
        zoom: float = 2.0,
        drawn: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Draw random square crops: B×3×size×size in [-1, 1] and the B image indices.

        An image is as likely as its side is long, unless `among` (B image indices) says which image to crop: large
        ones show more, but at full size they are often soft. One half of the crops is of the image itself, the other
        of all sizes of `ZOOMS` up to `zoom` alike: with four of them 3/8 of the crops show a smaller copy, fewer where
        that has no room for one. Crops are flipped and turned at random. Images whose shorter side is below `size` are
        used whole, reflected at their borders. A share `drawn` of the crops is replaced by text and line art.
        """
        if among is None:
            among = torch.multinomial(self._photographs.weights, count, replacement=True, generator=generator)
        crops = self._photographs.crops(among, size, zoom, torch.rand(count, 6, generator=generator))
        if drawn:
            places = (torch.rand(count, generator=generator) < drawn).nonzero()[:, 0]
            pages, draws = _pages(self.device), torch.rand(len(places), 6, generator=generator)
            chosen = torch.randint(len(pages.weights), (len(places),), generator=generator)
            crops[places.to(self.device)] = pages.crops(chosen, size, zoom, draws)
        return crops, among


class _Store:
    """Images of any sizes behind each other in one tensor, so that all crops of a batch are one lookup."""

    def __init__(self, images: list[Tensor]):
        levels = [[image if zoom == 1 else _shrunk(image, zoom) for image in images] for zoom in ZOOMS]
        self.device = images[0].device
        self.pixels = torch.cat([image.flatten() for level in levels for image in level])
        self.sizes = torch.tensor([[image.shape[1:] for image in level] for level in levels])  # L×n×2
        ends = (3 * self.sizes.prod(2)).flatten().cumsum(0)
        self.starts = torch.cat([ends.new_zeros(1), ends[:-1]]).view(len(levels), -1)  # L×n
        self.weights = self.sizes[0].prod(1).sqrt()  # n

    def crops(self, among: Tensor, size: int, zoom: float, draws: Tensor) -> Tensor:
        """Crops B×3×size×size in [-1, 1] of the images `among`, B; `draws` B×6 are evenly distributed in [0, 1)."""
        roomy = (self.sizes[:, among].amin(2) >= size).sum(0).clamp(min=1) - 1  # B: the last level with room
        level = ((2 * draws[:, 0] - 1).clamp(min=0) * sum(each <= zoom for each in ZOOMS)).long().minimum(roomy)
        extent, start = self.sizes[level, among], self.starts[level, among]  # B×2, B
        first = (draws[:, 1:3] * ((extent - size).clamp(min=0) + 1)).long()  # B×2
        extent, start, first, flips = (each.to(self.device) for each in (extent, start, first, draws[:, 3:] < 0.5))
        places = first[..., None] + torch.arange(size, device=self.device)  # B×2×size: rows, columns
        last = (extent - 1)[..., None]
        places = places % (2 * last).clamp(min=1)
        places = torch.where(places > last, 2 * last - places, places)  # reflected at the border
        places = torch.where(flips[:, :2, None], places.flip(2), places)
        rows, columns = places[:, 0, :, None], places[:, 1, None, :]
        width, area = extent[:, 1].view(-1, 1, 1), extent.prod(1).view(-1, 1, 1)
        inside = start.view(-1, 1, 1) + rows * width + columns  # B×size×size
        inside = torch.where(flips[:, 2].view(-1, 1, 1), inside.transpose(1, 2), inside)
        codes = torch.stack([self.pixels[inside + plane * area] for plane in range(3)], 1)
        return codes.float().div(127.5).sub(1)


@cache
def _pages(device: torch.device) -> _Store:
    """The text and line art, drawn once."""
    count = PAGES if device.type == "cpu" else GPU_PAGES
    with ProcessPoolExecutor() as pool:
        pages = list(pool.map(partial(draw_page, PAGE), range(count), chunksize=16))
    return _Store([torch.tensor(page).permute(2, 0, 1).contiguous().to(device) for page in pages])


def part_of(name: str) -> str:
    """Which of `PARTS` an image of this name is in: by a checksum of the file name, so the same on every machine."""
    number = zlib.crc32(Path(name).name.encode())
    if number % HOLD_OUT == 0:
        return "held-out"
    return "memory" if number // HOLD_OUT % RESERVE == 0 else "training"


@cache
def image_bank(source: Path, device: torch.device, part: str = "training") -> ImageBank:
    """The `ImageBank` of a part, read once for all stages of training."""
    return ImageBank(source, device, part)


def _shrunk(image: Tensor, zoom: float) -> Tensor:
    """3×H×W uint8, `zoom` times smaller."""
    size = [max(1, round(side / zoom)) for side in image.shape[1:]]
    small = F.interpolate(image[None].float(), size=size, mode="bicubic", antialias=True)[0]
    return small.round().clamp(0, 255).to(torch.uint8)


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    shards = sorted(source.glob("*.tar"))
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    yield member.name, archive.extractfile(member).read()
    if not shards:
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                yield str(path.relative_to(source)), path.read_bytes()


def _decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))
