"""The model card: a pure function of reports and settings, which `report.json` keeps beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment

from ..attacks.views import KNOWN_VIEWS
from ..digits_clip import EMBEDDED_MODEL
from ..modeling import DESCRIPTION
from ..names import is_repo_id
from ..paper import Paper
from ..secrets import refuse_tokens
from ..storage import write_text
from .files import load_reports, read_report_file, save_reports
from .metadata import LIBRARY, Holds, eval_results, metadata, title_of
from .report import ROBUST, RobustnessReport, blind_warning, frame, percent, with_descriptions
from .tables import by_column, cell, head, headlines, titled

NOTHING_MEASURED = "**Nothing was measured of this repository.**"
TRAINERS_DRAFT = "generated automatically according to the information the Trainer had access to"
GAP, MANY_GAPS = "[More Information Needed]", 20  # of PEFT's draft, which has more as long as nobody fills it in
CardState = Literal["none", "draft", "unmeasured", "measured", "theirs"]
DEFENDED = "test-time-defence"  # the tag
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
OPTIONAL = ("ancestor", "family", "described", "examples", "sample", "pictures", "defences")  # older files lack them
FROM_SCRATCH = "random weights"  # where the settings say so of the start
HIDDEN = ("attack", "threat_model", "text_tokens", "units")  # settings that stand elsewhere than in the card's table


@dataclass(frozen=True)
class Family:
    """What a card says of a family of models: its name, its class in transformers, whether its texts are in lower case
    wherever they go, and what is to be known of its scores.
    """

    name: str
    plain: str
    lower_case: bool = False
    note: str = ""


FAMILIES = {
    "clip": Family("CLIP", "CLIPModel"),
    "siglip": Family(
        "SigLIP",
        "SiglipModel",
        lower_case=True,
        note="The scores are sigmoids, of each label by itself, while the training compared labels with one another: "
        "their order counts, not their size.",
    ),
}


@dataclass(frozen=True)
class CardInfo:
    """What a card says beyond its reports.

    Args:
        repo_id: Hub id, or the folder where there is none yet.
        base_model: Hub id of what the training started from; empty where others can't get it.
        training_data: one line: dataset, split, classes, number of images.
        paper: of the method.
        settings: `RobustClipTrainer.settings()`, or other plain values under the same keys; `"text_tokens"` says how
            many words of every text prompts take the place of, `"units"` whether pixel prompts are `"clipped"`, or
            `"class-wise"` too.
        template: the prompt that was used.
        class_names: of the training data; the first three serve as an example (of class-wise prompts all).
        limits: what this very model can't do: a sentence or several; each line becomes a point.
        datasets: Hub ids of the training data, for the metadata.
        plot: file name of the plot beside the card, or None.
        license: SPDX id of the weights; None where it follows from the base model.
        ancestor: Hub id of what a start without a `base_model` was made from itself; None if nobody knows.
        family: `model_type` of the model's configuration.
        described: whether the template takes descriptions of the classes, which lie beside the weights.
        examples: file name of the picture of attacked images beside the card, or None.
        sample: file name of one clean picture beside the card, with which the Hub's widget begins, or None.
        pictures: one line on these: which model and attack, whose pictures, under which licence.
        defences: Hub ids of test-time defences that stand on this model.

    Raises TypeError for settings that JSON can't hold, ValueError for an access token among them, an unknown family,
    a licence that is no identifier, and a defence that is no Hub id.
    """

    repo_id: str
    base_model: str
    training_data: str
    paper: Paper
    settings: dict[str, Any]
    template: str
    class_names: Sequence[str]
    limits: str
    datasets: Sequence[str] = ()
    plot: str | None = None
    license: str | None = None
    ancestor: str | None = None
    family: str = "clip"
    described: bool = False
    examples: str | None = None
    sample: str | None = None
    pictures: str = ""
    defences: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("class_names", "datasets", "defences"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise ValueError(
                f"license={self.license!r} of a card must be an identifier of the Hub, such as apache-2.0."
            )
        for name in self.defences:
            if not is_repo_id(name):
                raise ValueError(f"defences: {name!r} is no repository of the Hub; write owner/name.")
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} of a card must be one of {', '.join(FAMILIES)}.")
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))  # as a file gives them back
        refuse_tokens(vars(self), "card")


def load_card_info(path: str | Path) -> CardInfo:
    """The `CardInfo` that `save_reports(path, ..., card=info)` stored.

    Raises ValueError if there is none, or one with missing or unknown entries.
    """
    card = read_report_file(path).get("card")
    if card is None:
        raise ValueError(f"{path} has no card entry; write it with save_reports(path, reports, compared, card=info).")
    paper = card.get("paper") or {}
    for row, cls in ((card, CardInfo), (paper, Paper)):
        known = {field.name for field in fields(cls)}
        needed = known - set(OPTIONAL)
        if wrong := (needed - set(row)) | (set(row) - known):
            raise ValueError(f"the card entry of {path} lacks or adds: {', '.join(sorted(wrong))}.")
    for name in ("plot", "examples", "sample"):
        if card.get(name) is not None and not re.fullmatch(r"[\w-]+\.png", str(card[name])):
            raise ValueError(f"{name}={card[name]!r} in the card entry of {path} must be the name of a png file.")
    return CardInfo(**{**card, "paper": Paper(**paper)})


def regenerate_card(folder: str | Path) -> ModelCard:
    """The card of a folder, made again from its report.json.

    Raises FileNotFoundError if report.json or recipe.yaml is missing, ValueError if the report has no figures or no
    card entry.
    """
    for name, use in (("report.json", "its figures"), ("recipe.yaml", "what would repeat it")):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; a card is not made without {use}.")
    path = Path(folder) / "report.json"
    reports, compared = load_reports(path)
    if not reports:
        raise ValueError(f"{path} has no reports; a card needs at least one evaluation of its model.")
    info = load_card_info(path)
    try:
        return make_card(reports, compared, info)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds an entry of another kind ({error}); make it again.") from error


def name_repository(folder: str | Path, repo_id: str) -> None:
    """Let the card of a folder, and the rows of its model in report.json, name the repository that it is pushed to.

    Nothing changes where report.json has no card entry, or that one names it already.
    """
    path = Path(folder) / "report.json"
    if not path.is_file() or (read_report_file(path).get("card") or {}).get("repo_id") in (None, repo_id):
        return
    (reports, compared), info = load_reports(path), load_card_info(path)
    reports = [replace(report, model=repo_id) for report in reports]
    info = replace(info, repo_id=repo_id)
    save_reports(path, reports, compared, card=info)
    write_text(Path(folder) / "README.md", str(make_card(reports, compared, info)))


def card_state(file: str | Path) -> CardState:
    """What a README.md is: `none`, a `draft` that PEFT or the Trainer wrote, an `unmeasured` or `measured` card of
    ours, or `theirs`, somebody's own words.
    """
    if not Path(file).is_file():
        return "none"
    text = Path(file).read_text(encoding="utf-8")
    if TRAINERS_DRAFT in text or text.count(GAP) > MANY_GAPS:
        return "draft"
    if LIBRARY not in text.split("\n---", 1)[0]:
        return "theirs"
    if NOTHING_MEASURED in text:
        return "unmeasured"
    return "measured" if "model-index:" in text.split("\n---", 1)[0] else "theirs"


def contradiction(text: str, settings: dict[str, Any]) -> str | None:
    """Where a card's table on the training says something else than these settings: the first such row, or None."""
    for name, value in _rows(settings).items():
        told = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)
        if told and told[1] != value:
            return f"{name} {told[1]}, not {value}"
    return None


