"""The model card: a pure function of reports and settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .objectives.base import Paper
from .report import RobustnessReport, percent
from .threat_model import ThreatModel

LIBRARY = "hf_robust_clip"


@dataclass(frozen=True)
class CardInfo:
    """What a card says beyond its reports.

    Args:
        repo_id: Hub id, or the folder where there is none yet.
        base_model: what the training started from.
        training_data: one line: dataset, split, classes, number of images.
        paper: of the method.
        settings: `RobustClipTrainer.settings()`.
        template: the prompt that was used.
        class_names: of the training data; the first three serve as an example.
        limits: one sentence on what this very model can't do.
        datasets: Hub ids of the training data, for the metadata.
        plot: file name of the plot beside the card, or None.
        license: SPDX id of the weights; None where it follows from the base model.
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


def make_card(reports: Sequence[RobustnessReport], before: Sequence[RobustnessReport], info: CardInfo) -> ModelCard:
    """The card of a fine-tuned model.

    Args:
        reports: of this model; they become `model-index` rows.
        before: of the model it started from and of others it is compared with, for the table alone.
        info: everything else.

    Raises ValueError if there is no report of this model: a card without figures is not made.
    """
    if not reports:
        raise ValueError("reports is empty; a card needs at least one evaluation of its model.")
    model_name = info.repo_id.rstrip("/").split("/")[-1]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        license=info.license,
        base_model=info.base_model if _is_repo_id(info.base_model) else None,
        datasets=[name for name in info.datasets if _is_repo_id(name)] or None,
        tags=[LIBRARY, "clip", "adversarial-robustness", info.paper.method.lower()],
        model_name=model_name,
        eval_results=[row for report in reports for row in report.to_eval_results()],
        metrics=["accuracy"],
    )
    radii = sorted({radius for report in (*reports, *before) for radius in report.robust_accuracy})
    settings = {**info.settings, **{f"objective.{k}": v for k, v in info.settings["objective"].items()}}
    training = {
        key.replace("_", " "): "none" if value is None else _cell(value)
        for key, value in settings.items()
        if key not in ("objective", "attack", "threat_model")
    }
    return ModelCard.from_template(
        data,
        template_str=(files(__package__) / "templates" / "card.md.jinja").read_text(encoding="utf-8"),
        title=model_name,
        repo_id=info.repo_id,
        base_model=info.base_model,
        method=info.paper.method,
        venue=info.paper.venue,
        attacked=info.settings["attack"] is not None,
        attack=info.settings["attack"],
        threat_model=info.settings["threat_model"],
        training_data=_cell(info.training_data),
        training=training,
        template=json.dumps(info.template, ensure_ascii=False),  # JSON text is Python text too
        example_names=json.dumps(list(info.class_names[:3]), ensure_ascii=False),
        radii=[str(ThreatModel(radius, reports[0].norm)) for radius in radii],  # type: ignore[arg-type]
        rows=[_row(report, radii) for report in (*before, *reports)],
        first=reports[0],
        zero_gradients=percent(max(report.zero_gradient_share for report in reports)),
        limits=info.limits,
        bibtex=info.paper.bibtex,
        plot=info.plot,
    )


def _row(report: RobustnessReport, radii: Sequence[float]) -> dict[str, Any]:
    values = [report.clean_accuracy, *(report.robust_accuracy.get(radius) for radius in radii)]
    cells = []
    for value in values:
        low, high = report.interval(value) if value is not None else (0, 0)
        cells.append("-" if value is None else f"{100 * value:.1f} ({100 * low:.0f}-{100 * high:.0f})")
    return {
        "name": _cell(f"{report.name}, {report.task}"),
        "n": report.num_images,
        "classes": report.num_classes,
        "cells": cells,
    }


def _cell(value: Any) -> str:
    """A value in one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _is_repo_id(name: str) -> bool:
    """Whether a name could be a repository of the Hub (`owner/name`) and not a path."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))
