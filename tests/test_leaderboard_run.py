"""`hf-robust-clip leaderboard`: settings are checked, what fails keeps no other model back, nothing is done twice."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from hf_robust_clip.cli import main
from hf_robust_clip.command_line import recipes_folder
from hf_robust_clip.digits_clip import digits_clip_path
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs import evaluate, leaderboard
from hf_robust_clip.zero_shot_data.specs import find_spec

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "converter")
LAYOUTS = ("open_clip", "visual", "tecoa", "hugging_face")
CONVERTED = []  # what the stand-in for the converter was asked for


def convert_checkpoint(source, base, output_dir, *, source_file=None, source_revision=None, base_revision=None,
                       layout=None, normalisation=None, activation=None, overwrite=False):  # fmt: skip
    """Gives a copy of the base, as if its weights were in the source's file."""
    CONVERTED.append((str(source), base, layout, source_file, activation))
    if not Path(source).exists():
        raise OSError(f"source={source!r} can't be read from the Hub.")
    ignored = shutil.ignore_patterns("__pycache__", "*.py")
    shutil.copytree(digits_clip_path(), output_dir, ignore=ignored, dirs_exist_ok=True)
    Path(output_dir, "provenance.json").write_text(json.dumps({"source": {"commit": "c0ffee0" * 5}}))
    return Path(output_dir)


@pytest.fixture
def converter(monkeypatch):
    CONVERTED.clear()
    layouts = [SimpleNamespace(name=own) for own in LAYOUTS]
    contents = {"runs.convert": {"convert_checkpoint": convert_checkpoint}, "modeling.layouts": {"LAYOUTS": layouts}}
    for name, content in contents.items():
        module = ModuleType(f"hf_robust_clip.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def settings(**changes):
    fare = {"key": "fare", "title": "FARE", "method": "FARE", "source": "weights.pt", "layout": "visual",
            "base": "digits-clip", "reference": "clip", "licence": "mit", "trained_eps": "8/255",
            "trained_on": "digits", "activation": "quick_gelu"}  # fmt: skip
    return {
        "heading": "Small board",
        "output_dir": "out",
        "template": "This is a photo of a {}",
        "evaluation": {"radii": ["8/255", "16/255"], "attack": "pgd-1", "batch_size": 8},
        "tasks": [{"dataset": "digits", "max_images": 3}, {"dataset": "digits", "name": "other", "max_images": 2}],
        "references": [{"key": "clip", "title": "CLIP", "source": "digits-clip", "licence": "apache-2.0"}],
        "models": [
            fare,
            {**fare, "key": "lost", "title": "Lost", "source": "org/lost"},
            {**fare, "key": "by-hand", "title": "By hand", "source": None, "link": "https://example.org"},
        ],
        "excluded": [{"title": "Delta", "source": "org/delta", "reason": "no CLIPModel"}],
        **changes,
    }


def run(capsys, *words, **changes):
    """Status, and what was printed."""
    Path("board.yaml").write_text(yaml.safe_dump(settings(**changes)))
    try:
        main(["leaderboard", "board.yaml", *words])
    except SystemExit as error:
        return error.code, "".join(capsys.readouterr())
    return 0, "".join(capsys.readouterr())


def test_models_are_converted_evaluated_and_ranked_once(capsys, monkeypatch):
    Path("weights.pt").write_bytes(b"first")
    seen = []
    real = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda run: seen.append(run) or real(run))
    monkeypatch.setattr(evaluate, "draw", lambda prepared, measured: None)
    monkeypatch.setattr(evaluate.evaluation, "adversarial_examples", lambda *about: ())
    status, printed = run(capsys)
    assert status == 1
    assert "Lost: not run: source='org/lost' can't be read from the Hub." in printed
    assert "By hand: not run: its file must be fetched by hand from https://example.org" in printed
    assert CONVERTED[0] == ("weights.pt", "digits-clip", "visual", None, "quick_gelu")
    assert len(seen) == 4  # two models on two tasks
    assert Path("out/leaderboard.png").is_file() and Path("out/leaderboard.csv").is_file()
    monkeypatch.setattr("hf_robust_clip.report.leaderboard.plot_tradeoff", lambda *about: None)  # it takes a second
    page = Path("out/leaderboard.md").read_text()
    assert "| FARE | 1 | FARE | L-inf eps=8/255 |" in page and "weights.pt at c0ffee0" in page
    assert "Delta (org/delta): no CLIPModel" in page and "| Lost | - |" in page
    reports, _ = load_reports("out/report.json")
    assert {(own.name, own.task, own.model) for own in reports} == {
        (name, task, model)
        for name, model in (("FARE", "weights.pt"), ("CLIP", "digits-clip"))
        for task in ("digits", "other")
    }
    assert {own.templates for own in reports} == {("This is a photo of a {}",)}

    assert run(capsys)[0] == 1  # what failed is tried again, nothing else
    assert len(seen) == 4 and [own[0] for own in CONVERTED] == ["weights.pt", "org/lost", "org/lost"]

    Path("hand.pt").write_bytes(b"by hand")
    status, _ = run(capsys, "--files", "{by-hand: hand.pt}", "--only", "[by-hand]")
    assert status == 0 and len(seen) == 6 and CONVERTED[-1][0] == "hand.pt"

    Path("weights.pt").write_bytes(b"other weights under the same name")
    run(capsys, "--only", "[fare]")
    assert len(seen) == 8 and CONVERTED[-1][0] == "weights.pt"  # neither the old folder nor the old figures are taken
    run(capsys, "--only", "[clip]", "--evaluation.radii", "[8/255]")
    assert len(seen) == 10