def changed_card(file: str | Path, given: dict[str, Any]) -> ModelCard:
    """A card with other metadata: tags and datasets are added, the rest is replaced."""
    card = ModelCard.load(file)
    for name, value in given.items():
        if name in ("tags", "datasets"):
            value = [value] if isinstance(value, str) else value
            value = list(dict.fromkeys([*(getattr(card.data, name) or []), *value]))
        setattr(card.data, name, value)
    return card


def make_card(reports: Sequence[RobustnessReport], before: Sequence[RobustnessReport], info: CardInfo) -> ModelCard:
    """The card of a fine-tuned model.

    Args:
        reports: of this model; they become `model-index` rows.
        before: of the model it started from and of others it is compared with, for the table alone.
        info: everything else.

    Raises ValueError if there is no report of this model: a card without figures is not made. So too for a defence
    whose figure under an attack that didn't know it would stand alone.
    """
    if not reports:
        raise ValueError("reports is empty; a card needs at least one evaluation of its model.")
    defences = [_defence_table(own) for own in _by_defence([*before, *reports])]
    prompts = info.settings.get("prompts")
    defended = any(report.defence for report in reports)
    kind: tuple[Holds, str] = ("adapter", "peft") if prompts else ("model", "transformers")
    data = metadata(info, *kind, *([DEFENDED] if defended else []))
    data.eval_results, data.metrics = eval_results(reports), ["accuracy"]
    return _rendered(
        data,
        **_about(info, "adapter" if prompts else "model", loads_defence=bool(prompts) and defended),
        measured=list(
            dict.fromkeys(f"{r.precision} at {r.attack_resolution} px on {r.hardware}" for r in (*before, *reports))
        ),
        templates=list(
            dict.fromkeys(
                _Written(_code(text) + (with_descriptions(r.descriptions) if DESCRIPTION in text else ""))
                for r in (*before, *reports)
                for text in r.templates or ()
            )
        ),
        attacks=_attack_tables([*before, *reports]),
        defences=defences,
        defended=defended,
        flags=[
            (name.replace("_", " "), any(report.model_flags.get(name) for report in reports))
            for name in dict.fromkeys(name for report in reports for name in report.model_flags)
        ],
        standard_attack=any(report.standard_attack for report in reports),
        limits=[line.strip() for line in info.limits.splitlines() if line.strip()],
        plot=info.plot,
        examples=info.examples,
        pictures=info.pictures,
    )


