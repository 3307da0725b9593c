from dataclasses import replace
from io import StringIO

import pytest
from reports import defence_rows, make_defence, make_report
from rich.console import Console

from hf_robust_clip.metrics import wilson_interval
from hf_robust_clip.report import (
    Measurement,
    as_markdown,
    figures_by_task,
    figures_of_defences,
    markdown,
    print_table,
    table,
)
from hf_robust_clip.report.tables import figures, over_runs


def printed(capsys, reports, title="before and after") -> list[str]:
    print_table(table(reports, title))
    return capsys.readouterr().out.splitlines()


def test_table_holds_the_numbers_and_a_dash_where_a_radius_was_not_tried(capsys):
    reports = [make_report(), make_report(name="undefended", robust_accuracy={16 / 255: 0.125})]
    lines = printed(capsys, reports)
    assert lines[0].strip() == "before and after"
    assert [line.split() for line in lines[1:6] if line.strip()] == [
        ["n", "clean", "1/255", "4/255", "16/255"],
        ["trained", "classes", "under", "PGD-20,", "chance", "50.0", "%"],
        ["TeCoA", "40", "90.0", "70.0", "25.0", "-"],
        ["undefended", "40", "90.0", "-", "-", "12.5"],
    ]
    assert "accuracy in percent; radii in L-inf" in lines[-1]


def test_reports_of_one_attack_on_the_same_images_stand_together():
    auto = make_report(attack="AutoAttack", robust_accuracy={1 / 255: 0.5})
    other = make_report(task="held-out classes")
    found = figures([make_report(), auto, other, make_report(name="FARE")])
    assert [row[:2] for row in found.rows] == [
        ("trained classes under PGD-20, chance 50.0 %", "TeCoA"),
        ("trained classes under PGD-20, chance 50.0 %", "FARE"),
        ("trained classes under AutoAttack, chance 50.0 %", "TeCoA"),
        ("held-out classes under PGD-20, chance 50.0 %", "TeCoA"),
    ]
    assert found.rows[2][2:] == ("40", "90.0", "50.0", "-")
    assert "ms" not in found.heads


def test_a_defence_stands_above_its_controls():
    blind = make_report(name="APT", attack_target="defence_blind", defence=make_defence())
    found = figures([make_report(), blind])
    assert found.heads[2:] == ("n", "clean", "1/255", "4/255", "ms")
    assert found.rows[0][1:] == ("TeCoA", "40", "90.0", "70.0", "25.0", "-")
    assert [row[1:] for row in found.rows[1:]] == [
        ("APT with tapt", "40", "90.0", "70.0", "25.0", "12.5"),
        ("control: static prompts", "40", "80.0", "50.0", "50.0", ""),
        ("control: random prompts", "40", "80.0", "25.0", "25.0", ""),
        ("control: ensemble-64", "40", "80.0", "75.0", "75.0", ""),
    ]
    assert found.rows[1][0].startswith("trained classes under PGD-20 (defence_blind)")


def test_another_metric_is_another_column():
    area = Measurement("attack_success_rate", 0.75, 80, 4 / 255, counted=False)
    own = make_report()
    lines = markdown([replace(own, measurements=[*own.measurements, area]), make_report(name="FARE")]).splitlines()
    assert lines[0].endswith("| clean | 1/255 | 4/255 | attack success rate 4/255 |")
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["75.0 |", "- |"]


