"""Tables of reports, made of their `frame`: one for each use, written for a terminal or as Markdown."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from ..threat_model import ThreatModel
from .report import AS_SAVED, CLEAN, CONTROLS, DETECTION, ROBUST, RobustnessReport, frame, percent, templates_told

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import RenderableType

WIDTH = 80  # of what is printed, where the terminal is no wider


@dataclass(frozen=True)
class Cells:
    """A table as texts: heads and rows; with `grouped`, the first cell says what several rows have in common."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    grouped: bool = False


def table(reports: Sequence[RobustnessReport], title: str) -> RenderableType:
    """What `figures` tells, for `rich`; `print_table` prints it.

    Raises ValueError for no reports and for several norms.
    """
    norm = "L-inf" if one_norm(reports) == "linf" else "L2"
    caption = f"accuracy in percent; radii in {norm}"
    about = [caption, templates_told(reports)]
    if any(report.controls for report in reports):
        about.append(
            "controls: on the images made against the defence, not attacked themselves (static prompts: the model "
            "as it is); ms per image"
        )
    views = {report.view.name: report.view.text for report in reports if report.view.of_defence}
    told = [", ".join(filter(None, about)), *(f"{name}: {text}" for name, text in views.items())]
    return as_text(figures(reports), title, "; ".join(told))


def markdown(reports: Sequence[RobustnessReport]) -> str:
    """`table` as Markdown, without title and caption."""
    return as_markdown(figures(reports))


