"""What an evaluation found, with everything needed to read it: `RobustnessReport`, its JSON, CSV, table and plots."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub import EvalResult

from ..checks import BLIND_ABOVE
from ..digests import digests
from ..metrics import wilson_interval
from ..secrets import refuse_tokens
from ..storage import read_json, whole_file, write_text
from ..threat_model import ThreatModel, parse_radius

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike
    from rich.table import Table

    from .card import CardInfo

AttackTarget = Literal["static", "defence_blind", "adaptive", "bpda", "transfer_from_adapted", "adaptive_worst"]
CONTROLS = ("static prompts", "random prompts", "ensemble-64")
REPORT_FORMAT = 2
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#7A4FBF")
_MARKERS, _DASHES = "osD^vP>X", ("-", "--", "-.", ":")


@dataclass(frozen=True)
class RobustnessReport:
    """Clean and robust accuracy of one model on one set of images. Every field but the last two is mandatory.

    Args:
        name: what tables call the model, e.g. `"PMG-AFT"`.
        task: what tables call the images, e.g. `"held-out classes"`.
        model, model_revision: what was evaluated; revision `"local"` for a folder.
        dataset, dataset_revision, split: the images.
        num_images, num_classes: how many were evaluated, and among how many classes.
        prompt_hash: SHA-256 (16 digits) of class names and templates, in order.
        attack, attack_parameters: e.g. `"PGD-20"`, and all its settings, in JSON types; a list under `"step_size"` has
            one for each radius, a dict under `"left_out"` says why members of a suite did not run.
        attack_target: what the attack saw; `"static"` is the plain classifier, white box. The others are of a defence
            (see `EvaluationSettings`).
        attack_resolution: side of the attacked images in pixels.
        norm: `"linf"` or `"l2"`.
        clean_accuracy: in [0, 1].
        robust_accuracy: accuracy in [0, 1] by radius in units of [0, 1], ascending.
        after_each: for each radius, the accuracy left after each attack of the suite, in the order in which they ran;
            the last one is the robust accuracy.
        model_flags: what was checked of the model before the attack: `{"randomised": False, "optimising": False}`.
        per_class: class name to (images, correct clean, correct at the largest radius); the sums agree with
            `num_images` and the accuracies.
        zero_gradient_share: share in [0, 1] of exactly-zero input gradients over the whole attack. Well above 0, the
            attack was blind and the robust accuracy means nothing.
        seed, precision: of the attack and of the forward passes.
        library_versions, hardware: where it was measured.
        defence: None, or the test-time defence that predicted in the model's place, in JSON types: `"name"`,
            `"parameters"`, `"traits"` (`"randomised"`, `"optimising"`, `"episodic"`), `"tuned"` (values tuned for each
            image), `"fallbacks"` (predictions, of clean and attacked images, whose tuning was not finite and didn't
            count), `"ms_per_image"` (on the clean images), and `"controls"`: for each of `CONTROLS` its `"clean"`
            accuracy and its `"robust"` accuracy by radius, on the very images that the defence was shown.
        templates: the texts, with `{}` for the class name, that class names were put in; None where nobody noted them.

    Raises ValueError for a field that is empty, unknown, out of range, at odds with another, or holds an access token,
    TypeError for attack parameters that JSON can't hold. So too for a randomised or optimising defence under a static
    attack or without its controls, and for an attack on a defence where there is none.
    """

    name: str
    task: str
    model: str
    model_revision: str
    dataset: str
    dataset_revision: str
    split: str
    num_images: int
    num_classes: int
    prompt_hash: str
    attack: str
    attack_parameters: dict[str, Any]
    attack_target: AttackTarget
    attack_resolution: int
    norm: str
    clean_accuracy: float
    robust_accuracy: dict[float, float]
    after_each: dict[float, dict[str, float]]
    model_flags: dict[str, bool]
    per_class: dict[str, tuple[int, int, int]]
    zero_gradient_share: float
    seed: int
    precision: str
    library_versions: dict[str, str]
    hardware: str
    defence: dict[str, Any] | None = None
    templates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.default is MISSING and getattr(self, field.name) in (None, "", {}):
                raise ValueError(f"{field.name} is missing; a report must say it.")
        if self.attack_target not in get_args(AttackTarget):
            raise ValueError(f"attack_target={self.attack_target!r} is unknown; one of {get_args(AttackTarget)}.")
        if self.num_images < 1:
            raise ValueError(f"num_images={self.num_images!r}: nothing was evaluated.")
        for name in ("robust_accuracy", "after_each"):  # JSON's keys are texts
            by_radius = sorted((float(radius), value) for radius, value in getattr(self, name).items())
            object.__setattr__(self, name, dict(by_radius))
        for radius in self.robust_accuracy:
            ThreatModel(radius, self.norm)  # type: ignore[arg-type]  # raises for what is no norm or radius
        if list(self.robust_accuracy) != list(self.after_each):
            raise ValueError(f"after_each has the radii {list(self.after_each)}, not those of robust_accuracy.")
        object.__setattr__(self, "attack_parameters", json.loads(json.dumps(self.attack_parameters)))
        object.__setattr__(self, "per_class", {name: tuple(row) for name, row in self.per_class.items()})
        if self.templates is not None:
            object.__setattr__(self, "templates", tuple(self.templates))
            if prompt_hash(list(self.per_class), self.templates) != self.prompt_hash:
                raise ValueError(f"templates={self.templates!r} are not those of prompt_hash={self.prompt_hash!r}.")
        refuse_tokens({name: value for name, value in vars(self).items() if isinstance(value, str)}, "report")
        self._check_defence()
        self._check_figures()

    def _check_defence(self) -> None:
        if self.defence is None:
            if self.attack_target != "static":
                raise ValueError(
                    f"attack_target={self.attack_target!r} is an attack on a test-time defence; defence is missing."
                )
            return
        own = json.loads(json.dumps(self.defence))
        needed = {"name", "parameters", "traits", "controls", "fallbacks", "ms_per_image"}
        if not needed <= set(own) or not {"randomised", "optimising"} <= set(own["traits"]):
            lacking = sorted(needed - set(own)) or ["traits"]
            raise ValueError(f"defence lacks {', '.join(lacking)}; a report must say it.")
        if own["traits"]["randomised"] or own["traits"]["optimising"]:
            if self.attack_target == "static":
                raise ValueError(
                    f"attack_target='static' says nothing of {own['name']}, which is randomised or optimising; "
                    "evaluate with a target: 'defence_blind', 'adaptive', 'adaptive_worst'."
                )
            if missing := [name for name in CONTROLS if name not in own["controls"]]:
                raise ValueError(f"defence['controls'] lacks {', '.join(missing)}; evaluate_robustness makes them.")
        for control in own["controls"].values():
            control["robust"] = dict(sorted((float(r), v) for r, v in control["robust"].items()))
        object.__setattr__(self, "defence", own)

    def _check_figures(self) -> None:
        shares = {"clean_accuracy": self.clean_accuracy, "zero_gradient_share": self.zero_gradient_share}
        shares |= {f"robust_accuracy[{radius:g}]": value for radius, value in self.robust_accuracy.items()}
        for radius, left in self.after_each.items():
            if not left or not math.isclose(list(left.values())[-1], self.robust_accuracy[radius], abs_tol=1e-9):
                raise ValueError(f"after_each[{radius:g}]={left!r} doesn't end with the robust accuracy.")
            shares |= {f"after_each[{radius:g}][{member!r}]": value for member, value in left.items()}
        for control, own in (self.defence or {}).get("controls", {}).items():
            if list(own["robust"]) != list(self.robust_accuracy):
                raise ValueError(f"control {control!r} has the radii {list(own['robust'])}, not those of the report.")
            shares |= {f"clean accuracy of {control!r}": own["clean"]}
            shares |= {f"accuracy of {control!r} at {radius:g}": value for radius, value in own["robust"].items()}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be in [0, 1].")
        images, *correct = (sum(column) for column in zip(*self.per_class.values(), strict=True))
        if images != self.num_images:
            raise ValueError(f"per_class counts {images} images, num_images is {self.num_images}.")
        for what, count, share in zip(
            ("clean", "at the largest radius"),
            correct,
            (self.clean_accuracy, list(self.robust_accuracy.values())[-1]),
            strict=True,
        ):
            if abs(count - share * images) > 0.5:
                raise ValueError(
                    f"per_class counts {count} of {images} correct {what}, the accuracy there is {share}."
                )

    def interval(self, accuracy: float) -> tuple[float, float]:
        """The 95 % Wilson interval of an accuracy measured on this report's images."""
        return wilson_interval(round(accuracy * self.num_images), self.num_images)

    @property
    def full_attack(self) -> str:
        """The attack's name, with what it went through unless that is the plain classifier."""
        return self.attack if self.attack_target == "static" else f"{self.attack} ({self.attack_target})"

    def to_eval_results(self) -> list[EvalResult]:
        """`model-index` rows: one for clean accuracy, one for each radius.

        `dataset_config` tells them apart: it holds task, defence, attack, radius and number of images, the last
        because a dear attack often sees fewer of them.
        """
        by = "" if self.defence is None else f"{self.defence['name']}, "
        of_defence = {} if self.defence is None else {"defence": self.defence["name"]}
        rows: list[tuple[str, str, float, dict[str, Any]]] = [("clean", "accuracy", self.clean_accuracy, {})]
        for index, (radius, accuracy) in enumerate(self.robust_accuracy.items()):
            arguments = {**self.attack_parameters, "eps": radius, "attack_target": self.attack_target, **of_defence}
            if isinstance(arguments.get("step_size"), list):  # one for each radius
                arguments["step_size"] = arguments["step_size"][index]
            threat = ThreatModel(radius, self.norm)  # type: ignore[arg-type]
            rows.append((f"{self.full_attack} {threat}", "robust_accuracy", accuracy, arguments))
        return [
            EvalResult(
                task_type="zero-shot-image-classification",
                dataset_type=self.dataset,
                dataset_name=f"{self.dataset}, {self.task}",
                dataset_config=f"{self.task}, {by}{config}, n={self.num_images}",
                dataset_split=self.split,
                metric_type=metric,
                metric_name=f"accuracy, {by}{config}",
                metric_value=round(value, 4),
                metric_args=arguments or None,
            )
            for config, metric, value, arguments in rows
        ]


