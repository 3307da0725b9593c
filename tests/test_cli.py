"""From words on a command line to settings; no model is loaded here."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from hf_robust_clip import cli
from hf_robust_clip.cli import METHODS, build, build_objective, check_key, coerce, parse_arguments, read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT = RECIPES / "configs/digits-clip/pmg_aft.yaml"
METHOD_CONFIGS = sorted(path for path in (RECIPES / "configs").rglob("*.yaml") if path.stem.startswith(tuple(METHODS)))
CONFIGS = [path for path in METHOD_CONFIGS if path.parent.name != "mini-clip"]
EVALUATIONS = (
    "evaluate",
    *(f"mini-clip/{name}" for name in ("pgd", "apgd", "auto_attack")),
    *(f"{model}/prompts_{name}" for model in ("digits-clip", "mini-clip") for name in ("pgd", "auto_attack")),
)
EVALUATION_CONFIGS = [RECIPES / f"configs/{name}.yaml" for name in EVALUATIONS]
ACCELERATE_CONFIGS = sorted((RECIPES / "accelerate").glob("*.yaml"))


def named(paths):
    return {"argvalues": paths, "ids": [path.relative_to(RECIPES).as_posix() for path in paths]}


def method_of(config: Path) -> str:
    return next(method for method in METHODS if config.name.startswith(method))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Configs name a relative output folder, and TrainingArguments may set variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def recipe(*words, config=DEFAULT):
    return read_recipe(method_of(config), parse_arguments(words, config))


# ---- words to plain settings


def test_overrides_are_read_as_yaml_and_the_last_one_wins():
    settings = parse_arguments(
        ["--training.seed", "1", "--data.classes", "[two, one]", "--training.bf16=true", "--training.seed=2"], DEFAULT
    )
    assert settings["training"]["seed"] == 2
    assert settings["training"]["bf16"] is True
    assert settings["data"] == {"dataset": "digits", "split": "train", "classes": ["two", "one"]}
    assert settings["training"]["attack_steps"] == 3


TYPED = ("010", "12:30", "2024-01-01", "no", "1e3", "0x1F", "1_000", ".5", "~", "true", "a: b", "# x", "&a", "!x")


@pytest.mark.parametrize("text", TYPED)
def test_what_belongs_into_a_text_is_taken_as_typed(text, tmp_path):
    """YAML would read a number, a time, a date, a truth value or nothing."""
    for option in ("output_dir", "run.output_dir", "model.name", "data.split", "prompt.template", "data.revision",
                   "prompts.context_init", "training.run_name"):  # fmt: skip
        section, _, key = (option if "." in option else f"run.{option}").partition(".")
        assert parse_arguments([f"--{option}={text}"], DEFAULT)[section][key] == text
    for option, where in (("split", "split"), ("template", "prompt"), ("model", "model"), ("config_name", "config")):
        settings = parse_arguments(
            ["--dataset", text, f"--{option}", text], EVALUATION_CONFIGS[0], cli.EVALUATION_SECTIONS
        )
        assert settings["tasks"][0]["dataset"] == text
        assert text in (settings["tasks"][0].get(where), *settings.get(where, {}).values())


@pytest.mark.parametrize("text", [text for text in TYPED if text not in ("~", "a: b", "# x", "&a", "!x")])
def test_what_belongs_into_a_text_is_taken_as_written(text, tmp_path):
    """In a file YAML's own signs count: ~ is nothing, # begins a comment."""
    (tmp_path / "own.yaml").write_text(
        f"run: {{output_dir: {text}}}\ncompare: [{text}]\n"
        f"tasks: [{{dataset: {text}, name: {text}, classes: [{text}], class_names: {{{text}: {text}}}}}]\n"
    )
    settings = parse_arguments(["--config", "own.yaml"], DEFAULT)
    assert settings["run"] == {"output_dir": text} and settings["compare"] == [text]
    assert settings["tasks"] == [{"dataset": text, "name": text, "classes": [text], "class_names": {text: text}}]
    words = ["--data.classes", f"[{text}, b]", "--tasks", f"[{{dataset: {text}}}]", "--compare", f"[{text}]"]
    settings = parse_arguments(words, DEFAULT)
    assert settings["data"]["classes"] == [text, "b"] and settings["compare"] == [text]
    assert settings["tasks"] == [{"dataset": text}]


