"""A leaderboard by a YAML file: checkpoints that are converted where they must be, evaluated alike, and ranked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..arguments import EvaluationArguments, Images, ModelArguments
from ..attacks.suites import Suite
from ..command_line import ClassFlag, CommandLine, nearest, read_command
from ..digests import digest, digests, file_digest, plain
from ..evaluation.settings import EvaluationSettings
from ..hub import dump_recipe
from ..modeling import PAPER_TEMPLATE, check_classes
from ..names import cached_revision, is_path, last_part, paths_in, shown_name, task_titles, without_paths
from ..processes import join_processes
from ..report import RobustnessReport, load_reports, print_table, save_reports
from ..report.leaderboard import FILES, LeaderboardRow, make_leaderboard, write_leaderboard
from ..report.leaderboard import as_cells as leaderboard_cells
from ..report.tables import as_text
from ..secrets import without_token_keys, without_tokens
from ..storage import NotWritten, check_writable, read_json, write_text
from ..threat_model import ThreatModel, parse_radius
from . import evaluate, shared
from .shared import SUITES

KEY = re.compile(r"[a-z0-9][a-z0-9_.-]*")
PROVENANCE = "provenance.json"  # of a converted folder
LAST = ("config.json", "adapter_config.json")  # of these a converted folder has one only if it is whole


@dataclass(frozen=True)
class LeaderboardModel:
    """A checkpoint of a leaderboard.

    Args:
        key: of its folder.
        title: what tables call it.
        licence: of the weights, as its authors name it; none-given where they name none.
        reference: key of the undefended model that it was fine-tuned from, which is among the references.
        source: Hub id, folder or file; null where it must be fetched by hand, from `link`, and is named by `files`.
        file: name of the weights in the source.
        revision: of a Hub id.
        base_revision: of the base.
        link: where people find what isn't on the Hub.
        layout: how its file is written, as the converter calls it; null for a folder of transformers, which is
            evaluated as it is.
        base: of the converter: Hub id or folder of a CLIP of the same sizes, which gives what the file lacks.
        normalisation: of the converter.
        activation: of the converter.
        method: by which it was trained.
        trained_eps: radius of its training, in units of [0, 1].
        trained_norm: linf or l2.
        trained_on: key of the dataset of its training.
        paper: where it is published.
        notes: what a reader must know.
    """

    key: str = ""
    title: str = ""
    licence: str = ""
    reference: str | None = None
    source: str | None = None
    file: str | None = None
    revision: str | None = None
    link: str | None = None
    layout: str | None = None
    base: str | None = None
    base_revision: str | None = None
    normalisation: str | None = None
    activation: str | None = None
    method: str = ""
    trained_eps: float | str | None = None
    trained_norm: str = "linf"
    trained_on: str = ""
    paper: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        if not KEY.fullmatch(self.key):
            raise ValueError(f"key={self.key!r} of a model must be small letters, digits, dots, '-' and '_'.")
        for name in ("title", "licence"):
            if not getattr(self, name).strip():
                raise ValueError(f"model {self.key!r}: {name} is missing.")
        if self.source is None and self.link is None:
            raise ValueError(f"model {self.key!r}: source is missing; where it must be fetched by hand, give link.")
        if self.layout is not None and self.base is None:
            raise ValueError(f"model {self.key!r}: base is missing; name a CLIP of the same sizes, for the converter.")
        of_converter = ("file", "base", "base_revision", "normalisation", "activation")
        lost = next((name for name in of_converter if self.layout is None and getattr(self, name) is not None), None)
        if lost is not None:
            raise ValueError(f"model {self.key!r}: {lost} does nothing without layout, by which it is converted.")
        if self.source is None and self.layout is None:
            raise ValueError(f"model {self.key!r}: layout is missing; say how the file from link is written.")
        try:
            _ = self.trained
        except ValueError as error:
            raise ValueError(f"model {self.key!r}: trained_eps, trained_norm: {error}") from None

    @property
    def trained(self) -> str:
        """The perturbations of its training."""
        eps = self.trained_eps
        return "" if eps is None else str(ThreatModel(eps, self.trained_norm))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Excluded:
    """A checkpoint that is left out.

    Args:
        title: what it is called.
        source: where it is.
        reason: why it is left out.
    """

    title: str = ""
    source: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if not (self.title and self.reason):
            raise ValueError(f"excluded: title={self.title!r}, reason={self.reason!r}; give both.")


@dataclass(frozen=True)
class LeaderboardArguments:
    """What is ranked, and on what.

    Args:
        heading: of the page.
        about: below the heading.
        output_dir: where everything is written.
        models: that are ranked.
        references: undefended models, shown and not ranked; that which a model was trained from is among them.
        excluded: checkpoints that are left out, with the reason.
        files: files that were fetched by hand, by key of their model.
        tasks: datasets that all are evaluated on.
        template: prompt with {} for the class name, the same for all.
        rank_radius: of the robust accuracy that decides; null takes the smallest of evaluation.radii.
        only: keys of models; the others, and the table, are left to other runs.
        use_cpu: evaluate on the CPU, whatever else is there.
    """

    heading: str = "Robust CLIP leaderboard"
    about: str = ""
    output_dir: str | None = None
    models: Sequence[LeaderboardModel] = ()
    references: Sequence[LeaderboardModel] = ()
    excluded: Sequence[Excluded] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    tasks: Sequence[Images] = ()
    template: str = PAPER_TEMPLATE
    rank_radius: float | str | None = None
    only: Sequence[str] = ()
    use_cpu: bool = False

    def __post_init__(self) -> None:
        check_classes(["a class"], self.template)
        everyone = [*self.models, *self.references]
        for name in ("key", "title"):
            values = [getattr(model, name) for model in everyone]
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"two models have the {name} {twice!r}; give each its own.")
        for model in self.references:
            if model.method or model.trained_eps is not None or model.reference is not None:
                raise ValueError(
                    f"references: {model.key!r} is undefended: without method, trained_eps and reference."
                )
        undefended = [model.key for model in self.references]
        for model in self.models:
            if model.reference not in undefended:
                known = ", ".join(undefended) or "none"
                raise ValueError(f"model {model.key!r}: reference={model.reference!r} must be one of: {known}.")
        keys = [model.key for model in everyone]
        for name, asked in (("only", self.only), ("files", self.files)):
            for key in asked:
                if key not in keys:
                    raise ValueError(f"{name} names {key!r}, which is no model; {nearest(key, keys, 'see models.')}")
        for key, file in self.files.items():
            if not Path(file).is_file():
                raise OSError(f"files: {file!r} of {key!r} is no file.")


@dataclass(frozen=True, kw_only=True)
class LeaderboardRun:
    """A leaderboard, checked.

    Args:
        about: what is ranked.
        settings: the attack that all are under.
        radius: of the robust accuracy that decides.
        tasks: by title.
        source: settings as plain values, for recipe.yaml.
    """

    about: LeaderboardArguments
    settings: EvaluationSettings
    radius: float
    tasks: Mapping[str, Images]
    source: Mapping[str, Any]

    @property
    def output_dir(self) -> str:
        """Where everything is written."""
        return str(self.about.output_dir)


COMMAND = CommandLine(
    groups={"": (LeaderboardArguments,), "evaluation": (EvaluationArguments,)},
    classes={"evaluation.attack": ClassFlag(Suite, SUITES, names=True)},
    required=("output_dir", "models", "tasks", "evaluation.radii"),
    skip=frozenset(f"evaluation.{name}" for name in ("attacks", "view", "eot")),
)


def main(words: Sequence[str], default_config: Path, description: str = "") -> None:
    """A leaderboard as a command: status 1 where a model lacks a figure, 2 for a wrong setting."""
    lacking: list[str] = []

    def act(run: LeaderboardRun) -> None:
        lacking.extend(make(run))

    shared.run_command(lambda: read(words, default_config, description), act, left)
    if lacking:
        raise SystemExit(1)


def left(folder: str) -> str:
    """What is there of a run that was stopped."""
    return f"what is done is in {folder!r}: the same command goes on from there."


def read(words: Sequence[str], default_config: Path, description: str = "") -> LeaderboardRun:
    """Check every setting. Nothing is written or downloaded here."""
    given = read_command(COMMAND, words, default_config, description, _prepare_settings)
    made = given.made()
    about: LeaderboardArguments = given.group(LeaderboardArguments, made)
    (settings,) = made.evaluation.settings()
    radii = [threat.eps for threat in settings.threat_models()]
    radius = radii[0] if about.rank_radius is None else parse_radius(about.rank_radius, "rank_radius")
    near = next((own for own in radii if abs(own - radius) < 1e-9), None)
    if near is None:
        raise ValueError(f"rank_radius={about.rank_radius!r} is none of evaluation.radii.")
    check_layouts(about.models)
    shared.check_tasks(tuple(about.tasks))
    for i, task in enumerate(about.tasks):
        if task.template is not None:
            raise ValueError(f"tasks[{i}].template={task.template!r}: a leaderboard has one template; leave it out.")
    folder = Path(str(about.output_dir))
    if folder.exists() and not folder.is_dir():
        raise OSError(f"output_dir={about.output_dir!r} is a file; name a folder.")
    titles = task_titles([(task.name, task.dataset) for task in about.tasks])
    tasks = dict(zip(titles, about.tasks, strict=True))
    source = without_paths(without_token_keys(given.settings))
    return LeaderboardRun(about=about, settings=settings, radius=near, tasks=tasks, source=source)


def _prepare_settings(file: dict[str, Any], options: dict[str, str]) -> None:
    """The tasks of suites in the place of their names; the prompt is that of the leaderboard."""
    shared.expand_suites(file, options, template=True)


def check_layouts(models: Sequence[LeaderboardModel]) -> None:
    """Raise ValueError for a layout that the converter doesn't know."""
    from ..modeling.layouts import LAYOUTS

    known = [layout.name for layout in LAYOUTS]
    for model in models:
        if model.layout is not None and model.layout not in known:
            hint = nearest(model.layout, known, f"known: {', '.join(known)}.")
            raise ValueError(f"model {model.key!r}: layout={model.layout!r} is unknown; {hint}")


