"""TPT: test-time prompt tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..paper import Paper
from .tuning import WordTuning, marginal_entropy


@dataclass(frozen=True, kw_only=True)
class TPT(WordTuning):
    """Tunes the template's words on each test image so that its views agree: L = H(mean_k softmax z_k).

    Source: arXiv 2209.07511. Its augmentation here is random crops and mirroring.
    """

    paper = Paper.cited("tpt", "shu2022tpt", arxiv="2209.07511")

    def loss(self, logits_BKC: Tensor, layer_inputs: Sequence[Tensor]) -> Tensor:
        """The marginal entropy."""
        return marginal_entropy(logits_BKC)
