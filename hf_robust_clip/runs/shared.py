"""What trainings and evaluations have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any

from ..arguments import Images
from ..digits_clip import EMBEDDED_MODEL
from ..modeling import CLIPForZeroShotClassification, adapter_config, base_of, with_adapter
from ..modeling.checkpoints import read_config
from ..zero_shot_data.loading import ImageDataset, class_names_of, load_image_dataset
from .interruptions import one_line_errors

SUITES = ("hf_robust_clip.attacks", "hf_robust_clip.evaluation")  # where classes of attacks are


def run_command(read: Callable[[], Any], act: Callable[[Any], object], left: Callable[[str], str]) -> None:
    """A run as a command. A wrong setting ends it with one line and status 2.

    Args:
        left: what can be gone on from in an output folder, for an interruption.
    """
    with one_line_errors():
        run = read()
        quiet_loading()
        with one_line_errors(lambda: left(run.output_dir)):
            act(run)


def as_list(name: str, file: dict[str, Any], options: dict[str, str]) -> None:
    """Let one text stand where a list of texts may."""
    if isinstance(file.get(name), str):
        file[name] = [file[name]]
    if name in options and options[name][:1] not in ("[", "{"):
        options[name] = json.dumps([options[name]])


def check_model(name: str, revision: str | None = None) -> None:
    """Raise OSError unless there is a checkpoint of that name; its weights aren't looked at."""
    if name != EMBEDDED_MODEL and adapter_config(name, revision) is None:
        read_config(name, {"revision": revision or "main"})


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


def count_whole(images: Images, data: ImageDataset, model: CLIPForZeroShotClassification) -> int | None:
    """How many images there would be, if settings didn't take a part of them by number; None of a stream."""
    if images.streaming:
        return None
    if images.max_images is None and images.shots is None:
        return len(data)
    return len(load_data(replace(images, max_images=None, shots=None, shots_seed=0), model))


def on_cpu(asked: bool) -> bool:
    """Whether a run is on the CPU: where it is asked for, or there is nothing else."""
    import torch

    return asked or not torch.cuda.is_available()


def quiet_loading() -> None:
    """Switch off the bars of loading and saving weights; training and attacks keep theirs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def slug(text: str) -> str:
    """A text as a folder name, with a hash that tells apart what the letters alone don't."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', text).strip('-')[-80:]}-{sha256(text.encode()).hexdigest()[:8]}"