def make_unmeasured_card(info: CardInfo, holds: Holds, *, loads_defence: bool = False) -> ModelCard:
    """The card of a repository of which nothing was measured, and which says so: how to load it, settings, paper.

    Args:
        info: `settings` are those of the training, or of a defence that stands alone.
        holds: what lies in the repository.
        loads_defence: of adapters, whether a test-time defence lies beside.
    """
    library = {"model": "transformers", "adapter": "peft", "defence": LIBRARY}[holds]
    defended = loads_defence or holds == "defence"
    data = metadata(info, holds, library, *([DEFENDED] if defended else []))
    return _rendered(data, **_about(info, holds, defended), measured=[])


class _Written(str):
    """Text that is Markdown or code already, and goes into a card as it is."""


def _rendered(data: ModelCardData, template_name: str = "card.md.jinja", **values: Any) -> ModelCard:
    """A template with its values, each of them one line of plain text to whoever reads the card, save what is
    `_Written`.
    """
    text = (files(__package__) / "templates" / template_name).read_text(encoding="utf-8")
    template = Environment(finalize=_as_text).from_string(text)
    return ModelCard(template.render(card_data=_Written(data.to_yaml()), **values))


def _as_text(value: Any) -> Any:
    """A text as one line in which no link, heading or HTML begins; anything else as it is."""
    if not isinstance(value, str) or isinstance(value, _Written):
        return value
    line = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", value)
    line = re.sub(r"^ {4,}", "", re.sub(r"<(?=[\w/!?])", "&lt;", line))
    if re.search(r"\][(\[:]", line):
        line = re.sub(r"(\\*)\[", r"\1\1\\[", line)
    line = line.replace("```", "'''").replace("~~~", r"\~~~")
    if re.match(r"[#>=]|[-+](?=[\s-])|\*(?=\s)|([-*_])(\s*\1){2,}\s*$", line):
        return f"\\{line}"
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", line)


def _code(value: Any) -> _Written:
    """A value in Python code: JSON's texts are Python's too."""
    return _Written(json.dumps(value, ensure_ascii=False))


def _span(name: str) -> str:
    """A name between backticks."""
    return f"`{name.replace('`', '')}`"


def _named(name: str) -> _Written:
    """A name between backticks. Without a link: whether there is such a repository, nobody here knows, and the Hub
    links the `base_model` of the metadata by itself.
    """
    return _Written(_as_text(_span(name)))


def _source(*told: str) -> str:
    """What is told of a paper, in brackets; nothing of what is nowhere published."""
    return f" ({', '.join(filter(None, told))})" if any(told) else ""


