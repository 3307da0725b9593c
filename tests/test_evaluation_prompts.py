"""recipes/evaluate.py: which prompt it takes, what it calls the models, and what it says loudly."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from command_words import last_of_each

from hf_robust_clip import CLIPForZeroShotClassification, digits_clip_path
from hf_robust_clip.cli import run as run_command
from hf_robust_clip.report import load_reports, prompt_hash

CONFIG = Path(__file__).parents[1] / "recipes/configs/evaluate.yaml"
PAPER = "This is a photo of a {}"
TRAINED = "a photo of a {}."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """a/robust and b/robust, trained with other prompts, and one whose gradients vanish."""
    root = tmp_path_factory.mktemp("models")
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    for name, recipe in (("a/robust", f"template: '{TRAINED}'"), ("b/robust", "objective: TeCoA")):
        model.save_pretrained(root / name)
        (root / name / "recipe.yaml").write_text(recipe)
    with torch.no_grad():
        model.logit_scale.fill_(16.0)
    model.save_pretrained(root / "masked")
    return root


@pytest.fixture(autouse=True)
def workplace(models, monkeypatch):
    monkeypatch.chdir(models)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    shutil.rmtree("out", ignore_errors=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*words):
    few = [
        "--dataset_name",
        "digits",
        "--max_images",
        "6",
        "--evaluation.attacks",
        "pgd-1",
        "--evaluation.radii",
        "[8/255]",
    ]
    run_command("evaluate", CONFIG, "", last_of_each(*few, "--output_dir", "out", *words))
    own, others = load_reports("out/report.json")
    return [*own, *others]


def test_the_prompt_of_the_training_is_taken_and_named(capsys):
    (report,) = run("--model_name_or_path", "a/robust/")
    assert report.templates == (TRAINED,)
    names = list(report.per_class)
    assert report.prompt_hash == prompt_hash(names, [TRAINED]) != prompt_hash(names, [PAPER])
    assert report.name == "robust"
    printed = " ".join(capsys.readouterr().out.split())
    assert f'robust on digits: 6 images, PGD-1, float32, prompt "{TRAINED}"' in printed
    assert f'radii in L-inf, prompt "{TRAINED}"' in printed
    assert "NOTE" not in printed
    with open("out/report.csv") as file:
        assert {row["templates"] for row in csv.DictReader(file)} == {TRAINED}


def test_a_prompt_that_is_asked_for_goes_before_it(capsys):
    (report,) = run("--model_name_or_path", "a/robust", "--template", "one {}")
    assert report.templates == ("one {}",)
    assert f'NOTE: robust was trained with the prompt "{TRAINED}", and is evaluated with "one {{}}".' in (
        capsys.readouterr().out
    )


def test_where_nobody_says_it_the_datasets_own_is_taken(capsys):
    (report,) = run("--model_name_or_path", "digits-clip")
    assert report.templates == (PAPER,)
    assert f'prompt "{PAPER}"' in capsys.readouterr().out


def test_models_of_one_name_and_of_other_prompts_are_told_apart(capsys):
    reports = run("--model_name_or_path", "b/../a/robust/.", "--compare", "[./b/robust/]", "--reference", "b/robust")
    assert [report.name for report in reports] == ["a/robust", "b/robust"]
    assert [report.templates for report in reports] == [(TRAINED,)] * 2
    printed = capsys.readouterr().out
    for name in ("a/robust", "b/robust"):
        assert f"{name} on digits" in printed
        assert f"\n  {name} " in printed
    assert f'NOTE: b/robust was trained with the prompt "{PAPER}", and is evaluated with "{TRAINED}".' in printed
    assert "NOTE: a/robust" not in printed
    assert "self-check" in printed


def test_a_blind_attack_is_told_loudly(capsys):
    seeing, masked = run("--model_name_or_path", "a/robust", "--compare", "[masked]")
    assert seeing.zero_gradient_share < 0.05 < masked.zero_gradient_share
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert f"PGD-1 on masked, digits: {100 * masked.zero_gradient_share:.1f} %" in line
    assert "on robust" not in line


def test_the_folder_of_an_adapter_is_not_written_to(capsys):
    Path("adapter").mkdir(exist_ok=True)
    Path("adapter/adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(SystemExit):
        run("--output_dir", "adapter", "--overwrite")
    assert "output_dir='adapter'" in capsys.readouterr().err
