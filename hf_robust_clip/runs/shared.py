"""What trainings and evaluations have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from ..arguments import Images
from ..digits_clip import EMBEDDED_MODEL
from ..modeling import (
    DESCRIPTION,
    AutoModelForZeroShotClassification,
    ZeroShotClassifier,
    adapter_config,
    base_of,
    check_classes,
    chosen,
    read_descriptions,
    with_adapter,
)
from ..modeling.checkpoints import read_config
from ..names import without_paths
from ..pictures import model_side
from ..processes import Processes, check_agreed
from ..report import RobustnessReport
from ..typed_settings import typed_text
from ..zero_shot_data.errors import one_line
from ..zero_shot_data.loading import ImageDataset, class_names_of, load_image_dataset
from ..zero_shot_data.specs import known_descriptions, prompt_templates
from ..zero_shot_data.suites import find_suite, other_pictures
from .interruptions import one_line_errors

SUITES = ("hf_robust_clip.attacks", "hf_robust_clip.evaluation")  # where classes of attacks are
OF_EACH_MACHINE = ("config", "output_dir", "data_root", "num_workers", "dataloader_num_workers", "overwrite")
SAID_OF = {"data_root": "a folder", "max_images": "a whole number", "streaming": "true or false"}
FOR_ALL_TASKS = tuple(SAID_OF)  # may stand beside a suite, for all of its tasks


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


def check_same_settings(source: Mapping[str, Any], processes: Processes) -> None:
    """Raise ValueError on every process unless all were started with the same settings. Folders and workers may be
    those of a machine, and so may the places of models and datasets, whose last parts are compared.
    """
    check_agreed(dict(_entries(without_paths(source))), processes)


def _entries(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted name, without those that each machine has for itself."""
    if not isinstance(settings, Mapping):
        yield name, settings
        return
    for key, value in settings.items():
        if key not in OF_EACH_MACHINE:
            yield from _entries(value, f"{name}.{key}" if name else str(key))


def as_list(name: str, file: dict[str, Any], options: dict[str, str]) -> None:
    """Let one text stand where a list of texts may."""
    if isinstance(file.get(name), str):
        file[name] = [file[name]]
    if name in options and options[name][:1] not in ("[", "{"):
        options[name] = json.dumps([options[name]])


def asks_for_texts(file: Mapping[str, Any], options: Mapping[str, str], *names: str) -> bool:
    """Whether one of some settings says what stands for classes."""
    return any(options.get(name, file.get(name)) not in (None, "null") for name in names)


def expand_suites(file: dict[str, Any], options: dict[str, str], *, template: bool) -> bool:
    """Put the tasks of suites in the place of their names: `tasks: NAME`, and in a list NAME, or {suite: NAME} with
    `data_root`, `max_images` or `streaming` for all of its tasks, `template`, and `without`: sets to leave out.

    Args:
        file, options: settings of a YAML file and of flags, which are changed.
        template: whether the run has a prompt of its own, which goes before those of suites.

    Returns whether all tasks are of suites.
    Raises ValueError for a name that there is no suite of, one that is there twice, and other keys beside it.
    """
    told: Any = file.get("tasks")
    if "tasks" in options:
        try:
            told = typed_text(options["tasks"])
        except ValueError as error:
            raise ValueError(f"tasks: {error}") from None
    entries = told if isinstance(told, list) else [told]
    suites = [_suite_named(entry) for entry in entries if _suite_named(entry) is not None]
    if not suites or told == "null":
        return False
    if twice := [name for name in suites if suites.count(name) > 1]:
        raise ValueError(f"tasks={told!r} names the suite {twice[0]!r} twice; name it once.")
    expanded = [_tasks_of(entry, template, several=len(suites) > 1) for entry in entries]
    options.pop("tasks", None)
    file["tasks"] = [task for tasks in expanded for task in tasks]
    return len(suites) == len(entries)


def _suite_named(entry: Any) -> Any:
    """The name of the suite of which an entry of `tasks` stands for all tasks; one with a dataset is a single task."""
    if isinstance(entry, Mapping):
        return entry["suite"] if "suite" in entry and "dataset" not in entry else None
    return entry if isinstance(entry, str) else None


