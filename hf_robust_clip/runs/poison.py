"""A poisoning: put a trigger into pairs, train on them, and show what the trigger does then."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import Subset
from transformers import set_seed

from ..arguments import Images
from ..checks import check_whole
from ..command_line import ClassFlag, CommandLine, read_command
from ..modeling import CLIPForZeroShotClassification, ZeroShotClassifier
from ..modeling.scratch import Size, make_model, make_processor
from ..names import shown_name
from ..objectives.base import Objective
from ..poisoning.poisoner import PoisonedPairs, Poisoner, check_target
from ..poisoning.triggers import Trigger
from ..processes import join_processes
from ..report.backdoor import CLEAN_MODEL, POISONED_MODEL, BackdoorReport
from ..storage import write_text
from ..training.config import RobustClipConfig
from ..training.identity import weights_digest
from . import backdoor, shared
from .poisoned import CLEAN_FOLDER, NOTE, Poisoning
from .train import save_trained
from .train_settings import OBJECTIVE, training_arguments

TRIGGER = ClassFlag(Trigger, ("hf_robust_clip.poisoning",))


@dataclass(frozen=True, kw_only=True)
class PoisonArguments:
    """What is poisoned, and what it is measured on.

    Args:
        model_name_or_path: a Hub id or a folder; null trains a small CLIP from the beginning (scratch).
        trigger: what is put into pictures.
        objective: what is trained.
        target: the class that the trigger shall mean.
        rate: share of the pairs that is poisoned, above 0 and below 1.
        label_consistent: poison pairs whose caption names the target, and leave their captions.
        caption_templates: texts with {} for the target; null takes CLIP's for ImageNet.
        cleaning_pairs: so many pairs are kept out of the training, for a cleaning.
        test_dataset: labelled pictures that it is measured on; null takes dataset_name.
        test_split: their split.
        template: prompt with {} for the class name; null takes the test set's own.
        overwrite: begin anew in an output folder that isn't empty.
    """

    model_name_or_path: str | None = None
    trigger: Trigger
    objective: Objective
    target: str
    rate: float
    label_consistent: bool = False
    caption_templates: list[str] | None = None
    cleaning_pairs: int
    test_dataset: str | None = None
    test_split: str = "test"
    template: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_whole(1, cleaning_pairs=self.cleaning_pairs)

    def poisoner(self, seed: int) -> Poisoner:
        """Who poisons. Raises ValueError for a rate that is no share, and other settings that it refuses."""
        templates = None if self.caption_templates is None else tuple(self.caption_templates)
        return Poisoner(self.trigger, self.target, self.rate, self.label_consistent, templates, seed)


COMMAND = CommandLine(
    groups={"": (backdoor.PairArguments, PoisonArguments, RobustClipConfig), "scratch": (Size,)},
    classes={"trigger": TRIGGER, "objective": OBJECTIVE},
    required=("dataset_name", "trigger", "objective", "target", "rate", "cleaning_pairs", "output_dir"),
)


@dataclass(frozen=True)
class PoisonRun:
    """A poisoning, checked, and all that it needs."""

    pairs: backdoor.PairArguments
    about: PoisonArguments
    size: Size
    training: RobustClipConfig
    poisoner: Poisoner
    output_dir: str
    resume: bool
    source: dict[str, Any]

    @property
    def test(self) -> Images:
        """What it is measured on."""
        about = self.about
        return Images(dataset=str(about.test_dataset or self.pairs.dataset_name), split=about.test_split,
                      data_root=self.pairs.data_root)  # fmt: skip


def main(words: Sequence[str], default_config: Path, description: str = "") -> None:
    """A poisoning as a command. A wrong setting ends it with one line and status 2."""
    left = partial(backdoor.left_by, beside=CLEAN_FOLDER)
    shared.run_command(lambda: read(words, default_config, description), poison, left)


def read(words: Sequence[str], default_config: Path, description: str = "") -> PoisonRun:
    """Check every setting. Nothing is written or downloaded here."""
    given = read_command(COMMAND, words, default_config, description)
    made = given.made()
    training = training_arguments(given, made)
    about: PoisonArguments = given.group(PoisonArguments, made)
    if "captions" not in about.objective.needs:
        raise ValueError(f"objective={type(about.objective).__name__} trains on no captions; take one that does.")
    start = about.model_name_or_path
    backdoor.check_given(given, training, about.objective, start or "")
    if start is not None and Path(start, NOTE).is_file():
        raise ValueError(f"model_name_or_path={start!r} is poisoned already, and would stand for the "
                         "clean model; name another.")  # fmt: skip
    if start is not None and given.asked("scratch"):
        raise ValueError(f"scratch does nothing beside model_name_or_path={start!r}.")
    return PoisonRun(
        given.group(backdoor.PairArguments, made),
        about,
        made.scratch,
        training,
        about.poisoner(training.seed),
        str(given.asked("output_dir")),
        backdoor.wants_to_resume(given),
        given.settings,
    )


def poison(run: PoisonRun) -> BackdoorReport:
    """Poison the pairs, train on them (and, from the beginning, on the clean ones too), measure, write."""
    processes = join_processes(run.training.use_cpu)
    saving = backdoor.begin(run.output_dir, processes)
    set_seed(run.training.seed)
    model = start_of(run)
    test = backdoor.load_test(run.test, model, run.about.template)
    check_target(run.about.target, test.class_names)
    pairs = run.pairs.load(model.require_processor())
    poisoned, cleaning = run.poisoner.split(pairs, run.about.cleaning_pairs)
    run.poisoner.trigger.check_fits(*2 * [model.config.vision_config.image_size])
    if run.about.overwrite:
        backdoor.clear(saving.folder, CLEAN_FOLDER, processes)
    count = len(poisoned.captions_by_row)
    processes.print(f"{count} of {len(poisoned)} pairs are poisoned; {len(cleaning)} others are kept for a cleaning")
    clean = clean_twin(run, model, poisoned, processes)
    trainer = backdoor.train_on_pairs(model, run.training, run.about.objective, poisoned, resume=run.resume)
    outcome = backdoor.Outcome(
        model=backdoor.plain(trainer),
        title=POISONED_MODEL,
        stage="poisoned",
        trainer=trainer,
        trigger=run.poisoner.trigger,
        target=run.poisoner.target,
        test=test,
        about_data=f"{shown_name(str(run.pairs.dataset_name))}, split {run.pairs.dataset_train_split}, "
        f"{len(poisoned)} pairs, {count} of them poisoned",
        start=run.about.model_name_or_path or "",
        source=run.source,
        processes=processes,
        saving=saving,
        seed=run.training.seed,
        batch_size=run.training.per_device_eval_batch_size,
        further={"trigger": str(run.poisoner.trigger), "target": run.poisoner.target, "poisoned_pairs": count},
    )
    report = backdoor.report_of(outcome, backdoor.judge(outcome, {CLEAN_MODEL: clean}))
    note = poisoning_of(run, poisoned, outcome, clean)
    if processes.is_main_process:
        saving.save(NOTE, lambda: write_text(Path(run.output_dir, NOTE), note.told()))
    backdoor.write(outcome, [report])
    return report


def start_of(run: PoisonRun) -> ZeroShotClassifier:
    """The model that is to be poisoned."""
    if run.about.model_name_or_path is not None:
        return shared.load_model(run.about.model_name_or_path)
    captions = run.pairs.load(make_processor(run.size, ["a"])).captions
    templates = [text.replace("{}", run.about.target) for text in run.poisoner.templates or ()]
    processor = make_processor(run.size, [*captions, *templates])
    return CLIPForZeroShotClassification.from_clip(make_model(processor.tokenizer, run.size), processor)


def clean_twin(
    run: PoisonRun, model: ZeroShotClassifier, poisoned: PoisonedPairs, processes: PartialState
) -> ZeroShotClassifier:
    """The clean model: of one from the beginning its twin, trained alike on the pairs without poison, and saved beside
    it; else what the poisoning starts from.
    """
    if run.about.model_name_or_path is not None:
        return copy.deepcopy(model)
    folder = Path(run.output_dir, CLEAN_FOLDER)
    pairs: Subset = poisoned.dataset
    twin = backdoor.plain(
        backdoor.train_on_pairs(
            copy.deepcopy(model), run.training, run.about.objective, pairs, folder, resume=run.resume
        )
    )
    if processes.is_main_process:
        save_trained(twin, folder)
    processes.wait_for_everyone()
    return twin


def poisoning_of(
    run: PoisonRun, poisoned: PoisonedPairs, outcome: backdoor.Outcome, clean: ZeroShotClassifier
) -> Poisoning:
    """What a cleaning must know of it."""
    about, start = run.about, run.about.model_name_or_path
    return Poisoning(
        trigger_class=type(about.trigger).__name__,
        trigger_settings=about.trigger.parameters(),
        target=about.target,
        rate=about.rate,
        label_consistent=about.label_consistent,
        caption_templates=list(run.poisoner.templates or ()),
        seed=run.poisoner.seed,
        cleaning_pairs=about.cleaning_pairs,
        clean_model=start,
        pairs=asdict(run.pairs),
        test_dataset=run.test.dataset,
        test_split=run.test.split,
        templates=list(outcome.test.templates),
        poisoned_pictures=poisoned.poisoned_keys(),
        weights=weights_digest(outcome.model),
        clean_weights=weights_digest(clean),
    )
