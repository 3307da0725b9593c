"""A training run: read what is asked for, prepare, fit, measure, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftConfig, PeftModel

from .. import unused_settings as unused
from ..arguments import (
    DataArguments,
    DefenceEvaluation,
    EvaluationArguments,
    Images,
    ModelArguments,
    TrainingRunArguments,
    check_folder,
)
from ..attacks.suites import Suite
from ..checkpoint_notes import named_base
from ..command_line import ClassFlag, CommandLine, Given, class_at, class_path, read_command
from ..defences.base import Defence
from ..digits_clip import EMBEDDED_MODEL
from ..evaluation import loop as evaluation
from ..evaluation.loop import AdaptiveWorst, EvaluationSettings
from ..hub import (
    Push,
    check_base,
    check_push,
    clear_checkpoints,
    clear_model,
    clear_states,
    dump_recipe,
    prepare_repository,
    push_folder,
)
from ..modeling import CLIPForZeroShotClassification
from ..names import hub_name, is_path, shown_folder, shown_name, task_titles, without_paths
from ..objectives.base import Objective
from ..processes import join_processes, what_runs
from ..prompts import ClipPromptConfig, check_prompts
from ..report import report as reporting
from ..report.card import CardInfo, card_state, make_card
from ..report.report import RobustnessReport
from ..saving import Saving, left_by_training
from ..secrets import without_token_keys
from ..storage import check_writable, write_text, written_whole
from ..training.checkpoints import NothingToResume
from ..training.config import RobustClipConfig, check_augmentation, check_start_of_attack, check_trained_part
from ..training.trainer import RobustClipTrainer, classifier_in, on_its_own, save_adapter
from ..zero_shot_data.loading import ImageDataset
from . import shared
from .interruptions import one_line_errors
from .methods import default_prompts, defended, fit_defences, make_trainer
from .shared import SUITES

LORA_TARGETS = r".*vision_model.*\.(q_proj|k_proj|v_proj|out_proj)"
OBJECTIVE = ClassFlag(Objective, ("hf_robust_clip.objectives",))
COMMAND = CommandLine(
    groups={
        "": (ModelArguments, DataArguments, TrainingRunArguments, RobustClipConfig),
        "prompts": (ClipPromptConfig,),
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
        ["evaluation.attacks", "evaluation.target", "evaluation.eot"]
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


@dataclass(frozen=True)
class TrainingRun:
    """Everything a training run needs, checked."""

    model: ModelArguments
    data: Images
    tasks: tuple[Images, ...]
    template: str
    method: Method
    rivals: tuple[Method, ...]
    training: RobustClipConfig
    evaluation: EvaluationSettings
    defences: dict[str, Defence]  # by title; the first is saved
    through: EvaluationSettings | None  # how defences are attacked, beside blindly
    defended_images: int | None  # of each task
    fit_images: int | None
    output_dir: str
    overwrite: bool
    resume: bool
    push: Push | None
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What tables call the trained model without a defence."""
        return self.method.title

    @property
    def adds_adapter(self) -> bool:
        """Whether prompts are trained, which can't be merged into the weights."""
        return isinstance(self.method.adapter, ClipPromptConfig)


@dataclass(frozen=True)
class Prepared:
    """A run with its model, its pictures and its processes."""

    run: TrainingRun
    model: CLIPForZeroShotClassification
    data: ImageDataset
    tasks: dict[str, ImageDataset]
    processes: PartialState
    saving: Saving
    push: Push | None

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.run.output_dir)

    @property
    def start(self) -> str:
        """What others know the first checkpoint by."""
        return shown_name(self.run.model.model_name_or_path)

    @property
    def repo_id(self) -> str:
        """What the trained model is called in its report."""
        return self.push.repo_id if self.push is not None else shown_folder(self.run.output_dir)


