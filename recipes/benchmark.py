"""A benchmark by a YAML file: models that are trained, evaluations of all of them, tables, plots and cards.

    python recipes/benchmark.py --config recipes/configs/mini-clip/benchmark.yaml --data_root <folder of Hub datasets>
    python recipes/benchmark.py --config recipes/configs/digits-clip/prompt_benchmark.yaml

Each model is a training by one of the packaged configs and some flags, each evaluation such a config too. What is
finished is not repeated, unless its settings, the weights that it was made of or the package's version changed: a
killed run goes on.

`--jobs 12` lets so many processes share the work, whose cells are trainings with a learning rate that is tried,
trainings with a seed, and evaluations of one checkpoint: first all rates of the models in the file's order, then all
seeds of each, then the evaluations in their order. Figures are the same for any number of jobs on one GPU; on a CPU
each process has fewer threads, which may round otherwise. `out/seconds.csv` tells what each cell took, `<folder>.log`
what it printed. Several runs may be started on one folder: none repeats what another is at work on. `--only "[a, b]"`
trains and evaluates these alone; `--keep_going` goes on with the others when a cell fails; `--partial` runs nothing,
and writes tables and cards of what is finished. `--cards_dir hub_cards` puts the cards where they are kept.

A row beside those that are there costs its own cells alone: `--only "[mine]"` makes them, then `--partial --earlier
hub_cards/mini-benchmark` writes tables of them and of the rows whose reports are in that folder.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import yaml

from hf_robust_clip.command_line import CommandLine, packaged_config, read_command
from hf_robust_clip.digests import digest, file_digest
from hf_robust_clip.digits_clip import EMBEDDED_MODEL
from hf_robust_clip.environment import library_versions
from hf_robust_clip.evaluation.settings import EvaluationSettings
from hf_robust_clip.hub import dump_recipe
from hf_robust_clip.modeling.checkpoints import read_config
from hf_robust_clip.names import task_titles
from hf_robust_clip.report import (
    RobustnessReport,
    as_markdown,
    by_model,
    differences_told,
    figures_by_task,
    figures_of_defences,
    load_card_info,
    load_reports,
    make_card,
    plot_accuracy,
    plot_defences,
    plot_tradeoff,
    save_csv,
    save_reports,
)
from hf_robust_clip.runs import evaluate, train
from hf_robust_clip.runs.grid import Cell, check_cells, finished_cells, held, run_cells, say
from hf_robust_clip.runs.interruptions import one_line_errors
from hf_robust_clip.runs.shared import quiet_loading
from hf_robust_clip.storage import whole_file, write_text
from hf_robust_clip.threat_model import parse_radius

PICTURES = "imagenet-pictures"
WEIGHTS = (".safetensors", ".bin", ".json", ".txt")  # of files in a checkpoint's folder
PLACES = ("output_dir", "model_name_or_path")  # settings that no figure depends on: of the model, its weights tell
ROWS = "rows.json"  # beside the tables: by title what a row was made of, and what its learning rates gave
MADE_OF = ".made_of"  # a file in a cell's folder: digest of the weights, and the pictures, that it was made of

Reports = list[RobustnessReport]
Tries = Mapping[str, tuple[float, float]]  # clean and robust accuracy on held-out images, by learning rate


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
        for asked, told in [("only", self.only), *((f"models of {own.name}", own.models) for own in self.evaluations)]:
            check_known(asked, told, [model.name for model in self.models])
        for own in self.evaluations:
            if own.first_seeds is not None and not 1 <= own.first_seeds <= len(self.seeds):
                told = f"must be 1 to {len(self.seeds)}, the number of seeds" if self.seeds else "is of no seeds"
                raise ValueError(f"first_seeds={own.first_seeds} of {own.name} {told}.")
        for model in self.models:
            check_once(f"learning_rates of {model.name}", [str(float(rate)) for rate in model.learning_rates])
        check_once("names of models", [model.name for model in self.models])
        taken = [*(evaluation.name for evaluation in self.evaluations), "tuning", "cards", PICTURES]
        for name in [own.name for model in self.models if model.config for own in self.runs_of(model)]:
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


def check_known(asked: str, told: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for a name that there isn't."""
    if unknown := [name for name in told if name not in known]:
        raise ValueError(f"{asked}: there is no model {unknown[0]!r}; the names are {', '.join(known)}.")


def check_once(what: str, told: Sequence[str]) -> None:
    """Raise ValueError for a text that is there twice."""
    if twice := [text for text in told if told.count(text) > 1]:
        raise ValueError(f"{what}: {twice[0]!r} is there twice; leave one.")


