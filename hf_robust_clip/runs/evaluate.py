"""An evaluation of checkpoints: read what is asked for, prepare, measure, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .. import report as reporting
from .. import unused_settings as unused
from ..arguments import (
    DataArguments,
    EvaluationArguments,
    EvaluationRunArguments,
    Images,
    ModelArguments,
    check_folder,
)
from ..attacks.suites import Suite
from ..checkpoint_notes import (
    holds_defence_alone,
    known_descriptions,
    known_templates,
    method_of_defence,
    other_prompt,
    trained_descriptions,
    trained_templates,
)
from ..command_line import ClassFlag, CommandLine, Given, read_command
from ..defences.base import Defence
from ..defences.undefended import Undefended
from ..evaluation import loop as evaluation
from ..evaluation.attack_views import AttackView
from ..evaluation.settings import EvaluationSettings
from ..evaluation.streams import check_poisoning, stream_poisoning
from ..hub import clear_states, dump_recipe
from ..modeling import ZeroShotClassifier, descriptions_digest
from ..names import same_place, task_titles, titles
from ..processes import join_processes, together, what_runs
from ..report import RobustnessReport
from ..report.explanations import Explanation
from ..report.tables import as_text, titled
from ..saving import Saving, left_by_evaluation
from ..secrets import without_token_keys
from ..storage import check_writable, write_text
from ..threat_model import ThreatModel
from ..zero_shot_data.loading import ImageDataset
from . import explanations, published, saved_pictures, shared
from .fitting import defence_for, load_model
from .shared import SUITES

VIEW = ClassFlag(AttackView, ("hf_robust_clip.evaluation",))
COMMAND = CommandLine(
    groups={
        "": (ModelArguments, DataArguments, EvaluationRunArguments),
        "evaluation": (EvaluationArguments,),
        "fit_on": (Images,),
    },
    classes={
        "defence": ClassFlag(Defence, ("hf_robust_clip.defences",)),
        "evaluation.attack": ClassFlag(Suite, SUITES, names=True),
        "evaluation.attacks": ClassFlag(Suite, SUITES, names=True, several=True),
        "evaluation.view": VIEW,
    },
    required=("output_dir",),
    skip=frozenset(
        ["use_peft", "lora_r", "lora_alpha", "dataset_train_split", "augment"]
        + [f"fit_on.{name}" for name in ("augment", "name", "suite")]
    ),
)


@dataclass(frozen=True, kw_only=True)
class EvaluationRun(EvaluationRunArguments):
    """What an evaluation is about, checked, and all else that it needs."""

    output_dir: str
    tasks: Sequence[Images]
    model: ModelArguments
    evaluations: tuple[EvaluationSettings, ...]
    defence_settings: tuple[str, ...]  # names of those that go before what a folder saved; none of them with a preset
    preset: str | None
    texts: shared.Texts
    fit_on: Images | None
    source: dict[str, Any] = field(default_factory=dict)
    comparison: published.Comparison | None = None  # with published figures

    @property
    def names(self) -> list[str]:
        """All checkpoints: that in question, those it is compared with, the reference if it is none of them."""
        others = [*self.compare, *([self.reference] if self.reference else [])]
        return list(dict.fromkeys([self.model.model_name_or_path, *others]))

    def revision_of(self, name: str) -> str | None:
        """Of a checkpoint: that which was asked for is of the one in question."""
        return self.model.model_revision if name == self.model.model_name_or_path else None


@dataclass(frozen=True)
class Prepared:
    """A run with its processes."""

    run: EvaluationRun
    folder: Path
    processes: PartialState
    saving: Saving
    called: dict[str, str]  # by checkpoint, what tables call it
    tasks: dict[str, Images]
    comparison: published.Comparison | None


@dataclass
class Measured:
    """Reports in the order of checkpoints, tasks and attacks; what is to be said of them; and attacked pictures."""

    reports: list[RobustnessReport] = field(default_factory=list)
    under_first: list[RobustnessReport] = field(default_factory=list)  # by the first of the attacks
    remarks: list[str] = field(default_factory=list)
    whole: dict[str, int | None] = field(default_factory=dict)  # by task, of how many images they are a part
    examples: Any = None
    explained: list[Explanation] = field(default_factory=list)


def main(words: Sequence[str], default_config: Path, description: str = "") -> None:
    """An evaluation as a command. A wrong setting ends it with one line and status 2."""
    shared.run_command(lambda: read(words, default_config, description), evaluate, left_by_evaluation)


def read(words: Sequence[str], default_config: Path, description: str = "") -> EvaluationRun:
    """Check every setting. Nothing is written or downloaded here."""
    given = read_command(COMMAND, words, default_config, description, _prepare_settings)
    made = given.made()
    model, data, about = (given.group(cls, made) for cls in (ModelArguments, DataArguments, EvaluationRunArguments))
    check_output(str(about.output_dir), model, about)
    name = model.model_name_or_path
    unused.check_compared(name, about.compare)
    reference = about.reference
    if reference is not None:
        reference = next((own for own in (name, *about.compare) if same_place(own, reference)), reference)
    texts = shared.texts_asked(about.template, about.descriptions)
    evaluations = made.evaluation.settings(defended=about.defence is not None)
    unused.check_evaluation(given, evaluations)
    for how in evaluations:
        how.check_against(about.defence or Undefended())
    saved_pictures.check_without_attack(about, evaluations)
    if about.defence is not None:
        unused.check_defence(given, about.defence)
    if about.stream_poisoning is None:
        default = unused.defaults_of(EvaluationRunArguments)["permutations"]
        unused.idle(given, "permutations", "without stream_poisoning", default)
    tasks = _tasks(given, data, about)
    shared.check_tasks(tasks, described=texts.descriptions is not None)
    saved_pictures.check(about, tasks)
    return EvaluationRun(
        **{**vars(about), "reference": reference, "tasks": tasks},
        model=model,
        evaluations=evaluations,
        defence_settings=tuple(set(given.asked("defence.init_args") or ()) - {"preset"}),
        preset=given.presets.get("defence"),
        texts=texts,
        fit_on=_fit_on(given, made.fit_on, about.defence, tasks),
        source=without_token_keys(given.settings),
        comparison=published.asked_comparison(about, tasks, evaluations),
    )


def check_output(folder: str, model: ModelArguments, about: EvaluationRunArguments) -> None:
    """Raise OSError for an output folder that can't be written to without harm."""
    check_folder(folder, model.model_name_or_path, about.overwrite or about.resume)
    if any(Path(folder, name).is_file() for name in ("config.json", "adapter_config.json")):
        raise OSError(f"output_dir={folder!r} is a checkpoint with a report of its own; name another folder.")


