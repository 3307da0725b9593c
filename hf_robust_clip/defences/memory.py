"""Batches in parts that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ..modeling import ZeroShotClassifier

logger = logging.getLogger(__name__)
T = TypeVar("T")


def activation_bytes(classifier: ZeroShotClassifier, graph: bool) -> float:
    """Roughly what one picture's forward through the image encoder keeps: its peak, or with a graph all layers."""
    vision = classifier.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 8
    values = tokens * (8 * vision.hidden_size + 2 * vision.intermediate_size)
    return values * (vision.num_hidden_layers if graph else 2) * torch.finfo(classifier.dtype).bits / 8


def in_parts(run: Callable[[slice], T], count: int, size: int) -> list[T]:
    """`run` on slices of at most `size` of `count` images; halved, down to one, where a GPU runs out of memory.

    Raises RuntimeError with the mend if one image alone doesn't fit.
    """
    found: list[T] = []
    start = 0
    while start < count:
        rows = slice(start, min(start + size, count))
        try:
            found.append(run(rows))
        except torch.OutOfMemoryError as error:
            if size <= 1:
                raise RuntimeError("one image with its views doesn't fit; set memory_budget.") from error
            size = max(1, min(size, rows.stop - rows.start) // 2)
            logger.info("out of memory: going on with %d images at a time", size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start = rows.stop
    return found
