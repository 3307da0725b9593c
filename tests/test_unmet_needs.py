"""What an objective needs and a command doesn't give: one line, status 2, before any work, and nothing left behind."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from command_words import last_of_each
from datasets import Dataset
from PIL import Image

from hf_robust_clip.cli import run as run_command
from hf_robust_clip.training.trainer import RobustClipTrainer

CONFIG = Path(__file__).parents[1] / "recipes/configs/digits-clip/tecoa.yaml"
FEW = ["--classes", "[zero, one]", "--max_images", "9", "--max_steps", "1", "--per_device_train_batch_size", "4",
       "--evaluation.radii", "[8/255]", "--evaluation.attack", "pgd-1",
       "--tasks", "[{dataset: digits, split: test, classes: [zero, one], max_images: 4}]"]  # fmt: skip
AS_THEY_ARE = ["--template", "{description}", "--descriptions", "texts.json"]
WHOLE = ["--augment", "true"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(*words):
    run_command("train", CONFIG, "", last_of_each(*FEW, "--output_dir", "out", *words))


@pytest.mark.parametrize(
    ("words", "texts", "named"),
    [
        (["--objective", "Contrastive"], None, "Contrastive needs captions"),
        (["--objective", "ACL"], None, "ACL takes 2 views"),
        (["--objective", "ASCL", "--per_device_train_batch_size", "1"], None, "per_device_train_batch_size=1"),
        (
            ["--objective", "AdvCL", *WHOLE, "--per_device_train_batch_size", "1"],
            None,
            "per_device_train_batch_size=1",
        ),
        (["--objective", "ACL", *WHOLE], None, "dataloader_drop_last=False leaves 1 image"),
        (["--objective", "TeCoA", "--compare", "[ASCL]"], None, "dataloader_drop_last=False leaves 1 image"),
        (AS_THEY_ARE, {"zero": ["a"], "frog": ["b"]}, "descriptions has no texts for 1 of 2 classes"),
        (["--objective", "SAFT", *AS_THEY_ARE], {"zero": ["a", "b"], "one": ["c"]}, "classes have 1 to 2 texts"),
    ],
)
def test_it_is_told_before_any_work(words, texts, named, capsys, monkeypatch):
    if texts is not None:
        Path("texts.json").write_text(json.dumps(texts))
    monkeypatch.setattr("hf_robust_clip.evaluation.loop.evaluate_robustness", lambda *_, **__: pytest.fail("work"))
    with pytest.raises(SystemExit) as stopped:
        train(*words)
    assert stopped.value.code == 2
    *_, told = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ") and named in told
    assert not Path("out").exists()


def test_a_run_that_cannot_begin_deletes_nothing():
    old = Path("out/checkpoint-1/trainer_state.json")
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    with pytest.raises(SystemExit):
        train("--objective", "ASCL", "--overwrite", "true")
    assert old.is_file()


def test_pictures_without_labels_are_told(capsys):
    pictures = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 90)]
    Path("mine").mkdir()
    Dataset.from_dict({"image": pictures}).to_parquet("mine/train.parquet")
    with pytest.raises(SystemExit) as stopped:
        train("--dataset_name", "mine")
    assert stopped.value.code == 2
    assert "no label column" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out").exists()


def test_saft_with_one_text_of_each_class_says_so(capsys, caplog, monkeypatch):
    """It is TGA-ZSR then."""
    told = []
    monkeypatch.setattr(RobustClipTrainer, "train", lambda trainer, **_: told.append(trainer.settings()))
    monkeypatch.setattr("hf_robust_clip.runs.train.measure", lambda *_, **__: [])
    monkeypatch.setattr("hf_robust_clip.runs.train.finish", lambda *_: pytest.exit)
    with pytest.raises(AttributeError):  # where the run would write its model
        train("--objective", "SAFT")
    assert told[0]["texts_of_each_class"] == 1
    assert any("SAFT has one text for each class" in text for text in caplog.messages)
