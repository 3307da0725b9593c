"""Command lines: YAML and dotted overrides to settings, strings to classes, and the run itself.

Nothing heavy is imported before the settings have been read, so that `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from .digits_clip import EMBEDDED_MODEL
from .secrets import (
    hide_arguments,
    is_token_key,
    refuse_tokens,
    without_token_entries,
    without_token_keys,
    without_tokens,
)
from .storage import NotWritten, check_text, check_writable, write_text, written_whole
from .typed_settings import parse_yaml, read_text, typed_value

if TYPE_CHECKING:
    from peft import PeftConfig

    from .attacks.suites import Suite
    from .defences.base import Defence
    from .defences.tapt import TAPT
    from .evaluation.attack_views import AttackView
    from .evaluation.settings import EvaluationSettings
    from .hub import Push
    from .modeling import CLIPForZeroShotClassification
    from .objectives.base import Objective
    from .prompts import ClipPromptConfig
    from .report.report import RobustnessReport
    from .training.config import RobustClipConfig
    from .training.trainer import RobustClipTrainer
    from .zero_shot_data.loading import ImageDataset

METHODS = {
    "pmg_aft": "PMGAFTTrainer",
    "tecoa": "TeCoATrainer",
    "fare": "FARETrainer",
    "trades": "TRADESTrainer",
    "clean": "CleanTrainer",
    "apt": "APTTrainer",
    "tapt": "TAPTTrainer",
    "fap": "FAPTrainer",
    "coop": "CoOpTrainer",
}


@dataclass(frozen=True)
class ModelSettings:
    """What is trained or evaluated: a Hub id, a folder or `digits-clip` (shipped with the package).

    For an evaluation also an adapter, which is loaded on its base model.
    """

    name: str = EMBEDDED_MODEL
    revision: str | None = None
    lora_rank: int | None = None  # None trains the weights themselves
    lora_alpha: int = 16


@dataclass(frozen=True)
class DataSettings:
    """Pictures with labels: for training, or (with a name for the table) one evaluation."""

    dataset: str
    split: str = "train"
    name: str | None = None
    classes: Sequence[str] | None = None  # None takes all
    max_images: int | None = None
    revision: str | None = None
    data_root: str | None = None
    config: str | None = None  # where a dataset has several configurations
    class_names: Mapping[str, str] | Sequence[str] | str | None = (
        None  # names, a file of them, or a known set of names
    )
    image_column: str | None = None
    label_column: str | None = None
    background: str | Sequence[int] = "white"  # what shows where a picture is transparent
    resize: int | None = None  # shorter side before the centre crop; None takes the processor's
    streaming: bool = False  # read max_images rows of a shuffled stream, without downloading the rest
    shots: int | None = None  # so many images of each class, drawn once
    shots_seed: int = 0
    augment: bool = False  # random crops and mirroring of whole pictures (training.crop_scale, training.flip)


@dataclass(frozen=True)
class PromptSettings:
    """How class names become texts."""

    template: str = "This is a photo of a {}"


@dataclass(frozen=True)
class EvaluationPrompt:
    """How class names become texts in an evaluation."""

    template: str | None = None  # None takes that of the model's training, or else each known dataset's own


@dataclass(frozen=True)
class StatisticsSettings:
    """Of which training images statistics are made, for methods that align test images with them."""

    max_images: int | None = None  # None takes all training images


@dataclass(frozen=True)
class DefenceEvaluation:
    """How a defence is attacked, beside the static model: blind by `evaluation.attack`, and through the defence."""

    radius: float | str | None = None  # None takes the first of evaluation.radii
    worst: str = "worst"  # attacks through the defence: worst-PGD-APGD-SQUARE, steps and queries; 0 leaves one out
    eot: int = 1  # draws of the defence in each gradient through it
    max_images: int | None = None  # of each task; None takes those of the task
    batch_size: int = 64
    presets: Sequence[str] = ()  # presets of the method that are evaluated beside


@dataclass(frozen=True)
class RunSettings:
    """Where the run writes, and what else it does."""

    output_dir: str
    overwrite: bool = False
    resume: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    push_to_hub: str | None = None  # a repository id


@dataclass(frozen=True)
class Recipe:
    """Everything a training run needs, checked."""

    method: str
    model: ModelSettings
    data: DataSettings
    prompt: PromptSettings
    objective: Any
    prompts: ClipPromptConfig | None  # None trains the image encoder
    training: RobustClipConfig
    evaluation: EvaluationSettings
    tasks: tuple[DataSettings, ...]
    compare: tuple[str, ...]
    run: RunSettings
    source: dict[str, Any] = field(default_factory=dict)
    adaptations: dict[str, TAPT] = field(default_factory=dict)  # by title; the first is saved
    statistics: StatisticsSettings = StatisticsSettings()
    defence_evaluation: DefenceEvaluation = DefenceEvaluation()
    push: Push | None = None  # where the finished folder is uploaded to

    @property
    def title(self) -> str:
        """What tables call the trained model without a defence: the method, with its prompts' design where it has
        several.
        """
        method = self.objective.paper.method
        return f"{method}-{self.prompts.design}" if self.method in ("apt", "tapt") and self.prompts else method


@dataclass(frozen=True)
class EvaluationRecipe:
    """Everything an evaluation needs, checked."""

    model: ModelSettings
    checkpoints: tuple[str, ...]  # the one in question first, then those it is compared with
    reference: str | None
    prompt: EvaluationPrompt
    evaluations: tuple[EvaluationSettings, ...]
    tasks: tuple[DataSettings, ...]
    run: RunSettings
    source: dict[str, Any]
    defence: Defence | None = None
    defence_settings: dict[str, Any] = field(default_factory=dict)  # what was asked of it, over what a folder saved


USAGE = f"""\
usage: hf-robust-clip train {{{",".join(METHODS)}}} --config FILE [--section.key VALUE ...]
       hf-robust-clip evaluate --config FILE [--section.key VALUE ...]
       hf-robust-clip card FOLDER        write README.md again from report.json and recipe.yaml"""
DEFENCE_SECTIONS = ("adaptation", "statistics", "defence_evaluation")  # of methods that adapt at test time
SECTIONS = ("model", "data", "prompt", "objective", "prompts", "training", *DEFENCE_SECTIONS, "evaluation", "tasks",
            "compare", "run")  # fmt: skip
EVALUATION_SECTIONS = ("model", "compare", "reference", "prompt", "defence", "evaluation", "tasks", "run")
LISTS = ("compare", "tasks", "reference")  # sections without keys
SHORT = {"model": "model.name", "revision": "model.revision", "template": "prompt.template",
         "radii": "evaluation.radii", "attacks": "evaluation.attacks"}  # fmt: skip
RUN_OPTIONS = ("output_dir", "overwrite", "resume", "device")
# by option; --config is the YAML file
TASK_OPTIONS = {f"{f.name}_name" if f.name == "config" else f.name: f.name for f in fields(DataSettings)
                if f.name != "revision"}  # fmt: skip


TRAINING_OPTIONS = f"""\
  --config FILE          a YAML file in place of the default below
  --section.key VALUE    override any value below (VALUE is read as YAML, a text as it is typed); training.*
                         takes every field of RobustClipConfig, a transformers.TrainingArguments
  --compare METHOD       also train by METHOD ({", ".join(METHODS)}; a list is written '[tecoa, fare]')
  --output_dir DIR, --overwrite, --resume   short for --run.output_dir DIR, --run.overwrite true, ..."""
EVALUATION_OPTIONS = """\
  --model NAME           a Hub id or a folder of a checkpoint (or digits-clip); --revision for the Hub's
  --dataset NAME         evaluate on this one: a key of the known datasets, a Hub id, a folder of pictures or parquet;
                         with --split, --config_name NAME, --class_names FILE, --image_column, --label_column,
                         --background, --max_images N, --streaming true (only so many rows are read), --resize N,
                         --data_root
  --template TEXT        prompt with {} for the class name; null takes that of the model's training, if a recipe.yaml
                         or report.json beside it says so, else the known dataset's own
  --attacks LIST         of pgd-N, cw-N, apgd (APGD-CE and APGD-T), autoattack, autoattack-rand, apgd-ce, apgd-dlr,
                         apgd-t, fab-t, square; with a defence also worst or worst-PGD-APGD-SQUARE (their numbers of
                         steps and queries); a list is written '[pgd-20, autoattack]'
  --defence.method NAME  a test-time defence: tapt, tpt, prompt_align, r_tpt, ttc, ensemble; its settings stand in the
                         same section (--defence.num_views 32); tapt and prompt_align take the statistics from the
                         folder that the model is loaded from, and the settings that a defence of the same name has
                         there. --evaluation.target says what the attacks see
  --radii LIST           such as '[1/255, 4/255]'
  --compare LIST         further checkpoints, shown beside
  --reference NAME       an undefended checkpoint, which a working attack brings to about 0
  --config FILE          a YAML file in place of the default below
  --section.key VALUE    override any value below (VALUE is read as YAML, a text as it is typed)
  --output_dir DIR, --overwrite, --resume, --device   short for --run.output_dir DIR, ..."""


def help_text(description: str, config: Path, options: str) -> str:
    """What `--help` prints: usage, and the default config with its comments."""
    return (
        f"{description.strip()}\n\noptions:\n{options}\n\n"
        f"default config ({config.name}):\n\n{without_token_entries(config.read_text(encoding='utf-8'))}"
    )


def parse_arguments(argv: Sequence[str], default_config: Path, sections: Sequence[str] = SECTIONS) -> dict[str, Any]:
    """Command line to nested plain settings: the YAML file, then the dotted overrides in their order.

    Where there is no training, `--dataset` and the other keys of a task replace the tasks by one.

    Raises ValueError for a missing value, an unknown section, or an option that is none of ours; OSError for a missing
    file.
    """
    typed: list[tuple[str, str]] = []
    config = default_config
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} stands alone; options are written --section.key VALUE.")
        key, has_value, value = word[2:].partition("=")
        if key in ("overwrite", "resume") and not has_value:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        elif not has_value:
            if not words or (words[0].startswith("--")):
                raise ValueError(f"--{key} has no value.")
            value = words.pop(0)
        key = f"run.{key}" if key in RUN_OPTIONS else key
        if key == "config":
            config = Path(value)
        else:
            check_option(key, sections)
            typed.append((key, value))
    if not config.is_file():
        raise OSError(f"--config {str(config)!r} is not a file.")
    types_of = field_types(sections)
    overrides = [(key, typed_value(value, f"--{key}", type_of_option(key, types_of))) for key, value in typed]
    settings = parse_yaml(read_text(config), str(config), types_of) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config} must hold sections: {', '.join(SECTIONS)}.")
    for section, values in settings.items():
        check_key(section, sections, f"section in {config.name}")
        if section not in LISTS and not isinstance(values, dict | None):
            raise ValueError(f"the section {section} in {config.name} must hold keys.")
    if "training" not in sections:
        task = {TASK_OPTIONS[key]: value for key, value in overrides if key in TASK_OPTIONS}
        overrides = [(SHORT.get(key, key), value) for key, value in overrides if key not in TASK_OPTIONS]
        if task and "dataset" not in task:
            raise ValueError(f"--{next(iter(task))} goes with --dataset.")
        if task:
            settings["tasks"] = [{"split": "test", **task}]
    drop_unused_prompts(settings, overrides)
    for key, value in overrides:
        section, _, rest = key.partition(".")
        settings[section] = {**(settings.get(section) or {}), rest: value} if rest else value
    return settings


def check_option(key: str, sections: Sequence[str]) -> None:
    """Raise ValueError unless an option sets a field, or a section that has no fields."""
    section, _, rest = key.partition(".")
    evaluates = "training" not in sections
    if evaluates and key in (*SHORT, *TASK_OPTIONS):
        return
    check_key(section, (*sections, *(SHORT if evaluates else ())), f"option --{key}")
    if (not rest and section not in LISTS) or "." in rest:
        raise ValueError(f"--{key} is not of the form --section.key.")


def field_types(sections: Sequence[str]) -> dict[str, Any]:
    """The types of the fields of sections, as far as some of them are texts, for `parse_yaml`."""
    classes: dict[str, type] = {"model": ModelSettings, "data": DataSettings, "prompt": EvaluationPrompt,
                                "run": RunSettings, "defence_evaluation": DefenceEvaluation}  # fmt: skip
    if "training" in sections:
        from .prompts import ClipPromptConfig
        from .training.config import RobustClipConfig

        classes |= {"training": RobustClipConfig, "prompts": ClipPromptConfig}
    found: dict[str, Any] = {section: get_type_hints(cls) for section, cls in classes.items()}
    return {**found, "tasks": [found["data"]], "compare": str | Sequence[str], "reference": str | None}


def type_of_option(key: str, types_of: Mapping[str, Any]) -> Any:
    """The type of the field that an option sets; None where it is of no matter."""
    section, _, rest = (f"data.{TASK_OPTIONS[key]}" if key in TASK_OPTIONS else SHORT.get(key, key)).partition(".")
    return types_of[section].get(rest) if rest and section in types_of else types_of.get(section)


def drop_unused_prompts(settings: dict[str, Any], overrides: Sequence[tuple[str, Any]]) -> None:
    """Where the command line takes another design of prompts than the file: drop what only the file's design has."""
    from .unused_settings import unused_by_design

    asked = dict(overrides)
    prompts = settings.get("prompts")
    if isinstance(prompts, dict) and asked.get("prompts.design") not in (None, prompts.get("design")):
        for key in unused_by_design(str(asked["prompts.design"]), prompts):
            del prompts[key]


