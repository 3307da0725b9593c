"""The trials of a hyperparameter search: what each was made with and how it scored, as table, CSV and plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage import whole_file
from .plots import make_panels, plain_text, save_figure
from .tables import Cells, as_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

_LOOK = {
    "score": {"color": "#000000", "marker": "o"},
    "clean": {"color": "#0072B2", "marker": "^"},
    "robust": {"color": "#D55E00", "marker": "s"},
}


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    Args:
        number: from 1, in the order in which they were made.
        values: its settings, by name.
        figures: accuracies in [0, 1], by what they are of; none where the training diverged.
        score: in [0, 1]; None where it diverged.
    """

    number: int
    values: Mapping[str, Any]
    figures: Mapping[str, float]
    score: float | None


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest score, of several the first. Raises ValueError where all diverged."""
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        raise ValueError(
            f"tune.space: all {len(trials)} trials diverged; lower the learning rate or narrow the space."
        )
    return max(scored, key=lambda trial: trial.score or 0.0)


def trials_table(trials: Sequence[Trial], title: str, caption: str = "") -> RenderableType:
    """A row for each trial, for `rich`: settings, accuracies and score in percent; the best is marked."""
    return as_text(_cells(trials), title, caption)


def save_trials(path: str | Path, trials: Sequence[Trial]) -> None:
    """Write trials as CSV: `trial`, the settings, accuracies and `score` in [0, 1] (empty where one diverged), and
    `best`, true for one of them.
    """
    from pandas import DataFrame

    best = best_of(trials)
    rows = [
        {"trial": own.number, **own.values, **own.figures, "score": own.score, "best": own is best} for own in trials
    ]
    names = [*trials[0].values, *_figure_names(trials)]
    with whole_file(path) as draft:
        DataFrame(rows).reindex(columns=["trial", *names, "score", "best"]).to_csv(draft, index=False)


@plain_text()
def plot_trials(path: str | Path, trials: Sequence[Trial], log: Sequence[str] = ()) -> None:
    """Write a PNG of scores and accuracies: against the number of the trial, with the best score so far, and against
    each setting; the best trial is ringed.

    Args:
        log: settings that were drawn on a log scale.
    """
    best, names = best_of(trials), list(trials[0].values)
    scored = [trial for trial in trials if trial.score is not None]
    figure, axes = make_panels(["trials in their order", *names], "accuracy on held-out training images")
    so_far: Any = [best_of(scored[: i + 1]).score for i in range(len(scored))]
    numbers = [trial.number for trial in scored]
    axes[0].step(numbers, so_far, where="post", color="grey", linewidth=1, label="best so far")
    axes[0].set_xlabel("trial")
    for axis, name in zip(axes, [None, *names], strict=True):
        places = _places(axis, scored, name, log)
        for figure_name in [*_figure_names(trials), "score"]:
            heights: Any = [t.score if figure_name == "score" else t.figures[figure_name] for t in scored]
            look: dict[str, Any] = {**_LOOK[figure_name.partition(" ")[0]], "linestyle": "none", "markersize": 5}
            if figure_name not in _LOOK:
                look["markerfacecolor"] = "none"
            axis.plot(places, heights, label=figure_name, **look)
        place, height = places[scored.index(best)], best.score or 0.0
        axis.plot([place], [height], "o", markersize=12, color="black", fillstyle="none", label="best trial")
        axis.set_ylim(-0.02, 1.02)
    save_figure(figure, axes, path)


def _places(axis: Axes, trials: Sequence[Trial], name: str | None, log: Sequence[str]) -> list[Any]:
    """Where trials stand on an axis, which is made for it: by number, by a setting's value, or by its choice."""
    if name is None:
        return [trial.number for trial in trials]
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [trial.values[name] for trial in trials]
    if all(isinstance(value, str) and value.endswith("/255") for value in values):
        axis.set_xlabel("grey levels of 255")
        values = [float(value.removesuffix("/255")) for value in values]
    if any(isinstance(value, str | bool) for value in values):
        choices = sorted({str(value) for value in values})
        axis.set_xticks(range(len(choices)), choices)
        return [choices.index(str(value)) for value in values]
    if name in log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # matplotlib's own is a formula
        axis.xaxis.set_minor_formatter(NullFormatter())
    return values


def _figure_names(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(name for trial in trials for name in trial.figures))


def _cells(trials: Sequence[Trial]) -> Cells:
    best, names = best_of(trials), _figure_names(trials)
    rows = []
    for own in trials:
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in own.values.values()]
        figures = [f"{100 * own.figures[name]:.1f}" if name in own.figures else "-" for name in names]
        score = "diverged" if own.score is None else f"{100 * own.score:.1f}"
        rows.append((f"{own.number}{' best' if own is best else ''}", *values, *figures, score))
    return Cells(("trial", *trials[0].values, *names, "score"), tuple(rows))
