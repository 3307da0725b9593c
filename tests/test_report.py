import json
from dataclasses import asdict, fields, replace

import pytest
from PIL import Image
from rich.console import Console

from hf_robust_clip.report import (
    RobustnessReport,
    load_reports,
    plot_accuracy,
    prompt_hash,
    save_reports,
    to_table,
    wilson_interval,
)

FIELDS = [field.name for field in fields(RobustnessReport)]


def make_report(**changes) -> RobustnessReport:
    """A report with fixed figures: 40 images, clean 0.9, robust 0.7 at 1/255 and 0.25 at 4/255."""
    values = dict(
        name="TeCoA",
        task="trained classes",
        model="user/robust-clip",
        model_revision="0123abc",
        dataset="user/pictures",
        dataset_revision="main",
        split="test",
        num_images=40,
        num_classes=2,
        prompt_hash=prompt_hash(["cat", "dog"], ["a {}"]),
        attack="PGD-20",
        attack_parameters={"num_steps": 20, "step_size": [0.1, 0.2], "random_start": True, "loss": "cross_entropy"},
        attack_target="static",
        attack_resolution=8,
        norm="linf",
        clean_accuracy=0.9,
        robust_accuracy={1 / 255: 0.7, 4 / 255: 0.25},
        after_each={1 / 255: {"pgd": 0.7}, 4 / 255: {"pgd": 0.25}},
        model_flags={"randomised": False, "optimising": False},
        per_class={"cat": (20, 19, 5), "dog": (20, 17, 5)},
        zero_gradient_share=0.0125,
        seed=0,
        precision="float32",
        library_versions={"torch": "2.0"},
        hardware="CPU",
    )
    if "robust_accuracy" in changes:
        changes = {"after_each": {r: {"pgd": v} for r, v in changes["robust_accuracy"].items()}, **changes}
    return RobustnessReport(**{**values, **changes})


# ---- JSON


def test_json_round_trip(tmp_path):
    own, compared = [make_report(), make_report(task="held-out classes")], [make_report(name="undefended")]
    save_reports(tmp_path / "report.json", own, compared)
    assert load_reports(tmp_path / "report.json") == (own, compared)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_radii_are_sorted_however_they_come():
    assert list(make_report(robust_accuracy={"0.5": 0.1, 0.25: 0.2}).robust_accuracy) == [0.25, 0.5]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_mandatory(name, tmp_path):
    values = asdict(make_report())
    del values[name]
    with pytest.raises(TypeError, match=name):
        RobustnessReport(**values)
    (tmp_path / "report.json").write_text(json.dumps({"format": 2, "reports": [values], "compared": []}))
    with pytest.raises(ValueError, match=rf"report\.json.*{name}"):
        load_reports(tmp_path / "report.json")


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_may_be_empty(name):
    value = getattr(make_report(), name)
    for empty in (None, "", {}) if isinstance(value, dict) else (None, ""):
        with pytest.raises(ValueError, match=name):
            replace(make_report(), **{name: empty})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack_target": "certified"}, "attack_target='certified' is unknown"),
        ({"num_images": 0}, "nothing was evaluated"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_report(**change)


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 1, "reports": [], "compared": []}',
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 2, "reports": [{"na',
        "",
    ],
    ids=["format 1", "list", "no format", "no reports", "cut short", "empty file"],
)
def test_other_files_are_refused_by_name(content, tmp_path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json"):
        load_reports(tmp_path / "report.json")


def test_an_unknown_field_is_refused(tmp_path):
    row = {**asdict(make_report()), "certified": 1}
    (tmp_path / "report.json").write_text(json.dumps({"format": 2, "reports": [row], "compared": []}))
    with pytest.raises(ValueError, match="certified"):
        load_reports(tmp_path / "report.json")


def test_nothing_to_save_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reports is empty"):
        save_reports(tmp_path / "report.json", [], [make_report()])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    save_reports(tmp_path / "report.json", [make_report()])
    with pytest.raises(TypeError):
        save_reports(tmp_path / "report.json", [make_report(seed=object())])
    assert load_reports(tmp_path / "report.json")[0] == [make_report()]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        save_reports(tmp_path / "folder", [make_report()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "report.json"]


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


def test_eval_results_tell_task_and_radius_apart():
    rows = [row for task in ("trained", "held-out") for row in make_report(task=task).to_eval_results()]
    assert len({row.unique_identifier for row in rows}) == len(rows) == 6
    values = [(row.dataset_config, row.metric_type, row.metric_value) for row in rows[:3]]
    assert values == [
        ("trained, clean", "accuracy", 0.9),
        ("trained, PGD-20 L-inf eps=1/255", "robust_accuracy", 0.7),
        ("trained, PGD-20 L-inf eps=4/255", "robust_accuracy", 0.25),
    ]
    assert rows[2].metric_args["eps"] == 4 / 255
    assert rows[2].metric_args["step_size"] == 0.2
    assert rows[2].metric_args["attack_target"] == "static"


# ---- table and plot


def test_table_holds_the_numbers_and_a_dash_where_a_radius_was_not_tried():
    reports = [make_report(), make_report(name="undefended", robust_accuracy={1 / 255: 0.125})]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(to_table(reports, "before and after"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines() if "│" in line]
    assert rows == [
        ["TeCoA, trained classes", "40", "50.0", "90.0", "70.0", "25.0"],
        ["undefended, trained classes", "40", "50.0", "90.0", "12.5", "-"],
    ]
    assert "1/255" in captured.get()
    assert "PGD-20" in captured.get()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_plot_is_a_picture_that_shows_its_lines(norm, tmp_path):
    report = make_report(norm=norm, robust_accuracy={0.25: 0.7, 0.5: 0.2})
    plot_accuracy(tmp_path / "a.png", {"trained": {"TeCoA": report}, "held-out": {"TeCoA": report}})
    plot_accuracy(tmp_path / "b.png", {"trained": {"TeCoA": report}})
    two, one = (Image.open(tmp_path / name).convert("RGB") for name in ("a.png", "b.png"))
    assert two.width > 1.8 * one.width > 800
    assert one.height > 400
    assert len(one.getcolors(maxcolors=1 << 20)) > 50
    assert 5_000 < (tmp_path / "a.png").stat().st_size < 500_000
