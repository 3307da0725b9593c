"""Published figures beside measured ones: which can stand beside each other, what differs, and the table."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..arguments import EvaluationRunArguments, Images
from ..attacks.named import suite_named
from ..checkpoint_notes import trained_method, trained_setting
from ..digits_clip import EMBEDDED_MODEL, digits_clip_path
from ..evaluation.settings import EvaluationSettings
from ..modeling import adapter_config, base_of
from ..modeling.checkpoints import explained
from ..names import hub_name, task_titles
from ..published import PublishedColumn, find_published, same_method
from ..report import RobustnessReport
from ..report.tables import Cells
from ..storage import whole_file
from ..threat_model import ThreatModel, parse_radius
from ..zero_shot_data.specs import find_spec, prompt_templates
from ..zero_shot_data.suites import numbers_of_images

ARCHITECTURES = {  # patch and picture in pixels, width and layers of the image encoder; OpenAI's have quick_gelu
    "ViT-B/32": (32, 224, 768, 12),
    "ViT-B/16": (16, 224, 768, 12),
    "ViT-L/14": (14, 224, 1024, 24),
}
UNDEFENDED = ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14")
UNSAID = ("step_size", "random_start")  # of PGD, which no source in published.json says
MANY = 1000  # classes, for which no attack of a suite is left out
MEND = "add --published_anyway true to show them all the same"


@dataclass(frozen=True)
class Beside:
    """A published column, and what of the evaluation stands beside it.

    Args:
        column: of published figures.
        settings: of the attack; None of clean figures.
        eps: its radius in units of [0, 1]; 0 of clean figures.
        differences: what differs in radius, norm, attack or defence.
        remarks: what else does, of all datasets.
        same_attack: whether it is the published attack, if with other settings.
    """

    column: PublishedColumn
    settings: EvaluationSettings | None = None
    eps: float = 0.0
    differences: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    same_attack: bool = True

    @property
    def distance(self) -> tuple[bool, int]:
        """How much differs: another attack is more than any number of other settings."""
        return not self.same_attack, len(self.differences)

    @property
    def title(self) -> str:
        """What was measured."""
        if self.settings is None:
            return "clean"
        return f"{self.settings.attack.name(MANY)} at {ThreatModel(self.eps, self.settings.norm)}"  # type: ignore[arg-type]


@dataclass(frozen=True)
class Comparison:
    """What is compared, checked before anything is evaluated.

    Args:
        name: of the published method, with its table.
        pairs: of columns.
        datasets: of each task that has published figures, by its title, the key of its dataset.
        absent: titles of the other tasks.
        anyway: whether differences are shown and not refused.
        of_model: what differs in the model; known once its files were looked at.
    """

    name: str
    pairs: tuple[Beside, ...]
    datasets: dict[str, str]
    absent: tuple[str, ...]
    anyway: bool
    of_model: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A measured and a published accuracy of one dataset, in percent."""

    beside: Beside
    dataset: str
    measured: float
    published: float
    remarks: tuple[str, ...] = ()


def asked_comparison(
    about: EvaluationRunArguments, tasks: Sequence[Images], evaluations: Sequence[EvaluationSettings]
) -> Comparison | None:
    """What is to be compared; None if nothing is asked for.

    Raises ValueError for an unknown method, tasks none of which has published figures, and, unless asked to show them
    anyway, attacks none of which is the published one.
    """
    if about.published is None:
        return None
    columns = find_published(about.published)
    known = {key for column in columns for key in column.figures}
    named = task_titles([(task.name, task.dataset) for task in tasks])
    specs = {title: find_spec(task.dataset) for title, task in zip(named, tasks, strict=True)}
    datasets = {title: spec.key for title, spec in specs.items() if spec is not None and spec.key in known}
    if not datasets:
        raise ValueError(
            f"published={about.published!r} has no figures of {', '.join(named)}; it has those of "
            f"{', '.join(sorted(known))}."
        )
    twice = [title for title, key in datasets.items() if list(datasets.values()).count(key) > 1]
    if twice:
        raise ValueError(
            f"published={about.published!r} has one figure of {datasets[twice[0]]}, of which are the tasks "
            f"{', '.join(twice)}; leave all but one out."
        )
    pairs = [_clean(column, about) for column in columns if column.metric == "clean"]
    robust = [_nearest(column, evaluations, about) for column in columns if column.metric == "robust"]
    exact = [beside for beside in robust if not beside.differences]
    wrong = next((beside for beside in pairs if beside.differences), None)
    if robust and not exact:
        wrong = min(robust, key=lambda beside: beside.distance)
    if wrong is not None and not about.published_anyway:
        raise ValueError(f"published={about.published!r} is of another setting: {_listed(wrong.differences)}; {MEND}.")
    pairs += robust if about.published_anyway else exact
    absent = tuple(title for title in named if title not in datasets)
    return Comparison(columns[0].name, tuple(pairs), datasets, absent, about.published_anyway)


