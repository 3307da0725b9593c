"""Where models look in clean and in attacked images: a picture, and how far it moves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
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
CELL, GAP, LINE = 1.1, 0.12, 0.19  # inches: a picture's side, between two, a line of text
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
        other_maps: (N, h, w), the same of its other class (see `Explanation`).
        saliency: (N, H, W), of the true class.
    """

    images: Tensor
    probabilities: Tensor
    true_maps: Tensor
    other_maps: Tensor
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
        others: (N,), of each image the class that is most probable under attack beside the true one: that which is
            predicted, where the image fell.
        clean, attacked: the images.
        map_share: of an image's side that patches cover; see `explain.map_share`.
    """

    model: str
    task: str
    attack: str
    class_names: Sequence[str]
    labels: Tensor
    others: Tensor
    clean: Look
    attacked: Look
    map_share: float = 1.0


def explanation_rows(explanations: Sequence[Explanation]) -> DataFrame:
    """A line for each image and model: classes, probabilities, and how far what the model looks at moved.

    `map_correlation` and `saliency_correlation` are Pearson's, over the patches or pixels of an image, between clean
    and attacked, in [-1, 1]; NaN where one of the two is the same all over. `map_change` is the mean over patches of
    |M_attacked - M_clean|, in units of the cosine. Maps and saliency are those of the true class.
    `mean_saliency_clean` and `_attacked` are means over the pixels.
    """
    from pandas import DataFrame

    return DataFrame([row for explanation in explanations for row in _rows(explanation)])


def _rows(explanation: Explanation) -> list[dict[str, Any]]:
    names, clean, attacked = explanation.class_names, explanation.clean, explanation.attacked
    moved_N = (attacked.true_maps - clean.true_maps).abs().flatten(1).mean(dim=1)
    by_map_N = correlation(clean.true_maps, attacked.true_maps)
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
                "saliency_correlation": float(by_saliency_N[i]),
                "mean_saliency_clean": float(clean.saliency[i].mean()),
                "mean_saliency_attacked": float(attacked.saliency[i].mean()),
            }
        )
    return found


def correlation(one_NHW: Tensor, other_NHW: Tensor) -> Tensor:
    """Pearson's, (N,), over the places of each map: the cosine of what is left without the mean. In float64; NaN where
    a map is the same all over.
    """
    one_NP, other_NP = (maps.double().flatten(1) for maps in (one_NHW, other_NHW))
    one_NP, other_NP = (maps - maps.mean(dim=1, keepdim=True) for maps in (one_NP, other_NP))
    norms_N = one_NP.norm(dim=1) * other_NP.norm(dim=1)
    return torch.where(norms_N > 0, (one_NP * other_NP).sum(dim=1) / norms_N, torch.nan)


def explanation_figures(rows: DataFrame) -> Cells:
    """Means of `explanation_rows` over the images of a task, a line for each model; what is NaN is left out."""
    figures = {
        "map correlation": "map_correlation",
        "map change": "map_change",
        "saliency correlation": "saliency_correlation",
        "saliency clean": "mean_saliency_clean",
        "attacked": "mean_saliency_attacked",
    }
    lines = []
    for (task, model), own in rows.groupby(["task", "model"], sort=False):
        means = [own[column].mean() for column in figures.values()]
        lines.append((task, model, str(len(own)), *("-" if math.isnan(mean) else f"{mean:.3g}" for mean in means)))
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
    count, line = min(len(first.labels), SHOWN), CELL + LINE + GAP
    width = MARGIN + 8 * (CELL + GAP) + HALVES
    height = HEAD + count * (len(explanations) * line + BLOCK) + FOOT
    figure = Figure(figsize=(width, height))
    attacks = " / ".join(dict.fromkeys(own.attack for own in explanations))
    for half, text in enumerate((f"{first.task}, clean", f"attacked: {attacks}")):
        centre = MARGIN + 2 * (CELL + GAP) - GAP / 2 + half * (4 * (CELL + GAP) + HALVES)
        figure.text(centre / width, 1 - 0.2 / height, text, ha="center", va="center", fontsize=11)

    def place(column: int, top: float) -> Axes:
        left = MARGIN + column * (CELL + GAP) + (HALVES if column > 3 else 0)
        return figure.add_axes((left / width, (height - top - CELL) / height, CELL / width, CELL / height))

    top = HEAD
    for i in range(count):
        for own in explanations:
            axes = [place(column, top) for column in range(8)]
            if top == HEAD:
                for axis, text in zip(axes, 2 * COLUMNS, strict=True):
                    axis.set_title(text, fontsize=9, pad=4)
            scale = _draw_line(axes, own, i)
            text = "\n".join([*textwrap.wrap(own.model, 20), "", scale])
            beside, middle = (MARGIN - 0.12) / width, 1 - (top + CELL / 2) / height
            figure.text(beside, middle, text, ha="right", va="center", fontsize=8)
            top += line
        top += BLOCK
    figure.text((MARGIN - 0.5) / width, 0.08 / height, READING, ha="left", va="bottom", fontsize=8, color="#444444")
    write_figure(figure, path)


def _draw_line(axes: Sequence[Axes], own: Explanation, i: int) -> str:
    """One image, by one model. Returns the scale of its maps in words."""
    looks = (own.clean, own.attacked)
    maps = torch.stack([maps[i] for look in looks for maps in (look.true_maps, look.other_maps)])
    low, high = float(maps.min()), float(maps.max())
    truth, other = int(own.labels[i]), int(own.others[i])
    height, width = looks[0].images.shape[2:]
    covered = (-0.5, width * own.map_share - 0.5, height * own.map_share - 0.5, -0.5)
    for look, (picture, true, rival, salient) in zip(looks, (axes[:4], axes[4:]), strict=True):
        smooth = "nearest" if max(height, width) <= 64 else "antialiased"
        pixels = look.images[i].permute(1, 2, 0).squeeze(2).numpy()
        picture.imshow(pixels, cmap="grey", vmin=0, vmax=1, interpolation=smooth)
        predicted = int(look.probabilities[i].argmax())
        told = _told(own.class_names[predicted], look.probabilities[i, predicted])
        colour = RIGHT if predicted == truth else WRONG
        picture.set_xlabel(told, fontsize=8, labelpad=2, color=colour, fontweight="bold")
        for axis, map_hw, name in ((true, look.true_maps[i], truth), (rival, look.other_maps[i], other)):
            axis.imshow(map_hw.numpy(), cmap="viridis", vmin=low, vmax=high, extent=covered, interpolation="nearest")
            axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            axis.set_xlabel(_told(own.class_names[name], look.probabilities[i, name]), fontsize=8, labelpad=2)
        most = float(look.saliency[i].max())
        salient.imshow(look.saliency[i].numpy(), cmap="inferno", vmin=0, vmax=most or 1, interpolation=smooth)
        salient.set_xlabel(f"up to {most:.2g}", fontsize=8, labelpad=2)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    return f"maps {low:.2f} to {high:.2f}"


def _told(name: str, probability: Tensor) -> str:
    """A class with its probability, in percent; never 100 where it isn't."""
    share = float(probability)
    text = f"{100 * share:.0f}" if 0.005 <= share < 0.995 else "> 99" if share > 0.5 else "< 1"
    return f"{textwrap.shorten(name, 16, placeholder='…')} {text} %"