@pytest.mark.parametrize("names", [["FARE"], ["PMG-AFT with a name that is longer than any line of a terminal " * 2]])
@pytest.mark.parametrize("radii", [1, 3, 5])
def test_a_table_fits_eighty_columns_and_no_number_is_cut(names, radii, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    robust = {k / 255: 0.987 for k in range(20, 20 + radii)}
    reports = [
        make_report(name=name, robust_accuracy=robust, num_images=10000, **more)
        for name in names
        for more in ({}, dict(attack_target="adaptive_worst", defence=make_defence()))
    ]
    lines = printed(capsys, reports)
    assert max(map(len, lines)) <= 80
    assert "".join(lines).count("98.7") == 2 * radii
    assert "…" not in "".join(lines)


def test_a_table_of_many_radii_is_wider_than_eighty_rather_than_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    lines = printed(capsys, [make_report(robust_accuracy={k / 255: 0.987 for k in range(20, 40)})])
    assert any(line.split().count("98.7") == 20 for line in lines)


def test_names_are_shown_as_they_are():
    console = Console(file=StringIO(), width=80)
    console.print(table([make_report(name="[red]a[/red] :cat:", task="[b]|[/b]")], "[i]t[/i]"))
    shown = console.file.getvalue()
    assert all(text in shown for text in ("[red]a[/red] :cat:", "[b]|[/b]", "[i]t[/i]"))
    assert r"[b]\|[/b]" in markdown([make_report(task="[b]|[/b]")])


def test_the_prompt_is_told_below(capsys):
    assert 'prompt "a {}"' in "".join(printed(capsys, [make_report(templates=["a {}"])]))


def test_tasks_stand_side_by_side():
    own = make_report(robust_accuracy={1 / 255: 0.5})
    reports = [own, make_report(task="digits", num_images=20), replace(own, name="FARE")]
    assert as_markdown(figures_by_task(reports)).splitlines() == [
        "|  | trained classes (n=40): clean / 1/255 / 4/255 | digits (n=20): clean / 1/255 / 4/255 |",
        "|---|---|---|",
        "| TeCoA | 90.0 / 50.0 / - | 90.0 / 70.0 / 25.0 |",
        "| FARE | 90.0 / 50.0 / - | - |",
    ]
    with pytest.raises(ValueError, match="two reports of TeCoA, trained classes"):
        figures_by_task([own, own])


def test_runs_of_several_seeds_are_told_by_mean_and_standard_deviation():
    first = make_report(clean_accuracy=0.9, robust_accuracy={1 / 255: 0.5})
    start = make_report(name="before", clean_accuracy=0.95, robust_accuracy={1 / 255: 0.025})
    again = [make_report(clean_accuracy=clean, robust_accuracy={1 / 255: 0.5}) for clean in (0.8, 0.7)]
    found = figures_by_task([start, first], [[run] for run in again])
    assert found.rows == (("before", "95.0 / 2.5"), ("TeCoA", "80.0 ± 10.0 / 50.0 ± 0.0"))
    rows = over_runs([start, first], [[run] for run in again]).set_index(["name", "eps"])
    assert tuple(rows.loc["TeCoA", 0.0][["value", "low", "high"]]) == pytest.approx((0.8, 0.7, 0.9))
    assert rows.loc["before", 0.0]["low"] == pytest.approx(wilson_interval(38, 40)[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_images": 20}, "num_images"), ({"attack": "AutoAttack"}, "full_attack"), ({"split": "train"}, "split"),
     ({"robust_accuracy": {4 / 255: 0.5}}, "lacks")],
)  # fmt: skip
def test_runs_of_other_images_or_attacks_have_no_mean(changes, said):
    with pytest.raises(ValueError, match=said):
        figures_by_task([make_report()], [[make_report(**changes)]])


def test_defences_are_told_beside_their_controls_at_the_common_radius():
    found = figures_of_defences(defence_rows())
    assert found.heads == ("", "n", "clean", "blind PGD-20", "blind APGD", "adaptive worst", "static prompts",
                           "random prompts", "ensemble-64", "ms")  # fmt: skip
    static, defended = found.rows
    assert static == ("CLIP", "40", "90.0", "25.0", "25.0", "25.0", "-", "-", "-", "-")
    assert defended == ("TAPT", "40", "90.0", "25.0", "-", "10.0", "80.0 / 50.0", "80.0 / 25.0", "80.0 / 75.0", "12.5")
    lines = as_markdown(found).splitlines()
    assert len(lines) == 4
    assert lines[3] == "| " + " | ".join(defended) + " |"


def test_defences_on_other_images_or_radii_are_refused():
    static, defended = defence_rows().values()
    with pytest.raises(ValueError, match="no radius in common"):
        figures_of_defences({})
    with pytest.raises(ValueError, match="'a' must be of one set of images"):
        figures_of_defences({"a": [*static, replace(static[0], split="train")]})
    with pytest.raises(ValueError, match="'b' must be of one set of images"):
        figures_of_defences({"a": defended, "b": []})