def print_table(shown: RenderableType) -> None:
    """Print a table 80 columns wide, or as wide as the terminal or its numbers, none of which is cut."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False)
    least = Measurement.get(console, console.options.update(max_width=10**4), shown).minimum
    console.width = max(WIDTH, shutil.get_terminal_size().columns, least)
    console.print(shown)


def figures(reports: Sequence[RobustnessReport]) -> Cells:
    """A row for each report, and below it one for each control of its defence: number of images, and in percent the
    clean accuracy, those at each radius, and other metrics (`detections` has those of detectors); milliseconds per
    image, if there are defences. Reports of the same images under the same attack stand together.

    Raises ValueError for no reports and for several norms, whose radii can't share columns.
    """
    norm = one_norm(reports)
    rows = _of_accuracies(headlines(reports))
    values = by_column(rows, rows["value"].map(_number))
    groups: dict[str, list[tuple[str, ...]]] = {}
    for (number, judge), texts in zip(values.index, values.to_numpy().tolist(), strict=True):
        report = reports[number]
        ms = "" if judge else f"{report.defence['ms_per_image']:.1f}" if report.defence else "-"
        group = f"{report.task} under {report.full_attack}, chance {percent(1 / report.num_classes)}"
        name = f"control: {judge}" if judge else titled(report)
        line = group, name, str(report.num_images), *texts, ms
        groups.setdefault(group, []).append(line)
    heads = ("images and attack", "", "n", *(head(metric, eps, norm) for metric, eps in values), "ms")
    columns = len(heads) - (not any(report.defence for report in reports))
    return Cells(heads[:columns], tuple(row[:columns] for own in groups.values() for row in own), grouped=True)


def figures_by_task(
    reports: Sequence[RobustnessReport],
    further: Sequence[Sequence[RobustnessReport]] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Cells:
    """A row for each model, a column for each task, with clean and robust accuracies in percent, divided by " / ".

    Args:
        reports: of several models, one for each model and task.
        further: the same of models that were trained again; see `over_runs`. Where there are several of a model, its
            figures are means, each with "±" and the standard deviation.
        groups: by name their tasks; a column is then of the mean over the tasks of a group. See `grouped_tasks`.

    Raises ValueError for no reports, several norms, and as `over_runs` does.
    """
    every = [report for run in (reports, *further) for report in run]
    norm = one_norm(every)
    rows = _of_accuracies(over_runs(reports, further, groups))
    spread = rows["std"].map(lambda value: "" if value != value else f" ± {_number(value)}")
    values = by_column(rows, rows["value"].map(_number) + spread, ["name", "task"])
    told = " / ".join(head(metric, eps, norm) for metric, eps in values)
    of = {key: " / ".join(texts) for key, texts in zip(values.index, values.to_numpy().tolist(), strict=True)}
    columns = grouped_tasks(every, groups)
    names = dict.fromkeys(report.name for report in every)
    lines = [(name, *(of.get((name, column), "-") for column in columns)) for name in names]
    return Cells(("", *figure_heads(every, columns, told)), tuple(lines))


def grouped_tasks(
    reports: Sequence[RobustnessReport], groups: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """By the title of a column its tasks: each task of the reports alone, or those of them that a group has; a group
    without any has no column. Raises ValueError for a group that has a task twice.
    """
    tasks = dict.fromkeys(report.task for report in reports)
    if not groups:
        return {task: [task] for task in tasks}
    found = {}
    for group, named in groups.items():
        if len(set(named)) < len(named):
            raise ValueError(f"groups[{group!r}]={list(named)!r} has a task twice.")
        if own := [task for task in named if task in tasks]:
            found[f"{group}: {', '.join(own)}"] = own
    return found


def figure_heads(
    reports: Sequence[RobustnessReport], columns: Mapping[str, Sequence[str]], told: str | None = None
) -> list[str]:
    """The heads of columns of tasks: how many images they are of, and what is told, by default the accuracies."""
    sizes = {report.task: report.num_images for report in reports}
    if told is None:
        radii = sorted({eps for report in reports for eps in report.robust_accuracy})
        norm = one_norm(reports)
        told = " / ".join([head(CLEAN, 0.0, norm), *(head(ROBUST, eps, norm) for eps in radii)])
    return [f"{column} (n={sum(sizes[task] for task in tasks)}): {told}" for column, tasks in columns.items()]


def over_runs(
    reports: Sequence[RobustnessReport],
    further: Sequence[Sequence[RobustnessReport]] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> DataFrame:
    """The headlines of models, one row by name, task, metric and radius, where a model was trained several times.

    Args:
        reports: of several models, one for each model and task.
        further: the same of models that were trained again, with other seeds.
        groups: see `each_run`.

    Of several runs `value` is the mean, `std` the standard deviation of a sample (divided by their number less 1),
    `low` and `high` lie one of it to either side; of a single one `std` is NaN and `low` and `high` are its 95 %
    interval, or those of `each_run`. Raises ValueError as this does, and for a run that lacks a figure which another
    of the model has.
    """
    key = ["name", "task", "metric", "eps"]
    rows = each_run(reports, further, groups)
    counts = rows.groupby(key, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    for name, own in counts.groupby("name"):
        if own["count"].nunique() > 1:
            raise ValueError(f"a run of {name} lacks a figure that another has; finish all of them.")
    found = rows.drop_duplicates(key).merge(counts, on=key)
    several = found["count"] > 1
    found["value"] = found["mean"].where(several, found["value"])
    found["low"] = (found["mean"] - found["std"]).where(several, found["low"])
    found["high"] = (found["mean"] + found["std"]).where(several, found["high"])
    return found


def each_run(
    reports: Sequence[RobustnessReport],
    further: Sequence[Sequence[RobustnessReport]] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> DataFrame:
    """The headlines of models, one row by `run` (0 for `reports`), name, task, metric and radius.

    Args:
        groups: by name their tasks; see `grouped_tasks`. `task` is then the title of a group, and `value` the
            unweighted mean over its tasks, without an interval (NaN), of what all of them have.

    Raises ValueError for a model twice on a task, and runs of other images or attacks.
    """
    from pandas import concat

    key, alike = ["name", "task", "metric", "eps"], ["dataset", "split", "num_images", "full_attack"]
    rows = concat([headlines(run).assign(run=i) for i, run in enumerate((reports, *further)) if run])
    rows = rows[rows["judge"] == ""]
    for _, twice in rows[rows.duplicated(["run", *key])].head(1).iterrows():
        raise ValueError(f"two reports of {twice['name']}, {twice['task']}; tell one attack at a time.")
    for (name, task), own in rows.groupby(["name", "task"]):
        for field in alike:
            if len(found := own[field].unique()) > 1:
                raise ValueError(
                    f"the runs of {name}, {task} differ in {field}: {list(found)}; compare like with like."
                )
    return _means_over_tasks(rows, grouped_tasks([*reports, *chain(*further)], groups)) if groups else rows


def _means_over_tasks(rows: DataFrame, columns: Mapping[str, Sequence[str]]) -> DataFrame:
    """A row for each group of tasks in which no task is missing."""
    from pandas import concat

    key, parts = ["run", "name", "metric", "eps"], [rows.head(0)]
    for title, tasks in columns.items():
        own = rows[rows["task"].isin(tasks)]
        means = own.groupby(key)["value"].agg(["mean", "count"]).reset_index()
        whole = means[means["count"] == len(tasks)]
        first = own.drop_duplicates(key).merge(whole, on=key)
        parts.append(first.assign(task=title, value=first["mean"], low=float("nan"), high=float("nan")))
    return concat(parts)[rows.columns]


def detections(reports: Sequence[RobustnessReport]) -> Cells | None:
    """How well detectors tell attacked images from clean ones, in percent: a row for the clean images of each report,
    with the share that is flagged; one for each radius and attack, and for all attacks together, with AUROC and the
    share that a threshold of 5 % false alarms catches; and in each, of the images whose class is wrong, the share that
    is flagged, their number, and AUROC. None where nothing is detected.
    """
    rows = frame(reports)
    rows = rows[rows["metric"].isin(DETECTION)]
    if not len(rows):
        return None
    lines: dict[tuple[int, float, str], dict[str, str]] = {}
    for row in rows.to_dict("records"):
        member = row["member"] if isinstance(row["member"], str) else "all"
        cells = lines.setdefault((row["number"], row["eps"], member), {"n": str(row["n"])})
        of = f" ({row['n']})" if row["metric"] in ("detection_fpr_of_errors", "detection_of_successful") else ""
        column = "detection_of_successful" if row["metric"] == "detection_fpr_of_errors" else row["metric"]
        cells[column] = _number(row["value"]) + of
    texts = []
    columns = ("n", *(metric for metric in DETECTION if metric != "detection_fpr_of_errors"))
    for (number, eps, member), cells in sorted(lines.items(), key=lambda line: (line[0][:2], line[0][2] == "all")):
        report = reports[number]
        group = f"{titled(report)} on {report.task} under {report.full_attack}"
        where = f"{report.threat(eps).radius} {member}" if eps else "clean"
        texts.append((group, where, *(cells.get(column, "-") for column in columns)))
    heads = ("", "", "n", "FPR", "AUROC", "TPR", "wrong (n)", "AUROC")
    return Cells(heads, tuple(texts), grouped=True)


def _of_accuracies(rows: DataFrame) -> DataFrame:
    """Without the metrics of detectors, and of pictures as they are saved."""
    return rows[~rows["metric"].isin(DETECTION) & ~rows["metric"].str.startswith(AS_SAVED)]


def defence_figures(rows: Mapping[str, Sequence[RobustnessReport]]) -> DataFrame:
    """What a table and a plot of defences tell: a row for each label, accuracies in [0, 1], NaN for what there isn't.

    A label's reports are of one defence (or of none) on the same images. The columns are `n`, `clean`, one for each
    attack that was made on the classifier alone (`blind ...`: white box, where there is no defence), `adaptive worst`
    (the lowest under any attack), each control on the images of the first of these attacks (`... clean` and attacked),
    and `ms` per image. All are at the largest radius that every report has.

    Raises ValueError for a label without reports, or with reports on several sets of images, and if the reports have
    no radius in common.
    """
    from pandas import DataFrame

    every = [report for reports in rows.values() for report in reports]
    radii = set.intersection(*(set(report.robust_accuracy) for report in every)) if every else set()
    if not radii:
        raise ValueError("the reports have no radius in common; evaluate all of them at one.")
    radius = max(radii)
    lines = []
    for name, reports in rows.items():
        if len({(report.dataset, report.split, report.num_images) for report in reports}) != 1:
            raise ValueError(f"the reports of {name!r} must be of one set of images, and at least one.")
        told = next((report for report in reports if report.defence), None)
        lines.append(
            {"n": reports[0].num_images, "clean": reports[0].clean_accuracy}
            | {f"blind {own.attack}": own.robust_accuracy[radius] for own in reports if own.view.alone}
            | {"adaptive worst": min(own.robust_accuracy[radius] for own in reports)}
            | {f"{who} clean": own[0.0] for who, own in (told.controls if told else {}).items()}
            | {who: own[radius] for who, own in (told.controls if told else {}).items()}
            | {"ms": told.defence["ms_per_image"] if told and told.defence else None}
        )
    blind = [f"blind {attack}" for attack in dict.fromkeys(own.attack for own in every if own.view.alone)]
    controls = [column for who in CONTROLS for column in (f"{who} clean", who)]
    found = DataFrame(lines, index=list(rows))
    return found.reindex(columns=["n", "clean", *blind, "adaptive worst", *controls, "ms"]).astype(float)


def figures_of_defences(rows: Mapping[str, Sequence[RobustnessReport]]) -> Cells:
    """`defence_figures` in percent; a control's cell holds its clean and its robust accuracy, divided by " / "."""
    found = defence_figures(rows)
    texts = found.map(_number)
    texts["n"] = found["n"].map("{:.0f}".format)
    texts["ms"] = found["ms"].map(lambda value: "-" if value != value else f"{value:.1f}")
    for control in CONTROLS:
        both = texts.pop(f"{control} clean") + " / " + texts[control]
        texts[control] = both.replace("- / -", "-")
    return Cells(("", *texts), tuple(zip(texts.index, *(texts[column] for column in texts), strict=True)))