def _clean(column: PublishedColumn, about: EvaluationRunArguments) -> Beside:
    return Beside(column, differences=_of_defence(column, about))


def _nearest(
    column: PublishedColumn, evaluations: Sequence[EvaluationSettings], about: EvaluationRunArguments
) -> Beside:
    """The attack and radius that differ least from the published ones."""
    found = [
        _beside(column, settings, threat, about) for settings in evaluations for threat in settings.threat_models()
    ]
    return min(found, key=lambda beside: beside.distance)


def _beside(
    column: PublishedColumn, settings: EvaluationSettings, threat: ThreatModel, about: EvaluationRunArguments
) -> Beside:
    named = column.attack and suite_named(column.attack).name(MANY)
    same_attack = settings.attack.name(MANY) == named
    told = [_other("norm", settings.norm, column.norm), _other("attack", settings.attack.name(MANY), named)]
    told += _of_attack(column.attack, settings, threat) if column.attack and same_attack else []
    if column.eps is None or not math.isclose(threat.eps, parse_radius(column.eps)):
        told.append(_other("eps", threat.radius, column.eps))
    told.append(_other("view", settings.seen.name, column.view))
    smaller = [own.radius for own in settings.threat_models() if own.eps < threat.eps]
    remarks = [f"an image must have withstood {', '.join(smaller)} too"] if smaller else []
    remarks += [f"precision {settings.precision}"] if settings.precision != "fp32" else []
    differences = (*filter(None, told), *_of_defence(column, about))
    return Beside(column, settings, threat.eps, differences, tuple(remarks), same_attack)


def _of_attack(attack: str, settings: EvaluationSettings, threat: ThreatModel) -> list[str | None]:
    """What differs in the settings of an attack, save those that no source says."""
    ours, theirs = (suite.parameters([threat], MANY) for suite in (settings.attack, suite_named(attack)))
    names = [name for name in {**ours, **theirs} if name not in UNSAID]
    return [_other(f"attack's {name}", ours.get(name), theirs.get(name)) for name in names]


def _of_defence(column: PublishedColumn, about: EvaluationRunArguments) -> tuple[str, ...]:
    own = about.defence.name if about.defence is not None and about.defence.defends else None
    theirs = column.family if column.defence else None
    if own is not None and theirs is not None and same_method(own, theirs):
        return ()
    return tuple(filter(None, [_other("test-time defence", own or "none", theirs or "none")]))


def _other(what: str, own: Any, theirs: Any) -> str | None:
    """What differs in words; None if nothing does."""
    if own == theirs:
        return None
    return f"{what} {own}, published {'not said' if theirs is None else theirs}"


def with_model(comparison: Comparison, name: str, revision: str | None) -> Comparison:
    """The same with what differs in the model: architecture, activation, method, design of prompts.

    Raises ValueError for any, unless asked to show them anyway.
    """
    column = comparison.pairs[0].column
    adapter = adapter_config(name, revision)
    base = (name, revision or "main") if adapter is None else base_of(name, adapter)
    own, method = architecture_of(*base), "none" if hub_name(name) in UNDEFENDED else trained_method(name, revision)
    told = [_other("model", own, f"{column.architecture} with quick_gelu")]
    if method is not None and not column.defence and not same_method(method, column.family):
        told.append(_other("method", method, column.method))
    if column.family != "none":
        told += _of_training(column, *trained_setting(name, revision))
    if column.design is not None:
        told.append(_other("prompts of design", "none" if adapter is None else adapter.get("design"), column.design))
    differences = tuple(filter(None, told))
    if differences and not comparison.anyway:
        raise ValueError(f"published={comparison.name!r} is of another model: {_listed(differences)}; {MEND}.")
    unknown = method is None and not column.defence and column.family != "none"
    remarks = (f"method not noted in the checkpoint, published {column.method}",) if unknown else ()
    return replace(comparison, of_model=(*differences, *remarks))