def test_nothing_and_collections_where_a_text_may_stand_too():
    settings = parse_arguments(["--data.revision", "null", "--data.class_names", "{0: no, 1: 010}"], DEFAULT)["data"]
    assert settings["revision"] is None and settings["class_names"] == {"0": "no", "1": "010"}
    settings = parse_arguments(["--data.class_names", "[yes, no]", "--data.background", "[1, 2, 3]"], DEFAULT)["data"]
    assert settings["class_names"] == ["yes", "no"] and settings["background"] == [1, 2, 3]


@pytest.mark.parametrize("text", ["010", "0x1F", "1:30", "0b1", "08"])
def test_a_number_is_written_in_decimal_digits(text):
    with pytest.raises(ValueError, match=rf"training\.seed.*{text}|seed='{text}'"):
        recipe("--training.seed", text)


def test_config_replaces_the_default_whole(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {dataset: a/b}\nrun: {output_dir: here}\n")
    settings = parse_arguments(["--data.split", "dev", "--config", "own.yaml"], DEFAULT)
    assert settings == {"data": {"dataset": "a/b", "split": "dev"}, "run": {"output_dir": "here"}}


@pytest.mark.parametrize(
    "words", [["--overwrite"], ["--overwrite", "true"], ["--overwrite=true"], ["--run.overwrite", "true"]]
)
def test_short_forms(words):
    run = parse_arguments([*words, "--output_dir", "a", "--device=cpu"], DEFAULT)["run"]
    assert run == {"output_dir": "a", "overwrite": True, "device": "cpu"}


def test_whole_sections_that_are_lists():
    settings = parse_arguments(["--compare", "[tecoa, fare]", "--tasks", "[{dataset: digits}]"], DEFAULT)
    assert settings["compare"] == ["tecoa", "fare"]
    assert settings["tasks"] == [{"dataset": "digits"}]
    assert recipe("--compare", "tecoa").compare == ("tecoa",)
    assert recipe("--compare", "[trades, fare]").compare == ("trades", "fare")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epochs"], "'epochs' stands alone"),
        (["--training.eps"], "--training.eps has no value"),
        (["--training.eps", "--overwrite"], "--training.eps has no value"),
        (["--trainig.eps", "1"], "did you mean 'training'"),
        (["--epochs", "1"], "unknown option --epochs: 'epochs'; known: model, data"),
        (["--training", "1"], "not of the form --section.key"),
        (["--training.eps.x", "1"], "not of the form --section.key"),
    ],
)
def test_words_that_are_no_options(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments(words, DEFAULT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainng: {}", "'trainng'; did you mean 'training'"),
        ("- a", "must hold sections"),
        ("1: {}", "unknown section"),
        ("evaluation: 5", "the section evaluation in own.yaml must hold keys"),
        ("training: [eps]", "the section training in own.yaml must hold keys"),
        ("training: {eps: 1/255, eps: 2/255}", r"own\.yaml is not YAML: 'eps' stands twice \(line 1"),
        ("training: {}\ntraining: {}", "'training' stands twice"),
    ],
)
def test_config_with_other_sections(content, message, tmp_path):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", "own.yaml"], DEFAULT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a: &a [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1 or str()}'] * 9)}]\n" for i in range(1, 9)),
            "values",
        ),
        ("run: &a {output_dir: *a}", "own.yaml"),
        ("run: " + "[" * 5000, "own.yaml"),
        ("# " + "x" * 2**20, "1 MB"),
        ("run: !!python/object/apply:os.getcwd []", "own.yaml"),
        ("base: &b {dataset: a}\ndata:\n  <<: *b\n  dataset: b\n  dataset: c", "'dataset' stands twice"),
        ("tasks:\n- {dataset: a, dataset: b}", "'dataset' stands twice"),
        ("run: {output_dir: a}\n---\nrun: {}", "own.yaml"),
    ],
    ids=["aliases", "itself", "deep", "huge", "tag", "merged", "inner", "two"],
)
def test_yaml_that_means_harm_is_one_line_with_the_files_name(content, message, tmp_path):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"^(?=[^\n]*own\.yaml)[^\n]*{message}[^\n]*$") as info:
        parse_arguments(["--config", "own.yaml"], DEFAULT)
    assert len(str(info.value)) < 300