COMMAND = CommandLine({"": (Benchmark,)}, {}, ("name", "start", "output_dir", "models", "evaluations"))


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flags.items()]


def cells_of(benchmark: Benchmark) -> list[Cell]:
    """Everything that is to be done, in order.

    Raises ValueError for a seed that is there twice, two cells with one folder, and wrong settings of any training or
    evaluation.
    """
    pictures = [pictures_cell(benchmark)] if benchmark.pictures else []
    trained = [model for model in benchmark.chosen if model.config]
    tries = {model.name: [try_cell(benchmark, model, rate) for rate in model.learning_rates] for model in trained}
    trainings = {
        run.name: training_cell(benchmark, model, run, tries[model.name])
        for model in trained
        for run in benchmark.runs_of(model)
    }
    measured = [
        evaluation_cell(benchmark, evaluation, run, trainings.get(run.name), pictures)
        for evaluation in benchmark.evaluations
        for model in models_of(benchmark, evaluation)
        for run in benchmark.runs_of(model)[: evaluation.first_seeds]
    ]
    cells = [*pictures, *(cell for own in tries.values() for cell in own), *trainings.values(), *measured]
    check_cells(cells)
    return cells


def models_of(benchmark: Benchmark, evaluation: Evaluation) -> list[Model]:
    """The rows that an evaluation is of."""
    return [model for model in benchmark.chosen if not evaluation.models or model.name in evaluation.models]


def pictures_cell(benchmark: Benchmark) -> Cell:
    """The set of pictures."""
    write, done = partial(write_pictures, benchmark), partial(are_written, benchmark)
    return Cell("pictures", benchmark.out / PICTURES, write, done)


def try_cell(benchmark: Benchmark, model: Model, rate: str) -> Cell:
    """A training with a learning rate, by the first seed."""
    first, folder = benchmark.runs_of(model)[0], rate_folder(benchmark, model, rate)
    short = {} if benchmark.tuning_steps is None else {"max_steps": benchmark.tuning_steps}
    flags: Callable[[], dict[str, Any]] = partial(dict, learning_rate=rate, **short)
    return cell_of_training(f"learning rate {rate} of {model.name}", benchmark, first, folder, flags)


def training_cell(benchmark: Benchmark, model: Model, run: Model, tries: Sequence[Cell]) -> Cell:
    """The training of a row with a seed, with the best of its learning rates."""
    folder, flags = benchmark.out / run.name, partial(best_flags, benchmark, model)
    return cell_of_training(f"training {run.name}", benchmark, run, folder, flags, tries)


def cell_of_training(
    name: str,
    benchmark: Benchmark,
    model: Model,
    folder: Path,
    flags: Callable[[], Mapping[str, Any]],
    tries: Sequence[Cell] = (),
) -> Cell:
    """A training whose settings are right; after tries some flags are known only when it begins."""
    rates = {"learning_rate": model.learning_rates[0]} if tries else flags()
    asked_training(benchmark, model, folder, rates)
    what, tried = (benchmark, model, folder, flags), [cell.folder for cell in tries]
    needs = tuple(cell.name for cell in tries)
    return Cell(name, folder, partial(run_training, *what, tried), partial(is_trained, *what), needs)


def evaluation_cell(
    benchmark: Benchmark, evaluation: Evaluation, model: Model, training: Cell | None, pictures: Sequence[Cell]
) -> Cell:
    """An evaluation of one checkpoint."""
    folder = benchmark.out / evaluation.name / model.name
    asked_evaluation(benchmark, evaluation, model)
    trained = None if training is None else training.finished
    needs = [cell.name for cell in (training, *pictures) if cell is not None]
    return Cell(
        f"{evaluation.name} of {model.name}",
        folder,
        partial(run_evaluation, benchmark, evaluation, model, trained),
        partial(is_evaluated, benchmark, evaluation, model),
        tuple(needs),
    )


def rate_folder(benchmark: Benchmark, model: Model, rate: str) -> Path:
    """Where a learning rate is tried."""
    return benchmark.out / "tuning" / f"{model.name}-{rate}"


def tries_of(benchmark: Benchmark, model: Model) -> Tries:
    """What each learning rate of a row gave."""
    return {rate: held_out(rate_folder(benchmark, model, rate)) for rate in model.learning_rates}


def best_of(tries: Tries) -> str:
    """The learning rate that did best on held-out images, the first of equals."""
    return max(tries, key=lambda rate: sum(tries[rate]))


