"""What a benchmark is asked for: rows, evaluations, and how they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

PICTURES = "imagenet-pictures"
MADE_OF = ".made_of"  # a file in a cell's folder: digest of the weights, and the pictures, that it was made of


@dataclass(frozen=True)
class Model:
    """A row of the tables.

    Args:
        name: of its folder, and of its card.
        title: what tables call it.
        config: a packaged config by which it is trained; without one it is the model in `folder`, or the start.
        flags: of its training, beside the config.
        folder: of a model that another run has made.
        learning_rates: tried, each judged on held-out images; the best is taken.
    """

    name: str
    title: str
    config: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None
    learning_rates: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """A packaged config by which models are evaluated, with flags beside it.

    Args:
        name: of its folder.
        models: names of those that it is of; all where there are none.
        first_seeds: of so many of the benchmark's seeds, from the first; null takes all.
        title: of a defence in it: what is put before the names of models.
    """

    name: str
    config: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    models: Sequence[str] = ()
    first_seeds: int | None = None
    title: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """What is trained, evaluated and written.

    Args:
        name: of the folder of tables and plots.
        heading: of the table.
        about: below the heading.
        start: the checkpoint that all begin from: a Hub id, a folder, or digits-clip.
        start_title: what tables call it.
        start_id: what cards call it.
        output_dir: where everything is written.
        cards_dir: where tables, plots and cards go; null takes output_dir/cards.
        data_root: a folder of datasets in Hub layout (or HF_ROBUST_CLIP_DATA_ROOT).
        owner: of the cards' repositories.
        prefix: of their names, before that of the model.
        limits: what the models can't do, for cards and table.
        flags: of every training, beside its config; those of a model override them.
        seeds: each model is trained once with each, and tables tell mean and standard deviation over them; none takes
            the configs' own seed. Of several a card is of the first, since it is of one checkpoint.
        models: rows of the tables.
        evaluations: what makes their figures.
        tuning_steps: updates with each learning rate that is tried; null tries whole trainings, of which the best is
            that of the first seed. Few updates favour low rates.
        tradeoff_radius: at which clean and robust accuracy are plotted against each other; null plots none.
        baseline: title of the model that the others are compared with, image by image; null compares none.
        groups: by name the titles of tasks whose figures are told together, as their mean.
        pictures: labels of imagenet-sample-images by class name, of which a set of pictures is made.
        only: names of models; the others, and the tables, are left to other runs.
        jobs: processes that share the work.
        keep_going: whether other cells are begun when one has failed. The run ends with an error anyway.
        partial: whether tables and cards are made of what is finished, and nothing is run.
        earlier: with partial, a folder of tables that another run of this benchmark has written: rows that aren't
            finished here are taken from it, where training and evaluation are as asked. Their cards stay as they are.
    """

    name: str = ""
    heading: str = ""
    about: str = ""
    start: str = ""
    start_title: str = "pretrained"
    start_id: str = ""
    output_dir: str = ""
    cards_dir: str | None = None
    data_root: str | None = None
    owner: str = "hf-robust-clip"
    prefix: str = ""
    limits: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    models: Sequence[Model] = ()
    evaluations: Sequence[Evaluation] = ()
    tuning_steps: int | None = None
    tradeoff_radius: str | None = None
    baseline: str | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pictures: Mapping[str, Sequence[int]] = field(default_factory=dict)
    only: Sequence[str] = ()
    jobs: int = 1
    keep_going: bool = False
    partial: bool = False
    earlier: str | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs} must be at least 1.")
        if self.partial and self.only:
            raise ValueError("partial=true writes tables, which only leaves to other runs; give one of them.")
        if self.earlier is not None and not self.partial:
            raise ValueError(f"earlier={self.earlier!r} is read by partial=true alone; give both, or leave it out.")
        rows = [model.name for model in self.models]
        check_known("only", self.only, rows)
        for evaluation in self.evaluations:
            check_known(f"models of {evaluation.name}", evaluation.models, rows)
            first, seeds = evaluation.first_seeds, len(self.seeds)
            if first is not None and not 1 <= first <= seeds:
                mend = f"must be 1 to {seeds}, the number of seeds" if seeds else "is of no seeds"
                raise ValueError(f"first_seeds={first} of {evaluation.name} {mend}.")
        for model in self.models:
            check_once(f"learning_rates of {model.name}", [str(float(rate)) for rate in model.learning_rates])
        check_once("names of models", [model.name for model in self.models])
        taken = [*(evaluation.name for evaluation in self.evaluations), "tuning", "cards", PICTURES]
        for name in [run.name for model in self.models if model.config for run in self.runs_of(model)]:
            if name in taken or Path(name).name != name:
                raise ValueError(f"models: {name!r} can't be the name of a folder beside {', '.join(taken)}.")
        check_once("titles of models", [model.title for model in self.models])
        check_once("names of evaluations", [evaluation.name for evaluation in self.evaluations])

    @property
    def chosen(self) -> list[Model]:
        """The rows that this run is about."""
        return [model for model in self.models if not self.only or model.name in self.only]

    @property
    def out(self) -> Path:
        """Where everything is written."""
        return Path(self.output_dir)

    @property
    def cards(self) -> Path:
        """Where tables, plots and cards go."""
        return Path(self.cards_dir) if self.cards_dir else self.out / "cards"

    def runs_of(self, model: Model) -> list[Model]:
        """A row once for each seed, with a folder of its own; of what isn't trained here, and without seeds, itself.

        Raises ValueError for a seed that is there twice.
        """
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)!r} has one twice; name others.")
        if not model.config or not self.seeds:
            return [model]
        return [
            replace(model, name=f"{model.name}-seed{seed}", flags={**model.flags, "seed": seed}) for seed in self.seeds
        ]

    def folder_of(self, model: Model) -> str:
        """Where a row's checkpoint is."""
        return str(self.out / model.name) if model.config else model.folder or self.start

    def id_of(self, model: Model) -> str:
        """The id of a row's card; of the start its own."""
        return f"{self.owner}/{self.prefix}{model.name.replace('_', '-')}" if model.config else self.start_id


def check_known(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for a name that there isn't."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{argument}: there is no model {unknown[0]!r}; the names are {', '.join(known)}.")


def check_once(what: str, texts: Sequence[str]) -> None:
    """Raise ValueError for a text that is there twice."""
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ValueError(f"{what}: {twice[0]!r} is there twice; leave one.")


def models_of(benchmark: Benchmark, evaluation: Evaluation) -> list[Model]:
    """The rows that an evaluation is of."""
    return [model for model in benchmark.chosen if not evaluation.models or model.name in evaluation.models]