def check_key(key: str, known: Sequence[str], what: str) -> None:
    """Raise ValueError, with the nearest known name, unless `key` is one of `known`."""
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
        raise ValueError(f"unknown {what}: {key!r}; {hint}")


def build(cls: type, values: Mapping[str, Any] | None, section: str) -> Any:
    """A settings dataclass from plain values. Raises ValueError naming section and key for what doesn't fit."""
    given = checked(cls, values, section)
    for f in fields(cls):
        if f.init and f.default is MISSING and f.default_factory is MISSING and given.get(f.name) in (None, ""):
            raise ValueError(f"{section}.{f.name} is missing.")
    return cls(**given)


def checked(cls: type, values: Mapping[str, Any] | None, section: str) -> dict[str, Any]:
    """The values of some fields of a dataclass, as their types. Raises ValueError naming section and key."""
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"{section}={values!r} must hold keys.")
    values = dict(values or {})
    accepted = [f.name for f in fields(cls) if f.init]
    for key in values:
        check_key(key, accepted, f"key in {section}")
    hints = get_type_hints(cls)
    return {key: coerce(value, hints[key], f"{section}.{key}") for key, value in values.items()}


def build_from_preset(
    cls: type, values: Mapping[str, Any] | None, section: str, arguments: Mapping[str, Any] | None = None
) -> Any:
    """`build`, where `preset: NAME` chooses what the other keys start from: `cls.NAME_preset` with those of the
    arguments that it takes.
    """
    values = dict(values) if isinstance(values, Mapping) else values
    preset = values.pop("preset", None) if isinstance(values, dict) else None
    if preset is None:
        return build(cls, values, section)
    presets = {n.removesuffix("_preset"): getattr(cls, n) for n in dir(cls) if n.endswith("_preset")}
    check_key(preset, list(presets) or ["(none for this method)"], f"{section}.preset")
    accepted = inspect.signature(presets[preset]).parameters
    base = presets[preset](**{name: value for name, value in (arguments or {}).items() if name in accepted})
    return replace(base, **checked(cls, values, section))


