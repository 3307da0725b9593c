"""Settings of a benchmark's trainings and evaluations, and digests of all that their figures depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ...command_line import packaged_config
from ...digests import digest, file_digest
from ...environment import library_versions
from ...hub import dump_recipe
from .. import evaluate, train
from .settings import PICTURES, Benchmark, Evaluation, Model

WEIGHTS = (".safetensors", ".bin", ".json", ".txt")  # of files in a checkpoint's folder
PLACES = ("output_dir", "model_name_or_path")  # settings that no figure depends on: of the model, its weights tell


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flags.items()]


def asked_training(benchmark: Benchmark, model: Model, folder: Path, flags: Mapping[str, Any]) -> train.TrainingRun:
    """A row's training, with flags that go before its own."""
    own = {"model_name_or_path": benchmark.start, "output_dir": str(folder), "overwrite": True}
    asked = {**own, **benchmark.flags, **model.flags, **flags}
    return train.read(words(asked), packaged_config(str(model.config)))


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


def rate_folder(benchmark: Benchmark, model: Model, rate: str) -> Path:
    """Where a learning rate is tried."""
    return benchmark.out / "tuning" / f"{model.name}-{rate}"


def asked_pictures(benchmark: Benchmark) -> str:
    """The labels of the set of pictures."""
    return json.dumps({name: list(labels) for name, labels in benchmark.pictures.items()})


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


def told_of(recipe: str) -> dict[str, Any]:
    """The settings of a run that its figures depend on: not places, nor, but for a defence, which may put images
    together, how many are attacked at once.
    """
    told = {key: value for key, value in yaml.safe_load(recipe).items() if key not in PLACES}
    if "evaluation" in told and "defence" not in told:
        told["evaluation"] = {key: value for key, value in told["evaluation"].items() if key != "batch_size"}
    return told


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