def make(run: LeaderboardRun) -> list[str]:
    """Convert, evaluate and rank; the titles of models that lack a figure."""
    about, folder = run.about, Path(run.output_dir)
    check_writable(folder)
    processes = join_processes(shared.on_cpu(about.use_cpu))
    if processes.num_processes > 1:
        raise ValueError("a leaderboard runs in one process; several runs divide the models by --only.")
    everyone = [*about.models, *about.references]
    chosen = [model for model in everyone if not about.only or model.key in about.only]
    rows = []
    for number, model in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {model.title}", flush=True)
        rows.append(row_of(run, model))
        for reason in rows[-1].reasons:
            print(f"{model.title}: {reason}", flush=True)
    lacking = [row.title for row in rows if row.reasons]
    if about.only:
        print("only some models were asked for; the same command without --only writes the table.")
        return lacking
    board = make_leaderboard(rows, list(run.tasks), run.radius)
    excluded = [f"{own.title} ({own.source}): {own.reason}" if own.source else f"{own.title}: {own.reason}"
                for own in about.excluded]  # fmt: skip
    write_leaderboard(folder, board, about.heading, about.about, excluded)
    reports = [replace(own, name=row.title) for row in board.rows for own in row.reports.values()]
    if reports:
        save_reports(folder / "report.json", reports)
    write_text(folder / "recipe.yaml", dump_recipe(run.source))
    print_table(as_text(leaderboard_cells(board, brief=True), about.heading, "accuracy in percent"))
    for row in board.rows:
        for reason in row.reasons:
            print(f"{row.title}: {reason}")
    print(f"saved to {folder}: {', '.join(name for name in FILES if (folder / name).is_file())}")
    return [row.title for row in board.rows if row.reasons]


