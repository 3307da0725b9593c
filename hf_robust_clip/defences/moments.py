"""Moments of what the layers of an image encoder read.

Shapes: N images, L layers, T tokens of an image (class token if there is one, patches, prompts), D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import ZeroShotClassifier
from ..prompts.access import plain_layer


@contextmanager
def layer_inputs(classifier: ZeroShotClassifier) -> Iterator[list[Tensor]]:
    """A list that every forward of the image encoder fills anew: what its layers read, L tensors (N, T, D).

    They are the hidden states with the layer's prompts in their place, before its layer norm, with their graph; the
    first comes out of what stands before the layers (CLIP's `pre_layrnorm`).
    """
    found: list[Tensor] = []
    layers = [plain_layer(layer) for layer in classifier.image_layers]

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if layer is layers[0]:
            found.clear()
        found.append(args[0])

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class VisionStatistics:
    """Moments over images of what each layer of an image encoder reads: see `layer_inputs`.

    Args:
        mean: (L, T, D).
        variance: (L, T, D), with divisor `count`.
        count: number of images.
        record: what they were made from and with, in JSON types; see `fit.collect_statistics`.

    Raises ValueError for shapes that differ or aren't (L, T, D), no images, and values that aren't finite.
    """

    mean: Tensor
    variance: Tensor
    count: int
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mean.dim() != 3 or self.mean.shape != self.variance.shape:
            raise ValueError(
                f"mean {tuple(self.mean.shape)} and variance {tuple(self.variance.shape)} must both have the shape "
                "(layers, tokens, width)."
            )
        if self.count < 1:
            raise ValueError(f"count={self.count!r}: statistics need at least one image.")
        if not (self.mean.isfinite().all() and self.variance.isfinite().all()):
            raise ValueError("mean or variance has values that aren't finite; check the weights that they come from.")


class RunningMoments:
    """Mean and sum of squared deviations in float64, of all images seen so far.

    Groups of n_a and n_b images merge as mean = m_a + d n_b / n, squares = s_a + s_b + d^2 n_a n_b / n, with
    d = m_b - m_a and n = n_a + n_b (Chan, Golub and LeVeque 1979): no difference of large numbers is taken.

    Args:
        count: images so far.
        mean, squares: (L, T, D) float64; without meaning while there are no images.
    """

    def __init__(self, count: int = 0, mean: Tensor | None = None, squares: Tensor | None = None):
        self.count = count
        self.mean = torch.zeros(0, dtype=torch.float64) if mean is None else mean
        self.squares = torch.zeros(0, dtype=torch.float64) if squares is None else squares

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, beside the count."""
        return {"mean": self.mean, "squares": self.squares}

    def update(self, inputs: Sequence[Tensor]) -> None:
        """Add a batch: L tensors (N, T, D). Raises ValueError for another shape than that of the images before."""
        moments = []
        for hidden_NTD in inputs:
            hidden_NTD = hidden_NTD.detach().double()
            mean_TD = hidden_NTD.mean(dim=0)
            moments.append((mean_TD, (hidden_NTD - mean_TD).square().sum(dim=0)))
        mean, squares = (torch.stack(parts) for parts in zip(*moments, strict=True))
        self.merge(RunningMoments(len(inputs[0]), mean, squares))

    def merge(self, other: RunningMoments) -> None:
        """Add the images of another. Raises ValueError for another shape than one's own."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.squares = other.count, other.mean, other.squares
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"statistics of {tuple(self.mean.shape)} and {tuple(other.mean.shape)} don't merge.")
        count = self.count + other.count
        apart = other.mean - self.mean
        self.mean = self.mean + apart * (other.count / count)
        self.squares = self.squares + other.squares + apart.square() * (self.count * other.count / count)
        self.count = count

    def statistics(self, record: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> VisionStatistics:
        """What was found. Raises ValueError if there were no images."""
        variance = self.squares / max(self.count, 1)
        return VisionStatistics(self.mean.to(dtype), variance.to(dtype), self.count, dict(record))
