"""A benchmark by a YAML file: models that are trained, evaluations of all of them, tables, plots and cards.

    python recipes/benchmark.py --config recipes/configs/mini-clip/benchmark.yaml --data_root <folder of Hub datasets>
    python recipes/benchmark.py --config recipes/configs/digits-clip/prompt_benchmark.yaml

Each model is a training by one of the packaged configs and some flags, each evaluation such a config too. What is
finished is not repeated, unless its settings changed: a run that was killed goes on. `--only "[a, b]"` trains and
evaluates these alone, so that several runs may divide the work; `--cards_dir hub_cards` puts the cards where they are
kept.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import yaml

from hf_robust_clip.command_line import CommandLine, packaged_config, read_command
from hf_robust_clip.hub import dump_recipe
from hf_robust_clip.report import (
    RobustnessReport,
    as_markdown,
    by_model,
    figures_by_task,
    figures_of_defences,
    figures_of_differences,
    load_card_info,
    load_reports,
    make_card,
    plot_accuracy,
    plot_defences,
    plot_tradeoff,
    save_csv,
    save_reports,
    without_outcomes,
)
from hf_robust_clip.runs import evaluate, train
from hf_robust_clip.runs.interruptions import one_line_errors
from hf_robust_clip.runs.shared import quiet_loading

PICTURES = "imagenet-pictures"


@dataclass(frozen=True)
class Model:
    """A row of the tables.

    Args:
        name: of its folder, and of its card.
        title: what tables call it.
        config: a packaged config by which it is trained; without one it is the model in `folder`, or the start.
        flags: of its training, beside the config.
        folder: of a model that another run has made.
        learning_rates: tried for a few updates on held-out images; the best is taken.
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
        title: of a defence in it: what is put before the names of models.
    """

    name: str
    config: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    models: Sequence[str] = ()
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
        flags: of every training, beside its config; those of a model go before them.
        seeds: each model is trained once with each, and tables tell mean and standard deviation over them; none takes
            the configs' own seed. Of several a card is of the first, since it is of one checkpoint.
        models: rows of the tables.
        evaluations: what makes their figures.
        tuning_steps: updates with each learning rate that is tried.
        tradeoff_radius: at which clean and robust accuracy are plotted against each other; null plots none.
        baseline: title of the model that the others are compared with, image by image; null compares none.
        groups: by name the titles of tasks whose figures are told together, as their mean.
        pictures: labels of imagenet-sample-images by class name, of which a set of pictures is made.
        only: names of models; the others, and the tables, are left to other runs.
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
    tuning_steps: int = 40
    tradeoff_radius: str | None = None
    baseline: str | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pictures: Mapping[str, Sequence[int]] = field(default_factory=dict)
    only: Sequence[str] = ()

    def __post_init__(self) -> None:
        titles = [model.title for model in self.models]
        if self.baseline is not None and self.baseline not in titles:
            raise ValueError(f"baseline={self.baseline!r} is the title of no model; it must be one of {titles}.")

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


COMMAND = CommandLine({"": (Benchmark,)}, {}, ("name", "start", "output_dir", "models", "evaluations"))


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flags.items()]


def train_model(benchmark: Benchmark, model: Model) -> str | None:
    """Train a row's model with every seed, unless its report is there; the learning rate chosen, by the first seed."""
    runs = benchmark.runs_of(model)
    rates = {rate: held_out(tuned(benchmark, model, rate)) for rate in model.learning_rates}
    best = max(rates, key=lambda rate: sum(rates[rate])) if rates else None
    for run in runs:
        run_training(benchmark, run, benchmark.out / run.name, {} if best is None else {"learning_rate": best})
    return best


def tuned(benchmark: Benchmark, model: Model, rate: str) -> Path:
    """The folder of a short training with a learning rate."""
    first, folder = benchmark.runs_of(model)[0], benchmark.out / "tuning" / f"{model.name}-{rate}"
    run_training(benchmark, first, folder, {"learning_rate": rate, "max_steps": benchmark.tuning_steps})
    return folder


def run_training(benchmark: Benchmark, model: Model, folder: Path, flags: Mapping[str, Any]) -> None:
    """One training, unless its report is there, by the same settings; what was measured of another is deleted."""
    own = {"model_name_or_path": benchmark.start, "output_dir": str(folder), "overwrite": True}
    asked = {**own, **benchmark.flags, **model.flags, **flags}
    run = train.read(words(asked), packaged_config(str(model.config)))
    if not finished(folder, run.source):
        for evaluation in benchmark.evaluations:
            shutil.rmtree(benchmark.out / evaluation.name / folder.name, ignore_errors=True)
        (folder / "report.json").unlink(missing_ok=True)
        train.train(run)