def headlines(reports: Sequence[RobustnessReport]) -> DataFrame:
    """The rows of `frame` that are of all images under all attacks at their radius; `judge` is "" for the model."""
    rows = frame(reports)
    rows = rows[rows["member"].isna() & rows["class_name"].isna()]
    return rows.assign(judge=rows["judge"].fillna(""))


def by_column(rows: DataFrame, texts: Any, index: Sequence[str] = ("number", "judge")) -> DataFrame:
    """Texts by report and judge, or another `index` (rows), and by metric and radius (columns): clean, radii
    ascending, other metrics; a dash where nothing was measured.
    """
    from pandas import MultiIndex

    index, columns = list(index), ["metric", "eps"]
    metrics = list(dict.fromkeys((CLEAN, ROBUST, *rows["metric"])))
    pairs = sorted(set(zip(rows["metric"], rows["eps"], strict=True)), key=lambda pair: (metrics.index(pair[0]), pair))
    wide = rows.assign(text=texts).pivot(index=index, columns=columns, values="text")
    order = MultiIndex.from_frame(rows[index].drop_duplicates())
    return wide.reindex(index=order, columns=MultiIndex.from_tuples(pairs)).fillna("-")


def titled(report: RobustnessReport) -> str:
    """The model's name, with that of its defence."""
    return f"{report.name} with {report.defence['name']}" if report.defence else report.name