def test_a_task_that_fails_leaves_the_others(capsys, monkeypatch):
    def report(run, model, source, checkpoint, title, task, revision):
        if title == "other" and model.key == "fare":
            raise ValueError(f"no such\nsplit in {Path.cwd() / 'pictures'}")
        return SimpleNamespace(model_revision="local")

    monkeypatch.setattr(leaderboard, "measured", report)
    Path("weights.pt").write_bytes(b"weights")
    status, printed = run(capsys, "--only", "[fare, clip]")
    assert status == 1 and "FARE: not run on other: no such split in pictures\n" in printed and "CLIP: " not in printed


def without(model, *names, **changes):
    own = {name: value for name, value in settings()["models"][0].items() if name not in names}
    return {"models": [{**own, **changes}]} if model else {}


WRONG = [  # changes of the file, and what the line names
    (without(1, "licence"), "model 'fare': licence is missing"),
    (without(1, "base"), "model 'fare': base is missing"),
    (without(1, "reference"), "model 'fare': reference=None must be one of: clip"),
    (without(1, "source"), "model 'fare': source is missing"),
    (without(1, layout="visuals"), "model 'fare': layout='visuals' is unknown; did you mean 'visual'?"),
    (without(1, "layout"), "base does nothing without layout"),
    (without(1, key="../up"), "key='../up'"),
    (without(1, key="clip"), "two models have the key 'clip'"),
    (without(1, title="CLIP"), "two models have the title 'CLIP'"),
    (without(1, trained_eps="8/0"), "model 'fare': trained_eps.*eps='8/0'"),
    (without(1, licens="mit"), "licens"),
    ({"models": []}, "missing: models"),
    ({"rank_radius": "4/255"}, "rank_radius='4/255'"),
    ({"template": "a photo"}, "template='a photo'"),
    ({"only": ["fair"]}, "only names 'fair'.*did you mean 'fare'"),
    ({"files": {"fare": "nowhere.pt"}}, "'nowhere.pt' of 'fare' is no file"),
    ({"tasks": [{"dataset": "digits"}, {"dataset": "digits"}]}, "two tasks"),
    ({"tasks": [{"dataset": "digits", "template": "{}"}]}, "tasks.0..template"),
    ({"tasks": "pmg_aft_61"}, "pmg_aft_61.*pmg_aft_16"),
    ({"excluded": [{"title": "x"}]}, "excluded: title='x'"),
    ({"references": [{**settings()["references"][0], "method": "FARE"}]}, "'clip' is undefended"),
    ({"evaluation": {"radii": ["1/255"], "attacks": ["pgd-2"]}}, "evaluation.attacks"),
    ({"epoch": 1}, "'epoch'"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_settings_are_one_line_and_leave_nothing(changes, line, capsys):
    status, printed = run(capsys, **changes)
    assert status == 2
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert re.search(line.replace("?", r"\?"), printed), printed
    assert [path.name for path in Path.cwd().iterdir()] == ["board.yaml"]


def test_a_suite_stands_for_its_tasks_with_the_prompt_of_the_leaderboard():
    run = leaderboard.read(["--tasks", "coop_11"], recipes_folder() / "leaderboard.yaml")
    assert len(run.tasks) == 11
    assert {task.template for task in run.tasks.values()} == {None}


def test_the_packaged_leaderboard_is_read():
    run = leaderboard.read([], recipes_folder() / "leaderboard.yaml")
    everyone = [*run.about.models, *run.about.references]
    assert len(everyone) > 20 and all(find_spec(task.dataset) for task in run.tasks.values())
    assert [own.trained for own in run.about.models if own.key == "fare4-l14"] == ["L-inf eps=4/255"]
    assert "Not yet run" in (recipes_folder() / "leaderboard.yaml").read_text()
    assert len({(own.source, own.file, own.link) for own in everyone}) == len(everyone)