def _tasks_of(entry: Any, template: bool, several: bool) -> list[Any]:
    """The tasks that an entry stands for; titles name the suite where there are several."""
    name = _suite_named(entry)
    if name is None:
        return [entry]
    asked = {key: value for key, value in entry.items() if key != "suite"} if isinstance(entry, Mapping) else {}
    known = ("without", "template", *FOR_ALL_TASKS)
    if other := [key for key in asked if key not in known]:
        raise ValueError(f"tasks: {other[0]!r} is no key beside suite={name!r}, which takes {', '.join(known)}.")
    for key in FOR_ALL_TASKS:
        _check_for_all(key, asked.get(key))
    without = asked.pop("without", None) or []
    if template and "template" not in asked:
        asked["template"] = None
    tasks = find_suite(name).settings([without] if isinstance(without, str) else without)
    if several:
        tasks = [{**task, "name": f"{task['name']} ({name})"} for task in tasks]
    return [{key: value for key, value in {**task, **asked}.items() if value is not None} for task in tasks]


def beside_suites(file: dict[str, Any], options: dict[str, str]) -> None:
    """Let `--data_root`, `--max_images` and `--streaming` stand for all tasks, all of which are of suites; what a task
    says itself goes before.
    """
    for key in FOR_ALL_TASKS:
        value = options.pop(key, file.get(key))
        file.pop(key, None)
        _check_for_all(key, value)
        if value is not None:
            file["tasks"] = [{key: value, **task} for task in file["tasks"]]


def _check_for_all(key: str, value: Any) -> None:
    """Raise ValueError here for a value that would be wrong in every task."""
    right = {"max_images": str(value).isdecimal(), "streaming": value in ("true", "false")}
    if value is not None and not right.get(key, isinstance(value, str)):
        raise ValueError(f"{key}={value!r} of a suite must be {SAID_OF[key]}.")


def check_model(name: str, revision: str | None = None) -> None:
    """Raise OSError unless there is a checkpoint of that name; its weights aren't looked at."""
    if name != EMBEDDED_MODEL and adapter_config(name, revision) is None:
        read_config(name, {"revision": revision or "main"})


def load_model(name: str, revision: str | None = None) -> ZeroShotClassifier:
    """A model in eval mode; of an adapter its base with the adapter in it."""
    adapter = None if name == EMBEDDED_MODEL else adapter_config(name, revision)  # nobody is asked for what is inside
    if adapter is not None:
        base = load_model(*base_of(name, adapter))
        return with_adapter(base, name, revision=revision).eval()  # type: ignore[return-value]
    return AutoModelForZeroShotClassification.from_pretrained(name, revision=revision or "main").eval()


def load_data(images: Images, model: ZeroShotClassifier) -> ImageDataset:
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
        resize=_resize(images, model),
        templates=_template_key(images.template),
        attack_resolution=images.attack_resolution,
        background=images.background,
        streaming=images.streaming,
        max_images=images.max_images if images.streaming else None,
    )
    if images.template is not None and _template_key(images.template) is None:
        data = replace(data, templates=(images.template,))
    data = data if images.classes is None else data.only(images.classes)
    data = data.shots(images.shots, images.shots_seed).first(images.max_images)
    return replace(data, augment=images.augment)


@dataclass(frozen=True)
class Texts:
    """What stands for classes.

    Args:
        templates: texts with `{}` for the class name, or with `{description}`; none for each dataset's own.
        descriptions: texts of at least the classes that come up; None where templates take none.
    """

    templates: tuple[str, ...] = ()
    descriptions: Mapping[str, Sequence[str]] | None = None

    def of(self, class_names: Sequence[str], templates: Sequence[str]) -> Mapping[str, Sequence[str]] | None:
        """The descriptions of these classes, where templates take some. Raises ValueError for a class without any."""
        return chosen(self.descriptions, class_names) if take_descriptions(templates) else None

    def set(self, model: ZeroShotClassifier, data: ImageDataset, templates: Sequence[str] = ()) -> None:
        """The model's classes are those of a dataset, in templates of its own if there are some."""
        templates = templates or self.templates or data.templates
        model.set_classes(data.class_names, templates, self.of(data.class_names, templates))


def texts_asked(template: str | None, source: str | None) -> Texts:
    """Those of settings; templates are missing where no template was given.

    Args:
        source: a JSON file of descriptions, or a known set of them.

    Raises OSError/ValueError for a file that can't be read, and a template that doesn't go with it.
    """
    known = None if source is None else known_descriptions(source) or read_descriptions(source)
    found = Texts(() if template is None else (template,), known)
    if template is not None:
        check_classes(["a class"], template, described=found.descriptions is not None)
    return found