def coerce(value: Any, hint: Any, name: str) -> Any:
    """A YAML value as the type a field asks for (YAML reads 1e-5 as text). Raises ValueError if it can't be that."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options or hint is Any:
            return None
        raise ValueError(f"{name} must not be empty.")
    for option in options:
        origin = get_origin(option)
        if origin is Literal and value in get_args(option):
            return value
        if (
            isinstance(option, type)
            and isinstance(value, option)
            and not (option in (int, float) and isinstance(value, bool))
        ):
            return value
        if option is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if option is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if origin is not None and origin is not Literal and isinstance(value, (list, tuple, dict)):
            return value
        if option is Any or (not isinstance(option, type) and origin is None):
            return value
    kinds = " or ".join(
        "/".join(map(repr, get_args(o))) if get_origin(o) is Literal else getattr(o, "__name__", str(o))
        for o in options
    )
    shown = "..." if is_token_key(name) else repr(value)
    raise ValueError(f"{name}={shown} must be {kinds}.")


def build_objective(method: str, values: Mapping[str, Any] | None) -> Any:
    """The method's objective; `preset: paper|released` (PMG-AFT) chooses what the other keys start from."""
    return build_from_preset(objective_class(method), values, "objective")


def build_defence(method: str, values: Mapping[str, Any] | None, section: str = "defence") -> Defence:
    """A test-time defence from plain values, without statistics; `preset: paper|released` where the method has them.

    Args:
        method: a name of `defences.defence_classes()`.
    """
    from .crops import RandomResizedCrop
    from .defences import defence_class, defence_classes

    check_key(method, list(defence_classes()), f"{section}.method")
    if isinstance(values, Mapping) and isinstance(values.get("crop"), Mapping):
        values = {**values, "crop": build(RandomResizedCrop, values["crop"], f"{section}.crop")}
    return build_from_preset(defence_class(method), values, section)


def build_prompts(method: str, values: Mapping[str, Any] | None) -> ClipPromptConfig | None:
    """The method's prompts: its own (none for the methods that train the image encoder), changed by `values`."""
    default = copy.deepcopy(objective_class(method).peft_config)
    if values is None:
        return default
    if not isinstance(values, Mapping):
        raise ValueError(f"prompts={values!r} must hold keys.")
    from .prompts import ClipPromptConfig
    from .unused_settings import USED_BY_ALL, USED_BY_DESIGN, check_prompts_section

    known = [key for keys in (USED_BY_ALL, *USED_BY_DESIGN.values()) for key in keys]
    for key in values:
        check_key(key, list(dict.fromkeys(known)), "key in prompts")
    config = build(ClipPromptConfig, values, "prompts")
    if default is not None and "design" not in values:
        config = ClipPromptConfig(**{**default.to_dict(), **{key: getattr(config, key) for key in values}})
    check_prompts_section(values, config)
    return config


def objective_class(method: str) -> type[Objective]:
    """The objective of a method's name. Raises ValueError for an unknown one."""
    found = trainer_class(method).objective_cls
    assert found is not None
    return found


def trainer_class(method: str) -> type[RobustClipTrainer]:
    """The trainer of a method's name. Raises ValueError for an unknown one."""
    check_key(method, list(METHODS), "method")
    return getattr(import_module(".training.named", __package__), METHODS[method])


def read_recipe(method: str, settings: dict[str, Any]) -> Recipe:
    """Check every section and make its settings. Nothing is written or downloaded here."""
    from . import unused_settings as unused

    refuse_tokens(settings, "settings")
    check_text(settings, "settings")
    run = build(RunSettings, settings.get("run"), "run")
    check_output_dir(run)
    check_card_place(run)
    from .training.config import RobustClipConfig, check_augmentation, check_start_of_attack, check_trained_part

    model = build(ModelSettings, settings.get("model"), "model")
    unused.check_run(run.output_dir, run.overwrite, run.resume, model.name)
    unused.check_model(settings.get("model"), trained=True)
    data = build(DataSettings, settings.get("data"), "data")
    unused.check_data("data", settings.get("data"), task=False)
    tasks = settings.get("tasks")
    if tasks is None:
        from .names import shown_name

        tasks = [{"dataset": data.dataset, "split": "test", "name": shown_name(data.dataset)}]
    compare = settings.get("compare") or []
    compare = [compare] if isinstance(compare, str) else compare
    if not isinstance(compare, list):
        raise ValueError(f"compare={compare!r} must be a method or a list of methods.")
    for other in compare:
        check_key(other, [name for name in METHODS if name != "tapt"], "method in compare")
    with_prompts = [name for name in compare if objective_class(name).peft_config is not None]
    unused.check_methods(method, compare, lora=model.lora_rank is not None, with_prompts=with_prompts)
    unused.check_training_evaluation(settings.get("evaluation"))
    evaluation = build_evaluation(settings.get("evaluation"))
    settings_of_tasks = build_tasks(tasks)
    check_max_images(data, "data")
    prompts = build_prompts(method, settings.get("prompts"))
    if prompts is not None and model.lora_rank is not None:
        raise ValueError(f"model.lora_rank={model.lora_rank!r} and prompts don't go together; choose one.")
    objective = build_objective(method, settings.get("objective"))
    defaults = {f.name: f.default for f in fields(RobustClipConfig)}
    unused.check_training(settings.get("training"), defaults, collects=method == "tapt", device=run.device)
    unused.check_push_settings(settings.get("training"), run.push_to_hub, defaults)
    training = {**(settings.get("training") or {}), "output_dir": run.output_dir, "use_cpu": use_cpu(run.device)}
    training = build(RobustClipConfig, training, "training")
    adaptations: dict[str, Any] = {}
    statistics, defence = (
        build(cls, settings.get(section), section)
        for cls, section in ((StatisticsSettings, "statistics"), (DefenceEvaluation, "defence_evaluation"))
    )
    if method == "tapt":
        own = settings.get("adaptation")
        adaptations = build_adaptations(own, defence.presets, prompts.design)  # type: ignore[union-attr]
        for adaptation in adaptations.values():
            unused.check_adapter("adaptation", own, adaptation)
        worst = defence_settings(evaluation, defence)[1].attack
        unused.check_defence_evaluation(settings.get("defence_evaluation"), (own or {}).get("preset"), worst)
        check_max_images(statistics, "statistics")
    for section in DEFENCE_SECTIONS:
        if method != "tapt" and settings.get(section) is not None:
            raise ValueError(f"the section {section} goes with tapt, not with {method}.")
    check_augmentation(training, data.augment)
    for name in (method, *compare):
        check_start_of_attack(training, objective if name == method else build_objective(name, None))
        adapter = prompts if name == method else build_prompts(name, None)
        check_trained_part(training, adapter is not None or model.lora_rank is not None)
    prompt = build(PromptSettings, settings.get("prompt"), "prompt")
    recipe = Recipe(
        method=method,
        model=model,
        data=data,
        prompt=prompt,
        objective=objective,
        prompts=prompts,
        training=training,
        evaluation=evaluation,
        tasks=settings_of_tasks,
        compare=tuple(compare),
        run=run,
        source={**without_token_keys(settings), "prompt": {"template": prompt.template}},
        adaptations=adaptations,
        statistics=statistics,
        defence_evaluation=defence,
        push=push_of(run, training),
    )
    check_titles(recipe)
    if recipe.push is not None:
        from .hub import check_base, check_push

        check_push(recipe.push, "run.push_to_hub")
        if prompts is not None:
            check_base(model.name, "run.push_to_hub: the adapter")
    return recipe


