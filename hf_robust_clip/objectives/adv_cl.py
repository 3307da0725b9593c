"""AdvCL: contrast of an attacked, a high-pass and two more views of each image (Fan et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attacks.losses import cross_entropy
from ..checks import check_above, check_least
from ..modeling import ZeroShotOutput
from .base import Batch, Objective, Paper
from .contrast import contrast_of_views, gathered_views


@dataclass(frozen=True)
class AdvCL(Objective):
    """L = L_contrast + ce_weight * mean_b CE(z(x_adv_b), argmax_c z0(x_b)_c), with z0 the frozen pretrained model.
    Contrasted are four views of each image: x_adv, of the first crop x; two more crops; x without low frequencies.

        L_contrast = t / base_temperature * mean_i [ -1/3 sum_{p in P_i} log( e^{u_i . u_p / t}
                                                                             / sum_{a != i} e^{u_i . u_a / t} ) ]

    Each of the 4N unit embeddings u_i of N images is an anchor, P_i the other three views of its image. The attack
    maximises L by x_adv, with all other views as they are: each image's value is that of the whole batch. Images are
    contrasted within a forward batch, over all processes; those of accumulated batches don't meet. Takes a dataset of
    whole pictures, of which three random crops are made. Needs classes, but no labels.

    Args:
        temperature: t, above 0.
        base_temperature: above 0; a larger one makes the contrast weigh less beside the cross-entropy.
        ce_weight: at least 0.
        high_pass: frequencies below this share of the image's side, in periods per image, are taken away, above 0.

    Raises ValueError for settings out of range, and for a batch of one image.
    Source: arXiv 2111.01124 and the code released with it, which has a head, batch statistics for each kind of view,
    and a first crop without a change of colours; its radius is 8 of 32 pixels, and of odd sizes its frequencies are
    counted from half a period beside the mean. Ours: pseudo-labels are the frozen CLIP's classes, not five clusterings
    (of 2 to 500 clusters) of another encoder's features; and one attacked image maximises the sum, where theirs are
    two of the same crop, one for each term. With `ce_weight=0` attack and contrast are theirs.
    """

    temperature: float = 0.5
    base_temperature: float = 0.07
    ce_weight: float = 0.2
    high_pass: float = 0.25

    needs: ClassVar[frozenset[str]] = frozenset({"classes", "teacher"})
    num_views: ClassVar[int] = 3
    couples_images: ClassVar[bool] = True
    least_images: ClassVar[int] = 2
    paper = Paper.cited("AdvCL", "fan2021advcl", arxiv="2111.01124")

    def __post_init__(self) -> None:
        check_above(0, temperature=self.temperature, base_temperature=self.base_temperature, high_pass=self.high_pass)
        check_least(0, ce_weight=self.ce_weight)

    def attacked_rows(self, count: int) -> slice:
        return slice(count // self.num_views)

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        first, *others = batch.whole.views
        with torch.no_grad():
            fixed_MD = batch.student(torch.cat([*others, self._high(first)])).image_embeds

        def joint_loss(adv_BCHW: Tensor) -> Tensor:
            adv = batch.student(adv_BCHW)
            total = sum(self._terms(batch, adv, torch.cat([adv.image_embeds, fixed_MD])).values())
            return total.expand(len(adv_BCHW))  # type: ignore[union-attr]  # there are terms

        return joint_loss

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        output = batch.student(torch.cat([adv_BCHW, self._high(batch.images)]))
        adv = output.rows(self.attacked_rows(len(adv_BCHW)))
        return self._terms(batch, adv, output.image_embeds)

    def _high(self, images_BCHW: Tensor) -> Tensor:
        return high_pass(images_BCHW, self.high_pass * images_BCHW.shape[-1])

    def _terms(self, batch: Batch, adv: ZeroShotOutput, embeds_MD: Tensor) -> dict[str, Tensor]:
        """Of the output for attacked images, and the embeddings of all views, a view after the other."""
        features_VND = gathered_views(batch, embeds_MD.unflatten(0, (4, -1)))
        pseudo_labels_B = batch.teacher_on_first.logits.argmax(dim=1)
        factor = self.temperature / self.base_temperature
        return {
            "contrast": factor * contrast_of_views(features_VND, self.temperature).mean(),
            "pseudo_ce": self.ce_weight * batch.gathered(cross_entropy(adv.logits, pseudo_labels_B)).mean(),
        }


def high_pass(images_BCHW: Tensor, radius: float) -> Tensor:
    """Images without the frequencies (k_y, k_x), in periods per image, of length below `radius`; about 0, signed."""
    height, width = images_BCHW.shape[-2:]
    rows_H, columns_W = (
        side * torch.fft.fftfreq(side, device=images_BCHW.device, dtype=torch.float64) for side in (height, width)
    )
    kept_HW = torch.hypot(rows_H[:, None], columns_W) >= radius
    return torch.fft.ifft2(torch.fft.fft2(images_BCHW) * kept_HW).real