def test_a_config_that_is_no_text_is_named(tmp_path):
    (tmp_path / "own.yaml").write_bytes("classes: [Käse]".encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.yaml is not UTF-8"):
        parse_arguments(["--config", "own.yaml"], DEFAULT)


def test_yaml_that_is_none_is_one_clear_error(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("training: {eps: [}")
    for words, what in ((["--training.seed", "["], "--training.seed"), (["--config", "own.yaml"], "own.yaml")):
        with pytest.raises(SystemExit):
            cli.run_recipe("pmg_aft", DEFAULT, "", words)
        error = capsys.readouterr().err
        assert what in error
        assert error.count("\n") == 1


# ---- plain settings to typed ones


@dataclass
class Sample:
    count: int = 0
    share: float = 0.0
    text: str = ""
    flag: bool = False
    maybe: float | None = None
    names: list[str] | None = None
    norm: Literal["linf", "l2"] = "linf"
    other: Any = None


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("share", "1e-5", 1e-5),
        ("share", 2, 2.0),
        ("maybe", "1e-5", 1e-5),
        ("maybe", None, None),
        ("text", 0.5, "0.5"),
        ("text", 8, "8"),
        ("flag", True, True),
        ("names", ["a"], ["a"]),
        ("norm", "l2", "l2"),
        ("other", None, None),
    ],
)
def test_values_take_the_type_of_their_field(key, value, expected):
    found = getattr(build(Sample, {key: value}, "sample"), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "abc"),
        ("count", 2.5),
        ("count", True),
        ("count", False),
        ("count", None),
        ("share", "abc"),
        ("share", True),
        ("share", False),
        ("text", True),
        ("text", None),
        ("flag", 1),
        ("flag", "yes"),
        ("names", "a"),
        ("norm", "l7"),
        ("maybe", [1]),
    ],
)
def test_values_of_another_type_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"sample\.{key}"):
        build(Sample, {key: value}, "sample")


def test_an_unlisted_kind_of_value_names_what_would_fit():
    with pytest.raises(ValueError, match=re.escape("x='l7' must be 'linf'/'l2'.")):
        coerce("l7", Literal["linf", "l2"], "x")


def test_nearest_name_is_offered():
    with pytest.raises(ValueError, match=re.escape("unknown method: 'tekoa'; did you mean 'tecoa'?")):
        check_key("tekoa", list(METHODS), "method")
    with pytest.raises(ValueError, match="known: pmg_aft, tecoa"):
        check_key("zzz", list(METHODS), "method")


@pytest.mark.parametrize("section", ["model", "data", "prompt", "objective", "training", "evaluation", "run"])
def test_unknown_keys_are_errors_in_every_section(section):
    with pytest.raises(ValueError, match=f"unknown key in {section}: 'no_such_key'"):
        recipe(f"--{section}.no_such_key", "1")


