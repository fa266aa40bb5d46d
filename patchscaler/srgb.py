"""Colours of a file as sRGB: by its ICC profile, by the cICP, gAMA and cHRM chunks of a PNG, or by the nclx box of AVIF
and HEIC."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

# x, y of white, red, green and blue, as in cHRM; the numbers are those of ITU-T H.273, table 2.
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
PRIMARIES = {
    1: SRGB,  # BT.709
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),  # BT.601, 625 lines
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),  # BT.601, 525 lines
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # DCI-P3
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # Display P3
}
UNSPECIFIED = 2
CURVES = {4: 1 / 2.2, 5: 1 / 2.8, 8: 1.0, 13: None}  # H.273, table 3, as gAMA has them; None is sRGB's
CURVE_NAMES = {1: "BT.709", 6: "BT.601", 14: "BT.2020", 15: "BT.2020", 16: "PQ", 18: "HLG"}
NEAR_GAMMA = 0.05  # as a part: below this libpng too takes a difference for none
NEAR_PRIMARY = 0.002
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
BROKEN = "A gAMA or cHRM chunk that cannot be right was ignored."


class Coding(NamedTuple):
    """How values are colours: value = light^gamma, or sRGB's curve for None; primaries as in `SRGB`, the default."""

    gamma: float | None = None
    primaries: tuple[float, ...] = SRGB


def coding_of(image: Image.Image, notes: list[str]) -> Coding | None:
    """How the values of a picture are colours if that is neither sRGB nor said by its ICC profile.

    The order is that of PNG (third edition, 4.3): cICP, iCCP, sRGB, then gAMA and cHRM. `image.info["cicp"]` is the
    four numbers of the first. What cannot be applied is noted, and what comes next in the order counts.
    """
    info = image.info
    if "cicp" in info and (coding := _coding(*info["cicp"], notes)):
        return coding if coding != Coding() or info.get("icc_profile") else None
    if image.format != "PNG" or info.get("icc_profile") or "srgb" in info:
        return None
    gamma, primaries = info.get("gamma"), info.get("chromaticity", SRGB)
    if gamma is not None and not 0.05 <= gamma <= 20:
        gamma = notes.append(BROKEN)
    if gamma is not None and abs(gamma * 2.2 - 1) < NEAR_GAMMA:
        gamma = None  # what writers who mean sRGB put there
    if max(abs(x - y) for x, y in zip(primaries, SRGB)) < NEAR_PRIMARY:
        primaries = SRGB
    elif not _sound(primaries):
        primaries = SRGB
        notes.append(BROKEN)
    coding = Coding(gamma, primaries)
    return None if coding == Coding() else coding


def from_coding(rgb: Tensor, coding: Coding, notes: list[str]) -> Tensor:
    """Values C×H×W in [-1, 1], of one grey channel or three, as those of sRGB; colours outside it are clamped."""
    if coding == Coding():
        return rgb
    light = (rgb + 1) / 2
    if coding.gamma is None:
        light = torch.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    else:
        light = light ** (1 / coding.gamma)
    if coding.primaries != SRGB and len(light) == 3:
        matrix = torch.from_numpy(np.linalg.inv(_to_xyz(SRGB)) @ _to_xyz(coding.primaries)).float()
        light = torch.einsum("dc,chw->dhw", matrix, light).clamp(0, 1)
    notes.append("Colours were converted from the gamma and primaries that the file states to sRGB.")
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055) * 2 - 1


def from_profile(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """An image of mode L, RGB or CMYK as sRGB: L stays L, the others become RGB."""
    mode = "L" if image.mode == "L" else "RGB"
    if profile:
        try:
            source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB").convert(mode)
        except (ImageCms.PyCMSError, OSError, TypeError):
            notes.append("A colour profile that is broken or does not fit was ignored.")
        else:
            if image.mode != mode or converted.tobytes() != image.tobytes():
                notes.append("Colours were converted from the embedded profile to sRGB.")
            return converted
    elif image.mode == "CMYK":
        notes.append("CMYK was converted to RGB without a colour profile.")
    return image.convert(mode)


def _coding(primaries: int, transfer: int, matrix: int, full_range: int, notes: list[str]) -> Coding | None:
    """What cICP says, or None with a note where it is not applied."""
    if {primaries, transfer} == {UNSPECIFIED}:
        return None
    if matrix or not full_range:
        notes.append("A colour coding (cICP) that is not full-range RGB was not applied.")
    elif transfer not in CURVES:
        name = CURVE_NAMES.get(transfer, f"number {transfer}")
        notes.append(f"The transfer curve that the file states ({name}) was not applied.")
    elif primaries not in PRIMARIES:
        notes.append(f"The primaries that the file states (number {primaries}) were not applied.")
    else:
        return Coding(CURVES[transfer], PRIMARIES[primaries])
    return None


def _sound(primaries: tuple[float, ...]) -> bool:
    """Whether these span a gamut with white in it."""
    points = np.reshape(primaries, (4, 2))
    if not ((points >= 0) & (points[:, 1:] > 0.001) & (points <= 1)).all():
        return False
    xyz = _columns(primaries)
    if abs(np.linalg.det(xyz[:, 1:])) < 1e-3:
        return False
    return bool((np.linalg.solve(xyz[:, 1:], xyz[:, 0]) > 0).all())


def _columns(primaries: tuple[float, ...]) -> np.ndarray:
    """XYZ, with Y = 1, of white, red, green and blue: 3×4."""
    x, y = np.reshape(primaries, (4, 2)).astype(float).T
    return np.stack([x / y, np.ones(4), (1 - x - y) / y])


def _to_xyz(primaries: tuple[float, ...]) -> np.ndarray:
    """The matrix from linear RGB to XYZ, seen under the white of sRGB (Bradford adaptation)."""
    xyz = _columns(primaries)
    white, colors = xyz[:, 0], xyz[:, 1:]
    matrix = colors * np.linalg.solve(colors, white)
    gains = (BRADFORD @ _columns(SRGB)[:, 0]) / (BRADFORD @ white)
    return np.linalg.inv(BRADFORD) @ np.diag(gains) @ BRADFORD @ matrix
