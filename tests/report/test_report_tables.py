import pytest
from rich.console import Console
from support.reports import make_defence, make_report

from hf_robust_clip.report import figures_of_defences, as_markdown, markdown, table


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


def test_table_says_which_attack_made_each_row():
    auto = make_report(attack="AutoAttack", robust_accuracy={1 / 255: 0.5})
    blind = make_report(name="APT", attack_target="defence_blind", defence=make_defence())
    console = Console(width=120)
    with console.capture() as captured:
        console.print(to_table([make_report(), auto, blind], "two attacks"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines() if "│" in line]
    assert [row[:4] + row[5:] for row in rows] == [
        ["TeCoA, trained classes", "PGD-20", "none", "40", "90.0", "70.0", "25.0"],
        ["TeCoA, trained classes", "AutoAttack", "none", "40", "90.0", "50.0", "-"],
        ["APT, trained classes", "PGD-20 (defence_blind)", "tapt", "40", "90.0", "70.0", "25.0"],
    ]


def defence_rows():
    static = [make_report(), make_report(attack="APGD", robust_accuracy={1 / 255: 0.7, 4 / 255: 0.25})]
    one = dict(robust_accuracy={4 / 255: 0.25}, after_each={4 / 255: {"pgd": 0.25}})
    defence = make_defence(radii=(4 / 255,))
    blind = make_report(attack_target="defence_blind", defence=defence, **one)
    lower = dict(robust_accuracy={4 / 255: 0.1}, after_each={4 / 255: {"square": 0.1}})
    classes = {"cat": (20, 19, 2), "dog": (20, 17, 2)}
    worst = make_report(attack="all", attack_target="adaptive_worst", defence=defence, per_class=classes, **lower)
    return {"CLIP": static, "TAPT": [blind, worst]}


def test_defences_are_told_beside_their_controls_at_the_common_radius():
    heads, (static, defended) = defence_cells(defence_rows())
    assert heads == ["", "n", "clean", "blind PGD-20", "blind APGD", "adaptive worst", "static prompts",
                     "random prompts", "ensemble-64", "ms"]  # fmt: skip
    assert static == ["CLIP", "40", "90.0", "25.0", "25.0", "25.0", "-", "-", "-", "-"]
    assert defended == ["TAPT", "40", "90.0", "25.0", "-", "10.0", "80.0 / 50.0", "80.0 / 25.0", "80.0 / 75.0", "12.5"]
    lines = defence_table(defence_rows()).splitlines()
    assert len(lines) == 4
    assert lines[3] == "| " + " | ".join(defended) + " |"


def test_defences_on_other_images_or_radii_are_refused():
    static, defended = defence_rows().values()
    with pytest.raises(ValueError, match="no radius in common"):
        defence_cells({})
    with pytest.raises(ValueError, match="'a' must be of one set of images"):
        defence_cells({"a": [*static, replace(static[0], split="train")]})
    with pytest.raises(ValueError, match="'b' must be of one set of images"):
        defence_cells({"a": defended, "b": []})


def test_the_plot_of_defences_shows_every_row(tmp_path, monkeypatch):
    drawn = {}

    def look(figure, path, **settings):
        (axis,) = figure.axes
        drawn["rows"] = [label.get_text() for label in axis.get_yticklabels()]
        drawn["points"] = {line.get_label(): list(line.get_xdata()) for line in axis.lines}
        FigureCanvasAgg(figure).print_png(path)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", look)
    plot_defences(tmp_path / "defences.png", defence_rows())
    assert drawn["rows"] == ["CLIP", "TAPT"]
    assert drawn["points"]["clean"] == [90, 90]
    assert drawn["points"]["worst of all attacks"] == [25, 10]
    assert drawn["points"]["ensemble-64, same images"] == [75]
    assert Image.open(tmp_path / "defences.png").size > (300, 100)


