import csv
import json
from dataclasses import MISSING, asdict, fields, replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rich.console import Console

from hf_robust_clip.report.report import (
    RobustnessReport,
    blind_warning,
    defence_cells,
    defence_table,
    load_reports,
    plot_accuracy,
    plot_defences,
    plot_examples,
    plot_tradeoff,
    prompt_hash,
    save_csv,
    save_reports,
    templates_told,
    to_table,
    wilson_interval,
)

PER_CLASS = {"cat": (20, 19, 5), "dog": (20, 17, 5)}
FIELDS = [field.name for field in fields(RobustnessReport) if field.default is MISSING]


def make_defence(radii=(1 / 255, 4 / 255), **changes) -> dict:
    """What a report says of a defence, with its controls at these radii."""
    accuracies = {"static prompts": 0.5, "random prompts": 0.25, "ensemble-64": 0.75}
    controls = {name: {"clean": 0.8, "robust": dict.fromkeys(radii, value)} for name, value in accuracies.items()}
    values = dict(
        name="tapt",
        parameters={"num_views": 64, "statistics": None},
        traits={"randomised": True, "optimising": True, "episodic": True},
        tuned=13824,
        controls=controls,
        fallbacks=0,
        ms_per_image=12.5,
    )
    return {**values, **changes}


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
        zero_gradient_share=0.0125,
        seed=0,
        precision="float32",
        library_versions={"torch": "2.0"},
        hardware="CPU",
    )
    if "robust_accuracy" in changes:  # whose keys may be texts
        changes = {"after_each": {r: {"pgd": v} for r, v in changes["robust_accuracy"].items()}, **changes}
    values.update(changes)
    if "per_class" not in changes:  # as many right in all as the accuracies say
        n, robust = values["num_images"], values["robust_accuracy"][max(values["robust_accuracy"], key=float)]
        clean, robust = round(n * values["clean_accuracy"]), round(n * robust)
        half = n // 2
        values["per_class"] = {
            "cat": (half, min(half, clean), min(half, robust)),
            "dog": (n - half, max(0, clean - half), max(0, robust - half)),
        }
    return RobustnessReport(**values)


def spoilt(value: float) -> dict:
    """A defence with an impossible control."""
    defence = make_defence()
    defence["controls"]["ensemble-64"]["robust"][1 / 255] = value
    return defence


# ---- JSON


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
        ({"attack_target": "adaptive"}, "attack on a test-time defence; defence is missing"),
        ({"defence": make_defence()}, "attack_target='static' says nothing of tapt"),
        ({"attack_target": "bpda", "defence": {}}, "defence lacks controls, fallbacks, ms_per_image, name"),
        (
            {"attack_target": "bpda", "defence": make_defence(controls={"static prompts": {"robust": {}}})},
            r"defence\['controls'\] lacks random prompts, ensemble-64",
        ),
        ({"attack_target": "bpda", "defence": make_defence(radii=[0.1])}, r"'static prompts' has the radii \[0.1\]"),
        (
            {"attack_target": "bpda", "defence": spoilt(2.0)},
            r"accuracy of 'ensemble-64' at 0.0039.*=2.0 must be in \[0, 1\]",
        ),
        ({"num_images": 0, "per_class": {"cat": (0, 0, 0)}}, "nothing was evaluated"),
        ({"norm": "l7"}, "norm='l7' is unknown"),
        ({"robust_accuracy": {4.0: 0.5}}, "covers the whole pixel range"),
        ({"clean_accuracy": 1.01, "per_class": PER_CLASS}, r"clean_accuracy=1.01 must be in \[0, 1\]"),
        ({"clean_accuracy": float("nan"), "per_class": PER_CLASS}, r"clean_accuracy=nan must be in \[0, 1\]"),
        ({"robust_accuracy": {0.1: 0.5, 0.2: -0.1}, "per_class": PER_CLASS}, r"robust_accuracy\[0.2\]=-0.1 must"),
        ({"zero_gradient_share": 40}, "zero_gradient_share=40 must"),
        ({"after_each": {1 / 255: {"a": 2, "b": 0.7}, 4 / 255: {"b": 0.25}}}, r"after_each.*'a'\]=2 must"),
        ({"after_each": {1 / 255: {"b": 0.7}, 4 / 255: {"b": 0.7}}}, "doesn't end with the robust accuracy"),
        ({"after_each": {1 / 255: {}, 4 / 255: {"b": 0.25}}}, "doesn't end with the robust accuracy"),
        ({"after_each": {1 / 255: {"b": 0.7}}}, "after_each has the radii"),
        ({"per_class": {"cat": (20, 19, 5), "dog": (19, 17, 5)}}, "counts 39 images, num_images is 40"),
        ({"per_class": {"cat": (20, 18, 5), "dog": (20, 17, 5)}}, "counts 35 of 40 correct clean, .* is 0.9"),
        ({"per_class": {"cat": (20, 19, 6), "dog": (20, 17, 5)}}, "counts 11 of 40 correct at the largest.* is 0.25"),
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
        ("trained, clean, n=40", "accuracy", 0.9),
        ("trained, PGD-20 L-inf eps=1/255, n=40", "robust_accuracy", 0.7),
        ("trained, PGD-20 L-inf eps=4/255, n=40", "robust_accuracy", 0.25),
    ]
    assert rows[2].metric_args["eps"] == 4 / 255
    assert rows[2].metric_args["step_size"] == 0.2
    assert rows[2].metric_args["attack_target"] == "static"
    assert rows[0].metric_args is None