def best_flags(benchmark: Benchmark, model: Model) -> dict[str, str]:
    """The best learning rate as a flag, where some are tried."""
    tries = tries_of(benchmark, model)
    return {"learning_rate": best_of(tries)} if tries else {}


def asked_training(benchmark: Benchmark, model: Model, folder: Path, flags: Mapping[str, Any]) -> train.TrainingRun:
    """A row's training, with flags that go before its own."""
    own = {"model_name_or_path": benchmark.start, "output_dir": str(folder), "overwrite": True}
    asked = {**own, **benchmark.flags, **model.flags, **flags}
    return train.read(words(asked), packaged_config(str(model.config)))


def is_trained(benchmark: Benchmark, model: Model, folder: Path, flags: Callable[[], Mapping[str, Any]]) -> bool:
    """Whether a training by these settings, of the start as it is, has left its report."""
    run = asked_training(benchmark, model, folder, flags())
    return finished(folder, run.source, weights_digest(benchmark.start))


def run_training(
    benchmark: Benchmark,
    model: Model,
    folder: Path,
    flags: Callable[[], Mapping[str, Any]],
    tried: Sequence[Path] = (),
) -> None:
    """One training, or what a try by the same settings has left; what was measured of another in its folder is
    deleted before.
    """
    run, made_of = asked_training(benchmark, model, folder, flags()), weights_digest(benchmark.start)
    (folder / "report.json").unlink(missing_ok=True)
    for evaluation in benchmark.evaluations:
        place = benchmark.out / evaluation.name / folder.name
        if folder.parent == benchmark.out and place.exists():
            with held(place, patient=True):  # another run may measure it
                shutil.rmtree(place)
    same = next((own for own in tried if finished(own, run.source, made_of)), None)
    if same is None:
        train.train(run)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(same, folder, ignore=shutil.ignore_patterns(MADE_OF, "checkpoint-*"))
        write_text(folder / "recipe.yaml", dump_recipe(run.source))
    write_text(folder / MADE_OF, made_of)


def asked_evaluation(benchmark: Benchmark, evaluation: Evaluation, model: Model) -> evaluate.EvaluationRun:
    """An evaluation of one checkpoint, which goes on where it was left."""
    folder = benchmark.out / evaluation.name / model.name
    config = packaged_config(evaluation.config)
    own = {"model_name_or_path": benchmark.folder_of(model), "output_dir": str(folder), "resume": True}
    asked = {**own, **evaluation.flags}
    tasks = asked.get("tasks", yaml.safe_load(config.read_text(encoding="utf-8")).get("tasks", []))
    if benchmark.pictures and any(Path(task["dataset"]).name == PICTURES for task in tasks):  # those of this run
        made = str(benchmark.out / PICTURES)
        asked["tasks"] = [{**t, "dataset": made} if Path(t["dataset"]).name == PICTURES else t for t in tasks]
    return evaluate.read(words(asked), config)


def is_evaluated(benchmark: Benchmark, evaluation: Evaluation, model: Model) -> bool:
    """Whether an evaluation by these settings, of the checkpoint as it is, has left its report."""
    run = asked_evaluation(benchmark, evaluation, model)
    return finished(Path(run.output_dir), run.source, evaluated(benchmark, model))


def run_evaluation(
    benchmark: Benchmark, evaluation: Evaluation, model: Model, trained: Callable[[], bool] | None
) -> None:
    """One evaluation. Raises ValueError where another run has begun to train the checkpoint by other settings."""
    run = asked_evaluation(benchmark, evaluation, model)
    folder, made_of = Path(run.output_dir), evaluated(benchmark, model)
    if trained is not None and not trained():
        raise ValueError(
            f"{benchmark.folder_of(model)!r} was trained anew meanwhile, by another run; start this again."
        )
    if (folder / "report.json").is_file():
        shutil.rmtree(folder)  # of other settings, or another checkpoint
    evaluate.evaluate(run)
    write_text(folder / MADE_OF, made_of)


def evaluated(benchmark: Benchmark, model: Model) -> str:
    """What a row's figures depend on beside settings: weights, and the set of pictures."""
    return digest(f"{weights_digest(benchmark.folder_of(model))} {asked_pictures(benchmark)}".encode())


def asked_pictures(benchmark: Benchmark) -> str:
    """The labels of the set of pictures."""
    return json.dumps({name: list(labels) for name, labels in benchmark.pictures.items()})