@dataclass(frozen=True)
class Fitted:
    """A trained model.

    Args:
        classifier: without wrappers or autocast.
        to_save: that classifier, or the adapter, or the defended classifier.
        defences: fitted, by title.
        settings: of the training, for the card.
    """

    classifier: CLIPForZeroShotClassification
    to_save: Any
    defences: dict[str, Defence]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """Reports of the trained model, and by title those of what it is compared with."""

    own: list[RobustnessReport]
    compared: dict[str, list[RobustnessReport]]


def main(words: Sequence[str], default_config: Path, description: str = "") -> None:
    """A training as a command. A wrong setting ends it with one line and status 2."""
    with one_line_errors():
        run = read(words, default_config, description)
        shared.quiet_loading()
        with one_line_errors(lambda: left_by_training(run.output_dir)):
            train(run)


def read(words: Sequence[str], default_config: Path, description: str = "") -> TrainingRun:
    """Check every setting. Nothing is written or downloaded here."""
    given = read_command(COMMAND, words, default_config, description, _prepare_settings)
    made = given.made()
    model, data, about = (given.group(cls, made) for cls in (ModelArguments, DataArguments, TrainingRunArguments))
    resume = given.asked("resume_from_checkpoint") not in (None, "false")
    check_output(given, model, about.overwrite, resume)
    method = Method(about.objective, _adapter(given, made, type(about.objective), model))
    unused.check_training(given, unused.defaults_of(RobustClipConfig), fits=about.defence is not None)
    training = training_arguments(given, made)
    rivals = _rivals(about, method, given)
    check_augmentation(training, data.augment)
    for own in (method, *rivals):
        check_start_of_attack(training, own.objective)
        check_trained_part(training, own.adapter is not None)
    (blind,) = made.evaluation.settings()
    if blind.target != "static":
        raise ValueError(
            f"evaluation.attack={made.evaluation.attack!r} attacks a defence, and this section evaluates models "
            "without one; a defence is attacked by defence_evaluation."
        )
    defences = _defences(given, about.defence, method, made.defence_evaluation)
    tasks = tuple(about.tasks or ()) if given.asked("tasks") is not None else (_own_test(data),)
    shared.check_tasks(tasks)
    run = TrainingRun(
        model=model,
        data=data.images(data.dataset_train_split),
        tasks=tasks,
        template=about.template,
        method=method,
        rivals=rivals,
        training=training,
        evaluation=blind,
        defences=defences,
        through=_through(blind, made.defence_evaluation) if defences else None,
        defended_images=made.defence_evaluation.max_images,
        fit_images=about.fit_images,
        output_dir=str(given.asked("output_dir")),
        overwrite=about.overwrite,
        resume=resume,
        push=push_of(training),
        source={**without_token_keys(given.settings), "template": about.template},
    )
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
    return RobustClipConfig(**{**values, "use_cpu": given.asked("use_cpu") is True or not torch.cuda.is_available()})


def push_of(training: RobustClipConfig) -> Push | None:
    """Where the finished folder is uploaded to."""
    if not training.push_to_hub:
        return None
    repo_id = training.hub_model_id or Path(str(training.output_dir)).absolute().name
    return Push(repo_id, training.hub_token, training.hub_private_repo, training.hub_revision)


def _own_test(data: DataArguments) -> Images:
    images = data.images(data.dataset_test_split)
    return Images(
        images.dataset, images.split, shown_name(images.dataset), images.config, images.revision,
        data_root=images.data_root, image_column=images.image_column, label_column=images.label_column,
        class_names=images.class_names, background=images.background, classes=images.classes,
    )  # fmt: skip


def _prepare_settings(file: dict[str, Any], options: dict[str, str]) -> None:
    """`compare` as a list; and where the flags ask for another design of prompts than the file, nothing of its own."""
    shared.as_list("compare", file, options)
    prompts = file.get("prompts")
    if isinstance(prompts, dict) and options.get("prompts.design") not in (None, prompts.get("design")):
        for key in unused.unused_by_design(options["prompts.design"], prompts):
            del prompts[key]


