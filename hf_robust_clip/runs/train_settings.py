"""What a training is asked for: flags and YAML to one checked value. Nothing is written or downloaded here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig

from .. import unused_settings as unused
from ..arguments import (
    DataArguments,
    DefenceEvaluation,
    EvaluationArguments,
    Images,
    ModelArguments,
    TrainingRunArguments,
    TuneArguments,
    check_folder,
)
from ..attacks.suites import Suite
from ..command_line import ClassFlag, CommandLine, Given, class_at, class_path, read_command
from ..defences import judging
from ..defences.base import Defence
from ..evaluation.attack_views import Adaptive, AdaptiveWorst, Static
from ..evaluation.settings import EvaluationSettings
from ..hub import Push, check_base, check_push
from ..modeling import DESCRIPTION
from ..names import shown_name, task_titles
from ..objectives.base import Objective
from ..prompts import ClipPromptConfig
from ..report.card import card_state
from ..secrets import without_token_keys
from ..training.config import (
    RobustClipConfig,
    check_augmentation,
    check_start_of_attack,
    check_trained_part,
    check_views,
    default_of,
)
from ..typed_settings import typed_text
from . import card_pictures, shared, tune
from .search_space import Dimension
from .shared import SUITES

LORA_TARGETS = r".*vision_model.*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
OBJECTIVE = ClassFlag(Objective, ("hf_robust_clip.objectives",))
COMMAND = CommandLine(
    groups={
        "": (ModelArguments, DataArguments, TrainingRunArguments, RobustClipConfig),
        "prompts": (ClipPromptConfig,),
        "tune": (TuneArguments,),
        "evaluation": (EvaluationArguments,),
        "defence_evaluation": (DefenceEvaluation,),
    },
    classes={
        "objective": OBJECTIVE,
        "defence": ClassFlag(Defence, ("hf_robust_clip.defences",)),
        "evaluation.attack": ClassFlag(Suite, SUITES, names=True),
        "defence_evaluation.attack": ClassFlag(Suite, SUITES),
    },
    required=("dataset_name", "objective", "output_dir", "evaluation.radii"),
    skip=frozenset(
        ["evaluation.attacks", "evaluation.view", "evaluation.eot"]
        + [f"prompts.{f.name}" for f in fields(ClipPromptConfig) if f.name not in unused.PROMPTS]
    ),
)


@dataclass(frozen=True)
class Method:
    """What is trained: a loss, in the image encoder or in an adapter."""

    objective: Objective
    adapter: PeftConfig | None

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.objective.title(self.adapter.design if isinstance(self.adapter, ClipPromptConfig) else None)


@dataclass(frozen=True, kw_only=True)
class TrainingRun(TrainingRunArguments):
    """What a training is about, checked, and all else that it needs."""

    tasks: Sequence[Images]
    model: ModelArguments
    data: Images
    method: Method
    rivals: tuple[Method, ...]
    training: RobustClipConfig
    evaluation: EvaluationSettings
    defences: dict[str, Defence]  # by title; the first is saved
    through: EvaluationSettings | None  # how defences are attacked, beside blindly
    defended_images: int | None  # of each task
    output_dir: str
    resume: bool
    push: Push | None
    texts: shared.Texts
    tune: TuneArguments = field(default_factory=TuneArguments)
    space: tuple[Dimension, ...] = ()  # what is searched before the training
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def titled(self) -> dict[str, Images]:
        """The tasks by what tables call them."""
        names = task_titles([(task.name, task.dataset) for task in self.tasks])
        return dict(zip(names, self.tasks, strict=True))

    @property
    def title(self) -> str:
        """What tables call the trained model without a defence."""
        return self.method.title

    @property
    def adds_adapter(self) -> bool:
        """Whether prompts are trained, which can't be merged into the weights."""
        return isinstance(self.method.adapter, ClipPromptConfig)


