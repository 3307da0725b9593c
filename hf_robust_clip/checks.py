"""What may come in from outside: images, labels, logits. Each is looked at once, where it enters."""

from __future__ import annotations

import logging
import math
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

NO_GRADIENT = (
    "the model's logits carry no gradient by the pixels, so nothing can be attacked by it: is the model quantised, or "
    "its forward under no_grad? Attack the model in floating point, or by queries (Square)."
)
logger = logging.getLogger(__name__)
BLIND_ABOVE = 0.05  # share of input gradients that are exactly zero, from which on a robust accuracy may mean nothing
QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
ROUNDING = 1e-6  # by how much the arithmetic of somebody's own pipeline may leave the range of pixels


def checked_images(images_BCHW: Any, name: str = "images", bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """The images; what rounding carried beyond `bounds` (by at most 1e-6) is brought back to them.

    Raises TypeError/ValueError unless they are a finite float tensor (B, C, H, W) within `bounds`.
    """
    if not isinstance(images_BCHW, Tensor) or not images_BCHW.is_floating_point():
        kind = images_BCHW.dtype if isinstance(images_BCHW, Tensor) else type(images_BCHW).__name__
        raise TypeError(f"{name} must be a floating-point tensor in {list(bounds)}, got {kind}.")
    if images_BCHW.dim() != 4:
        raise ValueError(f"{name} must have shape (batch, channels, height, width), got {tuple(images_BCHW.shape)}.")
    if images_BCHW.numel() == 0:
        return images_BCHW
    low, high = (value.item() for value in torch.aminmax(images_BCHW.detach()))
    if math.isnan(low) or math.isnan(high):
        raise ValueError(f"{name} contain NaN.")
    if bounds[0] <= low and high <= bounds[1]:
        return images_BCHW
    if low < bounds[0] - ROUNDING or high > bounds[1] + ROUNDING:
        raise ValueError(
            f"{name} have values in [{low:.7g}, {high:.7g}], outside {list(bounds)}. "
            "Did you normalise them or leave them in 0..255? Normalisation is inside the model."
        )
    return images_BCHW.clamp(*bounds)


def checked_labels(
    labels_B: Any, num_images: int | None = None, num_classes: int | None = None, name: str = "labels"
) -> Tensor:
    """The labels as int64 (B,), on the device where they are: from any kind of integers, and from floats that are
    whole numbers, in a tensor, an array or a list, of shape (B,) or (B, 1).

    Args:
        num_images: how many there must be; None doesn't ask.
        num_classes: they must lie in 0 .. num_classes - 1; None doesn't ask.

    Raises TypeError for what holds no numbers, ValueError for another shape or number, for a fraction, and for a
    label out of range.
    """
    if isinstance(labels_B, Tensor):
        labels = labels_B
    else:
        array = np.asarray(labels_B)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name} must be class indices, whole numbers, got {_kind(labels_B)}.")
        labels = torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))
    if labels.is_complex():
        raise TypeError(f"{name} must be class indices, whole numbers, got {labels.dtype}.")
    shape = tuple(labels.shape)
    if labels.dim() == 2 and shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.dim() != 1 or (num_images is not None and len(labels) != num_images):
        expected = f"({num_images},)" if num_images is not None else "(batch,)"
        raise ValueError(f"{name} have shape {shape}, expected {expected}: one class index for each image.")
    if len(labels) == 0:
        return labels.long()
    if labels.is_floating_point():
        odd = ~(labels == labels.round())  # of NaN too
        if odd.any() or labels.isinf().any():
            value = labels[odd | labels.isinf()][0].item()
            raise ValueError(f"{name} hold {value!r}, which is no class index; give whole numbers.")
    labels = labels.long()
    if num_classes is not None:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{name} lie in {low} .. {high}, but there are {num_classes} classes (0 .. {num_classes - 1})."
            )
    return labels


def check_whole(least: int, **given: Any) -> None:
    """Raise ValueError for a value that is no whole number, or below `least`."""
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def check_least(least: float, **given: float) -> None:
    """Raise ValueError for a number below `least`, or none at all (NaN)."""
    for name, value in given.items():
        if not value >= least:
            raise ValueError(f"{name}={value!r} must be at least {least:g}.")


def check_above(least: float, **given: float) -> None:
    """Raise ValueError unless every number is finite and above `least`."""
    for name, value in given.items():
        if not (isinstance(value, int | float) and least < value < math.inf):
            raise ValueError(f"{name}={value!r} must be above {least}.")


def check_choice(kind: Any, **given: Any) -> None:
    """Raise ValueError for a value that isn't one of a `Literal`'s."""
    for name, value in given.items():
        if value not in get_args(kind):
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(str, get_args(kind)))}.")


def _kind(value: Any) -> str:
    first = next(iter(value), None) if isinstance(value, list | tuple) else None
    return type(value).__name__ if first is None else f"a {type(value).__name__} of {type(first).__name__}"


def check_logits(logits_BC: Tensor, who: str = "the classifier") -> None:
    """Raise FloatingPointError unless every logit is finite: NaN has no largest value, so it would name class 0."""
    finite = logits_BC.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        count = f"{int((~finite).sum())} of {len(finite)} images"
        raise FloatingPointError(f"{who} gives logits that are not finite for {count}; look for NaN, or use float32.")


def check_differentiable(model: nn.Module) -> None:
    """Raise ValueError for a model with quantised layers: what passes beside them (a residual, a projection) has a
    gradient still, by which an attack would be weak.
    """
    if any(type(module).__module__.startswith(QUANTISED) for module in model.modules()):
        raise ValueError(NO_GRADIENT)


class Blindness:
    """Counts the entries of gradients (any shape) that are exactly zero or not finite, as an `on_gradient`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._zeros: Tensor | int = 0  # on the device: an attack's steps don't wait for it
        self.total = 0

    def __call__(self, grad: Tensor) -> None:
        self._zeros = self._zeros + ((grad == 0) | ~grad.isfinite()).sum()
        self.total += grad.numel()

    @property
    def zeros(self) -> int:
        """How many were zero or not finite."""
        return int(self._zeros)

    @property
    def share(self) -> float:
        """In [0, 1]; 0 where nothing was counted."""
        return self.zeros / max(self.total, 1)

    def warn(self, attack: str) -> None:
        """Log it where more than a few percent say nothing."""
        if self.share > BLIND_ABOVE:
            logger.warning(
                "%s was (partly) blind, and its robust accuracy may mean nothing: %.1f %% of its input gradients were "
                "zero, or not finite", attack, 100 * self.share,
            )  # fmt: skip
