"""Whether one model is better than another: differences of accuracies on the very same images, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..threat_model import parse_radius
from .report import RobustnessReport
from .tables import Cells, as_markdown, figure_heads, grouped_tasks

RESAMPLES = 10_000
DRAWN_AT_ONCE = 2**20  # images, over several draws
Runs = Sequence[Sequence[RobustnessReport]]


@dataclass(frozen=True)
class Difference:
    """An accuracy of one model less that of another, in [-1, 1], with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def points(self) -> tuple[float, float, float]:
        """Value and interval in points of a hundred, to a tenth of one."""
        value, low, high = (round(100 * part, 1) + 0.0 for part in (self.value, self.low, self.high))
        return value, low, high

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval, as `points` tells it, lies on one side of 0."""
        return self.points[1] > 0 or self.points[2] < 0

    def __str__(self) -> str:
        """In points: `+3.1 [1.2, 5.0]`."""
        value, low, high = self.points
        return f"{value:+.1f} [{low:.1f}, {high:.1f}]"


def paired_difference(
    ours: Runs, theirs: Runs, eps: float | str = 0.0, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """By how much one model is more accurate than another, on the same images under the same attack.

        first, _ = load_reports("out/tecoa-seed0/report.json")         # one report for each task
        second, _ = load_reports("out/tecoa-seed1/report.json")
        others, _ = load_reports("out/pmg_aft/report.json")
        print(paired_difference([first, second], [others], "2/255"))  # +3.1 [1.2, 5.0], in points

    Of S runs of ours and R of theirs, with outcomes a_sti and b_rti in {0, 1} on the N_t images of T tasks,

        d = 1/T sum_t 1/N_t sum_i (1/S sum_s a_sti - 1/R sum_r b_rti),

    so that each task, each image in it and each run counts alike. The interval is the percentile bootstrap's (Efron &
    Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13): the 2.5th and the 97.5th percentile of d
    over `resamples` draws with replacement of N_t images of every task, the same for both models and all runs, and
    independently of S of our runs and R of theirs, the same for all tasks, since a run is one trained model. Tasks on
    the very same images draw the same of them. Where there is one run of each, images alone are drawn, and the
    interval says nothing of other trainings.

    The interval of several runs is not exact. Few tell little of how trainings vary: the spread that is drawn of
    three is too small by a factor of sqrt(2/3). And what is peculiar to one run on one image is counted up to three
    times (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007). In simulations of three runs of each
    on 1000 images, the interval held the true difference in 99 of 100 cases where trainings differed by nothing else,
    in 93, 88 and 82 where their accuracies spread by 1, 2 and 5 points (standard deviation).

    Args:
        ours, theirs: a list of runs, each a list of its reports, one for each task; the tasks are the same everywhere.
        eps: radius in units of [0, 1], float or fraction such as `"2/255"`; 0 for clean images.
        resamples: how often images and runs are drawn.
        seed: of the draws.

    Returns `value`, `low` and `high` in [-1, 1]; as text they are in points of a hundred.
    Raises TypeError for what is no list of runs; ValueError for no runs, tasks that differ or are there twice, reports
    of other images, classes, attacks or radii, and for reports without outcomes, or without some at the radius.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples!r} must be at least 1.")
    reports = [report for own in _by_task(ours, theirs) for report in own]
    eps = parse_radius(eps, "eps") if isinstance(eps, str) else eps
    radii = [own for own in (0.0, *reports[0].robust_accuracy) if math.isclose(own, eps)]
    if not radii:
        known = ["0.0", *(reports[0].threat(own).radius for own in reports[0].robust_accuracy)]
        raise ValueError(f"eps={eps!r} has no outcomes in the reports; they have {', '.join(known)}.")
    return _difference(ours, theirs, radii[0], _Drawn(reports, radii, resamples, seed))


