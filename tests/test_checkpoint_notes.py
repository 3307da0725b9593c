"""What a checkpoint's own files say of it."""

import json
from pathlib import Path

import pytest
from reports import INFO, write_folder

from hf_robust_clip.checkpoint_notes import known_templates, named_base, other_prompt, trained_templates

PAPER = "This is a photo of a {}"


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"recipe.yaml": "template: 'a {}'\nobjective: TeCoA\n"}, ("a {}",)),
        ({"recipe.yaml": "objective: TeCoA\neps: 1/255\n"}, (PAPER,)),  # what a recipe takes that says nothing
        ({"recipe.yaml": "sources: []\n"}, ()),  # of a pretraining
        ({"report.json": json.dumps({"card": {"template": "one {}"}})}, ("one {}",)),
        (
            {"recipe.yaml": "objective: TeCoA\n", "report.json": json.dumps({"card": {"template": "one {}"}})},
            ("one {}",),
        ),
        ({"adaptation.json": json.dumps({"templates": ["a {}", "one {}"]})}, ("a {}", "one {}")),
    ],
    ids=["nothing", "recipe", "recipe without", "other recipe", "card", "card and recipe without", "defence"],
)
def test_the_prompt_of_the_training(folder, files, expected):
    for name, text in files.items():
        (folder / name).write_text(text)
    assert trained_templates(str(folder)) == expected


def test_a_checkpoint_inside_a_runs_folder_has_its_prompt(folder):
    (folder / "recipe.yaml").write_text("template: 'a {}'\n")
    (folder / "checkpoint-20").mkdir()
    (folder / "other").mkdir()
    assert trained_templates(str(folder / "checkpoint-20/")) == ("a {}",)
    assert trained_templates(str(folder / "other")) == ()


def test_the_embedded_model_has_none_and_asks_nobody():
    assert trained_templates("digits-clip") == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [("recipe.yaml", "template: 'a photo'"), ("recipe.yaml", "template: ["), ("report.json", "{")],
)
def test_what_can_not_be_read_is_refused_by_its_file(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        trained_templates(str(folder))
    assert known_templates(str(folder)) == ()


def test_offline_nobody_guesses_the_prompt_of_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"'org/robust'.*template"):
        trained_templates("org/robust")
    assert known_templates("org/robust") == ()


def test_what_a_folder_was_made_from(folder):
    assert named_base(folder) is None
    assert named_base("") is None
    (folder / "README.md").write_text("just words\n")
    assert named_base(folder) is None
    write_folder(folder)
    assert named_base(folder) == INFO.base_model == "user/clip"
    (folder / "README.md").write_text("---\nbase_model:\n- org/clip\n---\n")
    assert named_base(folder) == "org/clip"
    (folder / "README.md").write_text(f"---\nbase_model: {folder}\n---\n")
    assert named_base(folder) is None
    (folder / "README.md").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/clip"}))
    assert named_base(folder) == "org/clip"
    assert not Path("org/clip").exists()


def test_another_prompt_than_that_of_the_training_is_remarked_upon():
    remark = other_prompt("pmgaft", ("a {}",), ("one {}", "two {}"))
    assert all(part in remark for part in ("pmgaft", '"a {}"', '"one {}" and 1 more'))
    assert other_prompt("pmgaft", ("a {}",), ["a {}"]) is None
    assert other_prompt("pmgaft", (), ("a {}",)) is None
