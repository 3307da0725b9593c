"""A training run: read what is asked for, prepare, fit, measure, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel

from .. import report as reporting
from ..checkpoint_notes import named_base, save_descriptions
from ..defences.base import Defence
from ..digits_clip import EMBEDDED_MODEL
from ..evaluation import loop as evaluation
from ..evaluation.attack_views import DefenceBlind
from ..evaluation.settings import EvaluationSettings
from ..hub import (
    Push,
    clear_checkpoints,
    clear_model,
    clear_search,
    clear_states,
    dump_recipe,
    prepare_repository,
    push_folder,
)
from ..modeling import ZeroShotClassifier
from ..names import hub_name, is_path, shown_folder, shown_name, without_paths
from ..processes import join_processes, together, what_runs
from ..prompts import ClipPromptConfig, check_prompts
from ..report import CardInfo, RobustnessReport, make_card
from ..saving import Saving, left_by_training
from ..storage import check_writable, write_text, written_whole
from ..training.checkpoints import NothingToResume, save_adapter
from ..training.config import on_its_own
from ..training.preparation import check_met, classifier_in
from ..training.trainer import RobustClipTrainer
from ..zero_shot_data.loading import ImageDataset
from . import card_pictures, shared, tune
from .train_settings import Method, TrainingRun, read


@dataclass(frozen=True)
class Prepared:
    """A run with its model, its pictures and its processes.

    Args:
        data: what is trained on.
        held_out: training images by which the best checkpoint is chosen; None where none is.
        searched: how settings of the run were found; None where they were given.
    """

    run: TrainingRun
    model: ZeroShotClassifier
    data: ImageDataset
    held_out: ImageDataset | None
    tasks: dict[str, ImageDataset]
    processes: PartialState
    saving: Saving
    push: Push | None
    searched: tune.Searched | None = None

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

    classifier: ZeroShotClassifier
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
    shared.run_command(lambda: read(words, default_config, description), train, left_by_training)


def train(run: TrainingRun) -> list[RobustnessReport]:
    """Find settings, where asked; evaluate, fine-tune, evaluate again, compare; write checkpoint, report, plot and
    card to the output directory.

    Returns the fine-tuned model's reports, one for each task.
    """
    prepared = prepare(run)
    if run.space:
        prepared = tuned(prepared)
        run = prepared.run
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
    """Join the processes, load the model and the pictures, and clear what is to be overwritten."""
    folder, processes = Path(run.output_dir), join_processes(run.training.use_cpu)
    shared.check_same_settings(run.source, processes)
    model, data, held_out, tasks = together(lambda: load(run), processes)
    push = together(lambda: repository(run) if processes.is_main_process else run.push, processes)
    mixed = run.training.mixed_precision
    precision = mixed if mixed != "no" else str(model.dtype).removeprefix("torch.")
    precision += ", attacks in bfloat16" if run.training.attack_bf16 else ""
    beside = "" if held_out is None else f" and {len(held_out)} held out"
    processes.print(f"{run.title}: {len(data)} images{beside}, {len(data.class_names)} classes, "
                    f"{what_runs(processes)}, {precision}")  # fmt: skip
    if processes.is_local_main_process and run.overwrite:
        clear_checkpoints(folder)
        clear_states(folder)
        clear_search(folder)
    processes.wait_for_everyone()
    saving = Saving(folder, processes.print)
    return Prepared(run, model, data, held_out, tasks, processes, saving, push)


def repository(run: TrainingRun) -> Push | None:
    """Where the run is pushed to, which is there and can be written to; None where it isn't pushed."""
    kind = "adapter" if run.adds_adapter else "model"
    return None if run.push is None else prepare_repository(run.push, kind, "hub_model_id")  # type: ignore[arg-type]


def load(
    run: TrainingRun,
) -> tuple[ZeroShotClassifier, ImageDataset, ImageDataset | None, dict[str, ImageDataset]]:
    """The model with its classes, what is trained on, what of it is held out, and the tasks by their titles."""
    check_writable(run.output_dir)
    model = shared.load_model(run.model.model_name_or_path, run.model.model_revision)
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model_name_or_path={run.model.model_name_or_path!r} is an adapter; name the model that it stands on."
        )
    data = shared.load_data(run.data, model)
    data = replace(data, dataset_id=shown_name(data.dataset_id))
    tasks = {
        title: replace(
            pictures,
            dataset_id=shown_name(pictures.dataset_id),
            templates=tuple(shared.templates_of(run.titled[title], pictures, run.texts.templates)),
        )
        for title, pictures in shared.load_tasks(run.titled, model).items()
    }
    for pictures in tasks.values():
        run.texts.of(pictures.class_names, pictures.templates)
    held_out = None
    if run.held_out_images is not None:
        data, held_out = data.held_out(run.held_out_images, run.training.seed)
    run.texts.set(model, data)  # a bad class name fails here, before any work
    for method in (run.method, *run.rivals):
        check_met(run.training, method.objective, model, data)
        if isinstance(method.adapter, ClipPromptConfig):
            check_prompts(model, method.adapter)
    return model, data, held_out, tasks