def read(words: Sequence[str], default_config: Path, description: str = "") -> TrainingRun:
    """Check every setting. Nothing is written or downloaded here."""
    given = read_command(COMMAND, words, default_config, description, _prepare_settings)
    made = given.made()
    model, data, about = (given.group(cls, made) for cls in (ModelArguments, DataArguments, TrainingRunArguments))
    resume = given.asked("resume_from_checkpoint") not in (None, "false")
    check_output(given, model, about.overwrite, resume)
    method = Method(about.objective, _adapter(given, made, type(about.objective), model))
    defaults = {**unused.defaults_of(RobustClipConfig), **unused.defaults_of(ModelArguments)}
    unused.check_training(given, defaults, fits=about.defence is not None)
    training = training_arguments(given, made)
    rivals = _rivals(about, method, given)

    def check(args: RobustClipConfig, objective: Objective, adapter: PeftConfig | None = method.adapter) -> None:
        check_augmentation(args, data.augment)
        check_start_of_attack(args, objective)
        check_views(objective, data.augment)
        check_trained_part(args, adapter is not None)

    for own in (method, *rivals):
        check(training, own.objective, own.adapter)
    (blind,) = made.evaluation.settings()
    if blind.seen.of_defence:
        raise ValueError(
            f"evaluation.attack={made.evaluation.attack!r} attacks a defence, and this section evaluates models "
            "without one; a defence is attacked by defence_evaluation."
        )
    about = replace(about, defence=judging(about.defence, method.objective.judged_by))
    defences = _defences(given, about.defence, method, made.defence_evaluation)
    if about.descriptions is not None and given.asked("template") is None:
        about = replace(about, template=DESCRIPTION)
    texts = shared.texts_asked(about.template, about.descriptions)
    tasks = tuple(about.tasks or ()) if given.asked("tasks") is not None else (_own_test(data),)
    shared.check_tasks(tasks, described=texts.descriptions is not None)
    run = TrainingRun(
        **{**vars(about), "tasks": tasks},
        model=model,
        data=data.images(data.dataset_train_split),
        method=method,
        rivals=rivals,
        training=training,
        evaluation=blind,
        defences=defences,
        through=_through(blind, made.defence_evaluation) if defences else None,
        defended_images=made.defence_evaluation.max_images,
        output_dir=str(given.asked("output_dir")),
        resume=resume,
        push=push_of(training),
        texts=texts,
        tune=made.tune,
        source={**without_token_keys(given.settings), "template": about.template},
    )
    if run.held_out_images is not None:
        check_held_out(run)
    card_pictures.check_licensed(run.card_pictures, run.titled)
    if run.card_pictures and method.objective.judged_by is not None:
        raise ValueError(f"card_pictures={run.card_pictures!r}: {method.title} has no logits without its defence.")
    if run.tune.trials is not None:
        run = replace(run, space=tune.space_of(run, check))
    if run.push is not None:
        check_push(run.push, "hub_model_id")
        if run.adds_adapter:
            check_base(model.model_name_or_path, "hub_model_id: the adapter")
    return run


def check_output(given: Given, model: ModelArguments, overwrite: bool, resume: bool) -> None:
    """Raise ValueError/OSError for an output folder that can't be written to without harm."""
    folder = str(given.asked("output_dir"))
    if overwrite and resume:
        raise ValueError("overwrite=true deletes what resume_from_checkpoint would go on from; choose one.")
    check_folder(folder, model.model_name_or_path, overwrite or resume)
    if card_state(Path(folder, "README.md")) == "theirs":
        raise OSError(
            f"{Path(folder, 'README.md')} is no card of this package, and the run writes one there; move it, or name "
            "another folder."
        )


def training_arguments(given: Given, made: Any) -> RobustClipConfig:
    """The Trainer's arguments; a checkpoint to go on from is the output folder's own."""
    import torch

    own = given.asked("resume_from_checkpoint")
    if own not in (None, "true", "false"):
        raise ValueError(f"resume_from_checkpoint={own!r} must be true: a run goes on in its own output_dir.")
    names = [f.name for f in fields(RobustClipConfig) if f.init and f.name in made]
    values = {name: made[name] for name in names if name != "resume_from_checkpoint" and given.asked(name) is not None}
    if given.asked("held_out_images") is not None:
        values = {**evaluations_as_saved(values), **values}
    return RobustClipConfig(**{**values, "use_cpu": given.asked("use_cpu") is True or not torch.cuda.is_available()})


