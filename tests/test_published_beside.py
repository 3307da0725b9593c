"""`evaluate --published`: measured and published figures beside each other, and refusals of what can't be compared."""

import contextlib
import csv
import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features
from datasets import Image as Picture
from PIL import Image

from hf_robust_clip.command_line import packaged_config
from hf_robust_clip.digits_clip import digits_clip_path
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs import evaluate, published
from hf_robust_clip.runs.published import architecture_of, with_model
from hf_robust_clip.zero_shot_data.rows import DATA_ROOT_VARIABLE


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


DIGITS = (2, 8, 64, 3)  # the embedded model's architecture
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """One picture under CIFAR-10's id, once with each label: a model is right on one of them."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "uoft-cs/cifar10"
    folder.mkdir(parents=True)
    pictures = [Image.new("RGB", (32, 32), (80, 160, 90))] * len(NAMES)
    features = Features({"img": Picture(), "label": ClassLabel(names=NAMES)})
    rows = Dataset.from_dict({"img": pictures, "label": list(range(len(NAMES)))}, features=features)
    rows.to_parquet(str(folder / "test-00000-of-00001.parquet"))
    return root


def read(*words, folder="out"):
    own = ["--output_dir", str(folder), "--evaluation.radii", "[1/255]", "--evaluation.attack", "pgd-100", *words]
    keys = [word for word in own if word.startswith("--")]
    last = [i for i, word in enumerate(own) if word.startswith("--") and word not in own[i + 1 :]]
    kept = [part for i in last for part in own[i : i + 2]]
    assert len(kept) == 2 * len(set(keys))
    return evaluate.read(kept, packaged_config("evaluate"))


@pytest.fixture(scope="module")
def compared(data_root, tmp_path_factory):
    """What a run prints and leaves whose model is taken for a ViT-B/32."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    tasks = "[{dataset: cifar10, max_images: 9}, {dataset: digits, max_images: 3}]"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv(DATA_ROOT_VARIABLE, str(data_root))
        patch.setitem(published.ARCHITECTURES, "ViT-B/32", DIGITS)
        patch.setattr(evaluate, "draw", lambda prepared, measured: None)  # plots take seconds
        patch.setattr(evaluate.evaluation, "adversarial_examples", lambda *about: ())
        words = ["--evaluation.radii", "[1/1020, 1/255]", "--tasks", tasks, "--published", "pmg_aft"]
        AcceleratorState._reset_state(reset_partial_state=True)
        evaluate.evaluate(read(*words, folder=folder))
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder, printed.getvalue()


