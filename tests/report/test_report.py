from dataclasses import MISSING, fields, replace

import pytest
from reports import PER_CLASS, make_controls, make_defence, make_report

from hf_robust_clip.attacks.views import KNOWN_VIEWS, View
from hf_robust_clip.metrics import wilson_interval
from hf_robust_clip.report import (
    Measurement,
    RobustnessReport,
    accuracies,
    blind_warning,
    frame,
    prompt_hash,
    templates_told,
)

FIELDS = [field.name for field in fields(RobustnessReport) if field.default is MISSING]
REPORT = make_report()
DEFENDED = make_report(attack_target="adaptive", defence=make_defence())


def without(report: RobustnessReport, **known) -> list[Measurement]:
    """The measurements of a report, save those with these values."""
    return [row for row in report.measurements if any(getattr(row, name) != value for name, value in known.items())]


def test_figures_come_back_as_they_were_given():
    after = {0.5: {"a": 0.3, "b": 0.1}, 0.25: {"a": 0.4}}
    classes = {"cat": (6, 5, 1), "dog": (4, 3, 0), "newt": (0, 0, 0)}
    controls = {"blur": {0.5: 0.2, 0.0: 0.9, 0.25: 0.3}}
    names = dict(class_names=list(classes), prompt_hash="0", num_images=10)
    report = replace(REPORT, measurements=accuracies(0.8, after, classes, controls), **names)
    assert (report.clean_accuracy, report.num_classes) == (0.8, 3)
    assert list(report.robust_accuracy.items()) == [(0.25, 0.4), (0.5, 0.1)]
    assert [(radius, list(left.items())) for radius, left in report.after_each.items()] == [
        (0.25, [("a", 0.4)]),
        (0.5, [("a", 0.3), ("b", 0.1)]),
    ]
    assert list(report.per_class.items()) == list(classes.items())
    assert list(report.controls["blur"].items()) == [(0.0, 0.9), (0.25, 0.3), (0.5, 0.2)]
    assert report.interval(0.8) == wilson_interval(8, 10)


def test_the_frame_has_a_row_for_each_figure():
    rows = frame([REPORT, DEFENDED])
    assert len(rows) == len(REPORT.measurements) + len(DEFENDED.measurements)
    own = rows[rows["number"] == 1]
    assert set(own["defence"]) == {"tapt"} and set(own["attack_target"]) == {"adaptive"}
    assert set(rows[rows["number"] == 0]["full_attack"]) == {"PGD-20"}
    one = own[(own["judge"] == "ensemble-64") & (own["eps"] == 4 / 255)].iloc[0]
    assert (one["metric"], one["value"], one["n"], one["ms_per_image"]) == ("robust_accuracy", 0.75, 40, 12.5)
    assert (one["low"], one["high"]) == wilson_interval(30, 40)
    assert frame([REPORT, DEFENDED]).groupby("number")["name"].nunique().tolist() == [1, 1]