def _adapter(given: Given, made: Any, objective: type[Objective], model: ModelArguments) -> PeftConfig | None:
    """LoRA, or prompts: the objective's own, changed by what was asked for."""
    own, default = given.asked("prompts"), default_prompts(objective)
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
        adapter: PeftConfig | None = default_prompts(cls)
        if isinstance(method.adapter, LoraConfig):
            if adapter is not None:
                raise ValueError(f"compare={names!r}: {name} trains prompts, which don't go with use_peft.")
            adapter = method.adapter
        if isinstance(adapter, ClipPromptConfig) and isinstance(method.adapter, ClipPromptConfig):
            adapter.vision_depth = min(adapter.vision_depth, method.adapter.vision_depth)
            adapter.text_depth = min(adapter.text_depth, method.adapter.text_depth)
        rival = Method(cls(), adapter)
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
        again = given.with_preset("defence", preset).made(design=design).defence
        unused.check_defence(given, again)
        found[f"{called} {preset}" if preset else called] = again
    return found


def _through(blind: EvaluationSettings, defence: DefenceEvaluation) -> EvaluationSettings:
    """How a defence is attacked through itself. Raises ValueError for a radius at which nothing else is attacked."""
    radius = blind.radii[0] if defence.radius is None else defence.radius
    suite = AdaptiveWorst() if defence.attack is None else defence.attack
    how = replace(
        blind, radii=[radius], batch_size=defence.batch_size, attack=suite, target="adaptive_worst", eot=defence.eot
    )
    if how.threat_models()[0] not in blind.threat_models():
        raise ValueError(
            f"defence_evaluation.radius={radius!r} must be one of evaluation.radii={list(blind.radii)!r}, at which "
            "the model is attacked without the defence."
        )
    return how


def train(run: TrainingRun) -> list[RobustnessReport]:
    """Evaluate, fine-tune, evaluate again, compare; write checkpoint, report, plot and card to the output directory.

    Returns the fine-tuned model's reports, one for each task.
    """
    prepared = prepare(run)
    compared = {"undefended": measure(prepared, prepared.model, "undefended", prepared.start)}
    trainer = fit(prepared, run.method, prepared.model, save=True)
    for rival in run.rivals:
        compared[rival.title] = measure_rival(prepared, rival)
    fitted = finish(prepared, trainer)
    write_model(prepared, fitted)
    measured = measure_defences(prepared, fitted, compared)
    write(prepared, fitted, measured)
    return measured.own


def prepare(run: TrainingRun) -> Prepared:
    """Load the model and the pictures, join the processes, and clear what is to be overwritten."""
    folder = Path(run.output_dir)
    check_writable(folder)
    model = shared.load_model(run.model.model_name_or_path, run.model.model_revision)
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model_name_or_path={run.model.model_name_or_path!r} is an adapter; name the model that it stands on."
        )
    data, *tasks = (
        replace(pictures, dataset_id=shown_name(pictures.dataset_id))
        for pictures in (shared.load_data(images, model) for images in (run.data, *run.tasks))
    )
    names = task_titles([(task.name, task.dataset) for task in run.tasks])
    model.set_classes(data.class_names, run.template)  # a bad class name fails here, before any work
    for method in (run.method, *run.rivals):
        if isinstance(method.adapter, ClipPromptConfig):
            check_prompts(model, method.adapter)
    processes = join_processes(run.training.use_cpu)
    push = run.push
    if push is not None and processes.is_main_process:
        push = prepare_repository(push, "adapter" if run.adds_adapter else "model", "hub_model_id")
    mixed = run.training.mixed_precision
    precision = mixed if mixed != "no" else str(model.dtype).removeprefix("torch.")
    processes.print(f"{run.title}: {len(data)} images, {len(data.class_names)} classes, "
                    f"{what_runs(processes, fsdp=bool(run.training.fsdp))}, {precision}")  # fmt: skip
    if processes.is_local_main_process and run.overwrite:
        clear_checkpoints(folder)
        clear_states(folder)
    processes.wait_for_everyone()
    saving = Saving(folder, processes.print)
    return Prepared(run, model, data, dict(zip(names, tasks, strict=True)), processes, saving, push)


