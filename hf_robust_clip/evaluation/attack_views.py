"""What an attack sees of a defence: views, each of which makes the victim of an attack; and the suite of them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attacks import views
from ..attacks.auto_attack import AutoAttack
from ..attacks.pgd import LogitsFn
from ..attacks.suites import PGD, Member, Suite, Victim, plain_victim
from ..attacks.targeted import TargetedPGD
from ..checks import check_whole
from ..defences.base import Defence, GradientPath
from ..modeling import ZeroShotClassifier
from ..prediction import Prediction
from ..prompts.access import with_prompts
from ..threat_model import ThreatModel

EVASION = 10.0  # of scores, beside log p
WEIGHTS = (3.0, 30.0)  # the same, of the attacks that are made on detectors alone
ATTACKERS_SEED = 7919  # added to the evaluation's seed: an attack knows a defence, not its draws


@dataclass(frozen=True)
class Scene:
    """All that a view may make a victim of: a defence in front of a classifier, as it stands before some images.

    Args:
        defence, classifier: the classifier is `prepared` for the defence.
        state: the stream state before these images; None for episodic defences. Nothing made of it is kept.
        seed: of the verdict.
        eot: draws of the defence to average in each gradient through it.
        fast: gradients and queries in bfloat16.
        randomised: whether the classifier itself draws random numbers.
        on_gradient: what attacks show their gradients to.
    """

    defence: Defence
    classifier: ZeroShotClassifier
    state: Any = None
    seed: int = 0
    eot: int = 1
    fast: bool = False
    randomised: bool = False
    on_gradient: Callable[[Tensor], None] | None = None

    @property
    def attackers_seed(self) -> int:
        """What an attack draws by where it asks the defence for gradients."""
        return self.seed + ATTACKERS_SEED

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """The classifier's own."""
        return self.classifier(pixel_values=images_BCHW).logits

    def verdict(self, images_BCHW: Tensor) -> Prediction:
        """What decides."""
        return self.defence.predict(self.classifier, images_BCHW, state=self.state, seed=self.seed)

    def drawn(self, images_BCHW: Tensor, path: GradientPath = "none", draw: int = 0) -> Prediction:
        """What an attacker's own run of the defence gives, with a graph along `path`."""
        seed = self.attackers_seed + draw
        return self.defence.predict(self.classifier, images_BCHW, state=self.state, seed=seed, path=path)

    def cheaper(self, logits_fn: LogitsFn) -> LogitsFn:
        """In bfloat16 if so asked."""
        if not self.fast:
            return logits_fn

        def in_bfloat16(images_BCHW: Tensor) -> Tensor:
            with torch.autocast(images_BCHW.device.type, torch.bfloat16):
                return logits_fn(images_BCHW)

        return in_bfloat16

    def plain(self, logits_fn: LogitsFn) -> Victim:
        """A classifier by these logits, which decide by themselves."""
        victim = plain_victim(logits_fn, self.cheaper(logits_fn) if self.fast else None)
        return replace(victim, deterministic=not self.randomised, seed=self.seed, on_gradient=self.on_gradient)

    def defended(self, surrogate: LogitsFn | None = None) -> Victim:
        """The defence, whose verdict decides; gradients by the surrogate. Where images are coupled none of them is
        let go.
        """
        surrogate = None if surrogate is None else self.cheaper(surrogate)
        whole = self.defence.traits.couples_images
        return Victim(self.verdict, surrogate, seed=self.seed, on_gradient=self.on_gradient, to_the_end=whole)


@dataclass(frozen=True)
class AttackView(ABC):
    """What an attack sees: a frozen dataclass that makes the `Victim` of a `Scene`.

    A new view is one subclass with `victim` and with what `attacks.views.View` says of it, `name` and `text` at least.
    Whatever it shows to an attack, an image stands or falls by the defence's own verdict on it.
    """

    name: ClassVar[str]
    text: ClassVar[str]
    goes_through: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    of_defence: ClassVar[bool] = True
    attacks_the_fallen: ClassVar[bool] = False  # every image at every radius, those that the defence lost too
    to_the_end: ClassVar[bool] = False  # PGD gives the iterate of highest loss: see `Victim`
    held_fixed: ClassVar[bool] = False  # the victim belongs to the very images that it was made for
    path: ClassVar[GradientPath | None] = None  # along which gradients go through the defence, where they do

    def __init_subclass__(cls, about: views.View | None = None) -> None:
        super().__init_subclass__()
        for key, value in (asdict(about) if about else {}).items():
            setattr(cls, key, value)

    @abstractmethod
    def victim(self, scene: Scene, images_BCHW: Tensor) -> Victim:
        """What an attack on these images (B, C, H, W) sees."""

    @property
    def asked(self) -> AttackView:
        """What an attack sees that takes no gradients."""
        return Queries() if self.goes_through else self

    @property
    def about(self) -> views.View:
        """The view in words."""
        return views.View(self.name, self.text, self.goes_through, self.alone, self.of_defence)