def test_any_share_is_a_figure_and_what_was_not_counted_has_no_interval():
    area = Measurement("detection_auroc", 0.75, 80, 4 / 255, counted=False)
    success = Measurement("attack_success_rate", 0.5, 12)
    report = replace(REPORT, measurements=[*REPORT.measurements, area, success])
    assert (report.robust_accuracy, report.per_class) == (REPORT.robust_accuracy, REPORT.per_class)
    rows = frame([report]).set_index("metric")
    assert rows.loc["detection_auroc", ["low", "high"]].isna().all()
    assert rows.loc["attack_success_rate", "low"] == wilson_interval(6, 12)[0]
    no_radii = without(REPORT, metric="robust_accuracy")
    backdoor = replace(REPORT, measurements=[*no_radii, success], norm="a trigger of 4 x 4 pixels")
    assert (backdoor.robust_accuracy, backdoor.after_each) == ({}, {})
    assert backdoor.per_class["cat"] == (20, 20, 20), "clean is the largest radius there is"


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_mandatory(name):
    values = {field.name: getattr(REPORT, field.name) for field in fields(REPORT) if field.name != name}
    with pytest.raises(TypeError, match=name):
        RobustnessReport(**values)


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_may_be_empty(name):
    value = getattr(REPORT, name)
    for empty in (None, "", *([{}] if isinstance(value, dict) else [()] if isinstance(value, tuple) else [])):
        with pytest.raises(ValueError, match=name):
            replace(REPORT, **{name: empty})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack_target": "adaptive"}, "'adaptive' is an attack on a test-time defence; defence is missing"),
        ({"defence": make_defence()}, "'static' says nothing of tapt"),
        ({"attack_target": "bpda", "defence": {}, "controls": {}}, "defence lacks fallbacks, ms_per_image, name"),
        ({"attack_target": "bpda", "defence": make_defence(traits={})}, "defence lacks traits"),
        (
            {"attack_target": "bpda", "defence": make_defence(), "controls": {"static prompts": {0.0: 0.5}}},
            "controls random prompts, ensemble-64",
        ),
        (
            {"attack_target": "bpda", "defence": make_defence(), "controls": make_controls([0.1])},
            r"'static prompts' has the radii \[0.0, 0.1\]",
        ),
        (
            {"attack_target": "bpda", "defence": make_defence(),
             "controls": {**make_controls(), "ensemble-64": {0.0: 0.5, 1 / 255: 2.0}}},
            r"'ensemble-64'=2.0 must be in \[0, 1\]",
        ),
        ({"num_images": 0, "per_class": PER_CLASS}, "num_images is 0"),
        ({"per_class": {"cat": (0, 0, 0)}}, "nothing was evaluated"),
        ({"norm": "l7"}, "norm='l7' is unknown"),
        ({"robust_accuracy": {4.0: 0.5}}, "covers the whole pixel range"),
        ({"clean_accuracy": 1.01, "per_class": PER_CLASS}, r"accuracy=1.01 must be in \[0, 1\]"),
        ({"clean_accuracy": float("nan"), "per_class": PER_CLASS}, r"accuracy=nan must be in \[0, 1\]"),
        ({"robust_accuracy": {0.1: 0.5, 0.2: -0.1}, "per_class": PER_CLASS}, r"robust_accuracy\[0.2\].*=-0.1 must"),
        ({"zero_gradient_share": 40}, "zero_gradient_share=40 must"),
        ({"after_each": {1 / 255: {"a": 2, "b": 0.7}, 4 / 255: {"b": 0.25}}}, "'a'=2 must"),
        ({"after_each": {1 / 255: {}, 4 / 255: {"b": 0.25}}}, "after_each.* is empty"),
        ({"measurements": without(REPORT, member="pgd", eps=4 / 255)}, "after_each has the radii"),
        ({"measurements": without(REPORT, member=None, eps=4 / 255, class_name=None)}, "after_each has the radii"),
        ({"measurements": without(REPORT, metric="accuracy", class_name=None)}, "lack the clean accuracy"),
        ({"measurements": without(REPORT, class_name="dog")}, "counts 20 images, num_images is 40"),
        ({"per_class": {"cat": (20, 19, 5), "dog": (19, 17, 5)}}, "of 39 images, num_images is 40"),
        ({"per_class": {"cat": (20, 18, 5), "dog": (20, 17, 5)}}, "counts 35 of 40 correct at eps=0, .* is 0.9"),
        ({"per_class": {"cat": (20, 19, 6), "dog": (20, 17, 5)}}, "counts 11 of 40 correct at eps=.* is 0.25"),
        ({"per_class": {"cat": (20, 19, 5), "cow": (20, 17, 5)}}, "the class 'cow'"),
        ({"view": View("adaptive", "through the defence")}, "view=.*'adaptive'"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_report(**change)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Measurement("accuracy", 0.9, 40), "accuracy twice"),
        (Measurement("accuracy", 0.9, 40, 0.1), "accuracy is clean"),
        (Measurement("robust_accuracy", 0.9, 40, judge="x"), "robust_accuracy has a radius"),
        (Measurement("robust_accuracy", 0.7, 40, 4 / 255, member="later"), "doesn't end with the robust accuracy"),
        (Measurement("robust_accuracy", 0.7, 4, 1 / 255, judge="x"), "is of 4 images, num_images is 40"),
    ],
)
def test_measurements_at_odds_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        replace(REPORT, measurements=[*REPORT.measurements, row])


def test_a_view_of_somebody_else_needs_no_list():
    view = View("surrogate", "made on another model, then shown to the defence")
    assert make_report(view=view).full_attack == "PGD-20 (surrogate)"
    assert make_report(view=view, defence=make_defence()).attack_target == "surrogate"
    assert make_report(attack_target="bpda", defence=make_defence()).view == KNOWN_VIEWS["bpda"]


# ---- numbers


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (5, 10, (0.2366, 0.7634)), (81, 263, (0.2553, 0.3662))],
)
def test_wilson_interval(successes, trials, expected):
    """The last row is an example of Newcombe, Statistics in Medicine 17 (1998)."""
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-4)


def test_prompt_hash_sees_names_templates_and_their_order():
    first = prompt_hash(["cat", "dog"], ["a {}"])
    others = {prompt_hash(*what) for what in ((["dog", "cat"], ["a {}"]), (["cat", "dog"], ["the {}"]),
              (["cat"], ["dog", "a {}"]), (["cat, dog"], ["a {}"]))}  # fmt: skip
    assert len(first) == 16
    assert len(others | {first}) == 5
    assert first == prompt_hash(("cat", "dog"), ("a {}",))


def test_attack_parameters_are_as_a_file_gives_them_back():
    members = make_report(attack_parameters={"members": ("a", "b")}).attack_parameters
    assert members == {"members": ["a", "b"]}
    with pytest.raises(TypeError, match="JSON"):
        make_report(attack_parameters={"loss": object()})


# ---- prompts and blind attacks


def test_several_prompts_are_told_by_their_tasks():
    several = make_report(templates=["a {}", "one {}"], prompt_hash=prompt_hash(["cat", "dog"], ["a {}", "one {}"]))
    reports = [make_report(templates=["a {}"]), replace(several, task="held-out"), make_report(name="other")]
    assert templates_told(reports) == 'prompts "a {}" on trained classes; "a {}" and 1 more on held-out'
    assert templates_told([make_report()]) is None


def test_templates_of_another_prompt_hash_are_refused():
    with pytest.raises(ValueError, match=r"templates=.*'one \{\}'"):
        make_report(templates=["one {}"])


def test_blind_attacks_are_told_above_five_percent():
    assert blind_warning([make_report(zero_gradient_share=0.05)]) is None
    seeing, blind = make_report(zero_gradient_share=0.04), make_report(name="masked", zero_gradient_share=0.62)
    told = blind_warning([seeing, blind, blind])
    assert told.count("PGD-20 on masked, trained classes: 62.0 %") == 1
    assert "4.0 %" not in told
    assert "blind" in told