def finished(folder: Path, source: Mapping[str, Any]) -> bool:
    """Whether a run by these settings has left its report in a folder."""
    recipe = folder / "recipe.yaml"
    whole = (folder / "report.json").is_file() and recipe.is_file()
    return whole and yaml.safe_load(recipe.read_text(encoding="utf-8")) == yaml.safe_load(dump_recipe(source))


def held_out(folder: Path) -> tuple[float, float]:
    """Clean and robust accuracy on the held-out training images."""
    (report,), _ = load_reports(folder / "report.json")
    return report.clean_accuracy, max(report.robust_accuracy.items())[1]


def evaluate_models(benchmark: Benchmark, evaluation: Evaluation, models: Sequence[Model]) -> list[RobustnessReport]:
    """The reports of models by one evaluation, resumed where it was left; in the order of models."""
    found = []
    for model in models:
        folder = benchmark.out / evaluation.name / model.name
        own = {"model_name_or_path": benchmark.folder_of(model), "output_dir": str(folder), "resume": True}
        run = evaluate.read(words({**own, **evaluation.flags}), packaged_config(evaluation.config))
        if not finished(folder, run.source):
            if (folder / "report.json").is_file():
                shutil.rmtree(folder)  # of other settings
            evaluate.evaluate(run)
        title = f"{evaluation.title} on {model.title}" if evaluation.title else model.title
        reports, _ = load_reports(folder / "report.json")
        found += [replace(report, name=title, model=benchmark.id_of(model)) for report in reports]
    return found


def write_pictures(benchmark: Benchmark) -> None:
    """Parquet of the pictures of imagenet-sample-images that belong to one of the classes, labelled by these."""
    folder = benchmark.out / PICTURES
    if not benchmark.pictures or list(folder.glob("*.parquet")):
        return
    root = os.environ["HF_ROBUST_CLIP_DATA_ROOT"]
    source = datasets.load_dataset(str(Path(root) / "imagenet-sample-images"), split="test")
    names = list(benchmark.pictures)
    new = {int(label): i for i, name in enumerate(names) for label in benchmark.pictures[name]}
    own = source["label"]
    rows = [i for i in range(len(source)) if own[i] in new]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pictures = source.cast_column("image", datasets.Image(decode=False)).select(rows)
    chosen = {"image": list(pictures["image"]), "label": [new[own[i]] for i in rows]}
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(chosen, features=features).to_parquet(str(folder / "test-00000-of-00001.parquet"))


def write_cards(benchmark: Benchmark, reports: Sequence[RobustnessReport]) -> None:
    """A folder for each model that was trained here; `reports` are those of the first seed."""
    before = [report for report in reports if report.name == benchmark.start_title]
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
        recipe = (trained / "recipe.yaml").read_text(encoding="utf-8")
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        make_card(own, before, info).save(folder / "README.md")


def write_tables(
    benchmark: Benchmark, runs: Sequence[Sequence[RobustnessReport]], chosen: Mapping[str, str | None]
) -> None:
    """Tables and plots of everything; `runs` has the reports of each seed."""
    place = benchmark.cards / benchmark.name
    place.mkdir(parents=True, exist_ok=True)
    every = with_seeds(benchmark, runs)
    check_compared(benchmark, every)
    save_reports(place / "report.json", every)
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
            parts.append(attack_part(benchmark, place, own, [run.get(attack, []) for run in further]))
    parts += [tuning_part(benchmark, chosen)] if any(chosen.values()) else []
    (place / "table.md").write_text("\n".join(parts), encoding="utf-8")


def check_compared(benchmark: Benchmark, reports: Sequence[RobustnessReport]) -> None:
    """Raise ValueError for groups of tasks that nothing was evaluated on, and for defences, which aren't compared."""
    tasks = {report.task for report in reports}
    for group, named in benchmark.groups.items():
        if unknown := [task for task in named if task not in tasks]:
            raise ValueError(f"groups[{group!r}] has {unknown[0]!r}; tasks are {sorted(tasks)}.")
    if (benchmark.baseline or benchmark.groups) and any(report.defence for report in reports):
        raise ValueError("baseline and groups are of models without a defence; leave them out.")


def with_seeds(benchmark: Benchmark, runs: Sequence[Sequence[RobustnessReport]]) -> list[RobustnessReport]:
    """The reports of all seeds, which their names tell, but for what isn't trained here."""
    trained = {model.title for model in benchmark.models if model.config} if benchmark.seeds else set()
    return [
        replace(report, name=f"{report.name}, seed {benchmark.seeds[number]}") if report.name in trained else report
        for number, run in enumerate(runs)
        for report in run
    ]


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
    attack = reports[0].attack
    file = "".join(c if c.isalnum() else "_" for c in attack.lower())
    about, plots = "Accuracy in percent, clean and at each L-inf radius", ""
    if further:
        about += f"; mean and standard deviation over the seeds {', '.join(map(str, benchmark.seeds))}"
    else:
        plot_accuracy(place / f"{file}.png", reports)
        plots = f"![accuracy against eps]({file}.png)\n"
    if benchmark.tradeoff_radius is not None:
        groups = benchmark.groups or None
        plot_tradeoff(place / f"{file}_tradeoff.png", reports, benchmark.tradeoff_radius, further, groups)
        plots += f"\n![clean against robust]({file}_tradeoff.png)\n"
    tables = f"{as_markdown(figures_by_task(reports, further))}\n\n{groups_part(benchmark, reports, further)}"
    differences = differences_part(benchmark, reports, further)
    return f"## {attack}\n\n{about}.\n\n{tables}{plots}{differences}"


