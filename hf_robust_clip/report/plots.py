"""Plots of reports, made of their `frame`, and pictures of attacked images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage import whole_file
from ..threat_model import ThreatModel, parse_radius
from .report import CLEAN, CONTROLS, ROBUST, RobustnessReport
from .tables import by_model, defence_figures, each_run, headlines, one_norm, over_runs, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike
    from pandas import DataFrame

_FIRST, _COLOURS = "#000000", ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#7A4FBF")
FRONT = "no model is better in both"
MOST_BANDS = 12
_MARKERS, _DASHES = "osD^vP>X", ("-", "--", "-.", ":")


def plot(path: str | Path, reports: Sequence[RobustnessReport]) -> None:
    """Write the PNG that tells most of these reports: `plot_defences` where there is a defence, else `plot_accuracy`.

    Raises ValueError as these do.
    """
    if any(report.defence for report in reports):
        plot_defences(path, by_model(reports))
    else:
        plot_accuracy(path, reports)


@contextmanager
def plain_text() -> Iterator[None]:
    """Names are drawn as they are; matplotlib would read what stands between two $ as a formula."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


@plain_text()
def plot_accuracy(path: str | Path, reports: Sequence[RobustnessReport]) -> None:
    """Write a PNG of accuracy against eps: a panel for each task (and attack, if they differ), a line for each model,
    95 % bands, unless more than `MOST_BANDS` models would lie under each other's.

    A model has one colour, marker and dash in all panels. Raises ValueError for no reports, several norms, and a model
    twice in a panel.
    """
    reports = [replace(report, name=titled(report)) for report in reports]
    rows, norm = _panel_rows(reports)
    styles = _styles(report.name for report in reports)
    banded = len(styles) <= MOST_BANDS
    attacks = list(dict.fromkeys(rows["full_attack"]))
    panels = [(key, own) for key, own in rows.groupby(["task", "full_attack"], sort=False)]
    titles = [task if len(attacks) == 1 else f"{task}, {attack}" for (task, attack), _ in panels]
    figure, axes = make_panels(titles, "accuracy under " + (attacks[0] if len(attacks) == 1 else "attack"))
    for axis, (_, panel) in zip(axes, panels, strict=True):
        for name, line in panel.groupby("name", sort=False):
            points = line.sort_values("eps")
            radii, style = points["eps"] * (255 if norm == "linf" else 1), styles[name]
            axis.plot(radii, points["value"], markersize=4, label=name, **style)
            if banded:
                axis.fill_between(radii, points["low"], points["high"], color=style["color"], alpha=0.12, linewidth=0)
        sizes = sorted(set(panel["n"]))
        axis.set_title(
            f"{axis.get_title()}\nn = {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))}", fontsize=10
        )
        axis.set_xlabel("L-inf eps (grey levels of 255)" if norm == "linf" else "L2 eps (units of [0, 1])")
        chance = 1 / panel["num_classes"].iloc[0]
        axis.axhline(chance, color="grey", linestyle=(0, (1, 3)), linewidth=1, label="chance")
        axis.set_ylim(-0.02, 1.02)
    save_figure(figure, axes, path)


