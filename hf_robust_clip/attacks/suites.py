"""What an evaluation runs: attacks one after the other, each on the images that the ones before left standing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..checks import checked_labels
from ..digests import plain
from ..prediction import Predict, by_logits, withstood
from ..threat_model import ThreatModel, parse_radius
from .losses import cross_entropy, cw_margin
from .pgd import ClassificationLoss, LogitsFn, OnGradient, PGDSettings, pgd, pgd_until_misclassified
from .views import View

if TYPE_CHECKING:
    from ..evaluation.attack_views import AttackView


@dataclass(frozen=True)
class Victim:
    """What is under attack.

    Args:
        predict: images (B, C, H, W) in [0, 1] to their `Prediction`, whose verdict decides whether an image falls.
        surrogate: images to logits, of which gradients and queries are taken in place of the prediction's own: a
            cheaper classifier (bfloat16, say), or one with gradients. None: the prediction's.
        logits_decide: the verdict is that of the very logits that a gradient is taken of, so nothing is asked twice.
        deterministic: False if the same image may get different logits.
        seed: of all that attacks draw.
        on_gradient: called with each gradient that PGD, APGD and FAB take.
        to_the_end: PGD takes all its steps and gives the iterate of highest loss, whatever the verdict on it:
            for images that are then shown to another classifier.
    """

    predict: Predict
    surrogate: LogitsFn | None = None
    logits_decide: bool = False
    deterministic: bool = True
    seed: int = 0
    on_gradient: OnGradient | None = None
    to_the_end: bool = False

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Those that decide."""
        return self.predict(images_BCHW).logits

    @property
    def gradient_fn(self) -> LogitsFn:
        """What gradients are taken of."""
        return self.surrogate or self.logits

    @property
    def queried(self) -> Predict:
        """What queries are answered by."""
        return self.predict if self.surrogate is None else by_logits(self.surrogate)

    @property
    def confirm(self) -> Predict | None:
        """What must agree that an image fell; None where the logits of `gradient_fn` decide."""
        return None if self.logits_decide else self.predict


def plain_victim(logits_fn: LogitsFn, cheaper: LogitsFn | None = None) -> Victim:
    """A classifier under attack: images to logits that decide, and if given others for gradients and queries."""
    return Victim(by_logits(logits_fn), cheaper, logits_decide=cheaper is None)


Attack = Callable[[Victim, Tensor, Tensor, ThreatModel], Tensor]  # of images and labels to images in the threat model


@dataclass(frozen=True)
class Member:
    """One attack of a suite.

    Args:
        name: what reports call it.
        run: the attack.
        view: what it sees; None: what the evaluation's settings say.
        by_queries: it takes no gradients.
        keeps_rows: where the victim goes `to_the_end`, it asks about the whole batch each time; other attacks let go
            of images.
        of_detectors: it is made only on a defence that flags images.
    """

    name: str
    run: Attack
    view: AttackView | None = None
    by_queries: bool = False
    keeps_rows: bool = False
    of_detectors: bool = False


class Suite(ABC):
    """Attacks with their settings. A new attack is one subclass with `members`; its settings are a dataclass's fields.

    Members that bring views of their own go with `about`, which says in words what the suite sees.
    """

    eot: int = 1  # gradients that its attacks average at each step
    has_radii: ClassVar[bool] = True  # False of what looks at the images as they are
    about: ClassVar[View | None] = None  # where the members bring views of their own: these in words

    @property
    def is_standard(self) -> bool:
        """Whether it is the attack whose figure others quote, not one of many."""
        return False

    @abstractmethod
    def members(self, num_classes: int) -> list[Member]:
        """The attacks in their order, those left out that are not defined for so few classes."""

    def name(self, num_classes: int) -> str:
        """What tables call it."""
        return type(self).__name__

    def parameters(self, threat_models: Sequence[ThreatModel], num_classes: int) -> dict[str, Any]:
        """All settings, as JSON types: where the class is, and the fields of a dataclass."""
        cls = type(self)
        own: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        return {"class": f"{cls.__module__}.{cls.__qualname__}", **{f.name: plain(getattr(self, f.name)) for f in own}}


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

    def members(self, num_classes: int) -> list[Member]:
        return [Member("cw" if self.loss is cw_margin else "pgd", self._run, keeps_rows=True)]

    def _run(self, victim: Victim, images_BCHW: Tensor, labels_B: Tensor, threat_model: ThreatModel) -> Tensor:
        walk: dict[str, Any] = {"num_steps": self.num_steps, "step_size": self.step_at(threat_model)}
        walk |= {"random_start": self.random_start, "seed": victim.seed, "on_gradient": victim.on_gradient}
        gradient_fn = victim.gradient_fn
        if victim.to_the_end:
            return pgd(
                lambda pixels: self.loss(gradient_fn(pixels), labels_B),
                images_BCHW,
                threat_model,
                keep_best=True,
                **walk,
            )
        walk |= {"loss": self.loss, "confirm": victim.confirm, "deterministic": victim.deterministic}
        return pgd_until_misclassified(gradient_fn, images_BCHW, labels_B, threat_model, **walk)

    def name(self, num_classes: int) -> str:
        return f"{'CW' if self.loss is cw_margin else 'PGD'}-{self.num_steps}"

    def parameters(self, threat_models: Sequence[ThreatModel], num_classes: int) -> dict[str, Any]:
        steps = [self.step_at(threat_model) for threat_model in threat_models]
        return {**asdict(self), "loss": self.loss.__name__, "step_size": steps, "counts": "any misclassified iterate"}


@dataclass(frozen=True)
class NoAttack(Suite):
    """The images as they are: clean accuracy alone, without radii. For pictures that were attacked already."""

    has_radii = False

    def members(self, num_classes: int) -> list[Member]:
        return []

    def name(self, num_classes: int) -> str:
        return "no attack"


def find_adversarial(
    member: Member, victim: Victim, images_BCHW: Tensor, labels_B: Tensor, threat_model: ThreatModel
) -> Tensor:
    """Adversarial images (B, C, H, W).

    Raises RuntimeError if an attack left the threat model: its result would mean nothing.
    """
    images_BCHW = threat_model.checked(images_BCHW)
    labels_B = checked_labels(labels_B, len(images_BCHW)).to(images_BCHW.device)
    adv_BCHW = member.run(victim, images_BCHW, labels_B, threat_model)
    if not bool(threat_model.contains(adv_BCHW, images_BCHW).all()):
        furthest = float(threat_model.distance(adv_BCHW, images_BCHW).amax())
        raise RuntimeError(f"an attack left {threat_model}: it moved an image by {furthest:.6g}.")
    return adv_BCHW


def run_member(
    member: Member, victim: Victim, images_BCHW: Tensor, labels_B: Tensor, threat_model: ThreatModel
) -> tuple[Tensor, Tensor]:
    """What `find_adversarial` gives, and whether each still stands by `victim.predict`."""
    adv_BCHW = find_adversarial(member, victim, images_BCHW, labels_B, threat_model)
    return adv_BCHW, withstood(victim.predict, adv_BCHW, labels_B)


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