def measure(
    prepared: Prepared,
    model: CLIPForZeroShotClassification,
    title: str,
    model_id: str,
    settings: EvaluationSettings | None = None,
    defence: Defence | None = None,
) -> list[RobustnessReport]:
    """The reports of a model, one for each task."""
    run = prepared.run
    model.to(prepared.processes.device)
    found = []
    for task, data in prepared.tasks.items():
        model.set_classes(data.class_names, run.template)
        found.append(
            evaluation.evaluate_robustness(
                model,
                data if defence is None else data.first(run.defended_images),
                settings or run.evaluation,
                name=title,
                task=task,
                model_id=model_id,
                processes=prepared.processes,
                progress=defence is not None,
                defence=defence,
            )
        )
    model.set_classes(prepared.data.class_names, run.template)
    return found


def fit(prepared: Prepared, method: Method, model: CLIPForZeroShotClassification, save: bool) -> RobustClipTrainer:
    """Train; `save=False` writes no checkpoints and goes on from none."""
    run = prepared.run
    args = run.training if save else on_its_own(run.training)
    defence = next(iter(run.defences.values()), None) if save else None
    trainer = make_trainer(model, args, method.objective, prepared.data, method.adapter, defence)
    start = run.model.model_name_or_path
    if start != EMBEDDED_MODEL and Path(start).is_dir():
        start = str(Path(start).resolve())  # from another folder a relative one might be taken for the Hub's
    for config in getattr(trainer.model, "peft_config", {}).values():
        config.base_model_name_or_path, config.revision = start, run.model.model_revision
    try:
        trainer.train(resume_from_checkpoint=run.resume and save)
    except NothingToResume:
        prepared.processes.print(f"no whole checkpoint in {prepared.folder}: the training begins anew")
        trainer.train()
    return trainer


def measure_rival(prepared: Prepared, rival: Method) -> list[RobustnessReport]:
    """Train another method by the same settings; its reports."""
    model = shared.load_model(prepared.run.model.model_name_or_path, prepared.run.model.model_revision)
    model.set_classes(prepared.data.class_names, prepared.run.template)
    trainer = fit(prepared, rival, model, save=False)
    classifier, _ = plain_model(trainer, prepared.folder / "compared" / shared.slug(rival.title), has_defence=False)
    return measure(prepared, classifier, rival.title, f"{rival.title} from {prepared.start}, same settings")


def finish(prepared: Prepared, trainer: RobustClipTrainer) -> Fitted:
    """Fit the defences, and take the trained model out of its trainer. Old figures go before new weights come."""
    run = prepared.run
    images = replace(prepared.data, augment=False).first(run.fit_images)
    defences = fit_defences(trainer, run.defences, images, prepared.folder / "state/statistics")
    settings = trainer.settings()
    if prepared.processes.is_main_process:
        clear_model(prepared.folder)
    classifier, to_save = plain_model(trainer, prepared.folder, has_defence=bool(defences))
    return Fitted(classifier, to_save, defences, settings)


def plain_model(
    trainer: RobustClipTrainer, folder: Path, has_defence: bool
) -> tuple[CLIPForZeroShotClassification, Any]:
    """The trained classifier without wrappers or autocast, and what is to be saved of it.

    That is the classifier itself, LoRA merged into it; of prompts, which can't be merged, the adapter, with its
    defence if it has one. Sharded weights go through `folder`.
    """
    if trainer.accelerator.distributed_type == DistributedType.FSDP:
        trainer.save_model(str(folder), _internal_call=True)  # which pushes nothing
        trainer.accelerator.wait_for_everyone()
        whole = CLIPForZeroShotClassification.from_pretrained(folder).eval()
        return whole, whole
    core = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if has_defence or (isinstance(core, PeftModel) and isinstance(core.active_peft_config, ClipPromptConfig)):
        return classifier_in(core).requires_grad_(False), defended(trainer) if has_defence else core
    core = core.merge_and_unload() if isinstance(core, PeftModel) else core
    return core, core


