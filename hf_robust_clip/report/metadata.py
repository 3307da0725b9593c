"""What a card says to programs: the metadata at its head, and the rows of its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from ..names import is_repo_id
from .report import CLEAN, ROBUST, RobustnessReport
from .tables import headlines

if TYPE_CHECKING:
    from .card import CardInfo

LIBRARY = "hf_robust_clip"
Holds = Literal["model", "adapter", "defence"]  # of a repository: whole weights, PEFT's, or a defence alone
WIDGET_LABELS = 5


def metadata(info: CardInfo, holds: Holds, library: str, *tags: str) -> ModelCardData:
    """The metadata of a card, without figures.

    A defence stands on a model that it leaves as it is, as an adapter does: the Hub would take it for a fine-tuned
    model otherwise. The widget begins with `info.sample`; it compares classes whose names have no comma, which divides
    them there.
    """
    published = info.base_model if is_repo_id(info.base_model) else None
    base = published or (info.ancestor if holds == "model" else None)
    related = {"base_model_relation": "finetune" if holds == "model" else "adapter"} if base else {}
    own = ["adapter"] if holds == "adapter" else []
    labels = [name for name in info.class_names if "," not in name][:WIDGET_LABELS]
    shown = info.sample is not None and library == "transformers" and not info.described and len(labels) > 1
    widget = [{"src": info.sample, "candidate_labels": ", ".join(labels), "example_title": "A test picture"}]
    return ModelCardData(
        library_name=library,
        pipeline_tag="zero-shot-image-classification",
        license=info.license,
        base_model=base,
        datasets=[name for name in info.datasets if is_repo_id(name)] or None,
        tags=[LIBRARY, info.family, "adversarial-robustness", info.paper.method.lower(), *own, *tags],
        model_name=title_of(info.repo_id),
        eval_results=None,
        **related,
        **({"widget": widget} if shown else {}),
    )


def title_of(repo_id: str) -> str:
    """What a card is headed by: the last part of its repository's id."""
    return repo_id.rstrip("/").split("/")[-1]


def eval_results(reports: Sequence[RobustnessReport]) -> list[EvalResult]:
    """`model-index` rows: what two attacks report alike (clean) once, what they name alike numbered.

    `dataset_config` tells them apart: it holds task, defence, attack, radius and number of images, the last because a
    dear attack often sees fewer of them.
    """
    rows: list[EvalResult] = []
    for row in (row for report in reports for row in _own_results(report)):
        config, number = row.dataset_config, 1
        while row not in rows and row.unique_identifier in {other.unique_identifier for other in rows}:
            number += 1
            row = replace(row, dataset_config=f"{config} ({number})")
        if row not in rows:
            rows.append(row)
    return rows


def _own_results(report: RobustnessReport) -> list[EvalResult]:
    """A row for each figure of the model on all images."""
    found = headlines([report])
    by = f"{report.defence['name']}, " if report.defence else ""
    rows = []
    for own in found[found["judge"] == ""].itertuples():
        what = "clean" if own.metric == CLEAN else f"{report.full_attack} {report.threat(own.eps)}"
        rows.append(
            EvalResult(
                task_type="zero-shot-image-classification",
                dataset_type=report.dataset,
                dataset_name=f"{report.dataset}, {report.task}",
                dataset_config=f"{report.task}, {by}{what}, n={own.n}",
                dataset_split=report.split,
                metric_type=own.metric,
                metric_name=f"{'accuracy' if own.metric in (CLEAN, ROBUST) else own.metric}, {by}{what}",
                metric_value=round(own.value, 4),
                metric_args=_arguments(report, own.eps) if own.eps else None,
            )
        )
    return rows


def _arguments(report: RobustnessReport, eps: float) -> dict[str, Any]:
    """What the attack at a radius was called with."""
    arguments = {**report.attack_parameters, "eps": eps, "attack_target": report.view.name}
    arguments |= {"defence": report.defence["name"]} if report.defence else {}
    if isinstance(arguments.get("step_size"), list):  # one for each radius
        arguments["step_size"] = arguments["step_size"][list(report.robust_accuracy).index(eps)]
    return arguments