def _of_training(column: PublishedColumn, dataset: str | None, eps: str | float | None) -> list[str | None]:
    """What differs in the training, where both sides say it."""
    told: list[str | None] = []
    if dataset is not None and column.trained_on is not None:
        spec = find_spec(dataset)
        told.append(_other("trained on", dataset if spec is None else spec.key, column.trained_on))
    if eps is not None and column.training_eps is not None:
        same = math.isclose(parse_radius(eps), parse_radius(column.training_eps))
        told.append(None if same else _other("trained at eps", eps, column.training_eps))
    return told


def architecture_of(name: str, revision: str = "main") -> str:
    """What the image encoder of a checkpoint is, with its activation, by its config.json."""
    source = digits_clip_path() if name == EMBEDDED_MODEL else name
    where = {} if name == EMBEDDED_MODEL else {"revision": revision}
    config = explained(source, lambda: AutoConfig.from_pretrained(source, trust_remote_code=False, **where))
    vision = getattr(config, "vision_config", config)
    parts = ("patch_size", "image_size", "hidden_size", "num_hidden_layers")
    sizes = tuple(getattr(vision, part, None) for part in parts)
    known = next((told for told, own in ARCHITECTURES.items() if own == sizes and config.model_type == "clip"), None)
    told = known or "{} with patches of {} px at {} px, width {}, {} layers".format(config.model_type, *sizes)
    return f"{told} with {getattr(vision, 'hidden_act', 'another activation')}"


def compared_rows(
    comparison: Comparison,
    reports: Sequence[RobustnessReport],
    evaluations: Sequence[EvaluationSettings],
    whole: Mapping[str, int | None],
    tasks: Mapping[str, Images],
) -> list[Row]:
    """A row for each published figure beside which a measured one stands.

    Args:
        reports: of the model in question: for each task one by each of the evaluations.
        whole: by task, of how many images those that were evaluated are a part; None of a stream.
        tasks: by title.
    """
    rows = []
    for beside in comparison.pairs:
        for title, key in comparison.datasets.items():
            number = evaluations.index(beside.settings) if beside.settings else 0
            report = [own for own in reports if own.task == title][number]
            if key in beside.column.figures:
                share = _accuracy(report, beside.eps)
                remarks = _of_images(report, key, beside, whole[title], tasks[title])
                rows.append(Row(beside, key, 100 * share, beside.column.figures[key], remarks))
    return rows


def _accuracy(report: RobustnessReport, eps: float) -> float:
    by_radius = {0.0: report.clean_accuracy, **report.robust_accuracy}
    return next(value for own, value in by_radius.items() if math.isclose(own, eps))


def _of_images(report: RobustnessReport, key: str, beside: Beside, whole: int | None, task: Images) -> tuple[str, ...]:
    """What differs in images, classes, prompt and resolution from those of the dataset's row."""
    spec = find_spec(key)
    assert spec is not None
    found = []
    if whole is None or report.num_images < whole:
        found.append(f"n={report.num_images} of {'a stream' if whole is None else whole}")
    if whole is not None and whole not in (counts := numbers_of_images(key)) and counts:
        found.append(f"a set of {whole} images, in papers {' or '.join(map(str, counts))}")
    if task.split not in ("test", "all"):
        found.append(f"split {task.split}")
    if report.dataset != spec.hub_id:
        found.append(f"dataset {report.dataset}, not {spec.hub_id}")
    if report.num_classes != spec.num_classes:
        found.append(f"{report.num_classes} of {spec.num_classes} classes")
    if task.class_names is not None:
        found.append("class names of its own")
    if task.resize is not None:
        found.append(f"resized to {task.resize} px")
    if task.crop_pct is not None:
        found.append(f"cropped to {task.crop_pct:g} of the picture's side")
    templates = beside.column.templates
    if templates is not None and report.templates != prompt_templates(templates):
        found.append(
            f"prompt {' | '.join(report.templates or ('not noted',))}, published {prompt_templates(templates)[0]}"
        )
    expected = spec.attack_resolution or 224
    if report.attack_resolution != expected:
        found.append(f"attacked at {report.attack_resolution} px, not {expected}")
    if beside.settings is not None and report.attack != beside.settings.attack.name(MANY):
        found.append(f"attack {report.attack}")
    return tuple(found)


