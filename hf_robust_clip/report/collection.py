"""The index page of a folder of cards: which models there are, and tables of methods x tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .card import FROM_SCRATCH, CardInfo, _as_text, _by_defence, _named, _parameters, load_card_info
from .files import load_reports, read_report_file
from .report import RobustnessReport
from .tables import Cells, as_markdown, titled

MADE = "<!-- written by `hf-robust-clip card --collection` from the reports below it -->"
NOTE = """\
The tables hold what was measured alike: the same images and prompts under the same attack. The 95 % intervals stand on
the cards: on few images, neighbours in a table may not differ."""
SORTS = ("model", "method", "clean", "robust")  # or the title of a task


@dataclass(frozen=True)
class Entry:
    """One card of a collection."""

    place: str
    info: CardInfo
    reports: tuple[RobustnessReport, ...]
    start: tuple[RobustnessReport, ...]  # of the model that it started from

    @property
    def link(self) -> str:
        """Its name, with a link to its folder."""
        return f"[{_as_text(self.place)}]({quote(self.place)}/README.md)"


@dataclass(frozen=True)
class Row:
    """A line of a table: a model, and its report of each task by the task's head."""

    link: str
    name: str
    reports: dict[str, RobustnessReport]

    def clean(self) -> float:
        """The mean clean accuracy over tasks."""
        return sum(report.clean_accuracy for report in self.reports.values()) / len(self.reports)

    def robust(self) -> float:
        """The mean accuracy over tasks at the smallest radius; without an attack the clean one."""
        return sum(map(_least, self.reports.values())) / len(self.reports)


def read_collection(folder: str | Path) -> tuple[list[Entry], list[str]]:
    """The cards below a folder, by their places; and the folders that have a report but no card.

    Raises OSError for a folder that isn't there; ValueError where there is no card, one that can't be read, and
    figures of a defence that nobody attacked but blindly.
    """
    root = Path(folder)
    if not root.is_dir():
        raise OSError(f"collection={str(folder)!r} is no folder.")
    entries, left = [], []
    for path in sorted(root.rglob("report.json")):
        place = path.parent.relative_to(root).as_posix()
        if place == "." or not (path.parent / "README.md").is_file() or not read_report_file(path).get("card"):
            left.append(place)
            continue
        (own, compared), info = load_reports(path), load_card_info(path)
        _by_defence([*compared, *own])
        start = [report for report in compared if report.model == info.base_model and report.defence is None]
        entries.append(Entry(place, info, tuple(own), tuple(start)))
    if not entries:
        raise ValueError(f"collection={str(folder)!r} holds no folder with a README.md and a report.json of a card.")
    return entries, left


def make_collection(title: str, entries: Sequence[Entry], sort_by: str = "robust") -> str:
    """The page: all models, then a table for all that were measured alike, a line for each, a column for each task.

    Measured alike are reports of the same images and prompts under one attack, with its parameters and radii: what
    differs in any of these stands in tables of its own, and no mean is taken over different tasks.

    Args:
        title: of the page.
        sort_by: `"model"` or `"method"`, ascending; `"clean"` or `"robust"`, the mean over the tasks of a table
            (robust: of the accuracy at the smallest radius), descending; or the title of a task: its accuracy at the
            smallest radius. A table without that task, and the list of models, are sorted by model then.

    Raises ValueError for a `sort_by` that is none of these.
    """
    tasks = {report.task for entry in entries for report in entry.reports}
    if sort_by not in (*SORTS, *tasks):
        raise ValueError(f"sort_by={sort_by!r} must be {', '.join(SORTS)}, or a task: {', '.join(sorted(tasks))}.")
    ordered = sorted(entries, key=lambda own: (own.info.paper.method if sort_by == "method" else "", own.place))
    heads = ("model", "method", "started from", "trained on", "licence")
    links = {entry.info.repo_id: entry.link for entry in ordered}
    models = as_markdown(Cells(heads, tuple(_about(entry, links) for entry in ordered)))
    parts = [MADE, f"# {_as_text(title)}", f"{len(entries)} models. {NOTE}", models]
    for rows in _measured_alike(entries):
        parts += _section(rows, sort_by)
    return "\n\n".join(parts) + "\n"


def _about(entry: Entry, links: Mapping[str, str]) -> tuple[str, ...]:
    """Its line in the list of models; `links` are those of repositories that lie in the collection."""
    info = entry.info
    start = info.base_model or info.ancestor
    told = FROM_SCRATCH if info.settings.get("start") == FROM_SCRATCH else "not published"
    told = links.get(start) or _named(start) if start else told
    return entry.link, _as_text(info.paper.method), told, _as_text(", ".join(info.datasets)), info.license or ""


