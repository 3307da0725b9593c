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


def training_run(benchmark: Benchmark, model: Model, folder: Path, flags: Mapping[str, Any]) -> train.TrainingRun:
    """A row's training, with flags that go before its own."""
    places = {"model_name_or_path": benchmark.start, "output_dir": str(folder), "overwrite": True}
    return train.read(words({**places, **benchmark.flags, **model.flags, **flags}), packaged_config(str(model.config)))


def evaluation_run(benchmark: Benchmark, evaluation: Evaluation, model: Model) -> evaluate.EvaluationRun:
    """An evaluation of one checkpoint, which goes on where it was left."""
    folder = benchmark.out / evaluation.name / model.name
    config = packaged_config(evaluation.config)
    places = {"model_name_or_path": benchmark.folder_of(model), "output_dir": str(folder), "resume": True}
    flags = {**places, **evaluation.flags}
    tasks = flags.get("tasks", yaml.safe_load(config.read_text(encoding="utf-8")).get("tasks", []))
    if benchmark.pictures and any(Path(task["dataset"]).name == PICTURES for task in tasks):  # those of this run
        made = str(benchmark.out / PICTURES)
        flags["tasks"] = [{**t, "dataset": made} if Path(t["dataset"]).name == PICTURES else t for t in tasks]
    return evaluate.read(words(flags), config)


def rate_folder(benchmark: Benchmark, model: Model, rate: str) -> Path:
    """Where a learning rate is tried."""
    return benchmark.out / "tuning" / f"{model.name}-{rate}"


def pictures_labels(benchmark: Benchmark) -> str:
    """The labels of the set of pictures."""
    return json.dumps({name: list(labels) for name, labels in benchmark.pictures.items()})


def training_digest(benchmark: Benchmark, model: Model) -> str:
    """A digest of what a row is made of: the weights that it starts from, the settings of its training, the learning
    rates that were tried in place of the config's own, and the package's version.
    """
    row = next(row for row in benchmark.models if row.title == model.title)  # `model` may be of a seed
    rates = [str(rate) for rate in row.learning_rates]
    flags = {"learning_rate": rates[0]} if rates else {}
    source = training_run(benchmark, row, benchmark.out / row.name, flags).source if row.config else {}
    start = benchmark.start if row.config else benchmark.folder_of(row)
    text = json.dumps((decisive_settings(dump_recipe(source)), rates, benchmark.tuning_steps), sort_keys=True)
    return digest(f"{weights_digest(start)} {text}".encode())


def evaluation_digest(benchmark: Benchmark, evaluation: Evaluation, model: Model) -> str:
    """A digest of the settings of an evaluation, and of the set of pictures by its labels."""
    settings = decisive_settings(dump_recipe(evaluation_run(benchmark, evaluation, model).source))
    made_here, anywhere = json.dumps(str(benchmark.out / PICTURES)), json.dumps(PICTURES)
    text = json.dumps(settings, sort_keys=True).replace(made_here, anywhere)
    return digest(f"{text} {pictures_labels(benchmark)}".encode())


def decisive_settings(recipe: str) -> dict[str, Any]:
    """The settings of a run that its figures depend on: not places, nor, but for a defence, which may put images
    together, how many are attacked at once.
    """
    settings = {key: value for key, value in yaml.safe_load(recipe).items() if key not in PLACES}
    if "evaluation" in settings and "defence" not in settings:
        attack = settings["evaluation"].items()
        settings["evaluation"] = {key: value for key, value in attack if key != "batch_size"}
    return settings


def weights_digest(name: str) -> str:
    """A digest of the weights, settings and tokenizer in a checkpoint's folder; of what is no folder, its name. The
    package's version belongs to it: another may train and attack otherwise.
    """
    files = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
    kept = [file for file in files if file.suffix in WEIGHTS and file.name != "report.json"]
    digests = [f"{file.name} {digest_of(file, file.stat().st_size, file.stat().st_mtime_ns)}" for file in kept]
    return digest("\n".join([library_versions()["hf_robust_clip"], *(digests or [name])]).encode())


@lru_cache(maxsize=4096)
def digest_of(file: Path, size: int, changed: int) -> str:
    """`file_digest`, once for each size and time of change."""
    return file_digest(file)
