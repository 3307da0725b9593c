"""Command lines: YAML and dotted overrides to settings, strings to classes, and the run itself.

Nothing heavy is imported before the settings have been read, so that `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import copy
import difflib
import os
import shutil
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

if TYPE_CHECKING:
    from accelerate import PartialState

    from .evaluation import EvaluationSettings
    from .modeling import CLIPForZeroShotClassification
    from .report import RobustnessReport
    from .trainer import RobustClipConfig, RobustClipTrainer
    from .zero_shot_data.loading import ImageDataset

METHODS = {
    "pmg_aft": "PMGAFTTrainer",
    "tecoa": "TeCoATrainer",
    "fare": "FARETrainer",
    "trades": "TRADESTrainer",
    "clean": "CleanTrainer",
}
EMBEDDED_MODEL = "digits-clip"


@dataclass(frozen=True)
class ModelSettings:
    """What is fine-tuned: a Hub id, a folder or `digits-clip` (shipped with the package)."""

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
    class_names: Sequence[str] | None = None
    label_column: str | None = None
    resize: int | None = None  # shorter side before the centre crop; None takes the processor's


@dataclass(frozen=True)
class PromptSettings:
    """How class names become texts."""

    template: str = "This is a photo of a {}"


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
    training: RobustClipConfig
    evaluation: EvaluationSettings
    tasks: tuple[DataSettings, ...]
    compare: tuple[str, ...]
    run: RunSettings
    source: dict[str, Any] = field(default_factory=dict)


SECTIONS = ("model", "data", "prompt", "objective", "training", "evaluation", "tasks", "compare", "run")


def help_text(description: str, config: Path) -> str:
    """What `--help` prints: usage, and the default config with its comments."""
    return (
        f"{description.strip()}\n\n"
        "options:\n"
        "  --config FILE          a YAML file in place of the default below\n"
        "  --section.key VALUE    override any value below (VALUE is read as YAML); training.* takes every field of\n"
        "                         RobustClipConfig, a transformers.TrainingArguments\n"
        f"  --compare METHOD       also train by METHOD ({', '.join(METHODS)}; a list is written '[tecoa, fare]')\n"
        "  --output_dir DIR, --overwrite, --resume   short for --run.output_dir DIR, --run.overwrite true, ...\n\n"
        f"default config ({config.name}):\n\n{config.read_text(encoding='utf-8')}"
    )


def parse_arguments(argv: Sequence[str], default_config: Path) -> dict[str, Any]:
    """Command line to nested plain settings: the YAML file, then the dotted overrides in their order.

    Raises ValueError for a missing value, an unknown section, or an option that is none of ours; OSError for a missing
    file.
    """
    overrides: list[tuple[str, Any]] = []
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
        key = f"run.{key}" if key in ("output_dir", "overwrite", "resume", "device") else key
        if key == "config":
            config = Path(value)
        else:
            overrides.append((key, parse_yaml(value, f"--{key}")))
    if not config.is_file():
        raise OSError(f"--config {str(config)!r} is not a file.")
    settings = parse_yaml(config.read_text(encoding="utf-8"), str(config)) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config} must hold sections: {', '.join(SECTIONS)}.")
    for section in settings:
        check_key(section, SECTIONS, f"section in {config.name}")
    for key, value in overrides:
        section, _, rest = key.partition(".")
        check_key(section, SECTIONS, "option --" + key)
        if section in ("compare", "tasks") and not rest:
            settings[section] = value
        elif not rest or "." in rest:
            raise ValueError(f"--{key} is not of the form --section.key.")
        else:
            settings[section] = {**(settings.get(section) or {}), rest: value}
    return settings


def parse_yaml(text: str, what: str) -> Any:
    """What a YAML text says. Raises ValueError in one line if it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is not YAML: {' '.join(str(error).split())}") from error


def check_key(key: str, known: Sequence[str], what: str) -> None:
    """Raise ValueError, with the nearest known name, unless `key` is one of `known`."""
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
        raise ValueError(f"unknown {what}: {key!r}; {hint}")


