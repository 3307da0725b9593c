"""The recipe that made the embedded model makes it again, as accurate."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_robust_clip import (
    CLIPForZeroShotClassification,
    EvaluationSettings,
    digits_clip_path,
    evaluate_robustness,
    load_image_dataset,
)

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain_digits.py"


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
def test_pretraining_again_is_as_accurate(tmp_path):
    subprocess.run([sys.executable, str(RECIPE), "--output_dir", str(tmp_path / "model")], check=True)
    shipped, again = accuracy(digits_clip_path()), accuracy(str(tmp_path / "model"))
    assert abs(again[0] - shipped[0]) <= 0.01
    assert again[1] < 0.05
