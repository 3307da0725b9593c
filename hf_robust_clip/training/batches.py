"""Which images of the batches make an update, and how much each batch counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OWN_IMAGES = "own_images"  # key of a batch that was filled up: how many of its images belong to this process's share


def count_images(batch: Mapping[str, Any]) -> int:
    """Images of a batch that belong to the update."""
    if OWN_IMAGES in batch:
        return int(batch[OWN_IMAGES])
    return len(batch["pictures"] if "pictures" in batch else batch["pixel_values"])


def without_fill(batch: Mapping[str, Any], own: int) -> dict[str, Any]:
    """A batch without the images that fill it up, its first `own` kept; where these are none, one image stays (every
    process must take part in an update), which counts for nothing.
    """
    count = count_images(batch)
    kept = {
        name: values[: max(own, 1)] if hasattr(values, "__len__") and len(values) == count else values
        for name, values in batch.items()
    }
    return {**kept, OWN_IMAGES: own}


def own_images_of_last_batch(images: int, batch_size: int, processes: int, process: int) -> int:
    """How many of an epoch's `images` are left for a process in its last batch.

    Batches are dealt in turn, and the last ones filled up with images from the beginning of the epoch, so that each
    process gets as many.
    """
    rounds = -(-images // (batch_size * processes)) - 1
    before = (rounds * processes + process) * batch_size
    return min(max(images - before, 0), batch_size)


def share_of_update(images: int, images_in_update: int, processes: int) -> float:
    """The factor on a batch's mean loss that makes gradients, summed over accumulated batches and averaged over
    processes, those of the mean over all images of the update.
    """
    return images * processes / images_in_update
