"""FARE: unsupervised adversarial fine-tuning of the vision embedding (Schlarmann et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..attacks.losses import embedding_l2
from .base import Batch, Objective, Paper


@dataclass(frozen=True)
class FARE(Objective):
    """L = mean_b sum_d (f(x_adv_b)_d - f0(x_b)_d)^2, on un-normalised projected embeddings; the attack maximises it.

    f0 is the frozen pretrained encoder on the clean image. Needs neither labels nor texts. The attack needs a random
    start: before the first update the gradient at x itself is zero, because f = f0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    needs_random_start: ClassVar[bool] = True
    paper = Paper.cited("FARE", "schlarmann2024fare", arxiv="2402.12336")

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda adv_BCHW: embedding_l2(batch.student(adv_BCHW).image_embeds, batch.teacher_on_clean.image_embeds)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        return {"embedding_l2": self.attack_loss(batch)(adv_BCHW).mean()}
