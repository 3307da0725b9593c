"""How hard to attack, and what the attacks see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ..attacks.suites import PGD, Member, Suite
from ..attacks.views import View
from ..checks import check_choice, check_whole
from ..defences.base import Defence
from ..environment import multiplies_bfloat16
from ..modeling import ZeroShotClassifier
from ..threat_model import ThreatModel
from .attack_views import VIEWS, AttackView, Static

Precision = Literal["fp32", "fast"]
MANY_CLASSES = 1000  # for so many no suite leaves an attack out


@dataclass(frozen=True)
class Stage:
    """One attack at one radius, and what it sees."""

    threat_model: ThreatModel
    member: Member
    view: AttackView

    def __str__(self) -> str:
        return f"{self.member.name} at {self.threat_model}"


@dataclass(frozen=True)
class EvaluationSettings:
    """How hard to attack.

    Args:
        radii: radii in units of [0, 1], floats or fractions such as `"1/255"`; none with `NoAttack()`.
        norm: `"linf"` or `"l2"`.
        attack: the attacks: `PGD(...)`, `AutoAttack(...)`, or `AdaptiveWorst(...)`, which brings its own views.
        view: what the attacks see: `Static()`, the classifier alone, is for evaluations without a defence;
            `DefenceBlind()`, `TransferFromAdapted()`, `BPDA()`, `Adaptive()` and `Queries()` are for those with one.
            All judge by the defence.
        batch_size: images per forward; results don't depend on it beyond rounding.
        seed: of all that attacks draw.
        precision: `"fp32"`, or `"fast"`: gradients and queries in bfloat16, every break confirmed in float32, so that
            no image is counted as broken that isn't. Fewer breaks may be found. On a processor that would be slower
            in bfloat16 it is `"fp32"`, and the report says so.
        num_workers: processes that load pictures ahead.
        eot: draws of the defence whose logits are averaged before the loss, in each gradient through it: the gradient
            is that of the mean prediction. Views that don't go through a defence take no such gradient.

    Raises ValueError for a number out of range, a view beside attacks that bring their own, and a stranger's view
    named like one of ours; TypeError for what is no suite or no view.
    """

    radii: Sequence[float | str]
    norm: str = "linf"
    attack: Suite = field(default_factory=PGD)
    view: AttackView = field(default_factory=Static)
    batch_size: int = 128
    seed: int = 0
    precision: Precision = "fp32"
    num_workers: int = 0
    eot: int = 1

    def __post_init__(self) -> None:
        check_whole(1, batch_size=self.batch_size, eot=self.eot)
        check_choice(Precision, precision=self.precision)
        if not isinstance(self.attack, Suite):
            raise TypeError(f"attack={self.attack!r} must be a suite of attacks, such as PGD(20) or AutoAttack().")
        if not isinstance(self.view, AttackView):
            raise TypeError(f"view={self.view!r} must be a view of an attack, such as DefenceBlind() or Adaptive().")
        known = VIEWS.get(self.view.name)
        if known is not None and type(known) is not type(self.view):
            raise ValueError(f"view={self.view!r} is named {known.name!r} like {known!r}; give it a name of its own.")
        if self.attack.about is not None and self.view != Static():
            raise ValueError(f"view={self.view!r} does nothing: attack={self.attack!r} brings its own; leave it out.")
        self.threat_models()

    @property
    def seen(self) -> View:
        """What the attacks see, in words."""
        return self.attack.about or self.view.about

    def is_fast(self, device: torch.device) -> bool:
        """Whether gradients are in bfloat16 on a device."""
        return self.precision == "fast" and multiplies_bfloat16(device.type)

    def precision_with(self, model: ZeroShotClassifier) -> str:
        """The arithmetic of an evaluation of a model where it is."""
        own = str(model.dtype).removeprefix("torch.")
        return f"{own}, gradients in bfloat16" if self.is_fast(model.device) else own

    def threat_models(self) -> list[ThreatModel]:
        """One for each radius, ascending. Raises ValueError if there is none, or a radius is 0, and for any beside
        what attacks nothing.
        """
        if not self.attack.has_radii:
            if self.radii:
                raise ValueError(f"radii={self.radii!r} do nothing: attack={self.attack!r} moves no image.")
            return []
        if isinstance(self.radii, str) or not self.radii:
            raise ValueError(f"radii={self.radii!r} must be a list of at least one radius, such as ['1/255'].")
        threats = sorted({ThreatModel(r, self.norm) for r in self.radii}, key=lambda threat: threat.eps)  # type: ignore[arg-type]
        if not threats[0].eps > 0:
            raise ValueError(f"radii={self.radii!r} hold 0, which is the clean accuracy; leave it out.")
        return threats

    def plan(self, num_classes: int) -> list[tuple[AttackView, Member]]:
        """The attacks of the suite in their order, each with what it sees.

        Raises ValueError for no attacks, for two of one name, and for views of which the suite says nothing.
        """
        found = []
        members = self.attack.members(num_classes)
        if not self.attack.has_radii:
            return []
        if not members or len({member.name for member in members}) < len(members):
            names = [member.name for member in members]
            raise ValueError(f"attack={self.attack!r} has the members {names}; give at least one, each its own name.")
        for member in members:
            if member.view is not None and self.attack.about is None:
                raise ValueError(f"attack={self.attack!r} brings the view {member.view!r}; say so by its `about`.")
            view = member.view or (self.view.asked if member.by_queries else self.view)
            found.append((view, replace(member, view=view)))
        return found

    def stages(self, num_classes: int) -> list[Stage]:
        """Every attack of the plan at each radius, from the smallest radius on."""
        plan = self.plan(num_classes)
        return [Stage(threat, member, view) for threat in self.threat_models() for view, member in plan]

    def attack_parameters(self, num_classes: int, *, to_the_end: bool = False) -> dict[str, Any]:
        """The suite's, with what the view makes of them, in JSON types.

        Args:
            to_the_end: whether the defence lets no attack stop before its end, whatever the view.
        """
        own = self.attack.parameters(self.threat_models(), num_classes)
        if (self.view.to_the_end or to_the_end) and "counts" in own:
            own = {**own, "counts": "the iterate of highest loss"}
        return {**own, "eot": self.eot} if self.seen.goes_through else own

    def check_against(self, defence: Defence) -> None:
        """Raise ValueError unless what is attacked goes with what is judged."""
        name = self.seen.name
        if self.eot > 1 and not self.seen.goes_through:
            raise ValueError(f"eot={self.eot!r} averages gradients through a defence; view {name!r} takes none.")
        if self.seen.of_defence and not defence.defends:
            raise ValueError(f"view {name!r} attacks a test-time defence, and there is none; give defence=...")
        if defence.defends and not self.seen.of_defence:
            raise ValueError(f"view {name!r} says nothing of {defence.name}; choose Adaptive() or AdaptiveWorst().")
        if defence.traits.couples_images:
            members = [member for _, member in self.plan(MANY_CLASSES) if not member.of_detectors]
            lets_go = [member.name for member in members if not member.keeps_rows]
            if lets_go:
                told = f"attack={self.attack!r} lets go of images ({lets_go[0]})"
                raise ValueError(f"{told}, and {defence.name} sees those of a batch together; take PGD.")
        if defence.defends and self.attack.eot > 1:
            raise ValueError(f"attack={self.attack!r} would average equal gradients; set eot of EvaluationSettings.")
