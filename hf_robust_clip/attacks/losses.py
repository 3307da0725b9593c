"""Losses that attacks maximise and objectives build on. Each returns one value per image, shape (B,).

C is the number of classes, D the embedding width. Logits may have any floating dtype; callers choose the precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return F.cross_entropy(logits_BC, labels_B, reduction="none")


def cw_margin(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """max_{c != y} z_c - z_y: positive exactly where the image is misclassified (Carlini and Wagner, 2017).

    Raises ValueError for fewer than two classes.
    """
    _need_classes(logits_BC, 2, "The CW margin")
    own_B1 = labels_B[:, None]
    others_BC = logits_BC.scatter(1, own_B1, -torch.inf)
    return others_BC.amax(dim=1) - logits_BC.gather(1, own_B1).squeeze(1)


def dlr(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The difference-of-logits ratio (Croce and Hein, 2020): (max_{c != y} z_c - z_y) / (z_(1) - z_(3)).

    z_(1) >= z_(2) >= z_(3) are the sorted logits, so the value does not change when logits are shifted or scaled.
    Raises ValueError for fewer than three classes.
    """
    _need_classes(logits_BC, 3, "DLR")
    top_B3 = logits_BC.topk(3, dim=1).values
    return cw_margin(logits_BC, labels_B) / (top_B3[:, 0] - top_B3[:, 2] + 1e-12)


def dlr_targeted(logits_BC: Tensor, labels_B: Tensor, targets_B: Tensor) -> Tensor:
    """The targeted difference-of-logits ratio (Croce and Hein, 2020): (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2).

    `targets_B` (B,) holds the class t that the attack steers to. Raises ValueError for fewer than four classes.
    """
    _need_classes(logits_BC, 4, "The targeted DLR")
    top_B4 = logits_BC.topk(4, dim=1).values
    gap_B = logits_BC.gather(1, targets_B[:, None]) - logits_BC.gather(1, labels_B[:, None])
    return gap_B.squeeze(1) / (top_B4[:, 0] - (top_B4[:, 2] + top_B4[:, 3]) / 2 + 1e-12)


def embedding_l2(embeds_BD: Tensor, target_BD: Tensor) -> Tensor:
    """sum_d (a_d - b_d)^2, the squared Euclidean distance of un-normalised embeddings (FARE)."""
    return (embeds_BD - target_BD).square().sum(dim=1)


def kl_divergence(p_logits_BC: Tensor, q_logits_BC: Tensor) -> Tensor:
    """KL(p || q) = sum_c p_c log(p_c / q_c) with p, q the softmax of the two logits; 0 where they are equal."""
    log_p_BC, log_q_BC = F.log_softmax(p_logits_BC, dim=1), F.log_softmax(q_logits_BC, dim=1)
    return (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(dim=1)


def _need_classes(logits_BC: Tensor, least: int, name: str) -> None:
    if logits_BC.shape[1] < least:
        raise ValueError(f"{name} needs at least {least} classes, got {logits_BC.shape[1]}; use cross_entropy.")