def row_of(run: LeaderboardRun, model: LeaderboardModel) -> LeaderboardRow:
    """A model's row, made of what is there already and of what is converted and evaluated now."""
    reports: dict[str, RobustnessReport] = {}
    reasons: list[str] = []
    source = model.source or run.about.files.get(model.key)
    revision = model.revision
    try:
        if source is None:
            raise OSError(f"its file must be fetched by hand from {model.link}, and named by files")
        checkpoint, revision = checkpoint_of(run, model, source)
    except NotWritten:
        raise
    except Exception as error:  # whatever a file, the Hub or a library brings up: it keeps no other model back
        reasons.append(f"not run: {_line(error)}")
    else:
        for title, task in run.tasks.items():
            try:
                reports[title] = measured(run, model, source, checkpoint, title, task, revision)
            except NotWritten:
                raise
            except Exception as error:
                reasons.append(f"not run on {title}: {_line(error)}")
    found = next((report.model_revision for report in reports.values()), revision)
    where = model.link or "" if source is None else shown_name(source) + (f", {model.file}" if model.file else "")
    return LeaderboardRow(
        title=model.title,
        method=model.method,
        trained=model.trained,
        trained_on=model.trained_on,
        reference=next((own.title for own in run.about.references if own.key == model.reference), ""),
        licence=model.licence,
        source=where + (f" at {found[:7]}" if found and found != "local" else ""),
        notes="; ".join(filter(None, [model.notes, model.paper])),
        is_reference=model in run.about.references,
        reports=reports,
        reasons=tuple(reasons),
    )