class _Drawn:
    """Accuracies of reports, and what they are on `resamples` draws of their images, which are the same for all
    reports of the same images.
    """

    def __init__(self, reports: Sequence[RobustnessReport], radii: Sequence[float], resamples: int, seed: int):
        self.resamples, self.seed = resamples, seed
        self.values: dict[tuple[int, float], tuple[float, np.ndarray]] = {}
        by_images: dict[tuple[str, int], list[RobustnessReport]] = {}
        for report in reports:
            images = report.outcomes.images if report.outcomes else ""
            by_images.setdefault((images, report.num_images), []).append(report)
        for (images, _), own in by_images.items():
            keys = [(report, eps) for report in own for eps in radii if eps in (0.0, *report.robust_accuracy)]
            right_NS = np.stack([report.outcomes_at(eps) for report, eps in keys], axis=1)
            drawn_RS = _drawn_means(right_NS, resamples, np.random.default_rng([seed, *images.encode()]))
            for (report, eps), right_N, drawn_R in zip(keys, right_NS.T, drawn_RS.T, strict=True):
                self.values[id(report), eps] = float(right_N.mean()), drawn_R

    def over_tasks(self, run: Sequence[RobustnessReport], eps: float) -> tuple[float, np.ndarray]:
        """The mean over the tasks of a run, and over those of each draw, (resamples,)."""
        values, drawn = zip(*(self.values[id(report), eps] for report in run), strict=True)
        return sum(values) / len(run), np.mean(drawn, axis=0)


def _difference(ours: Runs, theirs: Runs, eps: float, drawn: _Drawn) -> Difference:
    """`paired_difference` of what was drawn."""
    draws = np.random.default_rng(drawn.seed)
    value, drawn_R = 0.0, np.zeros(drawn.resamples)
    for runs, sign in ((ours, 1), (theirs, -1)):
        count = len(runs)
        weights_RS = draws.multinomial(count, np.full(count, 1 / count), drawn.resamples) / count
        for run, weights_R in zip(runs, weights_RS.T, strict=True):
            own, own_R = drawn.over_tasks(run, eps)
            value += sign * own / count
            drawn_R += sign * own_R * weights_R
    low, high = np.percentile(drawn_R, [2.5, 97.5])
    return Difference(*(round(float(part), 12) for part in (value, low, high)))  # sums of equal ones cancel


def _drawn_means(right_NS: np.ndarray, resamples: int, draws: np.random.Generator) -> np.ndarray:
    """Means over N images that are drawn with replacement, of all columns at once: (resamples, S)."""
    count, parts = len(right_NS), []
    size = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, resamples, size):
        rows = np.arange(min(size, resamples - start))[:, None]
        drawn_RN = rows * count + draws.integers(count, size=(len(rows), count))
        often_RN = np.bincount(drawn_RN.ravel(), minlength=len(rows) * count).reshape(len(rows), count)
        parts.append(often_RN.astype(np.float32) @ right_NS.astype(np.float32))  # exact: whole numbers below 2^24
    return np.concatenate(parts).astype(float) / count


def _by_task(ours: Runs, theirs: Runs) -> list[list[RobustnessReport]]:
    """Of each task our reports, then theirs. Raises ValueError for what makes no pairs."""
    for what, runs in (("ours", ours), ("theirs", theirs)):
        are_runs = isinstance(runs, Sequence) and all(isinstance(run, Sequence) for run in runs)
        if not are_runs or not all(isinstance(report, RobustnessReport) for run in runs for report in run):
            raise TypeError(f"{what} must be a list of runs, each a list of reports, as load_reports(path)[0] is.")
    if not ours or not theirs:
        raise ValueError(f"{'theirs' if ours else 'ours'} is empty; give the reports of at least one run.")
    runs = [*ours, *theirs]
    names = [report.task for report in runs[0]]
    for run in runs:
        own = [report.task for report in run]
        if not own or len(set(own)) < len(own) or set(own) != set(names):
            raise ValueError(f"runs must have the same tasks, each once, got {names} and {own}.")
    found = [[next(report for report in run if report.task == name) for run in runs] for name in names]
    for reports in found:
        first, *others = (_alike(report) for report in reports)
        for report, other in zip(reports[1:], others, strict=True):
            for what, value in other.items():
                if value != first[what]:
                    of = f"{reports[0].name} and {report.name}, {report.task}"
                    raise ValueError(f"{of} differ in {what}: {first[what]} and {value}; compare like with like.")
    return found


