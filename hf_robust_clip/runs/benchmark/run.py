"""A benchmark from its settings to its tables: what is finished isn't repeated, what is missing is named."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import replace

from ...digits_clip import EMBEDDED_MODEL
from ...modeling.checkpoints import read_config
from ...names import task_titles
from ...threat_model import parse_radius
from ..grid import finished_cells, run_cells, say
from .cells import cells_of
from .earlier import Earlier, save_rows, tries_told
from .results import Reports, check_images, reports_by_seed, reports_here
from .settings import Benchmark, Evaluation, Model, check_known, models_of
from .single_runs import evaluation_run
from .tables import check_compared, write_cards, write_tables


def run(benchmark: Benchmark) -> None:
    """Train, evaluate, write. Raises ValueError, with a line for each, where cells failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a benchmark is started as one process; --jobs says how many share its work.")
    if benchmark.data_root is not None:
        os.environ["HF_ROBUST_CLIP_DATA_ROOT"] = benchmark.data_root
    if benchmark.baseline is not None:
        check_known("baseline", [benchmark.baseline], [model.title for model in benchmark.models])
    check_start(benchmark)
    cells = cells_of(benchmark)
    check_tables(benchmark)
    failed: dict[str, str] = {}
    if not benchmark.partial:
        times = benchmark.out / "seconds.csv"
        failed = run_cells(cells, times, benchmark.jobs, benchmark.keep_going)
    if not benchmark.only and (benchmark.partial or benchmark.keep_going or not failed):
        write(benchmark, finished_cells(cells))
        say(f"tables: {benchmark.cards / benchmark.name / 'table.md'}")
    if failed:
        *others, last = [f"{name}: {reason}" for name, reason in failed.items()]
        for line in others:
            say(f"error: {line}")
        raise ValueError(last)


def check_start(benchmark: Benchmark) -> None:
    """Raise OSError for a start, or a row's folder, that can't be read: before what is finished is made anew."""
    for name in dict.fromkeys([benchmark.start, *(model.folder for model in benchmark.chosen if model.folder)]):
        if name != EMBEDDED_MODEL:
            read_config(name, {})


def check_tables(benchmark: Benchmark) -> None:
    """Raise ValueError for groups without tasks or of tasks that no evaluation has, and for a radius of the trade-off
    that one lacks.
    """
    whole = replace(benchmark, only=())
    rows = [(evaluation, models_of(whole, evaluation)) for evaluation in whole.evaluations]
    runs = [evaluation_run(whole, evaluation, models[0]) for evaluation, models in rows if models]
    tasks = {title for run in runs for title in task_titles([(task.name, task.dataset) for task in run.tasks])}
    for group, named in benchmark.groups.items():
        if unknown := [task for task in named if task not in tasks] or ([] if named else ["no task"]):
            raise ValueError(f"groups[{group!r}] has {unknown[0]!r}; tasks are {sorted(tasks)}.")
    if benchmark.tradeoff_radius is None:
        return
    radius = parse_radius(benchmark.tradeoff_radius, "tradeoff_radius")
    for settings in [settings for run in runs for settings in run.evaluations]:
        radii = [threat.eps for threat in settings.threat_models()] if settings.attack.has_radii else []
        if not any(math.isclose(radius, eps) for eps in radii):
            raise ValueError(
                f"tradeoff_radius={benchmark.tradeoff_radius!r} is not among the radii of an evaluation: "
                f"{list(settings.radii)}."
            )


def write(benchmark: Benchmark, done: Iterable[str]) -> None:
    """Tables, plots and cards. An evaluation of a row is left out, and named, unless all seeds are finished.

    Raises ValueError where no evaluation of any row is, and for reports of one task on different images.
    """
    done, earlier = set(done), Earlier(benchmark.earlier)
    here = reports_by_seed(benchmark, lambda evaluation, run, number: reports_here(benchmark, evaluation, run, done))
    measured_here = {report.name for report in here[0]}

    def anywhere(evaluation: Evaluation, run: Model, number: int) -> Reports:
        reports = reports_here(benchmark, evaluation, run, done)
        if run.config and benchmark.earlier is not None:  # a row is of one run: trained elsewhere, other weights
            return reports if run.title in measured_here else earlier.reports_of(benchmark, evaluation, run, number)
        return reports or earlier.reports_of(benchmark, evaluation, run, number)

    def is_earlier(model: Model) -> bool:
        return model.title not in measured_here and earlier.has(benchmark, model)

    missing: list[str] = []
    runs = reports_by_seed(benchmark, anywhere, missing)
    if not any(runs):
        raise ValueError(f"output_dir={benchmark.output_dir!r}: no evaluation is finished, so there is no table yet.")
    every = [report for run in runs for report in run]
    check_compared(benchmark, every)
    check_images(every)
    write_cards(benchmark, here[0], [report for report in runs[0] if report.name == benchmark.start_title])
    tried = {
        model.title: tries
        for model in benchmark.models
        if (tries := tries_told(benchmark, model, () if is_earlier(model) else done, earlier))
    }
    whole = benchmark
    if missing:
        line = f"Unfinished, and left out of the tables: {'; '.join(missing)}."
        say(line)
        names = {name for report in every for name in (report.name, report.name.split(" on ")[-1])}
        rows = tuple(model for model in benchmark.models if model.title in names)
        benchmark = replace(benchmark, models=rows, evaluations=(), limits=f"{line}\n{benchmark.limits}")
    write_tables(benchmark, runs, tried)
    save_rows(whole, every, tried)
