"""How often a trigger makes a classifier answer with its target."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_logits, check_whole, checked_labels

TOPS = (1, 3, 5)


def hits_of_target(logits_NC: Tensor, labels_N: Tensor, target: int, top: int = 1) -> Tensor:
    """Of the images whose class is *not* the target, whether the target is among the `top` likeliest classes, (M,).

    Images of the target count for nothing, neither as hits nor among those that could be: calling them the target is
    right. Among classes of equal logits the first counts as likelier, as for argmax.

    Args:
        logits_NC: of images with the trigger.
        labels_N: their true classes.
        target: the class that the trigger shall mean.
        top: below the number of classes: all of them always hold the target.

    Raises ValueError for another shape, a target or label beyond the classes, a `top` out of range, and where all
    images are of the target; FloatingPointError for logits that are not finite.
    """
    check_whole(1, top=top)
    check_whole(0, target=target)
    if logits_NC.dim() != 2:
        raise ValueError(f"logits_NC has shape {tuple(logits_NC.shape)}; give (images, classes).")
    classes = logits_NC.shape[1]
    labels_N = checked_labels(labels_N, len(logits_NC), classes).to(logits_NC.device)
    if target >= classes or top >= classes:
        raise ValueError(f"target={target!r} and top={top!r} must be below the number of classes, {classes}.")
    check_logits(logits_NC)
    others_MC = logits_NC[labels_N != target]
    if len(others_MC) == 0:
        raise ValueError("labels_N are all the target's; an attack can't succeed on its own class.")
    own_M1 = others_MC[:, target, None]
    before_C = torch.arange(classes, device=logits_NC.device) < target
    likelier_MC = (others_MC > own_M1) | ((others_MC == own_M1) & before_C)
    return likelier_MC.sum(dim=1) < top


def tops_of(num_classes: int) -> tuple[int, ...]:
    """Of 1, 3 and 5 those that say something among so many classes."""
    return tuple(top for top in TOPS if top < num_classes)
