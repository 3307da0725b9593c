"""A benchmark's cells: trainings with a rate that is tried, trainings with a seed, evaluations of one checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...digests import digest
from ...hub import dump_recipe
from ...storage import write_text
from .. import evaluate, train
from ..grid import Cell, check_cells, held
from .pictures import are_written, write_pictures
from .results import best_of, tries_of
from .settings import MADE_OF, PICTURES, Benchmark, Evaluation, Model, models_of
from .single_runs import decisive_settings, evaluation_run, pictures_labels, rate_folder, training_run, weights_digest


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
    cells = [*pictures, *(cell for rates in tries.values() for cell in rates), *trainings.values(), *measured]
    check_cells(cells)
    return cells


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
    training_run(benchmark, model, folder, rates)
    what, tried = (benchmark, model, folder, flags), [cell.folder for cell in tries]
    needs = tuple(cell.name for cell in tries)
    return Cell(name, folder, partial(run_training, *what, tried), partial(is_trained, *what), needs)


def evaluation_cell(
    benchmark: Benchmark, evaluation: Evaluation, model: Model, training: Cell | None, pictures: Sequence[Cell]
) -> Cell:
    """An evaluation of one checkpoint."""
    folder = benchmark.out / evaluation.name / model.name
    evaluation_run(benchmark, evaluation, model)
    trained = None if training is None else training.finished
    needs = [cell.name for cell in (training, *pictures) if cell is not None]
    return Cell(
        f"{evaluation.name} of {model.name}",
        folder,
        partial(run_evaluation, benchmark, evaluation, model, trained),
        partial(is_evaluated, benchmark, evaluation, model),
        tuple(needs),
    )


def is_trained(benchmark: Benchmark, model: Model, folder: Path, flags: Callable[[], Mapping[str, Any]]) -> bool:
    """Whether a training by these settings, of the start as it is, has left its report."""
    run = training_run(benchmark, model, folder, flags())
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
    run, made_of = training_run(benchmark, model, folder, flags()), weights_digest(benchmark.start)
    (folder / "report.json").unlink(missing_ok=True)
    for evaluation in benchmark.evaluations:
        place = benchmark.out / evaluation.name / folder.name
        if folder.parent == benchmark.out and place.exists():
            with held(place, patient=True):  # another run may measure it
                shutil.rmtree(place)
    same = next((one for one in tried if finished(one, run.source, made_of)), None)
    if same is None:
        train.train(run)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(same, folder, ignore=shutil.ignore_patterns(MADE_OF, "checkpoint-*"))
        write_text(folder / "recipe.yaml", dump_recipe(run.source))
    write_text(folder / MADE_OF, made_of)


def is_evaluated(benchmark: Benchmark, evaluation: Evaluation, model: Model) -> bool:
    """Whether an evaluation by these settings, of the checkpoint as it is, has left its report."""
    run = evaluation_run(benchmark, evaluation, model)
    return finished(Path(run.output_dir), run.source, checkpoint_digest(benchmark, model))


def run_evaluation(
    benchmark: Benchmark, evaluation: Evaluation, model: Model, trained: Callable[[], bool] | None
) -> None:
    """One evaluation. Raises ValueError where another run has begun to train the checkpoint by other settings."""
    run = evaluation_run(benchmark, evaluation, model)
    folder, made_of = Path(run.output_dir), checkpoint_digest(benchmark, model)
    if trained is not None and not trained():
        raise ValueError(
            f"{benchmark.folder_of(model)!r} was trained anew meanwhile, by another run; start this again."
        )
    if (folder / "report.json").is_file():
        shutil.rmtree(folder)  # of other settings, or another checkpoint
    evaluate.evaluate(run)
    write_text(folder / MADE_OF, made_of)


def checkpoint_digest(benchmark: Benchmark, model: Model) -> str:
    """What a row's figures depend on beside settings: weights, and the set of pictures."""
    return digest(f"{weights_digest(benchmark.folder_of(model))} {pictures_labels(benchmark)}".encode())


def finished(folder: Path, source: Mapping[str, Any], made_of: str) -> bool:
    """Whether a run by these settings, of these weights, has left its report in a folder; this may have been moved."""
    report, recipe, noted = (folder / name for name in ("report.json", "recipe.yaml", MADE_OF))
    if not all(file.is_file() for file in (report, recipe, noted)):
        return False
    before, now = (decisive_settings(text) for text in (recipe.read_text(encoding="utf-8"), dump_recipe(source)))
    return before == now and noted.read_text(encoding="utf-8") == made_of


def best_flags(benchmark: Benchmark, model: Model) -> dict[str, str]:
    """The best learning rate as a flag, where some are tried."""
    tries = tries_of(benchmark, model)
    return {"learning_rate": best_of(tries)} if tries else {}