def test_measured_published_and_difference_stand_beside_each_other(compared):
    folder, printed = compared
    reports, _ = load_reports(folder / "report.json")
    (report,) = [own for own in reports if own.task == "cifar10"]
    assert report.clean_accuracy > 0
    with (folder / "published.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = {row["metric"]: row for row in rows}
    assert [row["attack"] for row in rows] == ["", "pgd-100"]  # AutoAttack is published too, and wasn't run
    for metric, value, measured in (("clean", 74.62, report.clean_accuracy),
                                    ("robust", 46.01, report.robust_accuracy[1 / 255])):  # fmt: skip
        row = told[metric]
        assert float(row["published_value"]) == value
        assert float(row["measured"]) == pytest.approx(100 * measured)
        assert float(row["difference"]) == pytest.approx(100 * measured - value)
        assert row["dataset"] == "cifar10"
    assert "74.62" in printed and "46.01" in printed and f"{100 * report.clean_accuracy - 74.62:+.1f}" in printed


def test_what_differs_is_named_below_the_table(compared):
    folder, printed = compared
    for part in ("n=9 of 10", "attacked at 8 px, not 32", "not in the published table: digits", "TGA-ZSR paper",
                 "method not noted", "withstood 0.0009804 too", "published, not measured: aircraft",
                 "a set of 10 images, in papers 10000"):  # fmt: skip
        assert part in printed, part
    text = (folder / "published.csv").read_text()
    assert "n=9 of 10" in text and "withstood 0.0009804 too" in text


REFUSED = [  # flags, and what the line names
    (["--evaluation.radii", "[4/255]"], "eps 4/255, published 1/255"),
    (["--evaluation.attack", "pgd-20"], "attack PGD-20, published PGD-100"),
    (["--evaluation.norm", "l2", "--evaluation.radii", "[0.5]"], "norm l2, published linf"),
    (["--evaluation.attack", "{class_path: AutoAttack, init_args: {num_steps: 5}}"], "num_steps 5, published 100"),
    (["--published", "tapt/tapt_vli", "--dataset_name", "dtd"], "test-time defence none, published TAPT"),
    (["--defence", "TTC"], "test-time defence ttc, published none"),
    (["--published", "pmg-eft"], "published='pmg-eft' is unknown"),
    (["--published", "ucat/pmg_aft"], "published='ucat/pmg_aft' has no figure of a single dataset"),
    (["--dataset_name", "digits"], "published='pmg_aft' has no figures of digits"),
    (["--tasks", "[{dataset: cifar10, name: a}, {dataset: cifar10, name: b}]"], "one figure of cifar10.*a, b"),
]


@pytest.mark.parametrize(("words", "line"), REFUSED)
def test_another_setting_is_refused_in_one_line_before_anything_is_read(words, line, tmp_path):
    own = ["--published", "pmg_aft", *([] if "--tasks" in words else ["--dataset_name", "cifar10"])]
    with pytest.raises(ValueError, match=line) as raised:
        read(*own, *words, folder=tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_asked_to_show_it_anyway_a_run_is_taken_with_what_differs():
    words = ["--evaluation.attack", "pgd-20", "--dataset_name", "cifar10", "--published", "pmg_aft"]
    comparison = read(*words, "--published_anyway", "true").comparison
    assert [beside.differences for beside in comparison.pairs] == [
        (),
        ("attack PGD-20, published PGD-100",),
        ("attack PGD-20, published AutoAttack",),
    ]
    with pytest.raises(ValueError, match="published_anyway"):
        read("--dataset_name", "cifar10", "--published_anyway", "true")


def test_the_attack_that_differs_least_stands_beside():
    words = ["--evaluation.radii", "[2/255, 1/255]", "--dataset_name", "cifar10", "--published", "pmg_aft"]
    comparison = read(*words).comparison
    assert [(own.column.metric, own.eps) for own in comparison.pairs] == [("clean", 0), ("robust", 1 / 255)]


def test_another_model_is_refused_before_anything_is_attacked(tmp_path, monkeypatch):
    run = read("--dataset_name", "cifar10", "--published", "pmg_aft", folder=tmp_path / "out")
    with pytest.raises(ValueError, match=r"model clip with patches of 2 px.*published ViT-B/32 with quick_gelu"):
        evaluate.prepare(run)
    assert list(tmp_path.iterdir()) == []
    anyway = with_model(replace(run.comparison, anyway=True), "digits-clip", None)
    assert anyway.of_model[0].startswith("model clip with patches of 2 px")
    monkeypatch.setitem(published.ARCHITECTURES, "ViT-B/32", DIGITS)
    assert with_model(run.comparison, "digits-clip", None).of_model == (
        "method not noted in the checkpoint, published PMG-AFT",
    )


def test_another_activation_or_method_is_another_model(tmp_path, monkeypatch):
    """A LAION CLIP has the sizes of OpenAI's."""
    comparison = read("--dataset_name", "cifar10", "--published", "pmg_aft").comparison
    monkeypatch.setitem(published.ARCHITECTURES, "ViT-B/32", DIGITS)
    folder = tmp_path / "model"
    shutil.copytree(digits_clip_path(), folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    (folder / "recipe.yaml").write_text("objective: {class_path: hf_robust_clip.objectives.pmg_aft.PMGAFT}\n")
    assert with_model(comparison, str(folder), None).of_model == ()
    for setting, line in (("dataset_name: imagenet", "trained on imagenet, published tiny_imagenet"),
                          ("eps: 4/255", "trained at eps 4/255, published 1/255")):  # fmt: skip
        (folder / "recipe.yaml").write_text(f"objective: PMGAFT\n{setting}\n")
        with pytest.raises(ValueError, match=line):
            with_model(comparison, str(folder), None)
    (folder / "recipe.yaml").write_text(
        "objective: PMGAFT\ndataset_name: zh-plus/tiny-imagenet\neps: 0.00392156862745098\n"
    )
    assert with_model(comparison, str(folder), None).of_model == ()
    (folder / "recipe.yaml").write_text("objective: TeCoA\n")
    with pytest.raises(ValueError, match="method TeCoA, published PMG-AFT"):
        with_model(comparison, str(folder), None)
    (folder / "recipe.yaml").unlink()
    config = Path(folder, "config.json")
    config.write_text(config.read_text().replace("quick_gelu", "gelu"))
    assert architecture_of(str(folder)) == "ViT-B/32 with gelu"
    with pytest.raises(ValueError, match="ViT-B/32 with gelu, published ViT-B/32 with quick_gelu"):
        with_model(comparison, str(folder), None)


def test_prompts_of_another_design_are_another_model(monkeypatch):
    monkeypatch.setitem(published.ARCHITECTURES, "ViT-B/16", DIGITS)
    comparison = read("--dataset_name", "dtd", "--published", "tapt/apt_vli").comparison
    with pytest.raises(ValueError, match="prompts of design none, published VLI"):
        with_model(comparison, "digits-clip", None)


def test_an_undefended_model_is_known_by_its_name(monkeypatch):
    comparison = read("--dataset_name", "cifar10", "--published", "pmg_aft").comparison
    monkeypatch.setattr(published, "architecture_of", lambda name, revision: "ViT-B/32 with quick_gelu")
    monkeypatch.setattr(published, "adapter_config", lambda name, revision: None)
    with pytest.raises(ValueError, match="method none, published PMG-AFT"):
        with_model(comparison, "openai/clip-vit-base-patch32", None)
