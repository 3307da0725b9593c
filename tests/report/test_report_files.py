import json
from dataclasses import MISSING, fields

import numpy as np
import pandas
import pytest
from reports import make_defence, make_report

from hf_robust_clip.metrics import wilson_interval
from hf_robust_clip.report import RobustnessReport, load_reports, save_csv, save_reports
from hf_robust_clip.report.outcomes import Outcomes, make_outcomes

FIELDS = [field.name for field in fields(RobustnessReport) if field.default is MISSING]


def test_json_round_trip(tmp_path):
    own, compared = [make_report(), make_report(task="held-out classes")], [make_report(name="undefended")]
    own.append(make_report(attack_target="defence_blind", defence=make_defence()))
    save_reports(tmp_path / "report.json", own, compared)
    assert load_reports(tmp_path / "report.json") == (own, compared)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_report_is_of_the_weights_beside_it(tmp_path):
    """Of all of them; where they were left behind, of none."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    save_reports(tmp_path / "report.json", [make_report()])
    assert len(load_reports(tmp_path / "report.json")[0]) == 1
    for name, content in (("model.safetensors", b"weightz"), ("adapter_model.safetensors", b"")):
        before = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"report.json tells the figures of other weights than {name}"):
            load_reports(tmp_path / "report.json")
        (tmp_path / name).unlink()
        (tmp_path / "model.safetensors").write_bytes(before)
    (tmp_path / "model.safetensors").unlink()
    assert len(load_reports(tmp_path / "report.json")[0]) == 1


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 1, "reports": [], "compared": []}',
        "[]",
        "{}",
        '{"format": 3}',
        '{"format": 3, "reports": [{"na',
        "",
    ],
    ids=["format 1", "list", "no format", "no reports", "cut short", "empty file"],
)
def test_other_files_are_refused_by_name(content, tmp_path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json"):
        load_reports(tmp_path / "report.json")


def edited(tmp_path, change):
    """A file of one report, after a change to its row."""
    save_reports(tmp_path / "report.json", [make_report()])
    content = json.loads((tmp_path / "report.json").read_text())
    change(content["reports"][0])
    (tmp_path / "report.json").write_text(json.dumps(content))
    return tmp_path / "report.json"


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"report\.json.*{name}"):
        load_reports(edited(tmp_path, lambda row: row.pop(name)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(certified=1), "certified"),
        (lambda row: row["view"].pop("text"), "text"),
        (lambda row: row["measurements"][0].update(spread=1), "spread"),
        (lambda row: row["measurements"][0].update(value="much"), "of another kind"),
        (lambda row: row.update(measurements=1), "of another kind"),
        (lambda row: row.update(view="static"), "'static'"),
    ],
)
def test_an_unknown_field_or_kind_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=rf"report\.json.*{message}"):
        load_reports(edited(tmp_path, change))


def test_another_format_says_what_to_do(tmp_path):
    (tmp_path / "report.json").write_text('{"format": 2, "reports": [], "compared": []}')
    with pytest.raises(ValueError, match="format 2, this version reads 3; evaluate"):
        load_reports(tmp_path / "report.json")


def test_a_figure_is_a_line_of_the_file(tmp_path):
    save_reports(tmp_path / "report.json", [make_report()])
    lines = (tmp_path / "report.json").read_text().splitlines()
    assert '    {"metric": "accuracy", "value": 0.9, "n": 40},' in lines


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


def test_csv_has_a_line_for_each_figure(tmp_path):
    reports = [make_report(task='in, "out"'), make_report(name="naïve", robust_accuracy={0.5: 0.125}, norm="l2")]
    save_csv(tmp_path / "a.csv", reports)
    rows = pandas.read_csv(tmp_path / "a.csv")
    scalars = {name for name in FIELDS if isinstance(getattr(reports[0], name), str | int | float)}
    assert set(rows) > scalars | {"metric", "value", "n", "eps", "low", "high", "attack_target", "num_classes"}
    own = rows[rows["member"].isna()]
    assert list(zip(own["name"], own["task"], own["metric"], own["eps"], own["value"], strict=True)) == [
        ("TeCoA", 'in, "out"', "accuracy", 0.0, 0.9),
        ("TeCoA", 'in, "out"', "robust_accuracy", 1 / 255, 0.7),
        ("TeCoA", 'in, "out"', "robust_accuracy", 4 / 255, 0.25),
        ("naïve", "trained classes", "accuracy", 0.0, 0.9),
        ("naïve", "trained classes", "robust_accuracy", 0.5, 0.125),
    ]
    assert tuple(own.iloc[2][["low", "high"]]) == pytest.approx(wilson_interval(10, 40))
    assert set(rows["attack_target"]) == {"static"}
    save_csv(tmp_path / "c.csv", [reports[0], make_report(attack_target="bpda", defence=make_defence())])
    found = pandas.read_csv(tmp_path / "c.csv", keep_default_na=False)
    assert set(zip(found["defence"], found["attack_target"], strict=True)) == {("", "static"), ("tapt", "bpda")}
    assert set(found["judge"]) == {"", "static prompts", "random prompts", "ensemble-64"}
    with pytest.raises(ValueError, match="reports is empty"):
        save_csv(tmp_path / "b.csv", [])
    assert not (tmp_path / "b.csv").exists()


RIGHT = {0.0: [1, 1, 1, 1, 0, 0, 1, 1, 0, 1], 1 / 255: [1, 1, 0, 1, 0, 0, 0, 0, 0, 1]}
TEN = dict(num_images=10, clean_accuracy=0.7, robust_accuracy={1 / 255: 0.4})


def outcomes(right=RIGHT, images="0123"):
    return make_outcomes(images, {eps: np.array(own, dtype=bool) for eps, own in right.items()})


def test_outcomes_go_through_files_and_not_into_csv(tmp_path):
    told, other = make_report(**TEN, outcomes=outcomes()), make_report(**TEN)
    save_reports(tmp_path / "report.json", [told], [other])
    assert load_reports(tmp_path / "report.json") == ([told], [other])
    first, second = (json.loads((tmp_path / "report.json").read_text())[key][0] for key in ("reports", "compared"))
    assert first["outcomes"] == {"images": "0123", "right": {"0.0": "f340", repr(1 / 255): "d040"}}
    assert "outcomes" not in second
    for eps, right in RIGHT.items():
        assert told.outcomes_at(eps).tolist() == list(map(bool, right))
    with pytest.raises(ValueError, match=r"eps=0\.5"):
        told.outcomes_at(0.5)
    with pytest.raises(ValueError, match="no outcomes"):
        other.outcomes_at(0)
    for name, report in (("a.csv", told), ("b.csv", other)):
        save_csv(tmp_path / name, [report])
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(outcomes=outcomes(images="")), "outcomes.images"),
        (dict(outcomes=outcomes({0.0: RIGHT[0.0]})), "radii"),
        (dict(clean_accuracy=0.8, outcomes=outcomes()), "eps=0 "),
        (dict(robust_accuracy={1 / 255: 0.3}, outcomes=outcomes()), "eps=0.0039"),
        (dict(outcomes=outcomes({**RIGHT, 1 / 255: [1, 0, 0, 1, 1, 0, 0, 0, 0, 1]})), "smaller radius"),
        (dict(outcomes=outcomes({eps: [*own, *[0] * 8] for eps, own in RIGHT.items()})), "10 images"),
        (dict(outcomes=outcomes({eps: [*own, 1] for eps, own in RIGHT.items()})), "10 images"),
    ],
)
def test_outcomes_of_another_report_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        make_report(**{**TEN, **changes})


@pytest.mark.parametrize("right", [{"0.0": "f3g0"}, {"0.0": "f34"}, {"clean": "f340"}, {"-1": "f340"}, {"0.0": 4}])
def test_outcomes_that_are_none_are_refused(right):
    with pytest.raises(ValueError, match=r"outcomes\.right"):
        Outcomes("0123", right)


def test_templates_go_through_files(tmp_path):
    told = make_report(templates=["a {}"])
    save_reports(tmp_path / "report.json", [told], [make_report(name="other")])
    (own,), (other,) = load_reports(tmp_path / "report.json")
    assert (own.templates, other.templates) == (("a {}",), None)
    assert own == told
    assert "templates" not in json.loads((tmp_path / "report.json").read_text())["compared"][0]
    save_csv(tmp_path / "report.csv", [own, other])
    rows = pandas.read_csv(tmp_path / "report.csv", keep_default_na=False)
    assert set(zip(rows["name"], rows["templates"], strict=True)) == {("TeCoA", "a {}"), ("other", "")}
