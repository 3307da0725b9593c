"""A cleaning: fine-tune a poisoned model on other pairs, and show what is left of the backdoor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..arguments import Images, check_folder
from ..command_line import CommandLine, read_command
from ..modeling import ZeroShotClassifier
from ..names import shown_name
from ..objectives.base import Objective
from ..poisoning.poisoner import check_apart, check_target
from ..processes import join_processes
from ..report.backdoor import CLEAN_MODEL, POISONED_MODEL, WITHOUT_METHOD, BackdoorReport
from ..storage import delete
from ..training.config import RobustClipConfig
from ..training.identity import weights_digest
from ..zero_shot_data.errors import DatasetError
from . import backdoor, shared
from .poisoned import CLEAN_FOLDER, NOTE, Poisoning, read_poisoning
from .train_settings import OBJECTIVE, training_arguments

BESIDE = "state/without the method"  # in the output folder, where the control is trained


@dataclass(frozen=True, kw_only=True)
class CleanArguments:
    """What is cleaned, and how.

    Args:
        poisoned: a folder that a poisoning wrote. Without a dataset_name it is cleaned on the pairs that were kept
            out of its training.
        objective: the method; beside it the same training is done by its control.
        overwrite: begin anew in an output folder that isn't empty.
    """

    poisoned: str
    objective: Objective
    overwrite: bool = False


COMMAND = CommandLine(
    groups={"": (backdoor.PairArguments, CleanArguments, RobustClipConfig)},
    classes={"objective": OBJECTIVE},
    required=("poisoned", "objective", "output_dir"),
)


@dataclass(frozen=True)
class CleanRun:
    """A cleaning, checked, and all that it needs."""

    pairs: backdoor.PairArguments
    about: CleanArguments
    training: RobustClipConfig
    output_dir: str
    resume: bool
    source: dict[str, Any]


def main(words: Sequence[str], default_config: Path, description: str = "") -> None:
    """A cleaning as a command. A wrong setting ends it with one line and status 2."""
    left = partial(backdoor.left_by, beside=BESIDE)
    shared.run_command(lambda: read(words, default_config, description), clean, left)


def read(words: Sequence[str], default_config: Path, description: str = "") -> CleanRun:
    """Check every setting. Nothing is written or downloaded here."""
    given = read_command(COMMAND, words, default_config, description)
    made = given.made()
    training = training_arguments(given, made)
    about: CleanArguments = given.group(CleanArguments, made)
    if about.objective.control() is None:
        raise ValueError(
            f"objective={type(about.objective).__name__} has no control(), beside which a cleaning is shown; take one "
            "that cleans."
        )
    backdoor.check_given(given, training, about.objective, about.poisoned)
    pairs: backdoor.PairArguments = given.group(backdoor.PairArguments, made)
    own = [f.name for f in fields(pairs) if f.name != "data_root" and getattr(pairs, f.name) != f.default]
    if pairs.dataset_name is None and own:
        raise ValueError(f"{own[0]}={getattr(pairs, own[0])!r} does nothing without dataset_name: the pairs are those "
                         "that were kept out of the poisoning.")  # fmt: skip
    return CleanRun(
        pairs,
        about,
        training,
        str(given.asked("output_dir")),
        backdoor.wants_to_resume(given),
        given.settings,
    )


def clean(run: CleanRun) -> BackdoorReport:
    """Fine-tune by the method and without it, measure both beside the clean and the poisoned model, write."""
    note, processes = read_poisoning(run.about.poisoned), join_processes(run.training.use_cpu)
    place = clean_place(run, note)
    check_folder(run.output_dir, place, goes_on=True)
    saving = backdoor.begin(run.output_dir, processes)
    poisoned = model_as_then(run.about.poisoned, note.weights, run.about.poisoned)
    clean_model = model_as_then(place, note.clean_weights, run.about.poisoned)
    images = Images(dataset=note.test_dataset, split=note.test_split, data_root=data_root_of(run, note))
    test = backdoor.load_test(images, poisoned, None)
    test = replace(test, templates=tuple(note.templates))
    check_target(note.target, test.class_names)
    pairs, told = cleaning_pairs(run, note, poisoned)
    check_apart(note.poisoned_pictures, pairs)
    processes.print(f"cleaned on {len(pairs)} pairs, {told}")  # type: ignore[arg-type]
    if run.about.overwrite:
        backdoor.clear(saving.folder, BESIDE, processes)
    control = run.about.objective.control()
    assert control is not None  # `read` asked
    without, trainer = (
        backdoor.train_on_pairs(
            shared.load_model(run.about.poisoned), run.training, objective, pairs, folder, run.resume
        )
        for objective, folder in ((control, Path(run.output_dir, BESIDE)), (run.about.objective, None))
    )
    outcome = backdoor.Outcome(
        model=backdoor.plain(trainer),
        title=run.about.objective.title(),
        stage="cleaned",
        trainer=trainer,
        trigger=note.trigger(),
        target=note.target,
        test=test,
        about_data=f"{told}, {len(pairs)} pairs, none of them poisoned",  # type: ignore[arg-type]
        start=run.about.poisoned,
        source=run.source,
        processes=processes,
        saving=saving,
        seed=note.seed,
        batch_size=run.training.per_device_eval_batch_size,
        further={
            "poisoned_model": shown_name(run.about.poisoned),
            "trigger": str(note.trigger()),
            "target": note.target,
        },
    )
    controls = {CLEAN_MODEL: clean_model, POISONED_MODEL: poisoned, WITHOUT_METHOD: backdoor.plain(without)}
    report = backdoor.report_of(outcome, backdoor.judge(outcome, controls))
    backdoor.write(outcome, [report])
    if processes.is_main_process:
        delete(saving.folder.resolve() / "state", lambda file: False)  # where the control left no checkpoints
    return report


def cleaning_pairs(run: CleanRun, note: Poisoning, model: ZeroShotClassifier) -> tuple[Dataset, str]:
    """The pairs of settings, or those that were kept out of the poisoning; and what they are, in words."""
    processor = model.require_processor()
    if run.pairs.dataset_name is not None:
        told = f"{shown_name(run.pairs.dataset_name)}, split {run.pairs.dataset_train_split}"
        return run.pairs.load(processor), told
    own = backdoor.PairArguments(**{**note.pairs, "data_root": data_root_of(run, note)})
    again, kept = note.poisoner().split(own.load(processor), note.cleaning_pairs)
    if again.poisoned_keys() != note.poisoned_pictures:
        raise DatasetError(f"dataset {own.dataset_name!r} is not as it was when it was poisoned, so that pairs kept "
                           "out are not known; poison again, or name others by dataset_name.")  # fmt: skip
    return kept, f"{shown_name(str(own.dataset_name))}, split {own.dataset_train_split}, kept out of the poisoning"


def clean_place(run: CleanRun, note: Poisoning) -> str:
    """Where the model is that the poisoned one is compared with."""
    return str(Path(run.about.poisoned, CLEAN_FOLDER)) if note.clean_model is None else note.clean_model


def model_as_then(name: str, digest: str, poisoned: str) -> ZeroShotClassifier:
    """A model of the poisoning. Raises ValueError for one with other weights than it had."""
    model = shared.load_model(name)
    if weights_digest(model) != digest:
        raise ValueError(f"poisoned={poisoned!r}: {name!r} has other weights than its {NOTE} tells of; poison again.")
    return model


def data_root_of(run: CleanRun, note: Poisoning) -> str | None:
    """Where the datasets of the poisoning are: in the root that is given, else in its own."""
    return run.pairs.data_root or note.pairs.get("data_root")
