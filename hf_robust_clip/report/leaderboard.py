"""A leaderboard: robust checkpoints under one attack on the same images, as table, CSV, plot and a page."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..storage import whole_file, write_text
from .plots import plot_tradeoff
from .report import RobustnessReport
from .tables import Cells, as_markdown, cell

FILES = ("leaderboard.md", "leaderboard.csv", "leaderboard.png")
UNRANKED = "-"


@dataclass(frozen=True)
class LeaderboardRow:
    """One checkpoint.

    Args:
        title: what tables call it.
        method: by which it was trained; empty for an undefended reference.
        trained: the perturbations of its training, such as `"L-inf eps=4/255"`.
        trained_on: dataset.
        reference: title of the undefended model that it was fine-tuned from.
        licence: of the weights.
        source: where they are, with the revision.
        notes: what a reader must know.
        is_reference: an undefended model, which is shown and not ranked.
        reports: by task, those that there are.
        reasons: why there is no report, or why one can't stand beside the others, a line each.
    """

    title: str
    method: str
    trained: str
    trained_on: str
    reference: str
    licence: str
    source: str
    notes: str = ""
    is_reference: bool = False
    reports: Mapping[str, RobustnessReport] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leaderboard:
    """Rows in their order, best first: ranked models, then references, then what lacks a task.

    Args:
        rows: of the table.
        tasks: that a ranked model has reports of, all under one setting.
        radius: of the robust accuracy that decides, in units of [0, 1].
    """

    rows: tuple[LeaderboardRow, ...]
    tasks: tuple[str, ...]
    radius: float

    @property
    def radii(self) -> list[float]:
        """At which there are figures, ascending."""
        return sorted({eps for row in self.rows for own in row.reports.values() for eps in own.robust_accuracy})

    def mean(self, row: LeaderboardRow) -> dict[float, float] | None:
        """The mean accuracy over all tasks by radius, 0 for clean; None where a task lacks."""
        if not self.tasks or any(task not in row.reports for task in self.tasks):
            return None
        by_task = [{0.0: own.clean_accuracy, **own.robust_accuracy} for own in row.reports.values()]
        return {eps: sum(own[eps] for own in by_task) / len(by_task) for eps in (0.0, *self.radii)}

    def ranks(self) -> list[str]:
        """The rank of each row; a dash for references and for what lacks a task. Equal accuracies share a rank."""
        values = [self._decides(row) for row in self.rows]
        better = [sum(other > own for other in values if other is not None) for own in values if own is not None]
        ranks = iter(better)
        return [UNRANKED if own is None else str(1 + next(ranks)) for own in values]

    def _decides(self, row: LeaderboardRow) -> float | None:
        mean = None if row.is_reference else self.mean(row)
        return None if mean is None else next(v for eps, v in mean.items() if math.isclose(eps, self.radius))


def make_leaderboard(rows: Sequence[LeaderboardRow], tasks: Sequence[str], radius: float) -> Leaderboard:
    """Rows, best first. A report of other images, prompts or attacks than most are of is taken out of its row, which
    says what differs: figures of different settings don't stand in one table.
    """
    for task in tasks:
        told = [_setting(row.reports[task]) for row in rows if task in row.reports]
        common = (
            {name: json.loads(Counter(own[name] for own in told).most_common(1)[0][0]) for name in told[0]}
            if told
            else {}
        )
        rows = [_without_other(row, task, common) for row in rows]
    board = Leaderboard(tuple(rows), tuple(tasks), radius)
    values = {id(row): board._decides(row) for row in rows}

    def place(row: LeaderboardRow) -> tuple[int, float]:
        own = values[id(row)]
        if own is not None:
            return 0, -own
        return (1 if board.mean(row) is not None else 2), 0.0

    return replace(board, rows=tuple(sorted(rows, key=place)))


def _setting(report: RobustnessReport) -> dict[str, str]:
    """What must be the same of all models, as JSON, by what a reader calls it."""
    told: dict[str, Any] = {
        "dataset": report.dataset,
        "dataset revision": report.dataset_revision,
        "split": report.split,
        "number of images": report.num_images,
        "classes and prompts": report.prompt_hash,
        "attack": report.attack,
        "attack's settings": report.attack_parameters,
        "view": report.view.name,
        "norm": report.norm,
        "radii": list(report.robust_accuracy),
        "attack resolution": report.attack_resolution,
        "seed": report.seed,
        "defence": report.defence and report.defence["name"],
    }
    return {name: json.dumps(value, sort_keys=True) for name, value in told.items()}


def _without_other(row: LeaderboardRow, task: str, common: Mapping[str, Any]) -> LeaderboardRow:
    """A row without a report of another setting than the common one."""
    if task not in row.reports:
        return row
    own = {name: json.loads(value) for name, value in _setting(row.reports[task]).items()}
    other = next((name for name in own if own[name] != common[name]), None)
    if other is None:
        return row
    reason = f"not ranked on {task}: {other} {_brief(own[other])}, others {_brief(common[other])}"
    reports = {name: report for name, report in row.reports.items() if name != task}
    return replace(row, reports=reports, reasons=(*row.reasons, reason))


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def as_cells(board: Leaderboard, *, brief: bool = False) -> Cells:
    """A line for each row: the means over all tasks, in percent; where it is `brief` without what is long to read."""
    radii = board.radii
    heads = ["model", "", "method", "trained at", "clean", *(_threat(board, eps) for eps in radii)]
    lines = []
    for rank, row in zip(board.ranks(), board.rows, strict=True):
        mean = board.mean(row)
        figures = [UNRANKED if mean is None else f"{100 * mean[eps]:.1f}" for eps in (0.0, *radii)]
        method = "undefended" if row.is_reference else row.method
        notes = "; ".join(filter(None, [*row.reasons, row.notes]))
        line = [row.title, rank, method, row.trained or UNRANKED, *figures]
        lines.append(tuple(line if brief else [*line, row.reference, row.licence, row.source, notes]))
    return Cells(tuple(heads if brief else [*heads, "trained from", "licence", "source", "notes"]), tuple(lines))


def as_cells_by_task(board: Leaderboard) -> Cells:
    """A line for each row, a column for each task: clean accuracy and those at each radius, in percent."""
    radii = board.radii
    told = " / ".join(["clean", *(_threat(board, eps) for eps in radii)])
    sizes = {
        task: next((row.reports[task].num_images for row in board.rows if task in row.reports), 0)
        for task in board.tasks
    }
    lines = []
    for row in board.rows:
        cells = []
        for task in board.tasks:
            report = row.reports.get(task)
            by_radius = {} if report is None else {0.0: report.clean_accuracy, **report.robust_accuracy}
            cells.append(" / ".join(f"{100 * by_radius[eps]:.1f}" for eps in (0.0, *radii)) if by_radius else UNRANKED)
        lines.append((row.title, *cells))
    return Cells(("model", *(f"{task} (n={sizes[task]}): {told}" for task in board.tasks)), tuple(lines))


def _threat(board: Leaderboard, eps: float) -> str:
    report = next(own for row in board.rows for own in row.reports.values())
    return report.threat(eps).radius


def write_leaderboard(folder: Path, board: Leaderboard, heading: str, about: str, excluded: Sequence[str]) -> None:
    """Write `FILES`; no plot where no model was evaluated.

    Args:
        heading: of the page.
        about: below it.
        excluded: checkpoints that are left out, with the reason, a line each.
    """
    _save_csv(folder / "leaderboard.csv", board)
    reports = [replace(own, name=row.title) for row in board.rows for own in row.reports.values()]
    if reports:
        plot_tradeoff(folder / "leaderboard.png", reports, board.radius)
    write_text(folder / "leaderboard.md", _page(board, heading, about, excluded, bool(reports)))


def _page(board: Leaderboard, heading: str, about: str, excluded: Sequence[str], plotted: bool) -> str:
    parts = [f"# {heading}", *([about.strip()] if about.strip() else [])]
    report = next((own for row in board.rows for own in row.reports.values()), None)
    if report is not None:
        ranked = report.threat(board.radius)
        templates = " | ".join(report.templates or ())
        parts.append(
            f"{report.full_attack}, {'mean over ' if len(board.tasks) > 1 else ''}{', '.join(board.tasks)}, accuracy "
            f"in percent, ranked by that at {ranked}. All rows: the same images, prompt `{templates}`, attack, radii, "
            "attack resolution and seed. Every attack gives an upper bound of robustness; a reference is undefended "
            "and not ranked; what lacks a task has no mean."
        )
    parts.append(as_markdown(as_cells(board)))
    parts += ["## By task", as_markdown(as_cells_by_task(board))] if report is not None else []
    parts += ["![clean against robust accuracy](leaderboard.png)"] if plotted else []
    parts += ["## Left out", "\n".join(f"- {cell(line)}" for line in excluded)] if excluded else []
    return "\n\n".join(parts) + "\n"


def _save_csv(path: Path, board: Leaderboard) -> None:
    """A line for each model, task and radius, the clean accuracy at 0, and the means; one for a model without any."""
    with whole_file(path) as draft, Path(draft).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        facts = (
            "rank",
            "model",
            "method",
            "trained",
            "trained_on",
            "trained_from",
            "licence",
            "source",
            "is_reference",
        )
        writer.writerow([*facts, "task", "n", "attack", "norm", "eps", "accuracy", "reasons"])
        for rank, row in zip(board.ranks(), board.rows, strict=True):
            told = [
                rank.strip(UNRANKED),
                row.title,
                row.method,
                row.trained,
                row.trained_on,
                row.reference,
                row.licence,
            ]
            told += [row.source, str(row.is_reference).lower()]
            reasons = "; ".join(row.reasons)
            for task, report in row.reports.items():
                for eps, value in {0.0: report.clean_accuracy, **report.robust_accuracy}.items():
                    attack = report.full_attack if eps else ""
                    writer.writerow(
                        [*told, task, report.num_images, attack, report.norm, eps, round(value, 6), reasons]
                    )
            for eps, value in (board.mean(row) or {}).items():
                writer.writerow([*told, "mean", "", "", "", eps, round(value, 6), reasons])
            if not row.reports:
                writer.writerow([*told, "", "", "", "", "", "", reasons])