def evaluations_as_saved(values: dict[str, Any]) -> dict[str, Any]:
    """Where training images are held out: evaluate when a checkpoint is saved, and keep the most robust one."""
    when = str(getattr(values.get("save_strategy"), "value", values.get("save_strategy", "steps")))
    found = {"load_best_model_at_end": True, "metric_for_best_model": "robust_accuracy"}
    if when in ("steps", "epoch"):
        found["eval_strategy"] = when
    if when == "steps":
        found["eval_steps"] = values.get("save_steps", default_of("save_steps"))
    return found


def check_held_out(run: TrainingRun) -> None:
    """Raise ValueError for what doesn't go with evaluations on held-out training images."""
    told, args = f"held_out_images={run.held_out_images!r}", run.training
    if run.rivals:
        raise ValueError(f"compare={list(run.compare)!r} with {told}: no checkpoint of theirs is chosen; leave one.")
    if run.defences:
        raise ValueError(f"defence with {told}: its clean training has no evaluations; leave one.")
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        raise ValueError(f"{told} does nothing without evaluations; set eval_strategy.")
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    if metric not in (known := ("robust_accuracy", "clean_accuracy", "loss")):
        raise ValueError(f"metric_for_best_model={args.metric_for_best_model!r} must be one of {', '.join(known)}.")


def push_of(training: RobustClipConfig) -> Push | None:
    """Where the finished folder is uploaded to."""
    if not training.push_to_hub:
        return None
    repo_id = training.hub_model_id or Path(str(training.output_dir)).absolute().name
    return Push(repo_id, training.hub_token, training.hub_private_repo, training.hub_revision)


def _own_test(data: DataArguments) -> Images:
    """All test images of what is trained on."""
    whole = replace(data, resize=None, streaming=False, max_images=None, shots=None, shots_seed=0, augment=False)
    return replace(whole.images(data.dataset_test_split), name=shown_name(str(data.dataset_name)))


def _prepare_settings(file: dict[str, Any], options: dict[str, str]) -> None:
    """`compare` as a list; the tasks of suites in the place of their names; and where the flags ask for another design
    of prompts than the file, nothing of its own.
    """
    shared.as_list("compare", file, options)
    _check_not_fixed(file, options)
    shared.expand_suites(file, options, template=shared.asks_for_texts(file, options, "descriptions"))
    prompts = file.get("prompts")
    if isinstance(prompts, dict) and options.get("prompts.design") not in (None, prompts.get("design")):
        for key in unused.unused_by_design(options["prompts.design"], prompts):
            del prompts[key]


def _check_not_fixed(file: dict[str, Any], options: dict[str, str]) -> None:
    """Raise ValueError for a flag that says what a search is to find. The values of a YAML file are where it stands
    without one.
    """
    space = typed_text(options["tune.space"]) if "tune.space" in options else (file.get("tune") or {}).get("space")
    whole = typed_text(options["objective"]) if "objective" in options else None
    inside = (whole.get("init_args") or {}) if isinstance(whole, dict) else {}
    for name in space if isinstance(space, dict) else ():
        if name in options or name in [f"objective.{own}" for own in inside]:
            raise ValueError(f"--{name} is given, and tune.space searches it; leave one of them out.")