def _prepare_settings(file: dict[str, Any], options: dict[str, str]) -> None:
    """`compare` as a list; `--dataset_name` takes the place of the tasks, `--evaluation.attack` of attacks; and the
    tasks of suites that of their names.
    """
    shared.as_list("compare", file, options)
    evaluation = file.get("evaluation")
    if "evaluation.attack" in options and isinstance(evaluation, dict):
        evaluation.pop("attacks", None)
        if options["evaluation.attack"] == "none":
            evaluation.pop("radii", None)
    if "dataset_name" in options and "tasks" not in options:
        file.pop("tasks", None)
    asked = shared.asks_for_texts(file, options, "template", "descriptions")
    if shared.expand_suites(file, options, template=asked):
        shared.beside_suites(file, options)


def _tasks(given: Given, data: DataArguments, about: EvaluationRunArguments) -> tuple[Images, ...]:
    asked = [name for name in given.command.fields_of(DataArguments) if given.asked(name) is not None]
    if given.asked("tasks") is not None:
        if asked:
            told = f"{asked[0]}={given.asked(asked[0])!r}"
            raise ValueError(f"{told} does nothing beside tasks; it goes with dataset_name.")
        return tuple(about.tasks or ())
    if not data.dataset_name:
        raise ValueError("missing: dataset_name, or tasks; give what is evaluated on.")
    return (data.images(data.dataset_test_split),)


