"""Rows that another run of a benchmark has written: taken whole, where all that they depend on is as asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...evaluation.settings import EvaluationSettings
from ...names import task_titles
from ...report import RobustnessReport, load_reports
from ...storage import write_text
from .results import Reports, Tries, seeded_titles, tries_of
from .settings import Benchmark, Evaluation, Model, models_of
from .single_runs import evaluation_digest, evaluation_run, training_digest

ROWS = "rows.json"  # beside the tables: by title what a row was made of, and what its learning rates gave


class Earlier:
    """What another run has written: reports, of what they were made, and learning rates; nothing without a folder.

    Raises ValueError for a folder without, or with other files.
    """

    def __init__(self, folder: str | None):
        self.reports: Reports = []
        self.rows: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        for file in ("reports.json", ROWS):
            if not (Path(folder) / file).is_file():
                raise ValueError(f"earlier={folder!r} has no {file}; name a folder of tables, such as cards/NAME.")
        self.reports, _ = load_reports(Path(folder) / "reports.json")
        try:
            self.rows = json.loads((Path(folder) / ROWS).read_text(encoding="utf-8"))
            for row in self.rows.values():
                _, _, tries = row["trained"], row["evaluated"].values(), row["learning_rates"]
                row["learning_rates"] = {
                    rate: (float(clean), float(robust)) for rate, (clean, robust) in tries.items()
                }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"earlier={folder!r}: {ROWS} can't be read ({type(error).__name__}: {error}).") from None

    def reports_of(self, benchmark: Benchmark, evaluation: Evaluation, model: Model, number: int) -> Reports:
        """What an evaluation of a row with the seed of this number gave, as tables call it; nothing where training or
        evaluation was another one, or a task's report is missing.
        """
        if not self.has(benchmark, model):
            return []
        if self.rows[model.title]["evaluated"].get(evaluation.name) != evaluation_digest(benchmark, evaluation, model):
            return []
        run, title = evaluation_run(benchmark, evaluation, model), seeded_titles(benchmark, number)[model.title]
        of_row, taken = [report for report in self.reports if report.name == title], []
        for task in task_titles([(task.name, task.dataset) for task in run.tasks]):
            for settings in run.evaluations:
                alike = [report for report in of_row if report.task == task and is_by(report, settings)]
                taken += [replace(report, name=model.title) for report in alike[:1]]
        return taken if len(taken) == len(run.tasks) * len(run.evaluations) else []

    def has(self, benchmark: Benchmark, model: Model) -> bool:
        """Whether a row was trained as asked."""
        return model.title in self.rows and self.rows[model.title]["trained"] == training_digest(benchmark, model)


def is_by(report: RobustnessReport, settings: EvaluationSettings) -> bool:
    """Whether a report is of these attacks at these radii."""
    count, radii = len(report.class_names), [threat.eps for threat in settings.threat_models()]
    reported = report.attack, report.attack_parameters, list(report.robust_accuracy)
    return reported == (settings.attack.name(count), settings.attack_parameters(count), radii)


def save_rows(benchmark: Benchmark, reports: Sequence[RobustnessReport], tried: Mapping[str, Tries]) -> None:
    """For another run that takes rows from this one: `Earlier`."""
    titles = {report.name for report in reports}
    rows = {
        model.title: {
            "trained": training_digest(benchmark, model),
            "evaluated": {
                evaluation.name: evaluation_digest(benchmark, evaluation, model)
                for evaluation in benchmark.evaluations
                if model in models_of(benchmark, evaluation)
            },
            "learning_rates": tried.get(model.title, {}),
        }
        for model in benchmark.models
        if model.title in titles
    }
    write_text(benchmark.cards / benchmark.name / ROWS, json.dumps(rows, indent=1) + "\n")


def tries_told(benchmark: Benchmark, model: Model, done: Iterable[str], earlier: Earlier) -> Tries:
    """What a row's learning rates gave, here or earlier; nothing unless all were tried."""
    if {f"learning rate {rate} of {model.name}" for rate in model.learning_rates} <= set(done):
        return tries_of(benchmark, model)
    return earlier.rows[model.title]["learning_rates"] if earlier.has(benchmark, model) else {}
