"""Metrics as plain functions of predictions; `robust_accuracy/` is an `evaluate` module over them.

metric = evaluate.load(robust_accuracy_path())
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def robust_accuracy_path() -> str:
    """The folder that `evaluate.load` takes; no network is needed."""
    return str(Path(__file__).parent / "robust_accuracy")


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - half) / scale, (centre + half) / scale
    return min(max(0.0, low), share), max(min(1.0, high), share)  # rounding would leave 0 and 1 outside


def as_array(values: Any) -> np.ndarray:
    """Numbers of a list, an array or a tensor on any device; of dtype object where they make none, or hold bools."""
    if isinstance(values, Tensor):
        return (values.double() if values.is_floating_point() else values).detach().cpu().numpy()
    rows = values if isinstance(values, list | tuple) else ()
    if any(isinstance(value, bool) for row in rows for value in (row if isinstance(row, list | tuple) else (row,))):
        return np.array(values, dtype=object)
    try:
        return np.asarray(values)
    except ValueError:  # rows of unequal length
        return np.array([None for _ in rows], dtype=object)


def check_indices(array: np.ndarray, name: str) -> None:
    """Raise ValueError for what are no class indices: probabilities, logits, texts, true and false."""
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be class indices, integers, got {array.dtype}; take argmax of logits first.")


def right_throughout(right_NS: Any) -> np.ndarray:
    """Whether each image was right at a stage and at all before it, (N, S) bool, from whether it was right at each.

    The first stage is the clean image, each other one an attack. This is what robust means here: right on the clean
    image and under every attack up to there.

    Raises ValueError for no images, no stages, and another shape.
    """
    right_NS = np.asarray(right_NS, dtype=bool)
    if right_NS.ndim != 2 or right_NS.size == 0:
        raise ValueError(f"right_NS has shape {right_NS.shape}; give verdicts (images, stages), at least one of each.")
    return np.logical_and.accumulate(right_NS, axis=1)


def accuracy_after_each(right_NS: Any) -> list[float]:
    """The clean accuracy and the robust accuracy after each attack, S shares in [0, 1]: see `right_throughout`."""
    throughout_NS = right_throughout(right_NS)
    return [int(count) / len(throughout_NS) for count in throughout_NS.sum(axis=0)]


def clean_and_robust_accuracy(
    attacked: Sequence[int],
    references: Sequence[int],
    clean: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> dict[str, float | list[float] | list[float | None]]:
    """Clean and robust accuracy: mean [clean_i = y_i] and mean [clean_i = y_i and attacked_i = y_i].

    Args:
        attacked: predicted class of each attacked image, (N,).
        references: true class of each image, (N,).
        clean: predicted class of each clean image, (N,). Without it an image that is right under attack counts as
            robust whatever it was before, so the robust accuracy can only come out higher, and no clean one is given.
        num_classes: number of classes; None takes the largest index that occurs, plus one.

    Returns, for `clean` (if given) and `robust`: `*_accuracy` in [0, 1]; `*_accuracy_interval`, its 95 % Wilson
    interval; `*_accuracy_per_class`, by class index, None for a class without images.

    Raises ValueError for no images, unequal lengths, and classes that are no integers or outside [0, num_classes).
    """
    given = {"attacked": attacked, "references": references} | ({} if clean is None else {"clean": clean})
    arrays = {name: as_array(values) for name, values in given.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or arrays["references"].ndim != 1:
        raise ValueError(f"one class index for each image is needed in every column, got the shapes {shapes}.")
    if arrays["references"].size == 0:
        raise ValueError("references is empty; there is no accuracy of nothing.")
    for name, array in arrays.items():
        check_indices(array, name)
        if array.min() < 0 or (num_classes is not None and array.max() >= num_classes):
            raise ValueError(
                f"{name} has classes from {array.min()} to {array.max()}; they must be in [0, {num_classes or '...'})."
            )
    labels = arrays["references"]
    classes = num_classes or int(max(array.max() for array in arrays.values())) + 1
    stages = {"robust": "attacked"} if clean is None else {"clean": "clean", "robust": "attacked"}
    each_NS = np.stack([arrays[name] == labels for name in stages.values()], axis=1)
    right = dict(zip(stages, right_throughout(each_NS).T, strict=True))
    images = np.bincount(labels, minlength=classes)
    found: dict[str, float | list[float] | list[float | None]] = {}
    for name, hits in right.items():
        by_class = np.bincount(labels, weights=hits, minlength=classes)
        found[f"{name}_accuracy"] = float(hits.mean())
        found[f"{name}_accuracy_interval"] = list(wilson_interval(int(hits.sum()), len(hits)))
        found[f"{name}_accuracy_per_class"] = [
            float(k / n) if n else None for k, n in zip(by_class, images, strict=True)
        ]
    return found