def weights_digest(name: str) -> str:
    """A digest of the weights, settings and tokenizer in a checkpoint's folder; of what is no folder, its name. The
    package's version belongs to it: another may train and attack otherwise.
    """
    files = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
    kept = [file for file in files if file.suffix in WEIGHTS and file.name != "report.json"]
    told = [f"{file.name} {digest_of(file, file.stat().st_size, file.stat().st_mtime_ns)}" for file in kept]
    return digest("\n".join([library_versions()["hf_robust_clip"], *(told or [name])]).encode())


@lru_cache(maxsize=4096)
def digest_of(file: Path, size: int, changed: int) -> str:
    """`file_digest`, once for each size and time of change."""
    return file_digest(file)


def finished(folder: Path, source: Mapping[str, Any], made_of: str) -> bool:
    """Whether a run by these settings, of these weights, has left its report in a folder; this may have been moved."""
    files = [folder / name for name in ("report.json", "recipe.yaml", MADE_OF)]
    if not all(file.is_file() for file in files):
        return False
    _, recipe, own = files
    left, asked = (told_of(text) for text in (recipe.read_text(encoding="utf-8"), dump_recipe(source)))
    return left == asked and own.read_text(encoding="utf-8") == made_of


def told_of(recipe: str) -> dict[str, Any]:
    """The settings of a run that its figures depend on: not places, nor, but for a defence, which may put images
    together, how many are attacked at once.
    """
    told = {key: value for key, value in yaml.safe_load(recipe).items() if key not in PLACES}
    if "evaluation" in told and "defence" not in told:
        told["evaluation"] = {key: value for key, value in told["evaluation"].items() if key != "batch_size"}
    return told


def held_out(folder: Path) -> tuple[float, float]:
    """Clean and robust accuracy on the held-out training images."""
    reports, _ = load_reports(folder / "report.json")
    if len(reports) != 1:
        raise ValueError(f"tasks of {folder.name}: learning rates are compared on one task, not {len(reports)}.")
    (report,) = reports
    return report.clean_accuracy, max(report.robust_accuracy.items())[1]


def reports_of(benchmark: Benchmark, evaluation: Evaluation, model: Model) -> list[RobustnessReport]:
    """What an evaluation of a model found, as tables call it; the set of pictures by its name, wherever it is."""
    title = f"{evaluation.title} on {model.title}" if evaluation.title else model.title
    reports, _ = load_reports(benchmark.out / evaluation.name / model.name / "report.json")
    reports = [replace(report, name=title, model=benchmark.id_of(model)) for report in reports]
    return [replace(own, dataset=PICTURES) if Path(own.dataset).name == PICTURES else own for own in reports]


def are_written(benchmark: Benchmark) -> bool:
    """Whether the set of pictures is there."""
    told = benchmark.out / PICTURES / MADE_OF
    return told.is_file() and told.read_text(encoding="utf-8") == asked_pictures(benchmark)


def write_pictures(benchmark: Benchmark) -> None:
    """Parquet of the pictures of imagenet-sample-images that belong to one of the classes, labelled by these."""
    folder = benchmark.out / PICTURES
    shutil.rmtree(folder, ignore_errors=True)
    root = os.environ["HF_ROBUST_CLIP_DATA_ROOT"]
    source = datasets.load_dataset(str(Path(root) / "imagenet-sample-images"), split="test")
    names = list(benchmark.pictures)
    new = {int(label): i for i, name in enumerate(names) for label in benchmark.pictures[name]}
    own = source["label"]
    rows = [i for i in range(len(source)) if own[i] in new]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pictures = source.cast_column("image", datasets.Image(decode=False)).select(rows)
    chosen = {"image": list(pictures["image"]), "label": [new[own[i]] for i in rows]}
    with whole_file(folder / "test-00000-of-00001.parquet") as draft:
        datasets.Dataset.from_dict(chosen, features=features).to_parquet(str(draft))
    write_text(folder / MADE_OF, asked_pictures(benchmark))


def write_cards(benchmark: Benchmark, reports: Sequence[RobustnessReport], before: Sequence[RobustnessReport]) -> None:
    """A folder for each model that was trained here; `reports` are those of the first seed, `before` of the start."""
    for model in benchmark.models:
        own = [replace(report, model=benchmark.id_of(model)) for report in reports if report.name == model.title]
        if not model.config or not own:
            continue
        folder, trained = benchmark.cards / benchmark.id_of(model), benchmark.out / benchmark.runs_of(model)[0].name
        folder.mkdir(parents=True, exist_ok=True)
        limits = benchmark.limits
        if len(benchmark.seeds) > 1:
            others = ", ".join(map(str, benchmark.seeds[1:]))
            limits = (
                f"{limits.rstrip()}\nThis is the model of seed {benchmark.seeds[0]}, and so are its figures; the "
                f"benchmark's table tells the mean over {len(benchmark.seeds)} seeds (with {others})."
            ).lstrip()
        info = replace(
            load_card_info(trained / "report.json"), repo_id=benchmark.id_of(model),
            base_model=benchmark.start_id, limits=limits, plot=None, license="apache-2.0",
        )  # fmt: skip
        save_reports(folder / "report.json", own, before, card=info)
        recipe = yaml.safe_load((trained / "recipe.yaml").read_text(encoding="utf-8"))
        recipe["output_dir"] = f"out/{benchmark.name}/{trained.name}"  # wherever it was trained
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        make_card(own, before, info).save(folder / "README.md")