def build(cls: type, values: Mapping[str, Any] | None, section: str) -> Any:
    """A settings dataclass from plain values. Raises ValueError naming section and key for what doesn't fit."""
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"{section}={values!r} must hold keys.")
    values = dict(values or {})
    accepted = {f.name: f for f in fields(cls) if f.init}
    for key in values:
        check_key(key, list(accepted), f"key in {section}")
    for name, f in accepted.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in values:
            raise ValueError(f"{section}.{name} is missing.")
    hints = get_type_hints(cls)
    return cls(**{key: coerce(value, hints[key], f"{section}.{key}") for key, value in values.items()})


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
    raise ValueError(f"{name}={value!r} must be {kinds}.")


def build_objective(method: str, values: Mapping[str, Any] | None) -> Any:
    """The method's objective; `preset: paper|released` (PMG-AFT) chooses what the other keys start from."""
    objective_cls = trainer_class(method).objective_cls
    values = dict(values or {})
    preset = values.pop("preset", None)
    if preset is None:
        return build(objective_cls, values, "objective")
    presets = {
        n.removesuffix("_preset"): getattr(objective_cls, n) for n in dir(objective_cls) if n.endswith("_preset")
    }
    check_key(preset, list(presets) or ["(none for this method)"], "objective.preset")
    base = presets[preset]()
    given = build(objective_cls, values, "objective")
    return replace(base, **{key: getattr(given, key) for key in values})


def trainer_class(method: str) -> type[RobustClipTrainer]:
    """The trainer of a method's name. Raises ValueError for an unknown one."""
    check_key(method, list(METHODS), "method")
    return getattr(import_module(".trainer", __package__), METHODS[method])