def _alike(report: RobustnessReport) -> dict[str, str]:
    """What reports must have in common for their outcomes to be pairs, by what a reader calls it."""
    if report.outcomes is None:
        raise ValueError(f"the report of {report.name}, {report.task} has no outcomes; evaluate the model again.")
    told = {
        "images": report.outcomes.images,
        "num_images": report.num_images,
        "class_names": report.class_names,
        "attack": report.full_attack,
        "attack_parameters": report.attack_parameters,
        "attack_resolution": report.attack_resolution,
        "norm": report.norm,
        "radii": list(report.robust_accuracy),
    }
    return {name: json.dumps(value, sort_keys=True) for name, value in told.items()}


def differences_told(
    reports: Sequence[RobustnessReport],
    further: Runs = (),
    *,
    baseline: str,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """`figures_of_differences` in Markdown, of groups of tasks, where there are some, and of tasks, with what they
    are; or why there are none: reports without outcomes, or of other images or attacks, or none of the baseline.
    """
    runs = [run for run in (reports, *further) if run]
    lacking = dict.fromkeys(report.name for run in runs for report in run if report.outcomes is None)
    if lacking:
        return f"Left out: reports of {', '.join(lacking)} don't say which images were right."
    try:
        kinds = [groups, None] if groups else [None]
        found = [figures_of_differences(reports, further, baseline=baseline, groups=own) for own in kinds]
    except ValueError as error:
        return f"Left out: {error}"
    drawn = "images and, of a model with several, seeds" if len(runs) > 1 else "images: trainings may differ by more"
    about = (
        "Accuracy less the baseline's on the same images, in points, with 95 % intervals by a bootstrap over "
        f"{drawn}. Bold where the interval excludes 0: of 20 differences that are none, one is bold by chance"
    )
    about += ", and more where so few seeds differ much from one another." if len(runs) > 1 else "."
    return "\n\n".join([about, *map(as_markdown, found)])


def figures_of_differences(
    reports: Sequence[RobustnessReport],
    further: Runs = (),
    *,
    baseline: str,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Cells:
    """A row for each model but the baseline, a column for each task, or for each group of tasks, with the differences
    to the baseline in points, clean and at each radius, divided by " / "; bold in Markdown where the interval
    excludes 0. A dash where either lacks a figure of a task.

    Args:
        reports: of several models, one for each model and task.
        further: the same of models that were trained again; see `paired_difference`.
        baseline: name of the model that others are compared with.
        groups: by name their tasks; see `tables.grouped_tasks`.

    Raises ValueError for a baseline without reports, for no reports, several norms, and as `paired_difference` does.
    """
    runs = [run for run in (reports, *further) if run]
    names = list(dict.fromkeys(report.name for run in runs for report in run))
    if baseline not in names:
        raise ValueError(f"baseline={baseline!r} has no report; it must be one of {names}.")
    every = [report for run in runs for report in run]
    radii = sorted({0.0, *(eps for report in every for eps in report.robust_accuracy)})
    columns, drawn = grouped_tasks(every, groups), _Drawn(every, radii, RESAMPLES, 0)
    lines = [
        (name, *(_cell(runs, name, baseline, tasks, radii, drawn) for tasks in columns.values()))
        for name in names
        if name != baseline
    ]
    return Cells(("", *figure_heads(every, columns)), tuple(lines))


def _cell(runs: Runs, name: str, baseline: str, tasks: Sequence[str], radii: Sequence[float], drawn: _Drawn) -> str:
    """The differences of one model on some tasks at each radius."""
    ours, theirs = (list(_runs_of(runs, own, tasks)) for own in (name, baseline))
    if not ours or not theirs or any({report.task for report in run} != set(tasks) for run in (*ours, *theirs)):
        return "-"
    _by_task(ours, theirs)
    there = {eps for run in (*ours, *theirs) for report in run for eps in (0.0, *report.robust_accuracy)}
    texts = []
    for eps in radii:
        found = _difference(ours, theirs, eps, drawn) if eps in there else None
        texts.append("-" if found is None else f"**{found}**" if found.excludes_zero else str(found))
    return " / ".join(texts)


def _runs_of(runs: Runs, name: str, tasks: Sequence[str]) -> Iterator[list[RobustnessReport]]:
    """The reports of a model on some tasks, of each run that has one."""
    for run in runs:
        if found := [report for report in run if report.name == name and report.task in tasks]:
            yield found