def prompt_hash(class_names: Sequence[str], templates: Sequence[str]) -> str:
    """16 hexadecimal digits that change when any class name, template or their order does."""
    text = json.dumps([list(class_names), list(templates)], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """The installed versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("hf_robust_clip", "torch", "transformers", "accelerate", "peft", "datasets", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> str:
    """The accelerator's name, or the processor with its number of threads."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return f"CPU {processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def save_reports(
    path: str | Path,
    reports: Sequence[RobustnessReport],
    compared: Sequence[RobustnessReport] = (),
    card: CardInfo | None = None,
) -> None:
    """Write reports of a model, and of those it was compared with, as JSON, whole or not at all.

    `card` goes with them, so that `model_card.regenerate_card` can make the card again from the file alone. Where
    weights lie beside it, the file says which: it is not read beside others.

    Raises ValueError if there are no reports.
    """
    if not reports:
        raise ValueError("reports is empty; evaluate before saving.")
    weights = _weights_beside(path)
    content = {
        "format": REPORT_FORMAT,
        **({"weights": weights} if weights else {}),
        "reports": [_row(report) for report in reports],
        "compared": [_row(report) for report in compared],
        **({} if card is None else {"card": asdict(card)}),
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def _row(report: RobustnessReport) -> dict[str, Any]:
    """All fields; a defence only where there is one."""
    return {name: value for name, value in asdict(report).items() if value is not None}


def read_report_file(path: str | Path) -> dict[str, Any]:
    """What `save_reports` wrote, as plain values. Raises ValueError for anything else, and where the weights beside it
    are not those of the figures.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != REPORT_FORMAT:
        raise ValueError(f"{path} is not a report of format {REPORT_FORMAT}.")
    if not {"reports", "compared"} <= set(content):
        raise ValueError(f"{path} lacks 'reports' or 'compared'.")
    if known := content.get("weights"):
        for name, own in _weights_beside(path).items():
            if known.get(name) != own:
                raise ValueError(f"{path} tells the figures of other weights than {name} beside it; evaluate these.")
    return content


def _weights_beside(path: str | Path) -> dict[str, str]:
    """The digests of all weights in the folder of a report."""
    return digests(Path(path).parent, Path(path).parent.glob("*.safetensors"))


def load_reports(path: str | Path) -> tuple[list[RobustnessReport], list[RobustnessReport]]:
    """(reports, compared) as `save_reports` wrote them.

    Raises ValueError for another format or a missing or unknown field.
    """
    content = read_report_file(path)
    known = {field.name for field in fields(RobustnessReport)}
    needed = {field.name for field in fields(RobustnessReport) if field.default is MISSING}
    for row in content["reports"] + content["compared"]:
        if wrong := (needed - set(row)) | (set(row) - known):
            raise ValueError(f"{path} lacks or adds report fields: {', '.join(sorted(wrong))}.")
    own, compared = ([RobustnessReport(**row) for row in content[key]] for key in ("reports", "compared"))
    return own, compared


def save_csv(path: str | Path, reports: Sequence[RobustnessReport]) -> None:
    """Write a line for each report and radius: every field that is one number or text, the 95 % intervals and the
    templates; with defences among them, the name of the defence.

    Raises ValueError if there are no reports.
    """
    if not reports:
        raise ValueError("reports is empty; there is nothing to write.")
    lines = []
    defended = any(report.defence for report in reports)
    told = any(report.templates for report in reports)
    for report in reports:
        optional = ("defence", "templates")
        scalars = {name: v for name, v in vars(report).items() if name not in optional and not isinstance(v, dict)}
        if defended:
            scalars["defence"] = report.defence["name"] if report.defence else ""
        if told:
            scalars["templates"] = " | ".join(report.templates or ())
        clean_low, clean_high = report.interval(report.clean_accuracy)
        for radius, accuracy in report.robust_accuracy.items():
            low, high = report.interval(accuracy)
            robust = {"radius": radius, "robust_accuracy": accuracy, "robust_low": low, "robust_high": high}
            lines.append({**scalars, "clean_low": clean_low, "clean_high": clean_high, **robust})
    with whole_file(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


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
    by_task: dict[tuple[str, ...], list[str]] = {}
    for report in reports:
        if report.templates:
            tasks = by_task.setdefault(report.templates, [])
            tasks += [] if report.task in tasks else [report.task]
    if not by_task:
        return None
    texts = {own: f'"{own[0]}"' if len(own) == 1 else f'"{own[0]}" and {len(own) - 1} more' for own in by_task}
    if len(texts) == 1:
        return f"prompt {next(iter(texts.values()))}"
    return "prompts " + "; ".join(f"{texts[own]} on {', '.join(tasks)}" for own, tasks in by_task.items())


def percent(value: float) -> str:
    """0.123 as 12.3 %."""
    return f"{100 * value:.1f} %"


def to_table(reports: Sequence[RobustnessReport], title: str) -> Table:
    """A `rich` table: clean accuracy and accuracy at every radius, in percent; a column for the attack if they differ,
    and one for the defence if there is one.

    Raises ValueError for no reports and for several norms, whose radii can't share columns.
    """
    from rich.table import Table

    norm = _one_norm(reports)
    radii = sorted({radius for report in reports for radius in report.robust_accuracy})
    attacks = sorted({report.full_attack for report in reports})
    caption = f"accuracy in percent, clean and under {' or '.join(attacks)} at radii in {norm}"
    table = Table(title=title, caption=", ".join(filter(None, [caption, templates_told(reports)])))
    table.add_column("")
    if len(attacks) > 1:
        table.add_column("attack")
    defended = any(report.defence for report in reports)
    if defended:
        table.add_column("defence")
    for column in ("n", "chance", "clean", *(str(ThreatModel(r, norm)).split("=")[1] for r in radii)):  # type: ignore[arg-type]
        table.add_column(column, justify="right", no_wrap=True)
    for report in reports:
        robust = [report.robust_accuracy.get(radius) for radius in radii]
        table.add_row(
            f"{report.name}, {report.task}",
            *([report.full_attack] if len(attacks) > 1 else []),
            *([report.defence["name"] if report.defence else "none"] if defended else []),
            str(report.num_images),
            f"{100 / report.num_classes:.1f}",
            *("-" if value is None else f"{100 * value:.1f}" for value in (report.clean_accuracy, *robust)),
        )
    return table


def _one_norm(reports: Iterable[RobustnessReport]) -> str:
    norms = sorted({report.norm for report in reports})
    if len(norms) != 1:
        found = ", ".join(norms) if norms else "no reports"
        raise ValueError(f"one table or plot holds reports of one norm, got {found}; make one for each norm.")
    return norms[0]


@contextmanager
def _plain_text() -> Iterator[None]:
    """Names are drawn as they are; matplotlib would read what stands between two $ as a formula."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


@_plain_text()
def plot_accuracy(path: str | Path, panels: Mapping[str, Mapping[str, RobustnessReport]]) -> None:
    """Write a PNG of accuracy against eps: a panel for each key, a line for each report in it, 95 % bands.

    A label has one colour, marker and dash in all panels. Raises ValueError for no panel, a panel without reports, and
    several norms in one panel.
    """
    styles = _styles(label for lines in panels.values() for label in lines)
    attacks = {report.full_attack for lines in panels.values() for report in lines.values()}
    figure, axes = _panels(list(panels), "accuracy under " + (attacks.pop() if len(attacks) == 1 else "attack"))
    for axis, lines in zip(axes, panels.values(), strict=True):
        linf = _one_norm(lines.values()) == "linf"
        for label, report in lines.items():
            points = {0.0: report.clean_accuracy, **report.robust_accuracy}
            radii = [radius * 255 if linf else radius for radius in points]
            style = styles[label]
            axis.plot(radii, list(points.values()), markersize=4, label=label, **style)
            low, high = zip(*(report.interval(value) for value in points.values()), strict=True)
            axis.fill_between(radii, low, high, color=style["color"], alpha=0.12, linewidth=0)
        sizes = sorted({report.num_images for report in lines.values()})
        axis.set_title(
            f"{axis.get_title()}\nn = {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))}", fontsize=10
        )
        axis.set_xlabel("L-inf eps (grey levels of 255)" if linf else "L2 eps (units of [0, 1])")
        chance = 1 / next(iter(lines.values())).num_classes
        axis.axhline(chance, color="grey", linestyle=(0, (1, 3)), linewidth=1, label="chance")
        axis.set_ylim(-0.02, 1.02)
    _save(figure, axes, path)


@_plain_text()
def plot_tradeoff(path: str | Path, reports: Sequence[RobustnessReport], radius: float | str) -> None:
    """Write a PNG of robust against clean accuracy: a panel for each task, a point for each model, 95 % intervals.

    Args:
        path: of the PNG.
        reports: of several models, one for each model and task, under one norm.
        radius: in units of [0, 1], such as `"4/255"`; every report must have it.

    Raises ValueError for no reports, several norms, a model twice on a task, and a report without the radius.
    """
    from matplotlib.ticker import MaxNLocator

    eps = parse_radius(radius, "radius")
    threat = ThreatModel(eps, _one_norm(reports))  # type: ignore[arg-type]
    styles = _styles(report.name for report in reports)
    tasks: dict[str, dict[str, tuple[RobustnessReport, float]]] = {}
    for report in reports:
        robust = [value for r, value in report.robust_accuracy.items() if math.isclose(r, eps)]
        if not robust:
            raise ValueError(f"the report of {report.name}, {report.task} has no radius {radius}.")
        if report.name in tasks.setdefault(report.task, {}):
            raise ValueError(f"two reports of {report.name}, {report.task}; plot one attack at a time.")
        tasks[report.task][report.name] = (report, robust[0])
    attacks = " or ".join(sorted({report.full_attack for report in reports}))
    figure, axes = _panels(list(tasks), f"accuracy under {attacks}\n{threat}")
    for axis, models in zip(axes, tasks.values(), strict=True):
        for name, (report, robust_accuracy) in models.items():
            x, y = report.clean_accuracy, robust_accuracy
            bar_x, bar_y = ([[abs(end - value)] for end in report.interval(value)] for value in (x, y))
            style = {**styles[name], "linestyle": "none", "markersize": 8, "elinewidth": 0.8}
            axis.errorbar([x], [y], xerr=bar_x, yerr=bar_y, label=name, **style)
        axis.set_xlabel("clean accuracy")
        axis.xaxis.set_major_formatter(_percent_label)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), prune="both"))
    _save(figure, axes, path)