def _adapter(given: Given, made: Any, objective: type[Objective], model: ModelArguments) -> PeftConfig | None:
    """LoRA, or prompts: the objective's own, changed by what was asked for."""
    own, default = given.asked("prompts"), copy.deepcopy(objective.peft_config)
    if model.use_peft:
        if own or default is not None:
            raise ValueError("use_peft=true and prompts don't go together; choose one.")
        return LoraConfig(r=model.lora_r, lora_alpha=model.lora_alpha, target_modules=LORA_TARGETS)
    if not own:
        return default
    config = made.prompts
    if default is not None and "design" not in own:
        config = ClipPromptConfig(**{**default.to_dict(), **{key: getattr(config, key) for key in own}})
    unused.check_prompts(given, config)
    return config


def _rivals(about: TrainingRunArguments, method: Method, given: Given) -> tuple[Method, ...]:
    """What is trained by the same settings and shown beside: prompts in no more layers than the method's.

    Raises ValueError for one that is there twice, one that LoRA would displace, and one that tables call the same.
    """
    names = list(about.compare)
    found: list[Method] = []
    for name in names:
        cls = class_at(class_path(name, OBJECTIVE, "compare"))
        if cls in [type(other.objective) for other in (method, *found)]:
            raise ValueError(f"compare={names!r} names {name!r}, which is trained already; name others.")
        adapter: PeftConfig | None = copy.deepcopy(cls.peft_config)
        if isinstance(method.adapter, LoraConfig):
            if adapter is not None:
                raise ValueError(f"compare={names!r}: {name} trains prompts, which don't go with use_peft.")
            adapter = method.adapter
        if isinstance(adapter, ClipPromptConfig) and isinstance(method.adapter, ClipPromptConfig):
            adapter.vision_depth = min(adapter.vision_depth, method.adapter.vision_depth)
            adapter.text_depth = min(adapter.text_depth, method.adapter.text_depth)
        rival = Method(cls(), adapter)
        if rival.objective.judged_by is not None:
            raise ValueError(f"compare={names!r}: {name} is judged by a defence; train it by itself (--objective).")
        if rival.title in [other.title for other in (method, *found)]:
            raise ValueError(f"compare={names!r}: {rival.title} is what is trained already.")
        found.append(rival)
    return tuple(found)


def _defences(
    given: Given, defence: Defence | None, method: Method, evaluation: DefenceEvaluation
) -> dict[str, Defence]:
    """The defence as it is saved and, by the presets' names, as it is evaluated beside; by what tables call it."""
    if defence is None:
        return {}
    if not isinstance(method.adapter, ClipPromptConfig):
        raise ValueError(
            f"defence={type(defence).__name__} is saved with prompts, and {method.title} trains none here; evaluate "
            "it on the finished model by `hf-robust-clip evaluate --defence`."
        )
    design = method.adapter.design
    own = given.presets.get("defence")
    presets = list(evaluation.presets)
    for name in presets:
        if name == own or presets.count(name) > 1:
            raise ValueError(
                f"defence_evaluation.presets={presets!r} names {name!r}, which is evaluated already; name others."
            )
    called = f"{type(defence).__name__}-{design}"
    found = {}
    for preset in (own, *presets):
        again = defence if preset is None else given.with_preset("defence", preset).made().defence
        unused.check_defence(given, again)
        found[f"{called} {preset}" if preset else called] = again
    return found


def _through(blind: EvaluationSettings, defence: DefenceEvaluation) -> EvaluationSettings:
    """How a defence is attacked through itself. Raises ValueError for a radius at which nothing else is attacked."""
    radius = blind.radii[0] if defence.radius is None else defence.radius
    suite = AdaptiveWorst() if defence.attack is None else defence.attack
    view = Adaptive() if suite.about is None else Static()
    how = replace(blind, radii=[radius], batch_size=defence.batch_size, attack=suite, view=view, eot=defence.eot)
    if defence.eot > 1 and all(member.by_queries for member in suite.members(10)):
        raise ValueError(f"defence_evaluation.eot={defence.eot!r} does nothing with {suite!r}, without gradients.")
    if how.threat_models()[0] not in blind.threat_models():
        raise ValueError(
            f"defence_evaluation.radius={radius!r} must be one of evaluation.radii={list(blind.radii)!r}, at which "
            "the model is attacked without the defence."
        )
    return how
