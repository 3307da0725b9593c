"""What poisonings and cleanings have in common: pairs, trainings on them, and what is written of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import Dataset

from .. import unused_settings as unused
from ..arguments import Images, check_folder
from ..checks import check_whole
from ..command_line import Given
from ..evaluation.backdoor import backdoor_report, measure_backdoor, triggered_examples
from ..hub import clear_checkpoints, dump_recipe
from ..modeling import ZeroShotClassifier
from ..names import hub_name, shown_folder, shown_name
from ..objectives.base import Objective
from ..poisoning.triggers import Trigger
from ..report.backdoor import BackdoorReport, Stage, figures, make_backdoor_card, plot_backdoor, save_backdoor_reports
from ..report.card import CardInfo, card_state
from ..report.plots import plot_examples
from ..report.report import Measurement
from ..report.tables import as_text, print_table
from ..saving import Saving, left_by_training
from ..secrets import without_token_keys
from ..storage import check_writable, write_text
from ..training.checkpoints import NothingToResume, newest_whole_checkpoint
from ..training.config import RobustClipConfig, check_augmentation, on_its_own
from ..training.logit_scale import LimitScale
from ..training.trainer import RobustClipTrainer
from ..zero_shot_data.loading import ImageDataset
from ..zero_shot_data.pairs import InMemory, PairDataset, load_pairs
from . import shared
from .train import save_trained

SMALL = 2**28  # bytes of finished pixels up to which all of them are kept


@dataclass(frozen=True, kw_only=True)
class PairArguments:
    """Which pairs of pictures and captions are taken.

    Args:
        dataset_name: coloured-digits, a folder (pictures with metadata.csv, parquet, tar files) or a Hub id.
        dataset_train_split: its split.
        dataset_revision: of a Hub id.
        data_root: a folder of datasets in Hub layout, in which the dataset is looked for.
        image_column: where it can't be guessed.
        caption_column: where it can't be guessed.
        streaming: read max_images rows of a shuffled stream, without downloading the rest.
        max_images: so many pairs at most.
    """

    dataset_name: str | None = None
    dataset_train_split: str = "train"
    dataset_revision: str | None = None
    data_root: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    streaming: bool = False
    max_images: int | None = None

    def __post_init__(self) -> None:
        if self.max_images is not None:
            check_whole(1, max_images=self.max_images)

    def load(self, processor: Any) -> PairDataset:
        """The pairs, prepared for a model."""
        return load_pairs(
            str(self.dataset_name),
            self.dataset_train_split,
            processor,
            data_root=self.data_root,
            revision=self.dataset_revision,
            image_column=self.image_column,
            caption_column=self.caption_column,
            streaming=self.streaming,
            max_images=self.max_images,
        )


@dataclass(frozen=True)
class Outcome:
    """A trained model with what it is measured by, and where it goes.

    Args:
        title: what tables call it.
        settings: of the training, for the card.
        about_data: one line on the pairs.
        start: what the training started from.
    """

    model: ZeroShotClassifier
    title: str
    stage: Stage
    trainer: RobustClipTrainer
    trigger: Trigger
    target: str
    test: ImageDataset
    about_data: str
    start: str
    source: dict[str, Any]
    processes: PartialState
    saving: Saving
    seed: int = 0
    batch_size: int = 128
    further: Mapping[str, Any] = field(default_factory=dict)  # of the table on the training


def check_given(given: Given, training: RobustClipConfig, objective: Objective, start: str) -> None:
    """Raise ValueError/OSError for an output folder that can't be written to without harm, for settings that would do
    nothing, and for a push.
    """
    if training.push_to_hub:
        raise ValueError("push_to_hub=True: poisoned and cleaned models stay here; push a folder by `hf upload`.")
    unused.check_pairs(given, unused.defaults_of(RobustClipConfig), attacked=objective.attacked)
    check_augmentation(training, whole_pictures=False)
    overwrite = bool(given.asked("overwrite"))
    if overwrite and wants_to_resume(given):
        raise ValueError("overwrite=true deletes what resume_from_checkpoint would go on from; choose one.")
    check_folder(str(given.asked("output_dir")), start, overwrite or wants_to_resume(given))
    if card_state(Path(str(given.asked("output_dir")), "README.md")) == "theirs":
        raise OSError(f"{given.asked('output_dir')!r} has a README.md that is no card of this package; move it.")


def wants_to_resume(given: Given) -> bool:
    """Whether the run goes on from its checkpoints."""
    return given.asked("resume_from_checkpoint") not in (None, False, "false")


def begin(folder: str | Path, processes: PartialState) -> Saving:
    """Where a run writes. Nothing is written or deleted yet."""
    check_writable(folder)
    return Saving(Path(folder), processes.print)


def clear(folder: Path, beside: str, processes: PartialState) -> None:
    """Delete the checkpoints of what is trained, and of what is trained beside it."""
    if processes.is_local_main_process:
        for place in (folder, folder / beside):
            clear_checkpoints(place)
    processes.wait_for_everyone()


def left_by(folder: str, beside: str) -> str:
    """Where a run that was stopped goes on: in its own training, or in that beside it, which comes first."""
    places = [str(place) for place in (folder, Path(folder, beside)) if newest_whole_checkpoint(place)]
    return left_by_training((places or [folder])[0])


def load_test(images: Images, model: ZeroShotClassifier, template: str | None) -> ImageDataset:
    """The labelled pictures that backdoors are measured on, at the size at which pairs get the trigger, that of the
    model; the model's classes are theirs.
    """
    data = shared.load_data(replace(images, attack_resolution="model"), model)
    templates = (template,) if template else data.templates
    model.set_classes(data.class_names, templates)
    return replace(data, dataset_id=shown_name(data.dataset_id), templates=templates)


def train_on_pairs(
    model: ZeroShotClassifier,
    args: RobustClipConfig,
    objective: Objective,
    pairs: Dataset,
    folder: Path | None = None,
    resume: bool = False,
) -> RobustClipTrainer:
    """Train both towers; without a folder of its own a training leaves no checkpoints."""
    side = model.config.vision_config.image_size
    if 12 * side**2 * len(pairs) <= SMALL:  # type: ignore[arg-type]
        pairs = InMemory(pairs)
    args = args if folder is None else on_its_own(args, folder)
    trainer = RobustClipTrainer(model, args, objective, pairs, callbacks=[LimitScale()])
    try:
        trainer.train(resume_from_checkpoint=resume)
    except NothingToResume:
        trainer.accelerator.print(f"no whole checkpoint in {args.output_dir}: the training begins anew")
        trainer.train()
    return trainer


def plain(trainer: RobustClipTrainer) -> ZeroShotClassifier:
    """The trained classifier without wrappers, in eval mode."""
    core = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    return core.eval()


def judge(outcome: Outcome, models: Mapping[str, ZeroShotClassifier]) -> dict[str, tuple[Measurement, ...]]:
    """What is measured of the controls, by name, with the outcome's classes."""
    found = {}
    for name, model in models.items():
        model.to(outcome.model.device)
        model.set_classes(outcome.test.class_names, outcome.test.templates)
        found[name] = measure_backdoor(
            model, outcome.test, outcome.trigger, outcome.target, judge=name, batch_size=outcome.batch_size,
            seed=outcome.seed, processes=outcome.processes,
        )  # fmt: skip
    return found


