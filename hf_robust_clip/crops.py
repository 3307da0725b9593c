"""Random views of the training pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_whole, checked_images

TRIES = 10  # boxes drawn for a picture before its central one is taken
DRAWS = 2 * TRIES + 3  # numbers that a view takes: two a try, two for the place of its box, one for its mirroring


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random box of each picture, resized to a square and mirrored at times: the augmentation of CoOp and Inception.

    A box covers the fraction a ~ U(scale) of the picture and has the aspect ratio width / height = r with
    log r ~ U(log ratio): of an H x W picture sqrt(a H W r) wide and sqrt(a H W / r) high, in whole pixels, anywhere in
    it. If none of ten such boxes fits in, it is the largest central one with the ratio nearest to the picture's own.

    Args:
        scale: least and largest fraction of the picture's area, 0 < least <= largest <= 1.
        ratio: least and largest width / height of the box, before it is resized to a square.
        flip: probability of swapping left and right.

    Raises ValueError for bounds that are out of range or not in order, and a `flip` outside [0, 1].
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        for name, most in (("scale", 1.0), ("ratio", math.inf)):
            value = getattr(self, name)
            try:
                low, high = map(float, value)
            except (TypeError, ValueError):
                raise ValueError(f"{name}={value!r} must be two numbers, (least, largest).") from None
            if not (0 < low <= high <= most and math.isfinite(high)):
                limit = "" if most == math.inf else f" <= {most:g}"
                raise ValueError(f"{name}={value!r} must be finite (least, largest), 0 < least <= largest{limit}.")
            object.__setattr__(self, name, (low, high))
        if not isinstance(self.flip, int | float) or not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip!r} is a probability; give a number from 0 to 1.")

    def __call__(self, pictures: Sequence[Tensor], size: int, seed: int) -> Tensor:
        """One view of each picture: float32 (B, 3, size, size) in [0, 1], on the pictures' device.

        The draw of a picture depends on `seed` and on its own pixels, to the grey level, alone: not on its batch, its
        place in it, its device or any global random state. A picture of floats draws like its grey levels in uint8.

        Args:
            pictures: B tensors (3, H, W) of any sizes, uint8 or floating-point in [0, 1].
            size: side of the views in pixels. Boxes are resized with antialiased bicubic weights, then clamped.
            seed: a whole number, of which 64 bits count.

        Raises TypeError for a picture that is no tensor or of another kind of number; ValueError for no pictures,
        another shape, floats outside [0, 1] and a `size` below 1.
        """
        if len(pictures) == 0:
            raise ValueError("pictures is empty; give at least one tensor (3, height, width).")
        check_whole(1, size=size)
        for i, picture in enumerate(pictures):
            _check_picture(picture, f"pictures[{i}]")
        boxes_B4, mirrored_B = self._drawn(pictures, seed)
        crops = (_crop(picture, *box) for picture, box in zip(pictures, boxes_B4.tolist(), strict=True))
        views_BCHW = torch.cat([F.interpolate(crop, (size, size), mode="bicubic", antialias=True) for crop in crops])
        mirrored_B111 = mirrored_B.to(views_BCHW.device)[:, None, None, None]
        return torch.where(mirrored_B111, views_BCHW.flip(3), views_BCHW).clamp(0, 1)

    def _drawn(self, pictures: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """`boxes` of one view of each picture, (B, 4) and (B,)."""
        here = all(picture.device.type == "cpu" for picture in pictures)
        keys = [picture_key(picture, seed) for picture in (pictures if here else _on_the_cpu(pictures))]
        generators = [torch.Generator().manual_seed(key) for key in keys]
        draws_BR = torch.stack([torch.rand(DRAWS, generator=own, dtype=torch.float64) for own in generators])
        boxes_B4, mirrored_B = torch.zeros(len(draws_BR), 4, dtype=torch.long), torch.zeros(len(draws_BR)).bool()
        shapes = [tuple(picture.shape[1:]) for picture in pictures]
        for height, width in dict.fromkeys(shapes):
            rows = torch.tensor([shape == (height, width) for shape in shapes])
            boxes_B4[rows], mirrored_B[rows] = self.boxes(height, width, draws_BR[rows])
        return boxes_B4, mirrored_B

    def boxes(self, height: int, width: int, draws_NR: Tensor) -> tuple[Tensor, Tensor]:
        """N boxes (N, 4) in a picture, int64 (top, left, height, width) in its pixels, and which views to mirror (N,).

        Args:
            draws_NR: (N, DRAWS) of U[0, 1), float64.
        """
        (least, largest), (low, high) = self.scale, self.ratio
        area_NK = height * width * (least + draws_NR[:, :TRIES] * (largest - least))
        ratio_NK = low * (high / low) ** draws_NR[:, TRIES : 2 * TRIES]
        sides_NK2 = torch.stack([(area_NK / ratio_NK).sqrt(), (area_NK * ratio_NK).sqrt()], dim=2).round().long()
        whole_2 = torch.tensor([height, width])
        fits_NK = ((sides_NK2 > 0) & (sides_NK2 <= whole_2)).all(dim=2)
        first_N = fits_NK.int().argmax(dim=1)
        central_2 = torch.tensor([min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))])
        fits_N1 = fits_NK.any(dim=1, keepdim=True)
        sides_N2 = torch.where(fits_N1, sides_NK2[torch.arange(len(draws_NR)), first_N], central_2)
        room_N2 = whole_2 - sides_N2
        anywhere_N2 = (draws_NR[:, 2 * TRIES : 2 * TRIES + 2] * (room_N2 + 1)).long()
        places_N2 = torch.where(fits_N1, anywhere_N2, room_N2 // 2)
        return torch.cat([places_N2, sides_N2], dim=1), draws_NR[:, -1] < self.flip


def _crop(picture_CHW: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """A box of a picture as floats in [0, 1], (1, 3, height, width)."""
    crop_1CHW = picture_CHW[None, :, top : top + height, left : left + width]
    return crop_1CHW.float() / 255 if crop_1CHW.dtype == torch.uint8 else crop_1CHW.float()


def _on_the_cpu(pictures: Sequence[Tensor]) -> list[Tensor]:
    """Grey levels of pictures, (3, H, W) uint8 each, on the CPU: another device is waited for once."""
    levels = [grey_levels(picture) if picture.is_floating_point() else picture for picture in pictures]
    rows = torch.cat([own.flatten() for own in levels]).cpu().split([own.numel() for own in levels])
    return [row.view(own.shape) for row, own in zip(rows, levels, strict=True)]


def _check_picture(picture: Tensor, name: str) -> None:
    if not isinstance(picture, Tensor) or not (picture.dtype == torch.uint8 or picture.is_floating_point()):
        kind = picture.dtype if isinstance(picture, Tensor) else type(picture).__name__
        raise TypeError(f"{name} must be a tensor of uint8, or of floats in [0, 1], got {kind}.")
    if picture.dim() != 3 or picture.shape[0] != 3 or picture.numel() == 0:
        raise ValueError(f"{name} must have shape (3, height, width), got {tuple(picture.shape)}; convert it to RGB.")
    if picture.is_floating_point():
        checked_images(picture[None], name)


def picture_key(picture_CHW: Tensor, seed: int, use: bytes = b"") -> int:
    """A 32-bit random seed from a picture's grey levels (uint8, or floats in [0, 1]) and 64 bits of `seed`; each use
    (16 bytes at most) has another one.
    """
    if picture_CHW.is_floating_point():
        picture_CHW = grey_levels(picture_CHW)
    pixels, key = picture_CHW.cpu().numpy().tobytes(), (seed & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
    return int.from_bytes(blake2b(pixels, digest_size=4, key=key, person=use).digest(), "little")


def grey_levels(pixels: Tensor) -> Tensor:
    """Floats in [0, 1] as the nearest of 256 levels, uint8."""
    return (255 * pixels.detach().float()).round().byte()
