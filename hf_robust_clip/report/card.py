"""The model card: a pure function of reports and settings, which `report.json` keeps beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment

from ..digits_clip import EMBEDDED_MODEL
from ..names import is_repo_id
from ..paper import Paper
from ..secrets import refuse_tokens
from ..storage import write_text
from ..threat_model import ThreatModel
from .report import RobustnessReport, blind_warning, load_reports, percent, read_report_file, save_reports

LIBRARY = "hf_robust_clip"
NOTHING_MEASURED = "**Nothing was measured of this repository.**"
TRAINERS_DRAFT = "generated automatically according to the information the Trainer had access to"
GAP, MANY_GAPS = "[More Information Needed]", 20  # of PEFT's draft, which has more as long as nobody fills it in
CardState = Literal["none", "draft", "unmeasured", "measured", "theirs"]
Holds = Literal["model", "adapter", "defence"]  # of a repository: whole weights, PEFT's, or a defence alone
TARGETS = {
    "static": "white box on the plain classifier",
    "defence_blind": "made on the classifier without its defence, then shown to the defence",
    "adaptive": "white box through the whole defence",
    "bpda": "through the whole defence, what has no gradient replaced in the backward pass",
    "transfer_from_adapted": "made on the adapted classifier held fixed, then shown to the defence",
    "adaptive_worst": "each attack on the defence in turn, on the images that withstood the ones before",
}
THROUGH = ("adaptive", "adaptive_worst", "bpda")  # without one of these, a blind figure says nothing


@dataclass(frozen=True)
class CardInfo:
    """What a card says beyond its reports.

    Args:
        repo_id: Hub id, or the folder where there is none yet.
        base_model: Hub id of what the training started from; empty where others can't get it.
        training_data: one line: dataset, split, classes, number of images.
        paper: of the method.
        settings: `RobustClipTrainer.settings()`, or other plain values under the same keys.
        template: the prompt that was used.
        class_names: of the training data; the first three serve as an example.
        limits: what this very model can't do: a sentence or several; each line becomes a point.
        datasets: Hub ids of the training data, for the metadata.
        plot: file name of the plot beside the card, or None.
        license: SPDX id of the weights; None where it follows from the base model.
        ancestor: Hub id of what a start without a `base_model` was made from itself; None if nobody knows.

    Raises TypeError for settings that JSON can't hold, ValueError for an access token among them.
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

    def __post_init__(self) -> None:
        for name in ("class_names", "datasets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
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
        needed = known - {"ancestor"}
        if wrong := (needed - set(row)) | (set(row) - known):
            raise ValueError(f"the card entry of {path} lacks or adds: {', '.join(sorted(wrong))}.")
    if card["plot"] is not None and not re.fullmatch(r"[\w-]+\.png", str(card["plot"])):
        raise ValueError(f"plot={card['plot']!r} in the card entry of {path} must be the name of a png file.")
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
        raise ValueError(
            f"{path} holds an entry of another kind ({error}); make it again by an evaluation."
        ) from error


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
    data = _metadata(info, "adapter" if prompts else "model", "peft" if prompts else "transformers")
    data.eval_results, data.metrics = _eval_results(reports), ["accuracy"]
    defended = any(report.defence for report in reports)
    return _rendered(
        data,
        **_about(info, "adapter" if prompts else "model", loads_defence=bool(prompts) and defended),
        measured=list(
            dict.fromkeys(f"{r.precision} at {r.attack_resolution} px on {r.hardware}" for r in (*before, *reports))
        ),
        templates=[
            _code(text) for text in dict.fromkeys(text for r in (*before, *reports) for text in r.templates or ())
        ],
        attacks=[_attack_table(own) for own in _by_attack([*before, *reports])],
        defences=defences,
        defended=defended,
        flags=[
            (name.replace("_", " "), any(report.model_flags.get(name) for report in reports))
            for name in dict.fromkeys(name for report in reports for name in report.model_flags)
        ],
        auto_attack=any("autoattack" in report.attack.lower().replace("-", "") for report in reports),
        limits=[line.strip() for line in info.limits.splitlines() if line.strip()],
        plot=info.plot,
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
    data = _metadata(info, holds, library, *(["test-time-defence"] if defended else []))
    return _rendered(data, **_about(info, holds, defended), measured=[])


class _Written(str):
    """Text that is Markdown or code already, and goes into a card as it is."""


def _rendered(data: ModelCardData, **values: Any) -> ModelCard:
    """The template with its values, each of them one line of plain text to whoever reads the card, save what is
    `_Written`.
    """
    text = (files(__package__) / "templates" / "card.md.jinja").read_text(encoding="utf-8")
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


def _metadata(info: CardInfo, holds: Holds, library: str, *tags: str) -> ModelCardData:
    """The metadata of a card, without figures."""
    published = info.base_model if is_repo_id(info.base_model) else None
    of_adapter = {"base_model_relation": "adapter"} if holds == "adapter" and published else {}
    own = ["adapter"] if holds == "adapter" else []
    return ModelCardData(
        library_name=library,
        pipeline_tag="zero-shot-image-classification",
        license=info.license,
        base_model=published or (info.ancestor if holds == "model" else None),
        datasets=[name for name in info.datasets if is_repo_id(name)] or None,
        tags=[LIBRARY, "clip", "adversarial-robustness", info.paper.method.lower(), *own, *tags],
        model_name=_title(info.repo_id),
        eval_results=None,
        **of_adapter,
    )


def _title(repo_id: str) -> str:
    return repo_id.rstrip("/").split("/")[-1]


def _about(info: CardInfo, holds: Holds, loads_defence: bool) -> dict[str, Any]:
    """What the template says of a repository whether or not anything was measured."""
    prompts = info.settings.get("prompts")
    text_tokens = re.search(r"(\d+) text token", prompts or "")
    base = _span(info.base_model) if info.base_model else "a checkpoint that isn't published"
    start = f"a checkpoint made from {_span(info.ancestor)}" if info.ancestor and not info.base_model else base
    plain = "loads as a plain `CLIPModel`: weights, tokenizer and image processor are all here."
    return {
        "title": _title(info.repo_id),
        "repo_code": _code(info.repo_id),
        "holds": holds,
        "loads_defence": loads_defence,
        "base_text": base,
        "started": f"It started from {start} and {plain}" if info.base_model or info.ancestor else f"It {plain}",
        "base_code": _Written("hf_robust_clip.digits_clip_path()")
        if info.base_model == EMBEDDED_MODEL
        else _code(info.base_model or "path/to/the/base/model"),
        "method": info.paper.method,
        "paper_title": info.paper.title,
        "venue": info.paper.venue,
        "bibtex": _Written(info.paper.bibtex.replace("```", "'''")),
        "attacked": info.settings.get("attack") is not None,
        "attack": info.settings.get("attack"),
        "threat_model": info.settings.get("threat_model"),
        "training_data": _cell(info.training_data),
        "training": _rows(info.settings),
        "template": _code(info.template),
        "example_names": _code(list(info.class_names[:3])),
        "prompts": prompts,
        "parameters": f"{info.settings.get('trainable_parameters', 0):,}",
        "text_tokens": text_tokens and int(text_tokens[1]),
    }


def _rows(settings: dict[str, Any]) -> dict[str, str]:
    """What the table on the training says, row by row."""
    settings = json.loads(json.dumps(settings))
    settings |= {f"objective.{name}": value for name, value in (settings.pop("objective", None) or {}).items()}
    return {
        _cell(name.replace("_", " ")): "none" if value is None else _cell(value)
        for name, value in settings.items()
        if name not in ("attack", "threat_model")
    }


def _eval_results(reports: Sequence[RobustnessReport]) -> list[EvalResult]:
    """All `model-index` rows: what two attacks report alike (clean) once, what they name alike numbered."""
    rows: list[EvalResult] = []
    for row in (row for report in reports for row in report.to_eval_results()):
        config, number = row.dataset_config, 1
        while row not in rows and row.unique_identifier in {other.unique_identifier for other in rows}:
            number += 1
            row = replace(row, dataset_config=f"{config} ({number})")
        if row not in rows:
            rows.append(row)
    return rows


def _by_attack(reports: Sequence[RobustnessReport]) -> list[list[RobustnessReport]]:
    """Reports that can stand in one table: same attack, target, norm and parameters."""
    groups: dict[str, list[RobustnessReport]] = {}
    for report in reports:
        key = json.dumps([report.full_attack, report.norm, _parameters(report)], sort_keys=True)
        groups.setdefault(key, []).append(report)
    return list(groups.values())


def _parameters(report: RobustnessReport) -> dict[str, Any]:
    return {name: value for name, value in report.attack_parameters.items() if name != "left_out"}


def _attack_table(reports: Sequence[RobustnessReport]) -> dict[str, Any]:
    """What the template says of one attack."""
    radii = sorted({radius for report in reports for radius in report.robust_accuracy})
    threats = [ThreatModel(radius, reports[0].norm) for radius in radii]  # type: ignore[arg-type]
    left_out: dict[str, list[str]] = {}
    for report in reports:
        for member, reason in report.attack_parameters.get("left_out", {}).items():
            tasks = left_out.setdefault(f"{member} ({reason})", [])
            tasks += [] if report.task in tasks else [report.task]
    return {
        "name": reports[0].full_attack,
        "target": reports[0].attack_target,
        "target_text": TARGETS[reports[0].attack_target],
        "parameters": ", ".join(
            f"{name.replace('_', ' ')} {_plain(v)}" for name, v in _parameters(reports[0]).items()
        ),
        "left_out": [f"{what} on {', '.join(tasks)}" for what, tasks in left_out.items()],
        "radii": [str(threat) for threat in threats],
        "rows": [_row(report, radii) for report in reports],
        "members": [
            (
                _cell(f"{report.name}, {report.task}"),
                str(threat),
                _cell(", ".join(f"{member} {100 * value:.1f}" for member, value in left.items())),
            )
            for report in reports
            for threat, radius in zip(threats, radii, strict=True)
            if len(left := report.after_each.get(radius, {})) > 1
        ],
        "zero_gradients": percent(max(report.zero_gradient_share for report in reports)),
        "blind": blind_warning(reports),
    }


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
    order = list(TARGETS)
    for own in groups.values():
        own.sort(key=lambda report: order.index(report.attack_target))
        targets = {report.attack_target for report in own}
        if "defence_blind" in targets and not targets & set(THROUGH):
            blind = own[0]
            raise ValueError(
                f"the defence {blind.defence['name']!r} of {blind.name}, {blind.task} ({blind.dataset}) has a "  # type: ignore[index]
                f"defence_blind report and none of {', '.join(THROUGH)}: a figure against an attack that doesn't know "
                "the defence is not published alone. Evaluate it with target='adaptive_worst' too."
            )
    return list(groups.values())


def _defence_table(reports: Sequence[RobustnessReport]) -> dict[str, Any]:
    """What the template says of one defence: each attack on it, with the controls on the same images."""
    radii = sorted({radius for report in reports for radius in report.robust_accuracy})
    first: dict[str, Any] = reports[0].defence  # type: ignore[assignment]
    kind = [name for name in ("randomised", "optimising") if first["traits"][name]]
    rows = []
    for report in reports:
        assert report.defence is not None
        own = {"clean": report.clean_accuracy, "robust": report.robust_accuracy}
        for who, figures in {first["name"]: own, **report.defence["controls"]}.items():
            values = [figures["clean"], *(figures["robust"].get(radius) for radius in radii)]
            what = (report.full_attack, who if figures is own else f"control: {who}", str(report.num_images))
            rows.append([_cell(text) for text in what] + [_accuracy(report, value) for value in values])
    return {
        "name": f"{first['name']} on {reports[0].name}, {reports[0].task}",
        "kind": " and ".join(kind) or "neither randomised nor optimising",
        "tuned": f"{first.get('tuned', 0):,}",
        "parameters": ", ".join(f"{name.replace('_', ' ')} {_plain(v)}" for name, v in first["parameters"].items()),
        "radii": [str(ThreatModel(radius, reports[0].norm)) for radius in radii],  # type: ignore[arg-type]
        "rows": rows,
        "fallbacks": max(report.defence["fallbacks"] for report in reports),  # type: ignore[index]
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


def _row(report: RobustnessReport, radii: Sequence[float]) -> dict[str, Any]:
    values = [report.clean_accuracy, *(report.robust_accuracy.get(radius) for radius in radii)]
    by = "" if report.defence is None else f" with {report.defence['name']}"
    return {
        "name": _cell(f"{report.name}{by}, {report.task}"),
        "n": report.num_images,
        "classes": report.num_classes,
        "cells": [_accuracy(report, value) for value in values],
    }


def _accuracy(report: RobustnessReport, value: float | None) -> str:
    """An accuracy in percent with its interval; a dash for none."""
    if value is None:
        return "-"
    low, high = report.interval(value)
    return f"{100 * value:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def _cell(value: Any) -> str:
    """A value in one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
