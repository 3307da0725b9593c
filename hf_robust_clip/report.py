"""What an evaluation found, with everything needed to read it: `RobustnessReport`, its JSON, table and plot."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub import EvalResult

from .threat_model import ThreatModel

if TYPE_CHECKING:
    from rich.table import Table

AttackTarget = Literal["static", "defence_blind", "adaptive", "bpda", "transfer_from_adapted"]
REPORT_FORMAT = 2


@dataclass(frozen=True)
class RobustnessReport:
    """Clean and robust accuracy of one model on one set of images. Every field is mandatory.

    Args:
        name: what tables call the model, e.g. `"PMG-AFT"`.
        task: what tables call the images, e.g. `"held-out classes"`.
        model, model_revision: what was evaluated; revision `"local"` for a folder.
        dataset, dataset_revision, split: the images.
        num_images, num_classes: how many were evaluated, and among how many classes.
        prompt_hash: SHA-256 (16 digits) of class names and templates, in order.
        attack, attack_parameters: e.g. `"PGD-20"`, and all its settings.
        attack_target: what the gradients went through; `"static"` is the plain classifier, white box.
        attack_resolution: side of the attacked images in pixels.
        norm: `"linf"` or `"l2"`.
        clean_accuracy: in [0, 1].
        robust_accuracy: accuracy in [0, 1] by radius in units of [0, 1], ascending.
        after_each: for each radius, the accuracy left after each attack of the suite, in the order in which they ran;
            the last one is the robust accuracy.
        model_flags: what was checked of the model before the attack: `{"randomised": False, "optimising": False}`.
        per_class: class name to (images, correct clean, correct at the largest radius).
        zero_gradient_share: share in [0, 1] of exactly-zero input gradients over the whole attack. Well above 0, the
            attack was blind and the robust accuracy means nothing.
        seed, precision: of the attack and of the forward passes.
        library_versions, hardware: where it was measured.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) in (None, "", {}):
                raise ValueError(f"{field.name} is missing; a report must say it.")
        if self.attack_target not in get_args(AttackTarget):
            raise ValueError(f"attack_target={self.attack_target!r} is unknown; one of {get_args(AttackTarget)}.")
        if self.num_images < 1:
            raise ValueError(f"num_images={self.num_images!r}: nothing was evaluated.")
        for name in ("robust_accuracy", "after_each"):  # JSON's keys are texts
            by_radius = sorted((float(radius), value) for radius, value in getattr(self, name).items())
            object.__setattr__(self, name, dict(by_radius))
        if list(self.robust_accuracy) != list(self.after_each):
            raise ValueError(f"after_each has the radii {list(self.after_each)}, not those of robust_accuracy.")
        object.__setattr__(self, "per_class", {name: tuple(row) for name, row in self.per_class.items()})

    def interval(self, accuracy: float) -> tuple[float, float]:
        """The 95 % Wilson interval of an accuracy measured on this report's images."""
        return wilson_interval(round(accuracy * self.num_images), self.num_images)

    def to_eval_results(self) -> list[EvalResult]:
        """`model-index` rows: one for clean accuracy, one for each radius (told apart by `dataset_config`)."""
        rows: list[tuple[str, str, float, dict[str, Any]]] = [("clean", "accuracy", self.clean_accuracy, {})]
        for index, (radius, accuracy) in enumerate(self.robust_accuracy.items()):
            arguments = {**self.attack_parameters, "eps": radius, "attack_target": self.attack_target}
            if "step_size" in arguments:  # one for each radius
                arguments["step_size"] = self.attack_parameters["step_size"][index]
            threat = ThreatModel(radius, self.norm)  # type: ignore[arg-type]
            rows.append((f"{self.attack} {threat}", "robust_accuracy", accuracy, arguments))
        return [
            EvalResult(
                task_type="zero-shot-image-classification",
                dataset_type=self.dataset,
                dataset_name=f"{self.dataset}, {self.task}",
                dataset_config=f"{self.task}, {config}",
                dataset_split=self.split,
                metric_type=metric,
                metric_name=f"accuracy, {config}",
                metric_value=round(value, 4),
                metric_args=arguments or None,
            )
            for config, metric, value, arguments in rows
        ]


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


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
    path: str | Path, reports: Sequence[RobustnessReport], compared: Sequence[RobustnessReport] = ()
) -> None:
    """Write reports of a model, and of those it was compared with, as JSON, whole or not at all.

    Raises ValueError if there are none.
    """
    if not reports:
        raise ValueError("reports is empty; evaluate before saving.")
    rows = {"reports": [asdict(report) for report in reports], "compared": [asdict(report) for report in compared]}
    partial = Path(path).with_suffix(".part")
    try:
        partial.write_text(json.dumps({"format": REPORT_FORMAT, **rows}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_reports(path: str | Path) -> tuple[list[RobustnessReport], list[RobustnessReport]]:
    """(reports, compared) as `save_reports` wrote them.

    Raises ValueError for another format or a missing or unknown field.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is cut short or no JSON ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != REPORT_FORMAT:
        raise ValueError(f"{path} is not a report of format {REPORT_FORMAT}.")
    if not {"reports", "compared"} <= set(content):
        raise ValueError(f"{path} lacks 'reports' or 'compared'.")
    known = {field.name for field in fields(RobustnessReport)}
    for row in content["reports"] + content["compared"]:
        if set(row) != known:
            raise ValueError(f"{path} lacks or adds report fields: {', '.join(sorted(set(row) ^ known))}.")
    own, compared = ([RobustnessReport(**row) for row in content[key]] for key in ("reports", "compared"))
    return own, compared


def percent(value: float) -> str:
    """0.123 as 12.3 %."""
    return f"{100 * value:.1f} %"


def to_table(reports: Sequence[RobustnessReport], title: str) -> Table:
    """A `rich` table: clean accuracy and accuracy at every radius, in percent."""
    from rich.table import Table

    norm = reports[0].norm
    radii = sorted({radius for report in reports for radius in report.robust_accuracy})
    table = Table(title=title, caption=f"accuracy in percent, clean and under {reports[0].attack} at radii in {norm}")
    table.add_column("")
    for column in ("n", "chance", "clean", *(str(ThreatModel(r, norm)).split("=")[1] for r in radii)):  # type: ignore[arg-type]
        table.add_column(column, justify="right", no_wrap=True)
    for report in reports:
        robust = [report.robust_accuracy.get(radius) for radius in radii]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in (report.clean_accuracy, *robust)]
        table.add_row(
            f"{report.name}, {report.task}", str(report.num_images), f"{100 / report.num_classes:.1f}", *cells
        )
    return table


def plot_accuracy(path: str | Path, panels: dict[str, dict[str, RobustnessReport]]) -> None:
    """Write a PNG of accuracy against eps: a panel for each key, a line for each report in it, 95 % bands."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, report in lines.items():
            grey_levels = report.norm == "linf"
            points = {0.0: report.clean_accuracy, **report.robust_accuracy}
            radii = [radius * 255 if grey_levels else radius for radius in points]
            (line,) = axis.plot(radii, list(points.values()), marker="o", markersize=3, label=label)
            low, high = zip(*(report.interval(value) for value in points.values()), strict=True)
            axis.fill_between(radii, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            axis.set_xlabel("L-inf eps (grey levels of 255)" if grey_levels else "L2 eps (units of [0, 1])")
        first = next(iter(lines.values()))
        axis.axhline(1 / first.num_classes, color="grey", linestyle=":", linewidth=1, label="chance")
        axis.set(title=f"{title} (n={first.num_images})", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"accuracy under {first.attack}")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=140)