def head(metric: str, eps: float, norm: str) -> str:
    """The head of a column of figures."""
    radius = ThreatModel(eps, norm).radius if eps else ""  # type: ignore[arg-type]
    if metric == ROBUST:
        return radius
    return "clean" if metric == CLEAN else f"{metric.replace('_', ' ')} {radius}".rstrip()


def one_norm(reports: Sequence[RobustnessReport]) -> str:
    """The norm of all reports. Raises ValueError for none and for several."""
    norms = sorted({report.norm for report in reports})
    if len(norms) != 1:
        found = ", ".join(norms) if norms else "no reports"
        raise ValueError(f"one table or plot holds reports of one norm, got {found}; make one for each norm.")
    return norms[0]


def by_model(reports: Sequence[RobustnessReport]) -> dict[str, list[RobustnessReport]]:
    """The reports of each model and task, by what tables call them."""
    several = len({report.task for report in reports}) > 1
    rows: dict[str, list[RobustnessReport]] = {}
    for report in reports:
        rows.setdefault(f"{report.name}, {report.task}" if several else report.name, []).append(report)
    return rows


def as_text(cells: Cells, title: str, caption: str = "") -> RenderableType:
    """Cells for `rich`: words are wrapped, numbers never; no name is read as colours or pictures."""
    from rich.cells import cell_len
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    first, indent = int(cells.grouped), "  " * cells.grouped
    widths = [max(map(cell_len, column)) for column in zip(cells.heads, *cells.rows, strict=True)][first:]
    widths[0] += len(indent)
    widths[0] = min(widths[0], max(WIDTH - sum(widths[1:]) - 2 * len(widths), 12))

    def lines(rows: Sequence[Sequence[str]]) -> Table:
        shown = Table.grid(padding=(0, 2, 0, 0))
        for i, width in enumerate(widths):
            shown.add_column(justify="right" if i else "left", no_wrap=i > 0, width=width)
        for row in rows:
            shown.add_row(Text(indent + row[first]), *map(Text, row[first + 1 :]))
        return shown

    parts: list[RenderableType] = [Text(title, style="bold"), lines([cells.heads])]
    for group, rows in groupby(cells.rows, key=lambda row: row[0] if cells.grouped else ""):
        parts += [*([Text(), Text(group, style="italic")] if group else []), lines([*rows])]
    return Group(*parts, *([Text(), Text(caption)] if caption else []))


def as_markdown(cells: Cells) -> str:
    """A Markdown table."""
    lines = [cells.heads, *cells.rows]
    texts = ["| " + " | ".join(map(cell, line)) + " |" for line in lines]
    return "\n".join([texts[0], "|---" * len(cells.heads) + "|", *texts[1:]])


def cell(value: Any) -> str:
    """A value in one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _number(value: float) -> str:
    """In percent; a dash for what there isn't."""
    return "-" if value != value else f"{100 * value:.1f}"