def write_model(prepared: Prepared, fitted: Fitted) -> None:
    """The weights, and with which settings they were made."""
    if prepared.processes.is_main_process:
        source = prepared.run.source if prepared.push is None else without_paths(prepared.run.source)
        text = dump_recipe(source)
        prepared.saving.save("the weights", lambda: save_trained(fitted.to_save, prepared.folder))
        prepared.saving.save("recipe.yaml", lambda: write_text(prepared.folder / "recipe.yaml", text))
    prepared.processes.wait_for_everyone()


def save_trained(trained: Any, folder: Path) -> None:
    """Write a classifier, an adapter or a defended classifier."""
    if isinstance(trained, PeftModel):
        save_adapter(trained, folder)
        return
    with written_whole(folder) as draft:
        trained.save_pretrained(draft)


def measure_defences(prepared: Prepared, fitted: Fitted, compared: dict[str, list[RobustnessReport]]) -> Measured:
    """The reports of the trained model and, where there are defences, of these; the one that is saved is its own."""
    run = prepared.run
    reports = measure(prepared, fitted.classifier, run.title, prepared.repo_id)
    if not fitted.defences or run.through is None:
        return Measured(reports, compared)
    compared = {**compared, run.title: reports}
    blind = replace(run.through, attack=run.evaluation.attack, target="defence_blind", eot=1)
    own: list[RobustnessReport] = []
    saved = next(iter(fitted.defences))
    for title in reversed(fitted.defences):  # the one that is saved comes last
        for how in (blind, run.through):
            found = measure(prepared, fitted.classifier, title, prepared.repo_id, how, fitted.defences[title])
            if title == saved:
                own += found
            else:
                compared[f"{title}, {how.target}"] = found
    return Measured(own, compared)


def write(prepared: Prepared, fitted: Fitted, measured: Measured) -> None:
    """Table, report, card and plot; and the whole folder to the Hub, if it is pushed."""
    saving, folder, push = prepared.saving, prepared.folder, prepared.push
    compared = [report for rows in measured.compared.values() for report in rows]
    if prepared.processes.is_main_process:
        rows = in_order(prepared, fitted, measured)
        saving.attempt("the table", lambda: show(prepared, fitted, rows))

        def publish(info: CardInfo) -> None:
            card = str(make_card(measured.own, compared, info))
            report = partial(reporting.save_reports, folder / "report.json", measured.own, compared, card=info)
            saving.save("report.json", report)
            saving.save("README.md", lambda: write_text(folder / "README.md", card))

        info = card_info(prepared, fitted)
        publish(info)
        if saving.attempt("accuracy.png", lambda: plot(prepared, fitted, rows)) is None:
            publish(replace(info, plot=None))
    prepared.processes.wait_for_everyone()
    saving.finish()
    run = prepared.run
    load = f"\nload it: {loading_code(run, run.output_dir)}" if push is None else ""
    if prepared.processes.is_main_process:  # another machine's folder holds none of it
        line = f"saved to {folder}: {', '.join(saved_files(folder))}{load}"
        saving.attempt("a line", lambda: prepared.processes.print(line))
    if push is not None and prepared.processes.is_main_process:
        address = push_folder(folder, push.repo_id, token=push.token, private=push.private, revision=push.revision)
        prepared.processes.print(f"pushed: {address}\nload it: {loading_code(run, push.repo_id)}")


def in_order(prepared: Prepared, fitted: Fitted, measured: Measured) -> list[RobustnessReport]:
    """All reports, task by task: what it is compared with, then the trained model."""
    groups = [*measured.compared.values()]
    per_task = len(prepared.tasks)
    groups += [measured.own[i : i + per_task] for i in range(0, len(measured.own), per_task)]
    return [group[i] for i in range(per_task) for group in groups]


