"""Descriptions from settings to files and back: a training with them, and evaluations of what it leaves."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from command_words import last_of_each

from hf_robust_clip.cli import run as run_command
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs import evaluate, train
from hf_robust_clip.zero_shot_data.specs import known_descriptions

CONFIGS = Path(__file__).parents[1] / "recipes/configs"
PAPER = "This is a photo of a {}"
FEW = ["--evaluation.radii", "[8/255]", "--tasks",
       "[{name: few, dataset: digits, split: test, classes: [zero, six], max_images: 6}]"]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model that was trained with descriptions, and a file of others."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        AcceleratorState._reset_state(reset_partial_state=True)
        short = ["--max_images", "16", "--max_steps", "1", "--per_device_train_batch_size", "8", "--output_dir", "out"]
        run_command("train", CONFIGS / "digits-clip/saft.yaml", "", last_of_each(
            *FEW, *short, "--evaluation.attack", "pgd-1", "--attack_steps", "1"
        ))  # fmt: skip
        others = {name: texts[:1] for name, texts in known_descriptions("digits").items()}
        Path("others.json").write_text(json.dumps(others))
        Path("less.json").write_text(json.dumps({"zero": ["0"], "one": ["1"]}))
        yield folder
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    AcceleratorState._reset_state(reset_partial_state=True)


def evaluated(*words):
    settings = [*FEW, "--evaluation.attacks", "pgd-1", "--model_name_or_path", "out", "--output_dir", "evaluation"]
    run_command("evaluate", CONFIGS / "evaluate.yaml", "", last_of_each(*settings, "--overwrite", "true", *words))
    return load_reports("evaluation/report.json")[0][0]


def test_a_training_leaves_its_descriptions_and_says_them_everywhere():
    assert json.loads(Path("out/descriptions.json").read_text()) == known_descriptions("digits")
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert (recipe["template"], recipe["descriptions"]) == ("{description}", "digits")
    (report,), _ = load_reports("out/report.json")
    assert report.templates == ("{description}",) and len(report.descriptions) == 16
    card = Path("out/README.md").read_text()
    assert f'"{{description}}" with descriptions {report.descriptions}' in card
    assert "load_descriptions(" in card and "hypothesis_template" not in card


def test_an_evaluation_takes_those_of_the_training(capsys):
    trained = load_reports("out/report.json")[0][0]
    found = evaluated()
    assert (found.prompt_hash, found.descriptions) == (trained.prompt_hash, trained.descriptions)
    assert found.clean_accuracy == trained.clean_accuracy
    printed = capsys.readouterr().out
    assert f'prompt "{{description}}" with descriptions {found.descriptions}' in printed and "NOTE" not in printed


def test_others_that_are_asked_for_go_before_them(capsys):
    trained = load_reports("out/report.json")[0][0]
    found = evaluated("--descriptions", "others.json")
    assert found.templates == ("{description}",) and found.descriptions != trained.descriptions
    assert "NOTE: out was trained with" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluated("--overwrite", "false", "--resume", "true")
    assert "is the state of another evaluation: its model is" in capsys.readouterr().err
    plain = evaluated("--template", PAPER)
    assert (plain.templates, plain.descriptions) == ((PAPER,), None)
    assert len({plain.prompt_hash, found.prompt_hash, trained.prompt_hash}) == 3
    assert "NOTE: out was trained with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--descriptions", "less.json"], "descriptions has no texts for 1 of 2 classes, among them 'six'"),
        (["--descriptions", "nowhere.json"], "descriptions='nowhere.json' is no file"),
        (["--descriptions", "others.json", "--template", PAPER], "has no '{description}'"),
        (["--template", "{description}"], "template='{description}' takes descriptions"),
        (["--descriptions", "digits", "--tasks", "[{dataset: digits, template: 'a {}'}]"], "has no '{description}'"),
    ],
)
def test_what_does_not_fit_is_one_line(words, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluated(*words)
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert named in told[-1] and told[-1].startswith("error: ")


def test_descriptions_go_before_the_prompts_of_suites():
    words = ["--output_dir", "x", "--evaluation.radii", "[1/255]", "--tasks", "pmg_aft_16"]
    config = CONFIGS / "evaluate.yaml"
    assert any(task.template for task in evaluate.read(words, config).tasks)
    run = evaluate.read([*words, "--descriptions", "others.json"], config)
    assert not any(task.template for task in run.tasks)


def test_a_training_checks_its_descriptions_first():
    config = CONFIGS / "digits-clip/tecoa.yaml"
    with pytest.raises(ValueError, match=r"has no '\{description\}'"):
        train.read(["--descriptions", "others.json"], config)
    own = {**yaml.safe_load(config.read_text()), "descriptions": "others.json"}
    del own["template"]
    Path("mine.yaml").write_text(yaml.safe_dump(own))
    assert train.read([], Path("mine.yaml")).template == "{description}"
    run = train.read(["--descriptions", "less.json", "--template", "{description}"], config)
    with pytest.raises(ValueError, match="descriptions has no texts for"):
        train.prepare(run)
