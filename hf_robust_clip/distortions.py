"""Random changes of the training pictures' views beside crops: their colours, and parts that are erased."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .crops import DRAWS, RandomResizedCrop, picture_key

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue
COLOUR_DRAWS = 10  # numbers that an image's colours take: whether to jitter, four factors, their order, whether grey
ERASING_DRAWS = 1 + DRAWS


@dataclass(frozen=True)
class ColourDistortion:
    """Colours that change at random: SimCLR's, in the definitions of torchvision's ColorJitter and RandomGrayscale.

    With probability `jitter` four changes are made, in random order, each with a draw of its own and clamped to
    [0, 1]. G is 0.2989 red + 0.587 green + 0.114 blue:

        brightness  f x                            f ~ U(max(0, 1 - brightness), 1 + brightness)
        contrast    f x + (1 - f) mean_hw G        likewise
        saturation  f x + (1 - f) G                likewise
        hue         HSV's hue + f, of a turn       f ~ U(-hue, hue)

    Then, with probability `greyscale`, all three channels become G.

    Args:
        jitter: probability.
        brightness, contrast, saturation: at least 0.
        hue: share of a turn, in [0, 0.5].
        greyscale: probability.

    Raises ValueError for numbers out of range.
    """

    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    greyscale: float = 0.0

    def __post_init__(self) -> None:
        _check_range(1, jitter=self.jitter, greyscale=self.greyscale)
        _check_range(0.5, hue=self.hue)
        _check_range(math.inf, brightness=self.brightness, contrast=self.contrast, saturation=self.saturation)

    def __call__(self, images_BCHW: Tensor, draws_BR: Tensor) -> Tensor:
        """The images (B, 3, H, W), floats in [0, 1], with other colours.

        Args:
            draws_BR: (B, COLOUR_DRAWS) of U[0, 1), on the CPU; an image's follow its own row alone.
        """
        jittered_B, factors_B4 = draws_BR[:, 0] < self.jitter, self._factors(draws_BR[:, 1:5])
        order_B4 = draws_BR[:, 5:9].argsort(dim=1)
        found_BCHW = images_BCHW.clone()
        for place in range(4):
            for change, function in enumerate(_CHANGES):
                _put(found_BCHW, jittered_B & (order_B4[:, place] == change), function, factors_B4[:, change])
        _put(found_BCHW, draws_BR[:, 9] < self.greyscale, lambda rows, _: grey(rows).expand_as(rows), factors_B4[:, 0])
        return found_BCHW

    def _factors(self, draws_B4: Tensor) -> Tensor:
        strengths = (self.brightness, self.contrast, self.saturation)
        low_4 = draws_B4.new_tensor([*(max(0.0, 1 - strength) for strength in strengths), -self.hue])
        high_4 = draws_B4.new_tensor([*(1 + strength for strength in strengths), self.hue])
        return low_4 + draws_B4 * (high_4 - low_4)


@dataclass(frozen=True)
class RandomErasing:
    """A random box of an image, filled with black: it covers U(scale) of the image, with log(width / height) uniform
    between the logs of `ratio`, anywhere in it. Torchvision's RandomErasing, of images that aren't normalised.

    Args:
        erasing: probability.
        scale: least and largest share of the image's area, 0 < least <= largest <= 1.
        ratio: least and largest width / height.

    Raises ValueError for bounds that are out of range or not in order.
    """

    erasing: float = 0.0
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        _check_range(1, erasing=self.erasing)
        RandomResizedCrop(self.scale, self.ratio)

    def __call__(self, images_BCHW: Tensor, draws_BR: Tensor) -> Tensor:
        """The images (B, C, H, W), with boxes erased.

        Args:
            draws_BR: (B, ERASING_DRAWS) of U[0, 1), on the CPU; an image's follow its own row alone.
        """
        height, width = images_BCHW.shape[-2:]
        boxes_B4, _ = RandomResizedCrop(self.scale, self.ratio).boxes(height, width, draws_BR[:, 1:])
        top_B1, left_B1, tall_B1, wide_B1 = boxes_B4.split(1, dim=1)
        y_H, x_W = torch.arange(height), torch.arange(width)
        rows_BH = (top_B1 <= y_H) & (y_H < top_B1 + tall_B1) & (draws_BR[:, :1] < self.erasing)
        columns_BW = (left_B1 <= x_W) & (x_W < left_B1 + wide_B1)
        erased_B1HW = (rows_BH[:, :, None] & columns_BW[:, None])[:, None]
        return images_BCHW.masked_fill(erased_B1HW.to(images_BCHW.device), 0)


@dataclass(frozen=True)
class Augmentation:
    """What becomes of whole pictures in training: a random crop, then its colours, then a part of it erased."""

    crop: RandomResizedCrop = field(default_factory=RandomResizedCrop)
    colours: ColourDistortion = field(default_factory=ColourDistortion)
    erasing: RandomErasing = field(default_factory=RandomErasing)

    def __call__(self, pictures: Sequence[Tensor], size: int, seed: int) -> Tensor:
        """One view of each picture: float32 (B, 3, size, size) in [0, 1], on the pictures' device.

        The draws of a picture depend on `seed` and on its own pixels, to the grey level, alone. A crop is the same
        whatever is done to it afterwards. Arguments and errors are those of `RandomResizedCrop`.
        """
        views_BCHW = self.crop(pictures, size, seed)
        if not (self.colours.jitter or self.colours.greyscale or self.erasing.erasing):
            return views_BCHW
        draws_BR = torch.stack([_draws(picture, seed) for picture in pictures])
        coloured_BCHW = self.colours(views_BCHW, draws_BR[:, :COLOUR_DRAWS])
        return self.erasing(coloured_BCHW, draws_BR[:, COLOUR_DRAWS:])


def brightened(images_BCHW: Tensor, factors_B: Tensor) -> Tensor:
    """f x, clamped to [0, 1]."""
    return _blend(images_BCHW, torch.zeros_like(images_BCHW), factors_B)


def contrasted(images_BCHW: Tensor, factors_B: Tensor) -> Tensor:
    """f x + (1 - f) m, clamped to [0, 1], with m the mean of an image's greys."""
    return _blend(images_BCHW, grey(images_BCHW).mean(dim=(1, 2, 3), keepdim=True), factors_B)


