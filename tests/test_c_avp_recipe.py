"""C-AVP on the model that ships with the package: trained, saved, loaded and evaluated as a user does it."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from command_words import last_of_each
from huggingface_hub import ModelCard
from peft import PeftModel

from hf_robust_clip import (
    CAVPTrainer,
    CLIPForZeroShotClassification,
    ClipPromptConfig,
    DefendedClassifier,
    RobustClipConfig,
)
from hf_robust_clip.cli import run as run_command
from hf_robust_clip.defences.c_avp import CAVP
from hf_robust_clip.defences.ttc import TTC
from hf_robust_clip.digits_clip import digits_clip_path
from hf_robust_clip.report import load_reports
from hf_robust_clip.zero_shot_data.loading import load_image_dataset

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CONFIGS = Path(__file__).parent.parent / "recipes/configs"
WORST = "{class_path: AdaptiveWorst, init_args: {pgd_steps: 1, apgd_steps: 0, num_queries: 0}}"
FEW = "[{name: few, dataset: digits, split: test, max_images: 6}]"
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SMALL = ["--shots", "3", "--max_steps", "2", "--per_device_train_batch_size", "8", "--attack_steps", "2",
         "--evaluation.attack", "pgd-2", "--evaluation.radii", "[16/255]", "--tasks", FEW,
         "--defence_evaluation.attack", WORST, "--defence_evaluation.max_images", "4"]  # fmt: skip


def train(*words):
    AcceleratorState._reset_state(reset_partial_state=True)
    run_command("train", CONFIGS / "digits-clip/c_avp.yaml", "", last_of_each(*SMALL, *words))


def evaluate(folder, *words):
    AcceleratorState._reset_state(reset_partial_state=True)
    run_command("evaluate", CONFIGS / "evaluate.yaml", "", last_of_each(
        "--model_name_or_path", str(folder), "--tasks", FEW, "--evaluation.attack", WORST, "--evaluation.radii",
        "[16/255]", "--compare", "[]", *words))  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder as a user makes it, and what was printed."""
    folder = tmp_path_factory.mktemp("c_avp") / "out"
    with redirect_stdout(io.StringIO()) as printed:
        train("--output_dir", str(folder))
    return folder, printed.getvalue()


def test_the_table_has_blind_adaptive_and_control_rows(finished):
    folder, printed = finished
    for row in ("undefended", "CAVP-pixel", "defence_blind", "adaptive_worst", "control: static prompts"):
        assert row in printed
    reports, compared = load_reports(folder / "report.json")
    assert {report.view.name for report in reports} == {"defence_blind", "adaptive_worst"}
    assert [report.defence for report in compared] == [None]


def test_the_card_shows_code_that_runs_and_promises_no_logits(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder.parent)
    text = ModelCard.load(folder / "README.md").text
    code = text.split("```python")[1].split("```")[0].replace("logits = model(pixel_values).logits", "")
    found = {}
    exec(code, found)
    assert found["model"].classifier.class_names == CLASSES
    assert text.count("```python") == 1
    assert "class_prompts" in text
    assert "plain `CLIPModel`" not in text


def test_it_is_loaded_to_equal_predictions_and_evaluated(finished, tmp_path, capsys):
    folder, _ = finished
    defended = DefendedClassifier.from_pretrained(folder)
    assert defended.adapter == CAVP()
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = defended(images).logits
    defended.save_pretrained(tmp_path / "again")
    assert torch.equal(DefendedClassifier.from_pretrained(tmp_path / "again")(images).logits, wanted)
    evaluate(folder, "--defence", "CAVP", "--output_dir", str(tmp_path / "report"))
    (report,), _ = load_reports(tmp_path / "report/report.json")
    assert report.defence["name"] == "c_avp"
    assert report.num_images == 6
    assert "control: static prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--evaluation.attack", "pgd-2"), "class_prompts"),
        (("--defence", "CAVP", "--tasks", "[{dataset: digits, split: test, classes: [six, nine]}]"), "class_names"),
        (("--defence", "CAVP", "--model_name_or_path", "digits-clip"), "class-wise prompts"),
    ],
)
def test_evaluations_that_would_mean_something_else_are_refused(finished, words, named, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(finished[0], "--output_dir", str(tmp_path / "report"), *words)
    assert named in capsys.readouterr().err
    assert not (tmp_path / "report/report.json").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--defence", "TTC"), "defence"),
        (("--prompts.per_class", "false"), "class-wise prompts"),
        (("--objective", "TeCoA", "--compare", "[CAVP]"), "compare"),
    ],
)
def test_trainings_that_can_not_be_judged_are_refused(words, named, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train("--output_dir", str(tmp_path / "out"), *words)
    assert named in capsys.readouterr().err


def test_the_trainer_judges_by_the_prediction_while_it_trains_and_afterwards(tmp_path):
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    data = load_image_dataset("digits", "test", model.processor).first(12)
    model.set_classes(data.class_names)
    prompts = ClipPromptConfig(design="pixel", per_class=True, border_width=1)
    args = RobustClipConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=6, eps="8/255", attack_steps=1,
        attack_step_size="4/255", eval_attack_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, optim="sgd", learning_rate=0.1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="defence"):
        CAVPTrainer(model, args, peft_config=prompts, train_dataset=data, defence=TTC())
    trainer = CAVPTrainer(model, args, peft_config=prompts, train_dataset=data, eval_dataset=data)
    assert trainer.defence == CAVP()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_clean_accuracy" in entry]
    core = trainer.classifier().eval()
    images = torch.stack([data[i]["pixel_values"] for i in range(12)])
    labels = torch.tensor([data[i]["labels"] for i in range(12)])
    own = (CAVP().predict(core, images).logits.argmax(dim=1) == labels).double().mean().item()
    assert len(logs) == 2
    assert logs[-1]["eval_clean_accuracy"] == trainer.evaluate()["eval_clean_accuracy"] == pytest.approx(own)
    trainer.save_model(str(tmp_path / "saved"))
    again = DefendedClassifier.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(images).logits, CAVP().predict(core, images).logits)
    base = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    assert PeftModel.from_pretrained(base, tmp_path / "saved").active_peft_config.class_names == list(data.class_names)
