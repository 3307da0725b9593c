"""`recipes/apt.py` end to end on the model that ships with the package, and what its adapter can be used for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from command_words import last_of_each
from huggingface_hub import ModelCard
from peft import PeftModel

from hf_robust_clip import CLIPForZeroShotClassification, digits_clip_path
from hf_robust_clip.cli import run as run_command
from hf_robust_clip.report import load_reports, regenerate_card
from hf_robust_clip.runs.shared import load_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes/configs"
SMALL = ["--shots", "3", "--max_steps", "2", "--logging_steps", "1",
         "--per_device_train_batch_size", "8", "--evaluation.attack", "pgd-2",
         "--evaluation.radii", "[16/255]", "--tasks", "[{name: few, dataset: digits, split: test, max_images: 20}]",
         "--learning_rate", "1.0"]  # fmt: skip


def run(*words):
    AcceleratorState._reset_state(reset_partial_state=True)
    run_command("train", CONFIGS / "digits-clip/apt.yaml", "", last_of_each(*SMALL, *words))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An adapter as a user makes it, with the control beside it: (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("apt") / "out"
    command = [sys.executable, ROOT / "recipes/apt.py", *SMALL, "--compare", "coop", "--output_dir", folder]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_it_prints_before_and_after_and_saves_a_small_adapter(finished):
    folder, printed = finished
    for row in ("\nfew under ", "\n  undefended ", "\n  CoOp ", "\n  APT-VLI "):
        assert row in printed
    assert "PeftModel.from_pretrained" in printed
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "report.json", "recipe.yaml"}
    assert not names & {"config.json", "model.safetensors", "training_args.bin"}
    assert (folder / "adapter_model.safetensors").stat().st_size < 200_000
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "digits-clip"
    assert str(ROOT) not in (folder / "adapter_config.json").read_text()


def test_the_card_says_how_to_load_it_and_its_code_runs(finished, monkeypatch):
    folder, _ = finished
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert {"adapter", "apt"} <= set(card.data.tags)
    assert "KeyError: 'CLIP_PROMPT'" in card.text
    assert "design VLI, 2 vision tokens in 3 layers, 2 text tokens in 3 layers" in card.text
    assert "with 768 parameters" in card.text  # 64 wide: 2 tokens in 3 layers of each tower
    assert "| trainable parameters | 768 |" in card.text
    assert "| data | digits, split train, 30 images of 10 classes" in card.text
    assert "an image encoder" not in card.text
    assert str(regenerate_card(folder)) == (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    scope = {"pixel_values": torch.rand(2, 3, 8, 8)}
    monkeypatch.chdir(folder.parent)  # a card names no place on a disk
    exec(compile(code, "card", "exec"), scope)
    assert scope["logits"].shape == (2, 3)


def test_the_figures_are_those_of_the_saved_adapter(finished):
    folder, _ = finished
    own, compared = load_reports(folder / "report.json")
    assert [(r.name, r.num_images) for r in own] == [("APT-VLI", 20)]
    assert [r.name for r in compared] == ["undefended", "CoOp"]
    again = Path("again")
    words = ["--model_name_or_path", folder, "--dataset_name", "digits", "--max_images", "20", "--evaluation.attacks",
             "pgd-2", "--evaluation.radii", "[16/255]", "--template", "a photo of a {}.", "--output_dir", again,
             "--compare", "digits-clip"]  # fmt: skip
    run_command("evaluate", CONFIGS / "evaluate.yaml", "", [*map(str, words)])
    found, others = load_reports(again / "report.json")
    assert (found[0].clean_accuracy, found[0].robust_accuracy) == (own[0].clean_accuracy, own[0].robust_accuracy)
    assert others[0].clean_accuracy == compared[0].clean_accuracy
    assert found[0].model == str(folder)


def test_an_adapter_is_loaded_on_its_base(finished):
    folder, _ = finished
    found = load_model(str(folder))
    base = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).eval()
    wanted = PeftModel.from_pretrained(
        CLIPForZeroShotClassification.from_pretrained(digits_clip_path()), folder
    ).eval()
    images = torch.rand(3, 3, 8, 8)
    for model in (found, base, wanted):
        model.set_classes(["zero", "one", "two"], "a photo of a {}.")
    assert torch.equal(found(images).logits, wanted(pixel_values=images).logits)
    assert (found(images).logits - base(images).logits).abs().max() > 1e-3


def test_a_recipe_does_not_start_from_an_adapter(finished, capsys):
    with pytest.raises(SystemExit):
        run("--output_dir", "out", "--model_name_or_path", finished[0])
    assert "is an adapter; name the model that it stands on" in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_saved_recipe_gives_the_same_adapter(finished):
    folder, _ = finished
    words = ["--config", str(folder / "recipe.yaml"), "--output_dir", "again", "--compare", "[]"]
    run_command("train", CONFIGS / "digits-clip/apt.yaml", "", words)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / name).read_bytes() == Path("again", name).read_bytes(), name


@pytest.mark.parametrize("design", ["V", "VLJ", "T", "pixel"])
def test_other_designs_run_too(design):
    border = ["--prompts.border_width", "1"] if design == "pixel" else []  # of other designs it is refused
    run("--output_dir", "out", "--prompts.design", design, *border, "--max_steps", "1")
    assert load_reports("out/report.json")[0][0].name == f"APT-{design}"
    saved = yaml.safe_load(Path("out/recipe.yaml").read_text())["prompts"]
    assert saved["design"] == design
    assert ("text_depth" in saved) == (design in ("VLJ", "T")), "what the config says of its own design stays out"


def test_random_crops_of_whole_pictures():
    run("--output_dir", "out", "--augment", "true", "--max_steps", "1")
    assert Path("out/adapter_model.safetensors").is_file()


WRONG = {
    "more layers than there are": (
        ["--prompts.vision_depth", "9"],
        "vision_depth=9 is more than the tower's 3 layers",
    ),
    "too many tokens": (["--prompts.num_text_tokens", "40"], "num_text_tokens=40 leaves no place"),
    "too few words": (["--prompts.context_init", "photo"], "context_init='photo' has 1 tokens for num_text_tokens=2"),
    "prompts over class names": (["--template", "a {}"], "has only 1 before the class name"),
    "unknown design": (["--prompts.design", "W"], '"prompts.design"'),
    "too many shots": (["--shots", "5000"], "5000"),
    "no shots": (["--shots", "0"], "0"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_setting_ends_with_one_line_and_writes_nothing(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--output_dir", "out", *words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path("out").exists()