def push_of(run: RunSettings, training: RobustClipConfig) -> Push | None:
    """Where the finished folder is uploaded to: by `run.push_to_hub`, or by the Trainer's own settings."""
    from .hub import Push

    repo_id = run.push_to_hub or training.hub_model_id or Path(run.output_dir).absolute().name
    if run.push_to_hub is None and not training.push_to_hub:
        return None
    return Push(repo_id, training.hub_token, training.hub_private_repo, training.hub_revision)


def check_titles(recipe: Recipe) -> None:
    """Raise ValueError where a table would call two of its models the same."""
    for other in recipe.compare:
        rival = replace(recipe, method=other, objective=build_objective(other, None),
                        prompts=rival_prompts(recipe, other))  # fmt: skip
        if rival.title == recipe.title:
            raise ValueError(
                f"compare={list(recipe.compare)!r}: {rival.title} is what {recipe.method} trains already."
            )


def build_adaptations(values: Mapping[str, Any] | None, presets: Sequence[str], design: str) -> dict[str, Any]:
    """TAPT as it is saved and, by the presets' names, as it is evaluated beside; by what tables call it."""
    if isinstance(presets, str):
        raise ValueError(f"defence_evaluation.presets={presets!r} must be a list.")
    own = build_defence("tapt", values, "adaptation")
    preset = (values or {}).get("preset")
    titles = {f"TAPT-{design}" + (f" {preset}" if preset else ""): own}
    for other in presets:
        if other != preset:
            titles[f"TAPT-{design} {other}"] = build_defence("tapt", {**(values or {}), "preset": other}, "adaptation")
    return titles


def defence_settings(evaluation: EvaluationSettings, defence: DefenceEvaluation) -> list[EvaluationSettings]:
    """How a defence is attacked: blind, and through it."""
    from .evaluation.attack_views import DefenceBlind, Static

    radius = evaluation.radii[0] if defence.radius is None else defence.radius
    shared = replace(evaluation, radii=[radius], batch_size=defence.batch_size, view=DefenceBlind())
    if shared.threat_models()[0] not in evaluation.threat_models():
        raise ValueError(
            f"defence_evaluation.radius={radius!r} must be one of evaluation.radii={list(evaluation.radii)!r}, at "
            "which the model is attacked without the defence."
        )
    check_max_images(defence, "defence_evaluation")
    if not defence.worst.startswith("worst"):
        raise ValueError(f"defence_evaluation.worst={defence.worst!r} must be worst or worst-PGD-APGD-SQUARE.")
    worst = attack_suite(defence.worst)
    return [shared, replace(shared, attack=worst, view=Static(), eot=defence.eot)]


def build_evaluation(values: Mapping[str, Any] | None, attack: str | None = None) -> EvaluationSettings:
    """Evaluation settings; `attack` (or the key of that name) is a name such as `pgd-20` or `autoattack`."""
    from .evaluation.settings import EvaluationSettings

    values = dict(values or {})
    own = values.pop("attack", "pgd-20")
    own = own if attack is None else attack
    worst = str(own).lower().startswith("worst")
    suite = attack_suite(own, None if worst else values.pop("step_size", None))
    target = values.pop("target", None)
    if target is not None and not worst:
        values["view"] = view_of(target)
    view = {"view": values.pop("view")} if "view" in values else {}
    given = checked(EvaluationSettings, {name: v for name, v in values.items() if name != "step_size"}, "evaluation")
    if "radii" not in given:
        raise ValueError("evaluation.radii is missing.")
    return EvaluationSettings(**given, **view, attack=suite)


def view_of(name: Any) -> AttackView:
    """What attacks see, by its name."""
    from .evaluation.attack_views import VIEWS

    if name not in VIEWS:
        raise ValueError(f"evaluation.target={name!r} must be one of {', '.join(VIEWS)}.")
    return VIEWS[name]


def attack_suite(name: Any, step_size: float | str | None = None) -> Suite:
    """The attacks of a name: pgd-N, cw-N, apgd, autoattack, autoattack-rand, or one member of AutoAttack."""
    from .attacks.auto_attack import AttackName, AutoAttack
    from .attacks.losses import cross_entropy, cw_margin
    from .attacks.suites import PGD

    match = re.fullmatch(r"worst((?:-\d+){3})?", str(name).lower())
    if match:
        from .evaluation.attack_views import AdaptiveWorst

        if not match[1]:
            return AdaptiveWorst()
        pgd_steps, apgd_steps, num_queries = map(int, match[1].split("-")[1:])
        return AdaptiveWorst(pgd_steps, apgd_steps, num_queries)
    match = re.fullmatch(r"(pgd|cw)-(\d+)", str(name).lower())
    if match:
        return PGD(int(match[2]), step_size, cw_margin if match[1] == "cw" else cross_entropy)
    if step_size is not None:
        raise ValueError(f"evaluation.step_size={step_size!r} goes with pgd-N and cw-N, not with {name!r}.")
    suites = {
        "autoattack": AutoAttack(),
        "autoattack-rand": AutoAttack.rand(),
        "apgd": AutoAttack(("apgd-ce", "apgd-t")),
    }
    suites |= {member: AutoAttack((member,)) for member in get_args(AttackName)}
    if str(name).lower() not in suites:
        raise ValueError(
            f"unknown attack {name!r}; known: pgd-20 (any number), cw-20, {', '.join(suites)}; through a defence "
            "worst, worst-20-50-500."
        )
    return suites[str(name).lower()]


def build_tasks(tasks: Any) -> tuple[DataSettings, ...]:
    """The datasets to evaluate on, each with a name of its own."""
    from .names import task_titles
    from .unused_settings import check_data

    if not isinstance(tasks, list) or not tasks:
        raise ValueError(f"tasks={tasks!r} must be a list of datasets to evaluate on.")
    built = tuple(build(DataSettings, task, f"tasks[{i}]") for i, task in enumerate(tasks))
    task_titles([(task.name, task.dataset) for task in built])
    for i, task in enumerate(built):
        check_data(f"tasks[{i}]", tasks[i], task=True)
        check_max_images(task, f"tasks[{i}]")
        if task.augment:
            raise ValueError(f"tasks[{i}].augment=true: pictures are evaluated as they are; augment goes with data.")
    return built


def check_max_images(data: DataSettings | StatisticsSettings | DefenceEvaluation, section: str) -> None:
    """Raise ValueError for a number of images below 1."""
    if data.max_images is not None and data.max_images < 1:
        raise ValueError(f"{section}.max_images={data.max_images!r} must be at least 1.")


