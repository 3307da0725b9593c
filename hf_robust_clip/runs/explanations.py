"""Where the models of an evaluation look: measured beside their accuracy, drawn and written after it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.explanations import explain_images
from ..evaluation.settings import EvaluationSettings
from ..report import print_table
from ..report.explanations import (
    SHOWN,
    Explanation,
    explanation_figures,
    explanation_rows,
    plot_explanations,
    save_explanations,
)
from ..report.tables import as_text
from ..saving import Saving
from .shared import slug

if TYPE_CHECKING:
    from ..modeling import ZeroShotClassifier

CSV, PNG = "explanations.csv", "explanations.png"
PICTURE = re.compile(r"explanations(-.+-[0-9a-f]{8})?\.png")
CAPTION = (
    "means over the images, of the true class: Pearson correlation of the clean with the attacked map; mean change of "
    "a patch's cosine; correlation of the clean map with the rival's; of the saliencies; their mean size, in logits "
    "per unit of [0, 1]"
)


def explain(
    saving: Saving,
    model: ZeroShotClassifier,
    data: Any,
    settings: EvaluationSettings,
    count: int,
    *,
    name: str,
    task: str,
) -> list[Explanation]:
    """Of one model on one task; none where it can't be made, with a warning."""
    made = saving.attempt(
        f"the explanation of {name} on {task}",
        partial(explain_images, model, data, settings, count, name=name, task=task),
    )
    return [] if made is None else [made]


def clear_explanations(folder: str | Path) -> None:
    """Delete what an earlier run wrote."""
    for path in Path(folder).glob("explanations*"):
        if path.is_file() and (path.name == CSV or PICTURE.fullmatch(path.name)):
            path.unlink()


def write_explanations(saving: Saving, explanations: Sequence[Explanation], reference: str | None) -> None:
    """Table, CSV, and a picture of each task, in which the undefended reference comes first."""
    if not explanations:
        return
    rows = explanation_rows(explanations)
    saving.attempt(
        "the table of explanations",
        lambda: print_table(as_text(explanation_figures(rows), "where the models look", CAPTION)),
    )
    saving.save(CSV, lambda: save_explanations(saving.folder / CSV, rows))
    pictures = pictures_of([own.task for own in explanations])
    for task, name in pictures.items():
        own = sorted((each for each in explanations if each.task == task), key=lambda each: each.model != reference)
        if saving.attempt(name, partial(_plot, saving.folder / name, own)):
            shown = min(SHOWN, len(own[0].labels))
            saving.attempt("a line", partial(saving.say, f"{name}: the first {shown} images of {task}"))


def _plot(path: Path, explanations: Sequence[Explanation]) -> bool:
    plot_explanations(path, explanations)
    return True


def pictures_of(tasks: Sequence[str]) -> dict[str, str]:
    """By task the name of its picture: explanations.png where there is one task, else with the task in it."""
    distinct = list(dict.fromkeys(tasks))
    return {task: PNG if len(distinct) == 1 else f"{Path(PNG).stem}-{slug(task)}.png" for task in distinct}
