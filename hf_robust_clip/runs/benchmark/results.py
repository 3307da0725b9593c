"""What a benchmark's cells have found, as its tables call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...report import RobustnessReport, load_reports
from .settings import PICTURES, Benchmark, Evaluation, Model, models_of
from .single_runs import rate_folder

Reports = list[RobustnessReport]
Tries = Mapping[str, tuple[float, float]]  # clean and robust accuracy on held-out images, by learning rate


def reports_by_seed(
    benchmark: Benchmark, reports_of_run: Callable[[Evaluation, Model, int], Reports], missing: list[str] | None = None
) -> list[Reports]:
    """For each seed the reports of the rows of which there are those of every seed; `missing` is told the others."""
    runs: list[Reports] = [[] for _ in benchmark.seeds or (None,)]
    for evaluation in benchmark.evaluations:
        lacking, rows = [], models_of(benchmark, evaluation)
        for model in rows:
            seeded = benchmark.runs_of(model)[: evaluation.first_seeds]
            by_seed = [reports_of_run(evaluation, run, number) for number, run in enumerate(seeded)]
            if not all(by_seed):
                lacking.append(model.title)
                continue
            for of_seed, reports in zip(runs, by_seed, strict=False):
                of_seed += reports
        if lacking and missing is not None:
            missing.append(f"{evaluation.name}: {'all rows' if len(lacking) == len(rows) else ', '.join(lacking)}")
    return runs


def reports_here(benchmark: Benchmark, evaluation: Evaluation, run: Model, done: set[str]) -> Reports:
    """What this run has finished of an evaluation."""
    return reports_of(benchmark, evaluation, run) if f"{evaluation.name} of {run.name}" in done else []


def reports_of(benchmark: Benchmark, evaluation: Evaluation, model: Model) -> list[RobustnessReport]:
    """What an evaluation of a model found, as tables call it; the set of pictures by its name, wherever it is."""
    title = f"{evaluation.title} on {model.title}" if evaluation.title else model.title
    reports, _ = load_reports(benchmark.out / evaluation.name / model.name / "report.json")
    reports = [replace(report, name=title, model=benchmark.id_of(model)) for report in reports]
    return [replace(one, dataset=PICTURES) if Path(one.dataset).name == PICTURES else one for one in reports]


def tries_of(benchmark: Benchmark, model: Model) -> Tries:
    """What each learning rate of a row gave."""
    return {rate: held_out(rate_folder(benchmark, model, rate)) for rate in model.learning_rates}


def best_of(tries: Tries) -> str:
    """The learning rate that did best on held-out images, the first of equals."""
    return max(tries, key=lambda rate: sum(tries[rate]))


def held_out(folder: Path) -> tuple[float, float]:
    """Clean and robust accuracy on the held-out training images."""
    reports, _ = load_reports(folder / "report.json")
    if len(reports) != 1:
        raise ValueError(f"tasks of {folder.name}: learning rates are compared on one task, not {len(reports)}.")
    (report,) = reports
    return report.clean_accuracy, max(report.robust_accuracy.items())[1]


def seeded_titles(benchmark: Benchmark, number: int) -> dict[str, str]:
    """What rows are called in files: by title that with the seed, but for what isn't trained here."""
    after = f", seed {benchmark.seeds[number]}" if benchmark.seeds else ""
    return {model.title: model.title + (after if model.config else "") for model in benchmark.models}


def with_seeds(benchmark: Benchmark, runs: Sequence[Sequence[RobustnessReport]]) -> list[RobustnessReport]:
    """The reports of all seeds, which their names tell, but for what isn't trained here."""
    titles = [seeded_titles(benchmark, number) for number in range(len(runs))]
    return [
        replace(report, name=seeded.get(report.name, report.name))
        for seeded, run in zip(titles, runs, strict=True)
        for report in run
    ]


def check_images(reports: Sequence[RobustnessReport]) -> None:
    """Raise ValueError where as many images of a task are others in one report than in another under the same attack:
    a dataset was changed between two cells, or another run had another copy.
    """
    firsts: dict[tuple[str, str, int], RobustnessReport] = {}
    for report in reports:
        first = firsts.setdefault((report.task, report.attack, report.num_images), report)
        if first.outcomes and report.outcomes and first.outcomes.images != report.outcomes.images:
            raise ValueError(
                f"{report.task} has other images in the report of {report.name} than in that of {first.name}: its "
                "dataset was changed meanwhile. Evaluate both on one copy, in a new output_dir."
            )