def read_evaluation(settings: dict[str, Any]) -> EvaluationRecipe:
    """Check every section of an evaluation. Nothing is written or downloaded here."""
    from . import unused_settings as unused
    from .modeling import check_classes
    from .names import same_place

    refuse_tokens(settings, "settings")
    check_text(settings, "settings")
    run = build(RunSettings, settings.get("run"), "run")
    check_output_dir(run)
    if any(Path(run.output_dir, name).is_file() for name in ("config.json", "adapter_config.json")):
        raise OSError(f"output_dir={run.output_dir!r} is a checkpoint with a report of its own; name another folder.")
    if run.push_to_hub is not None:
        raise ValueError("run.push_to_hub goes with training; an evaluation stays in its output directory.")
    given = settings.get("evaluation") or {}
    unused.check_attacks(given)
    values = dict(given)
    attacks = values.pop("attacks", None)
    attacks = [values.pop("attack", "pgd-20")] if attacks is None else attacks
    values.pop("attack", None)
    attacks = attacks if isinstance(attacks, list) else [attacks]
    if not attacks:
        raise ValueError("evaluation.attacks=[] names no attack.")
    others = settings.get("compare") or []
    others = others if isinstance(others, list) else [others]
    model, reference = build(ModelSettings, settings.get("model"), "model"), settings.get("reference")
    for name in (*others, reference):
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{name!r} must be a Hub id or a folder of a checkpoint.")
    unused.check_run(run.output_dir, run.overwrite, run.resume, model.name)
    unused.check_model(settings.get("model"), trained=False)
    unused.check_compared(model.name, others)
    reference = next((name for name in (model.name, *others) if reference and same_place(name, reference)), reference)
    prompt = build(EvaluationPrompt, settings.get("prompt"), "prompt")
    if prompt.template is not None:
        check_classes(["a class"], prompt.template)
    defence = dict(settings.get("defence") or {})
    if defence:
        if "method" not in defence:
            raise ValueError("defence.method is missing.")
        if reference is not None:
            raise ValueError(f"reference={reference!r} is undefended: evaluate it without the section defence.")
        values.setdefault("target", "defence_blind")
    evaluations = tuple(build_evaluation(values, attack) for attack in attacks)
    for i, how in enumerate(evaluations):
        if how in evaluations[:i]:
            raise ValueError(f"evaluation.attacks={attacks!r} names {attacks[i]!r} twice.")
    for how in evaluations:
        if defence and how.seen.name == "static":
            raise ValueError(
                f"target='static' says nothing of {defence['method']}; choose another, or leave the section out."
            )
        if not defence and how.seen.name != "static":
            raise ValueError(f"target={how.seen.name!r} needs the section defence.")
    unused.check_evaluation(given, evaluations)
    adapter = build_defence(str(defence.pop("method")), defence) if defence else None
    if adapter is not None:
        unused.check_adapter("defence", defence, adapter)
    return EvaluationRecipe(
        model=model,
        checkpoints=(model.name, *others),
        reference=reference,
        prompt=prompt,
        evaluations=evaluations,
        tasks=build_tasks(settings.get("tasks")),
        run=run,
        source=without_token_keys(settings),
        defence=adapter,
        defence_settings=defence,
    )


def use_cpu(device: str) -> bool:
    """Whether to train on the CPU. Raises ValueError if CUDA is asked for and not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device='cuda', but torch sees no CUDA device here; use auto or cpu.")
    return device == "cpu" or not torch.cuda.is_available()


def check_output_dir(run: RunSettings) -> None:
    """Raise OSError if the output directory is a file, or holds something without overwrite or resume."""
    folder = Path(run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise OSError(f"output_dir={run.output_dir!r} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (run.overwrite or run.resume):
        raise OSError(
            f"output_dir={run.output_dir!r} is not empty; add --overwrite or --resume, or name another folder."
        )


def check_card_place(run: RunSettings) -> None:
    """Raise OSError if the card would take the place of somebody's own words."""
    from .report.card import card_state

    card = Path(run.output_dir, "README.md")
    if card_state(card) == "theirs":
        raise OSError(
            f"{card} is no card of this package, and the run writes one there; move it, or name another folder."
        )


def load_model(settings: ModelSettings) -> CLIPForZeroShotClassification:
    """A model in eval mode; of an adapter its base with the adapter in it."""
    from .modeling import CLIPForZeroShotClassification, adapter_config, base_of, with_adapter

    adapter = adapter_config(settings.name, settings.revision)
    if adapter is not None:
        base = load_model(ModelSettings(*base_of(settings.name, adapter)))
        return with_adapter(base, settings.name, revision=settings.revision).eval()  # type: ignore[return-value]
    return CLIPForZeroShotClassification.from_pretrained(settings.name, revision=settings.revision or "main").eval()


def load_data(settings: DataSettings, model: CLIPForZeroShotClassification) -> ImageDataset:
    """The pictures that settings ask for, prepared for the model."""
    from .zero_shot_data.loading import class_names_of, load_image_dataset

    if settings.augment and settings.resize is not None:
        raise ValueError(
            f"resize={settings.resize!r} does nothing beside augment: whole pictures are cropped at random."
        )
    names = settings.class_names
    data = load_image_dataset(
        settings.dataset,
        settings.split,
        model.require_processor(),
        data_root=settings.data_root,
        revision=settings.revision,
        config=settings.config,
        class_names=class_names_of(names) if isinstance(names, str) else names,
        image_column=settings.image_column,
        label_column=settings.label_column,
        resize=settings.resize,
        background=settings.background,
        streaming=settings.streaming,
        max_images=settings.max_images if settings.streaming else None,
    )
    data = data if settings.classes is None else data.only(settings.classes)
    data = data.shots(settings.shots, settings.shots_seed).first(settings.max_images)
    return replace(data, augment=settings.augment)