def write_tables(benchmark: Benchmark, runs: Sequence[Sequence[RobustnessReport]], tried: Mapping[str, Tries]) -> None:
    """Tables and plots of everything; `runs` has the reports of each seed, `tried` learning rates by title."""
    place = benchmark.cards / benchmark.name
    place.mkdir(parents=True, exist_ok=True)
    every = with_seeds(benchmark, runs)
    save_reports(place / "reports.json", every)
    save_csv(place / "report.csv", every)
    limits = "".join(f"- {line}\n" for line in benchmark.limits.splitlines())
    parts = [f"# {benchmark.heading}\n\n{benchmark.about}{limits}"]
    if any(report.defence for report in every):
        rows = by_model(every)
        plot_defences(place / "accuracy.png", rows)
        parts.append(f"{as_markdown(figures_of_defences(rows))}\n\n![accuracies](accuracy.png)\n")
    else:
        further = [by_attack(run) for run in runs[1:]]
        for attack, own in by_attack(runs[0]).items():
            again = [run[attack] for run in further if attack in run]
            parts.append(attack_part(benchmark, place, own, again))
    parts += [tuning_part(benchmark, tried)] if tried else []
    (place / "table.md").write_text("\n".join(parts), encoding="utf-8")


def check_compared(benchmark: Benchmark, reports: Sequence[RobustnessReport]) -> None:
    """Raise ValueError for defences, which aren't compared."""
    if (benchmark.baseline or benchmark.groups) and any(report.defence for report in reports):
        raise ValueError("baseline and groups are of models without a defence; leave them out.")


def with_seeds(benchmark: Benchmark, runs: Sequence[Sequence[RobustnessReport]]) -> list[RobustnessReport]:
    """The reports of all seeds, which their names tell, but for what isn't trained here."""
    titles = [seeded_titles(benchmark, number) for number in range(len(runs))]
    return [
        replace(report, name=own.get(report.name, report.name))
        for own, run in zip(titles, runs, strict=True)
        for report in run
    ]


def seeded_titles(benchmark: Benchmark, number: int) -> dict[str, str]:
    """What rows are called in files: by title that with the seed, but for what isn't trained here."""
    after = f", seed {benchmark.seeds[number]}" if benchmark.seeds else ""
    return {model.title: model.title + (after if model.config else "") for model in benchmark.models}


def by_attack(reports: Sequence[RobustnessReport]) -> dict[str, list[RobustnessReport]]:
    """The reports of each attack."""
    found: dict[str, list[RobustnessReport]] = {}
    for report in reports:
        found.setdefault(report.attack, []).append(report)
    return found


def attack_part(
    benchmark: Benchmark,
    place: Path,
    reports: Sequence[RobustnessReport],
    further: Sequence[Sequence[RobustnessReport]],
) -> str:
    """The table and the plots of one attack; `further` has the reports of other seeds."""
    attack, seeds = reports[0].attack, ", ".join(map(str, benchmark.seeds[: 1 + len(further)]))
    groups = benchmark.groups if len({report.task for report in reports}) > 1 else {}  # of one task: that task again
    file = "".join(c if c.isalnum() else "_" for c in attack.lower())
    about, plots = "Accuracy in percent, clean and at each L-inf radius", ""
    if further:
        about += f"; mean and standard deviation over the seeds {seeds}"
    else:
        about += f"; models of seed {seeds}" if seeds else ""
        plot_accuracy(place / f"{file}.png", reports)
        plots = f"![accuracy against eps]({file}.png)\n"
    if benchmark.tradeoff_radius is not None:
        names = [model.title for model in benchmark.models]
        radius = benchmark.tradeoff_radius
        plot_tradeoff(place / f"{file}_tradeoff.png", reports, radius, further, groups or None, names)
        plots += f"\n![clean against robust]({file}_tradeoff.png)\n"
    tables = f"{as_markdown(figures_by_task(reports, further))}\n\n{groups_part(groups, reports, further)}"
    differences = ""
    if benchmark.baseline in {report.name for report in reports}:  # else it is not finished, or not asked for
        told = differences_told(reports, further, baseline=benchmark.baseline, groups=groups)
        differences = f"\n### Paired differences to {benchmark.baseline}\n\n{told}\n"
    return f"## {attack}\n\n{about}.\n\n{tables}{plots}{differences}"