def _fit_on(given: Given, images: Images, defence: Defence | None, tasks: Sequence[Images]) -> Images | None:
    """What the defence is fitted on before it is evaluated.

    Raises ValueError without a defence, for one that learns nothing or needs a training of its own, and for images
    that are evaluated too.
    """
    if not given.asked("fit_on"):
        return None
    if not images.dataset:
        raise ValueError("fit_on.dataset is missing.")
    told = f"fit_on.dataset={images.dataset!r}"
    if defence is None:
        raise ValueError(f"{told} does nothing without a defence; give --defence.")
    if type(defence).fit is Defence.fit:
        raise ValueError(f"{told} does nothing for {defence.name}, which learns nothing.")
    if defence.needs:
        raise ValueError(
            f"{told}: {defence.name} needs a {', '.join(sorted(defence.needs)).replace('_', ' ')} to be fitted, which "
            "a training makes; train with this defence."
        )
    for i, task in enumerate(tasks):
        if images.overlaps(task):
            raise ValueError(f"{told}, fit_on.split={images.split!r} is evaluated too (task {i + 1}); fit on others.")
    return images


def evaluate(run: EvaluationRun) -> list[RobustnessReport]:
    """Evaluate checkpoints on every task under every attack; write report, table and plots to the output directory.

    Returns the reports of the checkpoint in question.
    """
    prepared = prepare(run)
    measured = measure(prepared)
    write(prepared, measured)
    return [report for report in measured.reports if report.model == run.model.model_name_or_path]


def prepare(run: EvaluationRun) -> Prepared:
    """Join the processes, and clear what is to be overwritten."""
    folder, processes = Path(run.output_dir), join_processes(shared.on_cpu(run.use_cpu))
    shared.check_same_settings(run.source, processes)
    comparison = together(lambda: check_before(run, folder), processes)
    processes.print(f"evaluation: {what_runs(processes)}")
    if processes.is_local_main_process and run.overwrite:
        clear_states(folder)
        explanations.clear_explanations(folder)
        saved_pictures.clear(folder)
    processes.wait_for_everyone()
    names = task_titles([(task.name, task.dataset) for task in run.tasks])
    tasks = dict(zip(names, run.tasks, strict=True))
    return Prepared(run, folder, processes, Saving(folder, processes.print), titles(run.names), tasks, comparison)


def check_before(run: EvaluationRun, folder: Path) -> published.Comparison | None:
    """What would fail after hours fails here. Published figures beside the model, where they are asked for."""
    for name in run.names[1:]:
        if not holds_defence_alone(name, run.revision_of(name)):
            shared.check_model(name, run.revision_of(name))
    name = run.model.model_name_or_path
    comparison = run.comparison and published.with_model(run.comparison, name, run.revision_of(name))
    check_writable(folder)
    if not run.overwrite:
        check_figures_kept(run, folder)
    return comparison


def check_figures_kept(run: EvaluationRun, folder: Path) -> None:
    """Raise ValueError where a finished report has figures of an attack or a task that would not be in the new one."""
    try:
        reports, _ = reporting.load_reports(folder / "report.json")
    except (OSError, ValueError):
        return  # none, or none that can be read
    titles_of_tasks = task_titles([(task.name, task.dataset) for task in run.tasks])
    own = None if run.defence is None else run.defence.paper.method  # some names say more, by settings
    for report in reports:
        attacks = [(settings.attack.name(report.num_classes), settings.seen.name) for settings in run.evaluations]
        defence = (report.defence or {}).get("name")
        known = (report.attack, report.view.name) in attacks and report.task in titles_of_tasks
        if not known or (defence is None) != (own is None) or not str(defence).startswith(str(own)):
            what = f"{report.full_attack} on {report.task}" + (f" with {defence}" if defence else "")
            raise ValueError(
                f"output_dir={run.output_dir!r} holds figures of {what}, which aren't asked for and would be lost; "
                "ask for them too, or name another folder."
            )


