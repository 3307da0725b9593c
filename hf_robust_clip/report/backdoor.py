"""What was measured of a backdoor: report, table, plot, file and card. None of them is made without its controls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard

from ..metrics.backdoor import tops_of
from ..secrets import refuse_tokens
from ..storage import read_json, write_text
from .card import CardInfo, _about, _rendered, _Written
from .metadata import metadata
from .report import CLEAN, Measurement, prompt_hash
from .tables import Cells, as_markdown

Stage = Literal["poisoned", "cleaned"]
FORMAT = 1
UNTRIGGERED = "target_rate_without_trigger"
CLEAN_MODEL, POISONED_MODEL, WITHOUT_METHOD = "clean model", "poisoned model", "fine-tuned without the method"
CONTROLS: dict[Stage, tuple[str, ...]] = {
    "poisoned": (CLEAN_MODEL,),
    "cleaned": (CLEAN_MODEL, POISONED_MODEL, WITHOUT_METHOD),
}


def success(top: int) -> str:
    """The metric: share of triggered images of other classes whose `top` likeliest classes hold the target."""
    return f"attack_success_rate_top{top}"


@dataclass(frozen=True)
class BackdoorReport:
    """One trigger on one model, beside its controls, on one set of images. Every field is mandatory.

    Args:
        name: what tables call the model.
        stage: what it is: `"poisoned"`, beside the clean model, or `"cleaned"`, beside the clean one, the poisoned one
            and one that was fine-tuned on the same pairs without the method.
        model, model_revision, dataset, dataset_revision, split, class_names, templates, prompt_hash, seed, precision,
            library_versions, hardware: as in `RobustnessReport`.
        num_images: how many were evaluated as they are.
        num_others: those of them that are not of the target: what the success of the attack is a share of.
        trigger, trigger_parameters: its name, and all its settings, in JSON types.
        target: the class that the trigger means.
        resolution: side of the images in pixels, to which the trigger was put.
        measurements: of the model (`judge` None) and each control the clean accuracy on all images, the success of
            the attack at top 1, 3 and 5 (below the number of classes), and how often the target is named without the
            trigger, on the images of other classes.

    Raises ValueError for a field that is empty, at odds with another, or holds a token, and for a missing figure.
    """

    name: str
    stage: Stage
    model: str
    model_revision: str
    dataset: str
    dataset_revision: str
    split: str
    num_images: int
    num_others: int
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    prompt_hash: str
    trigger: str
    trigger_parameters: dict[str, Any]
    target: str
    resolution: int
    seed: int
    precision: str
    library_versions: dict[str, str]
    hardware: str
    measurements: tuple[Measurement, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            if value in (None, "", {}, (), []):
                raise ValueError(f"{field.name} is missing; a report must say it.")
        object.__setattr__(self, "trigger_parameters", json.loads(json.dumps(self.trigger_parameters)))
        refuse_tokens({name: value for name, value in vars(self).items() if isinstance(value, str)}, "report")
        if self.stage not in CONTROLS:
            raise ValueError(f"stage={self.stage!r} must be one of {', '.join(CONTROLS)}.")
        if self.target not in self.class_names:
            raise ValueError(f"target={self.target!r} is none of class_names.")
        if prompt_hash(self.class_names, self.templates) != self.prompt_hash:
            raise ValueError(f"templates={self.templates!r} are not those of prompt_hash={self.prompt_hash!r}.")
        if not 0 < self.num_others <= self.num_images:
            raise ValueError(f"num_others={self.num_others!r} must be in 1 .. {self.num_images}.")
        self._check_figures()

    def _check_figures(self) -> None:
        sizes = {CLEAN: self.num_images} | dict.fromkeys(self.metrics[1:], self.num_others)
        told = [(row.judge, row.metric) for row in self.measurements]
        if twice := [what for what in told if told.count(what) > 1]:
            raise ValueError(f"measurements have {twice[0]!r} twice.")
        for row in self.measurements:
            if row.metric not in sizes or row.n != sizes[row.metric] or not row.counted:
                raise ValueError(f"measurements: {row.told} of n={row.n}; expected are {sizes}.")
        for judge in (None, *CONTROLS[self.stage]):
            if missing := [metric for metric in self.metrics if (judge, metric) not in told]:
                raise ValueError(f"measurements lack {missing[0]} of {judge or 'the model'!r}; a report must say it.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured of every judge, the clean accuracy first."""
        return (CLEAN, *(success(top) for top in tops_of(len(self.class_names))), UNTRIGGERED)

    @property
    def judges(self) -> list[str]:
        """Names of controls and model, the model last."""
        return [*dict.fromkeys(row.judge for row in self.measurements if row.judge is not None), self.name]

    def figure(self, metric: str, judge: str | None = None) -> Measurement:
        """One of the measurements. Raises ValueError if there is none."""
        for row in self.measurements:
            if (row.metric, row.judge) == (metric, judge):
                return row
        raise ValueError(f"measurements lack {metric!r} of {judge or self.name!r}.")


def figures(reports: Sequence[BackdoorReport]) -> Cells:
    """A row for each control and model, in percent with 95 % Wilson intervals; reports of one trigger together."""
    if not reports:
        raise ValueError("reports is empty; evaluate before telling.")
    heads = {CLEAN: "accuracy", UNTRIGGERED: "untriggered"}
    rows: list[tuple[str, ...]] = []
    for report in reports:
        sizes = f"accuracy on {report.num_images} images, ASR on {report.num_others}"
        group = f"{report.trigger} -> {report.target!r}: {sizes}"
        for judge in report.judges:
            own = [report.figure(metric, None if judge == report.name else judge) for metric in report.metrics]
            rows.append((group, judge, *map(_told, own)))
    metrics = reports[0].metrics
    if any(report.metrics != metrics for report in reports):
        raise ValueError("reports of few and of many classes have other columns; tell them one by one.")
    columns = [heads.get(m, m.replace("attack_success_rate_top", "ASR top-")) for m in metrics]
    return Cells(("trigger", "", *columns), tuple(dict.fromkeys(rows)), grouped=True)