@_plain_text()
def plot_examples(
    path: str | Path,
    images: ArrayLike,
    adversarials: ArrayLike,
    truth: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    """Write a PNG with a row for each image: clean, perturbation, adversarial, and what the model saw in them.

    The perturbation d is drawn as 0.5 + factor * d, with one factor for all rows, given above the column: the largest
    that keeps every value within [0, 1], rounded down to a whole number where it is above 1.

    Args:
        path: of the PNG.
        images, adversarials: (N, C, H, W) in [0, 1], with C 1 or 3.
        truth: class name of each image.
        before, after: predicted class name of each clean and of each adversarial image; wrong ones are marked.

    Raises ValueError for shapes that don't match, nothing to draw and values outside [0, 1].
    """
    import numpy as np
    from matplotlib.figure import Figure

    clean, adversarial = (np.asarray(pictures, dtype=float) for pictures in (images, adversarials))
    if clean.shape != adversarial.shape or clean.ndim != 4 or clean.size == 0 or clean.shape[1] not in (1, 3):
        got = f"got {clean.shape} and {adversarial.shape}"
        raise ValueError(f"images and adversarials must have one shape (N, 1 or 3, H, W), {got}.")
    if not {len(truth), len(before), len(after)} == {len(clean)}:
        raise ValueError(f"{len(clean)} images, but {len(truth)}, {len(before)} and {len(after)} class names.")
    if not all(pictures.min() >= 0 and pictures.max() <= 1 for pictures in (clean, adversarial)):
        raise ValueError("images and adversarials must be in [0, 1]; did you normalise them?")
    largest = np.abs(adversarial - clean).max()
    factor = 0.5 / largest if largest > 0 else 1.0
    factor = math.floor(factor * 1.0001) if factor > 0.9999 else factor  # float32 has 7 digits
    figure = Figure(figsize=(6.6, 0.5 + 2.35 * len(clean)), layout="constrained")
    grid = figure.subplots(len(clean), 3, squeeze=False)
    for axis, title in zip(grid[0], ("clean", f"perturbation x {factor:.3g}", "adversarial"), strict=True):
        axis.set_title(title, fontsize=10)
    smooth = "nearest" if max(clean.shape[2:]) <= 64 else "antialiased"
    for axes, name, *names, image, attacked in zip(grid, truth, before, after, clean, adversarial, strict=True):
        pictures = (image, np.clip(0.5 + factor * (attacked - image), 0, 1), attacked)
        for axis, picture in zip(axes, pictures, strict=True):
            axis.imshow(picture.transpose(1, 2, 0).squeeze(), cmap="grey", vmin=0, vmax=1, interpolation=smooth)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(textwrap.fill(f"truth: {name}", 24), fontsize=9)
        for axis, predicted in zip((axes[0], axes[2]), names, strict=True):
            right = predicted == name
            text = textwrap.fill(f"{predicted} ({'right' if right else 'WRONG'})", 25)
            axis.set_xlabel(text, fontsize=9, fontweight="normal" if right else "bold")
    _write(figure, path)


def defence_cells(rows: Mapping[str, Sequence[RobustnessReport]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of a table of defences, in percent: a row for each label.

    A label's reports are of one defence (or of none) on the same images. After the clean accuracy come columns for the
    attacks that were made on the classifier alone (blind; white box, where there is no defence), the worst of all
    attacks (`adaptive_worst`, or the lowest of what there is), the controls on the images of the first of these
    attacks (clean / attacked), and milliseconds per image. All are at the largest radius that every report has.

    Raises ValueError for a label without reports, or with reports on several sets of images, and if the reports have
    no radius in common.
    """
    every = [report for reports in rows.values() for report in reports]
    radii = set.intersection(*(set(report.robust_accuracy) for report in every)) if every else set()
    if not radii:
        raise ValueError("the reports have no radius in common; evaluate all of them at one.")
    radius = max(radii)
    alone = dict.fromkeys(r.attack for r in every if r.attack_target in ("static", "defence_blind"))
    heads = ["", "n", "clean", *(f"blind {attack}" for attack in alone), "adaptive worst", *CONTROLS, "ms"]
    cells = []
    for label, reports in rows.items():
        if len({(report.dataset, report.split, report.num_images) for report in reports}) != 1:
            raise ValueError(f"the reports of {label!r} must be of one set of images, and at least one.")
        own = {r.attack: r.robust_accuracy[radius] for r in reports if r.attack_target in ("static", "defence_blind")}
        worst = [r for r in reports if r.attack_target == "adaptive_worst"] or reports
        told = next((r.defence for r in reports if r.defence), None)
        seen = {} if told is None else {name: told["controls"][name] for name in CONTROLS}
        controls = [f"{_number(c['clean'])} / {_number(c['robust'][radius])}" for c in seen.values()]
        cells.append(
            [
                label,
                str(reports[0].num_images),
                _number(reports[0].clean_accuracy),
                *(_number(own[attack]) if attack in own else "-" for attack in alone),
                _number(min(report.robust_accuracy[radius] for report in worst)),
                *(controls or ["-"] * len(CONTROLS)),
                "-" if told is None else f"{told['ms_per_image']:.1f}",
            ]
        )
    return heads, cells


def defence_table(rows: Mapping[str, Sequence[RobustnessReport]]) -> str:
    """`defence_cells` as Markdown."""
    heads, cells = defence_cells(rows)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def _number(value: float) -> str:
    return f"{100 * value:.1f}"


@_plain_text()
def plot_defences(path: str | Path, rows: Mapping[str, Sequence[RobustnessReport]]) -> None:
    """Write a PNG of what `defence_cells` tells: for each label its clean accuracy, that under the first attack made
    on the classifier alone, the three controls on the same images, and the worst of all attacks.

    Raises ValueError as `defence_cells` does.
    """
    from matplotlib.figure import Figure

    heads, cells = defence_cells(rows)
    blind, worst = 3, heads.index("adaptive worst")
    figure = Figure(figsize=(8.2, 1.6 + 0.34 * len(cells)), layout="constrained")
    axis = figure.subplots()
    places = {"clean": (2, "o", "#000000"), f"{heads[blind]}, made on the classifier alone": (blind, "s", "#0072B2"),
              "worst of all attacks": (worst, "X", "#D55E00")}  # fmt: skip
    for label, (column, marker, colour) in places.items():
        points = [(float(row[column]), y) for y, row in enumerate(cells) if row[column] != "-"]
        axis.plot(*zip(*points, strict=True), marker, color=colour, label=label, markersize=6)
    for name, marker, colour in zip(CONTROLS, "|xv", ("#009E73", "#CC79A7", "#8C6D00"), strict=True):
        column = heads.index(name)
        points = [(float(row[column].split(" / ")[1]), y) for y, row in enumerate(cells) if "/" in row[column]]
        if points:
            style: dict[str, Any] = {"color": colour, "markerfacecolor": "none", "markersize": 10, "zorder": 1}
            axis.plot(*zip(*points, strict=True), marker, label=f"{name}, same images", **style)
    axis.set_yticks(range(len(cells)), [row[0] for row in cells])
    axis.set_ylim(len(cells) - 0.5, -0.5)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("accuracy in percent")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    _write(figure, path)


def _write(figure: Figure, path: str | Path) -> None:
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=140)


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash by label; told apart in grey by the marker."""
    return {
        label: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[(i + i // len(_MARKERS)) % len(_MARKERS)],
            "linestyle": _DASHES[i % len(_DASHES)],
        }
        for i, label in enumerate(dict.fromkeys(labels))
    }


def _panels(titles: Sequence[str], ylabel: str) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, at most three in a row."""
    from matplotlib.figure import Figure

    if not titles:
        raise ValueError("there are no panels to plot.")
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(3.9 * columns + 0.8, 3.3 * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.remove()
    for i, (axis, title) in enumerate(zip(axes, titles, strict=False)):
        axis.set_title(textwrap.fill(title, 40), fontsize=10)
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(_percent_label)
        if i % columns == 0:
            axis.set_ylabel(ylabel)
    return figure, axes[: len(titles)]


def _percent_label(value: float, _: float) -> str:
    return f"{100 * value:.4g} %"


def _save(figure: Figure, axes: Sequence[Axes], path: str | Path) -> None:
    """Write the figure with one legend for all panels, below them."""
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if "chance" in handles:
        handles["chance"] = handles.pop("chance")  # last
    columns = max(1, int(figure.get_figwidth() * 13 / (max(map(len, handles)) + 8)))
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(handles) // columns))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )
    _write(figure, path)