def saturated(images_BCHW: Tensor, factors_B: Tensor) -> Tensor:
    """f x + (1 - f) g, clamped to [0, 1], with g the grey of each pixel."""
    return _blend(images_BCHW, grey(images_BCHW), factors_B)


def turned(images_BCHW: Tensor, factors_B: Tensor) -> Tensor:
    """The images with f, in turns, added to the hue of each pixel (HSV); saturation and value stay."""
    value_B1HW, low_B1HW = images_BCHW.amax(1, keepdim=True), images_BCHW.amin(1, keepdim=True)
    chroma_B1HW = value_B1HW - low_B1HW
    red, green, blue = ((value_B1HW - images_BCHW) / chroma_B1HW.clamp_min(1e-12)).split(1, dim=1)
    is_red, is_green = (images_BCHW[:, i : i + 1] == value_B1HW for i in (0, 1))
    sixths_B1HW = torch.where(is_red, blue - green, torch.where(is_green, 2 + red - blue, 4 + green - red))
    hue_B1HW = (sixths_B1HW / 6 + _each(factors_B, images_BCHW)) % 1
    offsets_3 = images_BCHW.new_tensor([5, 3, 1]).view(1, 3, 1, 1)  # of red, green and blue, in sixths of a turn
    place_BCHW = (offsets_3 + 6 * hue_B1HW) % 6
    return value_B1HW - chroma_B1HW * torch.minimum(place_BCHW, 4 - place_BCHW).clamp(0, 1)


def grey(images_BCHW: Tensor) -> Tensor:
    """0.2989 red + 0.587 green + 0.114 blue, (B, 1, H, W)."""
    return (images_BCHW * images_BCHW.new_tensor(GREY_WEIGHTS).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


_CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brightened, contrasted, saturated, turned)


def _blend(images_BCHW: Tensor, others: Tensor, factors_B: Tensor) -> Tensor:
    factors_B111 = _each(factors_B, images_BCHW)
    return (factors_B111 * images_BCHW + (1 - factors_B111) * others).clamp(0, 1)


def _each(factors_B: Tensor, images_BCHW: Tensor) -> Tensor:
    return factors_B.to(images_BCHW)[:, None, None, None]


def _put(images_BCHW: Tensor, chosen_B: Tensor, change: Callable[[Tensor, Tensor], Tensor], factors_B: Tensor) -> None:
    """Change the chosen images in place."""
    if chosen_B.any():
        rows = chosen_B.nonzero().squeeze(1)
        images_BCHW[rows.to(images_BCHW.device)] = change(images_BCHW[rows.to(images_BCHW.device)], factors_B[rows])


def _draws(picture_CHW: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(picture_key(picture_CHW, seed, b"distortions"))
    return torch.rand(COLOUR_DRAWS + ERASING_DRAWS, generator=generator, dtype=torch.float64)


def _check_range(most: float, **given: float) -> None:
    for name, value in given.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value <= most
            or value == math.inf
        ):
            raise ValueError(f"{name}={value!r} must be {'at least 0' if most == math.inf else f'in [0, {most:g}]'}.")
