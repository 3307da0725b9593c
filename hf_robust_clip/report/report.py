"""What an evaluation measured, with everything needed to read it: `RobustnessReport`, and the `frame` of several."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from ..attacks.views import KNOWN_VIEWS, View
from ..checks import BLIND_ABOVE
from ..metrics import wilson_interval
from ..modeling import DESCRIPTION
from ..secrets import refuse_tokens
from ..threat_model import ThreatModel
from .outcomes import Outcomes

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

CONTROLS = ("static prompts", "random prompts", "ensemble-64")
CLEAN, ROBUST = "accuracy", "robust_accuracy"
AS_SAVED = "robust_accuracy_as_"  # begins the metric of adversarial pictures that were saved in some format
DETECTION = (  # of detectors: among clean images and those with a wrong class; among attacked ones
    "detection_fpr",
    "detection_fpr_of_errors",
    "detection_auroc",
    "detection_tpr_at_5_fpr",
    "detection_of_successful",
    "detection_auroc_of_successful",
)


@dataclass(frozen=True)
class Measurement:
    """One figure.

    Args:
        metric: `"accuracy"` on clean images, `"robust_accuracy"` under attack, or any other share, such as
            `"attack_success_rate"`, `"detection_auroc"`, `"robust_accuracy_as_uint8"`.
        value: in [0, 1].
        n: images that it is of.
        eps: radius of the attack in units of [0, 1]; 0 for clean images.
        judge: None for the model (behind its defence, if it has one), else the control that saw the same images.
        member: where it is the accuracy left after one attack of a suite, the name of that attack.
        class_name: where it is of the images of one class alone.
        counted: whether it is a share of n images that were counted, so that its interval is Wilson's.

    Raises ValueError for a value outside [0, 1], no images and a negative radius.
    """

    metric: str
    value: float
    n: int
    eps: float = 0.0
    judge: str | None = None
    member: str | None = None
    class_name: str | None = None
    counted: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(f"{self.told}={self.value!r} must be in [0, 1].")
        if self.n < 1:
            raise ValueError(f"n={self.n!r} of {self.told}: nothing was evaluated.")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps={self.eps!r} of {self.told} must be at least 0.")

    @property
    def told(self) -> str:
        """What it is, without its value."""
        radius = f"[{self.eps:g}]" if self.eps else ""
        return self.metric + radius + "".join(f" of {x!r}" for x in (self.judge, self.member, self.class_name) if x)

    @property
    def is_headline(self) -> bool:
        """Whether it is of all images, under all attacks at its radius."""
        return self.member is None and self.class_name is None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % Wilson interval; None of what wasn't counted."""
        return wilson_interval(round(self.value * self.n), self.n) if self.counted else None


def as_saved(pixels: str) -> str:
    """The metric of adversarial pictures as they are saved, in `"uint8"` say: the share that is right."""
    return AS_SAVED + pixels


def accuracies(
    clean: float,
    after_each: Mapping[float, Mapping[str, float]],
    per_class: Mapping[str, tuple[int, int, int]],
    controls: Mapping[str, Mapping[float, float]] | None = None,
) -> tuple[Measurement, ...]:
    """The measurements of a report, from accuracies in [0, 1] and counts.

    Args:
        clean: accuracy on clean images.
        after_each: by radius in units of [0, 1], the accuracy left after each attack of the suite, in the order in
            which they ran; the last one is the robust accuracy.
        per_class: class name to (images, correct clean, correct at the largest radius).
        controls: by name of a control, its accuracy by radius, 0 for clean, on the very images that the defence was
            shown.

    Raises ValueError where a radius has no attack, and as `Measurement` does.
    """
    n = sum(images for images, _, _ in per_class.values())
    rows = [Measurement(CLEAN, clean, n)]
    for eps, left in sorted(after_each.items()):
        if not left:
            raise ValueError(f"after_each[{eps:g}] is empty: no attack was made at this radius.")
        rows += [Measurement(ROBUST, value, n, eps, member=member) for member, value in left.items()]
        rows.append(Measurement(ROBUST, list(left.values())[-1], n, eps))
    for judge, by_radius in (controls or {}).items():
        rows += [_accuracy(value, n, eps, judge=judge) for eps, value in sorted(by_radius.items())]
    for name, (images, *right) in per_class.items():
        radii = dict.fromkeys((0.0, max(after_each, default=0.0))) if images else ()
        rows += [
            _accuracy(count / images, images, eps, class_name=name) for eps, count in zip(radii, right, strict=False)
        ]
    return tuple(rows)