def tuned(prepared: Prepared) -> Prepared:
    """The same with the settings that a search on its training images found. It sees no task."""
    searched = tune.search(prepared.run, prepared.model, prepared.data, prepared.saving)
    searched.show()
    searched.write(prepared.saving)
    return replace(prepared, run=searched.applied(prepared.run), searched=searched)


def measure(
    prepared: Prepared,
    model: ZeroShotClassifier,
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
        run.texts.set(model, data, data.templates)
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
    run.texts.set(model, prepared.data)
    return found


def fit(prepared: Prepared, method: Method, model: ZeroShotClassifier, save: bool) -> RobustClipTrainer:
    """Train; `save=False` writes no checkpoints and goes on from none."""
    run = prepared.run
    args = run.training if save else on_its_own(run.training)
    defence = next(iter(run.defences.values()), None) if save else None
    trainer = RobustClipTrainer(
        model, args, method.objective, prepared.data, prepared.held_out, peft_config=method.adapter, defence=defence
    )
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
    prepared.run.texts.set(model, prepared.data)
    trainer = fit(prepared, rival, model, save=False)
    classifier, _ = plain_model(trainer)
    return measure(prepared, classifier, rival.title, f"{rival.title} from {prepared.start}, same settings")


def finish(prepared: Prepared, trainer: RobustClipTrainer) -> Fitted:
    """Fit the defences, and take the trained model out of its trainer. Old figures go before new weights come."""
    run = prepared.run
    defences = dict(run.defences)
    if defences:
        images = replace(prepared.data, augment=False).first(run.fit_images)
        first, *_ = defences.values()
        saved = trainer.fit_defence(images, state_dir=prepared.folder / "state/statistics")
        own = {field.name: (getattr(first, field.name), getattr(saved, field.name)) for field in fields(saved)}
        learned: dict[str, Any] = {name: after for name, (before, after) in own.items() if after is not before}
        defences = {title: replace(defence, **learned) for title, defence in defences.items()}
        trainer.defence = next(iter(defences.values()))
    settings = {**trainer.settings(), **how_chosen(prepared)}
    if prepared.processes.is_local_main_process:
        clear_model(prepared.folder)
    prepared.processes.wait_for_everyone()
    classifier, to_save = plain_model(trainer)
    return Fitted(classifier, to_save, defences, settings)


def how_chosen(prepared: Prepared) -> dict[str, str]:
    """What the card says of held-out training images, by which a checkpoint or settings were chosen."""
    run, found = prepared.run, {}
    if prepared.held_out is not None:
        args = run.training
        metric = str(args.metric_for_best_model).removeprefix("eval_").replace("_", " ")
        patience = args.early_stopping_patience
        stop = "" if patience is None else f", early stopping after {patience} evaluations without a new best"
        on = f"(PGD-{args.eval_attack_steps}) on {len(prepared.held_out)} held-out training images"
        if args.load_best_model_at_end:
            found["weights_chosen"] = f"by {metric} {on}{stop}"
        else:
            found["evaluated_while_training"] = on
    if prepared.searched is not None:
        names = ", ".join(own.name for own in prepared.searched.space)
        found["settings_chosen"] = f"{names}: by {prepared.searched.about}"
    return found


def plain_model(trainer: RobustClipTrainer) -> tuple[ZeroShotClassifier, Any]:
    """The trained classifier without wrappers or autocast, and what is to be saved of it.

    That is the classifier itself, LoRA merged into it; of prompts, which can't be merged, the adapter, with its
    defence if it has one.
    """
    core = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if isinstance(core, PeftModel) and isinstance(core.active_peft_config, ClipPromptConfig):
        to_save = core if trainer.defence is None else trainer.defended()
        return classifier_in(core).requires_grad_(False), to_save
    core = core.merge_and_unload() if isinstance(core, PeftModel) else core
    return core, core


def write_model(prepared: Prepared, fitted: Fitted) -> None:
    """The weights, and with which settings they were made."""
    if prepared.processes.is_main_process:
        source = prepared.run.source if prepared.push is None else without_paths(prepared.run.source)
        text = dump_recipe(source)
        prepared.saving.save("the weights", lambda: save_trained(fitted.to_save, prepared.folder))
        prepared.saving.save("recipe.yaml", lambda: write_text(prepared.folder / "recipe.yaml", text))
        if (found := prepared.run.texts.descriptions) is not None:
            prepared.saving.save("descriptions.json", lambda: save_descriptions(prepared.folder, found))
        if prepared.searched is not None:
            prepared.searched.write(prepared.saving)
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
    if run.method.objective.judged_by is None:  # else the classifier has no logits of its own
        reports = measure(prepared, fitted.classifier, run.title, prepared.repo_id)
        if not fitted.defences or run.through is None:
            return Measured(reports, compared)
        compared = {**compared, run.title: reports}
    assert run.through is not None
    blind = replace(run.through, attack=run.evaluation.attack, view=DefenceBlind(), eot=1)
    own: list[RobustnessReport] = []
    saved = next(iter(fitted.defences))
    for title in reversed(fitted.defences):  # the one that is saved comes last
        for how in (blind, run.through):
            found = measure(prepared, fitted.classifier, title, prepared.repo_id, how, fitted.defences[title])
            if title == saved:
                own += found
            else:
                compared[f"{title}, {how.seen.name}"] = found
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
        if saving.attempt("accuracy.png", lambda: plot(folder, rows)) is None:
            info = replace(info, plot=None)
            publish(info)
        if shown := saving.attempt("examples.png", lambda: draw_pictures(prepared, fitted)):
            publish(replace(info, **shown))
    prepared.processes.wait_for_everyone()
    saving.finish()
    run = prepared.run
    load = f"\nload it: {loading_code(prepared, run.output_dir)}" if push is None else ""
    if prepared.processes.is_main_process:  # another machine's folder holds none of it
        line = f"saved to {folder}: {', '.join(saved_files(folder))}{load}"
        saving.attempt("a line", lambda: prepared.processes.print(line))
    if push is not None and prepared.processes.is_main_process:
        address = push_folder(folder, push.repo_id, token=push.token, private=push.private, revision=push.revision)
        prepared.processes.print(f"pushed: {address}\nload it: {loading_code(prepared, push.repo_id)}")


def in_order(prepared: Prepared, fitted: Fitted, measured: Measured) -> list[RobustnessReport]:
    """All reports, task by task: what it is compared with, then the trained model."""
    groups = [*measured.compared.values()]
    per_task = len(prepared.tasks)
    groups += [measured.own[i : i + per_task] for i in range(0, len(measured.own), per_task)]
    return [group[i] for i in range(per_task) for group in groups]


def show(prepared: Prepared, fitted: Fitted, rows: Sequence[RobustnessReport]) -> None:
    """Print the table, and how far the attacks were blind."""
    args, objective = prepared.run.training, prepared.run.method.objective
    attack = f"PGD-{args.attack_steps} at {args.threat_model()} in" if objective.attacked else "no attack in"
    about = f"before and after {prepared.run.title} ({attack} training)"
    reporting.print_table(reporting.table(rows, about))
    zeros = reporting.percent(max(report.zero_gradient_share for report in rows))
    print(f"exactly-zero input gradients in the attacks: at most {zeros}")
    remarks = [*shared.suite_remarks(prepared.run.titled, rows), reporting.blind_warning(rows)]
    for line in filter(None, remarks):
        print(f"\n{line}\n")


def plot(folder: Path, rows: Sequence[RobustnessReport]) -> str:
    """Draw the accuracies; the file's name."""
    reporting.plot(folder / "accuracy.png", rows)
    return "accuracy.png"


def draw_pictures(prepared: Prepared, fitted: Fitted) -> dict[str, Any]:
    """Attacked pictures, and one for the Hub's widget, where they are asked for and a licence allows it; what the card
    says of them.
    """
    run, found = prepared.run, card_pictures.licensed(prepared.run.titled)
    count = (card_pictures.PUSHED if run.push is not None else 0) if run.card_pictures is None else run.card_pictures
    if not count or found is None or run.method.objective.judged_by is not None:
        return {}
    task, spec = found
    data = prepared.tasks[task]
    run.texts.set(fitted.classifier, data, data.templates)
    about = f"{run.title}{', without a defence,' if fitted.defences else ''} on {task}"
    try:
        shown = card_pictures.draw(prepared.folder, fitted.classifier, data, run.evaluation, spec, about, count)
    finally:
        run.texts.set(fitted.classifier, prepared.data)
    sample = {} if run.adds_adapter else card_pictures.write_sample(prepared.folder, data, prepared.data.class_names)
    return {**shown, **sample}


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
        family=prepared.model.config.model_type,
        described=run.descriptions is not None,
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
    others = ("statistics.safetensors", "adaptation.json", "README.md", "report.json", "accuracy.png", "examples.png",
              "recipe.yaml", "descriptions.json", "tuning.csv", "tuning.png")  # fmt: skip
    return [*kinds, *(name for name in others if (folder / name).is_file())]


def loading_code(prepared: Prepared, source: str) -> str:
    """How what was trained is loaded from a folder or repository."""
    run = prepared.run
    if run.defences and run.method.objective.judged_by is not None:
        return f'DefendedClassifier.from_pretrained("{source}"); see README.md'
    if run.defences:
        without = "PeftModel.from_pretrained(clip, ...)"
        return f'DefendedClassifier.from_pretrained("{source}"), or without the defence {without}; see README.md'
    if run.adds_adapter:
        return f'PeftModel.from_pretrained(clip, "{source}")  # after import hf_robust_clip; see README.md'
    plain = prepared.model.plain_cls.__name__
    return f'AutoModelForZeroShotClassification.from_pretrained("{source}")  # or transformers.{plain}'
