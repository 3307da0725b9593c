"""Differences of two models on the same images: the formula, its interval, and what makes no pairs."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from reports import make_report
from scipy.stats import bootstrap

from hf_robust_clip import paired_difference
from hf_robust_clip.report import Difference, as_markdown, differences_told, figures_by_task, figures_of_differences
from hf_robust_clip.report.outcomes import make_outcomes

EPS = 1 / 255


def report(right, name="TeCoA", task="digits", clean=None, **changes):
    """One whose outcomes under attack are given; clean, all are right by default."""
    right_N = np.array(right, dtype=bool)
    clean_N = np.ones_like(right_N) if clean is None else np.array(clean, dtype=bool)
    outcomes = make_outcomes(f"images of {task}", {0.0: clean_N, EPS: right_N})
    values = dict(num_images=len(right_N), clean_accuracy=clean_N.mean(), robust_accuracy={EPS: right_N.mean()})
    return make_report(name=name, task=task, outcomes=outcomes, **{**values, **changes})


def runs(*outcomes, **changes):
    return [[report(right, **changes)] for right in outcomes]


def every_draw(count):
    """All draws of `count` with replacement, as how often each is drawn."""
    return [np.bincount(draw, minlength=count) / count for draw in product(range(count), repeat=count)]


def test_the_interval_is_that_of_all_draws_written_out():
    """Two runs of ours, one of theirs, four images: images are drawn for all of them at once, runs for each model."""
    ours, theirs = np.array([[1, 1, 0, 1], [1, 0, 0, 1]]), np.array([[0, 1, 0, 0]])
    written = [
        sum(r * (w @ own) for r, own in zip(drawn, ours, strict=True)) - w @ theirs[0]
        for w in every_draw(4)
        for drawn in every_draw(2)
    ]
    found = paired_difference(runs(*ours), runs(*theirs), EPS)
    assert found.value == pytest.approx((3 / 4 + 2 / 4) / 2 - 1 / 4, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(np.percentile(written, [2.5, 97.5]), abs=1e-12)
    assert found == paired_difference(runs(*ours), runs(*theirs), EPS)
    assert found != paired_difference(runs(*ours), runs(*theirs), EPS, resamples=7)
    assert paired_difference(runs(*ours), runs(*theirs)) == Difference(0.0, 0.0, 0.0)


def test_the_interval_of_one_run_is_the_normal_one_and_that_of_scipy():
    draws = np.random.default_rng(0)
    base = draws.random(900)
    ours, theirs = (base + 0.3 * draws.random(900) < share for share in (0.75, 0.7))
    found = paired_difference(runs(ours), runs(theirs), EPS)
    each = ours.astype(float) - theirs
    half = 1.959964 * each.std() / np.sqrt(len(each))
    assert found.value == pytest.approx(each.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((each.mean() - half, each.mean() + half), abs=0.0015)
    other = bootstrap((each,), np.mean, n_resamples=4000, method="percentile", batch=500, rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(other), abs=0.0025)
    unpaired = np.sqrt(2 * 0.25 / 900) * 1.96
    assert found.high - found.low < 1.5 * unpaired, "images are the same for both"


@pytest.mark.parametrize(("seeds", "least", "most"), [(1, 0.92, 0.98), (8, 0.91, 1.0)])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, least, most):
    """Images of varying difficulty; several runs differ in level, too, and theirs is wider than it had to be."""
    draws, held, truth = np.random.default_rng(3), 0, 0.1
    for _ in range(150):
        ease = 0.2 * draws.random(150)
        made = []
        for share in (0.6, 0.5):
            levels = share - 0.1 + (0.05 * draws.standard_normal(seeds) if seeds > 1 else np.zeros(1))
            made.append([draws.random(150) < level + ease for level in levels])
        found = paired_difference(*(runs(*own) for own in made), EPS, resamples=200)
        held += found.low <= truth <= found.high
    assert least <= held / 150 <= most


def test_identical_models_have_no_interval_and_seeds_are_drawn():
    one, other = [1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 1]
    assert paired_difference(runs(one), runs(one), EPS) == Difference(0.0, 0.0, 0.0)
    assert paired_difference(runs(one, one), runs(one, one, one), EPS) == Difference(0.0, 0.0, 0.0)
    assert not Difference(0.0, 0.0, 0.0).excludes_zero
    found = paired_difference(runs(one, other), runs(one, other), EPS)
    assert (found.value, found.low < 0 < found.high) == (0.0, True)


def test_tasks_count_alike_and_a_run_is_one_model_on_all_of_them():
    few, many = [1, 0], [1, 1, 1, 0, 0, 0, 0, 0]
    ours = [[report([1, 1], task="a"), report(many, task="b")]]
    theirs = [[report([0] * 8, task="b"), report(few, task="a")]]
    found = paired_difference(ours, theirs, EPS)
    assert found.value == pytest.approx((1 / 2 + 3 / 8) / 2, abs=1e-12)
    good, bad = ([report([right] * 4, task=task) for task in "ab"] for right in (1, 0))
    none = [report([0] * 4, task=task) for task in "ab"]
    both = paired_difference([good, bad], [none], EPS)
    assert (both.low, both.value, both.high) == (0.0, 0.5, 1.0), "the bad run is bad on both, however often drawn"
    counts = {paired_difference([good, bad], [none], EPS, resamples=1, seed=seed).value for seed in range(3)}
    lows = {paired_difference([good, bad], [none], EPS, resamples=1, seed=seed).low for seed in range(30)}
    assert counts == {0.5} and lows == {0.0, 0.5, 1.0}, "never a quarter, as if each task had a run of its own"


OTHERS = {
    "images": lambda own: replace(own, outcomes=replace(own.outcomes, images="others")),
    "num_images": lambda own: report([1, 0, 1]),
    "class_names": lambda own: replace(own, class_names=("dog", "cat"), prompt_hash="0" * 16),
    "attack": lambda own: replace(own, attack="APGD"),
    "attack_parameters": lambda own: replace(own, attack_parameters={"num_steps": 7}),
    "attack_resolution": lambda own: replace(own, attack_resolution=16),
    "outcomes": lambda own: replace(own, outcomes=None),
    "tasks": lambda own: replace(own, task="letters"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_makes_no_pairs_is_refused(what):
    own = report([1, 0, 1, 0])
    with pytest.raises(ValueError, match=what):
        paired_difference([[own]], [[OTHERS[what](own)]], EPS)


def test_wrong_runs_are_refused():
    own = report([1, 0, 1, 0])
    for ours, theirs, said in (([], [[own]], "ours"), ([[own]], [], "theirs"), ([[]], [[]], "tasks"),
                               ([[own, own]], [[own]], "tasks")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            paired_difference(ours, theirs)
    with pytest.raises(ValueError, match="eps="):
        paired_difference([[own]], [[own]], 2 / 255)
    for wrong in ("report.json", [make_report()], [None]):
        with pytest.raises(TypeError, match="ours must be a list of runs"):
            paired_difference(wrong, [[make_report()]])
    with pytest.raises(ValueError, match="resamples="):
        paired_difference([[own]], [[own]], resamples=0)


def test_a_table_of_differences_is_bold_where_they_exclude_zero():
    base = [1] * 4 + [0] * 36
    better = [1] * 30 + [0] * 10
    start = [report(base, name="base"), report(base, name="base", task="letters")]
    own = [report(better, name="own"), report([0, *base[1:]], name="own", task="letters")]
    alone = [report(base, name="third")]
    found = figures_of_differences([*start, *own, *alone], baseline="base")
    assert found.heads == ("", "digits (n=40): clean / 1/255", "letters (n=40): clean / 1/255")
    difference = paired_difference([[own[0]]], [[start[0]]], EPS)
    nothing, less = "+0.0 [0.0, 0.0]", "-2.5 [-7.5, 0.0]"
    assert found.rows == (
        ("own", f"{nothing} / **{difference}**", f"{nothing} / {less}"),
        ("third", f"{nothing} / {nothing}", "-"),
    )
    assert str(difference).startswith("+65.0 [")
    grouped = figures_of_differences(
        [*start, *own, *alone], [], baseline="base", groups={"all": ["digits", "letters"]}
    )
    assert grouped.heads == ("", "all: digits, letters (n=80): clean / 1/255")
    both = paired_difference([own], [start], EPS)
    assert grouped.rows == (("own", f"{nothing} / **{both}**"), ("third", "-"))
    assert "| own | +0.0 [0.0, 0.0] / **+" in as_markdown(grouped)
    with pytest.raises(ValueError, match="baseline='none'"):
        figures_of_differences([*start, *own], baseline="none")


def test_means_over_groups_of_tasks_are_unweighted_and_over_runs():
    first = [report([1, 1, 0, 0]), report([1] * 8, task="letters"), report([1, 0], task="signs")]
    second = [report([1, 0, 0, 0]), report([0] * 8, task="letters"), report([1, 0], task="signs")]
    start = [report([1, 1], name="before", task="signs"), report([1] * 4, name="before")]
    groups = {"trained on": ["signs"], "others": ["digits", "letters"], "never": ["cats"]}
    found = figures_by_task([*start, *first], [second], groups)
    assert found.heads[1:] == (
        "trained on: signs (n=2): clean / 1/255", "others: digits, letters (n=12): clean / 1/255",
    )  # fmt: skip
    mean, std = np.mean([0.75, 0.125]), np.std([0.75, 0.125], ddof=1)
    assert found.rows == (
        ("before", "100.0 / 100.0", "-"),
        ("TeCoA", "100.0 ± 0.0 / 50.0 ± 0.0", f"100.0 ± 0.0 / {100 * mean:.1f} ± {100 * std:.1f}"),
    )
    with pytest.raises(ValueError, match="twice"):
        figures_by_task(first, [], {"others": ["digits", "digits"]})


def test_differences_that_cannot_be_told_are_left_out_with_the_reason():
    start, own = report([1, 0, 1, 0], name="before"), report([1, 1, 1, 0])
    told = differences_told([start, own], baseline="before", groups={"all": ["digits"]})
    assert told.count("| TeCoA | ") == 2 and "over images:" in told
    assert "seeds" in differences_told([start, own], [[own]], baseline="before")
    for reports, said in (([start, replace(own, outcomes=None)], "reports of TeCoA"), ([own], "'before'"),
                          ([start, replace(own, attack_resolution=4)], "attack_resolution")):  # fmt: skip
        assert differences_told(reports, baseline="before").startswith("Left out: ")
        assert said in differences_told(reports, baseline="before")
