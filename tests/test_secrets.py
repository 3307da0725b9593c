"""An access token reaches no file and no line, in whatever way it was given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

from hf_robust_clip import secrets
from hf_robust_clip.cli import main
from hf_robust_clip.cli import run as run_command
from hf_robust_clip.objectives.tecoa import TeCoA
from hf_robust_clip.report import CardInfo
from hf_robust_clip.runs import train
from hf_robust_clip.secrets import holds_token, is_token_key, refuse_tokens, without_token_keys, without_tokens

ROOT = Path(__file__).parent.parent
CONFIG, EVALUATION = (ROOT / "recipes/configs" / name for name in ("digits-clip/pmg_aft.yaml", "evaluate.yaml"))
TOKEN = "hf_" + "aB3d" * 8
TOKENS = {
    "user": TOKEN,
    "short": "hf_" + "x1" * 10,
    "jwt": "hf_jwt_eyJhbGciOiJFZERTQSJ9.eyJyZWFkIjp0cnVlfQ.c2ln-_x",
    "oauth": "hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJyZWFkIjp0cnVlfQ",
    "organisation": "api_org_" + "Q7" * 17,
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for name in secrets.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- what is a token


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("text", ["{}", "model/{}", "https://user:{}@huggingface.co/a/b", "x={},y", "({})."])
def test_tokens_are_found_and_hidden(token, text):
    text = text.format(token)
    assert holds_token(text)
    hidden = without_tokens(text)
    assert token[:12] not in hidden
    assert token[-6:] not in hidden
    assert "<token>" in hidden


def test_addresses_with_a_password_hold_one_whatever_it_looks_like():
    assert holds_token("https://me:letmein@example.org/x")
    assert without_tokens("at https://me:letmein@example.org/x") == "at https://<token>@example.org/x"


@pytest.mark.parametrize(
    "text",
    ["hf_robust_clip", "hf_robust_clip_experiments_with_a_long_name", "org/hf_model", "out/hf_jwt", "https://host/a@b",
     "git@github.com:org/name", "hf_1234", "a photo of a {}.", "num_vision_tokens"],
)  # fmt: skip
def test_names_are_no_tokens(text):
    assert not holds_token(text)
    assert without_tokens(text) == text


def test_tokens_of_the_environment_are_hidden_whatever_they_look_like(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my-own-hub-secret")
    assert without_tokens("refused: my-own-hub-secret.") == "refused: <token>."


def test_keys_that_are_meant_for_tokens():
    assert all(map(is_token_key, ["hub_token", "token", "push_to_hub_token", "--hub_token", "WANDB_API_KEY"]))
    assert not any(map(is_token_key, ["num_vision_tokens", "tokenizer", "context_token_ids", "class_token_id", 3]))
    settings = {"training": {"hub_token": "x", "seed": 0}, "tasks": [{"token": "y", "dataset": "z"}]}
    assert without_token_keys(settings) == {"training": {"seed": 0}, "tasks": [{"dataset": "z"}]}


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"model": {"name": TOKEN}}, "settings.model.name"),
        ({"tasks": [{"dataset": f"https://me:{TOKEN}@huggingface.co/d"}]}, "settings.tasks[0].dataset"),
        ({"prompt": {TOKEN: 1}}, "a key of settings.prompt"),
    ],
)
def test_a_token_elsewhere_is_refused_by_its_place(settings, where):
    with pytest.raises(ValueError, match="HF_TOKEN") as caught:
        refuse_tokens(settings, "settings")
    assert where in str(caught.value)
    assert TOKEN not in str(caught.value)
    refuse_tokens({"training": {"hub_token": TOKEN}}, "settings")


def test_a_card_holds_none():
    values = dict(repo_id="a/b", base_model="c/d", paper=TeCoA.paper, template="a {}", class_names=["x"], limits="")
    with pytest.raises(ValueError, match="training_data") as caught:
        CardInfo(**values, training_data=f"https://me:{TOKEN}@host/data", settings={})
    assert TOKEN not in str(caught.value)


# ---- the command line


def written_yaml(text):
    Path("own.yaml").write_text(text)
    return ["--config", "own.yaml"]


WAYS = {
    "value of a flag": lambda: ["--model_name_or_path", TOKEN],
    "address": lambda: ["--dataset_name", f"https://user:{TOKEN}@huggingface.co/datasets/a/b"],
    "flag of another name": lambda: ["--push_to_hub_token", TOKEN],
    "flag with a slip": lambda: ["--hub_tokn", TOKEN],
    "unknown option": lambda: ["--token", TOKEN],
    "word alone": lambda: [TOKEN],
    "option itself": lambda: [f"--{TOKEN}"],
    "section itself": lambda: [f"--{TOKEN}.key", "1"],
    "value of another kind": lambda: ["--seed", f"[{TOKEN}]"],
    "value of a number": lambda: ["--eps", TOKEN],
    "folder": lambda: ["--output_dir", f"out/{TOKEN}"],
    "config": lambda: ["--config", f"{TOKEN}.yaml"],
    "not YAML": lambda: ["--seed", f"[{TOKEN}"],
    "YAML": lambda: written_yaml(CONFIG.read_text() + f"prompts: {TOKEN}\n"),
    "YAML that is none": lambda: written_yaml(f"hub_token: {TOKEN}\neps: [\n"),
    "YAML, unknown alias": lambda: written_yaml(f"eps: *{TOKEN}\n"),
    "YAML, key twice": lambda: written_yaml(f"tasks: {{{TOKEN}: 1, {TOKEN}: 2}}\n"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("traceback", ["0", "1"])
def test_no_error_line_repeats_it(way, traceback, capfd, monkeypatch):
    monkeypatch.setenv("HF_ROBUST_CLIP_TRACEBACK", traceback)
    for run in (
        lambda words: run_command("train", CONFIG, "", words),
        lambda w: run_command("evaluate", EVALUATION, "", w),
    ):
        with pytest.raises((SystemExit, ValueError, OSError)) as stopped:
            run(way())
        assert TOKEN not in str(stopped.value)
        told = capfd.readouterr()
        assert TOKEN[:10] not in told.out + told.err
        if traceback == "0":
            assert stopped.value.code == 2
            assert told.err.startswith("error: ")
            assert told.err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} <= {"own.yaml"}


def test_print_config_shows_no_tokens(capsys):
    Path("own.yaml").write_text(f"hub_token: my-own\nseed: 1  # {TOKEN}\n")
    with pytest.raises(SystemExit):
        main(["train", "pmg_aft", "--config", "own.yaml", "--print_config"])
    shown = capsys.readouterr().out
    assert "\nseed: 1\n" in shown
    assert "my-own" not in shown
    assert TOKEN not in shown


def test_no_settings_show_it(tmp_path):
    from training_script import arguments

    words = ["--hub_token", TOKEN, "--push_to_hub", "false"]
    recipe = train.read(words, CONFIG)
    settings = arguments(tmp_path, hub_token=TOKEN)
    assert settings.hub_token == recipe.training.hub_token == TOKEN
    assert not any(TOKEN in text for shown in (settings, recipe) for text in (repr(shown), str(shown)))


def test_the_list_of_arguments_forgets_it(monkeypatch):
    words = [
        "x",
        "--hub_token",
        "my-own",
        "--hub_token=my-own",
        "--model_name_or_path",
        TOKEN,
        "--seed",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", words)
    secrets.hide_arguments()
    assert sys.argv == ["x", "--hub_token", "<token>", "--hub_token=<token>", "--model_name_or_path",
                        "<token>", "--seed", "1"]  # fmt: skip


@pytest.mark.parametrize(
    "run", [lambda: run_command("train", CONFIG, ""), lambda: run_command("evaluate", EVALUATION, ""), main]
)
def test_a_run_forgets_it_first(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--hub_token", TOKEN, "--no-such-option", "1"])
    with pytest.raises(SystemExit):
        run()
    assert TOKEN not in sys.argv


def test_a_token_acts_and_is_not_written():
    words = ["--hub_token", TOKEN, "--push_to_hub", "false"]
    recipe = train.read(words, CONFIG)
    assert recipe.training.hub_token == TOKEN
    assert TOKEN not in yaml.safe_dump(recipe.source)
    assert recipe.source["seed"] == 0
    assert TOKEN not in repr(recipe.push)


def test_a_whole_run_writes_and_prints_none(tmp_path):
    """With a token in flag, environment and YAML, and with a tracker if one is there."""
    trackers = []
    try:
        import tensorboard  # noqa: F401

        trackers = ["tensorboard"]
    except ImportError:
        pass
    config = yaml.safe_load(CONFIG.read_text())
    config["hub_token"] = TOKENS["short"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", tmp_path / "own.yaml", "--hub_token", TOKEN, "--max_images", "16",
             "--max_steps", "2", "--save_steps", "1", "--logging_steps", "1",
             "--per_device_train_batch_size", "8",
             "--report_to", json.dumps(trackers) if trackers else "none",
             "--evaluation.attack", "pgd-1", "--tasks", "[{dataset: digits, split: test, max_images: 4}]",
             "--output_dir", tmp_path / "out"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_TOKEN": TOKENS["jwt"],
                   "TRANSFORMERS_VERBOSITY": "info"}  # fmt: skip
    command = [sys.executable, str(ROOT / "recipes/pmgaft.py"), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"recipe.yaml", "report.json", "README.md", "trainer_state.json", "optimizer.pt"}
    assert not trackers or any("tfevents" in name for name in names)
    for token in TOKENS.values():
        assert token not in done.stdout + done.stderr
        for path in files:
            assert token.encode() not in path.read_bytes(), path
