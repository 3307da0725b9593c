"""Figures in the Hub's own format beside `model-index`."""

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from reports import make_controls, make_defence, make_report

from hf_robust_clip.report.card import eval_results
from hf_robust_clip.report.eval_results import eval_result_entries, eval_results_file


def test_the_hubs_own_reader_gives_the_figures_of_the_model_index():
    reports = [make_report(), make_report(task="held-out classes", dataset_revision="0123456789" * 4)]
    read = parse_eval_result_entries(yaml.safe_load(eval_results_file(reports)))
    assert read == eval_result_entries(reports)
    assert [entry.value for entry in read] == [row.metric_value for row in eval_results(reports)]
    assert [entry.dataset_revision for entry in read] == [None] * 3 + ["0123456789" * 4] * 3
    assert {entry.dataset_id for entry in read} == {"user/pictures"}
    assert [entry.task_id for entry in read[:3]] == [
        "trained_classes_clean", "trained_classes_pgd_20_linf_1_255", "trained_classes_pgd_20_linf_4_255",
    ]  # fmt: skip
    assert read[1].notes == "zero-shot, PGD-20, L-inf eps=1/255, 40 images of split test"


def test_of_one_task_the_most_images_count_and_defences_and_attacks_stay_apart():
    defended = dict(attack_target="adaptive_worst", defence=make_defence(), controls=make_controls())
    reports = [make_report(num_images=20), make_report(), make_report(num_images=10), make_report(**defended)]
    read = eval_result_entries(reports)
    assert len({entry.task_id for entry in read}) == len(read) == 6
    assert sorted({entry.notes.split(", ")[-1] for entry in read}) == ["40 images of split test"]
    assert sum("tapt" in entry.task_id and "tapt" in entry.notes for entry in read) == 3


def test_figures_on_no_dataset_of_the_hub_are_refused():
    assert len(eval_result_entries([make_report(), make_report(dataset="digits", task="digits")])) == 3
    with pytest.raises(ValueError, match=r"eval_results=True.*digits"):
        eval_results_file([make_report(dataset="digits")])
