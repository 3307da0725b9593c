"""Whether a model was right in the end on each image of an evaluation, kept in few characters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outcomes:
    """Verdicts on N images, in the order of the dataset.

    Args:
        images: digest of the pictures and labels in their order: outcomes of two models are pairs where it is the
            same.
        right: by radius in units of [0, 1] as text, `"0.0"` for clean, hexadecimal digits of N bits, of which the
            first image has the highest; 1 where the model was right. The last byte is filled up with zeros.

    Raises ValueError for what is no radius, and for texts that are no whole bytes.
    """

    images: str
    right: Mapping[str, str]

    def __post_init__(self) -> None:
        for eps, digits in self.right.items():
            try:
                is_radius = 0 <= float(eps) < math.inf
                bytes.fromhex(digits)
            except (TypeError, ValueError) as error:
                raise ValueError(f"outcomes.right[{eps!r}]={digits!r} must be hexadecimal, by a radius.") from error
            if not is_radius:
                raise ValueError(f"outcomes.right has the radius {eps!r}; it must be at least 0.")

    @property
    def radii(self) -> list[float]:
        """At which there are outcomes, ascending, 0 for clean."""
        return sorted(map(float, self.right))

    def at(self, eps: float, count: int) -> np.ndarray:
        """Whether the model was right on each image at a radius in units of [0, 1], 0 for clean: (count,) bool.

        Raises ValueError for a radius that isn't there, and for outcomes of another number of images.
        """
        for radius, digits in self.right.items():
            if math.isclose(float(radius), eps):
                bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)).astype(bool)
                if len(bits) != 8 * -(-count // 8) or bits[count:].any():
                    raise ValueError(f"outcomes.right[{radius!r}] are not those of {count} images.")
                return bits[:count]
        raise ValueError(f"eps={eps!r} has no outcomes; there are some at {self.radii}.")


def make_outcomes(images: str, right: Mapping[float, np.ndarray]) -> Outcomes:
    """Outcomes from (N,) bool by radius, 0 for clean."""
    return Outcomes(images, {repr(float(eps)): np.packbits(own).tobytes().hex() for eps, own in sorted(right.items())})