def groups_part(
    benchmark: Benchmark, reports: Sequence[RobustnessReport], further: Sequence[Sequence[RobustnessReport]]
) -> str:
    """The means over groups of tasks under one attack, where there are groups."""
    if not benchmark.groups:
        return ""
    about = "The same as unweighted mean over the tasks of a group"
    about += "; the standard deviation is that of the seeds' means." if further else "."
    return f"{about}\n\n{as_markdown(figures_by_task(reports, further, benchmark.groups))}\n\n"


def differences_part(
    benchmark: Benchmark, reports: Sequence[RobustnessReport], further: Sequence[Sequence[RobustnessReport]]
) -> str:
    """By how much models are better than the baseline under one attack, where there is one: groups of tasks, tasks."""
    if benchmark.baseline is None:
        return ""
    head = f"\n### Paired differences to {benchmark.baseline}\n\n"
    if lacking := without_outcomes([reports, *further]):
        return f"{head}Left out: reports of {', '.join(lacking)} don't say which images were right.\n"
    if benchmark.baseline not in {report.name for report in reports}:
        return f"{head}Left out: {benchmark.baseline} has no figures under this attack.\n"
    drawn = "images and, of a model with several, seeds" if further else "images: trainings may differ by more"
    about = (
        "Accuracy less the baseline's on the same images, in points, with 95 % intervals by a bootstrap over "
        f"{drawn}. Bold where the interval excludes 0: of 20 differences that are none, one is bold by chance"
    )
    about += ", and more where so few seeds differ much from one another." if further else "."
    tables = [
        as_markdown(figures_of_differences(reports, further, baseline=benchmark.baseline, groups=groups))
        for groups in ([benchmark.groups] if benchmark.groups else []) + [None]
    ]
    return f"{head}{about}\n\n" + "\n\n".join(tables) + "\n"


def tuning_part(benchmark: Benchmark, chosen: Mapping[str, str | None]) -> str:
    """What each learning rate gave on held-out images."""
    tried = [model for model in benchmark.models if model.learning_rates]
    rates = list(tried[0].learning_rates)
    lines = ["| | " + " | ".join(rates) + " | chosen |", "|---|" + "---|" * (len(rates) + 1)]
    for model in tried:
        figures = [held_out(benchmark.out / "tuning" / f"{model.name}-{rate}") for rate in rates]
        cells = " | ".join(f"{100 * clean:.1f} / {100 * robust:.1f}" for clean, robust in figures)
        lines.append(f"| {model.title} | {cells} | {chosen[model.name]} |")
    about = (
        f"Clean accuracy / robust accuracy, in percent, on held-out training images after {benchmark.tuning_steps} "
        "updates; the rate with the highest sum of both was taken."
        + (f" Tried with seed {benchmark.seeds[0]} alone." if len(benchmark.seeds) > 1 else "")
    )
    return f"## Learning rates\n\n{about}\n\n" + "\n".join(lines) + "\n"


def run(benchmark: Benchmark) -> None:
    """Train, evaluate, write."""
    if benchmark.data_root is not None:
        os.environ["HF_ROBUST_CLIP_DATA_ROOT"] = benchmark.data_root
    models = [model for model in benchmark.models if not benchmark.only or model.name in benchmark.only]
    chosen = {model.name: train_model(benchmark, model) for model in models if model.config}
    write_pictures(benchmark)
    runs: list[list[RobustnessReport]] = [[] for _ in benchmark.seeds or (None,)]
    for evaluation in benchmark.evaluations:
        own = [model for model in models if not evaluation.models or model.name in evaluation.models]
        for number, reports in enumerate(runs):
            of_seed = [benchmark.runs_of(model)[number] for model in own if number < len(benchmark.runs_of(model))]
            reports += evaluate_models(benchmark, evaluation, of_seed)
    if not benchmark.only:
        write_cards(benchmark, runs[0])
        write_tables(benchmark, runs, chosen)


def main(argv: Sequence[str]) -> None:
    with one_line_errors():
        default = packaged_config("mini-clip/benchmark")
        given = read_command(COMMAND, argv, default, __doc__)
        benchmark: Benchmark = given.group(Benchmark, given.made())
        quiet_loading()
        run(benchmark)


if __name__ == "__main__":
    main(sys.argv[1:])
