"""PMG-AFT: pre-trained model guided adversarial fine-tuning (Wang et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..attacks.losses import cross_entropy, kl_divergence
from ..checks import check_choice, check_least
from ..modeling import ZeroShotOutput
from .base import Batch, Objective, Paper

KLDirection = Literal["clean_first", "adv_first"]
Reduction = Literal["batch_mean", "sum"]


@dataclass(frozen=True)
class PMGAFT(Objective):
    """L = CE(z(x_adv), y) + alpha * KL_general + beta * KL_clean; the attack maximises the cross-entropy alone.

    With P = softmax(temperature * cos(f(x), t)) of the model being trained and P_0 of the frozen pretrained one:

        KL_general = KL(P_0(x_adv) || P(x_adv))        the guide, on the same adversarial image
        KL_clean   = KL(P(x)       || P(x_adv))        the gradient flows through both

    `PMGAFT()` and `PMGAFT.paper_preset()` follow the paper; `PMGAFT.released_preset()` follows the authors' code,
    which differs: re-normalising the text features after scaling them sets the temperature to 1, both KL terms are
    summed over the batch (of 256: alpha = beta = 256 in batch-mean terms) while CE is a mean, and pixels are
    normalised by ImageNet's statistics.

    Args:
        alpha, beta: weights of KL_general and KL_clean, at least 0. At 0 the pass that a term needs is left out; with
            both at 0 this is `TeCoA` (at its temperature).
        temperature: factor on the cosines in attack and loss; None takes the model's exp(logit_scale), about 100.
        kl_direction: `"clean_first"` as above; `"adv_first"` swaps the arguments of both terms, as the first release
            of the code did.
        reduction: `"batch_mean"`, or `"sum"` over all images of one optimiser step (all processes and accumulated
            batches together). Cross-entropy is a batch mean in either case.
        image_mean, image_std: normalisation, in units of [0, 1]; None keeps the checkpoint's. The saved image
            processor carries it.

    Source: arXiv 2401.04350 and the code released with it.
    """

    alpha: float = 1.0
    beta: float = 1.0
    temperature: float | None = None
    kl_direction: KLDirection = "clean_first"
    reduction: Reduction = "batch_mean"
    image_mean: Sequence[float] | None = None
    image_std: Sequence[float] | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "teacher"})
    paper = Paper.cited("PMG-AFT", "wang2024pmgaft", arxiv="2401.04350")

    def __post_init__(self) -> None:
        check_least(0, alpha=self.alpha, beta=self.beta)
        check_choice(KLDirection, kl_direction=self.kl_direction)
        check_choice(Reduction, reduction=self.reduction)
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be positive, or None for the model's own.")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError(f"image_mean={self.image_mean!r} and image_std={self.image_std!r} go together.")

    @classmethod
    def paper_preset(cls) -> PMGAFT:
        """As published: the model's temperature, batch means, weights 1, the checkpoint's normalisation."""
        return cls()

    @classmethod
    def released_preset(cls) -> PMGAFT:
        """As the authors' code computes it: temperature 1, KL summed over the batch, ImageNet normalisation."""
        return cls(temperature=1.0, reduction="sum", image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        return None if self.image_mean is None or self.image_std is None else (self.image_mean, self.image_std)

    def scores(self, output: ZeroShotOutput) -> Tensor:
        """Logits (B, C) at this objective's temperature."""
        return output.logits if self.temperature is None else self.temperature * output.cosine

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda adv_BCHW: cross_entropy(self.scores(batch.student(adv_BCHW)), batch.labels)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        if self.beta:
            adv, clean = batch.student_on_both(adv_BCHW)
        else:
            adv = clean = batch.student(adv_BCHW)
        scores_BC = self.scores(adv)
        terms = {"ce": cross_entropy(scores_BC, batch.labels).mean()}
        if self.alpha:
            terms["kl_general"] = self.alpha * self.reduced_kl(
                self.scores(batch.ask_teacher(adv_BCHW)), scores_BC, batch
            )
        if self.beta:
            terms["kl_clean"] = self.beta * self.reduced_kl(self.scores(clean), scores_BC, batch)
        return terms

    def reduced_kl(self, guide_BC: Tensor, adv_BC: Tensor, batch: Batch) -> Tensor:
        """One KL term, without its weight."""
        first, second = (guide_BC, adv_BC) if self.kl_direction == "clean_first" else (adv_BC, guide_BC)
        mean = kl_divergence(first, second).mean()
        return mean * (batch.images_per_update or len(adv_BC)) if self.reduction == "sum" else mean