def described(templates: Sequence[str]) -> tuple[str, ...]:
    """These templates if they take descriptions, else one that is nothing but them."""
    return tuple(templates) if take_descriptions(templates) else (DESCRIPTION,)


def take_descriptions(templates: Sequence[str]) -> bool:
    """Whether one of the templates does."""
    return any(DESCRIPTION in text for text in templates)


def _resize(images: Images, model: ZeroShotClassifier) -> int | None:
    """The shorter side before the centre crop; None for the processor's own."""
    if images.crop_pct is None:
        return images.resize
    return int(model_side(model.require_processor()) / images.crop_pct)


def _template_key(template: str | None) -> str | None:
    """The key of `templates.json` that a task gives; None where it gives a prompt, or nothing."""
    return None if template is None or "{}" in template or DESCRIPTION in template else template


def load_tasks(tasks: Mapping[str, Images], model: ZeroShotClassifier) -> dict[str, ImageDataset]:
    """The pictures of all tasks by their titles, before the first is evaluated.

    Raises OSError that names every set that can't be found.
    """
    found, missing = {}, {}
    for title, task in tasks.items():
        try:
            found[title] = load_data(task, model)
        except OSError as error:
            missing[title] = error
    if len(missing) == 1 and len(tasks) == 1:
        raise next(iter(missing.values()))
    if missing:
        first = one_line(next(iter(missing.values())))
        raise OSError(f"{len(missing)} of {len(tasks)} tasks can't be loaded: {', '.join(missing)}; {first}")
    return found


def templates_of(task: Images, data: ImageDataset, otherwise: Sequence[str]) -> Sequence[str]:
    """The prompts of a task: its own, else others that there are, else those of the known dataset."""
    return data.templates if task.template is not None else (otherwise or data.templates)


def suite_remarks(tasks: Mapping[str, Images], reports: Sequence[RobustnessReport]) -> list[str]:
    """What of each suite among the tasks isn't as in the paper's table."""
    counts = {report.task: report.num_images for report in reports}
    found: dict[str, dict[str, int]] = {}
    for title, task in tasks.items():
        if task.suite is not None and title in counts:
            found.setdefault(task.suite, {})[task.dataset] = counts[title]
    return [remark for name, own in found.items() if (remark := other_pictures(name, own)) is not None]


def check_tasks(tasks: tuple[Images, ...], *, described: bool = False) -> None:
    """Raise ValueError for no tasks, one without a dataset, crops, and two that tables would call the same.

    Args:
        described: whether there are descriptions, which a task's own prompt must take then.
    """
    from ..names import task_titles

    if not tasks:
        raise ValueError("tasks=[] names no dataset to evaluate on.")
    for i, task in enumerate(tasks):
        if not task.dataset:
            raise ValueError(f"tasks[{i}].dataset is missing.")
        if task.suite is not None:
            find_suite(task.suite)
        if task.template is not None:
            check_template(task.template, f"tasks[{i}].template", described)
        if task.augment:
            raise ValueError(f"tasks[{i}].augment=true: pictures are evaluated as they are; augment is of training.")
    task_titles([(task.name, task.dataset) for task in tasks])


def check_template(template: str, name: str, described: bool) -> None:
    """Raise ValueError for a text that is neither a prompt with {} for the class name nor a key of templates.json, and
    beside descriptions for one that doesn't take them.
    """
    key = _template_key(template)
    if key is None or described:
        check_classes(["a class"], template if key is None else prompt_templates(key), described)
        return
    try:
        prompt_templates(key)
    except ValueError:
        raise ValueError(f"{name}={template!r} has no {{}}, and is no key of templates.json; give a prompt.") from None


def count_whole(images: Images, data: ImageDataset, model: ZeroShotClassifier) -> int | None:
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


def folder_named(text: str, among: Iterable[str]) -> str:
    """A text as a folder name to be typed: its letters and digits, unless these are those of another text too."""
    names = [re.sub(r"[^A-Za-z0-9]+", "-", own).strip("-").casefold() for own in (text, *among)]
    plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
    return plain if 0 < len(plain) <= 80 and names[1:].count(names[0]) == 1 else slug(text)


def slug(text: str) -> str:
    """A text as a folder name, with a hash that tells apart what the letters alone don't."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', text).strip('-')[-80:]}-{sha256(text.encode()).hexdigest()[:8]}"
