from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from reports import defence_rows, make_report

from hf_robust_clip.metrics import wilson_interval
from hf_robust_clip.report import plot, plot_accuracy, plot_defences, plot_examples, plot_tradeoff, table
from hf_robust_clip.report.plots import FRONT, MOST_BANDS, _hull, choose_examples


@pytest.mark.parametrize("norms", [(), ("l2", "linf")])
def test_a_table_and_a_panel_hold_one_norm(norms, tmp_path):
    reports = {norm: make_report(norm=norm, name=norm) for norm in norms}
    for make in (
        lambda: table(list(reports.values()), "t"),
        lambda: plot_tradeoff(tmp_path / "a.png", list(reports.values()), "4/255"),
        lambda: plot_accuracy(tmp_path / "a.png", list(reports.values())),
    ):
        with pytest.raises(ValueError, match="one norm, got " + (", ".join(norms) or "no reports")):
            make()
    assert list(tmp_path.iterdir()) == []


def drawn(monkeypatch) -> list:
    """The figures that plots write from here on."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    return figures


def check_layout(figure):
    """Every text lies within the picture, and no two texts lie over each other or over another panel."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [t for axis in figure.axes for t in (axis.title, axis.xaxis.label, axis.yaxis.label) if t.get_text()]
    texts += [t for axis in figure.axes for a in (axis.xaxis, axis.yaxis) for t in a.get_ticklabels()[1:-1]]
    texts += [t for legend in figure.legends for t in legend.get_texts()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    for i, (name, box) in enumerate(boxes):
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, name
        assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, name
        assert not any(box.shrunk(0.95, 0.95).overlaps(other.shrunk(0.95, 0.95)) for _, other in boxes[:i]), name
        assert not any(box.shrunk(0.95, 0.95).overlaps(axis.bbox) for axis in figure.axes), name


MODELS = ("undefended", "TeCoA", "FARE", "PMG-AFT", "TRADES", "PMG-AFT with LoRA", "TAPT", "R-TPT")
LONG = "held-out classes of a data set" + " with a long name" * 6
TASKS = ("CIFAR-10", LONG, "Pets", "DTD", "EuroSAT", "PCAM")


def many_reports():
    """By task and model: clean (20 + model + task) / 40, robust (15 + model) / 40 at 1/255, model / 40 at 4/255."""

    def one(i, name, j, task):
        robust = {1 / 255: (15 + i) / 40, 4 / 255: i / 40}
        return make_report(name=name, task=task, clean_accuracy=(20 + i + j) / 40, robust_accuracy=robust)

    return {task: {name: one(i, name, j, task) for i, name in enumerate(MODELS)} for j, task in enumerate(TASKS)}


def test_plot_of_eight_models_and_six_panels(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    panels = many_reports()
    plot_accuracy(tmp_path / "a.png", [report for models in panels.values() for report in models.values()])
    check_layout(figures[0])
    picture = Image.open(tmp_path / "a.png")
    assert picture.width < 2 * picture.height < 4000, "two rows"
    assert len(figures[0].axes) == 6
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == [*MODELS, "chance"]
    styles = [[(line.get_color(), line.get_marker()) for line in axis.lines[:-1]] for axis in figures[0].axes]
    assert all(style == styles[0] for style in styles)
    for part in zip(*styles[0], strict=True):
        assert len(set(part)) == 8
    line = figures[0].axes[1].lines[2]
    assert line.get_xdata() == pytest.approx([0, 1, 4])
    assert line.get_ydata() == pytest.approx([23 / 40, 17 / 40, 2 / 40])
    assert figures[0].axes[0].get_title() == "CIFAR-10\nn = 40"
    assert figures[0].axes[0].get_ylabel() == "accuracy under PGD-20"
    low, high = wilson_interval(23, 40)
    band = figures[0].axes[1].collections[2].get_paths()[0].vertices
    assert sorted(band[band[:, 0] == 0][:, 1])[0] == pytest.approx(low)
    assert sorted(band[band[:, 0] == 0][:, 1])[-1] == pytest.approx(high)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_plots_of_one_and_of_four_panels(norm, tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    report = make_report(norm=norm, robust_accuracy={0.25: 0.7, 0.5: 0.2})
    auto = make_report(norm=norm, robust_accuracy={0.25: 0.6, 0.5: 0.1}, attack="AutoAttack", num_images=20)
    names = ["TeCoA", *(f"a rather long name {i}" for i in "abcdefg")]
    plot_accuracy(tmp_path / "a.png", [replace(report, name=name) for name in names])
    plot_accuracy(tmp_path / "b.png", [replace(own, task=task) for task in "ab" for own in (report, auto)])
    for figure, panels in zip(figures, (1, 4), strict=True):
        check_layout(figure)
        assert len(figure.axes) == panels
        assert figure.axes[0].bbox.height > 0.5 * figure.axes[0].bbox.width
    assert figures[1].axes[0].get_ylabel() == "accuracy under attack"
    assert [axis.get_title() for axis in figures[1].axes[:2]] == ["a, PGD-20\nn = 40", "a, AutoAttack\nn = 20"]
    assert ("L-inf" if norm == "linf" else "L2") in figures[0].axes[0].get_xlabel()
    assert figures[0].axes[0].lines[0].get_xdata()[-1] == (127.5 if norm == "linf" else 0.5)
    with pytest.raises(ValueError, match="two reports of TeCoA, trained"):
        plot_accuracy(tmp_path / "c.png", [report, report])


def test_tradeoff_of_eight_models_and_six_tasks(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    panels = many_reports()
    plot_tradeoff(tmp_path / "a.png", [r for models in panels.values() for r in models.values()], "4/255")
    check_layout(figures[0])
    assert [axis.get_title().replace("\n", " ") for axis in figures[0].axes] == list(TASKS)
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == list(MODELS)
    points = [container[0] for container in figures[0].axes[1].containers]
    assert [(p.get_xdata()[0], p.get_ydata()[0]) for p in points] == [((21 + i) / 40, i / 40) for i in range(8)]
    assert len({p.get_marker() for p in points}) == len({p.get_color() for p in points}) == 8
    horizontal, vertical = (bar.get_segments()[0] for bar in figures[0].axes[1].containers[2][2])
    assert tuple(horizontal[:, 0]) == pytest.approx(wilson_interval(23, 40))
    assert tuple(vertical[:, 1]) == pytest.approx(wilson_interval(2, 40))
    assert "PGD-20\nL-inf eps=4/255" in figures[0].axes[0].get_ylabel()


def test_a_tradeoff_of_several_seeds_has_each_their_mean_and_their_hull(tmp_path, monkeypatch):
    """And the front of the models than which no mean is better in both."""
    figures = drawn(monkeypatch)
    own = [(0.9, 0.25), (0.8, 0.5), (0.7, 0.3), (0.8, 0.35)]
    others = {"worse": (0.775, 0.3), "start": (0.95, 0.05), "robust": (0.5, 0.45)}
    runs = [[make_report(clean_accuracy=x, robust_accuracy={4 / 255: y})] for x, y in own]
    runs[0] += [
        make_report(name=name, clean_accuracy=x, robust_accuracy={4 / 255: y}) for name, (x, y) in others.items()
    ]
    plot_tradeoff(tmp_path / "a.png", runs[0], "4/255", runs[1:])
    (axis,) = figures[0].axes
    points = {c.get_label(): (c[0].get_xdata()[0], c[0].get_ydata()[0]) for c in axis.containers}
    assert points == {name: pytest.approx(at) for name, at in {**others, "TeCoA": (0.8, 0.35)}.items()}
    assert not any(container[2] for container in axis.containers)
    (hull,) = axis.patches
    assert {tuple(corner) for corner in hull.get_xy()} == set(own[:3]), "the fourth lies inside"
    lines = [list(zip(*line.get_data(), strict=True)) for line in axis.lines]
    assert own in lines
    front = next(line for line in axis.lines if line.get_label() == FRONT)
    expected = [others["robust"], (0.8, 0.35), others["start"]]
    assert list(zip(*front.get_data(), strict=True)) == [pytest.approx(at) for at in expected]
    assert front.get_drawstyle() == "steps-pre"
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == ["TeCoA", *others, FRONT]


def test_a_tradeoff_of_groups_has_a_panel_for_each(tmp_path, monkeypatch):
    """With the means over their tasks; of two seeds and of one."""
    figures = drawn(monkeypatch)
    tasks = {"a": (0.9, 0.25), "b": (0.8, 0.5), "c": (0.7, 0.3)}
    run = [make_report(task=task, clean_accuracy=x, robust_accuracy={4 / 255: y}) for task, (x, y) in tasks.items()]
    groups = {"seen": ["a"], "other": ["b", "c"]}
    for further in ([], [run]):
        plot_tradeoff(tmp_path / "a.png", run, "4/255", further, groups)
        check_layout(figures[-1])
        assert [axis.get_title() for axis in figures[-1].axes] == ["seen: a", "other: b, c"]
        (container,) = figures[-1].axes[1].containers
        assert (container[0].get_xdata()[0], container[0].get_ydata()[0]) == pytest.approx((0.75, 0.4))


@pytest.mark.parametrize(
    ("points", "corners"),
    [
        ([(0, 0)], {(0, 0)}),
        ([(1, 1), (0, 0), (2, 2)], {(0, 0), (2, 2)}),
        ([(0, 0), (0, 2), (2, 0), (2, 2), (1, 1), (1, 2), (0, 0)], {(0, 0), (0, 2), (2, 0), (2, 2)}),
    ],
)
def test_a_hull_has_the_outermost_points_alone(points, corners):
    found = _hull(points)
    assert set(found) == corners and len(found) == len(corners)


def test_a_tradeoff_needs_one_point_for_each_model(tmp_path):
    with pytest.raises(ValueError, match=r"TeCoA, trained classes has no radius 2/255"):
        plot_tradeoff(tmp_path / "a.png", [make_report()], "2/255")
    with pytest.raises(ValueError, match="two reports of TeCoA, trained classes"):
        plot_tradeoff(tmp_path / "a.png", [make_report(), make_report(attack="AutoAttack")], "4/255")


@pytest.mark.parametrize(
    ("fates", "shown"),
    [
        ("ffffffffss", [0, 1, 2, 3, 8, 9]),
        ("fssssssss", [0, 1, 2, 3, 4, 5]),
        ("wfws", [1, 3, 0, 2]),
        ("www", [0, 1, 2]),
    ],
)
def test_examples_that_fell_and_that_withstood_are_chosen(fates, shown):
    """f fell, s stands, w was wrong before."""
    assert choose_examples([c != "w" for c in fates], [c == "s" for c in fates], count=6) == shown


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 224)])
def test_examples_show_what_was_changed_and_seen(channels, size, tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    images = np.random.default_rng(0).random((2, channels, size, size)).astype(np.float32) * 0.9
    adversarials = images.copy()
    adversarials[1, 0, 0, 1] += 0.1
    names = ["cat", "Staffordshire bull terrier or another long name"]
    plot_examples(tmp_path / "a.png", images, adversarials, names, names, ["cat", "dog"])
    check_layout(figures[0])
    grid = np.array(figures[0].axes).reshape(2, 3)
    assert [axis.get_title() for axis in grid[0]] == ["clean", "perturbation x 5", "adversarial"]
    shown = [[axis.images[0].get_array() for axis in row] for row in grid]
    assert np.all(shown[0][1] == 0.5)
    assert shown[1][1].reshape(size, size, -1)[0, 1, 0] == pytest.approx(1.0, abs=1e-5)
    for column, pictures in ((0, images), (2, adversarials)):
        for row, picture in zip(shown, pictures, strict=True):
            assert np.array_equal(row[column].reshape(size, size, -1), picture.transpose(1, 2, 0))
    said = [[axis.get_xlabel().replace("\n", " ") for axis in row] for row in grid]
    assert said == [["cat (right)", "", "cat (right)"], [f"{names[1]} (right)", "", "dog (WRONG)"]]
    assert [axis.get_ylabel().splitlines()[-1] for axis in grid[:, 0]] == ["withstood", "FELL"]
    assert "truth: cat" in grid[0, 0].get_ylabel()
    assert grid[0, 0].images[0].get_interpolation() == ("nearest" if size == 8 else "antialiased")


def test_examples_without_and_with_a_large_perturbation(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    images = np.zeros((1, 3, 8, 8))
    for adversarials in (images, images + 1):
        plot_examples(tmp_path / "a.png", images, adversarials, ["a"], ["a"], ["a"])
    assert [figure.axes[1].get_title() for figure in figures] == ["perturbation x 1", "perturbation x 0.5"]


@pytest.mark.parametrize(
    ("shape", "other", "names", "message"),
    [
        ((2, 3, 8, 8), (1, 3, 8, 8), 2, "one shape"),
        ((3, 8, 8), (3, 8, 8), 3, "one shape"),
        ((1, 2, 8, 8), (1, 2, 8, 8), 1, "one shape"),
        ((0, 3, 8, 8), (0, 3, 8, 8), 0, "one shape"),
        ((2, 3, 8, 8), (2, 3, 8, 8), 1, "2 images, but 1, 1 and 1"),
    ],
)
def test_examples_that_do_not_match_are_refused(shape, other, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_examples(tmp_path / "a.png", np.zeros(shape), np.zeros(other), *[["a"] * names] * 3)


@pytest.mark.parametrize("value", [-0.1, 255, float("nan")])
def test_examples_outside_the_range_are_refused(value, tmp_path):
    images = np.zeros((1, 3, 8, 8))
    for pictures in ((images + value, images), (images, images + value)):
        with pytest.raises(ValueError, match="did you normalise"):
            plot_examples(tmp_path / "a.png", *pictures, ["a"], ["a"], ["a"])


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


def test_the_plot_of_a_run_fits_its_reports(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plain, defended = defence_rows().values()
    plot(tmp_path / "a.png", plain[:1])
    plot(tmp_path / "b.png", [*plain, *defended])
    assert [figure.axes[0].get_xlabel() for figure in figures] == [
        "L-inf eps (grey levels of 255)",
        "accuracy in percent",
    ]
    assert [label.get_text() for label in figures[1].axes[0].get_yticklabels()] == ["TeCoA"]


def test_a_defended_curve_is_called_by_its_defence(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    _, defended = defence_rows().values()
    plot_accuracy(tmp_path / "a.png", defended[:1])
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[0] == f"{defended[0].name} with {defended[0].defence['name']}"


def test_a_model_has_the_colour_that_it_has_in_another_plot(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    reports = [make_report(name=name, robust_accuracy={4 / 255: 0.25}) for name in ("a", "b", "c")]
    for some in (reports, reports[2:]):
        plot_tradeoff(tmp_path / "a.png", some, "4/255", names=["a", "b", "c"])
    first, second = ({c.get_label(): c[0].get_color() for c in figure.axes[0].containers} for figure in figures)
    assert second == {"c": first["c"]} and len(set(first.values())) == 3


def test_many_models_are_told_apart(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    reports = [make_report(name=f"model {i}", robust_accuracy={4 / 255: 0.25}) for i in range(21)]
    plot_tradeoff(tmp_path / "a.png", reports, "4/255")
    lines = [container[0] for container in figures[0].axes[0].containers]
    assert len(lines) == len({(line.get_color(), line.get_marker()) for line in lines}) == 21
    assert [line.get_color() for line in lines].count(lines[0].get_color()) == 1, (
        "the first is what the others are beside"
    )


@pytest.mark.parametrize(("count", "bands"), [(MOST_BANDS, MOST_BANDS), (MOST_BANDS + 1, 0)])
def test_bands_are_drawn_where_they_can_be_told_apart(count, bands, tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot_accuracy(tmp_path / "a.png", [make_report(name=f"model {i}") for i in range(count)])
    assert len(figures[0].axes[0].collections) == bands and len(figures[0].axes[0].lines) == count + 1