def _line(error: BaseException) -> str:
    """An error in one line that may be published: without tokens, and of each path on this disk the last part."""
    text = without_tokens(" ".join(str(error).split())) or type(error).__name__
    for path in paths_in(text):
        text = text.replace(path, last_part(path))
    return text if len(text) < 300 else f"{text[:300]} ..."


def identity(model: LeaderboardModel, source: str) -> dict[str, Any]:
    """What a conversion depends on: with something else of it, another folder is made. Files that lie here go in by
    what they hold.
    """
    told = {name: getattr(model, name) for name in ("file", "revision", "base", "base_revision", "layout",
                                                    "normalisation", "activation")}  # fmt: skip
    for name, place in (("source", source), ("base", model.base)):
        told[name] = place if place is None or not is_path(place) else _contents(Path(place), model.file)
    return told


def _contents(place: Path, file: str | None) -> Any:
    if place.is_file():
        return file_digest(place)
    named = [place / file] if file is not None else []
    return digests(
        place, [own for own in (*named, *place.glob("*.safetensors"), *place.glob("*.json")) if own.is_file()]
    )


def checkpoint_of(run: LeaderboardRun, model: LeaderboardModel, source: str) -> tuple[str, str | None]:
    """A checkpoint that can be evaluated, with its revision: the source, or what it is converted to, once."""
    if model.layout is None:
        return source, model.revision
    from .convert import convert_checkpoint

    key = digest(json.dumps(plain(identity(model, source)), sort_keys=True).encode())
    folder = Path(run.output_dir) / "converted" / f"{model.key}-{key}"
    if not any((folder / name).is_file() for name in LAST):
        convert_checkpoint(
            source,
            str(model.base),
            folder,
            source_file=model.file,
            source_revision=model.revision,
            base_revision=model.base_revision,
            layout=model.layout,
            normalisation=model.normalisation,
            activation=model.activation,
            overwrite=True,  # what a run that was killed left there
        )
    return str(folder), read_json(folder / PROVENANCE)["source"]["commit"]


def measured(
    run: LeaderboardRun,
    model: LeaderboardModel,
    source: str,
    checkpoint: str,
    title: str,
    task: Images,
    revision: str | None,
) -> RobustnessReport:
    """The report of a model on a task, unless it is there: by the same checkpoint, images and attack."""
    about = run.about
    how = {"model": identity(model, source), "task": plain(vars(task)), "template": about.template,
           "evaluation": plain({f.name: getattr(run.settings, f.name) for f in fields(run.settings)
                                if f.name not in ("num_workers", "batch_size")})}  # fmt: skip
    key = digest(json.dumps(plain(how), sort_keys=True).encode())
    folder = Path(run.output_dir) / "evaluated" / f"{model.key}-{key}"
    if not (folder / "report.json").is_file():
        own = None if model.layout is not None or is_path(checkpoint) else model.revision
        evaluate.evaluate(
            evaluate.EvaluationRun(
                output_dir=str(folder),
                template=about.template,
                texts=shared.Texts((about.template,)),
                tasks=(task,),
                use_cpu=about.use_cpu,
                resume=True,
                model=ModelArguments(checkpoint, own),
                evaluations=(run.settings,),
                defence_settings=(),
                preset=None,
                fit_on=None,
                source={"leaderboard": model.key, "task": title, "evaluation": run.source.get("evaluation")},
            )
        )
    (report,), _ = load_reports(folder / "report.json")
    kept = report.model_revision if model.layout is None else revision or cached_revision(source) or "local"
    return replace(report, name=model.title, task=title, model=shown_name(source), model_revision=kept)
