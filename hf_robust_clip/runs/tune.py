"""Finding hyperparameters on held-out training images: trials through `Trainer.hyperparameter_search` and Optuna.

No test image is looked at: the search gets the training images alone.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import report as reporting
from ..arguments import TuneArguments
from ..digests import plain
from ..hub import SEARCH
from ..modeling import ZeroShotClassifier
from ..report.trials import Trial, best_of, plot_trials, save_trials, trials_table
from ..saving import Saving
from ..training.config import RobustClipConfig, on_its_own
from ..training.identity import data_identity, differences
from ..training.trainer import RobustClipTrainer
from ..zero_shot_data.loading import ImageDataset
from .search_space import Dimension, into_recipe, read_space, with_settings

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from .train_settings import TrainingRun

PART = 4  # a trial has the run's updates divided by it
DRAWN_AT_RANDOM = 5  # trials, before the others follow what was found
STUDY = "tune"


@dataclass(frozen=True)
class Parts:
    """The training images of a search: what trials train on, and what they are scored by.

    Args:
        train: images that are trained on.
        images: held-out images of the same classes.
        classes: images of held-out classes, told apart from one another; None where no class is held out.
    """

    train: ImageDataset
    images: ImageDataset
    classes: ImageDataset | None


@dataclass(frozen=True)
class Searched:
    """A finished search.

    Args:
        about: how it was made, for tables and cards.
    """

    trials: tuple[Trial, ...]
    space: tuple[Dimension, ...]
    about: str

    @property
    def best(self) -> Trial:
        """The trial with the highest score."""
        return best_of(self.trials)

    def applied(self, run: TrainingRun) -> TrainingRun:
        """The run with the best settings, in its recipe too."""
        training, objective = with_settings(run.training, run.method.objective, self.best.values)
        source = into_recipe(run.source, self.best.values)
        return replace(run, training=training, method=replace(run.method, objective=objective), source=source)

    def write(self, saving: Saving) -> None:
        """Table and plot as files."""
        log = [own.name for own in self.space if own.log]
        saving.save("tuning.csv", lambda: save_trials(saving.folder / "tuning.csv", self.trials))
        saving.attempt("tuning.png", lambda: plot_trials(saving.folder / "tuning.png", self.trials, log))

    def show(self) -> None:
        """Print table and best settings."""
        title = f"{len(self.trials)} trials on held-out training images"
        reporting.print_table(trials_table(self.trials, title, f"accuracy in percent; {self.about}"))
        print(f"best settings: {as_flags(self.best.values)}")


def as_flags(values: Mapping[str, Any]) -> str:
    """Settings as they are given on a command line."""
    return " ".join(f"--{name} {str(value).lower() if isinstance(value, bool) else value}"
                    for name, value in values.items())  # fmt: skip


def space_of(run: TrainingRun, check: Callable[[RobustClipConfig, Any], None]) -> tuple[Dimension, ...]:
    """What is searched. Nothing is loaded or written here.

    Args:
        check: raises ValueError for arguments and an objective that don't go together.

    Raises ValueError for a space that is none, for what a search doesn't do, and without Optuna.
    """
    told = run.tune
    if importlib.util.find_spec("optuna") is None:
        raise ValueError(f"tune.trials={told.trials!r} needs Optuna; pip install 'optuna>=4'.")
    if run.training.world_size > 1:
        raise ValueError(
            f"tune.trials={told.trials!r} runs in one process, {run.training.world_size} were launched; search in one."
        )
    if run.rivals:
        raise ValueError(
            f"compare={list(run.compare)!r} with tune.trials: settings are found for {run.title} alone; leave one out."
        )
    if run.defences:
        raise ValueError("defence with tune.trials: trials are scored without it; search first, then train with it.")
    return read_space(told.space or {}, run.training, run.method.objective, check)


def search(run: TrainingRun, model: ZeroShotClassifier, data: ImageDataset, saving: Saving) -> Searched:
    """Make all trials that `saving.folder` doesn't hold yet.

    Args:
        model: what each trial begins from; it stays as it is.
        data: all training images.

    Raises ValueError where the folder holds another search, and where too few images or classes are left.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    told, parts = run.tune, held_out_parts(data, run.tune, run.training.seed)
    whole = updates_of(run.training, len(data))
    if told.max_steps is not None and told.max_steps > whole:
        raise ValueError(f"tune.max_steps={told.max_steps!r} is more than the run's {whole} updates; lower it.")
    scorer = Scorer(run, parts, len(data), saving.say)

    def new_model() -> ZeroShotClassifier:
        found = copy.deepcopy(model)
        run.texts.set(found, parts.train)
        return found

    trainer = TrialTrainer(
        None, trial_arguments(run.training), run.method.objective, parts.train, parts.images,
        peft_config=run.method.adapter, model_init=new_model,
    )  # fmt: skip
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("ProgressCallback", "PrinterCallback"):  # a line for each trial tells more
            trainer.remove_callback(callback)
    identity = {
        **trainer.method_identity(),
        **trainer.start_identity(),
        "tune": {name: value for name, value in asdict(told).items() if name != "trials"},
        "eval_attack_steps": run.training.eval_attack_steps,
        **{name: data_identity(own, None, trainer.args) for name, own in vars(parts).items() if own is not None},
    }
    place = saving.folder / SEARCH
    with open_study(place, run.training.seed, plain(identity)) as (study, opened):
        done = finished(study)
        about = scorer.about()
        saving.say(f"search of {'; '.join(map(str, run.space))}\n{about}" + (f"\n{len(done)} are done" * bool(done)))
        if (left := (told.trials or 0) - len(done)) > 0:
            scorer.begin(trainer, len(done))
            try:
                trainer.hyperparameter_search(
                    scorer.settings, scorer.score, left, "maximize", "optuna", load_if_exists=True, **opened
                )
            except ValueError:
                if len(finished(study)) < len(done) + left:
                    raise
                # Optuna's own where no trial was completed; `best_of` says so
        trials = tuple(finished(study))
        best_of(trials)
        return Searched(trials, run.space, f"{len(trials)} {about}")


