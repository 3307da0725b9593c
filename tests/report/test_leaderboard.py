"""A leaderboard ranks what was evaluated alike, and says what wasn't."""

import csv
from dataclasses import replace

from reports import auto_attack

from hf_robust_clip.report.leaderboard import LeaderboardRow, as_cells, make_leaderboard, write_leaderboard

TASKS = ("cats", "dogs")
FACTS = dict(method="FARE", trained="L-inf eps=4/255", trained_on="imagenet", reference="CLIP", licence="mit")


def report(task, clean, low, high, **changes):
    robust = {1 / 255: low, 4 / 255: high}
    each = {eps: {"apgd-ce": value} for eps, value in robust.items()}
    own = dict(task=task, clean_accuracy=clean, robust_accuracy=robust, after_each=each)
    return auto_attack(**{**own, **changes})


def row(title, *figures, reasons=(), is_reference=False, **changes):
    """A row with (clean, 1/255, 4/255) for each task."""
    reports = {task: report(task, *own) for task, own in zip(TASKS, figures, strict=False)}
    changes = {task: report(task, *figures[TASKS.index(task)], **own) for task, own in changes.items()}
    return LeaderboardRow(title, source=f"org/{title}", reports={**reports, **changes}, reasons=reasons,
                          is_reference=is_reference, **FACTS)  # fmt: skip


GOOD = row("good", (0.9, 0.8, 0.3), (0.7, 0.5, 0.2))
BETTER = row("better", (0.5, 0.4, 0.4), (0.5, 0.3, 0.3))
REFERENCE = row("CLIP", (1.0, 0.9, 0.9), (1.0, 0.9, 0.9), is_reference=True)
HALF = row("half", (1.0, 1.0, 1.0), reasons=("not run on dogs: no such file",))
NONE = row("none", reasons=("not run: no answer",))


def test_the_mean_over_all_tasks_at_the_radius_ranks():
    board = make_leaderboard([NONE, REFERENCE, GOOD, HALF, BETTER], TASKS, 4 / 255)
    assert [own.title for own in board.rows] == ["better", "good", "CLIP", "none", "half"]
    assert board.ranks() == ["1", "2", "-", "-", "-"]
    assert board.mean(board.rows[1]) == {0.0: 0.8, 1 / 255: 0.65, 4 / 255: 0.25}
    assert board.mean(HALF) is None
    other = make_leaderboard([GOOD, BETTER], TASKS, 1 / 255)
    assert [own.title for own in other.rows] == ["good", "better"]


def test_equal_models_share_a_rank():
    board = make_leaderboard([GOOD, replace(GOOD, title="same"), BETTER], TASKS, 4 / 255)
    assert board.ranks() == ["1", "2", "2"]


DIFFERENT = [
    ({"attack_resolution": 336}, "attack resolution 336, others 8"),
    ({"dataset_revision": "f00"}, "dataset revision f00, others main"),
    ({"num_images": 20}, "number of images 20, others 40"),
    ({"prompt_hash": "0" * 16}, "classes and prompts"),
    ({"attack": "PGD-20"}, "attack PGD-20, others AutoAttack"),
    ({"seed": 1}, "seed 1, others 0"),
    ({"robust_accuracy": {4 / 255: 1.0}, "after_each": {4 / 255: {"apgd-ce": 1.0}}}, "radii"),
]


def test_a_report_of_another_setting_is_not_ranked_and_says_what_differs():
    for changes, told in DIFFERENT:
        other = row("other", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), dogs=changes)
        board = make_leaderboard([other, GOOD, BETTER], TASKS, 4 / 255)
        assert [own.title for own in board.rows] == ["better", "good", "other"]
        last = board.rows[-1]
        assert list(last.reports) == ["cats"] and board.ranks()[-1] == "-"
        (reason,) = last.reasons
        assert reason.startswith("not ranked on dogs: ") and told in reason
        assert as_cells(board).rows[-1][4:6] == ("-", "-")


def test_page_csv_and_plot_hold_everything(tmp_path):
    board = make_leaderboard([GOOD, replace(NONE, licence="cc|by"), REFERENCE, BETTER], TASKS, 4 / 255)
    write_leaderboard(tmp_path, board, "Board", "About it.", ["Delta (org/delta): no CLIPModel"])
    text = (tmp_path / "leaderboard.md").read_text()
    assert "| better | 1 | FARE | L-inf eps=4/255 | 50.0 | 35.0 | 35.0 | CLIP | mit | org/better |" in text
    assert "| CLIP | - | undefended |" in text and "not run: no answer" in text and "cc\\|by" in text
    assert "90.0 / 80.0 / 30.0" in text and "Delta (org/delta): no CLIPModel" in text and "AutoAttack" in text
    with (tmp_path / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(own["model"], own["task"], own["eps"]): own for own in rows}
    assert len(found) == len(rows) == 3 * 3 * 3 + 1  # a clean one and two radii, of two tasks and their mean
    assert found["good", "mean", str(4 / 255)]["accuracy"] == "0.25"
    assert found["good", "dogs", "0.0"]["attack"] == "" and found["good", "dogs", str(1 / 255)]["accuracy"] == "0.5"
    assert found["none", "", ""]["reasons"] == "not run: no answer" and found["CLIP", "mean", "0.0"]["rank"] == ""
    assert (tmp_path / "leaderboard.png").stat().st_size > 1000


def test_nothing_evaluated_is_a_page_without_a_plot(tmp_path):
    write_leaderboard(tmp_path, make_leaderboard([NONE], TASKS, 4 / 255), "Board", "", [])
    assert "not run: no answer" in (tmp_path / "leaderboard.md").read_text()
    assert not (tmp_path / "leaderboard.png").exists()