def _key(report: RobustnessReport) -> str:
    """What two reports must have in common to stand in one column."""
    alike = report.full_attack, report.norm, sorted(report.robust_accuracy), _parameters(report), report.precision
    images = report.task, report.dataset, report.dataset_revision, report.split, report.num_images
    return json.dumps([*alike, *images, report.prompt_hash, report.attack_resolution, report.seed], sort_keys=True)


def _measured_alike(entries: Sequence[Entry]) -> list[list[Row]]:
    """The rows of each table; those of attacks that don't know a defence come last."""
    tables: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = {}
    for entry in entries:
        own = [(entry.link, report) for report in entry.reports]
        lines: dict[tuple[str, ...], list[Row]] = {}
        for link, report in [*own, *((_named(report.model), report) for report in entry.start)]:
            radii = json.dumps([report.norm, *sorted(report.robust_accuracy)])
            defence = json.dumps(report.defence and report.defence["parameters"], sort_keys=True)
            rows = lines.setdefault((link, titled(report), report.full_attack, radii, defence), [])
            row = next((row for row in rows if _head(report) not in row.reports), None)
            if row is None:
                rows.append(row := Row(link, _as_text(titled(report)), {}))
            row.reports[_head(report)] = report
        for row in (row for rows in lines.values() for row in rows):
            columns = tuple(sorted(map(_key, row.reports.values())))
            figures = json.dumps([_values(report) for report in row.reports.values()])
            name = row.name if row.link == entry.link else ""  # many cards tell of one start, each by its own words
            tables.setdefault(columns, {}).setdefault((row.link, name, figures), row)
    found = [list(rows.values()) for rows in tables.values()]
    return sorted(found, key=lambda rows: _is_blind(_first(rows)))


def _is_blind(report: RobustnessReport) -> bool:
    return report.view.alone and report.view.of_defence


def _values(report: RobustnessReport) -> list[float]:
    """The clean accuracy, and that at each radius, ascending."""
    return [report.clean_accuracy, *(report.robust_accuracy[eps] for eps in sorted(report.robust_accuracy))]


def _least(report: RobustnessReport) -> float:
    """The accuracy at the smallest radius; without an attack the clean one."""
    return _values(report)[1 if report.robust_accuracy else 0]


def _first(rows: Sequence[Row]) -> RobustnessReport:
    return next(iter(rows[0].reports.values()))


def _head(report: RobustnessReport) -> str:
    return f"{report.task} (n={report.num_images})"


def _section(rows: Sequence[Row], sort_by: str) -> list[str]:
    """Heading, what the figures are, and the table."""
    first, heads = _first(rows), list(rows[0].reports)
    radii = [first.threat(eps).radius for eps in sorted(first.robust_accuracy)]
    mean, at = "mean " if len(heads) > 1 else "", f" at {radii[0]}" if radii else ""
    task = next((head for head in heads if rows[0].reports[head].task == sort_by), None)
    orders: dict[str, tuple[str, Callable[[Row], Any]]] = {
        "model": ("model", lambda row: 0),
        "method": ("method", lambda row: row.name),
        "clean": (f"{mean}clean accuracy", lambda row: -row.clean()),
        "robust": (f"{mean}accuracy{at}", lambda row: -row.robust()),
    }
    if task is not None:
        orders[sort_by] = f"{_as_text(task)}{at}", lambda row: -_least(row.reports[task])
    by, order = orders.get(sort_by, orders["model"])
    lines = []
    for row in sorted(rows, key=lambda row: (order(row), row.link, row.name)):
        cells = [" / ".join(f"{100 * value:.1f}" for value in _values(row.reports[head])) for head in heads]
        both = [row.clean(), *([row.robust()] if radii else [])]
        means = [" / ".join(f"{100 * value:.1f}" for value in both)] if mean else []
        lines.append((row.link, row.name, *cells, *means))
    figures = " / ".join(["clean", *radii])
    last = [f"mean: {' / '.join(['clean', *radii[:1]])}"] if mean else []
    norm = "L-inf" if first.norm == "linf" else "L2"
    told = f"{figures} ({norm}); attack: {first.view.text}" if radii else figures
    about = f"In percent, {told}. Sorted by {by}."
    blind = "**This attack doesn't know the defence and flatters it: quote the figures of an attack through it.**"
    table = as_markdown(Cells(("model", "", *map(_as_text, heads), *last), tuple(lines)))
    return [f"## {_as_text(first.full_attack)}", about, *([blind] if _is_blind(first) else []), table]
