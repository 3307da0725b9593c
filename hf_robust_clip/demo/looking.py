"""One picture before one model: what it names, what an attack makes of it, and where it looks. No page is here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..attacks.suites import Member, Suite, Victim, find_adversarial, is_randomised
from ..checks import check_logits
from ..defences.base import Defence
from ..defences.undefended import Undefended
from ..evaluation.attack_views import Adaptive, AttackView, DefenceBlind, Scene, Static
from ..evaluation.settings import EvaluationSettings
from ..explain import map_share, patch_map, saliency
from ..modeling import ZeroShotClassifier
from ..pictures import to_pixels
from ..prediction import Prediction
from ..threat_model import ThreatModel

TOLD_EVERY = 0.2  # seconds between two words on how far an attack is


class Stopped(Exception):
    """An attack that was ended before its end: nothing that it found counts."""


@dataclass
class Turn:
    """One visitor's turn at the models: how far it is, and what ends it.

    Args:
        seconds: that it may take.
        cancelled: set by somebody else, it ends the turn at the next call of a model.
        tell: is told how often models were called, and what for.
    """

    seconds: float = 60.0
    cancelled: Event = field(default_factory=Event)
    tell: Callable[[int, str], None] = lambda calls, what: None
    calls: int = 0
    what: str = ""
    _ends: float | None = None
    _told: float = 0.0

    def begin(self) -> None:
        """Let the seconds run, from when the models are free."""
        self._ends = time.monotonic() + self.seconds
        self.check()

    def check(self) -> None:
        """Raise Stopped where the visitor, or the clock, ended the turn."""
        if self.cancelled.is_set():
            raise Stopped(f"stopped after {self.calls} model calls: there are no figures.")
        if self._ends is not None and time.monotonic() > self._ends:
            raise Stopped(
                f"not finished after {self.seconds:g} seconds and {self.calls} model calls: there are no figures; "
                "take an attack of fewer steps, or fewer classes."
            )

    def step(self) -> None:
        """Count a call of a model. Raises Stopped as `check` does."""
        self.check()
        self.calls += 1
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY:
            self._told = now
            self.tell(self.calls, self.what)

    def watched(self, victim: Victim) -> Victim:
        """The same victim, each of whose calls is a step of this turn."""

        def counted(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
            def call(images_BCHW: Tensor) -> Any:
                self.step()
                return function(images_BCHW)

            return call

        surrogate = None if victim.surrogate is None else counted(victim.surrogate)
        return replace(victim, predict=counted(victim.predict), surrogate=surrogate)


@dataclass(frozen=True)
class Subject:
    """A model that looks at pictures, with its defence.

    Args:
        name: what the page calls it.
    """

    name: str
    classifier: ZeroShotClassifier
    defence: Defence = field(default_factory=Undefended)


@dataclass(frozen=True)
class Question:
    """What is asked of a picture.

    Args:
        class_names: at least two.
        templates: texts with `{}` for the class name.
        attack: a suite, which ends with its first member that succeeds.
        eps: L-inf radius in units of [0, 1]; 0 for no attack.
        through: whether the attack goes through a defence, or is made on the classifier without it.
        label: the true class; None takes what each model names on the clean picture, so that the attack shows whether
            it changes its mind.
        seed: of all that attacks and defences draw.
    """

    class_names: Sequence[str]
    templates: Sequence[str]
    attack: Suite
    eps: float
    through: bool = True
    label: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            raise ValueError(f"class_names={list(self.class_names)!r}: one class is always right; give two or more.")
        if self.label is not None and not 0 <= self.label < len(self.class_names):
            raise ValueError(f"label={self.label!r} is none of the {len(self.class_names)} classes.")
        _ = self.threat_model  # a radius that can't be

    @property
    def threat_model(self) -> ThreatModel:
        """The ball of the attack."""
        return ThreatModel(self.eps)

    def plan(self, defence: Defence) -> list[tuple[AttackView, Member]]:
        """The attacks on a defence in their order. Raises ValueError for an attack that doesn't go with it."""
        view: AttackView = Static()
        if defence.defends:
            view = Adaptive() if self.through else DefenceBlind()
        settings = EvaluationSettings([self.eps], attack=self.attack, view=view, seed=self.seed)
        settings.check_against(defence)
        return settings.plan(len(self.class_names))


@dataclass(frozen=True)
class Seen:
    """What a model makes of one picture.

    Args:
        image_CHW: the picture as it gets it, in [0, 1].
        probabilities_C: softmax of its logits, after the defence where there is one.
        milliseconds: that the prediction took.
        flagged: whether a detector takes it for attacked; None where nothing detects.
        map_HW: cosine of each patch with the text of the class that is asked about, in [-1, 1].
        saliency_HW: length of that class's logit's gradient by each pixel.
    """

    image_CHW: Tensor
    probabilities_C: Tensor
    milliseconds: float
    flagged: bool | None
    map_HW: Tensor
    saliency_HW: Tensor

    @property
    def named(self) -> int:
        """The class of highest probability."""
        return int(self.probabilities_C.argmax())


@dataclass(frozen=True)
class Look:
    """One picture before one subject.

    Args:
        label: the class that the attack is made against, and that maps are of.
        right: whether the clean picture is given that class, and not flagged.
        attacked: None where nothing was attacked: radius 0, or a model that is wrong as it is.
        fell: whether the verdict on the attacked picture is wrong.
        broken_by: the attack that it fell to; None where it withstood all.
        falls_rounded: whether it is wrong on the attacked picture in 8 bits too, as it is shown; None without one.
        seen: in words what the attack saw.
        map_share: share of the picture's side that patches cover.
    """

    name: str
    defence: str | None
    class_names: tuple[str, ...]
    eps: float
    attack: str
    seen: str
    label: int
    right: bool
    clean: Seen
    attacked: Seen | None
    fell: bool
    broken_by: str | None
    falls_rounded: bool | None
    attack_seconds: float
    map_share: float