def test_unknown_keys_are_errors_in_tasks():
    with pytest.raises(ValueError, match=re.escape("unknown key in tasks[1]: 'splitt'; did you mean 'split'?")):
        recipe("--tasks", "[{dataset: digits}, {dataset: digits, splitt: test}]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.learning_rate", "abc"], "training.learning_rate='abc' must be float"),
        (["--training.eps", "null"], "training.eps must not be empty"),
        (["--training.attack_steps", "0"], "attack_steps=0"),
        (["--evaluation.attack", "pgd-0"], "num_steps=0"),
        (["--evaluation.attack", "pdg-20"], "unknown attack 'pdg-20'"),
        (["--evaluation.radii", "[]"], "radii=[]"),
        (["--evaluation.radii", "8/255"], "evaluation.radii='8/255'"),
        (["--evaluation.batch_size", "0"], "batch_size=0"),
        (["--tasks", "5"], "tasks=5 must be a list"),
        (["--tasks", "[digits]"], "tasks[0]='digits' must hold keys"),
        (["--tasks", "[{split: test}]"], "tasks[0].dataset is missing"),
        (["--compare", "{a: b}"], "compare={'a': 'b'}"),
        (["--compare", "5"], "'5'"),
        (["--compare", "tekoa"], "did you mean 'tecoa'"),
        (["--device", "gpu"], "run.device='gpu' must be 'auto'/'cpu'/'cuda'"),
        (["--objective.alpha", "-1"], "alpha=-1"),
        (["--data.max_images", "0"], "max_images=0"),
        (["--run.push_to_hub", "a b"], "a b"),
    ],
)
def test_bad_values(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe(*words)


def test_tasks_that_tables_could_not_tell_apart_are_refused():
    with pytest.raises(ValueError, match="name"):
        recipe("--tasks", "[{dataset: digits, split: test}, {dataset: digits, split: train}]")


def test_everything_has_a_default_but_data_and_output(tmp_path):
    (tmp_path / "own.yaml").write_text("")
    for words, missing in (
        (["--data.dataset", "digits"], "run.output_dir is missing"),
        (["--output_dir", "a"], "data.dataset is missing"),
        (["--output_dir", "a", "--data.dataset", "digits"], "evaluation.radii is missing"),
    ):
        with pytest.raises(ValueError, match=missing):
            read_recipe("tecoa", parse_arguments([*words, "--config", "own.yaml"], DEFAULT))


def test_values_reach_the_settings():
    found = recipe("--training.learning_rate", "1e-5", "--training.eps", "0.1", "--training.bf16", "true",
                   "--data.classes", "[one, two]", "--evaluation.radii", "[1/255]", "--device", "cpu")  # fmt: skip
    assert found.training.learning_rate == 1e-5
    assert found.training.threat_model().eps == 0.1
    assert found.training.bf16 is True
    assert found.training.use_cpu is True
    assert found.data.classes == ["one", "two"]
    assert [threat.eps for threat in found.evaluation.threat_models()] == [1 / 255]
    assert [task.name for task in found.tasks] == ["trained classes", "held-out classes"]
    assert found.source["training"]["learning_rate"] == "1e-5"


# ---- objectives


def test_presets():
    paper, released = (build_objective("pmg_aft", {"preset": name}) for name in ("paper", "released"))
    assert (paper.temperature, paper.reduction, paper.image_mean) == (None, "batch_mean", None)
    assert (released.temperature, released.reduction, released.alpha) == (1.0, "sum", 1.0)
    assert released.image_mean[0] == 0.485
    assert build_objective("pmg_aft", None) == paper


def test_overriding_one_field_of_a_preset_keeps_the_others():
    released = build_objective("pmg_aft", {"preset": "released"})
    changed = build_objective("pmg_aft", {"preset": "released", "alpha": "0"})
    assert changed.alpha == 0.0
    assert (changed.temperature, changed.reduction, changed.image_std) == (1.0, "sum", released.image_std)
    assert recipe("--objective.temperature", "2").objective.reduction == "sum"
    own = {"preset": "paper", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert build_objective("pmg_aft", own).image_mean == [0.5] * 3


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("pmg_aft", {"preset": "realeased"}, "did you mean 'released'"),
        ("tecoa", {"preset": "paper"}, "none for this method"),
        ("pmg_aft", {"alfa": 1}, "did you mean 'alpha'"),
        ("pmg_aft", {"preset": "released", "alfa": 1}, "did you mean 'alpha'"),
        ("fare2", {}, "did you mean 'fare'"),
    ],
)
def test_unknown_objectives(method, values, message):
    with pytest.raises(ValueError, match=message):
        build_objective(method, values)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_trainer(method):
    assert build_objective(method, None) == cli.trainer_class(method).objective_cls()