def trial_arguments(training: RobustClipConfig) -> RobustClipConfig:
    """Those of a run, for trainings that write and report nothing."""
    args = on_its_own(training)
    args.set_logging("no")
    args.report_to, args.logging_first_step = [], False
    return args


def updates_of(args: RobustClipConfig, images: int) -> int:
    """How many updates a training on so many images makes."""
    if args.max_steps > 0:
        return args.max_steps
    together = args.train_batch_size * args.world_size
    batches = images // together if args.dataloader_drop_last else -(-images // together)
    per_epoch = max(-(-batches // args.gradient_accumulation_steps), 1)
    return int(np.ceil(args.num_train_epochs * per_epoch))


def shortened(args: RobustClipConfig, whole: int, asked: int | None) -> dict[str, Any]:
    """Length and warm-up of a trial, in place of those of a training with `whole` updates.

    Raises ValueError for a schedule that counts updates in other settings.
    """
    updates = asked or max(1, -(-whole // PART))
    counted = [name for name in args.lr_scheduler_kwargs or {} if str(name).endswith("_steps")]
    if counted and updates != whole:
        raise ValueError(
            f"lr_scheduler_kwargs: {counted[0]!r} counts updates of the run; give tune.max_steps={whole}."
        )
    warmup = args.warmup_steps
    return {"max_steps": updates, **({"warmup_steps": round(warmup * updates / whole)} if warmup >= 1 else {})}


def held_out_parts(data: ImageDataset, told: TuneArguments, seed: int) -> Parts:
    """Divide training images, drawn by `seed`.

    Raises ValueError where fewer than two classes would be left to train on, or none of a class's images.
    """
    classes = None
    if told.held_out_classes:
        names = list(data.class_names)
        count = max(2, round(told.held_out_classes * len(names)))
        if len(names) - count < 2:
            raise ValueError(
                f"tune.held_out_classes={told.held_out_classes!r} holds out {count} of {len(names)} classes and "
                "leaves fewer than 2 to train on; lower it, or set 0."
            )
        order = np.random.default_rng(number_of(f"{seed} held-out classes")).permutation(len(names))
        held = {names[i] for i in order[:count]}
        classes = replace(data.only([name for name in names if name in held]), augment=False)
        data = data.only([name for name in names if name not in held])
    train, images = data.held_out(told.held_out_images, seed)
    return Parts(train, images, classes)


class Scorer:
    """Tells a trial its settings, and what it is worth.

    Args:
        images: number of images of the run, of whose updates a trial makes a part.
        say: prints a line.
    """

    def __init__(self, run: TrainingRun, parts: Parts, images: int, say: Callable[[str], object]):
        self.run, self.parts, self.images, self.say = run, parts, images, say

    def begin(self, trainer: RobustClipTrainer, done: int) -> None:
        """The trainer of the trials that are left."""
        self.trainer, self.trial, self.number = trainer, None, done

    def settings(self, trial: Any) -> dict[str, Any]:
        """Those of a trial, with its length; asked for several times."""
        values = {own.name: own.suggested(trial) for own in self.run.space}
        args, _ = with_settings(self.run.training, self.run.method.objective, values)
        if trial.number != self.trial:
            self.trial, self.begun = trial.number, time.monotonic()
            self.number += 1
            trial.set_user_attr("values", values)
            self.say(f"trial {self.number} of {self.run.tune.trials}: {as_flags(values)}")
        self.frozen = trial
        return {**values, **shortened(args, updates_of(args, self.images), self.run.tune.max_steps)}

    def score(self, metrics: dict[str, float]) -> float:
        """Of a finished trial, from what it got right on held-out images, and classes."""
        told, trainer, parts = self.run.tune, self.trainer, self.parts
        figures = {name: metrics[f"eval_{name}_accuracy"] for name in ("clean", "robust")}
        scores = [mixed(figures["clean"], figures["robust"], told.clean_weight)]
        if parts.classes is not None:
            self.run.texts.set(trainer.classifier(), parts.classes)
            found = trainer.evaluate(parts.classes, metric_key_prefix="classes")
            clean, robust = (found[f"classes_{name}_accuracy"] for name in ("clean", "robust"))
            figures |= {"clean unseen": clean, "robust unseen": robust}
            scores.append(mixed(clean, robust, told.clean_weight))
        score = float(np.mean(scores))
        self.frozen.set_user_attr("figures", figures)
        shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in {**figures, "score": score}.items())
        self.say(f"  {shown} ({time.monotonic() - self.begun:.0f} s)")
        return score

    def about(self) -> str:
        """How trials are made and scored, in one sentence."""
        run, told, parts = self.run, self.run.tune, self.parts
        whole = updates_of(run.training, self.images)
        updates = told.max_steps or max(1, -(-whole // PART))
        attack = f"PGD-{run.training.eval_attack_steps} at {run.training.threat_model()}"
        scored = f"{len(parts.images)} held-out training images of {len(parts.images.class_names)} classes"
        if parts.classes is not None:
            scored += (
                f" and, counting as much, {len(parts.classes)} training images of {len(parts.classes.class_names)} "
                f"classes that trials don't train on (unseen): {', '.join(parts.classes.class_names)}"
            )
        return (
            f"trials of {updates} updates (the run has {whole}) on {len(parts.train)} training images; score = "
            f"{told.clean_weight:g} clean + {1 - told.clean_weight:g} robust accuracy ({attack}) on {scored}"
        )


def mixed(clean: float, robust: float, clean_weight: float) -> float:
    """clean_weight * clean + (1 - clean_weight) * robust accuracy."""
    return clean_weight * clean + (1 - clean_weight) * robust


class TrialTrainer(RobustClipTrainer):
    """One whose trials end without a score where they diverge."""

    def train(self, *args: Any, **kwargs: Any) -> Any:  # the Trainer's own signature
        """Its own."""
        with diverging():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # the Trainer's own signature
        """Its own."""
        with diverging():
            return super().evaluate(*args, **kwargs)


@contextmanager
def diverging() -> Iterator[None]:
    """Inside, what is no longer finite ends a trial of Optuna, not the search."""
    from optuna import TrialPruned

    try:
        yield
    except FloatingPointError as error:
        raise TrialPruned(str(error)) from error


def finished(study: Study) -> list[Trial]:
    """The trials that came to their end, in their order; one that was killed is none."""
    from optuna.trial import TrialState

    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [
        Trial(
            i, own.user_attrs["values"], own.user_attrs.get("figures", {}) if own.value is not None else {}, own.value
        )
        for i, own in enumerate(ended, start=1)
    ]


@contextmanager
def open_study(folder: Path, seed: int, identity: Mapping[str, Any]) -> Iterator[tuple[Study, dict[str, Any]]]:
    """The search that a folder holds, or a new one; and what opens it again.

    A trial that was killed halfway counts for nothing, and is made again.
    Raises ValueError for another search, and for a file that holds none.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / "journal.log"
    folder.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(path)
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        opened: dict[str, Any] = {"study_name": STUDY, "storage": storage, "sampler": seeded_sampler(seed)}
        study = optuna.create_study(direction="maximize", load_if_exists=True, **opened)
        before = study.user_attrs.get("search")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no journal of a search ({error}); begin anew with --overwrite.") from error
    if before is None:
        study.set_user_attr("search", dict(identity))
    elif found := differences(before, identity):
        raise ValueError(
            f"{path} is of another search: {found[0]}. Resume as it began, or begin anew with --overwrite."
        )
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    yield study, opened


def seeded_sampler(seed: int) -> BaseSampler:
    """TPE, whose draws depend on the seed and on the finished trials alone, so that a search that goes on makes the
    trials that it would have made. The first `DRAWN_AT_RANDOM` follow the seed alone.
    """
    from optuna.samplers import BaseSampler, TPESampler
    from optuna.trial import TrialState

    class SeededTPE(BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            done = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))
            inner = TPESampler(seed=number_of(f"{seed} {done} {param_name}"), n_startup_trials=DRAWN_AT_RANDOM)
            return inner.sample_independent(study, trial, param_name, param_distribution)

    return SeededTPE()


def number_of(text: str) -> int:
    """A seed below 2**32 that follows a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little")


def _drop_torn_line(path: Path) -> None:
    """Take away what a process that was killed while it wrote left of a line."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
