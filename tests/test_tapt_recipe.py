"""`recipes/tapt.py` end to end on the model that ships with the package, and what its folder can be used for."""

import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from command_words import last_of_each
from huggingface_hub import ModelCard

from hf_robust_clip import TAPT
from hf_robust_clip.cli import run as run_command
from hf_robust_clip.report import CONTROLS, load_reports
from hf_robust_clip.runs.evaluate import read
from hf_robust_clip.runs.fitting import with_statistics
from hf_robust_clip.runs.shared import load_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes/configs"
WORST = "{class_path: AdaptiveWorst, init_args: {pgd_steps: 1, apgd_steps: 0, num_queries: 0}}"
SMALL = ["--shots", "3", "--max_steps", "2", "--per_device_train_batch_size", "8",
         "--learning_rate", "1.0", "--evaluation.attack", "pgd-2", "--evaluation.radii", "[16/255]",
         "--tasks", "[{name: few, dataset: digits, split: test, max_images: 8}]", "--defence.num_views", "8",
         "--defence.selected", "0.25", "--fit_images", "20", "--defence_evaluation.attack", WORST,
         "--defence_evaluation.max_images", "4"]  # fmt: skip


def run(*words):
    AcceleratorState._reset_state(reset_partial_state=True)
    run_command("train", CONFIGS / "digits-clip/tapt.yaml", "", last_of_each(*SMALL, *words))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A defence as a user makes it: (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("tapt") / "out"
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["tapt.py", *SMALL, "--output_dir", str(folder)])
        runpy.run_path(str(ROOT / "recipes/tapt.py"), run_name="__main__")
    return folder, printed.getvalue()


def test_it_prints_the_defence_beside_its_controls(finished):
    folder, printed = finished
    for row in ("undefended", "APT-VLI ", "TAPT-VLI paper", "TAPT-VLI released"):
        assert row in printed
    for column in ("clean", "blind", "PGD-2", "adaptive_worst", "static", "random", "ensemble-64", "ms"):
        assert column in printed
    assert f'DefendedClassifier.from_pretrained("{folder}")' in printed
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "statistics.safetensors",
        "adaptation.json",
        "report.json",
        "README.md",
    }


def test_reports_say_what_was_attacked(finished):
    own, compared = load_reports(finished[0] / "report.json")
    assert [(r.name, r.attack_target, r.num_images) for r in own] == [
        ("TAPT-VLI paper", "defence_blind", 4),
        ("TAPT-VLI paper", "adaptive_worst", 4),
    ]
    assert [(r.name, r.attack_target, r.num_images) for r in compared] == [
        ("undefended", "static", 8),
        ("APT-VLI", "static", 8),
        ("TAPT-VLI released", "defence_blind", 4),
        ("TAPT-VLI released", "adaptive_worst", 4),
    ]
    blind, worst = own
    assert worst.robust_accuracy[16 / 255] <= blind.robust_accuracy[16 / 255]
    assert set(blind.controls) == set(CONTROLS)
    assert blind.defence["parameters"]["reset_to"] == "trained"
    assert compared[-1].defence["parameters"]["reset_to"] == "released"


def test_the_folder_restores_the_defence_and_its_static_prompts(finished):
    folder, _ = finished
    assert str(ROOT) not in (folder / "adaptation.json").read_text() + (folder / "adapter_config.json").read_text()
    restored = TAPT.from_pretrained(folder)
    assert (restored.adapter.num_views, restored.adapter.reset_to) == (8, "trained")
    assert restored.adapter.targets.adversarial.count == restored.adapter.targets.clean.count == 20
    static = load_model(str(folder))
    static.set_classes(restored.classifier.class_names, restored.classifier.templates)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(static(images).logits, restored.classifier(images).logits)
    assert (restored(images).logits - static(images).logits).abs().max() > 1e-4


def test_the_card_names_the_method(finished):
    card = ModelCard.load(finished[0] / "README.md")
    assert "tapt" in card.data.tags
    assert "20 images of digits" in card.text
    assert json.loads((finished[0] / "adaptation.json").read_text())["method"] == "tapt"


def test_figures_that_no_attack_through_the_defence_stands_beside_are_told(capsys):
    words = ["--dataset_name", "digits", "--max_images", "2", "--evaluation.attack", "pgd-1", "--evaluation.radii",
             "[16/255]", "--defence", "Ensemble", "--defence.num_views", "2", "--output_dir", "blind"]  # fmt: skip
    run_command("evaluate", CONFIGS / "evaluate.yaml", "", words)
    assert "no attack went through the defence" in capsys.readouterr().out
    assert not Path("blind/examples.png").exists(), "of the classifier without its defence"


def test_a_saved_defence_is_evaluated_by_the_evaluation_recipe(finished, capsys):
    words = ["--model_name_or_path", finished[0], "--dataset_name", "digits", "--max_images", "2",
             "--evaluation.attacks", f"[pgd-1, {WORST}]",
             "--evaluation.radii", "[16/255]", "--output_dir", "again", "--defence", "tapt"]  # fmt: skip
    run_command("evaluate", CONFIGS / "evaluate.yaml", "", [*map(str, words)])
    assert "no attack went through the defence" not in capsys.readouterr().out
    own, _ = load_reports("again/report.json")
    saved = json.loads((finished[0] / "adaptation.json").read_text())["parameters"]
    assert (saved["num_views"], saved["selected"]) == (8, 0.25)
    for report, target in zip(own, ("defence_blind", "adaptive_worst"), strict=True):
        assert report.attack_target == target
        assert report.templates == ("a photo of a {}.",), "that of the training"
        assert {name: report.defence["parameters"][name] for name in saved} == saved


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--defence.num_views", "20"], {"num_views": 20, "selected": 0.25, "reset_to": "trained"}),
        (["--defence.preset", "released", "--defence.num_views", "20"], {"num_views": 20, "selected": 0.1}),
    ],
)
def test_what_is_asked_of_a_saved_defence_goes_before_what_was_saved(finished, words, expected):
    words = ["--model_name_or_path", finished[0], "--defence", "tapt", *words, "--output_dir", "again"]
    evaluation = read([*map(str, words)], CONFIGS / "evaluate.yaml")
    found = with_statistics(evaluation, str(finished[0]), None).parameters()
    assert {name: found[name] for name in expected} == expected
    assert found["statistics"]["num_images"] == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--defence.selected", "0.01"], "selected=0.01"),
        (["--defence.preset", "best"], "defence.preset='best'"),
        (["--prompts.vision_depth", "9"], "vision_depth=9 is more than the tower's 3 layers"),
    ],
)
def test_wrong_setting_ends_with_one_line_and_writes_nothing(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--output_dir", "out", *words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not Path("out").exists()
