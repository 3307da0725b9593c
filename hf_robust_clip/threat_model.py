"""What may be done to images: the set of perturbations that an attack may use, and what reports know of any.

Shape suffixes in this package: B images, C channels (or classes, where said), H height, W width, D embedding width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, checked_images

Norm = Literal["linf", "l2"]


def parse_radius(value: float | str, name: str = "eps") -> float:
    """A radius in units of [0, 1] from a number or a text such as `"4/255"`, `"0.5"`.

    Raises ValueError if the text is no number or fraction, or the radius is negative or not finite.
    """
    try:
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            radius = float(numerator) / float(denominator)
        else:
            radius = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError(f"{name}={value!r} is not a number or a fraction; write it like '1/255' or 0.5.") from None
    if not math.isfinite(radius) or radius < 0:
        raise ValueError(f"{name}={value!r} must be finite and at least 0.")
    return radius


class Perturbation(ABC):
    """A change of images that a report names by `str()`: a norm ball, which an attack searches, or a trigger, which is
    the same whatever the model.
    """

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def start(self, images_BCHW: Tensor, seed: int) -> Tensor:
        """Changed images, before any search: a function of each image and `seed` alone, in the range of pixels."""


@dataclass(frozen=True)
class ThreatModel(Perturbation):
    """All images x' with ||x' - x|| <= eps and every pixel of x' within `bounds`.

    Args:
        eps: radius in pixel units of [0, 1], before mean/std normalisation: a float or a fraction such as `"4/255"`
            (1/255 is one grey level).
        norm: `"linf"` (largest change of any value) or `"l2"` (Euclidean length over all values of one image).
        bounds: lowest and highest value of a pixel.

    Raises ValueError for an unknown norm, a negative or unparsable radius, and an L-inf radius of 1 or more.
    """

    eps: float
    norm: Norm = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_choice(Norm, norm=self.norm)
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"bounds={self.bounds!r} must be (low, high) with low < high.")
        eps = parse_radius(self.eps)
        if self.norm == "linf" and eps >= high - low:
            raise ValueError(f"eps={self.eps!r} covers the whole pixel range; {eps:g} grey levels are '{eps:g}/255'.")
        object.__setattr__(self, "eps", eps)

    def __str__(self) -> str:
        return f"{'L-inf' if self.norm == 'linf' else 'L2'} eps={self.radius}"

    @property
    def radius(self) -> str:
        """The radius as people write it: `"4/255"` for whole grey levels of L-inf, else a decimal number."""
        levels = self.eps * 255
        whole = math.isclose(levels, round(levels), rel_tol=1e-6)
        return f"{round(levels)}/255" if whole and self.norm == "linf" else f"{self.eps:.4g}"

    def checked(self, images_BCHW: Tensor) -> Tensor:
        """The images, if they can be attacked: finite, within `bounds` (rounding brought back), in float32 or finer.

        Raises TypeError for what is no tensor of such floats (a step in half precision leaves the ball), ValueError
        for another shape, values outside, and an L2 radius that reaches every image there is.
        """
        images_BCHW = checked_images(images_BCHW, bounds=self.bounds)
        if images_BCHW.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"images are {images_BCHW.dtype}, too coarse for an attack: give images.float().")
        whole = (self.bounds[1] - self.bounds[0]) * math.sqrt(images_BCHW[:1].numel())
        if self.norm == "l2" and len(images_BCHW) and self.eps >= whole:
            raise ValueError(f"eps={self.eps:g} reaches every image (the furthest: {whole:.4g}); give less.")
        return images_BCHW

    def project(self, adv_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        """Carry each image to the ball around its original, then to `bounds`.

        L-inf: clamp(x', x - eps, x + eps). L2: x + (x' - x) * min(1, eps / ||x' - x||_2). Clamping to the bounds
        afterwards never leaves the ball, since the original lies within them.
        """
        if self.norm == "linf":
            adv_BCHW = torch.minimum(torch.maximum(adv_BCHW, images_BCHW - self.eps), images_BCHW + self.eps)
        else:
            delta_BCHW = adv_BCHW - images_BCHW
            length_B111 = _length(delta_BCHW)
            shrink_B111 = (self.eps / length_B111.clamp_min(torch.finfo(adv_BCHW.dtype).tiny)).clamp_max(1)
            adv_BCHW = images_BCHW + delta_BCHW * shrink_B111
        return adv_BCHW.clamp(*self.bounds)

    def ascend(self, adv_BCHW: Tensor, grad_BCHW: Tensor, images_BCHW: Tensor, step_size: float | Tensor) -> Tensor:
        """One projected step of steepest ascent: x' + a*sign(g) for L-inf, x' + a*g/||g||_2 for L2.

        The step size a is one number or one per image, (B, 1, 1, 1).
        A value (L-inf) or an image (L2) whose gradient is exactly zero stays where it is. NaN counts as zero, an
        infinite value as the largest there is.
        """
        grad_BCHW = grad_BCHW.nan_to_num()
        if self.norm == "linf":
            direction_BCHW = grad_BCHW.sign()
        else:
            tiny = torch.finfo(grad_BCHW.dtype).tiny
            largest_B111 = grad_BCHW.abs().amax(dim=(1, 2, 3), keepdim=True)
            grad_BCHW = grad_BCHW / largest_B111.clamp_min(tiny)  # squares of small gradients would underflow
            direction_BCHW = grad_BCHW / _length(grad_BCHW).clamp_min(tiny)
        return self.project(adv_BCHW + step_size * direction_BCHW, images_BCHW)

    def distance(self, adv_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        """||x' - x|| of each image in this norm, shape (B,)."""
        delta_BCHW = adv_BCHW - images_BCHW
        if self.norm == "linf":
            return delta_BCHW.abs().amax(dim=(1, 2, 3))
        return _length(delta_BCHW).flatten()

    @property
    def reach(self) -> float:
        """The radius, with what rounding in float32 may add."""
        return self.eps * (1 + 1e-4) + 1e-7

    def contains(self, adv_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        """Whether each image lies in the ball around its original and within `bounds`, up to rounding, (B,)."""
        low, high = self.bounds
        within_B = ((adv_BCHW >= low) & (adv_BCHW <= high)).flatten(1).all(dim=1)
        return within_B & (self.distance(adv_BCHW, images_BCHW) <= self.reach)

    def start(self, images_BCHW: Tensor, seed: int) -> Tensor:
        """`random_start`."""
        return self.random_start(images_BCHW, seed)

    def random_start(self, images_BCHW: Tensor, seed: int) -> Tensor:
        """A point drawn uniformly from the ball around each image, then clamped to `bounds`.

        The draw of an image depends on `seed` and on that image's own pixels alone: not on its batch, its place in it,
        the number of processes or any global random state. (L2: a Gaussian direction and the radius eps * u^(1/d) with
        d values per image.)
        """
        if self.eps == 0:
            return images_BCHW.detach().clone()
        generator = torch.Generator(images_BCHW.device)
        delta_BCHW = torch.empty(images_BCHW.shape, device=images_BCHW.device)
        for key, delta_CHW in zip(_image_keys(images_BCHW, seed), delta_BCHW, strict=True):
            generator.manual_seed(key)
            if self.norm == "linf":
                delta_CHW.uniform_(-self.eps, self.eps, generator=generator)
            else:
                radius = torch.rand(1, device=delta_CHW.device, generator=generator) ** (1 / delta_CHW.numel())
                delta_CHW.normal_(generator=generator)
                delta_CHW.mul_(self.eps * radius / torch.linalg.vector_norm(delta_CHW))
        return self.project(images_BCHW + delta_BCHW.to(images_BCHW), images_BCHW)


def _length(delta_BCHW: Tensor) -> Tensor:
    return torch.linalg.vector_norm(delta_BCHW, dim=(1, 2, 3), keepdim=True)


def _image_keys(images_BCHW: Tensor, seed: int) -> list[int]:
    """A 32-bit random seed for each image, from its float32 bits and `seed`."""
    bits_BN = images_BCHW.detach().float().contiguous().flatten(1).view(torch.int32).long()
    weights_N = _mix(torch.arange(bits_BN.shape[1], device=bits_BN.device) + 0x9E3779B9)
    key_B = (bits_BN * weights_N).sum(dim=1)  # integers: the same in any order; overflow wraps around
    key_B = _mix(key_B ^ (key_B >> 32))
    for word in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF):
        key_B = _mix(key_B + word)
    return key_B.tolist()


def _mix(value: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers (xor-shift and multiply), held in int64."""
    value = value & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return value ^ (value >> 15)
