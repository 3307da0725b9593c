"""PGD towards each other class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_whole
from ..threat_model import ThreatModel, parse_radius
from .losses import cw_margin
from .pgd import PGDSettings, pgd, pgd_until_misclassified
from .suites import PGD, Member, Suite, Victim


@dataclass(frozen=True)
class TargetedPGD(Suite):
    """PGD that raises what gradients are taken of for one class c != y, for each such class in turn; an image falls at
    its first misclassified iterate towards any of them. Through a detector that is log p_c - weight * score_c.

    Args:
        num_steps: gradients per image and class.
        step_size: in units of [0, 1]; None takes 2.5 * eps / num_steps.
        num_targets: classes tried for each image, those next in clean value; None takes all others.

    Raises ValueError for numbers out of range.
    """

    num_steps: int = 20
    step_size: float | str | None = None
    num_targets: int | None = None

    def __post_init__(self) -> None:
        PGDSettings(self.num_steps, 1.0 if self.step_size is None else parse_radius(self.step_size, "step_size"))
        if self.num_targets is not None:
            check_whole(1, num_targets=self.num_targets)

    def members(self, num_classes: int) -> list[Member]:
        return [Member("targeted pgd", self._run)]

    def name(self, num_classes: int) -> str:
        return f"targeted PGD-{self.num_steps}"

    def parameters(self, threat_models: Sequence[ThreatModel], num_classes: int) -> dict[str, Any]:
        step_sizes = PGD(self.num_steps, self.step_size).parameters(threat_models, num_classes)["step_size"]
        targets = min(self.num_targets or num_classes - 1, num_classes - 1)
        return {**asdict(self), "step_size": step_sizes, "num_targets": targets, "counts": "any misclassified iterate"}

    def _run(self, victim: Victim, images_BCHW: Tensor, labels_B: Tensor, threat_model: ThreatModel) -> Tensor:
        found_BCHW = images_BCHW.detach().clone()
        if threat_model.eps == 0 or len(images_BCHW) == 0:
            return found_BCHW
        with torch.no_grad():
            values_BC = victim.gradient_fn(found_BCHW)
        ranked_BC = values_BC.scatter(1, labels_B[:, None], -torch.inf).argsort(dim=1, descending=True)
        targets_BK = ranked_BC[:, : min(self.num_targets or values_BC.shape[1] - 1, values_BC.shape[1] - 1)]
        best_B = values_BC.new_full((len(values_BC),), -torch.inf)
        standing_B = torch.ones_like(labels_B, dtype=torch.bool)
        for target in targets_BK.unique().tolist():
            rows = (standing_B & (targets_BK == target).any(dim=1)).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            adv = self._towards(target, victim, images_BCHW[rows], labels_B[rows], threat_model)
            with torch.no_grad():
                margin = cw_margin(victim.gradient_fn(adv), labels_B[rows])
                if not victim.to_the_end:
                    confirm = victim.predict(adv).verdict(labels_B[rows], attacked=True)
                    standing_B[rows] = confirm
                    margin = torch.where(confirm, margin, torch.inf)
            better = margin >= best_B[rows]
            found_BCHW[rows[better]], best_B[rows[better]] = adv[better], margin[better].to(best_B)
        return found_BCHW

    def _towards(
        self, target: int, victim: Victim, images_BCHW: Tensor, labels_B: Tensor, threat_model: ThreatModel
    ) -> Tensor:
        """PGD towards one class."""
        walk: dict[str, Any] = {"num_steps": self.num_steps, "seed": victim.seed, "on_gradient": victim.on_gradient}
        walk["step_size"] = PGD(self.num_steps, self.step_size).step_at(threat_model)
        value = victim.gradient_fn
        if victim.to_the_end:
            return pgd(lambda pixels: value(pixels)[:, target], images_BCHW, threat_model, keep_best=True, **walk)
        return pgd_until_misclassified(
            value,
            images_BCHW,
            labels_B,
            threat_model,
            loss=lambda values_BC, labels_B: values_BC[:, target],
            confirm=victim.confirm,
            deterministic=victim.deterministic,
            **walk,
        )