def groups_part(
    groups: Mapping[str, Sequence[str]],
    reports: Sequence[RobustnessReport],
    further: Sequence[Sequence[RobustnessReport]],
) -> str:
    """The means over groups of tasks under one attack, where there are groups."""
    if not groups:
        return ""
    about = "The same as unweighted mean over the tasks of a group"
    about += "; the standard deviation is that of the seeds' means." if further else "."
    return f"{about}\n\n{as_markdown(figures_by_task(reports, further, groups))}\n\n"


def tuning_part(benchmark: Benchmark, tried: Mapping[str, Tries]) -> str:
    """What each learning rate gave on held-out images."""
    rates = sorted({rate for tries in tried.values() for rate in tries}, key=float)
    lines = ["| | " + " | ".join(rates) + " | chosen |", "|---|" + "---|" * (len(rates) + 1)]
    for title, tries in tried.items():
        told = {rate: f"{100 * clean:.1f} / {100 * robust:.1f}" for rate, (clean, robust) in tries.items()}
        cells = " | ".join(told.get(rate, "-") for rate in rates)
        lines.append(f"| {title} | {cells} | {best_of(tries)} |")
    after = "" if benchmark.tuning_steps is None else f" after {benchmark.tuning_steps} updates"
    about = (
        f"Clean accuracy / robust accuracy, in percent, on held-out training images{after}; the rate with the highest "
        "sum of both was taken."
        + (f" Tried with seed {benchmark.seeds[0]} alone." if len(benchmark.seeds) > 1 else "")
    )
    return f"## Learning rates\n\n{about}\n\n" + "\n".join(lines) + "\n"


class Earlier:
    """What another run has written: reports, of what they were made, and learning rates; nothing without a folder.

    Raises ValueError for a folder without, or with other files.
    """

    def __init__(self, folder: str | None):
        self.reports: Reports = []
        self.rows: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        for file in ("reports.json", ROWS):
            if not (Path(folder) / file).is_file():
                raise ValueError(f"earlier={folder!r} has no {file}; name a folder of tables, such as cards/NAME.")
        self.reports, _ = load_reports(Path(folder) / "reports.json")
        try:
            self.rows = json.loads((Path(folder) / ROWS).read_text(encoding="utf-8"))
            for row in self.rows.values():
                _, _, tries = row["trained"], row["evaluated"].values(), row["learning_rates"]
                row["learning_rates"] = {
                    rate: (float(clean), float(robust)) for rate, (clean, robust) in tries.items()
                }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"earlier={folder!r}: {ROWS} can't be read ({type(error).__name__}: {error}).") from None

    def reports_of(self, benchmark: Benchmark, evaluation: Evaluation, model: Model, number: int) -> Reports:
        """What an evaluation of a row with the seed of this number gave, as tables call it; nothing where training or
        evaluation was another one, or a task's report is missing.
        """
        if not self.has(benchmark, model):
            return []
        if self.rows[model.title]["evaluated"].get(evaluation.name) != evaluated_by(benchmark, evaluation, model):
            return []
        run, title = asked_evaluation(benchmark, evaluation, model), seeded_titles(benchmark, number)[model.title]
        own, found = [report for report in self.reports if report.name == title], []
        for task in task_titles([(task.name, task.dataset) for task in run.tasks]):
            for settings in run.evaluations:
                alike = [report for report in own if report.task == task and is_by(report, settings)]
                found += [replace(report, name=model.title) for report in alike[:1]]
        return found if len(found) == len(run.tasks) * len(run.evaluations) else []

    def has(self, benchmark: Benchmark, model: Model) -> bool:
        """Whether a row was trained as asked."""
        return model.title in self.rows and self.rows[model.title]["trained"] == trained_by(benchmark, model)


def is_by(report: RobustnessReport, settings: EvaluationSettings) -> bool:
    """Whether a report is of these attacks at these radii."""
    count, radii = len(report.class_names), [threat.eps for threat in settings.threat_models()]
    asked = settings.attack.name(count), settings.attack_parameters(count), radii
    return asked == (report.attack, report.attack_parameters, list(report.robust_accuracy))