def show(prepared: Prepared, fitted: Fitted, rows: Sequence[RobustnessReport]) -> None:
    """Print the table, and how far the attacks were blind."""
    threat_model = prepared.run.training.threat_model()
    about = f"before and after {prepared.run.title} ({rows[0].attack}, {threat_model} in training)"
    if fitted.defences:
        shared.print_table(shared.defence_table(rows, about), 120)
    else:
        shared.print_table(reporting.to_table(rows, about), 100)
    zeros = reporting.percent(max(report.zero_gradient_share for report in rows))
    print(f"exactly-zero input gradients in the attacks: at most {zeros}")
    if warning := reporting.blind_warning(rows):
        print(f"\n{warning}\n")


def plot(prepared: Prepared, fitted: Fitted, rows: Sequence[RobustnessReport]) -> str:
    """Draw the accuracies; the file's name."""
    file = prepared.folder / "accuracy.png"
    if fitted.defences:
        reporting.plot_defences(file, shared.by_model(rows))
        return file.name
    panels: dict[str, dict[str, RobustnessReport]] = {task: {} for task in prepared.tasks}
    for report in rows:
        panels[report.task][report.name] = report
    reporting.plot_accuracy(file, panels)
    return file.name


def card_info(prepared: Prepared, fitted: Fitted) -> CardInfo:
    """What the card says beside the figures."""
    run, data = prepared.run, prepared.data
    name = run.model.model_name_or_path
    classes = ", ".join(data.class_names[:10]) + (", ..." if len(data.class_names) > 10 else "")
    base = hub_name(name) or ""
    saved = next(iter(fitted.defences.values()), None)
    paper = run.method.objective.paper
    return CardInfo(
        repo_id=prepared.repo_id,
        base_model=base,
        ancestor=None if base else named_base(name),
        training_data=f"{data.dataset_id}, split {data.split}, {len(data)} images of {len(data.class_names)} classes "
        f"({classes}), {data.revision}",
        paper=paper if saved is None else replace(saved.paper, method=type(saved).__name__),
        settings=fitted.settings,
        template=run.template,
        class_names=data.class_names,
        limits=limits_of(base),
        datasets=[] if is_path(run.data.dataset) else [data.dataset_id],
        plot="accuracy.png",
        license="apache-2.0" if name == EMBEDDED_MODEL else None,
    )


def limits_of(model_name: str) -> str:
    """One sentence for the card."""
    if model_name == EMBEDDED_MODEL:
        return "A demonstration of 0.35 M parameters that knows nothing but pictures of handwritten digits."
    start = f"`{model_name}`" if model_name else "the checkpoint it started from"
    return f"It inherits what {start} can't do, and its biases."


def saved_files(folder: Path) -> list[str]:
    """What a run leaves for others, in a few words."""
    adapter = folder / "adapter_model.safetensors"
    kinds = [f"adapter ({adapter.stat().st_size / 1000:.0f} kB)"] if adapter.is_file() else ["weights", "processor"]
    others = ("statistics.safetensors", "adaptation.json", "README.md", "report.json", "accuracy.png", "recipe.yaml")
    return [*kinds, *(name for name in others if (folder / name).is_file())]


def loading_code(run: TrainingRun, source: str) -> str:
    """How what was trained is loaded from a folder or repository."""
    if run.defences:
        without = "PeftModel.from_pretrained(clip, ...)"
        return f'DefendedClassifier.from_pretrained("{source}"), or without the defence {without}; see README.md'
    if run.adds_adapter:
        return f'PeftModel.from_pretrained(clip, "{source}")  # after import hf_robust_clip; see README.md'
    return f'CLIPForZeroShotClassification.from_pretrained("{source}")  # or transformers.CLIPModel'