@dataclass(frozen=True)
class Static(AttackView, about=views.STATIC):
    """The classifier, white box; for evaluations without a defence."""

    def victim(self, scene: Scene, images_BCHW: Tensor) -> Victim:
        return scene.plain(scene.logits)


@dataclass(frozen=True)
class DefenceBlind(AttackView, about=views.DEFENCE_BLIND):
    """The classifier without the defence, to the end of the attack (PGD keeps the iterate of highest loss). Every
    image is attacked at every radius, whether or not the defence fell before.
    """

    attacks_the_fallen = True
    to_the_end = True

    def victim(self, scene: Scene, images_BCHW: Tensor) -> Victim:
        return replace(scene.plain(scene.logits), to_the_end=True)


@dataclass(frozen=True)
class TransferFromAdapted(AttackView, about=views.TRANSFER_FROM_ADAPTED):
    """The classifier with the prompts that the defence tuned on the clean image, or with the counter-perturbation that
    it found there, held fixed. For a defence that leaves neither, it is the classifier, on the images that stand.
    """

    to_the_end = True
    held_fixed = True

    def victim(self, scene: Scene, images_BCHW: Tensor) -> Victim:
        adapted = scene.drawn(images_BCHW)
        counter = 0 if adapted.images is None else adapted.images - images_BCHW

        def logits_fn(pixels_BCHW: Tensor) -> Tensor:
            moved = pixels_BCHW if adapted.images is None else (pixels_BCHW + counter).clamp(0, 1)
            return with_prompts(scene.classifier, adapted.prompts, lambda: scene.logits(moved))

        return replace(scene.plain(logits_fn), to_the_end=True)


def evading(found: Prediction, weight: float) -> Tensor:
    """What an attack raises of each class to have it named without an alarm, (B, C): logits, and of a detector

        log softmax(z)_c - weight * score_c,

    the score that the image would have in class c (`Prediction.class_scores`), or its only one. So that an attack sees
    when the classifier errs, the class that it names is kept highest, by a constant.
    """
    if found.class_scores is not None:
        values_BC = F.log_softmax(found.logits, dim=1) - weight * found.class_scores
        named_B1 = found.logits.argmax(dim=1, keepdim=True)
        short_B1 = (values_BC.amax(dim=1, keepdim=True) - values_BC.gather(1, named_B1)).detach()
        return values_BC.scatter_add(1, named_B1, torch.where(short_B1 > 0, short_B1 * (1 + 1e-4) + 1e-4, 0.0))
    if found.score is not None and found.score.requires_grad:
        return F.log_softmax(found.logits, dim=1) - weight * found.score[:, None]
    return found.logits


class _Through(AttackView):
    """The defence's logits averaged over `eot` draws, with a graph along a path; of detectors as `evading` says."""

    path: ClassVar[GradientPath]
    evasion: float

    def victim(self, scene: Scene, images_BCHW: Tensor) -> Victim:
        def mean_logits(pixels_BCHW: Tensor) -> Tensor:
            draws = [evading(scene.drawn(pixels_BCHW, self.path, draw), self.evasion) for draw in range(scene.eot)]
            return torch.stack(draws).mean(dim=0)

        return scene.defended(mean_logits)


@dataclass(frozen=True)
class BPDA(_Through, about=views.BPDA):
    """Gradients through the views and the prediction, with what was tuned taken as constant.

    Args:
        evasion: of detectors, how much the score counts beside log p.
    """

    evasion: float = EVASION
    path = "identity"


@dataclass(frozen=True)
class Adaptive(_Through, about=views.ADAPTIVE):
    """Gradients through the views and the tuning.

    Args:
        evasion: of detectors, how much the score counts beside log p.
    """

    evasion: float = EVASION
    path = "through"