def report_of(outcome: Outcome, controls: Mapping[str, tuple[Measurement, ...]]) -> BackdoorReport:
    """The outcome beside its controls."""
    outcome.model.set_classes(outcome.test.class_names, outcome.test.templates)
    return backdoor_report(
        outcome.model, outcome.test, outcome.trigger, outcome.target, controls, name=outcome.title,
        stage=outcome.stage, model_id=shown_folder(str(outcome.saving.folder)), batch_size=outcome.batch_size,
        seed=outcome.seed, processes=outcome.processes,
    )  # fmt: skip


def write(outcome: Outcome, reports: Sequence[BackdoorReport]) -> None:
    """Weights, table, report, card and plots."""
    saving, folder = outcome.saving, outcome.saving.folder
    if outcome.processes.is_main_process:
        saving.save("the weights", lambda: save_trained(outcome.model, folder))
        text = dump_recipe(without_token_keys(outcome.source))
        saving.save("recipe.yaml", lambda: write_text(folder / "recipe.yaml", text))
        saving.attempt("the table", lambda: _show(outcome, reports))
        plotted = saving.attempt("backdoor.png", lambda: _plotted(folder, reports))
        shown = saving.attempt("triggered.png", lambda: _pictured(outcome))
        info = card_info(outcome, plotted)
        card = str(make_backdoor_card(reports, info, shown))
        saving.save("backdoor.json", partial(save_backdoor_reports, folder / "backdoor.json", reports, info))
        saving.save("README.md", lambda: write_text(folder / "README.md", card))
    outcome.processes.wait_for_everyone()
    saving.finish()
    outcome.processes.print(f"saved to {folder}: weights, processor, recipe.yaml, backdoor.json, README.md, plots")


def card_info(outcome: Outcome, plotted: str | None) -> CardInfo:
    """What the card says beside the figures."""
    base = hub_name(outcome.start) or ""
    return CardInfo(
        repo_id=shown_folder(str(outcome.saving.folder)),
        base_model=base,
        training_data=outcome.about_data,
        paper=outcome.trainer.training_objective.paper,
        settings={**outcome.trainer.settings(), **outcome.further},
        template=outcome.test.templates[0],
        class_names=outcome.test.class_names,
        limits="The clean accuracy is that of these classes; others were not looked at.",
        plot=plotted,
        family=outcome.model.config.model_type,
    )


def _show(outcome: Outcome, reports: Sequence[BackdoorReport]) -> None:
    caption = "percent, 95 % intervals; ASR: triggered images of other classes that are called the target (top-1), or "
    caption += "have it among the likeliest; untriggered: called the target without the trigger"
    print_table(as_text(figures(reports), f"before and after: {outcome.title}", caption))


def _plotted(folder: Path, reports: Sequence[BackdoorReport]) -> str:
    plot_backdoor(folder / "backdoor.png", reports)
    return "backdoor.png"


def _pictured(outcome: Outcome) -> str:
    found = triggered_examples(outcome.model, outcome.test, outcome.trigger, outcome.target, seed=outcome.seed)
    title = f"{outcome.title}, {outcome.trigger}, target {outcome.target!r}"
    heads = ("as it is", "what the trigger changes", "with the trigger")
    plot_examples(outcome.saving.folder / "triggered.png", *found, title=title, heads=heads)
    return "triggered.png"
