"""Figures as the Hub's `.eval_results/*.yaml`, which stand on the pages of a model and of benchmark datasets."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from ..names import is_repo_id
from .report import CLEAN, ROBUST, RobustnessReport
from .tables import headlines

EVAL_RESULTS = ".eval_results/hf_robust_clip.yaml"  # others may lay files of their own beside it
COMMIT = re.compile(r"[0-9a-f]{40}")


def eval_result_entries(reports: Sequence[RobustnessReport]) -> list[EvalResultEntry]:
    """An entry for the clean accuracy, and one for each robust accuracy, on each dataset of the Hub; values in [0, 1].

    `task_id` tells task, defence, attack and radius apart (`cifar_10_pgd_20_linf_1_255`), so that no leaderboard ranks
    a robust accuracy beside a clean one; where a dataset's `eval.yaml` has other ids, change them. Of figures that
    differ in the number of images alone, that of the most is kept; `notes` say how many they are, and of which split.

    Raises ValueError where no dataset is on the Hub.
    """
    found: dict[tuple[str, str], tuple[int, EvalResultEntry]] = {}
    for report in reports:
        if not is_repo_id(report.dataset):
            continue
        rows = headlines([report])
        for own in rows[(rows["judge"] == "") & rows["metric"].isin([CLEAN, ROBUST])].itertuples():
            attack = "clean" if own.metric == CLEAN else f"{report.full_attack}, {report.threat(own.eps)}"
            of = [report.defence["name"]] if report.defence else []
            radius = [] if own.metric == CLEAN else [report.full_attack, report.norm, report.threat(own.eps).radius]
            task_id = slug(" ".join([report.task, *of, *(radius or ["clean"])]))
            entry = EvalResultEntry(
                dataset_id=report.dataset,
                task_id=task_id,
                value=round(own.value, 4),
                dataset_revision=report.dataset_revision if COMMIT.fullmatch(report.dataset_revision) else None,
                notes=", ".join(["zero-shot", *of, attack, f"{own.n} images of split {report.split}"]),
            )
            key = report.dataset, task_id
            if key not in found or found[key][0] < own.n:
                found[key] = own.n, entry
    if not found:
        names = ", ".join(sorted({report.dataset for report in reports}))
        raise ValueError(f"eval_results=True: the figures are on no dataset of the Hub, but on {names or 'none'}.")
    return [entry for _, entry in found.values()]


def eval_results_file(reports: Sequence[RobustnessReport]) -> str:
    """The text of `EVAL_RESULTS`. Raises ValueError as `eval_result_entries` does."""
    entries = eval_result_entries_to_yaml(eval_result_entries(reports))
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)


def slug(text: str) -> str:
    """Lower-case letters and digits of a text, all else an underscore."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