def trained_by(benchmark: Benchmark, model: Model) -> str:
    """A digest of what a row is made of: the weights that it starts from, the settings of its training, the learning
    rates that were tried, and the package's version.
    """
    row = next(own for own in benchmark.models if own.title == model.title)
    source = asked_training(benchmark, row, benchmark.out / row.name, {}).source if row.config else {}
    told = told_of(dump_recipe(source)), [str(rate) for rate in row.learning_rates], benchmark.tuning_steps
    start = benchmark.start if row.config else benchmark.folder_of(row)
    return digest(f"{weights_digest(start)} {json.dumps(told, sort_keys=True)}".encode())


def evaluated_by(benchmark: Benchmark, evaluation: Evaluation, model: Model) -> str:
    """A digest of the settings of an evaluation, and of the set of pictures by its labels."""
    told = told_of(dump_recipe(asked_evaluation(benchmark, evaluation, model).source))
    text = json.dumps(told, sort_keys=True).replace(json.dumps(str(benchmark.out / PICTURES)), json.dumps(PICTURES))
    return digest(f"{text} {asked_pictures(benchmark)}".encode())


def save_rows(benchmark: Benchmark, reports: Sequence[RobustnessReport], tried: Mapping[str, Tries]) -> None:
    """For another run that takes rows from this one: `Earlier`."""
    titles = {report.name for report in reports}
    told = {
        model.title: {
            "trained": trained_by(benchmark, model),
            "evaluated": {
                own.name: evaluated_by(benchmark, own, model)
                for own in benchmark.evaluations
                if model in models_of(benchmark, own)
            },
            "learning_rates": tried.get(model.title, {}),
        }
        for model in benchmark.models
        if model.title in titles
    }
    write_text(benchmark.cards / benchmark.name / ROWS, json.dumps(told, indent=1) + "\n")


def check_images(reports: Sequence[RobustnessReport]) -> None:
    """Raise ValueError where a task has other images in an earlier report than in another under the same attack."""
    known: dict[tuple[str, str], Any] = {}
    for report in reports:
        images = None if report.outcomes is None else report.outcomes.images
        if known.setdefault((report.task, report.attack), images) != images:
            raise ValueError(f"earlier: {report.task} has other images in reports of {report.name} than in others.")