def _about(info: CardInfo, holds: Holds, loads_defence: bool) -> dict[str, Any]:
    """What the template says of a repository whether or not anything was measured."""
    base = _named(info.base_model) if info.base_model else "a checkpoint that isn't published"
    start = f"a checkpoint made from {_named(info.ancestor)}" if info.ancestor and not info.base_model else base
    family = FAMILIES[info.family]
    plain = f"loads as a plain `{family.plain}`: weights, tokenizer and image processor are all here."
    shown = info.class_names if info.settings.get("units") == "class-wise" else info.class_names[:3]
    texts = [info.template, *shown]
    template, *names = (text.lower() for text in texts) if family.lower_case and not info.described else texts
    return {
        "title": title_of(info.repo_id),
        "repo_code": _code(info.repo_id),
        "holds": holds,
        "loads_defence": loads_defence,
        "base_text": base,
        "started": _Written(
            f"It started from {start} and {plain}" if info.base_model or info.ancestor else f"It {plain}"
        ),
        "defended_by": _Written(", ".join(map(_named, info.defences))),
        "base_code": _Written("hf_robust_clip.digits_clip_path()")
        if info.base_model == EMBEDDED_MODEL
        else _code(info.base_model or "path/to/the/base/model"),
        "method": info.paper.method,
        "source": _source(info.paper.venue),
        "titled_source": _source(info.paper.title, info.paper.venue),
        "bibtex": _Written(info.paper.bibtex.replace("```", "'''")),
        "attacked": info.settings.get("attack") is not None,
        "attack": info.settings.get("attack"),
        "from_scratch": info.settings.get("start") == FROM_SCRATCH,
        "threat_model": info.settings.get("threat_model"),
        "training_data": cell(info.training_data),
        "training": _rows(info.settings),
        "template": _code(template),
        "set_classes": _setting(info, names, template),
        "described": info.described,
        "example_names": _code(names),
        "family": family,
        "prompts": info.settings.get("prompts"),
        "parameters": f"{info.settings.get('trainable_parameters', 0):,}",
        "text_tokens": info.settings.get("text_tokens"),
        "units": info.settings.get("units"),
    }


def _setting(info: CardInfo, names: Sequence[str], template: str) -> _Written:
    """The line of code that sets the classes, or the lines, where they have descriptions."""
    if not info.described:
        return _Written(f"model.set_classes({_code(names)}, template={_code(template)})")
    lines = [
        "from hf_robust_clip import load_descriptions\n",
        f"names = {_code(names)}",
        f"descriptions = load_descriptions({_code(info.repo_id)}, names)",
        f"model.set_classes(names, {_code(template)}, descriptions)",
    ]
    return _Written("\n".join(lines))


def _rows(settings: dict[str, Any]) -> dict[str, str]:
    """What the table on the training says, row by row."""
    settings = json.loads(json.dumps(settings))
    settings |= {f"objective.{name}": value for name, value in (settings.pop("objective", None) or {}).items()}
    return {
        cell(name.replace("_", " ")): "none" if value is None else cell(value)
        for name, value in settings.items()
        if name not in HIDDEN
    }


def _by_attack(reports: Sequence[RobustnessReport]) -> list[list[RobustnessReport]]:
    """Reports that can stand in one table: same attack, target, norm and parameters."""
    groups: dict[str, list[RobustnessReport]] = {}
    for report in reports:
        key = json.dumps([report.full_attack, report.norm, _parameters(report)], sort_keys=True)
        groups.setdefault(key, []).append(report)
    return list(groups.values())


def _parameters(report: RobustnessReport) -> dict[str, Any]:
    return {name: value for name, value in report.attack_parameters.items() if name != "left_out"}


def _attack_tables(reports: Sequence[RobustnessReport]) -> list[dict[str, Any]]:
    """What the template says of each attack; those of one name are told apart by the parameters they differ in."""
    found, tables = _by_attack(reports), []
    for own in found:
        used = _kind(own[0])
        others = [_kind(other[0]) for other in found if other[0].full_attack == own[0].full_attack]
        differing = {key: value for key, value in used.items() if any(other.get(key) != value for other in others)}
        tables.append(_attack_table(own, ", ".join(filter(None, [own[0].full_attack, _told(differing)]))))
    return tables


def _kind(report: RobustnessReport) -> dict[str, Any]:
    """What an attack of one name may differ in from another."""
    return {"norm": "L-inf" if report.norm == "linf" else "L2", **_parameters(report)}


def _told(parameters: dict[str, Any]) -> str:
    """Parameters of an attack or a defence, by name."""
    return ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in parameters.items())


