"""C-AVP: a visual prompt for each class, trained on adversarial images (Chen et al., ICASSP 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from ..attacks.losses import cross_entropy
from ..checks import check_above, check_least
from ..prompts import ClipPromptConfig
from .base import Batch, Objective, Paper


@dataclass(frozen=True)
class CAVP(Objective):
    """L = l0 * L0 + l1 * L1 + l2 * L2 + l3 * L3; what is trained is a picture delta_k for each class k.

    With x(+)k = clip(x + m * delta_k, 0, 1), f[k, c] = softmax(z(x(+)k) / t)_c, the hinge h(a) = max(a, -tau), means
    over images of a batch, sums over the classes j:

    - L0 = sum_j mean_{y=j} CE(z(x(+)j), j) + sum_j mean_{y=j} CE(z(x_adv(+)j), j)
    - L1 = sum_j mean_{y=j} h(max_{k!=j} f[k, k] - f[j, j]): the own prompt answers louder than others,
    - L2 = sum_j mean_{y!=j} h(f[j, j] - max_{c!=j} f[j, c]): a foreign class' prompt doesn't answer with its class,
    - L3 = sum_j mean_{y=j} h(max_{k!=j} f[k, j] - f[j, j]): no other prompt is as sure of the image's class.

    L1 to L3 see clean images alone, each with all C prompts: a step takes C + 1 forwards of the batch. A mean over no
    image is left out: a class that a batch lacks has no part in L0, L1 and L3. Means are those of each forward batch,
    over all processes; accumulated batches have their own. The attack maximises CE(z(x'(+)y), y), by the picture
    before its prompt, as an attack at test time has to; the prompts of other classes see no attacked images.

    Made for `ClipPromptConfig(design="pixel", per_class=True)`. The classifier has no logits of its own then; the
    defence `c_avp` predicts.

    Args:
        l0, l1, l2, l3: weights of the terms, at least 0.
        tau: of the hinge, at least 0.
        temperature: t, of the hinges' probabilities, above 0. CLIP's logits are 100 cos: their softmax is nearly 0 or
            1, where hinges have no gradient, and more than 1 helps.

    Raises ValueError for numbers out of range, TypeError/ValueError where the student has no class-wise prompts.
    Source: arXiv 2210.06284 and the code released with it, which attacks the prompted picture, within the radius of
    it, for all C prompts though one of them counts, and gives NaN where a batch lacks a class. Weights 1, 3, 3, 3
    and tau are its own, as are a border of 8 of 32 px, SGD 0.1 with momentum 0.9, a cosine over 50 epochs in batches
    of 256 and PGD-10 at 8/255 with steps of 2/255.
    """

    l0: float = 1.0
    l1: float = 3.0
    l2: float = 3.0
    l3: float = 3.0
    tau: float = 0.1
    temperature: float = 1.0

    couples_images: ClassVar[bool] = True
    judged_by: ClassVar[str | None] = "c_avp"
    peft_config: ClassVar[ClipPromptConfig] = ClipPromptConfig(design="pixel", per_class=True)
    paper = Paper.cited("C-AVP", "chen2023cavp", arxiv="2210.06284")

    def __post_init__(self) -> None:
        check_least(0, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "temperature"})
        check_above(0, temperature=self.temperature)

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda adv_BCHW: cross_entropy(batch.student(adv_BCHW, class_prompts=batch.labels).logits, batch.labels)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        labels_B, images, count = batch.labels, batch.images, batch.num_classes
        every_KB = torch.arange(count, device=labels_B.device).repeat_interleave(len(images))
        output = batch.student(
            torch.cat([adv_BCHW, images.repeat(count, 1, 1, 1)]), class_prompts=torch.cat([labels_B, every_KB])
        )
        adv_BC, clean = output.logits.split([len(images), count * len(images)])
        clean_BKC = clean.unflatten(0, (count, -1)).transpose(0, 1)
        own_BC = clean_BKC[torch.arange(len(images), device=labels_B.device), labels_B]
        l1_B, l2_BK, l3_B = self.hinges(clean_BKC, labels_B)
        each_B4 = torch.stack([cross_entropy(own_BC, labels_B), cross_entropy(adv_BC, labels_B), l1_B, l3_B], dim=1)
        each_B4, l2_BK, labels_B = (batch.gathered(values) for values in (each_B4, l2_BK, labels_B))
        ce, ce_adv, l1, l3 = class_means(each_B4, labels_B).unbind()
        return {
            "ce": self.l0 * ce,
            "ce_adv": self.l0 * ce_adv,
            "l1": self.l1 * l1,
            "l2": self.l2 * other_means(l2_BK, labels_B),
            "l3": self.l3 * l3,
        }

    def hinges(self, logits_BKC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image the hinges of L1 (B,), of L2 for every prompt (B, K), which counts for foreign ones, and of L3
        (B,); of its logits under each of K = C prompts.
        """
        shares_BKC = (logits_BKC / self.temperature).softmax(dim=2)
        own_BK = labels_B[:, None] == torch.arange(shares_BKC.shape[1], device=labels_B.device)
        diagonal_BK = shares_BKC.diagonal(dim1=1, dim2=2)
        same = torch.eye(shares_BKC.shape[1], dtype=torch.bool, device=labels_B.device)
        others_BK = shares_BKC.masked_fill(same, -torch.inf).amax(dim=2)
        of_class_BK = shares_BKC.gather(2, labels_B[:, None, None].expand(-1, own_BK.shape[1], 1))[:, :, 0]
        right_B = diagonal_BK[own_BK]
        l1_B = diagonal_BK.masked_fill(own_BK, -torch.inf).amax(dim=1) - right_B
        l3_B = of_class_BK.masked_fill(own_BK, -torch.inf).amax(dim=1) - right_B
        low = -self.tau
        return l1_B.clamp_min(low), (diagonal_BK - others_BK).clamp_min(low), l3_B.clamp_min(low)


def class_means(values_BN: Tensor, labels_B: Tensor) -> Tensor:
    """sum_j mean_{y=j} v of each column, (N,), over the classes that there are."""
    shares_B = 1 / labels_B.bincount()[labels_B].to(values_BN)
    return shares_B @ values_BN


def other_means(values_BK: Tensor, labels_B: Tensor) -> Tensor:
    """sum_j mean_{y!=j} v_j, (), over the classes j that some image isn't of."""
    foreign_BK = labels_B[:, None] != torch.arange(values_BK.shape[1], device=labels_B.device)
    counts_K = foreign_BK.sum(dim=0).clamp_min(1)
    return ((values_BK * foreign_BK).sum(dim=0) / counts_K).sum()
