"""Where models look in clean and in attacked images: a picture, and how far it moves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..storage import write_text
from .plots import plain_text, write_figure
from .tables import Cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

SHOWN = 8  # images in one picture
ROUNDING = 1e-6  # deviations of float32 that say nothing, relative
CELL, GAP, LINE = 1.1, 0.12, 0.15  # inches: a picture's side, between two, a line of text
MARGIN, HALVES, HEAD, BLOCK, FOOT = 1.5, 0.3, 0.66, 0.16, 0.52  # left, between halves, above, between images, below
COLUMNS = ("image", "map of truth", "map of rival", "saliency")
READING = (
    "Maps: cosine of each patch with the text of the true class, and of the class that is its strongest rival under "
    "attack; bright is near, the scale is the line's own.\n"
    "Saliency: how fast the true class's logit changes with each pixel, from 0 (black) to the value below. "
    "Percentages are probabilities."
)
RIGHT, WRONG = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Look:
    """What a model makes of N images, and where it looks in them.

    Args:
        images: (N, C, H, W) in [0, 1].
        probabilities: (N, classes), softmax of the logits.
        true_maps: (N, h, w), `patch_map` of each image's true class.
        rival_maps: (N, h, w), the same of its rival (see `Explanation`).
        saliency: (N, H, W), of the true class.
    """

    images: Tensor
    probabilities: Tensor
    true_maps: Tensor
    rival_maps: Tensor
    saliency: Tensor


@dataclass(frozen=True)
class Explanation:
    """Where a model looks in the first N images of a task, as they are and attacked.

    Args:
        model: what tables call it.
        task: what tables call the images.
        attack: what was done to them, with the radius.
        class_names: in label order.
        labels: (N,), the true classes.
        rivals: (N,), of each image the class that is most probable under attack beside the true one: that which is
            predicted, where the image fell.
        clean, attacked: the images.
        map_share: of an image's side that patches cover; see `explain.map_share`.
    """

    model: str
    task: str
    attack: str
    class_names: Sequence[str]
    labels: Tensor
    rivals: Tensor
    clean: Look
    attacked: Look
    map_share: float = 1.0


def explanation_rows(explanations: Sequence[Explanation]) -> DataFrame:
    """A line for each image and model: classes, probabilities, and how far what the model looks at moved.

    `map_correlation` and `saliency_correlation` are Pearson's, over the patches or pixels of an image, between clean
    and attacked, in [-1, 1]; NaN where one of the two is the same all over. `map_change` is the mean over patches of
    |M_attacked - M_clean|, in units of the cosine. Maps and saliency are those of the true class; `rival_correlation`
    is that of its clean map with the rival's: near 1, the maps tell no class from another. `mean_saliency_clean` and
    `_attacked` are means over the pixels.
    """
    from pandas import DataFrame

    return DataFrame([row for explanation in explanations for row in _rows(explanation)])


def _rows(explanation: Explanation) -> list[dict[str, Any]]:
    names, clean, attacked = explanation.class_names, explanation.clean, explanation.attacked
    moved_N = (attacked.true_maps - clean.true_maps).abs().flatten(1).mean(dim=1)
    by_map_N = correlation(clean.true_maps, attacked.true_maps)
    with_rival_N = correlation(clean.true_maps, clean.rival_maps)
    by_saliency_N = correlation(clean.saliency, attacked.saliency)
    found = []
    for i, label in enumerate(explanation.labels.tolist()):
        before_C, after_C = clean.probabilities[i], attacked.probabilities[i]
        found.append(
            {
                "task": explanation.task,
                "model": explanation.model,
                "attack": explanation.attack,
                "image": i,
                "truth": names[label],
                "predicted_clean": names[int(before_C.argmax())],
                "predicted_attacked": names[int(after_C.argmax())],
                "probability_clean": float(before_C[label]),
                "probability_attacked": float(after_C[label]),
                "map_correlation": float(by_map_N[i]),
                "map_change": float(moved_N[i]),
                "rival": names[int(explanation.rivals[i])],
                "rival_correlation": float(with_rival_N[i]),
                "saliency_correlation": float(by_saliency_N[i]),
                "mean_saliency_clean": float(clean.saliency[i].mean()),
                "mean_saliency_attacked": float(attacked.saliency[i].mean()),
            }
        )
    return found


def correlation(one_NHW: Tensor, other_NHW: Tensor) -> Tensor:
    """Pearson's, (N,), over the places of each map: the cosine of what is left without the mean. In float64; NaN where
    a map is the same all over, up to the rounding of float32.
    """
    one_NP, other_NP = _deviations(one_NHW), _deviations(other_NHW)
    norms_N = one_NP.norm(dim=1) * other_NP.norm(dim=1)
    return torch.where(norms_N > 0, (one_NP * other_NP).sum(dim=1) / norms_N, torch.nan)


def _deviations(maps_NHW: Tensor) -> Tensor:
    """From the mean of each map, (N, places); 0 where they are no more than rounding."""
    maps_NP = maps_NHW.double().flatten(1)
    found_NP = maps_NP - maps_NP.mean(dim=1, keepdim=True)
    rounding_N = ROUNDING * maps_NP.norm(dim=1)
    return torch.where((found_NP.norm(dim=1) > rounding_N)[:, None], found_NP, 0.0)


def explanation_figures(rows: DataFrame) -> Cells:
    """Means of `explanation_rows` over the images of a task, a line for each model; what is NaN is left out."""
    figures = {
        "map": "map_correlation",
        "change": "map_change",
        "rival": "rival_correlation",
        "saliency": "saliency_correlation",
        "size clean": "mean_saliency_clean",
        "attacked": "mean_saliency_attacked",
    }
    lines = []
    for task, of_task in rows.groupby("task", sort=False):
        for model, own in of_task.groupby("model", sort=False):
            means = [own[column].mean() for column in figures.values()]
            texts = ["-" if math.isnan(mean) else f"{mean:.3g}" for mean in means]
            lines.append((str(task), str(model), str(len(own)), *texts))
    return Cells(("", "model", "n", *figures), tuple(lines), grouped=True)


def save_explanations(path: str | Path, rows: DataFrame) -> None:
    """Write `explanation_rows` as CSV; what is NaN is left empty."""
    write_text(path, rows.to_csv(index=False))


@plain_text()
def plot_explanations(path: str | Path, explanations: Sequence[Explanation]) -> None:
    """Write a PNG of the first images of one task, at most 8: for each image a line for each model, clean at the left,
    attacked at the right.

    Each half shows the image with what is predicted, the maps of the true class and of its rival, and the saliency of
    the true class. The four maps of a line have one scale of colours, those of two lines have not; each saliency has
    its own, from 0 to the value below. Patches are drawn as they are, not smoothed.

    Raises ValueError for none, for explanations of different tasks or images, and for a model twice.
    """
    from matplotlib.figure import Figure

    models = [own.model for own in explanations]
    if not models or len(set(models)) < len(models):
        raise ValueError(f"explanations of models={models!r}: give at least one, and each model once.")
    first = explanations[0]
    for own in explanations[1:]:
        if own.task != first.task or not torch.equal(own.clean.images, first.clean.images):
            raise ValueError(f"explanations of {own.model} and {first.model} are of different images; plot one task.")
    count = min(len(first.labels), SHOWN)
    broken = any(_is_long(own, i) for own in explanations for i in range(count))
    line = CELL + (2 if broken else 1) * LINE + 0.16
    width = MARGIN + 8 * (CELL + GAP) + HALVES
    height = HEAD + count * (len(explanations) * line + BLOCK) + FOOT
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))  # in inches, from the upper left
    axis.axis("off")
    attacks = " / ".join(dict.fromkeys(own.attack for own in explanations))
    for half, text in enumerate((f"{_short(first.task, 50)}, clean", f"attacked: {_short(attacks, 60)}")):
        centre = (_left(4 * half) + _left(4 * half + 3) + CELL) / 2
        axis.text(centre, 0.2, text, ha="center", va="center", fontsize=10)
    for column, text in enumerate(2 * COLUMNS):
        axis.text(_left(column) + CELL / 2, HEAD - 0.06, text, ha="center", va="bottom", fontsize=9)
    for i in range(count):
        for row, own in enumerate(explanations):
            top = HEAD + i * (len(explanations) * line + BLOCK) + row * line
            scale = _draw_line(axis, own, i, top, "\n" if broken else " ")
            text = "\n".join([*textwrap.wrap(_short(own.model, 100), 20), "", scale])
            axis.text(MARGIN - 0.12, top + CELL / 2, text, ha="right", va="center", fontsize=8)
    axis.text(MARGIN - 0.5, height - 0.08, READING, ha="left", va="bottom", fontsize=8, color="#444444")
    axis.set(xlim=(0, width), ylim=(height, 0))
    write_figure(figure, path)


def _left(column: int) -> float:
    """Of the eight columns."""
    return MARGIN + column * (CELL + GAP) + (HALVES if column > 3 else 0)


def _draw_line(axis: Axes, own: Explanation, i: int, top: float, between: str) -> str:
    """One image, by one model. Returns the scale of its maps in words.

    Args:
        between: a class and its probability.
    """
    looks = (own.clean, own.attacked)
    maps = torch.stack([maps[i] for look in looks for maps in (look.true_maps, look.rival_maps)])
    low, high = float(maps.min()), float(maps.max())
    truth, rival = int(own.labels[i]), int(own.rivals[i])
    for half, look in enumerate(looks):
        most, predicted = float(look.saliency[i].max()), int(look.probabilities[i].argmax())
        colour, told = RIGHT if predicted == truth else WRONG, between.join(_told(own, look, i, predicted))
        names = [between.join(_told(own, look, i, label)) for label in (truth, rival)]
        place = partial(_draw_cell, axis, top)
        place(4 * half, look.images[i].permute(1, 2, 0), "grey", 0, 1, told, color=colour, fontweight="bold")
        place(4 * half + 1, look.true_maps[i], "viridis", low, high, names[0], share=own.map_share)
        place(4 * half + 2, look.rival_maps[i], "viridis", low, high, names[1], share=own.map_share)
        place(4 * half + 3, look.saliency[i], "inferno", 0, most or 1, f"up to {most:.2g}")
    return f"maps {low:.2f} to {high:.2f}"


def _draw_cell(
    axis: Axes,
    top: float,
    column: int,
    values: Tensor,
    colours: str,
    low: float,
    high: float,
    text: str,
    *,
    share: float = 1.0,
    **style: Any,
) -> None:
    """Values (H, W) or (H, W, C) as a picture that takes a share of its cell, and a text below."""
    from matplotlib.patches import Rectangle

    left, pixels = _left(column), (values[..., 0] if values.shape[2:] == (1,) else values).numpy()
    smooth = "nearest" if max(pixels.shape[:2]) <= 64 else "antialiased"
    placed = (left, left + share * CELL, top + share * CELL, top)
    axis.imshow(pixels, cmap=colours, vmin=low, vmax=high, extent=placed, interpolation=smooth, aspect="auto")
    axis.add_patch(Rectangle((left, top), CELL, CELL, fill=False, linewidth=0.6))
    axis.text(left + CELL / 2, top + CELL + 0.04, text, ha="center", va="top", fontsize=8, **style)


def _told(own: Explanation, look: Look, i: int, label: int) -> tuple[str, str]:
    """A class and its probability in percent; never 0 or 100 where it isn't."""
    share = float(look.probabilities[i, label])
    percent = f"{100 * share:.0f}" if 0.005 <= share < 0.995 else "> 99" if share > 0.5 else "< 1"
    return _short(own.class_names[label], 18), f"{percent} %"


def _is_long(own: Explanation, i: int) -> bool:
    """Whether a class of an image and its probability don't stand in one line."""
    looks = (own.clean, own.attacked)
    shown = {int(own.labels[i]), int(own.rivals[i]), *(int(look.probabilities[i].argmax()) for look in looks)}
    return any(len(own.class_names[label]) > 12 for label in shown)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