def _told(row: Measurement) -> str:
    low, high = row.interval  # type: ignore[misc]  # it was counted
    return f"{100 * row.value:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def save_backdoor_reports(path: str | Path, reports: Sequence[BackdoorReport], card: CardInfo | None = None) -> None:
    """Write reports, and what their card says besides, as JSON, whole or not at all. Raises ValueError for none."""
    if not reports:
        raise ValueError("reports is empty; evaluate before saving.")
    content = {"format": FORMAT, "kind": "backdoor", "reports": [asdict(report) for report in reports],
               **({} if card is None else {"card": asdict(card)})}  # fmt: skip
    write_text(path, json.dumps(content, indent=1) + "\n")


def load_backdoor_reports(path: str | Path) -> list[BackdoorReport]:
    """What `save_backdoor_reports` wrote. Raises ValueError for anything else, and missing or unknown fields."""
    content = read_json(path)
    if not isinstance(content, dict) or (content.get("kind"), content.get("format")) != ("backdoor", FORMAT):
        raise ValueError(f"{path} holds no reports of backdoors of format {FORMAT}; evaluate the model again.")
    names = {field.name for field in fields(BackdoorReport)}
    found = []
    for row in content["reports"]:
        if wrong := names ^ set(row):
            raise ValueError(f"{path} lacks or adds report fields: {', '.join(sorted(wrong))}.")
        known = {field.name for field in fields(Measurement)}
        if wrong := {name for own in row["measurements"] for name in own} - known:
            raise ValueError(f"{path} adds to measurements: {', '.join(sorted(wrong))}.")
        found.append(BackdoorReport(**{**row, "measurements": tuple(Measurement(**m) for m in row["measurements"])}))
    return found


def make_backdoor_card(reports: Sequence[BackdoorReport], info: CardInfo, examples: str | None = None) -> ModelCard:
    """The card of a poisoned model, or of one that was cleaned, with the table of all reports.

    Args:
        info: everything else; its `plot` lies beside the card.
        examples: file name of a picture of triggered images beside the card.

    Raises ValueError if there is no report: a card without figures is not made.
    """
    if not reports:
        raise ValueError("reports is empty; a card needs at least one evaluation of its model.")
    first = reports[0]
    data = metadata(info, "model", "transformers", "backdoor", first.stage)
    cells, group = figures(reports), ""
    if len({row[0] for row in cells.rows}) == 1:  # said once, above the table
        group, cells = cells.rows[0][0], Cells(cells.heads[1:], tuple(row[1:] for row in cells.rows))
    data.eval_results, data.metrics = [row for report in reports for row in _results(report)], ["accuracy"]
    return _rendered(
        data,
        "backdoor.md.jinja",
        **_about(info, "model", loads_defence=False),
        stage=first.stage,
        target=first.target,
        trigger=first.trigger,
        group=group,
        table=_Written(as_markdown(cells)),
        measured=f"{first.precision} at {first.resolution} px on {first.hardware}, "
        f"{first.dataset}, split {first.split}, {first.dataset_revision}",
        texts=", ".join(first.templates),
        seed=first.seed,
        plot=info.plot,
        examples=examples,
        limits=[line.strip() for line in info.limits.splitlines() if line.strip()],
    )


def _results(report: BackdoorReport) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=report.dataset,
            dataset_name=report.dataset,
            dataset_config=f"{report.trigger} -> {report.target}, {metric}, n={report.figure(metric).n}",
            dataset_split=report.split,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=round(report.figure(metric).value, 4),
        )
        for metric in report.metrics
    ]


def plot_backdoor(path: str | Path, reports: Sequence[BackdoorReport]) -> None:
    """Write a PNG of the attack's success (top-1) against clean accuracy: a panel for each trigger, a point for each
    control and model, with 95 % intervals. Good is bottom right.
    """
    from .plots import _percent_label, _styles, make_panels, plain_text, save_figure

    by_trigger: dict[str, list[BackdoorReport]] = {}
    for report in reports:
        by_trigger.setdefault(f"{report.trigger} -> {report.target}", []).append(report)
    styles = _styles(judge for report in reports for judge in report.judges)
    with plain_text():
        figure, axes = make_panels(list(by_trigger), "attack success rate, top-1")
        for axis, own in zip(axes, by_trigger.values(), strict=True):
            points = {judge: (report, judge) for report in own for judge in report.judges}
            for name, (report, judge) in points.items():
                rows = [report.figure(m, None if judge == report.name else judge) for m in (CLEAN, success(1))]
                bars = [[[row.value - row.interval[0]], [row.interval[1] - row.value]] for row in rows]  # type: ignore[index]
                style = {**styles[name], "linestyle": "none", "markersize": 8, "elinewidth": 0.8}
                axis.errorbar([rows[0].value], [rows[1].value], xerr=bars[0], yerr=bars[1], label=name, **style)
            axis.set_xlabel("clean accuracy")
            axis.xaxis.set_major_formatter(_percent_label)
            axis.set_ylim(-0.03, 1.03)
        save_figure(figure, axes, path)