@dataclass(frozen=True)
class Queries(AttackView, about=views.QUERIES):
    """The defence's own logits, without gradients."""

    def victim(self, scene: Scene, images_BCHW: Tensor) -> Victim:
        return scene.defended()


VIEWS: dict[str, AttackView] = {
    view.name: view for view in (Static(), DefenceBlind(), TransferFromAdapted(), BPDA(), Adaptive(), Queries())
}


@dataclass(frozen=True)
class AdaptiveWorst(Suite):
    """Every kind of attack on a defence, each on the images that the ones before left standing. An image counts as
    robust only if it withstood them all. Its attacks bring their own views.

    In this order: defence-blind PGD and APGD-CE, PGD transferred from the adapted classifier, BPDA-PGD, PGD and
    APGD-CE through the defence, Square on the defence's own logits. Detectors are then attacked by PGD towards each
    other class c, which raises log p_c - weight * score_c, once for each of two weights (3 and 30).

    Args:
        pgd_steps: of each PGD, to each class; 0 leaves them all out.
        apgd_steps: of each APGD; 0 leaves them out.
        num_queries: of Square; 0 leaves it out.
        blind: suites that take the place of the two blind attacks: those whose own figures stand beside, so that the
            worst of all is never above them.

    Raises ValueError for a negative number, and if nothing is left.
    """

    pgd_steps: int = 20
    apgd_steps: int = 50
    num_queries: int = 500
    blind: Sequence[Suite] = ()

    about = views.ADAPTIVE_WORST

    def __post_init__(self) -> None:
        check_whole(0, **self._numbers())
        if not any(self._numbers().values()) and not self.blind:
            raise ValueError("pgd_steps, apgd_steps and num_queries are all 0: no attack is left.")
        object.__setattr__(self, "blind", tuple(self.blind))

    def _numbers(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("pgd_steps", "apgd_steps", "num_queries")}

    def _plan(self, num_classes: int) -> dict[str, Member | None]:
        """The attacks by name; None if its number is 0."""

        def only(number: int, suite: Callable[[], Suite]) -> Member | None:
            return suite().members(num_classes)[0] if number else None

        pgd = only(self.pgd_steps, lambda: PGD(self.pgd_steps))
        apgd = only(self.apgd_steps, lambda: AutoAttack(("apgd-ce",), num_steps=self.apgd_steps))
        square = only(self.num_queries, lambda: AutoAttack(("square",), num_queries=self.num_queries))
        blind: dict[str, Member | None] = {"pgd": pgd, "apgd-ce": apgd}
        if self.blind:
            blind = {member.name: member for suite in self.blind for member in suite.members(num_classes)}
        plan: dict[str, tuple[AttackView, Member | None]] = {
            **{f"blind {name}": (DefenceBlind(), member) for name, member in blind.items()},
            "transfer pgd": (TransferFromAdapted(), pgd),
            "bpda pgd": (BPDA(), pgd),
            "adaptive pgd": (Adaptive(), pgd),
            "adaptive apgd-ce": (Adaptive(), apgd),
            "square": (Queries(), square),
        }
        found = {
            name: None if member is None else replace(member, name=name, view=view)
            for name, (view, member) in plan.items()
        }
        for weight in WEIGHTS if self.pgd_steps else ():
            (evade,) = TargetedPGD(self.pgd_steps).members(num_classes)
            name = f"evading {weight:g}"
            found[name] = replace(evade, name=name, view=Adaptive(weight), of_detectors=True)
        return found

    def members(self, num_classes: int) -> list[Member]:
        return [member for member in self._plan(num_classes).values() if member is not None]

    def name(self, num_classes: int) -> str:
        parts = zip(("PGD", "APGD", "Square"), self._numbers().values(), strict=True)
        own = [f"{name}-{number}" for name, number in parts if number]
        return "+".join([*(suite.name(num_classes) for suite in self.blind), *own])

    def parameters(self, threat_models: Sequence[ThreatModel], num_classes: int) -> dict[str, Any]:
        found: dict[str, Any] = self._numbers()
        if self.pgd_steps:
            found["step_size"] = PGD(self.pgd_steps).parameters(threat_models, num_classes)["step_size"]
        if self.blind:
            found["blind"] = [
                {"name": suite.name(num_classes), **suite.parameters(threat_models, num_classes)}
                for suite in self.blind
            ]
        out = {name: "its number is 0" for name, member in self._plan(num_classes).items() if member is None}
        return {**found, **({"left_out": out} if out else {})}