# ---- help and usage


@pytest.mark.parametrize("script", ["pmgaft.py", "tecoa.py", "fare.py"])
def test_help_answers_without_torch(script):
    probe = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print('HEAVY', [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    command = [sys.executable, "-c", probe, str(RECIPES / script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert "HEAVY []" in done.stdout
    assert "--section.key VALUE" in done.stdout
    assert "per_device_train_batch_size: 64" in done.stdout


@pytest.mark.parametrize(
    ("words", "status"),
    [([], 2), (["--help"], 0), (["train"], 2), (["train", "tekoa", "--config", "a"], 2), (["train", "tecoa"], 2)],
)
def test_usage(words, status, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == status
    methods = "pmg_aft,tecoa,fare,trades,clean,apt,tapt,fap,coop"
    assert f"hf-robust-clip train {{{methods}}} --config FILE" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--config", str(DEFAULT)], [f"--config={DEFAULT}"]], ids=["two words", "one word"])
def test_main_runs_a_method_with_a_config(words, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "train", seen.append)
    cli.main(["train", "pmg_aft", *words])
    assert [found.method for found in seen] == ["pmg_aft"]
    assert seen[0].objective.reduction == "sum"


@pytest.mark.parametrize("words", [["--config", "none.yaml"], ["--config"]], ids=["missing file", "no file"])
def test_main_with_a_wrong_config_ends_with_one_line(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "tecoa", *words])
    assert stopped.value.code == 2
    assert re.fullmatch(r"error: .*--config.*\n", capsys.readouterr().err)


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("HF_ROBUST_CLIP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown"):
        cli.run_recipe("pmg_aft", DEFAULT, "", ["--epochs", "1"])


# ---- the configs that come along


def top_comment(config: Path) -> str:
    """The comment lines a config begins with, continuation marks and line breaks removed."""
    lines = config.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return re.sub(r"\\?\s+", " ", " ".join(line.removeprefix("#") for line in lines[:count]))


def test_there_are_configs_for_six_methods_and_four_models():
    assert {method_of(config) for config in CONFIGS} == {"pmg_aft", "tecoa", "fare", "apt", "tapt", "fap"}
    assert len({config.parent for config in CONFIGS}) == 4


@pytest.mark.parametrize("config", **named(CONFIGS))
def test_every_config_is_read(config):
    found = recipe(config=config)
    assert found.training.threat_model().eps > 0
    assert (found.model.name.split("/")[-1]) == config.parent.name
    if "imagenet" in config.name or (config.name.startswith("tapt") and "base" in config.parent.name):
        update = found.training.per_device_train_batch_size * found.training.gradient_accumulation_steps
        assert update == {"fare": 128, "apt": 32, "tapt": 32, "fap": 4}.get(found.method, 256)
        assert ("tiny" in config.name) == (found.data.dataset == "zh-plus/tiny-imagenet")


@pytest.mark.parametrize("config", **named(CONFIGS))
def test_every_config_says_how_to_launch_it_and_what_is_known(config):
    text = top_comment(config)
    launch = re.search(r"launch: (accelerate launch .*?)(?= published| measured|$)", text)[1]
    paths = re.findall(r"recipes/\S+", launch)
    assert all((RECIPES.parent / path).is_file() for path in paths), paths
    script = (RECIPES.parent / next(path for path in paths if path.endswith(".py"))).read_text()
    assert f'run_recipe("{method_of(config)}"' in script
    own = config.relative_to(RECIPES).as_posix()
    if "--config " in launch:
        assert f"--config recipes/{own}" in launch
    else:
        assert own in script
    assert "published" in text
    assert "measured by us" in text


APT_CONFIGS = [path for path in CONFIGS if "apt_" in path.name and path.parent.name != "digits-clip"]


@pytest.mark.parametrize("config", **named(APT_CONFIGS))
def test_prompts_are_trained_as_published(config):
    found = recipe(config=config)
    assert found.prompts.design == config.stem.split("_")[1].upper()
    assert (found.prompts.num_vision_tokens, found.prompts.vision_depth) == (2, 9)
    assert (found.data.shots, found.data.augment, found.prompt.template) == (16, True, "a photo of a {}.")
    training = found.training
    assert (training.learning_rate, training.weight_decay, training.momentum) == (0.0035, 5e-4, 0.9)
    assert (training.num_train_epochs, training.warmup_steps) == (100, 500)
    assert (training.attack_steps, training.threat_model().eps) == (2, 1 / 255)
    assert found.objective.batch_mix == "adv_half"
    assert found.title == f"APT-{found.prompts.design}"  # of TAPT too: its static prompts
    assert "0.035" in config.read_text(), "the paper's other learning rate is named"


def test_prompts_of_a_method_can_be_changed_or_replaced():
    found = recipe(config=APT_CONFIGS[0])
    assert found.prompts.design == "V"
    assert recipe("--prompts.num_vision_tokens", "5", config=APT_CONFIGS[0]).prompts.num_vision_tokens == 5
    own = cli.build_prompts("fap", {"vision_depth": 3, "text_depth": 3})
    assert (own.design, own.coupling, own.text_depth) == ("VLJ", "vision_to_text", 3)
    assert cli.build_prompts("pmg_aft", None) is None
    assert cli.build_prompts("pmg_aft", {"design": "V"}).design == "V"
    assert cli.rival_prompts(found, "tecoa") is None
    assert cli.rival_prompts(recipe("--prompts.vision_depth", "2", config=APT_CONFIGS[0]), "apt").vision_depth == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts.design", "X"], "prompts.design='X' must be 'V'/'VLI'/'VLJ'/'T'/'pixel'"),
        (["--prompts.desing", "V"], "unknown key in prompts: 'desing'; did you mean 'design'"),
        (["--prompts.vision_depth", "nine"], "prompts.vision_depth='nine' must be int"),
        (["--model.lora_rank", "4"], "lora_rank=4 and prompts don't go together"),
        (["--tasks", "[{dataset: digits, augment: true}]"], "evaluated as they are"),
        (["--objective.batch_mix", "half"], "objective.batch_mix='half' must be 'adv_half'"),
    ],
)
def test_wrong_settings_of_prompts_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        recipe(*words, config=APT_CONFIGS[0])


TAPT_CONFIGS = [path for path in APT_CONFIGS if method_of(path) == "tapt"]
TAPT_SETS = ("imagenet", "caltech101", "dtd", "eurosat", "pets", "aircraft", "food101", "flowers102", "cars", "sun397",
             "ucf101")  # fmt: skip


@pytest.mark.parametrize("config", **named(TAPT_CONFIGS))
def test_prompts_are_tuned_as_the_released_code_does(config):
    found = recipe(config=config)
    design = found.prompts.design
    assert list(found.adaptations) == [f"TAPT-{design} released", f"TAPT-{design} paper"]
    released, paper = found.adaptations.values()
    assert (released.num_views, released.selected, released.learning_rate) == (64, 0.1, 5e-4)
    assert released.align_weight == pytest.approx(100 / 9)
    assert (released.reset_to, paper.reset_to) == ("released", "trained")
    assert tuple(task.dataset for task in found.tasks) == TAPT_SETS


def test_the_first_adaptation_is_saved_and_keys_change_every_preset():
    config = RECIPES / "configs/digits-clip/tapt.yaml"
    words = [
        "--adaptation.gamma",
        "1",
        "--adaptation.crop",
        "{scale: [0.5, 1]}",
        "--defence_evaluation.radius",
        "8/255",
    ]
    found = recipe(*words, config=config)
    assert [(a.gamma, a.crop.scale, a.num_views) for a in found.adaptations.values()] == [(1.0, (0.5, 1.0), 32)] * 2
    blind, worst = cli.defence_settings(found.evaluation, found.defence_evaluation)
    assert [how.seen.name for how in (blind, worst)] == ["defence_blind", "adaptive_worst"]
    assert (blind.attack, worst.attack.pgd_steps, worst.attack.num_queries) == (found.evaluation.attack, 10, 40)
    assert [threat.eps for threat in worst.threat_models()] == [8 / 255]
    assert list(recipe("--adaptation.preset", "null", config=config).adaptations) == ["TAPT-VLI", "TAPT-VLI released"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adaptation.preset", "papre"], "unknown adaptation.preset: 'papre'; did you mean 'paper'"),
        (["--adaptation.gama", "1"], "unknown key in adaptation: 'gama'; did you mean 'gamma'"),
        (["--adaptation.num_views", "1"], "num_views=1"),
        (["--adaptation.selected", "0.001"], "selected=0.001 keeps none of 32"),
        (["--adaptation.gamma", "2"], "gamma=2.0"),
        (["--adaptation.crop", "{scal: 1}"], "unknown key in adaptation.crop: 'scal'"),
        (["--statistics.max_images", "0"], "statistics.max_images=0 must be at least 1"),
        (["--defence_evaluation.worst", "pgd-20"], "defence_evaluation.worst='pgd-20'"),
        (["--defence_evaluation.presets", "paper"], "presets='paper' must be"),
        (["--defence_evaluation.max_images", "0"], "defence_evaluation.max_images=0 must be at least 1"),
        (["--defence_evaluation.eot", "0"], "eot=0"),
        (["--defence_evaluation.radius", "3/255"], "defence_evaluation.radius='3/255'"),
        (["--compare", "[tapt]"], "unknown method in compare: 'tapt'"),
    ],
)
def test_wrong_settings_of_a_defence_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        recipe(*words, config=RECIPES / "configs/digits-clip/tapt.yaml")


def test_sections_of_a_defence_go_with_tapt_alone():
    with pytest.raises(ValueError, match="the section adaptation goes with tapt, not with apt"):
        recipe("--adaptation.gamma", "1", config=RECIPES / "configs/digits-clip/apt.yaml")


def test_an_evaluation_takes_a_defence():
    found = evaluation(
        "--defence.method", "ensemble", "--defence.num_views", "16", "--attacks", "[pgd-5, worst-5-0-9]"
    )
    assert (found.defence.name, found.defence.parameters()["num_views"]) == ("ensemble-16", 16)
    assert [how.seen.name for how in found.evaluations] == ["defence_blind", "adaptive_worst"]
    assert evaluation("--defence.method", "ttc", "--evaluation.target", "bpda").evaluations[0].seen.name == "bpda"
    assert evaluation().defence is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--defence.num_views", "16"], "defence.method is missing"),
        (["--defence.method", "tadt"], "unknown defence.method: 'tadt'; did you mean 'tapt'"),
        (["--defence.method", "ttc", "--defence.num_views", "16"], "unknown key in defence: 'num_views'"),
        (["--defence.method", "ttc", "--reference", "digits-clip"], "is undefended"),
        (["--defence.method", "ttc", "--evaluation.target", "static"], "target='static' says nothing of ttc"),
        (["--evaluation.target", "adaptive"], "target='adaptive' needs the section defence"),
        (["--attacks", "worst"], "target='adaptive_worst' needs the section defence"),
        (["--defence.method", "ttc", "--evaluation.target", "adaptiv"], "evaluation.target='adaptiv' must be"),
    ],
)
def test_a_defence_that_makes_no_sense_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        evaluation(*words)