def read_recipe(method: str, settings: dict[str, Any]) -> Recipe:
    """Check every section and make its settings. Nothing is written or downloaded here."""
    run = build(RunSettings, settings.get("run"), "run")
    check_output_dir(run)
    from .evaluation import EvaluationSettings
    from .trainer import RobustClipConfig

    model = build(ModelSettings, settings.get("model"), "model")
    data = build(DataSettings, settings.get("data"), "data")
    tasks = settings.get("tasks") or [{"dataset": data.dataset, "split": "test", "name": data.dataset}]
    if not isinstance(tasks, list):
        raise ValueError(f"tasks={tasks!r} must be a list of datasets to evaluate on.")
    compare = settings.get("compare") or []
    compare = [compare] if isinstance(compare, str) else compare
    if not isinstance(compare, list):
        raise ValueError(f"compare={compare!r} must be a method or a list of methods.")
    for other in compare:
        check_key(other, list(METHODS), "method in compare")
    evaluation = build(EvaluationSettings, settings.get("evaluation"), "evaluation")
    evaluation.threats()
    settings_of_tasks = tuple(build(DataSettings, task, f"tasks[{i}]") for i, task in enumerate(tasks))
    names = [task.name or task.dataset for task in settings_of_tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tasks have the name {name!r}; give each its own by `name`.")
    for section, chosen in (("data", data), *((f"tasks[{i}]", task) for i, task in enumerate(settings_of_tasks))):
        if chosen.max_images is not None and chosen.max_images < 1:
            raise ValueError(f"{section}.max_images={chosen.max_images!r} must be at least 1.")
    if run.push_to_hub is not None:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(run.push_to_hub)
    training = {"output_dir": run.output_dir, **(settings.get("training") or {}), "use_cpu": use_cpu(run.device)}
    return Recipe(
        method=method,
        model=model,
        data=data,
        prompt=build(PromptSettings, settings.get("prompt"), "prompt"),
        objective=build_objective(method, settings.get("objective")),
        training=build(RobustClipConfig, training, "training"),
        evaluation=evaluation,
        tasks=settings_of_tasks,
        compare=tuple(other for other in dict.fromkeys(compare) if other != method),
        run=run,
        source=settings,
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


def load_model(settings: ModelSettings) -> CLIPForZeroShotClassification:
    """The model to start from, in eval mode."""
    from .digits_clip import digits_clip_path
    from .modeling import CLIPForZeroShotClassification

    name = digits_clip_path() if settings.name == EMBEDDED_MODEL else settings.name
    return CLIPForZeroShotClassification.from_pretrained(name, revision=settings.revision or "main").eval()


def load_data(settings: DataSettings, model: CLIPForZeroShotClassification) -> ImageDataset:
    """The pictures that settings ask for, prepared for the model."""
    from .zero_shot_data.loading import load_image_dataset

    data = load_image_dataset(
        settings.dataset,
        settings.split,
        model.require_processor(),
        data_root=settings.data_root,
        revision=settings.revision,
        class_names=settings.class_names,
        label_column=settings.label_column,
        resize=settings.resize,
    )
    return (data if settings.classes is None else data.only(settings.classes)).first(settings.max_images)


def train(recipe: Recipe) -> list[RobustnessReport]:
    """Evaluate, fine-tune, evaluate again, compare; write checkpoint, report, plot and card to the output directory.

    Returns the fine-tuned model's reports, one for each task.
    """
    from .model_card import CardInfo, make_card
    from .report import percent, plot_accuracy, save_reports, to_table
    from .trainer import newest_whole_checkpoint

    folder = Path(recipe.run.output_dir)
    model = load_model(recipe.model)
    train_data, tasks = load_data(recipe.data, model), [load_data(task, model) for task in recipe.tasks]
    names = [task.name or task.dataset for task in recipe.tasks]
    model.set_classes(train_data.class_names, recipe.prompt.template)  # a bad class name fails here, before any work
    processes = join_processes(recipe.training)
    say = processes.print
    say(f"{recipe.method}: {len(train_data)} images, {len(train_data.class_names)} classes, "
        f"{processes.num_processes} process(es) on {processes.device.type}")  # fmt: skip

    def evaluate(subject: CLIPForZeroShotClassification, title: str, model_id: str) -> list[RobustnessReport]:
        from .evaluation import evaluate_robustness

        subject.to(processes.device)
        found = []
        for data, task in zip(tasks, names, strict=True):
            subject.set_classes(data.class_names, recipe.prompt.template)
            found.append(
                evaluate_robustness(
                    subject, data, recipe.evaluation, name=title, task=task, model_id=model_id, processes=processes
                )
            )
        subject.set_classes(train_data.class_names, recipe.prompt.template)
        return found

    if processes.is_main_process and recipe.run.overwrite:
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
    processes.wait_for_everyone()
    by_method = {"undefended": evaluate(model, "undefended", recipe.model.name)}
    for other in recipe.compare:
        rival = load_model(recipe.model)
        rival.set_classes(train_data.class_names, recipe.prompt.template)
        objective = build_objective(other, None)
        trainer = make_trainer(recipe, other, rival, objective, train_data, save=False)
        trainer.train()
        title = objective.paper.method
        rival = plain_model(trainer, folder / "compared" / other)
        by_method[title] = evaluate(rival, title, f"{title} from {recipe.model.name}, same settings")

    trainer = make_trainer(recipe, recipe.method, model, recipe.objective, train_data, save=True)
    resume = recipe.run.resume and newest_whole_checkpoint(folder) is not None
    trainer.train(resume_from_checkpoint=True if resume else None)
    tuned = plain_model(trainer, folder)
    title = recipe.objective.paper.method
    repo_id = recipe.run.push_to_hub or recipe.run.output_dir
    reports = evaluate(tuned, title, repo_id)
    compared = [report for rows in by_method.values() for report in rows]
    if processes.is_main_process:
        tuned.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.source, sort_keys=False, allow_unicode=True))
        save_reports(folder / "report.json", reports, compared)
        by_task = {
            name: {title: rows[i] for title, rows in {**by_method, title: reports}.items()}
            for i, name in enumerate(names)
        }
        plot_accuracy(folder / "accuracy.png", by_task)
        classes = ", ".join(train_data.class_names[:10]) + (", ..." if len(train_data.class_names) > 10 else "")
        info = CardInfo(
            repo_id=repo_id,
            base_model=f"./{recipe.model.name}" if Path(recipe.model.name).is_dir() else recipe.model.name,
            training_data=f"{recipe.data.dataset}, split {train_data.split}, {len(train_data)} images of "
            f"{len(train_data.class_names)} classes ({classes}), {train_data.revision}",
            paper=recipe.objective.paper,
            settings=trainer.settings(),
            template=recipe.prompt.template,
            class_names=train_data.class_names,
            limits=limits_of(recipe.model.name),
            datasets=[recipe.data.dataset],
            plot="accuracy.png",
            license="apache-2.0" if recipe.model.name == EMBEDDED_MODEL else None,
        )
        make_card(reports, compared, info).save(folder / "README.md")
        from rich.console import Console

        rows = [report for by_title in by_task.values() for report in by_title.values()]
        table = to_table(
            rows, f"before and after {title} ({reports[0].attack}, {recipe.training.threat_model()} in training)"
        )
        Console(width=max(100, shutil.get_terminal_size().columns)).print(table)
        say(
            f"exactly-zero input gradients in the attacks: at most {percent(max(r.zero_gradient_share for r in rows))}"
        )
        if recipe.run.push_to_hub:
            say(f"pushed: {push_folder(folder, recipe.run.push_to_hub)}")
        say(f"saved to {folder}: weights, processor, README.md, report.json, accuracy.png, recipe.yaml")
        say(f'load it: CLIPForZeroShotClassification.from_pretrained("{repo_id}")  # or transformers.CLIPModel')
    processes.wait_for_everyone()
    return reports