def test_eval_results_tell_attacks_targets_and_numbers_of_images_apart():
    reports = [
        make_report(),
        make_report(attack="AutoAttack", attack_parameters={"version": "standard", "step_size": 0.5}),
        make_report(attack_target="adaptive", defence=make_defence()),
        make_report(num_images=20),
    ]
    rows = [row for report in reports for row in report.to_eval_results()]
    robust = [row for row in rows if row.metric_type == "robust_accuracy"]
    assert len({row.unique_identifier for row in robust}) == len(robust) == 8
    assert robust[3].metric_args["step_size"] == 0.5
    configs = [row.dataset_config for row in rows]
    assert "trained classes, tapt, PGD-20 (adaptive) L-inf eps=1/255, n=40" in configs
    assert "trained classes, tapt, clean, n=40" in configs
    assert [row.metric_args.get("defence") for row in robust[3:6]] == [None, "tapt", "tapt"]
    assert {row.metric_value for row in rows if row.dataset_config == "trained classes, clean, n=20"} == {0.9}


def test_attack_parameters_are_as_a_file_gives_them_back():
    members = make_report(attack_parameters={"members": ("a", "b")}).attack_parameters
    assert members == {"members": ["a", "b"]}
    with pytest.raises(TypeError, match="JSON"):
        make_report(attack_parameters={"loss": object()})


# ---- CSV, table and plots


def test_csv_has_a_line_for_each_report_and_radius(tmp_path):
    reports = [make_report(task='in, "out"'), make_report(name="naïve", robust_accuracy={0.5: 0.125}, norm="l2")]
    save_csv(tmp_path / "a.csv", reports)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scalars = {name for name in FIELDS if not isinstance(getattr(reports[0], name), dict)}
    figures = {"radius", "robust_accuracy", "clean_low", "clean_high", "robust_low", "robust_high"}
    assert set(rows[0]) == scalars | figures
    assert [(row["name"], row["task"], float(row["radius"]), float(row["robust_accuracy"])) for row in rows] == [
        ("TeCoA", 'in, "out"', 1 / 255, 0.7),
        ("TeCoA", 'in, "out"', 4 / 255, 0.25),
        ("naïve", "trained classes", 0.5, 0.125),
    ]
    last = {key: float(rows[1][key]) for key in ("clean_low", "clean_high", "robust_low", "robust_high")}
    assert tuple(last.values()) == pytest.approx(wilson_interval(36, 40) + wilson_interval(10, 40))
    assert {row["attack_target"] for row in rows} == {"static"}
    save_csv(tmp_path / "c.csv", [reports[0], make_report(attack_target="bpda", defence=make_defence())])
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        found = [(row["defence"], row["attack_target"]) for row in csv.DictReader(file)]
    assert found == [("", "static")] * 2 + [("tapt", "bpda")] * 2
    with pytest.raises(ValueError, match="reports is empty"):
        save_csv(tmp_path / "b.csv", [])
    assert not (tmp_path / "b.csv").exists()


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


@pytest.mark.parametrize("norms", [(), ("l2", "linf")])
def test_a_table_and_a_panel_hold_one_norm(norms, tmp_path):
    reports = {norm: make_report(norm=norm, name=norm) for norm in norms}
    for make in (
        lambda: to_table(list(reports.values()), "t"),
        lambda: plot_tradeoff(tmp_path / "a.png", list(reports.values()), "4/255"),
        lambda: plot_accuracy(tmp_path / "a.png", {"task": reports}),
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
    plot_accuracy(tmp_path / "a.png", panels)
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
    plot_accuracy(
        tmp_path / "a.png", {"trained": {"TeCoA": report} | {f"a rather long name {i}": report for i in "abcdefg"}}
    )
    plot_accuracy(tmp_path / "b.png", {task: {"PGD": report, "AA": auto} for task in "abcd"})
    for figure, panels in zip(figures, (1, 4), strict=True):
        check_layout(figure)
        assert len(figure.axes) == panels
        assert figure.axes[0].bbox.height > 0.5 * figure.axes[0].bbox.width
    assert figures[1].axes[0].get_ylabel() == "accuracy under attack"
    assert figures[1].axes[0].get_title() == "a\nn = 20 to 40"
    assert ("L-inf" if norm == "linf" else "L2") in figures[0].axes[0].get_xlabel()
    assert figures[0].axes[0].lines[0].get_xdata()[-1] == (127.5 if norm == "linf" else 0.5)
    with pytest.raises(ValueError, match="no panels"):
        plot_accuracy(tmp_path / "c.png", {})


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


def test_a_tradeoff_needs_one_point_for_each_model(tmp_path):
    with pytest.raises(ValueError, match=r"TeCoA, trained classes has no radius 2/255"):
        plot_tradeoff(tmp_path / "a.png", [make_report()], "2/255")
    with pytest.raises(ValueError, match="two reports of TeCoA, trained classes"):
        plot_tradeoff(tmp_path / "a.png", [make_report(), make_report(attack="AutoAttack")], "4/255")


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


# ---- prompts and blind attacks


def test_templates_go_through_json_csv_and_the_table(tmp_path):
    told = make_report(templates=["a {}"])
    save_reports(tmp_path / "report.json", [told], [make_report(name="other")])
    (own,), (other,) = load_reports(tmp_path / "report.json")
    assert (own.templates, other.templates) == (("a {}",), None)
    assert own == told
    assert "templates" not in json.loads((tmp_path / "report.json").read_text())["compared"][0]
    save_csv(tmp_path / "report.csv", [own, other])
    with (tmp_path / "report.csv").open() as file:
        assert [row["templates"] for row in csv.DictReader(file)] == ["a {}", "a {}", "", ""]
    shown = to_table([own], "title").caption
    assert "PGD-20" in shown
    assert 'prompt "a {}"' in shown


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