def test_every_config_is_of_a_method_or_known():
    others = set((RECIPES / "configs").rglob("*.yaml")) - {*METHOD_CONFIGS, *EVALUATION_CONFIGS}
    assert {path.name for path in others} == {"pretrain.yaml"}


def test_methods_of_the_mini_benchmark_share_everything_but_themselves():
    """The same data, attack and budget for all; each learning rate is the one that held-out images chose."""
    own = [path for path in METHOD_CONFIGS if path.parent.name == "mini-clip" and "apt" not in method_of(path)]
    assert {path.stem for path in own} == {"clean", "tecoa", "fare", "trades", "pmg_aft_paper", "pmg_aft_released"}
    settings = [yaml.safe_load(path.read_text()) for path in own]
    for path, found in zip(own, settings, strict=True):
        assert found["run"].pop("output_dir") == f"out/mini-benchmark/{path.stem}"
        assert found["training"].pop("learning_rate") in ("1e-4", "3e-4", "1e-3")
        preset = (found.pop("objective") or {}).get("preset")
        assert preset == {"pmg_aft_paper": "paper", "pmg_aft_released": "released"}.get(path.stem)
        assert recipe(config=path).training.threat_model().eps == 2 / 255
    assert all(found == settings[0] for found in settings)


# ---- evaluation


