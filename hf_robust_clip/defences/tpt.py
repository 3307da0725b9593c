"""TPT: test-time prompt tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..paper import Paper
from .tuning import WordTuning, marginal_entropy


@dataclass(frozen=True, kw_only=True)
class TPT(WordTuning):
    """Tunes the template's words on each test image so that its views agree: L = H(mean_k softmax z_k).

    Source: arXiv 2209.07511. Its augmentation here is random crops and mirroring.
    """

    paper: ClassVar[Paper] = Paper(
        method="tpt",
        title="Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models",
        venue="NeurIPS 2022",
        arxiv="2209.07511",
        bibtex="""@inproceedings{shu2022tpt,
  title = {Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models},
  author = {Shu, Manli and Nie, Weili and Huang, De-An and Yu, Zhiding and Goldstein, Tom and Anandkumar, Anima and
            Xiao, Chaowei},
  booktitle = {NeurIPS},
  year = {2022}
}""",
    )

    def loss(self, logits_BKC: Tensor, layer_inputs: Sequence[Tensor]) -> Tensor:
        """The marginal entropy."""
        return marginal_entropy(logits_BKC)