def train(recipe: Recipe) -> list[RobustnessReport]:
    """Evaluate, fine-tune, evaluate again, compare; write checkpoint, report, plot and card to the output directory.

    Returns the fine-tuned model's reports, one for each task.
    """
    from .checkpoint_notes import named_base
    from .hub import clear_checkpoints, clear_model, clear_states, dump_recipe, prepare_repository, push_folder
    from .names import hub_name, is_path, shown_folder, shown_name, task_titles, without_paths
    from .processes import join_processes, what_runs
    from .report import CardInfo, blind_warning, make_card, percent, plot, print_table, save_reports, table
    from .saving import Saving
    from .training.checkpoints import NothingToResume

    folder = Path(recipe.run.output_dir)
    check_writable(folder)
    model = load_model(recipe.model)
    if hasattr(model, "peft_config"):
        raise ValueError(f"model.name={recipe.model.name!r} is an adapter; name the model that it stands on.")
    train_data, *tasks = (
        replace(data, dataset_id=shown_name(data.dataset_id))
        for data in (load_data(settings, model) for settings in (recipe.data, *recipe.tasks))
    )
    names = task_titles([(task.name, task.dataset) for task in recipe.tasks])
    start = shown_name(recipe.model.name)
    model.set_classes(train_data.class_names, recipe.prompt.template)  # a bad class name fails here, before any work
    for config in (recipe.prompts, *(rival_prompts(recipe, other) for other in recipe.compare)):
        if config is not None:
            from .prompts import check_prompts

            check_prompts(model, config)
    processes = join_processes(recipe.training.use_cpu)
    say = processes.print
    saving = Saving(folder, say)
    push = recipe.push
    if push is not None and processes.is_main_process:
        push = prepare_repository(push, "model" if recipe.prompts is None else "adapter", "run.push_to_hub")
    mixed = recipe.training.mixed_precision
    say(f"{recipe.method}: {len(train_data)} images, {len(train_data.class_names)} classes, "
        f"{what_runs(processes)}, "
        f"{mixed if mixed != 'no' else str(model.dtype).removeprefix('torch.')}")  # fmt: skip

    def evaluate(
        subject: CLIPForZeroShotClassification,
        title: str,
        model_id: str,
        settings: EvaluationSettings = recipe.evaluation,
        defence: Defence | None = None,
    ) -> list[RobustnessReport]:
        from .evaluation.loop import evaluate_robustness

        subject.to(processes.device)
        found = []
        for data, task in zip(tasks, names, strict=True):
            subject.set_classes(data.class_names, recipe.prompt.template)
            found.append(
                evaluate_robustness(
                    subject,
                    data if defence is None else data.first(recipe.defence_evaluation.max_images),
                    settings,
                    name=title,
                    task=task,
                    model_id=model_id,
                    processes=processes,
                    progress=defence is not None,
                    defence=defence,
                )
            )
        subject.set_classes(train_data.class_names, recipe.prompt.template)
        return found

    if processes.is_local_main_process and recipe.run.overwrite:
        clear_checkpoints(folder)
        clear_states(folder)
    processes.wait_for_everyone()
    by_method = {"undefended": evaluate(model, "undefended", start)}
    trainer = make_trainer(recipe, model, train_data, save=True)
    try:
        trainer.train(resume_from_checkpoint=recipe.run.resume)
    except NothingToResume:
        say(f"no whole checkpoint in {folder}: the training begins anew")
        trainer.train()
    for other in recipe.compare:
        rival = load_model(recipe.model)
        rival.set_classes(train_data.class_names, recipe.prompt.template)
        its_own = replace(
            recipe,
            method=other,
            objective=build_objective(other, None),
            prompts=rival_prompts(recipe, other),
            adaptations={},
        )
        its_trainer = make_trainer(its_own, rival, train_data, save=False)
        its_trainer.train()
        rival, _ = plain_model(its_trainer, folder / "compared" / other)
        by_method[its_own.title] = evaluate(rival, its_own.title, f"{its_own.title} from {start}, same settings")

    title = recipe.title
    repo_id = push.repo_id if push is not None else shown_folder(recipe.run.output_dir)
    adaptations = add_statistics(recipe, trainer, train_data)
    settings = trainer.settings()
    if processes.is_main_process:
        clear_model(folder)  # old figures go before new weights come
    tuned, to_save = plain_model(trainer, folder)
    if processes.is_main_process:
        saving.save("the weights", lambda: save_trained(to_save, folder))
        source = recipe.source if push is None else without_paths(recipe.source)
        saving.save("recipe.yaml", lambda: write_text(folder / "recipe.yaml", dump_recipe(source)))
    processes.wait_for_everyone()
    reports = evaluate(tuned, title, repo_id)
    if adaptations:
        by_method[title], reports = reports, []
    for title, adaptation in reversed(adaptations.items()):  # the one that is saved comes last
        for how in defence_settings(recipe.evaluation, recipe.defence_evaluation):
            found = evaluate(tuned, title, repo_id, how, adaptation)
            if adaptation is trainer.defence:
                reports += found
            else:
                by_method[f"{title}, {how.seen.name}"] = found
    compared = [report for rows in by_method.values() for report in rows]
    if processes.is_main_process:
        own = {
            title if report.defence is None else f"{title}, {report.attack_target}": reports[i : i + len(names)]
            for i, report in list(enumerate(reports))[:: len(names)]
        }
        by_task = {
            name: {title: rows[i] for title, rows in {**by_method, **own}.items()} for i, name in enumerate(names)
        }
        rows = [report for by_title in by_task.values() for report in by_title.values()]

        def show() -> None:
            about = f"before and after {title} ({rows[0].attack}, {recipe.training.threat_model()} in training)"
            print_table(table(rows, about))
            zeros = percent(max(r.zero_gradient_share for r in rows))
            print(f"exactly-zero input gradients in the attacks: at most {zeros}")
            if warning := blind_warning(rows):
                print(f"\n{warning}\n")

        def draw() -> str:
            plot(folder / "accuracy.png", rows)
            return "accuracy.png"

        def publish(info: CardInfo) -> None:
            saving.save("report.json", lambda: save_reports(folder / "report.json", reports, compared, card=info))
            saving.save("README.md", lambda: write_text(folder / "README.md", str(make_card(reports, compared, info))))

        saving.attempt("the table", show)
        classes = ", ".join(train_data.class_names[:10]) + (", ..." if len(train_data.class_names) > 10 else "")
        base = hub_name(recipe.model.name) or ""
        info = CardInfo(
            repo_id=repo_id,
            base_model=base,
            ancestor=None if base else named_base(recipe.model.name),
            training_data=f"{train_data.dataset_id}, split {train_data.split}, {len(train_data)} images of "
            f"{len(train_data.class_names)} classes ({classes}), {train_data.revision}",
            paper=replace(next(iter(adaptations.values())).paper, method="TAPT")
            if adaptations
            else recipe.objective.paper,
            settings=settings,
            template=recipe.prompt.template,
            class_names=train_data.class_names,
            limits=limits_of(base),
            datasets=[] if is_path(recipe.data.dataset) else [train_data.dataset_id],
            plot="accuracy.png",
            license="apache-2.0" if recipe.model.name == EMBEDDED_MODEL else None,
        )
        publish(info)
        if saving.attempt("accuracy.png", draw) is None:
            publish(replace(info, plot=None))
    processes.wait_for_everyone()
    saving.finish()
    load = f"\nload it: {loading_code(recipe, recipe.run.output_dir)}" if push is None else ""
    if processes.is_main_process:  # another machine's folder holds none of it
        saving.attempt("a line", lambda: say(f"saved to {folder}: {', '.join(saved_files(folder))}{load}"))
    if push is not None and processes.is_main_process:
        address = push_folder(folder, push.repo_id, token=push.token, private=push.private, revision=push.revision)
        say(f"pushed: {address}\nload it: {loading_code(recipe, push.repo_id)}")
    return reports


def saved_files(folder: Path) -> list[str]:
    """What a run leaves for others, in a few words."""
    adapter = folder / "adapter_model.safetensors"
    kinds = [f"adapter ({adapter.stat().st_size / 1000:.0f} kB)"] if adapter.is_file() else ["weights", "processor"]
    others = ("statistics.safetensors", "adaptation.json", "README.md", "report.json", "accuracy.png", "recipe.yaml")
    return [*kinds, *(name for name in others if (folder / name).is_file())]


def loading_code(recipe: Recipe, source: str) -> str:
    """How what was trained is loaded from a folder or repository."""
    if recipe.adaptations:
        without = "PeftModel.from_pretrained(clip, ...)"
        return f'TAPT.from_pretrained("{source}"), or without the defence {without}; see README.md'
    if recipe.prompts is not None:
        return f'PeftModel.from_pretrained(clip, "{source}")  # after import hf_robust_clip; see README.md'
    return f'CLIPForZeroShotClassification.from_pretrained("{source}")  # or transformers.CLIPModel'