def evaluation(*words, config=EVALUATION_CONFIGS[0]):
    return cli.read_evaluation(parse_arguments(words, config, cli.EVALUATION_SECTIONS))


@pytest.mark.parametrize("config", **named(EVALUATION_CONFIGS))
def test_every_evaluation_config_is_read(config):
    found = evaluation(config=config)
    assert found.evaluations
    assert found.tasks


def test_short_options_of_an_evaluation(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    found = evaluation(
        "--model", "org/robust", "--revision", "abc", "--dataset", "my/pictures", "--class_names", "names.txt",
        "--max_images", "7", "--template", "a {}", "--attacks", "[cw-5, autoattack]", "--radii", "[1/255]",
        "--compare", "org/other", "--reference", "digits-clip", "--output_dir", "here",
    )  # fmt: skip
    assert (found.model.name, found.model.revision, found.reference) == ("org/robust", "abc", "digits-clip")
    assert found.checkpoints == ("org/robust", "org/other")
    assert [(t.dataset, t.split, t.class_names, t.max_images) for t in found.tasks] == [
        ("my/pictures", "test", "names.txt", 7)
    ]
    assert found.prompt.template == "a {}"
    assert [e.attack.name(10) for e in found.evaluations] == ["CW-5", "AutoAttack"]
    assert found.run.output_dir == "here"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pgd-100", "PGD-100"),
        ("CW-20", "CW-20"),
        ("apgd", "APGD-CE+APGD-T"),
        ("autoattack", "AutoAttack"),
        ("autoattack-rand", "AutoAttack rand"),
        ("square", "SQUARE"),
    ],
)
def test_attacks_by_name(name, expected):
    assert cli.attack_suite(name).name(10) == expected


