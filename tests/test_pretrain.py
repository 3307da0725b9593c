"""The recipe that made the embedded model makes it again, as accurate."""

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import CLIPModel

from hf_robust_clip import (
    CLIPForZeroShotClassification,
    EvaluationSettings,
    digits_clip_path,
    evaluate_robustness,
    load_image_dataset,
)
from hf_robust_clip.report import regenerate_card

RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE = [str(RECIPES / "pretrain.py"), "--config", str(RECIPES / "configs/digits-clip/pretrain.yaml")]


@pytest.fixture
def run(fresh_accelerate, monkeypatch) -> Callable[..., None]:
    """Runs the script in this process as its main module."""

    def start(folder: Path, *flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [*RECIPE, "--output_dir", str(folder), *flags])
        AcceleratorState._reset_state(reset_partial_state=True)
        runpy.run_path(RECIPE[0], run_name="__main__")

    return start


def accuracy(folder: str) -> tuple[float, float]:
    model = CLIPForZeroShotClassification.from_pretrained(folder).eval()
    data = load_image_dataset("digits", "test", model.require_processor())
    model.set_classes(data.class_names)
    report = evaluate_robustness(
        model, data, EvaluationSettings(["24/255"]), name="undefended", task="all digits", model_id=folder
    )
    return report.clean_accuracy, report.robust_accuracy[24 / 255]


def test_the_embedded_model_is_accurate_small_and_undefended():
    files = [file for file in Path(digits_clip_path()).iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3_000_000
    clean, robust = accuracy(digits_clip_path())
    assert clean >= 0.98
    assert robust < 0.05


@pytest.mark.slow
def test_pretraining_again_is_as_accurate(run, tmp_path):
    run(tmp_path / "model")
    shipped, again = accuracy(digits_clip_path()), accuracy(str(tmp_path / "model"))
    assert abs(again[0] - shipped[0]) <= 0.01
    assert again[1] < 0.05


def test_a_few_steps_leave_a_checkpoint_and_going_on_changes_nothing(run, tmp_path, capsys):
    """Two cycles of two updates; a second run finds both done, and a third one again the last."""

    def weights():
        run(tmp_path, "--steps", "[2, 2]", "--learning_rate", "[1e-3, 1e-4]")
        assert "zero-shot accuracy on 500 test pictures of digits:" in capsys.readouterr().out
        return load_file(tmp_path / "model.safetensors")

    first = weights()
    assert {folder.name for folder in tmp_path.glob("*/checkpoint-*")} == {"checkpoint-2"}
    shutil.rmtree(tmp_path / "cycle-2")
    again = weights()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    CLIPModel.from_pretrained(tmp_path)
    card, recipe = ((tmp_path / name).read_text() for name in ("README.md", "recipe.yaml"))
    assert str(regenerate_card(tmp_path)) == card
    assert "trained from random weights" in card and "fine-tuned" not in card
    assert str(tmp_path) not in card + recipe


def test_a_checkpoint_in_half_precision_is_read_as_float32(run, tmp_path):
    for name, flags in (("whole", ()), ("half", ("--float16", "true"))):
        run(tmp_path / name, "--steps", "1", *flags)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in whole.items())
    for family in (CLIPModel, CLIPForZeroShotClassification):
        assert family.from_pretrained(tmp_path / "half").dtype == torch.float32


REFUSED = [
    ("captions", '["a {}", "a picture"]', "a picture"),
    ("captions", '["{0} {1}"]', "{0} {1}"),
    ("steps", "[2, 2]", "learning_rate"),
    ("shift", "-1", "shift=-1"),
    ("width", "15", "width=15"),
    ("text_heads", "3", "text_heads=3"),
    ("image_size", "9", "image_size=9"),
    ("context_length", "8", "tokens"),
    ("sources", "[{dataset: digits, per_batch: 0}]", "per_batch=0"),
    ("sources", "[{dataset: digits, per_batch: 8, split: 'train+test[:9]'}]", "split='train+test[:9]'"),
]


@pytest.mark.parametrize(("name", "value", "told"), REFUSED)
def test_what_would_train_something_else_is_refused_before(name, value, told, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "model", f"--{name}", value)
    assert ended.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "model").exists()
