"""AutoAttack (Croce and Hein, ICML 2020) for zero-shot classifiers of any number of classes.

FAB and Square are the authors' own code, from their package `pyautoattack`. Auto-PGD is ours (`apgd.py`): it finds for
every image what theirs finds for that image alone, and lets go of an image at once when it falls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor

from ..checks import Blindness, check_whole, checked_labels
from ..prediction import Predict, Prediction, by_logits, withstood
from ..threat_model import ThreatModel
from .apgd import APGDSettings, apgd, apgd_targeted
from .losses import cross_entropy, cw_margin, dlr
from .pgd import LogitsFn
from .suites import Attack, Member, Suite, Victim, plain_victim, run_member

AttackName = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
LEAST_CLASSES: dict[str, int] = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab-t": 2, "square": 2}
STANDARD: tuple[AttackName, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")
RAND: tuple[AttackName, ...] = ("apgd-ce", "apgd-dlr")
BY_QUERIES: tuple[AttackName, ...] = ("square",)
_NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True)
class AutoAttack(Suite):
    """A suite of AutoAttack's members. The defaults are its `standard` version; `AutoAttack.rand()` is its `rand`.

    Args:
        attacks: members in their order.
        num_steps: of APGD and FAB.
        num_targets: classes that targeted attacks try, those next in clean logit; C - 1 where there are fewer.
        num_queries: of Square.
        eot: gradients that APGD averages at each step, for classifiers that draw random numbers.

    Members that are not defined for so few classes are left out, and reports say so: targeted DLR needs four classes,
    DLR three. With one class nothing can be misclassified.
    Raises ValueError for an unknown or missing member and a number below 1.
    """

    attacks: Sequence[AttackName] = STANDARD
    num_steps: int = 100
    num_targets: int = 9
    num_queries: int = 5000
    eot: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.attacks if name not in get_args(AttackName)]
        if unknown or not self.attacks or isinstance(self.attacks, str) or len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks={self.attacks!r} must be distinct names of {', '.join(get_args(AttackName))}.")
        APGDSettings(self.num_steps, 1, self.eot)
        check_whole(1, num_targets=self.num_targets, num_queries=self.num_queries)
        object.__setattr__(self, "attacks", tuple(self.attacks))

    @classmethod
    def rand(cls) -> AutoAttack:
        """The version for classifiers that draw random numbers: APGD-CE and APGD-DLR over 20 draws."""
        return cls(RAND, eot=20)

    @property
    def is_standard(self) -> bool:
        return tuple(self.attacks) in (STANDARD, RAND)

    def left_out(self, num_classes: int) -> dict[str, str]:
        """Members that so few classes don't allow, each with the reason."""
        return {
            name: f"needs {LEAST_CLASSES[name]} classes, there are {num_classes}"
            for name in self.attacks
            if num_classes < LEAST_CLASSES[name]
        }

    def members(self, num_classes: int) -> list[Member]:
        """Raises ValueError if no member is left."""
        settings = APGDSettings(self.num_steps, 1, self.eot)
        targets = min(self.num_targets, num_classes - 1)
        known: dict[str, Attack] = {
            "apgd-ce": partial(_of_victim, partial(apgd, settings=settings, loss=cross_entropy)),
            "apgd-dlr": partial(_of_victim, partial(apgd, settings=settings, loss=dlr)),
            "apgd-t": partial(_of_victim, partial(apgd_targeted, settings=settings, num_targets=targets)),
            "fab-t": partial(_fab_targeted, self.num_steps, targets),
            "square": partial(_square, self.num_queries),
        }
        out = self.left_out(num_classes)
        if len(out) == len(self.attacks):
            raise ValueError(f"no attack of {', '.join(self.attacks)} is defined for {num_classes} class(es).")
        return [Member(name, known[name], by_queries=name in BY_QUERIES) for name in self.attacks if name not in out]

    def name(self, num_classes: int) -> str:
        named = {STANDARD: "AutoAttack", RAND: "AutoAttack rand"}.get(tuple(self.attacks))
        left = [member.name for member in self.members(num_classes)]
        whole = named or "+".join(name.upper() for name in self.attacks)
        return whole if len(left) == len(self.attacks) else f"{whole} ({', '.join(left)} only)"

    def parameters(self, threat_models: Sequence[ThreatModel], num_classes: int) -> dict[str, Any]:
        own = {**asdict(self), "attacks": list(self.attacks), "num_targets": min(self.num_targets, num_classes - 1)}
        out = self.left_out(num_classes)
        return {**own, "left_out": out} if out else own