@plain_text()
def plot_tradeoff(
    path: str | Path,
    reports: Sequence[RobustnessReport],
    radius: float | str,
    further: Sequence[Sequence[RobustnessReport]] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    names: Sequence[str] = (),
) -> None:
    """Write a PNG of robust against clean accuracy: a panel for each task, a point for each model, 95 % intervals.

    Args:
        path: of the PNG.
        reports: of several models, one for each model and task, under one norm.
        radius: in units of [0, 1], such as `"4/255"`; every report must have it.
        further: the same of models that were trained again; see `over_runs`. A point is then the mean over the runs of
            a model, among a small point for each run with their convex hull, in place of intervals; a line leads from
            one to the next of the models than which no other is better in both means.
        groups: by name their tasks; a panel is then of the mean over the tasks of a group. See `each_run`.
        names: of models, in an order that gives each its colour and marker: the same in several plots.

    Raises ValueError for no reports, several norms, a report without the radius, and as `over_runs` does.
    """
    from matplotlib.ticker import MaxNLocator

    eps = parse_radius(radius, "radius")
    every = [report for run in (reports, *further) for report in run]
    norm, rows = one_norm(every), over_runs(reports, further, groups)
    for report in every:
        if not any(math.isclose(own, eps) for own in report.robust_accuracy):
            raise ValueError(f"the report of {report.name}, {report.task} has no radius {radius}.")
    several = bool(further)
    single = _both(each_run(reports, further, groups), eps) if several else {}
    styles, points = _styles([*names, *rows["name"]]), _both(rows, eps)
    attacks = " or ".join(sorted(set(rows["full_attack"])))
    panels = list(dict.fromkeys(rows["task"]))
    threat = ThreatModel(eps, norm)  # type: ignore[arg-type]
    figure, axes = make_panels(panels, f"accuracy under {attacks}\n{threat}")
    for axis, task in zip(axes, panels, strict=True):
        means: list[tuple[float, float]] = []
        for (name, of), (ends,) in points.items():
            if of != task:
                continue
            x, y = (end["value"] for end in ends)
            means.append((x, y))
            style = {**styles[name], "linestyle": "none", "markersize": 7 if several else 8, "elinewidth": 0.8}
            bars: Any = [[[end["value"] - end["low"]], [end["high"] - end["value"]]] for end in ends]
            if several or any(end["low"] != end["low"] for end in ends):  # nothing is known of a group's mean
                bars = [None, None]
            axis.errorbar([x], [y], xerr=bars[0], yerr=bars[1], label=name, zorder=3, **style)
            runs = [(clean["value"], robust["value"]) for clean, robust in single.get((name, of), [])]
            if len(runs) > 1:
                hull, colour = _hull(runs), styles[name]["color"]
                axis.fill(*zip(*hull, strict=True), facecolor=colour, alpha=0.15, linewidth=0, zorder=1)
                axis.plot(*zip(*hull, hull[0], strict=True), color=colour, alpha=0.4, linewidth=0.6, zorder=1)
                style |= {"markersize": 3, "alpha": 0.6, "markeredgewidth": 0}
                style.pop("elinewidth")
                axis.plot(*zip(*runs, strict=True), zorder=2, **style)
        if several:
            front: dict[str, Any] = {"color": "grey", "linewidth": 0.8, "zorder": 0, "label": FRONT}
            axis.step(*zip(*_front(means), strict=True), where="pre", **front)
        axis.set_xlabel("clean accuracy")
        axis.xaxis.set_major_formatter(_percent_label)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), prune="both"))
    save_figure(figure, axes, path)


def _both(rows: DataFrame, eps: float) -> dict[tuple[str, str], list[tuple[Any, Any]]]:
    """By name and task its clean row and that at a radius, in a list of one pair for each run."""
    rows = rows[rows["metric"].isin([CLEAN, ROBUST])]
    found: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    for (task, name, _), own in rows.groupby(["task", "name", "run"], sort=False):
        near = own["eps"].map(lambda radius: math.isclose(radius, eps))
        found.setdefault((name, task), []).append((own[own["eps"] == 0].iloc[0], own[near].iloc[0]))
    return found


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points than which no other is as good in both and better in one, from left to right."""
    found: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found[::-1]


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the convex hull of points, in turn (Andrew's monotone chain); of points on a line its ends."""
    found: list[tuple[float, float]] = []
    for one_way in (sorted(set(points)), sorted(set(points), reverse=True)):
        side: list[tuple[float, float]] = []
        for point in one_way:
            while len(side) > 1 and not _turns_left(side[-2], side[-1], point):
                side.pop()
            side.append(point)
        found += side
    return list(dict.fromkeys(found))