def join_processes(training: RobustClipConfig) -> PartialState:
    """The processes that were launched together. Raises ValueError if fewer joined than were launched."""
    from accelerate import PartialState

    processes = PartialState(cpu=training.use_cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if processes.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but {processes.num_processes} joined: each would train alone. "
            "Use one of the accelerate configs in recipes/accelerate."
        )
    return processes


def make_trainer(
    recipe: Recipe, method: str, model: CLIPForZeroShotClassification, objective: Any, data: ImageDataset, save: bool
) -> RobustClipTrainer:
    """The trainer of a method, with the recipe's settings; `save=False` writes no checkpoints."""
    peft_config = None
    if recipe.model.lora_rank is not None:
        from peft import LoraConfig

        targets = r".*vision_model.*\.(q_proj|k_proj|v_proj|out_proj)"
        peft_config = LoraConfig(r=recipe.model.lora_rank, lora_alpha=recipe.model.lora_alpha, target_modules=targets)
    training = recipe.training if save else without_checkpoints(recipe.training)
    return trainer_class(method)(model, training, objective, data, peft_config=peft_config)


def without_checkpoints(training: RobustClipConfig) -> RobustClipConfig:
    """The same settings for a run that saves nothing."""
    quiet = copy.copy(training)
    quiet.set_save("no")
    return quiet


def plain_model(trainer: RobustClipTrainer, folder: Path) -> CLIPForZeroShotClassification:
    """The trained model without wrappers or autocast, adapters merged; sharded weights go through `folder`."""
    from accelerate.utils import DistributedType

    if trainer.accelerator.distributed_type == DistributedType.FSDP:
        from .modeling import CLIPForZeroShotClassification

        trainer.save_model(str(folder))
        trainer.accelerator.wait_for_everyone()
        return CLIPForZeroShotClassification.from_pretrained(folder).eval()
    core = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    return core.merge_and_unload() if hasattr(core, "merge_and_unload") else core


def limits_of(model_name: str) -> str:
    """One sentence for the card."""
    if model_name == EMBEDDED_MODEL:
        return "A demonstration of 0.35 M parameters that knows nothing but pictures of handwritten digits."
    return f"It inherits what `{model_name}` can't do, and its biases."


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload a finished output directory, checkpoints left out; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="Upload robust CLIP",
        ignore_patterns=["checkpoint-*", "compared/*", "training_args.bin"],
    )
    return str(commit.repo_url)


def run_recipe(method: str, default_config: Path, description: str, argv: Sequence[str] | None = None) -> None:
    """The main function of a training script. A wrong setting ends it with one line and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(help_text(description, default_config))
        return
    try:
        recipe = read_recipe(method, parse_arguments(argv, default_config))
        from transformers.utils import logging

        logging.disable_progress_bar()  # the bars of loading and saving; training keeps its own
        train(recipe)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Print an error in one line and exit with status 2; HF_ROBUST_CLIP_TRACEBACK=1 shows where it came from."""
    if os.environ.get("HF_ROBUST_CLIP_TRACEBACK") == "1":
        raise error
    print(f"\nerror: {error}" if isinstance(error, FloatingPointError) else f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """`hf-robust-clip train METHOD --config FILE ...`."""
    words = [
        part
        for word in (sys.argv[1:] if argv is None else argv)
        for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if len(words) < 2 or words[0] != "train" or words[1] not in METHODS or "--config" not in words:
        print(f"usage: hf-robust-clip train {{{','.join(METHODS)}}} --config FILE [--section.key VALUE ...]")
        raise SystemExit(0 if {"-h", "--help"} & set(words) else 2)
    config = Path(words[words.index("--config") + 1]) if words.index("--config") + 1 < len(words) else Path()
    run_recipe(words[1], config, f"Fine-tune CLIP by {words[1]}.", words[2:])