def auto_attack(
    logits_fn: LogitsFn,
    images_BCHW: Tensor,
    labels_B: Tensor,
    threat_model: ThreatModel,
    *,
    version: Literal["standard", "rand"] | AutoAttack = "standard",
    batch_size: int = 250,
    seed: int = 0,
    fast_logits_fn: LogitsFn | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """AutoAttack on images in memory: the survivors of each member are batched anew for the next.

    For whole datasets, several processes and runs that can be resumed, see `evaluate_robustness`. Freeze the
    classifier's parameters before: FAB's backward would fill their `.grad`. Call it inside the classifier's
    `fixed_class_embeds()`, or every forward looks whether its texts have changed, for which a GPU is waited for.

    Args:
        logits_fn: images to float32 logits, one column per class.
        images_BCHW, labels_B: float images within bounds, and their classes.
        version: `"standard"`, `"rand"` (for classifiers that draw random numbers), or a suite of your own.
        batch_size: images per forward; the result doesn't depend on it beyond rounding.
        seed: of all that the attacks draw.
        fast_logits_fn: a cheaper classifier for gradients and queries; every break is confirmed by `logits_fn`.

    Returns:
        Images in the threat model, adversarial where an attack succeeded and unchanged elsewhere, and the accuracy in
        [0, 1] left when clean and after each member, in their order.

    Raises ValueError for images outside the bounds, no images, one class alone, an unknown version.
    """
    suites = {"standard": AutoAttack(), "rand": AutoAttack.rand()}
    suite = version if isinstance(version, AutoAttack) else suites.get(version)
    if suite is None:
        raise ValueError(f"version={version!r} is unknown; choose 'standard', 'rand' or an AutoAttack(...).")
    images_BCHW = threat_model.checked(images_BCHW)
    if len(images_BCHW) == 0:
        raise ValueError("images is empty; nothing to attack.")
    found_BCHW = images_BCHW.detach().clone()
    with torch.no_grad():
        logits_BC = torch.cat([logits_fn(images) for images in found_BCHW.split(batch_size)])
    labels_B = checked_labels(labels_B, *logits_BC.shape).to(images_BCHW.device)
    blindness = Blindness()
    victim = replace(plain_victim(logits_fn, fast_logits_fn), seed=seed, on_gradient=blindness)
    rows = Prediction(logits_BC).right(labels_B).nonzero().squeeze(1)
    left = {"clean": len(rows) / len(labels_B)}
    for member in suite.members(logits_BC.shape[1]):
        standing = []
        for batch in rows.split(batch_size):
            adv_BCHW, stands_B = run_member(member, victim, images_BCHW[batch], labels_B[batch], threat_model)
            found_BCHW[batch[~stands_B]] = adv_BCHW[~stands_B]
            standing.append(batch[stands_B])
        rows = torch.cat(standing) if standing else rows
        left[member.name] = len(rows) / len(labels_B)
    blindness.warn("auto_attack")
    return found_BCHW, left


def _of_victim(
    attack: Callable[..., Tensor], victim: Victim, images: Tensor, labels: Tensor, tm: ThreatModel
) -> Tensor:
    """One of our APGDs on a victim."""
    told = {"seed": victim.seed, "confirm": victim.confirm, "on_gradient": victim.on_gradient}
    return attack(victim.gradient_fn, images, labels, tm, **told)


def _fab_targeted(
    num_steps: int, num_targets: int, victim: Victim, images: Tensor, labels: Tensor, tm: ThreatModel
) -> Tensor:
    """FAB towards each target, without a random start: it draws nothing."""

    def attack(predict: Predict, images: Tensor, labels: Tensor) -> Tensor:
        fab = FABAttack_PT(
            lambda pixels: predict(pixels).logits, norm=_NORMS[tm.norm], n_restarts=1, n_iter=num_steps, eps=tm.eps,
            seed=victim.seed, targeted=True, device=images.device, n_target_classes=num_targets,
        )  # fmt: skip
        return fab.perturb(images, labels)

    return _authors_code(attack, by_logits(victim.gradient_fn), victim, images, labels, tm)


def _square(num_queries: int, victim: Victim, images: Tensor, labels: Tensor, tm: ThreatModel) -> Tensor:
    def attack(predict: Predict, images: Tensor, labels: Tensor) -> Tensor:
        square = _SquareAlone(
            lambda pixels: predict(pixels).logits, norm=_NORMS[tm.norm], n_queries=num_queries, eps=tm.eps, p_init=0.8,
            n_restarts=1, seed=victim.seed, verbose=False, device=images.device, resc_schedule=False,
        )  # fmt: skip
        square.judge = predict
        return square.perturb(images, labels)

    return _authors_code(attack, victim.queried, victim, images, labels, tm)


class _SquareAlone(SquareAttack):
    """Square that draws for each image what it would draw for this image alone, so that batches don't matter, and in
    which an image falls exactly when the verdict of `judge` says so, ties and flags included.
    """

    judge: Predict

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = self.judge(x)
        margin_B = -cw_margin(found.logits, y)
        tiny = torch.finfo(margin_B.dtype).tiny
        stands_B = found.verdict(y, attacked=True)
        margin_B = torch.where(stands_B, margin_B.clamp_min(tiny), margin_B.clamp_max(-tiny))
        return margin_B, margin_B

    def random_choice(self, shape: Sequence[int]) -> Tensor:
        if len(shape) == 4:  # one value of each per image: (B, channels, 1, width) or (B, channels, 1, 1)
            return super().random_choice([1, *shape[1:]]).expand(*shape)
        return super().random_choice(shape)


def _authors_code(
    attack: Callable[[Predict, Tensor, Tensor], Tensor],
    predict: Predict,
    victim: Victim,
    images: Tensor,
    labels: Tensor,
    tm: ThreatModel,
) -> Tensor:
    """Run one of the authors' attacks on `predict`: the global random state comes back, breaks of a surrogate are
    confirmed.

    FAB mixes its own float32 with what it is given, so all is float32 to it. Where the surrogate claims a break that
    the victim's prediction denies, the image is attacked again, by the latter.
    """
    if tm.eps == 0 or len(images) == 0:
        return images.clone()

    def in_float32(predict: Predict, some: Tensor, own: Tensor) -> Tensor:
        def watched(pixels: Tensor) -> Prediction:
            if pixels.requires_grad and victim.on_gradient is not None:
                pixels.register_hook(victim.on_gradient)
            found = predict(pixels.to(some.dtype))
            return replace(found, logits=found.logits.float())

        adv = attack(watched, some.float(), own).detach()
        return torch.where(adv == some.float(), some, adv.to(some.dtype))

    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        adv = in_float32(predict, images, labels)
        if victim.surrogate is not None:
            claimed, real = (~withstood(judge, adv, labels) for judge in (predict, victim.predict))
            again = (claimed & ~real).nonzero().squeeze(1)
            if len(again):
                adv[again] = in_float32(victim.predict, images[again], labels[again])
    return adv
