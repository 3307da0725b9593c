"""Adversarial pictures that an evaluation saves in its output folder, as datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import report as reporting
from ..arguments import EvaluationRunArguments, Images
from ..defences.undefended import Undefended
from ..evaluation.adversarial import SaveAdversarial, check_saving, clear_adversarial
from ..evaluation.settings import EvaluationSettings
from ..report import RobustnessReport
from ..report.tables import titled
from ..zero_shot_data.licences import licence_of
from ..zero_shot_data.loading import ImageDataset
from . import shared

if TYPE_CHECKING:
    from .evaluate import Prepared

FOLDER = "adversarial"  # in which <task>/<attack>/ are datasets


def check(about: EvaluationRunArguments, tasks: Sequence[Images]) -> None:
    """Raise ValueError for pictures that must not be saved, of any task, or that would mean something else when read
    again.
    """
    if about.save_adversarial is not None:
        allowed = next((task for task in tasks if not licence_of(task.dataset).forbids_copies), tasks[0])
        check_saving(about.defence or Undefended(), allowed.dataset)


def check_without_attack(about: EvaluationRunArguments, evaluations: Sequence[EvaluationSettings]) -> None:
    """Raise ValueError for what is about attacks where there is none."""
    if any(how.attack.has_radii for how in evaluations):
        return
    for name in ("save_adversarial", "published", "stream_poisoning", "explain"):
        if (value := getattr(about, name)) not in (None, 0):
            raise ValueError(f"{name}={value!r} does nothing without an attack; choose one by evaluation.attack.")


def place_of(prepared: Prepared, name: str, task: str, attack: str, data: ImageDataset) -> SaveAdversarial | None:
    """Where the pictures of an evaluation are saved, if they are: those of the checkpoint in question, of sets whose
    terms allow it.
    """
    run = prepared.run
    if run.save_adversarial is None or name != run.model.model_name_or_path:
        return None
    if licence_of(data.dataset_id).forbids_copies:
        why = f"the terms of {data.dataset_id} forbid passing them on"
        prepared.processes.print(f"{task}: no pictures are saved, since {why}")
        return None
    attacks = [settings.attack.name(len(data.class_names)) for settings in run.evaluations]
    place = shared.folder_named(task, prepared.tasks), shared.folder_named(attack, attacks)
    return SaveAdversarial(prepared.folder.joinpath(FOLDER, *place), run.save_adversarial)


def clear(folder: Path) -> None:
    """Delete those of an earlier run, by their files' names."""
    for place in folder.glob(f"{FOLDER}/*/*"):
        clear_adversarial(place)


def written(folder: Path) -> list[str]:
    """The datasets in an output folder, relative to it."""
    return sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob(f"{FOLDER}/*/*/README.md"))


def figures(report: RobustnessReport) -> str | None:
    """What rounding did to pictures that were saved, in a line; None where none were, or none rounded."""
    rows = [row for row in report.measurements if row.metric.startswith(reporting.AS_SAVED)]
    if not rows or rows[0].metric == reporting.as_saved("float32"):
        return None
    told = [
        f"{reporting.percent(row.value)} at {report.threat(row.eps).radius} "
        f"(unrounded {reporting.percent(report.robust_accuracy[row.eps])})"
        for row in rows
    ]
    about = f"{titled(report)} on {report.task} under {report.attack}"
    return f"{about}, pictures as saved ({rows[0].metric.removeprefix(reporting.AS_SAVED)}): {', '.join(told)}"
