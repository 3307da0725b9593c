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
    paper = Paper(
        "Clean",
        "Learning Transferable Visual Models From Natural Language Supervision",
        "ICML 2021",
        "2103.00020",
        """@inproceedings{radford2021clip,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others},
  booktitle = {ICML}, year = {2021}
}""",
    )

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        return {"ce": cross_entropy(batch.student(batch.images).logits, batch.labels).mean()}
