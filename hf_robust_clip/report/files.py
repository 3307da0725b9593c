"""Reports as files: JSON with everything, whole or not at all; CSV of the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attacks.views import View
from ..digests import digests
from ..storage import read_json, whole_file, write_text
from .outcomes import Outcomes
from .report import Measurement, RobustnessReport, frame

if TYPE_CHECKING:
    from .card import CardInfo

REPORT_FORMAT = 3


def save_reports(
    path: str | Path,
    reports: Sequence[RobustnessReport],
    compared: Sequence[RobustnessReport] = (),
    card: CardInfo | None = None,
) -> None:
    """Write reports of a model, and of those it was compared with, as JSON, whole or not at all.

    `card` goes with them, so that `card.regenerate_card` can make the card again from the file alone. Where weights
    lie beside it, the file says which: it is not read beside others.

    Raises ValueError if there are no reports.
    """
    if not reports:
        raise ValueError("reports is empty; evaluate before saving.")
    weights = _weights_beside(path)
    content = {
        "format": REPORT_FORMAT,
        **({"weights": weights} if weights else {}),
        "reports": [_row(report) for report in reports],
        "compared": [_row(report) for report in compared],
        **({} if card is None else {"card": asdict(card)}),
    }
    write_text(path, _laid_out(content) + "\n")


def _row(report: RobustnessReport) -> dict[str, Any]:
    """All fields, those of measurements without what they leave open."""
    row = {name: value for name, value in asdict(report).items() if value is not None}
    usual = {field.name: field.default for field in fields(Measurement)}
    row["measurements"] = [
        {name: value for name, value in own.items() if value != usual[name]} for own in row["measurements"]
    ]
    return row


def _laid_out(value: Any, indent: str = "") -> str:
    """JSON in which a list or dict that holds no other is one line."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(inner, list | tuple) or not any(isinstance(part, dict | list | tuple) for part in inner):
        return json.dumps(value)
    deeper = indent + " "
    texts = [_laid_out(part, deeper) for part in inner]
    if isinstance(value, dict):
        texts = [f"{json.dumps(str(name))}: {text}" for name, text in zip(value, texts, strict=True)]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return f"{left}\n{deeper}" + f",\n{deeper}".join(texts) + f"\n{indent}{right}"


def read_report_file(path: str | Path) -> dict[str, Any]:
    """What `save_reports` wrote, as plain values. Raises ValueError for anything else, and where the weights beside it
    are not those of the figures.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != REPORT_FORMAT:
        told = f"format {content['format']!r}" if isinstance(content, dict) and "format" in content else "no format"
        raise ValueError(f"{path} is of {told}, this version reads {REPORT_FORMAT}; evaluate the model again.")
    if not {"reports", "compared"} <= set(content):
        raise ValueError(f"{path} lacks 'reports' or 'compared'; evaluate the model again.")
    if known := content.get("weights"):
        for name, own in _weights_beside(path).items():
            if known.get(name) != own:
                raise ValueError(f"{path} tells the figures of other weights than {name} beside it; evaluate these.")
    return content


def _weights_beside(path: str | Path) -> dict[str, str]:
    """The digests of all weights in the folder of a report."""
    return digests(Path(path).parent, Path(path).parent.glob("*.safetensors"))


def load_reports(path: str | Path) -> tuple[list[RobustnessReport], list[RobustnessReport]]:
    """(reports, compared) as `save_reports` wrote them.

    Raises ValueError for another format or a missing or unknown field.
    """
    content = read_report_file(path)
    own, compared = ([_report(row, path) for row in content[key]] for key in ("reports", "compared"))
    return own, compared


def _report(row: Any, path: str | Path) -> RobustnessReport:
    values = _checked(RobustnessReport, row, path)
    try:
        values["view"] = View(**_checked(View, row["view"], path))
        values["measurements"] = [Measurement(**_checked(Measurement, own, path)) for own in row["measurements"]]
        if values.get("outcomes") is not None:
            values["outcomes"] = Outcomes(**_checked(Outcomes, row["outcomes"], path))
        return RobustnessReport(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a value of another kind ({error}); evaluate the model again.") from error


def _checked(cls: type[Any], row: Any, path: str | Path) -> dict[str, Any]:
    """Values of a dataclass, if a row has all that are needed and no others."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{path} holds {row!r} where the fields of a {cls.__name__} should be.")
    known = {field.name for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is MISSING}
    if wrong := (needed - set(row)) | (set(row) - known):
        raise ValueError(f"{path} lacks or adds report fields: {', '.join(sorted(wrong))}.")
    return dict(row)


def save_csv(path: str | Path, reports: Sequence[RobustnessReport]) -> None:
    """Write `frame` without the figures of single classes: a line for each figure of each report, with its 95 %
    interval, and all of the report that is one number or text.

    Raises ValueError if there are no reports.
    """
    if not reports:
        raise ValueError("reports is empty; there is nothing to write.")
    rows = frame(reports)
    rows = rows[rows["class_name"].isna()].drop(columns=["number", "class_name"])
    with whole_file(path) as draft:
        rows.to_csv(draft, index=False)
