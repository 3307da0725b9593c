"""TeCoA: text-guided contrastive adversarial training (Mao et al., ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attacks.losses import cross_entropy
from .base import Batch, Objective, Paper


@dataclass(frozen=True)
class TeCoA(Objective):
    """L = mean_b CE(z(x_adv_b), y_b); the attack maximises the same cross-entropy.

    Relations: `PMGAFT` with alpha = beta = 0 is TeCoA; `Clean` is TeCoA at eps 0.
    """

    paper = Paper.cited("TeCoA", "mao2023tecoa", arxiv="2212.07016")

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        return {"ce": cross_entropy(batch.student(adv_BCHW).logits, batch.labels).mean()}
