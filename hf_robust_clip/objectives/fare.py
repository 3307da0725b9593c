"""FARE: unsupervised adversarial fine-tuning of the vision embedding (Schlarmann et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..attacks.losses import cross_entropy, embedding_l2
from ..checks import check_choice
from .base import Batch, Objective, Paper

InnerLoss = Literal["l2", "ce"]


@dataclass(frozen=True)
class FARE(Objective):
    """L = mean_b sum_d (f(x_adv_b)_d - f0(x_b)_d)^2, on un-normalised projected embeddings; the attack maximises it.

    f0 is the frozen pretrained encoder on the clean image. Needs neither labels nor texts. The attack needs a random
    start: before the first update the gradient at x itself is zero, because f = f0.

    What the authors' code has beside this, with D(a, b) = mean_b sum_d (a_bd - b_bd)^2 and sg the stop of gradients:

        L = clean_weight * D(f(x), f0(x)) + (1 - clean_weight) * D(f(x_adv), f0(x))
        with trades, D(f(x_adv), sg f(x)) in the place of the last term

    Args:
        clean_weight: at least 0 and below 1; with 0 there is no clean term, and no pass for it.
        inner_loss: what the attack maximises: `"l2"`, the squared distance to f0(x), with trades too; or `"ce"`, the
            cross-entropy, which needs labels and classes. The authors' code has CE of un-normalised embeddings times
            100 unless embeddings are normalised everywhere; here it is that of the model's own logits.
        trades: see above. Without a clean term nothing but the attack's starting point ties f to f0.

    Source: arXiv 2402.12336 and the code released with it, whose defaults are these.
    """

    clean_weight: float = 0.0
    inner_loss: InnerLoss = "l2"
    trades: bool = False

    paper = Paper.cited("FARE", "schlarmann2024fare", arxiv="2402.12336")

    def __post_init__(self) -> None:
        check_choice(InnerLoss, inner_loss=self.inner_loss)
        if not 0 <= self.clean_weight < 1:
            raise ValueError(f"clean_weight={self.clean_weight!r} must be at least 0 and below 1.")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # a constant elsewhere, a choice here
        return frozenset({"teacher", "labels"} if self.inner_loss == "ce" else {"teacher"})

    @property
    def needs_random_start(self) -> bool:  # type: ignore[override]
        return self.inner_loss == "l2"

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        if self.inner_loss == "ce":
            return lambda adv_BCHW: cross_entropy(batch.student(adv_BCHW).logits, batch.labels)
        return lambda adv_BCHW: embedding_l2(batch.student(adv_BCHW).image_embeds, batch.teacher_on_clean.image_embeds)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        frozen_BD = batch.teacher_on_clean.image_embeds
        if not (self.clean_weight or self.trades):
            return {"embedding_l2": embedding_l2(batch.student(adv_BCHW).image_embeds, frozen_BD).mean()}
        adv, clean = batch.student_on_both(adv_BCHW)
        target_BD = clean.image_embeds.detach() if self.trades else frozen_BD
        terms = {"embedding_l2": (1 - self.clean_weight) * embedding_l2(adv.image_embeds, target_BD).mean()}
        if self.clean_weight:
            terms["clean_l2"] = self.clean_weight * embedding_l2(clean.image_embeds, frozen_BD).mean()
        return terms