def measure(prepared: Prepared) -> Measured:
    """Every checkpoint on every task under every attack."""
    run, found = prepared.run, Measured()
    texts = run.texts
    for name in run.names:
        revision = run.revision_of(name)
        model, texts, tasks = together(partial(load, prepared, name, texts), prepared.processes)
        if run.defence is None and method_of_defence(name, revision) is not None:
            told = "holds a test-time defence, which was not asked for: these figures are without it"
            found.remarks.append(f"{name!r} {told}.")
        defence, facts = defence_for(prepared, model, name, texts)
        trained = known_templates(name, revision)
        for title, data in tasks.items():
            texts.set(model, data, shared.templates_of(prepared.tasks[title], data, texts.templates))
            digests = (known_descriptions(name, trained, data.class_names, revision), digest_of(model))
            if data.attacked:
                about = "adversarial already, for one model: of that clean is the robust accuracy, of others it is not"
                found.remarks.append(f"{title}: {about}.")
            remark = other_prompt(prepared.called[name], trained, model.templates, digests)
            found.remarks += [] if remark is None else [remark]
            if prepared.comparison is not None and name == run.model.model_name_or_path:
                found.whole[title] = shared.count_whole(prepared.tasks[title], data, model)
            for settings in run.evaluations:
                report = measure_one(prepared, model, data, settings, name, title, defence)
                if facts:
                    report = replace(report, defence={**(report.defence or {}), **facts})
                found.reports.append(report)
                if settings is run.evaluations[0]:
                    found.under_first.append(report)
            attacked = run.evaluations[0].attack.has_radii
            if attacked and defence is None and found.examples is None and prepared.processes.is_main_process:
                first = run.evaluations[0]
                member, threat_model = first.attack.members(len(data.class_names))[0], first.threat_models()[-1]
                pictures = partial(evaluation.adversarial_examples, model, data, first)
                drawn = prepared.saving.attempt("examples.png", pictures)
                about = f"{prepared.called[name]} on {title} under {member.name} alone at {threat_model}"
                found.examples = (*drawn, about) if drawn else ()
            if run.explain and prepared.processes.is_main_process:
                called, first, count = prepared.called[name], run.evaluations[0], run.explain
                own = explanations.explain(prepared.saving, model, data, first, count, name=called, task=title)
                found.explained += own
    return found


def other_sizes(reports: Sequence[RobustnessReport]) -> str | None:
    """What is to be said of a task whose pictures were attacked at several sizes: a ball at one is another one at the
    other.
    """
    sides = {titled(report): report.attack_resolution for report in reports if report.robust_accuracy}
    if len(set(sides.values())) < 2:
        return None
    told = ", ".join(f"{name} at {side} px" for name, side in sides.items())
    mend = f"to compare them, give the task attack_resolution: {min(sides.values())}"
    return f"{reports[0].task}: attacked {told}, where one radius is not the same; {mend}."


def load(
    prepared: Prepared, name: str, texts: shared.Texts
) -> tuple[ZeroShotClassifier, shared.Texts, dict[str, ImageDataset]]:
    """A checkpoint, the texts of classes from it on, and the pictures of all tasks by their titles."""
    run, revision = prepared.run, prepared.run.revision_of(name)
    model = load_model(name, revision).to(prepared.processes.device)
    if name == run.model.model_name_or_path and not texts.templates:
        texts = texts_of(texts, name, revision)
    tasks = shared.load_tasks(prepared.tasks, model)
    for title, data in tasks.items():  # one without descriptions is told before hours of another
        texts.of(data.class_names, shared.templates_of(prepared.tasks[title], data, texts.templates))
        if run.stream_poisoning is not None:
            check_poisoning(run.defence, run.stream_poisoning, run.permutations, len(data))
    return model, texts, tasks