def look(subject: Subject, picture: Image.Image, question: Question, turn: Turn | None = None) -> Look:
    """Show a picture to a subject, attack it, and show it again.

    Members of the attack run one after the other, the first that changes the verdict ends it; else the picture that
    left the true class least is shown. Probabilities and verdicts are those of unrounded pixels. Gradients, queries
    and the verdict are as in an evaluation (`evaluate_robustness`) of this one picture; a defence with a stream state
    meets it as the first of its stream. The classifier comes back as it was, classes included; nobody else may use it
    meanwhile.

    Raises ValueError for classes, templates, pictures and attacks that don't go with the model, FloatingPointError for
    logits that aren't finite, Stopped if the turn is ended.
    """
    turn = turn or Turn()
    classifier, defence = subject.classifier, subject.defence
    with classifier.same_classes_after():
        classifier.set_classes(question.class_names, question.templates)
        dtype = torch.promote_types(classifier.dtype, torch.float32)  # half precision is too coarse for an attack
        pixels_1CHW = to_pixels(classifier.require_processor(), [picture]).to(classifier.device, dtype)
        classifier.check_pixels(pixels_1CHW, values=True)
        plan = question.plan(defence) if question.eps > 0 else []
        turn.what = f"{subject.name}: the picture as it is"
        with defence.prepared(classifier):
            scene = _scene(subject, question, pixels_1CHW)
            clean, clean_ms = _timed(scene, turn, pixels_1CHW)
            label = int(clean.logits.argmax()) if question.label is None else question.label
            label_1 = torch.tensor([label], device=pixels_1CHW.device)
            right = bool(clean.right(label_1))
            if not right:
                plan = []
            turn.what = f"{subject.name}: {question.attack.name(len(question.class_names))}"
            start = time.perf_counter()
            found = _attacked(scene, plan, question, turn, pixels_1CHW, label_1)
            seconds = time.perf_counter() - start
            adv_1CHW, broken_by = found or (None, None)
            attacked, attacked_ms, falls_rounded = None, 0.0, None
            if adv_1CHW is not None:
                attacked, attacked_ms = _timed(scene, turn, adv_1CHW)
                shown, _ = _timed(scene, turn, (adv_1CHW * 255).round() / 255)
                falls_rounded = not bool(shown.right(label_1, attacked=True))
        turn.what = f"{subject.name}: where it looks"
        return Look(
            name=subject.name,
            defence=defence.name if defence.defends else None,
            class_names=tuple(question.class_names),
            eps=question.eps,
            attack=question.attack.name(len(question.class_names)),
            seen=plan[0][0].about.text if plan else "",
            label=label,
            right=right,
            clean=_seen(classifier, pixels_1CHW, clean, clean_ms, label_1, turn),
            attacked=None
            if adv_1CHW is None or attacked is None
            else _seen(classifier, adv_1CHW, attacked, attacked_ms, label_1, turn),
            fell=broken_by is not None,
            broken_by=broken_by,
            falls_rounded=falls_rounded,
            attack_seconds=seconds if plan else 0.0,
            map_share=map_share(classifier),
        )


def _scene(subject: Subject, question: Question, pixels_1CHW: Tensor) -> Scene:
    classifier, defence = subject.classifier, subject.defence
    scene = Scene(defence, classifier, state=defence.start(classifier), seed=question.seed)
    return replace(scene, randomised=is_randomised(scene.logits, pixels_1CHW))


def _timed(scene: Scene, turn: Turn, pixels_1CHW: Tensor) -> tuple[Prediction, float]:
    """The verdict, and the milliseconds that it took."""
    turn.step()
    with _clock(pixels_1CHW.device) as elapsed:
        found = scene.verdict(pixels_1CHW)
    check_logits(found.logits, scene.defence.name)
    return found, 1000 * elapsed[0]


@contextmanager
def _clock(device: torch.device) -> Iterator[list[float]]:
    """Seconds, when all that the device was given is done."""
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found.append(time.perf_counter() - start)


def _attacked(
    scene: Scene,
    plan: Sequence[tuple[AttackView, Member]],
    question: Question,
    turn: Turn,
    pixels_1CHW: Tensor,
    label_1: Tensor,
) -> tuple[Tensor, str | None] | None:
    """The attacked picture and by which attack it fell, None if by none; None without attacks."""
    best: tuple[float, Tensor] | None = None
    for view, member in plan:
        victim = turn.watched(view.victim(scene, pixels_1CHW))
        adv_1CHW = find_adversarial(member, victim, pixels_1CHW, label_1, question.threat_model)
        turn.step()
        verdict = scene.verdict(adv_1CHW)
        if not bool(verdict.right(label_1, attacked=True)):
            return adv_1CHW, member.name
        left = float(verdict.logits.softmax(dim=1)[0, label_1])
        if best is None or left < best[0]:
            best = left, adv_1CHW
    return None if best is None else (best[1], None)


def _seen(
    classifier: ZeroShotClassifier,
    pixels_1CHW: Tensor,
    found: Prediction,
    milliseconds: float,
    label_1: Tensor,
    turn: Turn,
) -> Seen:
    turn.step()
    return Seen(
        image_CHW=pixels_1CHW[0].float().cpu(),
        probabilities_C=found.logits[0].double().softmax(dim=0).cpu(),
        milliseconds=milliseconds,
        flagged=None if found.flagged is None else bool(found.flagged[0]),
        map_HW=patch_map(classifier, pixels_1CHW)[0, int(label_1)].cpu(),
        saliency_HW=saliency(classifier, pixels_1CHW, label_1)[0].cpu(),
    )
