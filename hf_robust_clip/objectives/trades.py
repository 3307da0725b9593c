"""TRADES (Zhang et al., ICML 2019) on zero-shot logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attacks.losses import cross_entropy, kl_divergence
from ..checks import check_least
from .base import Batch, Objective, Paper


@dataclass(frozen=True)
class TRADES(Objective):
    """L = mean_b CE(z(x_b), y_b) + beta * mean_b KL(softmax z(x_b) || softmax z(x_adv_b)); the attack
    maximises the KL.

    Args:
        beta: weight of the KL term, at least 0; the paper's default is 6.
    """

    beta: float = 6.0
    needs_random_start: ClassVar[bool] = True
    paper = Paper.cited("TRADES", "zhang2019trades", arxiv="1901.08573")

    def __post_init__(self) -> None:
        check_least(0, beta=self.beta)

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            clean_BC = batch.student(batch.images).logits
        return lambda adv_BCHW: kl_divergence(clean_BC, batch.student(adv_BCHW).logits)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        adv, clean = batch.student_on_both(adv_BCHW)
        return {
            "ce": cross_entropy(clean.logits, batch.labels).mean(),
            "kl": self.beta * kl_divergence(clean.logits, adv.logits).mean(),
        }