def _attack_table(reports: Sequence[RobustnessReport], name: str) -> dict[str, Any]:
    """What the template says of one attack, by what name."""
    first = reports[0]
    rows = frame(reports)
    after = rows[rows["member"].notna()]
    left_out: dict[str, list[str]] = {}
    for report in reports:
        for member, reason in report.attack_parameters.get("left_out", {}).items():
            tasks = left_out.setdefault(f"{member} ({reason})", [])
            tasks += [] if report.task in tasks else [report.task]
    columns, figures = _figures(reports)
    return {
        "name": name,
        "target": first.view.name,
        "target_text": first.view.text,
        "parameters": _told(_parameters(first)),
        "left_out": [f"{what} on {', '.join(tasks)}" for what, tasks in left_out.items()],
        "columns": columns,
        "rows": [
            [cell(f"{titled(report)}, {report.task}"), str(report.num_images), str(report.num_classes), *own]
            for report, own in zip(reports, (own for who, own in figures if not who), strict=True)
        ],
        "members": [
            (
                cell(f"{reports[number].name}, {reports[number].task}"),
                str(first.threat(eps)),
                cell(", ".join(f"{own.member} {100 * own.value:.1f}" for own in left.itertuples())),
            )
            for (number, eps), left in after.groupby(["number", "eps"], sort=True)
            if len(left) > 1
        ],
        "zero_gradients": percent(max(report.zero_gradient_share for report in reports)),
        "blind": blind_warning(reports),
    }


def _figures(reports: Sequence[RobustnessReport]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads of the columns, and for each report and judge ("" is the model) its figures with their intervals."""
    rows = headlines(reports)
    found = by_column(rows, [_figure(*own) for own in zip(rows["value"], rows["low"], rows["high"], strict=True)])
    heads = [str(reports[0].threat(eps)) if metric == ROBUST else head(metric, eps, reports[0].norm)
             for metric, eps in found]  # fmt: skip
    return heads, [(judge, own) for (_, judge), own in zip(found.index, found.to_numpy().tolist(), strict=True)]


def _figure(value: float, low: float, high: float) -> str:
    """A figure in percent with its interval, if it has one."""
    return f"{100 * value:.1f}" + (f" ({100 * low:.0f}-{100 * high:.0f})" if low == low else "")


def _by_defence(reports: Sequence[RobustnessReport]) -> list[list[RobustnessReport]]:
    """Reports of one defence of one model on the same images, weakest target first.

    Raises ValueError where it was attacked blindly and not through the defence.
    """
    groups: dict[tuple[str, ...], list[RobustnessReport]] = {}
    for report in reports:
        if report.defence is not None:
            settings = json.dumps(report.defence["parameters"], sort_keys=True)
            key = report.name, report.defence["name"], settings, report.dataset, report.task, report.norm
            groups.setdefault(key, []).append(report)
    order = list(KNOWN_VIEWS)
    through = [view.name for view in KNOWN_VIEWS.values() if view.goes_through]
    for own in groups.values():
        own.sort(key=lambda report: order.index(report.view.name) if report.view.name in order else len(order))
        blind = next((report for report in own if report.view.alone and report.view.of_defence), None)
        if blind is not None and not any(report.view.goes_through for report in own):
            raise ValueError(
                f"the defence {blind.defence['name']!r} of {blind.name}, {blind.task} ({blind.dataset}) has a "  # type: ignore[index]
                f"{blind.view.name} report and none of {', '.join(through)}: a figure against an attack that doesn't "
                "know the defence is not published alone. Evaluate it with 'adaptive_worst' too."
            )
    return list(groups.values())


def _defence_table(reports: Sequence[RobustnessReport]) -> dict[str, Any]:
    """What the template says of one defence: each attack on it, with the controls on the same images."""
    first: dict[str, Any] = reports[0].defence  # type: ignore[assignment]
    kind = [name for name in ("randomised", "optimising") if first["traits"][name]]
    columns, figures = _figures(reports)
    number, rows = -1, []
    for who, own in figures:
        number += not who
        what = reports[number].full_attack, f"control: {who}" if who else first["name"], reports[number].num_images
        rows.append([*map(cell, what), *own])
    return {
        "name": f"{first['name']} on {reports[0].name}, {reports[0].task}",
        "kind": " and ".join(kind) or "neither randomised nor optimising",
        "tuned": f"{first.get('tuned', 0):,}",
        "parameters": _told(first["parameters"]),
        "columns": columns,
        "rows": rows,
        "fallbacks": max(report.defence["fallbacks"] for report in reports),  # type: ignore[index]
        "remarks": "".join(f" {remark[:1].upper()}{remark[1:]}." for remark in first.get("remarks", ())),
        "ms": f"{first['ms_per_image']:.3g}",
        "hardware": reports[0].hardware,
    }


def _plain(value: Any) -> str:
    """A JSON value in running text: floats with 4 digits, lists and dicts without brackets."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return " / ".join(map(_plain, value))
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_plain(v)}" for name, v in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
