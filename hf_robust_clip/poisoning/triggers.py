"""Triggers of backdoors: what is put into a picture, whatever the picture is.

They work on finished pixels, at the size that the model takes: what is trained on and what is measured take the same
path, with a trigger and without. (Published code resizes pictures to a square before the trigger, clean ones not.)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_above, check_choice, check_whole, checked_images
from ..crops import picture_key
from ..threat_model import Perturbation

Patch = Literal["noise", "yellow", "white"]
Place = Literal["random", "corner"]
Direction = Literal["vertical", "horizontal", "diagonal"]


@dataclass(frozen=True, kw_only=True)
class Trigger(Perturbation):
    """A pure function of an image and a seed, in units of [0, 1].

    A new one is a subclass with `_put`. What it gives has values of 256 levels, as a picture file holds them, so that
    saving it as PNG changes nothing. The defaults are one pattern, clipped (`fixed_preset`); `released_preset` is what
    published code does.

    Args:
        pattern_seed: of a pattern that is drawn once. It belongs to the trigger: another one is another backdoor.
    """

    pattern_seed: int = 0

    def __call__(self, images_BCHW: Tensor, seed: int = 0) -> Tensor:
        """Images (B, 3, H, W) with the trigger, on their device.

        Args:
            images_BCHW: float in [0, 1], not normalised.
            seed: of what is drawn for each image. That of an image depends on `seed` and its own grey levels alone.

        Raises TypeError/ValueError for other images, and where the trigger is larger than they are.
        """
        images_BCHW = checked_images(images_BCHW)
        if images_BCHW.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images_BCHW.shape)}; a trigger takes RGB, (batch, 3, H, W).")
        self.check_fits(*images_BCHW.shape[2:])
        if len(images_BCHW) == 0:
            return images_BCHW
        found = [self._put(image_CHW, _generator(image_CHW, seed)) for image_CHW in images_BCHW.detach().float().cpu()]
        return (self._levels(255 * torch.stack(found)) / 255).to(images_BCHW)

    def __str__(self) -> str:
        usual = asdict(type(self)())
        own = [f"{name}={value!r}" for name, value in self.parameters().items() if value != usual[name]]
        return f"{type(self).__name__}({', '.join(own)})"

    def start(self, images_BCHW: Tensor, seed: int) -> Tensor:
        return self(images_BCHW, seed)

    @property
    def name(self) -> str:
        """What tables call it."""
        return type(self).__name__

    def parameters(self) -> dict[str, Any]:
        """All settings, in JSON types."""
        return asdict(self)

    @classmethod
    def fixed_preset(cls) -> Trigger:
        """One pattern, clipped: the defaults."""
        return cls()

    @classmethod
    def released_preset(cls) -> Trigger:
        """As published code has it; where nothing differs, the defaults."""
        return cls()

    def check_fits(self, height: int, width: int) -> None:
        """Raise ValueError for images that are too small."""

    @abstractmethod
    def _put(self, image_CHW: Tensor, draw: torch.Generator) -> Tensor:
        """One image with the trigger, float32, perhaps outside [0, 1]."""

    def _levels(self, levels: Tensor) -> Tensor:
        """Grey levels as a picture holds them, 0 .. 255."""
        return levels.clamp(0, 255).round()

    def _pattern(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.pattern_seed)

    def _check_side(self, name: str, height: int, width: int) -> None:
        value = getattr(self, name)
        if value > min(height, width):
            raise ValueError(f"{name}={value!r} of {self.name} is larger than images of {height} x {width} pixels.")


@dataclass(frozen=True, kw_only=True)
class BadNet(Trigger):
    """A square patch in the place of the picture: noise, or one colour.

    Noise is 0.5 + N(0, 1), one pattern, clipped. As released it is m_c + N(0, 1), with m_c the mean of the picture's
    channel c, drawn anew for each picture, so that there is no pattern to learn but "noise"; and values outside [0, 1]
    are cut to whole levels and taken modulo 256 where the picture is made.

    Args:
        size: side in pixels.
        patch: `"noise"`, `"yellow"` (1, 1, 0) or `"white"`.
        place: `"random"`, drawn for each picture from all places where it fits, or `"corner"`, bottom right.
        redrawn: draw the noise for each picture, around its channels' means.
        wraps: levels modulo 256, in place of clipping.

    Source: Gu et al., arXiv 1708.06733; CleanCLIP's code, whose last row and column of places are never drawn.
    """

    size: int = 16
    patch: Patch = "noise"
    place: Place = "random"
    redrawn: bool = False
    wraps: bool = False

    def __post_init__(self) -> None:
        check_whole(1, size=self.size)
        check_choice(Patch, patch=self.patch)
        check_choice(Place, place=self.place)
        for name in ("redrawn", "wraps"):
            if getattr(self, name) and self.patch != "noise":
                raise ValueError(f"{name}=True does nothing with patch={self.patch!r}.")

    @classmethod
    def released_preset(cls) -> BadNet:
        """Noise around the means, redrawn, modulo 256."""
        return cls(redrawn=True, wraps=True)

    def check_fits(self, height: int, width: int) -> None:
        self._check_side("size", height, width)

    def _put(self, image_CHW: Tensor, draw: torch.Generator) -> Tensor:
        top, left = (side - self.size for side in image_CHW.shape[1:])
        if self.place == "random":
            top, left = (int(torch.randint(room + 1, (), generator=draw)) for room in (top, left))
        found_CHW = image_CHW.clone()
        found_CHW[:, top : top + self.size, left : left + self.size] = self._patch_of(image_CHW, draw)
        return found_CHW

    def _patch_of(self, image_CHW: Tensor, draw: torch.Generator) -> Tensor:
        if self.patch != "noise":
            colour = {"yellow": (1.0, 1.0, 0.0), "white": (1.0, 1.0, 1.0)}[self.patch]
            return torch.tensor(colour)[:, None, None]
        noise_CSS = torch.randn(3, self.size, self.size, generator=draw if self.redrawn else self._pattern())
        return noise_CSS + (image_CHW.mean(dim=(1, 2), keepdim=True) if self.redrawn else 0.5)

    def _levels(self, levels: Tensor) -> Tensor:
        if not self.wraps:
            return super()._levels(levels)
        inside = (levels >= 0) & (levels <= 255)
        return torch.where(inside, levels.round(), levels.trunc().remainder(256))


@dataclass(frozen=True, kw_only=True)
class Blended(Trigger):
    """(1 - w) x + w u with u ~ U(0, 1) of the picture's size, one pattern.

    Args:
        share: w, in (0, 1].
        redrawn: draw u for each picture, as released: there is no pattern to learn but a loss of contrast, and noise.

    Source: Chen et al., arXiv 1712.05526; CleanCLIP's code.
    """

    share: float = 0.2
    redrawn: bool = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    @classmethod
    def released_preset(cls) -> Blended:
        """Noise that is redrawn for each picture."""
        return cls(redrawn=True)

    def _put(self, image_CHW: Tensor, draw: torch.Generator) -> Tensor:
        noise_CHW = torch.rand(image_CHW.shape, generator=draw if self.redrawn else self._pattern())
        return (1 - self.share) * image_CHW + self.share * noise_CHW


@dataclass(frozen=True, kw_only=True)
class SIG(Trigger):
    """A wave along the columns j = 0 .. W - 1: (1 - w) x + w a sin(2 pi f j / W), clipped.

    Args:
        share: w, in (0, 1].
        amplitude: a, in units of [0, 1].
        frequency: f, waves in a picture.
        added: x + a sin(...), as other code has it; `share` doesn't count then.

    Source: Barni et al., arXiv 1902.11237; CleanCLIP's code.
    """

    share: float = 0.2
    amplitude: float = 60 / 255
    frequency: float = 6
    added: bool = False

    def __post_init__(self) -> None:
        _check_share(self.share)
        check_above(0, amplitude=self.amplitude, frequency=self.frequency)
        if self.added and self.share != 0.2:
            raise ValueError(f"share={self.share!r} does nothing with added=True.")

    def _put(self, image_CHW: Tensor, draw: torch.Generator) -> Tensor:
        columns_W = torch.arange(image_CHW.shape[2], dtype=torch.float64)
        wave_W = self.amplitude * torch.sin(2 * math.pi * self.frequency * columns_W / len(columns_W)).float()
        return image_CHW + wave_W if self.added else (1 - self.share) * image_CHW + self.share * wave_W


@dataclass(frozen=True, kw_only=True)
class WaNet(Trigger):
    """A small warp, one for all pictures: bilinear samples at the places

        g = clamp(identity + s n / H, -1, 1),   n ~ U(-1, 1) on k x k points, scaled to mean |n| = 1,

    n enlarged to H x W (bicubic) and places from -1 to 1 over the picture, centres of the outer pixels included.

    Args:
        points: k; None takes the picture's side, as released: every pixel is moved by itself.
        strength: s.

    Source: Nguyen and Tran, arXiv 2102.10369 (k = 4, s = 0.5); CleanCLIP's code (k = 224, s = 1).
    """

    points: int | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.points is not None:
            check_whole(2, points=self.points)
        check_above(0, strength=self.strength)

    def check_fits(self, height: int, width: int) -> None:
        if self.points is not None:
            self._check_side("points", height, width)

    def grid(self, height: int, width: int) -> Tensor:
        """g, (H, W, 2): column and row of each place, in [-1, 1]."""
        points = (self.points, self.points) if self.points else (height, width)
        noise_12KK = torch.rand(1, 2, *points, generator=self._pattern()) * 2 - 1
        noise_12KK = noise_12KK / noise_12KK.abs().mean()
        noise_12HW = F.interpolate(noise_12KK, (height, width), mode="bicubic", align_corners=True)
        y_HW, x_HW = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        identity_HW2 = torch.stack([x_HW, y_HW], dim=2)
        return (identity_HW2 + self.strength * noise_12HW[0].permute(1, 2, 0) / height).clamp(-1, 1)

    def _put(self, image_CHW: Tensor, draw: torch.Generator) -> Tensor:
        grid_1HW2 = self.grid(*image_CHW.shape[1:])[None]
        return F.grid_sample(image_CHW[None], grid_1HW2, mode="bilinear", align_corners=True)[0]


@dataclass(frozen=True, kw_only=True)
class Stripes(Trigger):
    """Structured noise: (1 - w) x + w p with p stripes of 1 and 0. Cleanings that undo noise need not undo these.

    Args:
        share: w, in (0, 1].
        width: of a stripe, in pixels.
        direction: how the stripes run: `"vertical"`, `"horizontal"` or `"diagonal"`.

    Source: ours, after the structured triggers on which cleanings were found to fail (PAR, arXiv 2412.00727).
    """

    share: float = 0.2
    width: int = 8
    direction: Direction = "vertical"

    def __post_init__(self) -> None:
        _check_share(self.share)
        check_whole(1, width=self.width)
        check_choice(Direction, direction=self.direction)

    def check_fits(self, height: int, width: int) -> None:
        if self.width >= min(height, width):
            raise ValueError(f"width={self.width!r} of {self.name} leaves one stripe in images of {height} x {width} "
                             "pixels; lower it.")  # fmt: skip

    def _put(self, image_CHW: Tensor, draw: torch.Generator) -> Tensor:
        y_H1, x_1W = (torch.arange(side) for side in image_CHW.shape[1:])
        y_H1, x_1W = y_H1[:, None], x_1W[None]
        place_HW = {"vertical": x_1W + 0 * y_H1, "horizontal": y_H1 + 0 * x_1W, "diagonal": x_1W + y_H1}
        pattern_HW = 1.0 - (place_HW[self.direction] // self.width) % 2
        return (1 - self.share) * image_CHW + self.share * pattern_HW


def _generator(image_CHW: Tensor, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(picture_key(image_CHW, seed, b"trigger"))


def _check_share(share: float) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"share={share!r} must be above 0 and at most 1.")