def as_cells(comparison: Comparison, rows: Sequence[Row]) -> Cells:
    """A row for each dataset, grouped by what was measured, and where there are several their mean: accuracies in
    percent, and measured less published in percentage points.
    """
    lines: list[tuple[str, ...]] = []
    for beside in comparison.pairs:
        own = [row for row in rows if row.beside is beside]
        told = beside.title + (f" ({_listed(beside.differences)})" if beside.differences else "")
        figures = [(row.dataset + "*" * bool(row.remarks), row.measured, row.published) for row in own]
        if len(own) > 1:
            measured = sum(row.measured for row in own) / len(own)
            figures.append((f"mean of these {len(own)}", measured, sum(row.published for row in own) / len(own)))
        lines += [(told, name, f"{a:.1f}", f"{b:.2f}", f"{a - b:+.1f}") for name, a, b in figures]
    return Cells(("figures", "", "measured", "published", "difference"), tuple(lines), grouped=True)


def as_notes(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """What must be read beside the table: where the figures are from, what differs, what isn't there."""
    columns = [beside.column for beside in comparison.pairs]
    first = columns[0]
    hand = "; second-hand" if first.second_hand else ""
    trained = f"; trained on {first.trained_on}" if first.trained_on else ""
    notes = [f"published: {first.method}, {first.architecture}{trained}; {first.source}{hand}"]
    notes += [note for note in dict.fromkeys(column.note for column in columns) if note]
    notes += [f"differs in the model: {told}" for told in comparison.of_model]
    for beside in comparison.pairs:
        notes += [f"differs at {beside.title}: {told}" for told in beside.remarks]
    remarks: dict[str, list[str]] = {}
    for row in rows:
        known = remarks.setdefault(row.dataset, [])
        known += [remark for remark in row.remarks if remark not in known]
    for key in dict.fromkeys(row.dataset for row in rows):
        note = getattr(find_spec(key), "note", "")
        told = _listed([*remarks[key], *([note] if note else [])])
        notes += [f"{key}{'*' if remarks[key] else ''}: {told}"] if told else []
    if comparison.absent:
        notes.append(f"not in the published table: {', '.join(comparison.absent)}")
    missing = sorted({key for column in columns for key in column.figures} - {row.dataset for row in rows})
    if missing:
        notes.append(f"published, not measured: {', '.join(missing)}")
    unsaid = ["step size and start of the attack", "number of images", *([] if first.templates else ["prompt"])]
    return [*notes, f"the source doesn't say: {', '.join(unsaid)}"]


def save_published(path: Path, comparison: Comparison, rows: Sequence[Row]) -> None:
    """Write the rows as CSV, in percent, with everything that differs."""
    with whole_file(path) as draft, Path(draft).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["published", "source", "second_hand", "dataset", "metric", "attack", "eps", "measured", "published_value",
             "difference", "differs"]
        )  # fmt: skip
        for row in rows:
            column = row.beside.column
            differs = _listed([*comparison.of_model, *row.beside.differences, *row.beside.remarks, *row.remarks])
            writer.writerow(
                [comparison.name, column.source, column.second_hand, row.dataset, column.metric, column.attack or "",
                 column.eps or "", round(row.measured, 4), row.published, round(row.measured - row.published, 4),
                 differs]
            )  # fmt: skip


def _listed(differences: Sequence[str]) -> str:
    return "; ".join(differences)
