"""Pictures on a card: attacked test images and one that is as it was, where the licence of a dataset allows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import report as reporting
from ..arguments import Images
from ..evaluation.loop import adversarial_examples
from ..evaluation.settings import EvaluationSettings
from ..modeling import ZeroShotClassifier
from ..report.metadata import WIDGET_LABELS
from ..storage import whole_file
from ..zero_shot_data.dataset import ImageDataset
from ..zero_shot_data.specs import DatasetSpec, find_spec

PUSHED = 4  # pictures on the card of a run that goes to the Hub
LOOKED_AT = 64  # images in which a sample is looked for
SMALLEST = 64  # pixels of a sample's shorter side


def licensed(tasks: Mapping[str, Images]) -> tuple[str, DatasetSpec] | None:
    """The first task whose pictures anybody may show, and its row; None where there is none that is known."""
    for title, task in tasks.items():
        spec = None if Path(task.dataset).is_dir() else find_spec(task.dataset)
        if spec is not None and spec.license and not spec.forbids_copies:
            return title, spec
    return None


def check_licensed(count: int | None, tasks: Mapping[str, Images]) -> None:
    """Raise ValueError for pictures that were asked for, and that nobody here knows to be free to show."""
    if count and licensed(tasks) is None:
        names = ", ".join(sorted({task.dataset for task in tasks.values()}))
        raise ValueError(f"card_pictures={count!r}: no licence is known that lets anybody show pictures of {names}.")


def draw(
    folder: Path,
    model: ZeroShotClassifier,
    data: ImageDataset,
    settings: EvaluationSettings,
    spec: DatasetSpec,
    about: str,
    count: int,
) -> dict[str, Any]:
    """Write `examples.png`: a few images, attacked at the largest radius by the first attack.

    Args:
        about: which model and task.
        count: at most so many.

    Returns what a `CardInfo` says of it. The model has the classes of the data.
    """
    member, threat_model = settings.attack.members(len(data.class_names))[0], settings.threat_models()[-1]
    told = f"{about} under {member.name} alone at {threat_model}"
    drawn = adversarial_examples(model, data, settings, count)
    reporting.plot_examples(folder / "examples.png", *drawn, told)
    fates = "clean, the perturbation magnified, attacked, and what the model saw; chosen to show both fates."
    source = f"Pictures: {spec.key} ({spec.license}; {spec.source}), changed by the attack."
    return {"examples": "examples.png", "pictures": f"{told}: {fates} {source}"}


def write_sample(folder: Path, data: ImageDataset, class_names: Sequence[str]) -> dict[str, Any]:
    """Write `widget.png`, the first picture of one of the first classes, as the model sees it but never smaller than
    64 pixels; nothing where there is none.

    Returns what a `CardInfo` says of it.
    """
    wanted = class_names[:WIDGET_LABELS]
    for index in range(min(LOOKED_AT, len(data))):
        row: dict[str, Any] = data[index]
        if data.class_names[row["labels"]] in wanted:
            pixels_HWC = (255 * row["pixel_values"]).round().byte().permute(1, 2, 0).numpy()
            factor = -(-SMALLEST // min(pixels_HWC.shape[:2]))
            with whole_file(folder / "widget.png") as draft:
                Image.fromarray(np.kron(pixels_HWC, np.ones((factor, factor, 1), np.uint8))).save(draft, format="PNG")
            return {"sample": "widget.png"}
    return {}