def run(benchmark: Benchmark) -> None:
    """Train, evaluate, write. Raises ValueError, with a line for each, where cells failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a benchmark is started as one process; --jobs says how many share its work.")
    if benchmark.data_root is not None:
        os.environ["HF_ROBUST_CLIP_DATA_ROOT"] = benchmark.data_root
    if benchmark.baseline is not None:
        check_known("baseline", [benchmark.baseline], [model.title for model in benchmark.models])
    check_start(benchmark)
    cells = cells_of(benchmark)
    check_tables(benchmark)
    failed: dict[str, str] = {}
    if not benchmark.partial:
        times = benchmark.out / "seconds.csv"
        failed = run_cells(cells, times, benchmark.jobs, benchmark.keep_going)
    if not benchmark.only and (benchmark.partial or benchmark.keep_going or not failed):
        write(benchmark, finished_cells(cells))
        say(f"tables: {benchmark.cards / benchmark.name / 'table.md'}")
    if failed:
        *others, last = [f"{name}: {reason}" for name, reason in failed.items()]
        for line in others:
            say(f"error: {line}")
        raise ValueError(last)


def check_start(benchmark: Benchmark) -> None:
    """Raise OSError for a start, or a row's folder, that can't be read: before what is finished is made anew."""
    for name in dict.fromkeys([benchmark.start, *(model.folder for model in benchmark.chosen if model.folder)]):
        if name != EMBEDDED_MODEL:
            read_config(name, {})


def check_tables(benchmark: Benchmark) -> None:
    """Raise ValueError for groups without tasks or of tasks that no evaluation has, and for a radius of the trade-off
    that one lacks.
    """
    whole = replace(benchmark, only=())
    firsts = [(own, models_of(whole, own)[0]) for own in whole.evaluations if models_of(whole, own)]
    runs = [asked_evaluation(whole, evaluation, model) for evaluation, model in firsts]
    tasks = {title for run in runs for title in task_titles([(task.name, task.dataset) for task in run.tasks])}
    for group, named in benchmark.groups.items():
        if unknown := [task for task in named if task not in tasks] or ([] if named else ["no task"]):
            raise ValueError(f"groups[{group!r}] has {unknown[0]!r}; tasks are {sorted(tasks)}.")
    if benchmark.tradeoff_radius is None:
        return
    radius = parse_radius(benchmark.tradeoff_radius, "tradeoff_radius")
    for settings in [settings for run in runs for settings in run.evaluations]:
        own = [threat.eps for threat in settings.threat_models()] if settings.attack.has_radii else []
        if not any(math.isclose(radius, eps) for eps in own):
            told = f"is not among the radii of an evaluation: {list(settings.radii)}"
            raise ValueError(f"tradeoff_radius={benchmark.tradeoff_radius!r} {told}.")


def write(benchmark: Benchmark, done: Iterable[str]) -> None:
    """Tables, plots and cards. An evaluation of a row is left out, and named, unless all seeds are finished.

    Raises ValueError where no evaluation of any row is.
    """
    done, earlier = set(done), Earlier(benchmark.earlier)
    here = reports_by_seed(benchmark, lambda evaluation, run, number: reports_here(benchmark, evaluation, run, done))
    own = {report.name for report in here[0]}

    def anywhere(evaluation: Evaluation, run: Model, number: int) -> Reports:
        found = reports_here(benchmark, evaluation, run, done)
        if run.config and benchmark.earlier is not None:  # a row is of one run: trained elsewhere, other weights
            return found if run.title in own else earlier.reports_of(benchmark, evaluation, run, number)
        return found or earlier.reports_of(benchmark, evaluation, run, number)

    def is_earlier(model: Model) -> bool:
        return model.title not in own and earlier.has(benchmark, model)

    missing: list[str] = []
    runs = reports_by_seed(benchmark, anywhere, missing)
    if not any(runs):
        raise ValueError(f"output_dir={benchmark.output_dir!r}: no evaluation is finished, so there is no table yet.")
    every = [report for run in runs for report in run]
    check_compared(benchmark, every)
    if benchmark.earlier is not None:
        check_images(every)
    write_cards(benchmark, here[0], [report for report in runs[0] if report.name == benchmark.start_title])
    tried = {
        model.title: tries
        for model in benchmark.models
        if (tries := tries_told(benchmark, model, () if is_earlier(model) else done, earlier))
    }
    whole = benchmark
    if missing:
        line = f"Unfinished, and left out of the tables: {'; '.join(missing)}."
        say(line)
        names = {name for report in every for name in (report.name, report.name.split(" on ")[-1])}
        rows = tuple(model for model in benchmark.models if model.title in names)
        benchmark = replace(benchmark, models=rows, evaluations=(), limits=f"{line}\n{benchmark.limits}")
    write_tables(benchmark, runs, tried)
    save_rows(whole, every, tried)


def reports_by_seed(
    benchmark: Benchmark, reports_of_run: Callable[[Evaluation, Model, int], Reports], missing: list[str] | None = None
) -> list[Reports]:
    """For each seed the reports of the rows of which there are those of every seed; `missing` is told the others."""
    runs: list[Reports] = [[] for _ in benchmark.seeds or (None,)]
    for evaluation in benchmark.evaluations:
        lacking, rows = [], models_of(benchmark, evaluation)
        for model in rows:
            seeded = benchmark.runs_of(model)[: evaluation.first_seeds]
            found = [reports_of_run(evaluation, run, number) for number, run in enumerate(seeded)]
            if not all(found):
                lacking.append(model.title)
                continue
            for reports, own in zip(runs, found, strict=False):
                reports += own
        if lacking and missing is not None:
            missing.append(f"{evaluation.name}: {'all rows' if len(lacking) == len(rows) else ', '.join(lacking)}")
    return runs


def reports_here(benchmark: Benchmark, evaluation: Evaluation, run: Model, done: set[str]) -> Reports:
    """What this run has finished of an evaluation."""
    return reports_of(benchmark, evaluation, run) if f"{evaluation.name} of {run.name}" in done else []


def tries_told(benchmark: Benchmark, model: Model, done: Iterable[str], earlier: Earlier) -> Tries:
    """What a row's learning rates gave, here or earlier; nothing unless all were tried."""
    if {f"learning rate {rate} of {model.name}" for rate in model.learning_rates} <= set(done):
        return tries_of(benchmark, model)
    return earlier.rows[model.title]["learning_rates"] if earlier.has(benchmark, model) else {}


def main(argv: Sequence[str]) -> None:
    with one_line_errors():
        default = packaged_config("mini-clip/benchmark")
        given = read_command(COMMAND, argv, default, __doc__)
        benchmark: Benchmark = given.group(Benchmark, given.made())
        quiet_loading()
        with one_line_errors(lambda: f"what is finished is in {benchmark.output_dir!r}; the same command goes on."):
            run(benchmark)


if __name__ == "__main__":
    main(sys.argv[1:])