def texts_of(asked: shared.Texts, name: str, revision: str | None) -> shared.Texts:
    """Those of a checkpoint's training, with the descriptions that were asked for in the place of its own."""
    trained = trained_templates(name, revision)
    if asked.descriptions is not None:
        return replace(asked, templates=shared.described(trained))
    return shared.Texts(trained, trained_descriptions(name, trained, revision))


def digest_of(model: ZeroShotClassifier) -> str | None:
    """That of its descriptions."""
    return descriptions_digest(model.descriptions)


def measure_one(
    prepared: Prepared,
    model: ZeroShotClassifier,
    data: ImageDataset,
    settings: EvaluationSettings,
    name: str,
    task: str,
    defence: Defence | None,
) -> RobustnessReport:
    """One report, with a line of what is measured."""
    attack = settings.attack.name(len(data.class_names))
    called = prepared.called[name]
    through = f" {settings.seen.name}" if settings.seen.of_defence else ""
    prompt = f"prompt {reporting.quoted(model.templates)}{reporting.with_descriptions(digest_of(model))}"
    about = f"{len(data)} images, {attack}, {settings.precision_with(model)}, {prompt}"
    prepared.processes.print(f"{called} on {task}: {about}")
    state_dir = prepared.folder / "state"
    save = saved_pictures.place_of(prepared, name, task, attack, data)
    kept = "" if save is None else f" kept as {save.pixels}"
    report = evaluation.evaluate_robustness(
        model,
        data,
        settings,
        name=called,
        task=task,
        model_id=name,
        processes=prepared.processes,
        state_dir=state_dir / shared.slug(f"{name} {task} {attack}{through}{kept}"),
        progress=True,
        defence=defence,
        save=save,
    )
    first = prepared.run.stream_poisoning
    if first is None or defence is None:
        return report
    found = stream_poisoning(
        model,
        data,
        settings,
        defence=defence,
        num_poisoned=first,
        permutations=prepared.run.permutations,
        state_dir=state_dir / shared.slug(f"{name} {task} {attack}{through} after {first}"),
        progress=True,
    )
    prepared.processes.print(str(found))
    return found.noted_in(report)


def write(prepared: Prepared, measured: Measured) -> None:
    """Table, report and plots."""
    run, folder, saving = prepared.run, prepared.folder, prepared.saving
    reports = measured.reports
    own = [report for report in reports if report.model == run.model.model_name_or_path]
    others = [report for report in reports if report.model != run.model.model_name_or_path]
    if prepared.processes.is_main_process:
        recipe = dump_recipe(run.source)
        saving.attempt("the table", lambda: show(prepared, measured))
        saving.save("report.json", lambda: reporting.save_reports(folder / "report.json", own, others))
        saving.save("report.csv", lambda: reporting.save_csv(folder / "report.csv", reports))
        saving.save("recipe.yaml", lambda: write_text(folder / "recipe.yaml", recipe))
        if (comparison := prepared.comparison) is not None:
            rows = published.compared_rows(comparison, own, run.evaluations, measured.whole, prepared.tasks)
            saving.attempt("the published figures", lambda: show_published(comparison, rows))
            saving.save("published.csv", lambda: published.save_published(folder / "published.csv", comparison, rows))
        draw(prepared, measured)
        reference = prepared.called.get(run.reference or "")
        explanations.write_explanations(saving, measured.explained, reference)
    prepared.processes.wait_for_everyone()
    saving.finish()
    files = (
        "report.json",
        "report.csv",
        "published.csv",
        "recipe.yaml",
        "accuracy.png",
        "examples.png",
        "tradeoff.png",
        explanations.CSV,
        *explanations.pictures_of(list(prepared.tasks)).values(),
    )
    written = [name for name in files if (folder / name).is_file()]
    if run.save_adversarial is not None:
        written += saved_pictures.written(folder)
    if prepared.processes.is_main_process:
        line = f"saved to {folder}: {', '.join(written)}"
        saving.attempt("a line", lambda: prepared.processes.print(line))


