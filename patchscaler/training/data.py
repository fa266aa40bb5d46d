"""Training images: tar shards or a folder, decoded once into memory, cropped where the model lives."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from patchscaler.training.synthetic import draw_page

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DRAWN = 0.07  # share of text and line art where images are restored
HOLD_OUT = 20  # one image of twenty is kept for validation


class ImageBank:
    """All images of a source as uint8 tensors 3×H×W on one device.

    Args:
        source: a folder with `*.tar` shards, or a folder of images (searched through its subfolders).
        device: where the images, and so the crops, live.
        held_out: False for the training images, True for the one in twenty that is kept for validation. The
            split follows a checksum of the image's name, so it is the same on every machine.

    Raises:
        FileNotFoundError: no image was found.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu", held_out: bool = False):
        entries = [(name, data) for name, data in _files(Path(source)) if is_held_out(name) == held_out]
        if not entries:
            raise FileNotFoundError(f"no {'held-out' if held_out else 'training'} images in {source}")
        with ThreadPoolExecutor() as pool:
            arrays = list(pool.map(lambda entry: _decode(entry[1]), entries))
        self.names = [name for name, _ in entries]
        self.images = [torch.tensor(array).permute(2, 0, 1).contiguous().to(device) for array in arrays]
        self.device = torch.device(device)

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

        Every pixel of the source is equally likely, unless `among` (B image indices) says which image to
        crop. Half of the crops are taken up to `zoom` times larger and shrunk, which is sharper than most
        photographs are at full size. Crops are flipped and turned at random. Images whose shorter side is
        below `size` are used whole, reflected at their borders. A share `drawn` of the crops is replaced by text
        and line art.
        """
        if among is None:
            weights = torch.tensor([float(image[0].numel()) for image in self.images])
            among = torch.multinomial(weights, count, replacement=True, generator=generator)
        draws = torch.rand(count, 5, generator=generator)
        crops = [self._crop(int(i), size, zoom, draw) for i, draw in zip(among, draws.tolist(), strict=True)]
        if drawn:
            for place in (torch.rand(count, generator=generator) < drawn).nonzero()[:, 0].tolist():
                seed = int(torch.randint(2**31, (), generator=generator))
                page = torch.tensor(draw_page(size, seed), device=self.device)
                crops[place] = page.permute(2, 0, 1).float().div(127.5).sub(1)
        return torch.stack(crops), among

    def _crop(self, index: int, size: int, zoom: float, draw: list[float]) -> Tensor:
        image = self.images[index]
        height, width = image.shape[1:]
        scale = 1.0 + max(0.0, 2 * draw[0] - 1) * (zoom - 1)
        side = max(size, min(int(size * scale), height, width))
        if min(height, width) < side:
            image = _reflect_to(image, side)
            height, width = image.shape[1:]
        top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
        crop = image[:, top : top + side, left : left + side].float().div(127.5).sub(1)
        if side != size:
            crop = F.interpolate(crop[None], size=(size, size), mode="bicubic", antialias=True)[0].clamp(-1, 1)
        if draw[3] < 0.5:
            crop = crop.flip(-1)
        return torch.rot90(crop, int(draw[4] * 4), (-2, -1))


def is_held_out(name: str) -> bool:
    """Whether an image of this name belongs to the validation split."""
    return zlib.crc32(Path(name).name.encode()) % HOLD_OUT == 0


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


def _reflect_to(image: Tensor, side: int) -> Tensor:
    """Pad 3×H×W by reflection until both sides are at least `side`; repeated, as one pass at most doubles."""
    while min(image.shape[1:]) < side:
        height, width = image.shape[1:]
        right, bottom = min(max(side - width, 0), width - 1), min(max(side - height, 0), height - 1)
        if max(right, bottom) == 0:  # a single row or column has nothing to reflect
            return F.pad(image.float()[None], (0, max(side - width, 0), 0, max(side - height, 0)), "replicate")[0]
        image = F.pad(image.float()[None], (0, right, 0, bottom), mode="reflect")[0]
    return image