def _turns_left(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether the way from a over b to c bends to the left."""
    return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])


def _panel_rows(reports: Sequence[RobustnessReport]) -> tuple[DataFrame, str]:
    """Accuracies of the models themselves, and their norm. Raises ValueError for a model twice under an attack."""
    norm = one_norm(reports)
    rows = headlines(reports)
    rows = rows[(rows["judge"] == "") & rows["metric"].isin([CLEAN, ROBUST])]
    twice = rows[rows.duplicated(["task", "full_attack", "name", "eps"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(f"two reports of {first['name']}, {first['task']}; plot one attack at a time.")
    return rows, norm


def choose_examples(right: Sequence[bool], stands: Sequence[bool], count: int = 6) -> list[int]:
    """Indices of images to show: those that fell, a third of `count` that withstood, then what there is.

    Args:
        right: whether each clean image is classified correctly.
        stands: whether it still is under attack.
        count: how many to show at most.
    """
    fates: dict[str, list[int]] = {"fell": [], "withstood": [], "wrong": []}
    for index, (before, after) in enumerate(zip(right, stands, strict=True)):
        fates["wrong" if not before else "withstood" if after else "fell"].append(index)
    fell, withstood, wrong = fates.values()
    few = min(len(withstood), count // 3)
    return [*fell[: count - few], *withstood[:few], *fell[count - few :], *withstood[few:], *wrong][:count]


@plain_text()
def plot_examples(
    path: str | Path,
    images: ArrayLike,
    adversarials: ArrayLike,
    truth: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    title: str = "",
    heads: tuple[str, str, str] = ("clean", "perturbation", "adversarial"),
) -> None:
    """Write a PNG with a row for each image: clean, perturbation, adversarial, what the model saw in them, and whether
    the image fell or withstood.

    The perturbation d is drawn as 0.5 + factor * d, with one factor for all rows, given above the column: the largest
    that keeps every value within [0, 1], rounded down to a whole number where it is above 1.

    Args:
        path: of the PNG.
        images, adversarials: (N, C, H, W) in [0, 1], with C 1 or 3.
        truth: class name of each image.
        before, after: predicted class name of each clean and of each adversarial image; wrong ones are marked.
        title: of which model and attack they are.
        heads: what the columns are called.

    Raises ValueError for shapes that don't match, nothing to draw and values outside [0, 1].
    """
    import numpy as np
    from matplotlib.figure import Figure

    clean, adversarial = (np.asarray(pictures, dtype=float) for pictures in (images, adversarials))
    if clean.shape != adversarial.shape or clean.ndim != 4 or clean.size == 0 or clean.shape[1] not in (1, 3):
        got = f"got {clean.shape} and {adversarial.shape}"
        raise ValueError(f"images and adversarials must have one shape (N, 1 or 3, H, W), {got}.")
    if not {len(truth), len(before), len(after)} == {len(clean)}:
        raise ValueError(f"{len(clean)} images, but {len(truth)}, {len(before)} and {len(after)} class names.")
    if not all(pictures.min() >= 0 and pictures.max() <= 1 for pictures in (clean, adversarial)):
        raise ValueError("images and adversarials must be in [0, 1]; did you normalise them?")
    largest = np.abs(adversarial - clean).max()
    factor = 0.5 / largest if largest > 0 else 1.0
    factor = math.floor(factor * 1.0001) if factor > 0.9999 else factor  # float32 has 7 digits
    figure = Figure(figsize=(6.6, 0.5 + 2.35 * len(clean)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 70), fontsize=10)
    grid = figure.subplots(len(clean), 3, squeeze=False)
    for axis, head in zip(grid[0], (heads[0], f"{heads[1]} x {factor:.3g}", heads[2]), strict=True):
        axis.set_title(head, fontsize=10)
    smooth = "nearest" if max(clean.shape[2:]) <= 64 else "antialiased"
    for axes, name, *names, image, attacked in zip(grid, truth, before, after, clean, adversarial, strict=True):
        pictures = (image, np.clip(0.5 + factor * (attacked - image), 0, 1), attacked)
        for axis, picture in zip(axes, pictures, strict=True):
            axis.imshow(picture.transpose(1, 2, 0).squeeze(), cmap="grey", vmin=0, vmax=1, interpolation=smooth)
            axis.set(xticks=[], yticks=[])
        fate = "was wrong before" if names[0] != name else "withstood" if names[1] == name else "FELL"
        axes[0].set_ylabel(f"{textwrap.fill(f'truth: {name}', 24)}\n{fate}", fontsize=9)
        for axis, predicted in zip((axes[0], axes[2]), names, strict=True):
            right = predicted == name
            text = textwrap.fill(f"{predicted} ({'right' if right else 'WRONG'})", 25)
            axis.set_xlabel(text, fontsize=9, fontweight="normal" if right else "bold")
    write_figure(figure, path)


@plain_text()
def plot_defences(path: str | Path, rows: Mapping[str, Sequence[RobustnessReport]]) -> None:
    """Write a PNG of what `defence_figures` tells: for each label its clean accuracy, that under the first attack made
    on the classifier alone, the controls on the same images, and the worst of all attacks.

    Raises ValueError as `defence_figures` does.
    """
    from matplotlib.figure import Figure

    found = 100 * defence_figures(rows)
    blind = list(found.columns)[2 : found.columns.get_loc("adaptive worst")][:1]
    figure = Figure(figsize=(8.2, 1.6 + 0.34 * len(found)), layout="constrained")
    axis = figure.subplots()
    full: dict[str, Any] = {"markersize": 6}
    hollow: dict[str, Any] = {"markerfacecolor": "none", "markersize": 10, "zorder": 1}
    places = {"clean": ("clean", "o", "#000000", full)}
    places |= {f"{name}, made on the classifier alone": (name, "s", "#0072B2", full) for name in blind}
    places["worst of all attacks"] = ("adaptive worst", "X", "#D55E00", full)
    for name, marker, colour in zip(CONTROLS, "|xv", ("#009E73", "#CC79A7", "#8C6D00"), strict=True):
        places[f"{name}, same images"] = (name, marker, colour, hollow)
    for label, (column, marker, colour, style) in places.items():
        points = [(value, y) for y, value in enumerate(found[column]) if value == value]
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=colour, label=label, **style)
    axis.set_yticks(range(len(found)), list(found.index))
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("accuracy in percent")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    write_figure(figure, path)


def write_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=140)


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash by label: black is the first alone, and no two of 56 have one colour and one marker."""
    return {
        label: {
            "color": _COLOURS[(i - 1) % len(_COLOURS)] if i else _FIRST,
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _DASHES[i % len(_DASHES)],
        }
        for i, label in enumerate(dict.fromkeys(labels))
    }


def make_panels(titles: Sequence[str], ylabel: str) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, at most three in a row."""
    from matplotlib.figure import Figure

    if not titles:
        raise ValueError("there are no panels to plot.")
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(3.9 * columns + 0.8, 3.3 * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.remove()
    for i, (axis, title) in enumerate(zip(axes, titles, strict=False)):
        axis.set_title(textwrap.fill(title, 40), fontsize=10)
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(_percent_label)
        if i % columns == 0:
            axis.set_ylabel("\n".join(textwrap.fill(line, 36) for line in ylabel.splitlines()))
    return figure, axes[: len(titles)]


def _percent_label(value: float, _: float) -> str:
    return f"{100 * value:.4g} %"


def save_figure(figure: Figure, axes: Sequence[Axes], path: str | Path) -> None:
    """Write the figure with one legend for all panels, below them."""
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    for last in {"chance", FRONT} & set(handles):
        handles[last] = handles.pop(last)
    columns = max(1, int(figure.get_figwidth() * 13 / (max(map(len, handles)) + 8)))
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(handles) // columns))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )
    write_figure(figure, path)