def show(prepared: Prepared, measured: Measured) -> None:
    """Print the table, remarks, and whether the attack breaks the reference."""
    run, reports = prepared.run, measured.reports
    reporting.print_table(reporting.table(reports, prepared.called[run.model.model_name_or_path]))
    for told in filter(None, map(saved_pictures.figures, reports)):
        print(told)
    if (detected := reporting.detections(reports)) is not None:
        print()
        caption = (
            "in percent: flagged clean images; AUROC and true alarms at 5 % false ones, of images whose class was "
            "right when clean; flagged images of a wrong class (how many), and their AUROC"
        )
        reporting.print_table(as_text(detected, "detection", caption))
    if attacked := any(report.robust_accuracy for report in reports):
        share = reporting.percent(max(report.zero_gradient_share for report in reports))
        print(f"exactly-zero input gradients in the attacks: at most {share}")
    remarks: list[str | None] = [*measured.remarks, *shared.suite_remarks(prepared.tasks, reports)]
    remarks += [other_sizes([report for report in reports if report.task == task]) for task in prepared.tasks]
    if attacked and run.defence is not None and not any(report.view.goes_through for report in reports):
        remarks.append(
            "no attack went through the defence: the figures say nothing of its strength; add AdaptiveWorst."
        )
    for report in reports:
        remarks += [
            f"{titled(report)} on {report.task}: {told}." for told in (report.defence or {}).get("remarks", ())
        ]
    for line in filter(None, dict.fromkeys([*remarks, reporting.blind_warning(reports)])):
        print(f"\n{line}\n")
    for report in reports:
        if report.model == run.reference and report.robust_accuracy:
            print(self_check(report))


def show_published(comparison: published.Comparison, rows: Sequence[published.Row]) -> None:
    """Print measured and published figures beside each other, and what differs."""
    print()
    reporting.print_table(
        as_text(published.as_cells(comparison, rows), f"beside {comparison.name}", "accuracy in percent")
    )
    print("\n".join(["", *published.as_notes(comparison, rows), ""]))


def draw(prepared: Prepared, measured: Measured) -> None:
    """The plots, each of which may fail by itself."""
    run, folder, reports = prepared.run, prepared.folder, measured.reports
    plots = {"accuracy.png": partial(reporting.plot_accuracy, folder / "accuracy.png", reports)}
    if not any(report.robust_accuracy for report in reports):  # nothing was attacked
        plots = {}
    if measured.examples:
        plots["examples.png"] = partial(reporting.plot_examples, folder / "examples.png", *measured.examples)
    if plots and len(run.names) > 1:
        radius = min(reports[0].robust_accuracy)
        first = partial(reporting.plot_tradeoff, folder / "tradeoff.png", measured.under_first, radius)
        plots["tradeoff.png"] = first
    for name, plot in plots.items():
        prepared.saving.attempt(name, plot)


def self_check(report: RobustnessReport) -> str:
    """Whether the attack brought an undefended reference to about nothing, in one line."""
    radius, left = max(report.robust_accuracy.items())
    at = f"{report.attack} at {ThreatModel(radius, report.norm)} on {report.task}"  # type: ignore[arg-type]
    if left <= 0.05:
        falls = f"the undefended {report.name} falls to {reporting.percent(left)} under {at}"
        return f"self-check: {falls}: the attack works."
    return (
        f"self-check FAILED: the undefended {report.name} keeps {reporting.percent(left)} under {at}; "
        "the attack is too weak or the radius too small to tell robust from undefended."
    )
