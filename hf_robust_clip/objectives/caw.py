"""CAW: the frozen model's guidance, weighed by how unsure the trained one is (arXiv 2510.02913)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..attacks.losses import cross_entropy, kl_divergence
from ..checks import check_least
from .base import Batch, Objective, Paper


@dataclass(frozen=True)
class CAW(Objective):
    """L = mean_b [CE(z(x_adv), y) + alpha * (1 - P(x_adv)_y) * KL(P(x_adv) || P0(x)) + beta * D], where

        D = ||f(x_adv) - f0(x_adv)||_2

    with P = softmax(z) of the model being trained, P0 and f0 of the frozen pretrained one, and embeddings that are
    projected, but not normalised. The attack maximises the cross-entropy.

    Args:
        alpha: weight of the guidance, at least 0. The paper's own values of both weights could not be found: 1 is
            where to begin, not what was published.
        beta: weight of the distance, at least 0.

    Source: arXiv 2510.02913; no code was released.
    """

    alpha: float = 1.0
    beta: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "teacher"})
    paper = Paper.cited("CAW", "naghavian2025caw", arxiv="2510.02913")

    def __post_init__(self) -> None:
        check_least(0, alpha=self.alpha, beta=self.beta)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        adv = batch.student(adv_BCHW)
        unsure_B = 1 - adv.logits.softmax(dim=1).gather(1, batch.labels[:, None]).squeeze(1)
        guide_B = kl_divergence(adv.logits, batch.teacher_on_clean.logits)
        terms = {
            "ce": cross_entropy(adv.logits, batch.labels).mean(),
            "guide": self.alpha * (unsure_B * guide_B).mean(),
        }
        if self.beta:
            apart_BD = adv.image_embeds - batch.ask_teacher(adv_BCHW).image_embeds
            terms["distance"] = self.beta * apart_BD.norm(dim=1).mean()
        return terms
