"""SAFT: attacks on several descriptions of each class at once (TMLR 2026)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attacks.losses import cross_entropy
from ..modeling import ZeroShotOutput
from .base import Batch, Paper
from .tga_zsr import TGAZSR


@dataclass(frozen=True)
class SAFT(TGAZSR):
    """The loss of `TGAZSR` with the cross-entropy of K texts of each class in the place of one, which the attack
    maximises:

        CE_K(x, y) = mean_k CE(z_k(x), y),  z_kc = s * cos(f(x), t_kc)

    where t_kc is the k-th text of class c, not their mean. The maps are those of the mean text, as in the authors'
    code: their products with K texts, averaged.

    Every class needs equally many texts: `set_classes(names, descriptions=...)`. The authors take of those that a
    language model wrote the five that are most like the bare class name by CLIP's text encoder; that is a matter of
    the file. They evaluate with `"This is a photo of a {}"`.

    Args:
        alpha, beta, map_norm: as in `TGAZSR`, on whose code theirs is built, with its weights.

    Relations: with one text for each class this is `TGAZSR`.
    Source: arXiv 2602.12461 (its abstract) and the code released with it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "teacher", "patches", "texts"})
    paper: ClassVar[Paper] = Paper.cited("SAFT", "zhang2026saft", arxiv="2602.12461")

    def cross_entropy(self, output: ZeroShotOutput, labels_B: Tensor) -> Tensor:
        """CE_K of each image, (B,)."""
        if output.text_embeds is None:
            raise ValueError("this objective compares with several texts of each class, but the output has none.")
        with torch.autocast(output.image_embeds.device.type, enabled=False):
            units_BD = F.normalize(output.image_embeds, dim=1)
            logits_KBC = output.logit_scale.to(units_BD) * (units_BD @ output.text_embeds.to(units_BD).mT)
            labels_KB = labels_B.expand(len(logits_KBC), -1)
            return cross_entropy(logits_KBC.flatten(0, 1), labels_KB.flatten()).view_as(labels_KB).mean(dim=0)

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda adv_BCHW: self.cross_entropy(batch.student(adv_BCHW), batch.labels)
