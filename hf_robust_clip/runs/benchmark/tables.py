"""A benchmark's tables, plots and cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from ...hub import dump_recipe
from ...report import (
    RobustnessReport,
    as_markdown,
    by_model,
    differences_told,
    figures_by_task,
    figures_of_defences,
    load_card_info,
    make_card,
    plot_accuracy,
    plot_defences,
    plot_tradeoff,
    save_csv,
    save_reports,
)
from .results import Tries, best_of, with_seeds
from .settings import Benchmark


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
        for attack, first in by_attack(runs[0]).items():
            again = [run[attack] for run in further if attack in run]
            parts.append(attack_part(benchmark, place, first, again))
    parts += [tuning_part(benchmark, tried)] if tried else []
    (place / "table.md").write_text("\n".join(parts), encoding="utf-8")


def check_compared(benchmark: Benchmark, reports: Sequence[RobustnessReport]) -> None:
    """Raise ValueError for defences, which aren't compared."""
    if (benchmark.baseline or benchmark.groups) and any(report.defence for report in reports):
        raise ValueError("baseline and groups are of models without a defence; leave them out.")


def by_attack(reports: Sequence[RobustnessReport]) -> dict[str, list[RobustnessReport]]:
    """The reports of each attack."""
    attacks: dict[str, list[RobustnessReport]] = {}
    for report in reports:
        attacks.setdefault(report.attack, []).append(report)
    return attacks


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
        table = differences_told(reports, further, baseline=benchmark.baseline, groups=groups)
        differences = f"\n### Paired differences to {benchmark.baseline}\n\n{table}\n"
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
        figures = {rate: f"{100 * clean:.1f} / {100 * robust:.1f}" for rate, (clean, robust) in tries.items()}
        cells = " | ".join(figures.get(rate, "-") for rate in rates)
        lines.append(f"| {title} | {cells} | {best_of(tries)} |")
    after = "" if benchmark.tuning_steps is None else f" after {benchmark.tuning_steps} updates"
    about = (
        f"Clean accuracy / robust accuracy, in percent, on held-out training images{after}; the rate with the highest "
        "sum of both was taken."
        + (f" Tried with seed {benchmark.seeds[0]} alone." if len(benchmark.seeds) > 1 else "")
    )
    return f"## Learning rates\n\n{about}\n\n" + "\n".join(lines) + "\n"


def write_cards(benchmark: Benchmark, reports: Sequence[RobustnessReport], before: Sequence[RobustnessReport]) -> None:
    """A folder for each model that was trained here; `reports` are those of the first seed, `before` of the start."""
    for model in benchmark.models:
        after = [replace(report, model=benchmark.id_of(model)) for report in reports if report.name == model.title]
        if not model.config or not after:
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
        save_reports(folder / "report.json", after, before, card=info)
        recipe = yaml.safe_load((trained / "recipe.yaml").read_text(encoding="utf-8"))
        recipe["output_dir"] = f"out/{benchmark.name}/{trained.name}"  # wherever it was trained
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        make_card(after, before, info).save(folder / "README.md")
