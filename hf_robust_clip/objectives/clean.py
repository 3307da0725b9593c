"""Fine-tuning without an attack: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..attacks.losses import cross_entropy
from .base import Batch, Objective, Paper


@dataclass(frozen=True)
class Clean(Objective):
    """L = mean_b CE(z(x_b), y_b). Keeps no robustness; shows what fine-tuning alone does to accuracy."""

    attacked: ClassVar[bool] = False
    paper = Paper.cited("Clean", "radford2021clip", arxiv="2103.00020")

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        return {"ce": cross_entropy(batch.student(batch.images).logits, batch.labels).mean()}