def add_statistics(recipe: Recipe, trainer: RobustClipTrainer, data: ImageDataset) -> dict[str, TAPT]:
    """The recipe's adaptations with the statistics of trained prompts, which are made here; the first is given to the
    trainer. None for other methods.
    """
    from .training.named import TAPTTrainer

    if not isinstance(trainer, TAPTTrainer):
        return {}
    targets = trainer.collect_statistics(
        replace(data, augment=False).first(recipe.statistics.max_images),
        state_dir=Path(recipe.run.output_dir) / "state/statistics",
    )
    adaptations = {title: replace(adaptation, targets=targets) for title, adaptation in recipe.adaptations.items()}
    trainer.defence = next(iter(adaptations.values()))
    return adaptations


def save_trained(trained: Any, folder: Path) -> None:
    """Write a classifier, an adapter or a defended classifier."""
    from peft import PeftModel

    from .training.checkpoints import save_adapter

    if isinstance(trained, PeftModel):
        save_adapter(trained, folder)
        return
    with written_whole(folder) as draft:
        trained.save_pretrained(draft)


def rival_prompts(recipe: Recipe, method: str) -> ClipPromptConfig | None:
    """The prompts of a method that is compared: its own, but in no more layers than the recipe's."""
    own = build_prompts(method, None)
    if own is not None and recipe.prompts is not None:
        own.vision_depth = min(own.vision_depth, recipe.prompts.vision_depth)
        own.text_depth = min(own.text_depth, recipe.prompts.text_depth)
    return own


def make_trainer(
    recipe: Recipe, model: CLIPForZeroShotClassification, data: ImageDataset, save: bool
) -> RobustClipTrainer:
    """The trainer of the recipe's method, with its settings; `save=False` writes no checkpoints."""
    peft_config: PeftConfig | None = recipe.prompts
    if recipe.model.lora_rank is not None:
        from peft import LoraConfig

        targets = r".*vision_model.*\.(q_proj|k_proj|v_proj|out_proj)"
        peft_config = LoraConfig(r=recipe.model.lora_rank, lora_alpha=recipe.model.lora_alpha, target_modules=targets)
    from .training.config import on_its_own

    training = recipe.training if save else on_its_own(recipe.training)
    trainer = trainer_class(recipe.method)(model, training, recipe.objective, data, peft_config=peft_config)
    if trainer.defence is not None:
        trainer.defence = next(iter(recipe.adaptations.values()))
    start = recipe.model.name
    if start != EMBEDDED_MODEL and Path(start).is_dir():
        start = str(Path(start).resolve())  # from another folder a relative one might be taken for the Hub's
    for config in getattr(trainer.model, "peft_config", {}).values():
        config.base_model_name_or_path, config.revision = start, recipe.model.revision
    return trainer


def plain_model(trainer: RobustClipTrainer, folder: Path) -> tuple[CLIPForZeroShotClassification, Any]:
    """The trained classifier without wrappers or autocast, and what is to be saved of it.

    That is the classifier itself, LoRA merged into it; of prompts, which can't be merged, the adapter, with its
    defence if it has one. Sharded weights go through `folder`.
    """
    from .training.preparation import classifier_in

    core = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if "prompts" in trainer.settings():
        to_save = trainer.defended() if trainer.defence is not None else core
        return classifier_in(core).requires_grad_(False), to_save
    core = core.merge_and_unload() if hasattr(core, "merge_and_unload") else core
    return core, core


def evaluate(recipe: EvaluationRecipe) -> list[RobustnessReport]:
    """Evaluate checkpoints on every task under every attack; write report, table and plots to the output directory.

    Returns the reports of the checkpoint in question.
    """
    from .checkpoint_notes import known_templates, other_prompt, quoted, trained_templates
    from .evaluation.loop import adversarial_examples, evaluate_robustness
    from .hub import clear_states, dump_recipe
    from .names import task_titles, titles
    from .processes import join_processes, what_runs
    from .report import (
        blind_warning,
        percent,
        plot_accuracy,
        plot_examples,
        plot_tradeoff,
        print_table,
        save_csv,
        save_reports,
        table,
    )
    from .saving import Saving

    folder = Path(recipe.run.output_dir)
    check_writable(folder)
    processes = join_processes(use_cpu(recipe.run.device))
    saving = Saving(folder, processes.print)
    processes.print(f"evaluation: {what_runs(processes)}")
    if processes.is_local_main_process and recipe.run.overwrite:
        clear_states(folder)
    processes.wait_for_everyone()
    names = list(dict.fromkeys([*recipe.checkpoints, *([recipe.reference] if recipe.reference else [])]))
    called = titles(names)
    tasks = dict(zip(task_titles([(task.name, task.dataset) for task in recipe.tasks]), recipe.tasks, strict=True))
    templates: Sequence[str] = () if recipe.prompt.template is None else (recipe.prompt.template,)
    remarks: list[str | None] = []
    reports: list[RobustnessReport] = []
    under_first: list[RobustnessReport] = []  # by the first of the attacks
    strip: Any = None
    for name in names:
        own = recipe.model if name == recipe.model.name else ModelSettings(name)
        model = load_model(own).to(processes.device)
        defence = with_statistics(recipe, own)
        if name == recipe.model.name and not templates:
            templates = trained_templates(name, own.revision)
        trained = known_templates(name, own.revision)
        for title, task in tasks.items():
            data = load_data(task, model)
            model.set_classes(data.class_names, templates or data.templates)
            remarks.append(other_prompt(called[name], trained, model.templates))
            for settings in recipe.evaluations:
                attack = settings.attack.name(len(data.class_names))
                through = "" if settings.seen.name == "static" else f" {settings.seen.name}"
                prompt = f"prompt {quoted(model.templates)}"
                about = f"{len(data)} images, {attack}, {settings.precision_with(model)}, {prompt}"
                processes.print(f"{called[name]} on {title}: {about}")
                report = evaluate_robustness(
                    model,
                    data,
                    settings,
                    name=called[name],
                    task=title,
                    model_id=name,
                    processes=processes,
                    state_dir=folder / "state" / slug(f"{name} {title} {attack}{through}"),
                    progress=True,
                    defence=defence,
                )
                reports.append(report)
                if settings is recipe.evaluations[0]:
                    under_first.append(report)
            if strip is None and processes.is_main_process:
                first = partial(adversarial_examples, model, data, recipe.evaluations[0])
                strip = saving.attempt("examples.png", first) or ()
    own_reports = [report for report in reports if report.model == recipe.model.name]
    others = [report for report in reports if report.model != recipe.model.name]

    def show() -> None:
        print_table(table(reports, called[recipe.model.name]))
        share = percent(max(r.zero_gradient_share for r in reports))
        print(f"exactly-zero input gradients in the attacks: at most {share}")
        for line in filter(None, dict.fromkeys([*remarks, blind_warning(reports)])):
            print(f"\n{line}\n")
        for report in reports:
            if report.model == recipe.reference:
                print(self_check(report))

    if processes.is_main_process:
        saving.attempt("the table", show)
        saving.save("report.json", lambda: save_reports(folder / "report.json", own_reports, others))
        saving.save("report.csv", lambda: save_csv(folder / "report.csv", reports))
        saving.save("recipe.yaml", lambda: write_text(folder / "recipe.yaml", dump_recipe(recipe.source)))
        plots = {"accuracy.png": partial(plot_accuracy, folder / "accuracy.png", reports)}
        if strip:
            plots["examples.png"] = partial(plot_examples, folder / "examples.png", *strip)
        if len(names) > 1:
            radius = min(reports[0].robust_accuracy)
            plots["tradeoff.png"] = partial(plot_tradeoff, folder / "tradeoff.png", under_first, radius)
        for name, plot in plots.items():
            saving.attempt(name, plot)
    processes.wait_for_everyone()
    saving.finish()
    files = ("report.json", "report.csv", "recipe.yaml", "accuracy.png", "examples.png", "tradeoff.png")
    written = [name for name in files if (folder / name).is_file()]
    if processes.is_main_process:
        saving.attempt("a line", lambda: processes.print(f"saved to {folder}: {', '.join(written)}"))
    return own_reports


