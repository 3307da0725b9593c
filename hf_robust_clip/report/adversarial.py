"""The card of saved adversarial pictures: a pure function of the report of the evaluation that made them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import DatasetCardData

from ..digits_clip import EMBEDDED_MODEL
from ..names import hub_name, is_repo_id, shown_folder, shown_name
from ..zero_shot_data.specs import templates_key
from .card import LIBRARY, _code, _rendered, _span, _Written
from .report import DETECTION, RobustnessReport, percent
from .tables import titled

if TYPE_CHECKING:
    from ..zero_shot_data.licences import Licence

HELD = {
    "uint8": "PNGs of 8 bits, rounded to a grey level beside each value that lies in the ball",
    "float16": "arrays in float16, rounded to a value beside each that lies in the ball",
    "float32": "arrays in float32, as the attack left them",
}


class SavedSplit(NamedTuple):
    """The pictures of one radius.

    Args:
        name: of the split.
        files: pattern of the names of its files.
        radius: as people write it.
        images: how many.
        withstood: how many were right when clean and under every attack up to the radius, unrounded.
        as_saved: how many are right as they are saved.
        wrong: how many were wrong as they were, and weren't attacked.
    """

    name: str
    files: str
    radius: str
    images: int
    withstood: int
    as_saved: int
    wrong: int


def make_adversarial_card(
    report: RobustnessReport,
    folder: str,
    pixels: str,
    splits: Sequence[SavedSplit],
    licence: Licence,
    *,
    normalisation: tuple[list[float], list[float]] | None = None,
) -> str:
    """README.md of a folder of saved pictures.

    Args:
        report: of the evaluation that made them.
        folder: where they lie.
        pixels: `"uint8"`, `"float16"` or `"float32"`.
        licence: of the clean pictures.
        normalisation: mean and std, where transformers alone can predict as the evaluation did.
    """
    source = hub_name(report.dataset)
    folder, model = shown_folder(folder), shown_folder(report.model)
    command = _command(report, model, folder, splits[-1].name)
    data = DatasetCardData(
        license=licence.name,
        pretty_name=f"{titled(report)} on {report.task} under {report.attack}",
        task_categories=["zero-shot-image-classification"],
        tags=[LIBRARY, "adversarial-robustness", "adversarial-examples"],
        source_datasets=[source] if source is not None and is_repo_id(source) else None,
        configs=[{"config_name": "default",
                  "data_files": [{"split": own.name, "path": own.files} for own in splits]}],
    )  # fmt: skip
    return str(
        _rendered(
            data,
            "adversarial.md.jinja",
            title=f"{titled(report)} on {report.task} under {report.attack}",
            held=HELD[pixels],
            rounded=pixels != "float32",
            pixels=pixels,
            norm="L-inf" if report.norm == "linf" else "L2",
            side=report.attack_resolution,
            splits=[(own, percent(own.withstood / own.images), percent(own.as_saved / own.images)) for own in splits],
            made=_made(report),
            licence=licence,
            source=_span(shown_name(report.dataset)),
            folder=_code(folder),
            first=splits[0].name,
            split=_code(splits[-1].name),
            command=None if command is None else _Written(command),
            defended=report.defence is not None,
            detects=any(row.metric in DETECTION for row in report.measurements),
            plain=normalisation is not None and report.descriptions is None,
            mean_and_std=_code(normalisation),
            embedded=report.model == EMBEDDED_MODEL,
            model=_Written("digits_clip_path()") if report.model == EMBEDDED_MODEL else _code(model),
            templates=_code(list(report.templates or ())),
        )
    )


def _made(report: RobustnessReport) -> dict[str, Any]:
    """The table of how the pictures were made."""
    told: dict[str, Any] = {
        "model": f"{shown_folder(report.model)}, revision {report.model_revision}",
        "clean pictures": f"{shown_name(report.dataset)}, revision {report.dataset_revision}, split {report.split}",
        "classes": f"{report.num_classes}, prompt hash {report.prompt_hash}",
        "prompts": " | ".join(report.templates or ()),
        "descriptions": report.descriptions,
        "attack": report.attack,
        "its settings": json.dumps(report.attack_parameters),
        "it sees": f"{report.view.name}: {report.view.text}",
        "defence": report.defence and f"{report.defence['name']} {json.dumps(report.defence['parameters'])}",
        "seed": report.seed,
        "precision": report.precision,
        "hardware": report.hardware,
        "libraries": ", ".join(f"{name} {version}" for name, version in report.library_versions.items()),
    }
    return {name: str(value).replace("|", "\\|") for name, value in told.items() if value not in (None, "")}


def _command(report: RobustnessReport, model: str, folder: str, split: str) -> str | None:
    """What measures the model on the pictures of a split; None where no flag says the prompts, and where alarms would
    count as errors.
    """
    detects = any(row.metric in DETECTION for row in report.measurements)
    templates = list(report.templates or ())
    key = templates_key(templates) if len(templates) != 1 else None
    if detects or report.descriptions is not None or (len(templates) != 1 and key is None):
        return None
    words = ["hf-robust-clip", "evaluate", "--model_name_or_path", model]
    if key is None:
        words += ["--dataset_name", folder, "--dataset_test_split", split, "--template", templates[0]]
    else:
        words += ["--tasks", json.dumps([{"dataset": folder, "split": split, "template": key}])]
    words += ["--evaluation.attack", "none", *(["--defence", report.defence["name"]] if report.defence else [])]
    words += ["--evaluation.seed", str(report.seed), "--output_dir", "out/again"]
    return " ".join(shlex.join(words).split())  # one line, in which no block of code ends