def _accuracy(
    value: float, n: int, eps: float, *, judge: str | None = None, class_name: str | None = None
) -> Measurement:
    return Measurement(ROBUST if eps else CLEAN, value, n, eps, judge, class_name=class_name)


@dataclass(frozen=True)
class RobustnessReport:
    """What was measured of one model on one set of images, and how. Every field but the last five is mandatory.

    Args:
        name: what tables call the model, e.g. `"PMG-AFT"`.
        task: what tables call the images, e.g. `"held-out classes"`.
        model, model_revision: what was evaluated; revision `"local"` for a folder.
        dataset, dataset_revision, split: the images.
        num_images: how many were evaluated.
        class_names: the classes among which the model chose, in order.
        prompt_hash: SHA-256 (16 digits) of class names, templates and `descriptions`, in order.
        attack, attack_parameters: e.g. `"PGD-20"`, and all its settings, in JSON types; a list under `"step_size"` has
            one for each radius, a dict under `"left_out"` says why members of a suite did not run.
        view: what the attack saw; `KNOWN_VIEWS` has those of this library.
        attack_resolution: side of the attacked images in pixels.
        norm: `"linf"` or `"l2"`.
        model_flags: what was checked of the model before the attack: `{"randomised": False, "optimising": False}`.
        zero_gradient_share: share in [0, 1] of exactly-zero input gradients over the whole attack. Well above 0, the
            attack was blind and the robust accuracy means nothing.
        seed, precision: of the attack and of the forward passes.
        library_versions, hardware: where it was measured.
        measurements: all figures; `accuracies` makes those of an attack by radii. There must be the clean accuracy,
            at each radius the robust accuracy and what each attack left (the last is the robust accuracy), and
            accuracies by class, clean and at the largest radius, which add up.
        defence: None, or the test-time defence that predicted in the model's place, in JSON types: `"name"`,
            `"parameters"`, `"traits"` (`"randomised"`, `"optimising"`, `"episodic"`, `"couples_images"`), `"tuned"`
            (values tuned for each image), `"fallbacks"` (predictions, of clean and attacked images, whose tuning was
            not finite and didn't count) and `"ms_per_image"` (on the clean images); `"remarks"`, sentences, where
            there are some. Of a randomised or optimising one, each of `CONTROLS` has measurements too.
        templates: the texts, with `{}` for the class name, that class names were put in; None where nobody noted them.
        standard_attack: whether the attack is the standard one that others quote (AutoAttack), not one of many.
        descriptions: SHA-256 (16 digits) of the texts that templates with `{description}` took; None without any.
        outcomes: on which images the model (behind its defence, if it has one) was right, clean and at each radius, by
            which models are compared image by image; None where nobody noted them. They must give the accuracies.

    Raises ValueError for a field that is empty, unknown, out of range, at odds with another, or holds an access token,
    TypeError for attack parameters that JSON can't hold. So too for a randomised or optimising defence under a view of
    the classifier alone or without its controls, and for a view of a defence where there is none.
    """

    name: str
    task: str
    model: str
    model_revision: str
    dataset: str
    dataset_revision: str
    split: str
    num_images: int
    class_names: tuple[str, ...]
    prompt_hash: str
    attack: str
    attack_parameters: dict[str, Any]
    view: View
    attack_resolution: int
    norm: str
    model_flags: dict[str, bool]
    zero_gradient_share: float
    seed: int
    precision: str
    library_versions: dict[str, str]
    hardware: str
    measurements: tuple[Measurement, ...]
    defence: dict[str, Any] | None = None
    templates: tuple[str, ...] | None = None
    standard_attack: bool = False
    descriptions: str | None = None
    outcomes: Outcomes | None = None

    def __post_init__(self) -> None:
        for name in ("class_names", "measurements", "templates"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        for field in fields(self):
            if field.default is MISSING and getattr(self, field.name) in (None, "", {}, ()):
                raise ValueError(f"{field.name} is missing; a report must say it.")
        for name in ("attack_parameters", "defence"):  # as a file gives them back
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        refuse_tokens({name: value for name, value in vars(self).items() if isinstance(value, str)}, "report")
        if self.templates is not None:
            if prompt_hash(self.class_names, self.templates, self.descriptions) != self.prompt_hash:
                raise ValueError(
                    f"templates={self.templates!r} (descriptions={self.descriptions!r}) are not those of "
                    f"prompt_hash={self.prompt_hash!r}."
                )
            if any(DESCRIPTION in text for text in self.templates) != (self.descriptions is not None):
                raise ValueError(f"templates={self.templates!r} and descriptions={self.descriptions!r} go together.")
        if not 0 <= self.zero_gradient_share <= 1:
            raise ValueError(f"zero_gradient_share={self.zero_gradient_share!r} must be in [0, 1].")
        self._check_view()
        self._check_defence()
        self._check_figures()
        self._check_classes()
        self._check_outcomes()

    def _check_view(self) -> None:
        if self.view != (known := KNOWN_VIEWS.get(self.view.name, self.view)):
            raise ValueError(f"view={self.view!r} is not what {self.view.name!r} is: {known!r}.")
        if self.defence is None and self.view.of_defence:
            raise ValueError(f"view={self.view.name!r} is an attack on a test-time defence; defence is missing.")

    def _check_defence(self) -> None:
        if self.defence is None:
            return
        needed = {"name", "parameters", "traits", "fallbacks", "ms_per_image"}
        lacking = sorted(needed - set(self.defence))
        if lacking or not {"randomised", "optimising"} <= set(self.defence["traits"]):
            raise ValueError(f"defence lacks {', '.join(lacking or ['traits'])}; a report must say it.")
        if self.defence["traits"]["randomised"] or self.defence["traits"]["optimising"]:
            if self.view.alone and not self.view.of_defence:
                raise ValueError(f"view={self.view.name!r} says nothing of {self.defence['name']}; take 'adaptive'.")
            if missing := [name for name in CONTROLS if name not in self.controls]:
                raise ValueError(f"measurements lack the controls {', '.join(missing)}.")

    def _check_figures(self) -> None:
        known: set[tuple[Any, ...]] = set()
        for row in self.measurements:
            what = row.metric, row.eps, row.judge, row.member, row.class_name
            if what in known:
                raise ValueError(f"measurements have {row.told} twice.")
            known.add(what)
            if row.eps:
                ThreatModel(row.eps, self.norm)  # type: ignore[arg-type]  # raises for what is no norm or radius
            if (row.metric == ROBUST) != (row.eps > 0) and row.metric in (CLEAN, ROBUST):
                raise ValueError(f"{row.told} has eps={row.eps:g}: {CLEAN} is clean, {ROBUST} has a radius.")
            if row.metric in (CLEAN, ROBUST) and row.class_name is None and row.n != self.num_images:
                raise ValueError(f"{row.told} is of {row.n} images, num_images is {self.num_images}.")
        if not self._of(CLEAN):
            raise ValueError("measurements lack the clean accuracy; a report must say it.")
        radii = list(self.robust_accuracy)
        if list(self.after_each) != radii:
            raise ValueError(f"after_each has the radii {list(self.after_each)}, not those of robust_accuracy.")
        for eps, left in self.after_each.items():
            if not math.isclose(list(left.values())[-1], self.robust_accuracy[eps], abs_tol=1e-9):
                raise ValueError(f"after_each[{eps:g}]={left!r} doesn't end with the robust accuracy.")
        for control, by_radius in self.controls.items():
            if list(by_radius) != [0.0, *radii]:
                raise ValueError(f"control {control!r} has the radii {list(by_radius)}, not those of the report.")

    def _check_classes(self) -> None:
        by_class = [row for row in self.measurements if row.class_name is not None]
        if unknown := [row.class_name for row in by_class if row.class_name not in self.class_names]:
            raise ValueError(f"measurements are of the class {unknown[0]!r}, which class_names don't have.")
        for total in (row for row in self.measurements if row.is_headline and row.judge is None):
            own = [row for row in by_class if (row.metric, row.eps) == (total.metric, total.eps)]
            last = total.eps == max((0.0, *self.robust_accuracy)) or total.metric == CLEAN
            if total.metric not in (CLEAN, ROBUST) or not (own or last):
                continue
            if (images := sum(row.n for row in own)) != self.num_images:
                raise ValueError(f"per_class counts {images} images, num_images is {self.num_images}.")
            if abs((count := sum(row.value * row.n for row in own)) - total.value * images) > 0.5:
                raise ValueError(
                    f"per_class counts {count:.0f} of {images} correct at eps={total.eps:g}, but it is {total.value}."
                )

    def _check_outcomes(self) -> None:
        if self.outcomes is None:
            return
        figures = {0.0: self.clean_accuracy, **self.robust_accuracy}
        if not self.outcomes.images:
            raise ValueError("outcomes.images is missing; outcomes must say of which images they are.")
        if self.outcomes.radii != list(figures):
            raise ValueError(f"outcomes have the radii {self.outcomes.radii}, not those of the report.")
        before_N = None
        for eps, value in figures.items():
            right_N = self.outcomes_at(eps)
            if abs(int(right_N.sum()) - value * self.num_images) > 1e-6:
                raise ValueError(f"outcomes at eps={eps:g} have {right_N.mean()} right, but it is {value}.")
            if before_N is not None and (right_N & ~before_N).any():
                raise ValueError(f"outcomes at eps={eps:g} have images right that are wrong at a smaller radius.")
            before_N = right_N

    def outcomes_at(self, eps: float) -> np.ndarray:
        """Whether the model was right on each image, in the order of the dataset, at a radius in units of [0, 1], as
        the accuracy there counts it, 0 for clean: (N,) bool.

        Raises ValueError for a radius without outcomes, and for a report without any.
        """
        if self.outcomes is None:
            raise ValueError(f"the report of {self.name}, {self.task} has no outcomes; evaluate the model again.")
        return self.outcomes.at(eps, self.num_images)

    def _of(self, metric: str, judge: str | None = None) -> dict[float, float]:
        """A metric by radius, ascending."""
        rows = (row for row in self.measurements if (row.metric, row.judge) == (metric, judge) and row.is_headline)
        return dict(sorted((row.eps, row.value) for row in rows))

    @property
    def clean_accuracy(self) -> float:
        """In [0, 1]."""
        return self._of(CLEAN)[0.0]

    @property
    def robust_accuracy(self) -> dict[float, float]:
        """Accuracy in [0, 1] by radius in units of [0, 1], ascending."""
        return self._of(ROBUST)

    @property
    def after_each(self) -> dict[float, dict[str, float]]:
        """For each radius, the accuracy left after each attack of the suite, in the order in which they ran."""
        found: dict[float, dict[str, float]] = {}
        for row in sorted(self.measurements, key=lambda row: row.eps):
            if row.metric == ROBUST and row.member is not None:
                found.setdefault(row.eps, {})[row.member] = row.value
        return found

    @property
    def per_class(self) -> dict[str, tuple[int, int, int]]:
        """Class name to (images, correct clean, correct at the largest radius)."""
        largest = max(self.robust_accuracy, default=0.0)
        rows = {(row.class_name, row.eps): row for row in self.measurements if row.metric in (CLEAN, ROBUST)}
        found = {}
        for name in self.class_names:
            own = [rows.get((name, eps)) for eps in (0.0, largest)]
            clean, robust = (round(row.value * row.n) if row else 0 for row in own)
            found[name] = (own[0].n if own[0] else 0, clean, robust)
        return found

    @property
    def controls(self) -> dict[str, dict[float, float]]:
        """By name of a control, its accuracy by radius, 0 for clean."""
        names = dict.fromkeys(row.judge for row in self.measurements if row.judge is not None)
        return {name: {**self._of(CLEAN, name), **self._of(ROBUST, name)} for name in names}

    @property
    def num_classes(self) -> int:
        """Among how many classes the model chose."""
        return len(self.class_names)

    @property
    def attack_target(self) -> str:
        """The name of what the attack saw."""
        return self.view.name

    @property
    def full_attack(self) -> str:
        """The attack's name, with what it saw unless that is the plain classifier."""
        return self.attack if self.view.alone and not self.view.of_defence else f"{self.attack} ({self.view.name})"

    def interval(self, accuracy: float) -> tuple[float, float]:
        """The 95 % Wilson interval of an accuracy measured on this report's images."""
        return wilson_interval(round(accuracy * self.num_images), self.num_images)

    def threat(self, eps: float) -> ThreatModel:
        """The ball of a radius in the report's norm."""
        return ThreatModel(eps, self.norm)  # type: ignore[arg-type]


def frame(reports: Iterable[RobustnessReport]) -> DataFrame:
    """One row for each measurement of each report, in their order: the report's `number`, its fields that are one text
    or number (`view` and `defence` by name, `templates` joined by " | "), `full_attack`, `num_classes`,
    `ms_per_image` of a defence, all fields of the measurement, and `low` and `high`, the ends of its 95 % interval.
    """
    from pandas import DataFrame

    rows = []
    for number, report in enumerate(reports):
        told: dict[str, Any] = {n: value for n, value in vars(report).items() if isinstance(value, str | int | float)}
        defence = report.defence or {}
        told |= {
            "number": number,
            "full_attack": report.full_attack,
            "attack_target": report.view.name,
            "num_classes": report.num_classes,
            "defence": defence.get("name"),
            "ms_per_image": defence.get("ms_per_image"),
            "templates": " | ".join(report.templates or ()) or None,
        }
        for row in report.measurements:
            low, high = row.interval or (None, None)
            rows.append({**told, **vars(row), "low": low, "high": high})
    return DataFrame(rows)


def prompt_hash(class_names: Sequence[str], templates: Sequence[str], descriptions: str | None = None) -> str:
    """16 hexadecimal digits that change when any class name, template, their order or the descriptions do, of which a
    digest is given (`descriptions_digest`).
    """
    told = [list(class_names), list(templates), *([descriptions] if descriptions else [])]
    text = json.dumps(told, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def blind_warning(reports: Iterable[RobustnessReport]) -> str | None:
    """One sentence for attacks of which more than 5 % of the input gradients were exactly zero, or not finite, which
    the share counts alike; None without any.
    """
    blind = sorted(
        {
            f"{report.full_attack} on {report.name}, {report.task}: {percent(report.zero_gradient_share)}"
            for report in reports
            if report.zero_gradient_share > BLIND_ABOVE
        }
    )
    if not blind:
        return None
    return (
        "WARNING: an attack was (partly) blind, and its robust accuracy may mean nothing. Share of its input "
        f"gradients that were exactly zero: {'; '.join(blind)}."
    )


def templates_told(reports: Iterable[RobustnessReport]) -> str | None:
    """Which prompts the figures are of: one template, or those of each task; None where no report says it."""
    by_task: dict[tuple[tuple[str, ...], str | None], list[str]] = {}
    for report in reports:
        if report.templates:
            tasks = by_task.setdefault((report.templates, report.descriptions), [])
            tasks += [] if report.task in tasks else [report.task]
    if not by_task:
        return None
    texts = {(own, digest): f"{quoted(own)}{with_descriptions(digest)}" for own, digest in by_task}
    if len(texts) == 1:
        return f"prompt {next(iter(texts.values()))}"
    return "prompts " + "; ".join(f"{texts[own]} on {', '.join(tasks)}" for own, tasks in by_task.items())


def quoted(templates: Sequence[str]) -> str:
    """Templates in a line of text: the first, and how many more there are."""
    return f'"{templates[0]}"' + (f" and {len(templates) - 1} more" if len(templates) > 1 else "")


def with_descriptions(digest: str | None) -> str:
    """What is said of descriptions after their templates; nothing where there are none."""
    return f" with descriptions {digest}" if digest else ""


def percent(value: float) -> str:
    """0.123 as 12.3 %."""
    return f"{100 * value:.1f} %"
