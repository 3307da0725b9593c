"""What an evaluation runs: attacks one after the other, each on the images that the ones before left standing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_labels
from ..threat_model import ThreatModel, parse_radius
from .losses import cross_entropy, cw_margin
from .pgd import (
    ClassificationLoss,
    LogitsFn,
    OnGradient,
    PGDSettings,
    misclassified,
    pgd,
    pgd_until_misclassified,
)


@dataclass(frozen=True)
class Victim:
    """The classifier under attack.

    Args:
        logits_fn: images (B, C, H, W) in [0, 1] to logits; decides what counts as misclassified.
        fast_logits_fn: a cheaper, less exact one for gradients and queries (bfloat16, say); None uses `logits_fn`.
        deterministic: False if the same image may get different logits.
        seed: of all that attacks draw.
        on_gradient: called with each gradient that PGD, APGD and FAB take.
        to_the_end: PGD takes all its steps and gives the iterate of highest loss, whatever the classifier says of it:
            for images that are then shown to another classifier.
    """

    logits_fn: LogitsFn
    fast_logits_fn: LogitsFn | None = None
    deterministic: bool = True
    seed: int = 0
    on_gradient: OnGradient | None = None
    to_the_end: bool = False

    @property
    def gradient_fn(self) -> LogitsFn:
        """What gradients are taken of."""
        return self.fast_logits_fn or self.logits_fn

    @property
    def confirm(self) -> LogitsFn | None:
        """What must agree that an image is misclassified, where gradients come from another function."""
        return None if self.fast_logits_fn is None else self.logits_fn


Member = Callable[[Victim, Tensor, Tensor, ThreatModel], Tensor]


class Suite(ABC):
    """Attacks with their settings."""

    @property
    def is_standard(self) -> bool:
        """Whether it is the attack whose figure others quote, not one of many."""
        return False

    @abstractmethod
    def members(self, num_classes: int) -> dict[str, Member]:
        """The attacks in their order, those left out that are not defined for so few classes."""

    @abstractmethod
    def name(self, num_classes: int) -> str:
        """What tables call it."""

    @abstractmethod
    def parameters(self, threat_models: Sequence[ThreatModel], num_classes: int) -> dict[str, Any]:
        """All settings, as JSON types."""


@dataclass(frozen=True)
class PGD(Suite):
    """PGD on the cross-entropy (PGD-n) or on the CW margin (CW-n); an image falls at its first misclassified iterate.

    Args:
        num_steps: gradients per image.
        step_size: in units of [0, 1] (float or fraction such as `"1/255"`); None takes 2.5 * eps / num_steps.
        loss: `cross_entropy` or `cw_margin`, or any function of logits and labels with one value per image.
        random_start: start from a random point of the ball.
    """

    num_steps: int = 20
    step_size: float | str | None = None
    loss: ClassificationLoss = cross_entropy
    random_start: bool = True

    def __post_init__(self) -> None:
        PGDSettings(self.num_steps, 1.0 if self.step_size is None else parse_radius(self.step_size, "step_size"))

    def step_at(self, threat_model: ThreatModel) -> float:
        """The step size at a radius."""
        own = self.step_size
        return 2.5 * threat_model.eps / self.num_steps if own is None else parse_radius(own, "step_size")

    def members(self, num_classes: int) -> dict[str, Member]:
        return {"cw" if self.loss is cw_margin else "pgd": self._run}

    def _run(self, victim: Victim, images_BCHW: Tensor, labels_B: Tensor, threat_model: ThreatModel) -> Tensor:
        if victim.to_the_end:
            return pgd(
                lambda pixels_BCHW: self.loss(victim.gradient_fn(pixels_BCHW), labels_B),
                images_BCHW,
                threat_model,
                num_steps=self.num_steps,
                step_size=self.step_at(threat_model),
                random_start=self.random_start,
                keep_best=True,
                seed=victim.seed,
                on_gradient=victim.on_gradient,
            )
        return pgd_until_misclassified(
            victim.gradient_fn,
            images_BCHW,
            labels_B,
            threat_model,
            loss=self.loss,
            num_steps=self.num_steps,
            step_size=self.step_at(threat_model),
            random_start=self.random_start,
            seed=victim.seed,
            confirm=victim.confirm,
            deterministic=victim.deterministic,
            on_gradient=victim.on_gradient,
        )

    def name(self, num_classes: int) -> str:
        return f"{'CW' if self.loss is cw_margin else 'PGD'}-{self.num_steps}"

    def parameters(self, threat_models: Sequence[ThreatModel], num_classes: int) -> dict[str, Any]:
        steps = [self.step_at(threat_model) for threat_model in threat_models]
        return {**asdict(self), "loss": self.loss.__name__, "step_size": steps, "counts": "any misclassified iterate"}


def find_adversarial(
    member: Member, victim: Victim, images_BCHW: Tensor, labels_B: Tensor, threat_model: ThreatModel
) -> Tensor:
    """Adversarial images (B, C, H, W).

    Raises RuntimeError if an attack left the threat model: its result would mean nothing.
    """
    images_BCHW = threat_model.checked(images_BCHW)
    labels_B = checked_labels(labels_B, len(images_BCHW)).to(images_BCHW.device)
    adv_BCHW = member(victim, images_BCHW, labels_B, threat_model)
    low, high = threat_model.bounds
    furthest = float(threat_model.distance(adv_BCHW, images_BCHW).amax()) if len(adv_BCHW) else 0.0
    if furthest > threat_model.eps * (1 + 1e-4) + 1e-7 or bool(((adv_BCHW < low) | (adv_BCHW > high)).any()):
        raise RuntimeError(f"an attack left {threat_model}: it moved an image by {furthest:.6g}.")
    return adv_BCHW


def run_member(
    member: Member, victim: Victim, images_BCHW: Tensor, labels_B: Tensor, threat_model: ThreatModel
) -> tuple[Tensor, Tensor]:
    """What `find_adversarial` gives, and whether each still stands: classified correctly by `victim.logits_fn`."""
    adv_BCHW = find_adversarial(member, victim, images_BCHW, labels_B, threat_model)
    return adv_BCHW, ~misclassified(victim.logits_fn, adv_BCHW, labels_B)


@torch.no_grad()
def is_randomised(logits_fn: LogitsFn, images_BCHW: Tensor) -> bool:
    """Whether two forwards of the same images give logits further apart than rounding explains."""
    first_BC, second_BC = logits_fn(images_BCHW), logits_fn(images_BCHW)
    return bool(((first_BC - second_BC).norm(dim=1) > 1e-4 * first_BC.norm(dim=1)).any())


@torch.no_grad()
def is_optimising(logits_fn: LogitsFn, images_BCHW: Tensor) -> bool:
    """Whether a forward without gradients builds a graph all the same, as classifiers do that adapt to their input."""
    recorded = []

    def record(tensor: Tensor) -> Tensor:
        recorded.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        logits_fn(images_BCHW)
    return bool(recorded)
