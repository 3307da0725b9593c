"""Trials of a search as table, CSV and plot."""

import csv

import pytest
from PIL import Image

from hf_robust_clip.report import print_table
from hf_robust_clip.report.trials import Trial, best_of, plot_trials, save_trials, trials_table

TRIALS = [
    Trial(1, {"learning_rate": 1e-3, "size": "12/255", "kind": "a"}, {"clean": 0.9, "robust": 0.5}, 0.7),
    Trial(2, {"learning_rate": 1.0, "size": "20/255", "kind": "a"}, {}, None),
    Trial(3, {"learning_rate": 1e-4, "size": "4/255", "kind": "b"}, {"clean": 1.0, "robust": 0.6}, 0.8),
    Trial(4, {"learning_rate": 1e-5, "size": "8/255", "kind": "b"}, {"clean": 0.8, "robust": 0.8}, 0.8),
]


def test_the_best_is_the_first_with_the_highest_score():
    assert best_of(TRIALS).number == 3
    with pytest.raises(ValueError, match=r"tune\.space: all 1 trials diverged"):
        best_of(TRIALS[1:2])


def test_table_marks_the_best_and_tells_what_diverged(capsys):
    print_table(trials_table(TRIALS, "four trials", "percent"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["3", "best", "0.0001", "4/255", "b", "100.0", "60.0", "80.0"] in lines
    assert ["2", "1", "20/255", "a", "-", "-", "diverged"] in lines
    assert ["4", "1e-05", "8/255", "b", "80.0", "80.0", "80.0"] in lines


def test_csv_has_every_figure_as_it_is(tmp_path):
    save_trials(tmp_path / "tuning.csv", TRIALS)
    with (tmp_path / "tuning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["best"] for row in rows] == ["False", "False", "True", "False"]
    assert [row["score"] for row in rows] == ["0.7", "", "0.8", "0.8"]
    assert [float(row["learning_rate"]) for row in rows] == [1e-3, 1.0, 1e-4, 1e-5]


def test_plot_has_a_panel_for_each_setting_with_readable_ticks(tmp_path, monkeypatch):
    import hf_robust_clip.report.trials as module

    kept, save = [], module.save_figure

    def keep(figure, axes, path):
        save(figure, axes, path)
        kept.append([(axis.get_title(), [tick.get_text() for tick in axis.get_xticklabels()]) for axis in axes])

    monkeypatch.setattr(module, "save_figure", keep)
    plot_trials(tmp_path / "tuning.png", TRIALS, ["learning_rate"])
    assert Image.open(tmp_path / "tuning.png").width > 800
    titles, ticks = zip(*kept[0], strict=True)
    assert titles == ("trials in their order", "learning_rate", "size", "kind")
    assert "1e-05" in ticks[1] and not any("$" in text for texts in ticks for text in texts)
    assert ticks[3] == ["a", "b"]
