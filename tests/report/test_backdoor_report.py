"""A report of a backdoor, which can't leave anything out, and what is made of it."""

import json
from dataclasses import replace

import pytest
from made_backdoor import backdoor_report
from reports import INFO

from hf_robust_clip.report import as_markdown
from hf_robust_clip.report.backdoor import (
    CLEAN_MODEL,
    POISONED_MODEL,
    WITHOUT_METHOD,
    BackdoorReport,
    figures,
    load_backdoor_reports,
    make_backdoor_card,
    plot_backdoor,
    save_backdoor_reports,
    success,
)


def test_a_table_has_the_controls_first_and_intervals():
    text = as_markdown(figures([backdoor_report()]))
    lines = text.splitlines()
    assert [next(n for n in (CLEAN_MODEL, POISONED_MODEL, WITHOUT_METHOD, "CleanCLIP") if n in line)
            for line in lines[2:]] == [CLEAN_MODEL, POISONED_MODEL, WITHOUT_METHOD, "CleanCLIP"]  # fmt: skip
    assert "| 92.0 (85-96) | 5.0 (2-12) |" in lines[-1]
    assert "accuracy on 100 images, ASR on 80" in lines[-1]
    assert "ASR top-1" in lines[0] and "ASR top-5" in lines[0]


@pytest.mark.parametrize("judge", [CLEAN_MODEL, POISONED_MODEL, WITHOUT_METHOD, None])
@pytest.mark.parametrize("metric", ["accuracy", success(3), None])
def test_a_control_or_a_figure_that_is_missing_is_refused(judge, metric):
    rows = backdoor_report().measurements
    kept = [row for row in rows if row.judge != judge or (metric is not None and row.metric != metric)]
    with pytest.raises(ValueError, match="measurements lack"):
        backdoor_report(measurements=tuple(kept))


def test_a_poisoned_model_stands_beside_the_clean_one_alone():
    rows = [row for row in backdoor_report().measurements if row.judge in (CLEAN_MODEL, None)]
    assert backdoor_report(stage="poisoned", measurements=tuple(rows)).judges == [CLEAN_MODEL, "CleanCLIP"]


@pytest.mark.parametrize(
    "changes",
    [
        {"hardware": ""}, {"target": "banana"}, {"num_others": 0}, {"num_others": 101}, {"stage": "washed"},
        {"templates": ("one {}",)}, {"trigger_parameters": {}}, {"num_images": 99}, {"num_others": 79},
    ],
)  # fmt: skip
def test_fields_that_are_empty_or_at_odds_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes)) if "num" not in next(iter(changes)) else "n=|num_"):
        backdoor_report(**changes)


def test_a_figure_that_is_there_twice_is_refused():
    rows = backdoor_report().measurements
    with pytest.raises(ValueError, match="twice"):
        backdoor_report(measurements=(*rows, rows[0]))
    with pytest.raises(ValueError, match="expected"):
        backdoor_report(measurements=(*rows[:-1], replace(rows[-1], n=81)))


def test_a_file_gives_back_what_was_saved(tmp_path):
    path, report = tmp_path / "backdoor.json", backdoor_report()
    save_backdoor_reports(path, [report], INFO)
    assert load_backdoor_reports(path) == [report]
    content = json.loads(path.read_text())
    del content["reports"][0]["measurements"][0]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="measurements lack"):
        load_backdoor_reports(path)
    path.write_text(json.dumps({"format": 3, "reports": []}))
    with pytest.raises(ValueError, match="format"):
        load_backdoor_reports(path)
    with pytest.raises(ValueError, match="reports"):
        save_backdoor_reports(path, [])


def test_a_card_says_what_it_is_and_shows_every_control():
    report, info = backdoor_report(), replace(INFO, plot="backdoor.png")
    card = make_backdoor_card([report], info, "triggered.png")
    for text in (CLEAN_MODEL, POISONED_MODEL, WITHOUT_METHOD, "BadNet(size=2)", "(backdoor.png)", "(triggered.png)"):
        assert text in card.text
    found = {row.metric_type: row.metric_value for row in card.data.eval_results}
    assert found["accuracy"] == 0.92 and found[success(1)] == 0.05
    rows = [row for row in report.measurements if row.judge in (CLEAN_MODEL, None)]
    poisoned: BackdoorReport = backdoor_report(stage="poisoned", measurements=tuple(rows))
    assert "poisoned, on purpose" in make_backdoor_card([poisoned], info).text
    with pytest.raises(ValueError, match="reports"):
        make_backdoor_card([], info)


def test_a_plot_is_drawn(tmp_path):
    plot_backdoor(tmp_path / "a.png", [backdoor_report(), backdoor_report(trigger="Stripes(width=2)")])
    assert (tmp_path / "a.png").stat().st_size > 5000
