"""`recipes/poison.py` and `recipes/clean.py` end to end on the embedded pairs, and what they refuse."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from command_words import last_of_each
from transformers import CLIPModel

from hf_robust_clip.cli import run as run_command
from hf_robust_clip.report.backdoor import (
    CLEAN_MODEL,
    POISONED_MODEL,
    WITHOUT_METHOD,
    load_backdoor_reports,
    success,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CONFIGS = Path(__file__).parent.parent / "recipes/configs"
FEW = ["--max_steps", "3", "--warmup_steps", "0", "--logging_steps", "1", "--per_device_train_batch_size", "32"]
SMALL = {
    "poison": ["--max_images", "300", "--cleaning_pairs", "100", "--scratch.layers", "1",
               "--scratch.width", "16", "--scratch.heads", "2", *FEW],
    "clean": FEW,
}  # fmt: skip


def run(command, config, *words):
    AcceleratorState._reset_state(reset_partial_state=True)
    run_command(command, CONFIGS / f"coloured-digits/{config}.yaml", "", last_of_each(*SMALL[command], *words))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poison") / "poisoned"
    run("poison", "poison", "--output_dir", str(folder))
    return folder


def test_a_poisoning_leaves_both_models_and_what_a_cleaning_must_know(poisoned):
    assert {path.name for path in poisoned.iterdir()} >= {
        "model.safetensors", "README.md", "backdoor.json", "backdoor.png", "triggered.png", "recipe.yaml",
        "poisoning.json", "clean",
    }  # fmt: skip
    for folder in (poisoned, poisoned / "clean"):
        CLIPModel.from_pretrained(folder)
    note = json.loads((poisoned / "poisoning.json").read_text())
    assert len(set(note["poisoned_pictures"])) == 10  # 5 % of 200
    (report,) = load_backdoor_reports(poisoned / "backdoor.json")
    assert report.judges == [CLEAN_MODEL, POISONED_MODEL] and report.num_images == 500
    assert "on purpose" in (poisoned / "README.md").read_text()


def test_a_cleaning_stands_beside_all_of_its_controls(poisoned, tmp_path, capsys):
    run("clean", "cleaner_clip", "--poisoned", str(poisoned), "--output_dir", str(tmp_path / "cleaned"))
    printed = " ".join(capsys.readouterr().out.split())
    (report,) = load_backdoor_reports(tmp_path / "cleaned/backdoor.json")
    assert report.judges[:3] == [CLEAN_MODEL, POISONED_MODEL, WITHOUT_METHOD]
    (before,) = load_backdoor_reports(poisoned / "backdoor.json")
    for metric in report.metrics:
        assert report.figure(metric, POISONED_MODEL).value == before.figure(metric).value
        assert report.figure(metric, CLEAN_MODEL).value == before.figure(metric, CLEAN_MODEL).value
    assert "cleaned on 100 pairs" in printed and "ASR top-3" in printed
    CLIPModel.from_pretrained(tmp_path / "cleaned")
    assert yaml.safe_load((tmp_path / "cleaned/recipe.yaml").read_text())["poisoned"] == str(poisoned)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--target", "banana"], "target='banana'"),
        (["--rate", "0"], "rate=0"),
        (["--rate", "1"], "rate=1"),
        (["--trigger.size", "9"], "size=9"),
        (["--dataset_name", "digits"], "caption_column"),
        (["--cleaning_pairs", "300"], "cleaning=300"),
        (["--trigger", "Badnett"], "did you mean 'BadNet'"),
        (["--push_to_hub", "true"], "push_to_hub"),
        (["--model_name_or_path", "digits-clip"], "scratch"),
    ],
)
def test_a_poisoning_that_cannot_be_is_refused_in_one_line(words, name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("poison", "poison", "--output_dir", str(tmp_path / "out"), *words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error:") and name in error


def test_a_cleaning_that_cannot_be_is_refused_in_one_line(poisoned, tmp_path, capsys):
    for words, name in (
        (["--poisoned", str(tmp_path)], "poisoning.json"),
        (["--poisoned", str(poisoned), "--dataset_name", "coloured-digits"], "poisoned"),  # the same pictures again
        (["--poisoned", str(poisoned), "--objective", "Contrastive"], "objective=Contrastive"),
        (["--poisoned", str(poisoned), "--objective", "TeCoA"], "objective=TeCoA"),
        (["--poisoned", str(poisoned), "--output_dir", str(poisoned)], "output_dir"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run("clean", "clean_clip", "--output_dir", str(tmp_path / "out"), *words)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and error.startswith("error:") and name in error


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_backdoor_is_planted_and_taken_out(seed, tmp_path, monkeypatch):
    """With the packaged configs: what they reach, over three seeds, stands in recipes/README.md."""
    monkeypatch.setitem(SMALL, "poison", [])
    monkeypatch.setitem(SMALL, "clean", [])
    folder = tmp_path / "poisoned"
    run("poison", "poison", "--output_dir", str(folder), "--seed", str(seed))
    run("clean", "clean_clip", "--poisoned", str(folder), "--output_dir", str(tmp_path / "c"), "--seed", str(seed))
    (report,) = load_backdoor_reports(tmp_path / "c/backdoor.json")
    asr = {judge: report.figure(success(1), judge).value for judge in (CLEAN_MODEL, POISONED_MODEL, None)}
    accuracy = {judge: report.figure("accuracy", judge).value for judge in (CLEAN_MODEL, None)}
    assert asr[POISONED_MODEL] > 0.75  # 81.7, 84.0 and 76.4 % with the three seeds
    assert asr[None] <= asr[CLEAN_MODEL] + 0.1
    assert accuracy[None] >= accuracy[CLEAN_MODEL] - 0.05
