"""What trainings and evaluations have in common."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ..arguments import Images
from ..modeling import CLIPForZeroShotClassification, adapter_config, base_of, with_adapter
from ..report.report import RobustnessReport, defence_cells, templates_told
from ..zero_shot_data.loading import ImageDataset, class_names_of, load_image_dataset

if TYPE_CHECKING:
    from rich.table import Table

SUITES = ("hf_robust_clip.attacks", "hf_robust_clip.evaluation")  # where classes of attacks are


def as_list(name: str, file: dict[str, Any], options: dict[str, str]) -> None:
    """Let one text stand where a list of texts may."""
    if isinstance(file.get(name), str):
        file[name] = [file[name]]
    if name in options and options[name][:1] not in ("[", "{"):
        options[name] = json.dumps([options[name]])


def load_model(name: str, revision: str | None = None) -> CLIPForZeroShotClassification:
    """A model in eval mode; of an adapter its base with the adapter in it."""
    adapter = adapter_config(name, revision)
    if adapter is not None:
        base = load_model(*base_of(name, adapter))
        return with_adapter(base, name, revision=revision).eval()  # type: ignore[return-value]
    return CLIPForZeroShotClassification.from_pretrained(name, revision=revision or "main").eval()


def load_data(images: Images, model: CLIPForZeroShotClassification) -> ImageDataset:
    """The pictures that settings ask for, prepared for the model."""
    names = images.class_names
    data = load_image_dataset(
        images.dataset,
        images.split,
        model.require_processor(),
        data_root=images.data_root,
        revision=images.revision,
        config=images.config,
        class_names=class_names_of(names) if isinstance(names, str) else names,
        image_column=images.image_column,
        label_column=images.label_column,
        resize=images.resize,
        background=images.background,
        streaming=images.streaming,
        max_images=images.max_images if images.streaming else None,
    )
    data = data if images.classes is None else data.only(images.classes)
    data = data.shots(images.shots, images.shots_seed).first(images.max_images)
    return replace(data, augment=images.augment)


def check_tasks(tasks: tuple[Images, ...]) -> None:
    """Raise ValueError for no tasks, one without a dataset, crops, and two that tables would call the same."""
    from ..names import task_titles

    if not tasks:
        raise ValueError("tasks=[] names no dataset to evaluate on.")
    for i, task in enumerate(tasks):
        if not task.dataset:
            raise ValueError(f"tasks[{i}].dataset is missing.")
        if task.augment:
            raise ValueError(f"tasks[{i}].augment=true: pictures are evaluated as they are; augment is of training.")
    task_titles([(task.name, task.dataset) for task in tasks])


def quiet_loading() -> None:
    """Switch off the bars of loading and saving weights; training and attacks keep theirs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def print_table(table: Table, least_width: int) -> None:
    """Print a table as it is: no name in it is read as colours or pictures."""
    from rich.console import Console

    width = max(least_width, shutil.get_terminal_size().columns)
    Console(width=width, markup=False, emoji=False).print(table)


def slug(text: str) -> str:
    """A text as a folder name, with a hash that tells apart what the letters alone don't."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', text).strip('-')[-80:]}-{sha256(text.encode()).hexdigest()[:8]}"


def defence_table(reports: Sequence[RobustnessReport], title: str) -> Table:
    """`report.defence_cells` as a `rich` table, a row for each model and task."""
    from rich.table import Table

    heads, cells = defence_cells(by_model(reports))
    about = "blind: made on the classifier alone (without a defence: white box); controls: clean/blind; ms: each"
    table = Table(
        title=title,
        title_justify="left",
        caption="; ".join(filter(None, [about, templates_told(reports)])),
    )
    table.add_column("", no_wrap=True)
    for head in heads[1:]:
        table.add_column(head.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in cells:
        table.add_row(*(cell.replace(" / ", "/") for cell in row))
    return table


def by_model(reports: Sequence[RobustnessReport]) -> dict[str, list[RobustnessReport]]:
    """The reports of each model and task, by what tables call them."""
    several = len({report.task for report in reports}) > 1
    rows: dict[str, list[RobustnessReport]] = {}
    for report in reports:
        rows.setdefault(f"{report.name}, {report.task}" if several else report.name, []).append(report)
    return rows