def test_step_size_reaches_pgd():
    (found,) = evaluation("--evaluation.step_size", "1/255").evaluations
    assert found.attack.parameters(found.threat_models(), 10)["step_size"] == pytest.approx([1 / 255] * 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attacks", "[pgd-20, autoatack]"], "unknown attack 'autoatack'"),
        (["--attacks", "autoattack", "--evaluation.step_size", "1/255"], "goes with pgd-N"),
        (["--max_images", "3"], "--max_images goes with --dataset"),
        (["--dataset", "digits", "--max_images", "0"], "max_images=0"),
        (["--dataset", "digits", "--splt", "test"], "did you mean 'split'|unknown option"),
        (["--radii", "8"], "radii=8"),
        (["--radii", "[8]"], "8/255"),
        (["--radii", "[]"], "at least one radius"),
        (["--training.seed", "1"], "unknown option --training.seed"),
        (["--compare", "[[a]]"], "must be a Hub id"),
        (["--tasks", "[]"], "must be a list of datasets"),
        (["--evaluation.precision", "fp16"], "precision"),
        (["--run.push_to_hub", "a/b"], "goes with training"),
        (["--prompt.template", "3"], "has no"),
    ],
)
def test_wrong_evaluation_settings_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        evaluation(*words)


@pytest.mark.parametrize("config", **named(ACCELERATE_CONFIGS))
def test_accelerate_reads_its_configs(config):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(config))
    content = yaml.safe_load(config.read_text())
    assert found.num_processes == content["num_processes"]
    assert found.distributed_type.value == content["distributed_type"]
    assert found.mixed_precision == content["mixed_precision"]
    assert config.read_text().startswith("# ")