def with_statistics(recipe: EvaluationRecipe, model: ModelSettings) -> Defence | None:
    """The defence, with the statistics that lie beside the model if it needs some, and where the same method was saved
    there, with the settings of that one: what the recipe asks for goes before them. Raises OSError without statistics.
    """
    defence = recipe.defence
    if defence is None or not defence.learns():
        return defence
    from .defences.defended import DefendedClassifier

    saved = DefendedClassifier.from_pretrained(model.name, revision=model.revision).adapter
    fitted = {name: part for name, part in saved.fitted.items() if isinstance(part, defence.learns().get(name, ()))}
    if not fitted:
        raise OSError(
            f"{model.name!r} holds no statistics, which {defence.name} needs; train it with recipes/tapt.py."
        )
    if type(saved) is type(defence) and recipe.defence_settings.get("preset") is None:
        return replace(saved, **{name: getattr(defence, name) for name in recipe.defence_settings if name != "preset"})
    return replace(defence, **fitted)  # type: ignore[arg-type]


def self_check(report: RobustnessReport) -> str:
    """Whether the attack brought an undefended reference to about nothing, in one line."""
    from .report import percent

    radius, left = max(report.robust_accuracy.items())
    at = f"{report.attack} at {report.threat(radius)} on {report.task}"
    if left <= 0.05:
        return f"self-check: the undefended {report.name} falls to {percent(left)} under {at}: the attack works."
    return (
        f"self-check FAILED: the undefended {report.name} keeps {percent(left)} under {at}; "
        "the attack is too weak or the radius too small to tell robust from undefended."
    )


def slug(text: str) -> str:
    """A text as a folder name, with a hash that tells apart what the letters alone don't."""
    from hashlib import sha256

    return f"{re.sub(r'[^A-Za-z0-9]+', '-', text).strip('-')[-80:]}-{sha256(text.encode()).hexdigest()[:8]}"


def limits_of(model_name: str) -> str:
    """One sentence for the card."""
    if model_name == EMBEDDED_MODEL:
        return "A demonstration of 0.35 M parameters that knows nothing but pictures of handwritten digits."
    start = f"`{model_name}`" if model_name else "the checkpoint it started from"
    return f"It inherits what {start} can't do, and its biases."


def run_recipe(method: str, default_config: Path, description: str, argv: Sequence[str] | None = None) -> None:
    """The main function of a training script. A wrong setting ends it with one line and status 2."""
    argv = arguments_of(argv)
    if "-h" in argv or "--help" in argv:
        print(help_text(description, default_config, TRAINING_OPTIONS))
        return
    with one_line_errors():
        recipe = read_recipe(method, parse_arguments(argv, default_config))
        quiet_loading()
        with one_line_errors(lambda: left_behind(recipe.run, trained=True)):
            train(recipe)


def run_evaluation(default_config: Path, description: str, argv: Sequence[str] | None = None) -> None:
    """The main function of an evaluation script. A wrong setting ends it with one line and status 2."""
    argv = arguments_of(argv)
    if "-h" in argv or "--help" in argv:
        print(help_text(description, default_config, EVALUATION_OPTIONS))
        return
    with one_line_errors():
        recipe = read_evaluation(parse_arguments(argv, default_config, EVALUATION_SECTIONS))
        quiet_loading()
        with one_line_errors(lambda: left_behind(recipe.run, trained=False)):
            evaluate(recipe)


def arguments_of(argv: Sequence[str] | None) -> list[str]:
    """The words of a command line, by default this process's own, which forgets the tokens among them."""
    words = list(sys.argv[1:] if argv is None else argv)
    hide_arguments()
    return words


def quiet_loading() -> None:
    """Switch off the bars of loading and saving weights; training and attacks keep theirs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def left_behind(run: RunSettings, trained: bool) -> str:
    """Where a run that was stopped goes on."""
    from .saving import left_by_evaluation, left_by_training

    return left_by_training(run.output_dir) if trained else left_by_evaluation(run.output_dir)


@contextmanager
def one_line_errors(left: Callable[[], str] = lambda: "nothing was begun.") -> Iterator[None]:
    """What a user can mend ends the program with one line and status 2; an interruption, with one line and status 130.

    Args:
        left: what can be gone on from, for an interruption and a disk that is full.
    """
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    heard = before not in (signal.SIG_IGN, None) and current_thread() is main_thread()

    def interrupt(*signals: Any) -> None:
        asked.append(signal.SIGINT)
        raise KeyboardInterrupt

    try:
        if heard:
            signal.signal(signal.SIGINT, interrupt)
        yield
    except BaseException as error:
        if asked or isinstance(error, KeyboardInterrupt):  # workers that were interrupted too bring up other errors
            if os.environ.get("RANK", "0") == "0":
                print(f"\ninterrupted: {left()}", file=sys.stderr)
            raise SystemExit(130) from None
        if isinstance(error, NotWritten):
            fail(NotWritten(f"{error} {left()}"))
        if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)):
            fail(error)
        raise
    finally:
        if heard:
            signal.signal(signal.SIGINT, before)


def fail(error: Exception) -> NoReturn:
    """Print an error in one line and exit with status 2; HF_ROBUST_CLIP_TRACEBACK=1 shows where it came from.

    Neither holds an access token.
    """
    if os.environ.get("HF_ROBUST_CLIP_TRACEBACK") == "1":
        whole = "".join(traceback.format_exception(error))
        if without_tokens(whole) == whole:
            raise error
        print(without_tokens(whole), file=sys.stderr)
        raise SystemExit(2)
    line = " ".join(part.strip() for part in without_tokens(str(error)).splitlines()) or type(error).__name__
    after_bar = isinstance(error, FloatingPointError | NotWritten)
    print(f"\nerror: {line}" if after_bar else f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """`hf-robust-clip {train METHOD, evaluate, card}`: see `USAGE`."""
    words = [
        part
        for word in arguments_of(argv)
        for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    config = None
    if "--config" in words:
        config = Path([*words, ""][words.index("--config") + 1])
    if words[:1] == ["train"] and words[1:2] and words[1] in METHODS and config:
        run_recipe(words[1], config, f"Fine-tune CLIP by {words[1]}.", words[2:])
    elif words[:1] == ["evaluate"] and config:
        run_evaluation(config, "Evaluate checkpoints.", words[1:])
    elif words[:1] == ["card"] and len(words) == 2 and not words[1].startswith("-"):
        with one_line_errors():
            from .report.card import regenerate_card

            write_text(Path(words[1]) / "README.md", str(regenerate_card(words[1])))
            print(f"wrote {Path(words[1]) / 'README.md'}")
    else:
        print(USAGE)
        raise SystemExit(0 if {"-h", "--help"} & set(words) else 2)
