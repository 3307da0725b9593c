"""From words on a command line to settings; no model is loaded here."""

import json
import re
import runpy
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from hf_robust_clip import BPDA, PGD, PMGAFT, Blended, CleanCLIP, CleanerCLIP, cli
from hf_robust_clip.attacks.named import suite_named
from hf_robust_clip.command_line import class_path, classes_in, packaged_config, read_command
from hf_robust_clip.runs import clean, evaluate, poison, train
from hf_robust_clip.runs.train_settings import COMMAND, OBJECTIVE

RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT = RECIPES / "configs/digits-clip/pmg_aft.yaml"
TAPT = RECIPES / "configs/digits-clip/tapt.yaml"
METHODS = ("tapt", *sorted(cls.__module__.rpartition(".")[2] for cls in classes_in(OBJECTIVE).values()))
BACKDOORS = {"poison", "clean_clip", "cleaner_clip"}
WITHOUT_CONFIGS = {"contrastive", *BACKDOORS}  # it pretrains, and they have commands of their own
PROMPTS = {"apt", "tapt", "coop", "fap", "c_avp"}
METHOD_CONFIGS = sorted(
    path
    for path in (RECIPES / "configs").rglob("*.yaml")
    if path.stem.startswith(METHODS) and path.stem not in BACKDOORS
)
CONFIGS = [path for path in METHOD_CONFIGS if path.parent.name != "mini-clip"]
EVALUATIONS = (
    "evaluate",
    *(f"mini-clip/{name}" for name in ("pgd", "apgd", "auto_attack")),
    *(f"{model}/prompts_{name}" for model in ("digits-clip", "mini-clip") for name in ("pgd", "auto_attack")),
    "mini-clip/prompts_apgd",
)
EVALUATION_CONFIGS = [RECIPES / f"configs/{name}.yaml" for name in EVALUATIONS]
ACCELERATE_CONFIGS = sorted((RECIPES / "accelerate").glob("*.yaml"))


def named(paths):
    return {"argvalues": paths, "ids": [path.relative_to(RECIPES).as_posix() for path in paths]}


def method_of(config: Path) -> str:
    return next(method for method in METHODS if config.name.startswith(method))


def what_it_lacks(config: Path) -> list[str]:
    """Flags that its launch line has: where texts are the user's own, a known set stands for them."""
    return ["--descriptions", "digits"] if "--descriptions FILE" in config.read_text(encoding="utf-8") else []


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Configs name a relative output folder, and TrainingArguments may set variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def recipe(*words, config=DEFAULT):
    return train.read(words, config)


def evaluation(*words, config=EVALUATION_CONFIGS[0]):
    return evaluate.read(words, config)


# ---- texts and numbers


TYPED = ("010", "12:30", "2024-01-01", "no", "1e3", "0x1F", "1_000", ".5", "~", "true", "a: b", "# x", "&a", "!x")


@pytest.mark.parametrize("text", TYPED)
def test_what_belongs_into_a_text_is_taken_as_typed(text):
    """YAML would read a number, a time, a date, a truth value or nothing."""
    options = ("output_dir", "model_name_or_path", "dataset_train_split", "dataset_revision", "run_name")
    found = recipe(*(f"--{option}={text}" for option in options), f"--template={text} {{}}")
    assert {found.source[option] for option in options} == {text}
    assert (found.output_dir, found.training.run_name, found.data.split) == (text,) * 3
    assert found.template == f"{text} {{}}"
    prompts = recipe(f"--prompts.context_init={text}", config=RECIPES / "configs/digits-clip/apt.yaml").method.adapter
    assert prompts.context_init == text
    found = evaluation("--dataset_name", text, "--dataset_config", text, "--model_name_or_path", text)
    assert (found.tasks[0].dataset, found.tasks[0].config, found.model.model_name_or_path) == (text,) * 3


@pytest.mark.parametrize("text", [text for text in TYPED if text not in ("~", "a: b", "# x", "&a", "!x")])
def test_what_belongs_into_a_text_is_taken_as_written(text):
    """In a file YAML's own signs count: ~ is nothing, # begins a comment."""
    tasks = f"[{{dataset: {text}, name: {text}, classes: [{text}], class_names: {{{text}: {text}}}}}]"
    own = [line for line in DEFAULT.read_text().splitlines() if not line.startswith(("tasks:", "  - {", "output_dir"))]
    Path("own.yaml").write_text("\n".join([*own, f"output_dir: {text}", f"tasks: {tasks}"]))
    for found in (recipe("--config", "own.yaml"), recipe("--output_dir", text, "--tasks", tasks)):
        (task,) = found.tasks
        assert (found.output_dir, task.dataset, task.name) == (text,) * 3
        assert (list(task.classes), dict(task.class_names)) == ([text], {text: text})
    assert list(recipe("--classes", f"[{text}, b]").data.classes) == [text, "b"]


def test_nothing_and_collections_where_a_text_may_stand_too():
    data = recipe("--model_revision", "null", "--class_names", "{0: no, 1: 010}").data
    assert data.class_names == {"0": "no", "1": "010"}
    data = recipe("--class_names", "[yes, no]", "--background", "[1, 2, 3]").data
    assert (list(data.class_names), list(data.background)) == (["yes", "no"], [1, 2, 3])


@pytest.mark.parametrize("text", ["010", "0x1F", "1:30", "0b1", "08", "1_0"])
@pytest.mark.parametrize("place", ["flag", "file"])
def test_a_number_is_written_in_decimal_digits(text, place):
    Path("own.yaml").write_text(DEFAULT.read_text().replace("seed: 0", f"seed: {text}"))
    words = ["--seed", text] if place == "flag" else ["--config", "own.yaml"]
    with pytest.raises(ValueError, match=rf"seed.*{text}"):
        recipe(*words)


def test_values_take_the_type_of_their_field():
    found = recipe("--learning_rate", "1e-5", "--eps", "0.1", "--bf16", "--classes", "[one, two]",
                   "--evaluation.radii", "[1/255]", "--use_cpu", "--max_steps=7",
                   "--lr_scheduler_kwargs", "{num_cycles: 0.5}")  # fmt: skip
    assert (found.training.learning_rate, found.training.max_steps, found.training.bf16) == (1e-5, 7, True)
    assert found.training.lr_scheduler_kwargs == {"num_cycles": 0.5}
    assert found.training.threat_model().eps == 0.1
    assert found.training.use_cpu is True
    assert found.data.classes == ["one", "two"]
    assert [threat.eps for threat in found.evaluation.threat_models()] == [1 / 255]
    assert [task.name for task in found.tasks] == ["trained classes", "held-out classes"]
    assert found.source["learning_rate"] == 1e-5
    assert found.source["attack_steps"] == 3


def test_config_replaces_the_default_whole():
    Path("own.yaml").write_text(
        "dataset_name: a/b\noutput_dir: here\nobjective: TeCoA\nevaluation: {radii: [1/255]}\n"
    )
    found = recipe("--dataset_train_split", "dev", "--config", "own.yaml")
    assert (found.data.dataset, found.data.split, found.output_dir, found.training.attack_steps) == (
        "a/b", "dev", "here", 2,
    )  # fmt: skip
    assert [(task.dataset, task.split) for task in found.tasks] == [("a/b", "test")]


def test_a_switch_may_stand_alone():
    for words in (["--overwrite"], ["--overwrite", "true"], ["--overwrite=true"]):
        assert recipe(*words, "--output_dir", "a").overwrite is True


def test_everything_that_is_missing_is_named_at_once():
    Path("own.yaml").write_text("")
    with pytest.raises(ValueError, match=r"dataset_name, objective, output_dir, evaluation\.radii"):
        recipe("--config", "own.yaml")
    with pytest.raises(ValueError, match=r"missing: objective, evaluation\.radii"):
        recipe("--config", "own.yaml", "--dataset_name", "digits", "--output_dir", "a")


WRONG = [
    (["epochs"], "'epochs' stands alone"),
    (["--eps"], "--eps has no value"),
    (["--eps", "--overwrite"], "--eps has no value"),
    (["--learning_rat", "1"], "did you mean 'learning_rate'"),
    (["--training.eps", "1"], "unknown option --training.eps"),
    (["--evaluation.radi", "[1]"], "did you mean 'evaluation.radii'"),
    (["--seed=1", "--seed=1"], "--seed is given twice"),
    (["--learning_rate", "abc"], "learning_rate.*float.*abc"),
    (["--seed", "1.5"], "seed.*int.*1.5"),
    (["--seed", "true"], "seed.*int"),
    (["--overwrite", "maybe"], "overwrite.*bool.*maybe"),
    (["--attack_steps", "null"], "attack_steps"),
    (["--attack_steps", "0"], "attack_steps=0"),
    (["--evaluation.attack", "pgd-0"], "num_steps=0"),
    (["--evaluation.attack", "pdg-20"], "attack='pdg-20'"),
    (["--evaluation.attack", "my.Attack"], "my.Attack"),
    (["--evaluation.radii", "[]"], "evaluation.radii"),
    (["--evaluation.radii", "8/255"], "evaluation.radii.*8/255"),
    (["--evaluation.batch_size", "0"], "batch_size=0"),
    (["--evaluation.norm", "l7"], "norm='l7'"),
    (["--tasks", "5"], "tasks.*5"),
    (["--tasks", "[digits]"], "tasks.*digits"),
    (["--tasks", "[{split: test}]"], r"tasks\[0\].dataset is missing"),
    (["--tasks", "[{dataset: digits, splitt: test}]"], "tasks.*'splitt'"),
    (["--tasks", "[{dataset: digits}, {dataset: digits, split: train}]"], "name"),
    (["--compare", "{a: b}"], "compare"),
    (["--compare", "tekoa"], "did you mean 'TeCoA'"),
    (["--max_images", "0"], "max_images=0"),
    (["--push_to_hub", "--hub_model_id", "a b"], "a b"),
    (["--use_peft", "--prompts.design", "V"], "use_peft"),
    (["--objective", "tekoa"], "did you mean 'TeCoA'"),
    (["--objective", "os.path"], "objective='os.path' is no Objective"),
    (["--objective", "hf_robust_clip.objectives.base.Objective"], "is abstract"),
    (["--objective", "hf_robust_clip.TTC"], "is no Objective"),
    (["--objective", "5"], "objective='5'"),
    (["--objective", "[a]"], "objective"),
    (["--objective.alfa", "1"], "did you mean 'alpha'"),
    (["--objective.alpha", "x"], "alpha.*float.*x"),
    (["--objective.alpha", "-1"], "alpha=-1"),
    (["--objective.alpha.x", "1"], "alpha"),
    (["--objective.preset", "realeased"], "objective.preset='realeased'"),
    (["--objective", "TeCoA", "--objective.preset", "paper"], "no presets"),
    (["--objective.kl_direction", "half"], "kl_direction"),
    (["--resume_from_checkpoint", "elsewhere"], "resume_from_checkpoint='elsewhere'"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_words_end_in_one_line_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run("train", DEFAULT, "", words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error) and len(error) < 900, error
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "did you mean 'learning_rate'"),
        ("- a", "must hold keys"),
        ("1: {}", "unknown key"),
        ("evaluation: 5", "evaluation"),
        ("evaluation: [radii]", "evaluation"),
        ("eps: 1/255\neps: 2/255", r"own\.yaml is not YAML: 'eps' stands twice \(line 1"),
        ("objective: {alpha: 1}", "class_path"),
        ("objective: {class_path: PMGAFT, alpha: 1}", "alpha"),
        ("objective: {class_path: PMGAFT, init_args: {alfa: 1}}", "did you mean 'alpha'"),
        ("objective: {class_path: PMGAFT, init_args: [alpha]}", "init_args"),
        ("objective: [PMGAFT]", "objective"),
        ("defence: {class_path: TAPT, init_args: {crop: {scal: [0.5, 1]}}}", "did you mean 'scale'"),
        ("seed: null", "seed"),
    ],
)
def test_config_with_other_keys(content, message):
    Path("own.yaml").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        recipe("--config", "own.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a: &a [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1 or str()}'] * 9)}]\n" for i in range(1, 9)),
            "values",
        ),
        ("tasks: &a {output_dir: *a}", "own.yaml"),
        ("tasks: " + "[" * 5000, "own.yaml"),
        ("# " + "x" * 2**20, "1 MB"),
        ("output_dir: !!python/object/apply:os.getcwd []", "own.yaml"),
        ("base: &b {dataset: a}\ntasks:\n  <<: *b\n  dataset: b\n  dataset: c", "'dataset' stands twice"),
        ("tasks:\n- {dataset: a, dataset: b}", "'dataset' stands twice"),
        ("output_dir: a\n---\noutput_dir: b", "own.yaml"),
    ],
    ids=["aliases", "itself", "deep", "huge", "tag", "merged", "inner", "two"],
)
def test_yaml_that_means_harm_is_one_line_with_the_files_name(content, message):
    Path("own.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"^(?=[^\n]*own\.yaml)[^\n]*{message}[^\n]*$") as info:
        recipe("--config", "own.yaml")
    assert len(str(info.value)) < 300


def test_a_config_that_is_no_text_is_named():
    Path("own.yaml").write_bytes("classes: [Käse]".encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.yaml is not UTF-8"):
        recipe("--config", "own.yaml")


def test_yaml_that_is_none_is_one_clear_error():
    Path("own.yaml").write_text("tasks: {eps: [}")
    for words, what in ((["--tasks", "["], "tasks"), (["--config", "own.yaml"], "own.yaml")):
        with pytest.raises(ValueError, match=what) as caught:
            recipe(*words)
        assert "\n" not in str(caught.value)


def test_a_flag_takes_the_place_of_the_files_value():
    """Nothing of what the file says of its own tasks is left in those of the command line."""
    (task,) = recipe("--tasks", "[{dataset: digits}]").tasks
    assert (task.name, task.classes) == (None, None)
    own = "{0: a, 1: b}"
    Path("own.yaml").write_text(DEFAULT.read_text().replace("classes:", "class_names: {7: c}\nclasses:", 1))
    assert recipe("--config", "own.yaml", "--class_names", own).data.class_names == {"0": "a", "1": "b"}


# ---- classes and presets


def test_presets():
    paper, released = (recipe("--objective.preset", name, "--objective.image_mean", "[0.5, 0.5, 0.5]",
                              "--objective.image_std", "[0.5, 0.5, 0.5]").method.objective
                       for name in ("paper", "released"))  # fmt: skip
    assert (paper.temperature, paper.reduction, paper.image_mean) == (None, "batch_mean", [0.5] * 3)
    assert (released.temperature, released.reduction, released.alpha) == (1.0, "sum", 1.0)
    assert recipe("--objective.preset", "null", "--objective", "hf_robust_clip.PMGAFT").method.objective == PMGAFT()
    own = "{class_path: PMGAFT, init_args: {preset: released, alpha: 0}}"
    changed = recipe("--objective", own).method.objective
    assert (changed.alpha, changed.reduction, changed.image_mean) == (0.0, "sum", PMGAFT.released_preset().image_mean)
    assert recipe("--objective.temperature", "2").method.objective.reduction == "sum"


def test_what_a_class_has_inside_keeps_the_defaults_of_that_class():
    """CleanCLIP's augmentation is another than that of the augmentation's own defaults; flags change parts of it."""

    def read(*words):
        return clean.read(
            ["--poisoned", "p", "--output_dir", "o", *words], packaged_config("coloured-digits/clean_clip")
        )

    assert read("--objective", "CleanerCLIP").about.objective == CleanerCLIP()
    part = read("--objective", "CleanerCLIP", "--objective.augmentation.crop.flip", "0").about.objective.augmentation
    own = CleanerCLIP().augmentation
    assert part == replace(own, crop=replace(own.crop, flip=0.0)) != own
    kept = read("--objective", "CleanerCLIP", "--objective.augmentation", "{colours: {greyscale: 0}}").about.objective
    assert kept.augmentation == replace(own, colours=replace(own.colours, greyscale=0.0))


def test_print_config_tells_presets_and_what_a_class_has_inside(capsys):
    released = ["--trigger", "Blended", "--trigger.preset", "released"]
    for read, config, words, name, value in (
        (poison.read, "poison", released, "trigger", Blended.released_preset()),
        (clean.read, "cleaner_clip", ["--objective", "CleanCLIP"], "objective", CleanCLIP()),
    ):
        with pytest.raises(SystemExit):
            read([*words, "--output_dir", "o", "--print_config"], packaged_config(f"coloured-digits/{config}"))
        found = yaml.safe_load(capsys.readouterr().out)[name]["init_args"]
        wanted = {key: own for key, own in json.loads(json.dumps(asdict(value))).items() if key != "editor"}
        assert {key: found[key] for key in wanted} == wanted


def test_another_class_takes_nothing_of_the_files_own():
    assert recipe("--objective", "TeCoA").source["objective"] == {
        "class_path": "hf_robust_clip.objectives.tecoa.TeCoA"
    }
    assert recipe("--objective", "PMGAFT").method.objective.reduction == "sum"  # the file's own


@pytest.mark.parametrize("name", ["PMGAFT", "pmg_aft", "pmgaft", "hf_robust_clip.PMGAFT"])
def test_a_class_is_found_by_its_name_its_files_name_and_its_path(name):
    assert class_path(name, OBJECTIVE, "objective").endswith("PMGAFT")


def test_a_class_of_the_current_folder(monkeypatch):
    Path("my_objective.py").write_text(
        "from dataclasses import dataclass\nfrom hf_robust_clip import TeCoA\n\n@dataclass(frozen=True)\n"
        "class Mine(TeCoA):\n    weight: float = 1.0\n"
    )
    objective = recipe("--objective", "my_objective.Mine", "--objective.weight", "2").method.objective
    assert (type(objective).__name__, objective.weight) == ("Mine", 2.0)
    monkeypatch.delitem(sys.modules, "my_objective")
    Path("broken.py").write_text("import no_such_module\n")
    with pytest.raises(ValueError, match=r"broken\.Mine.*no_such_module"):
        recipe("--objective", "broken.Mine")


# ---- help and usage


SCRIPTS = [path for path in sorted(RECIPES.glob("*.py")) if path.stem != "wheel"]


def printed(main, capsys):
    """What a command prints that ends well."""
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_help_lists_every_flag_with_its_meaning(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])
    text = printed(lambda: runpy.run_path(str(script), run_name="__main__"), capsys)
    module = runpy.run_path(str(script))
    assert text.splitlines()[2] == module["__doc__"].splitlines()[0]
    own = {"evaluate": evaluate.COMMAND, "clean": clean.COMMAND, "poison": poison.COMMAND}
    command = module.get("COMMAND") or own.get(script.stem, COMMAND)
    assert not [action.dest for action in command.parser._actions if not action.help]
    known = [name for prefix, classes in command.groups.items() for cls in classes
             for name in command.fields_of(cls, prefix)]  # fmt: skip
    assert len(known) > 10 and all(re.search(rf"^  --(\w+\.)*{name}\b", text, re.MULTILINE) for name in known)
    assert "<class" not in text and "==SUPPRESS==" not in text


def test_help_lists_the_settings_of_the_classes_that_a_config_names(monkeypatch, capsys):
    text = printed(lambda: cli.main(["train", "tapt", "--help"]), capsys)
    for flag in ("--objective.batch_mix", "--defence.gamma", "--defence_evaluation.attack.pgd_steps"):
        assert flag in text
    assert "weight in [0, 1] of the adversarial" in text
    text = printed(lambda: cli.main(["evaluate", "--help"]), capsys)
    assert "--fit_on.dataset" in text and "--defence.gamma" not in text
    text = printed(lambda: cli.main(["evaluate", "--defence.help", "ttc"]), capsys)
    assert "--defence.num_steps" in text and "--objective" not in text
    assert not list(Path().iterdir())


def test_help_tells_the_defaults_of_its_config(monkeypatch, capsys):
    text = " ".join(printed(lambda: cli.main(["poison", "--help"]), capsys).split())
    told = yaml.safe_load(packaged_config("coloured-digits/poison").read_text())
    for wanted in (f"(type: float, default: {told['rate']})", f"default: {told['target']})",
                   f"default: {told['scratch']['context_length']})", "default: BadNet, known"):  # fmt: skip
        assert wanted in text
    text = printed(lambda: cli.main(["train", "clip-vit-base-patch32/pmg_aft_imagenet", "--help"]), capsys)
    assert "(default: [0.485, 0.456, 0.406])" in text, "which the preset says"
    plain = poison.COMMAND.parser.get_defaults()
    assert plain.rate is None and plain.learning_rate == 5e-5, "a help leaves what is read afterwards alone"


def test_every_packaged_config_is_read_by_its_name(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    scripts = {"models": "benchmark", "sources": "pretrain"}
    runs = {"trigger": poison, "poisoned": clean, "objective": train, "evaluation": evaluate}
    for path in (RECIPES / "configs").rglob("*.yaml"):
        config = packaged_config(path.relative_to(RECIPES / "configs").with_suffix("").as_posix())
        assert config == path
        kinds = ("trigger", "poisoned", "objective", *scripts, "evaluation")
        kind = next(key for key in kinds if key in yaml.safe_load(config.read_text()))
        words = ["--output_dir", "a", *(["--dataset_name", "digits"] if kind == "evaluation" else [])]
        words += ["--defence", "TTC"] if path.stem == "defences" else []  # which a benchmark names
        words += what_it_lacks(config)
        if kind in scripts:
            assert read_command(import_module(scripts[kind]).COMMAND, words, config).made().output_dir == "a"
        else:
            assert runs[kind].read(words, config).output_dir == "a"


def test_print_config_gives_a_config(capsys):
    with pytest.raises(SystemExit) as stopped:
        recipe("--print_config", "--learning_rate", "1e-5", "--hub_token", "mine")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    found = yaml.safe_load(text)
    assert (found["learning_rate"], found["attack_steps"], found["weight_decay"]) == (1e-5, 3, 0.0)
    assert found["objective"]["class_path"].endswith("PMGAFT") and "hub_token" not in found


@pytest.mark.parametrize(("words", "status"), [([], 2), (["--help"], 0), (["trian"], 2), (["card"], 2)])
def test_usage(words, status, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == status
    assert "hf-robust-clip train" in capsys.readouterr().out


def test_a_word_that_is_no_command_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == 2 and "'trian'" in capsys.readouterr().err


def test_a_command_without_what_it_needs_is_no_unknown_one(capsys):
    with pytest.raises(SystemExit):
        cli.main(["card"])
    assert "FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--compare", "--reference"])
def test_checkpoints_that_are_not_there_are_told_before_the_first_is_attacked(flag, tmp_path):
    words = ["--dataset_name", "digits", "--max_images", "2", "--output_dir", str(tmp_path / "out"), flag, "nowhere"]
    with pytest.raises(OSError, match="'nowhere'"):
        evaluate.prepare(evaluation(*words))
    assert not (tmp_path / "out").exists()


def test_one_attack_takes_the_place_of_a_configs_attacks():
    assert [how.attack for how in evaluation("--evaluation.attack", "pgd-3").evaluations] == [PGD(3)]


def test_help_knows_the_classes_of_each_kind(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert "RTPT" in text and "TAPT" in text and "%%" not in text


def test_version(capsys):
    cli.main(["--version"])
    assert re.fullmatch(r"hf-robust-clip \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ([], "PMG-AFT"),
        (["tecoa"], "TeCoA"),
        (["--config", str(DEFAULT)], "PMG-AFT"),
        ([f"--config={DEFAULT}"], "PMG-AFT"),
        (["clip-vit-base-patch32/apt_v_imagenet"], "APT-V"),
    ],
)
def test_main_runs_a_config_by_name_or_file(words, title, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train", seen.append)
    cli.main(["train", *words])
    assert [found.title for found in seen] == [title]


def test_a_config_that_does_not_come_along(capsys):
    for words, message in ((["tekoa"], "tecoa"), (["--config"], "--config has no value")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", *words])
        assert stopped.value.code == 2
        assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert packaged_config("pmg_aft") == DEFAULT


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("HF_ROBUST_CLIP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown"):
        cli.run("train", DEFAULT, "", ["--epochs", "1"])


# ---- the configs that come along


def top_comment(config: Path) -> str:
    """The comment lines a config begins with, continuation marks and line breaks removed."""
    lines = config.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return re.sub(r"\\?\s+", " ", " ".join(line.removeprefix("#") for line in lines[:count]))


def test_there_are_configs_for_every_method_and_seven_models():
    assert {method_of(config) for config in CONFIGS} == {*METHODS} - {"trades", "clean", *WITHOUT_CONFIGS}
    assert len({config.parent for config in CONFIGS}) == 7


@pytest.mark.parametrize("model", ["clip-vit-base-patch32", "clip-vit-base-patch16"])
def test_every_method_has_a_config_for_both_base_models(model):
    """FAP was published for ViT-B/32 alone, C-AVP for no CLIP, and CoOp, which isn't attacked, is a control."""
    own = {method_of(config) for config in CONFIGS if config.parent.name == model}
    assert {*METHODS} - {"trades", "clean", "fap", "coop", "c_avp", *WITHOUT_CONFIGS} <= own


DEFAULTS = [path for path in CONFIGS if "imagenet" in path.name and method_of(path) not in ("pmg_aft", "apt", "tapt")]


@pytest.mark.parametrize("config", **named(DEFAULTS))
def test_losses_have_their_published_settings(config):
    """Those that are defaults, too; ASCL's depend on the number of classes and on how few images share one."""
    found = recipe(*what_it_lacks(config), config=config).method.objective
    changed = {"ascl": {"kl": 2 / 200, "text_anchors": True}}.get(method_of(config), {})
    assert found == type(found)(**changed)


def test_configs_of_both_base_models_differ_in_nothing_but_the_model():
    """How an update is divided is a matter of memory; the update is the same."""
    compared = 0
    for config in CONFIGS:
        other = config.parents[1] / "clip-vit-base-patch16" / config.name
        if config.parent.name != "clip-vit-base-patch32" or not other.is_file():
            continue
        both = [yaml.safe_load(path.read_text().replace(path.parent.name, "MODEL")) for path in (config, other)]
        updates = [own.pop("per_device_train_batch_size") * own.pop("gradient_accumulation_steps", 1) for own in both]
        assert both[0] == both[1] and updates[0] == updates[1], config.name
        compared += 1
    assert compared > 15


@pytest.mark.parametrize("config", **named(CONFIGS))
def test_every_config_is_read(config):
    found, method = recipe(*what_it_lacks(config), config=config), method_of(config)
    assert found.training.threat_model().eps > 0
    model = {"laion-vit-b-32": "CLIP-ViT-B-32-laion2B-s34B-b79K"}.get(config.parent.name, config.parent.name)
    assert found.model.model_name_or_path.split("/")[-1] == model
    assert bool(found.defences) == (method in ("tapt", "c_avp"))
    if "imagenet" in config.name or (method == "tapt" and "base" in config.parent.name):
        update = found.training.per_device_train_batch_size * found.training.gradient_accumulation_steps
        others = {"tecoa_robustvlm": 128, "fare": 128, "tga_zsr": 128, "comp_tga": 128, "saft": 128, "ascl": 128,
                  "sim_clip": 64, "apt": 32, "tapt": 32, "fap": 4}  # fmt: skip
        assert update == next((count for name, count in others.items() if config.stem.startswith(name)), 256)
        assert ("tiny" in config.name) == (found.data.dataset == "zh-plus/tiny-imagenet")


@pytest.mark.parametrize("config", **named(CONFIGS))
def test_every_config_says_how_to_launch_it_and_what_is_known(config):
    text = top_comment(config)
    launch = re.search(r"launch: (accelerate launch .*?)(?= published| measured|$)", text)[1]
    paths = re.findall(r"recipes/\S+", launch)
    assert all((RECIPES.parent / path).is_file() for path in paths), paths
    script = (RECIPES.parent / next(path for path in paths if path.endswith(".py"))).read_text()
    assert f"/{method_of(config)}.yaml" in script or "recipes/train.py" in launch
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
    prompts = found.method.adapter
    assert prompts.design == config.stem.split("_")[1].upper()
    assert (prompts.num_vision_tokens, prompts.vision_depth) == (2, 9)
    assert (found.data.shots, found.data.augment, found.template) == (16, True, "a photo of a {}.")
    training = found.training
    assert (training.learning_rate, training.weight_decay, training.momentum) == (0.0035, 5e-4, 0.9)
    assert (training.num_train_epochs, training.warmup_steps) == (100, 500)
    assert (training.attack_steps, training.threat_model().eps) == (2, 1 / 255)
    assert found.method.objective.batch_mix == "adv_half"
    assert found.title == f"APT-{prompts.design}"  # of TAPT too: its static prompts
    assert "0.035" in config.read_text(), "the paper's other learning rate is named"


def test_prompts_of_a_method_can_be_changed_or_replaced():
    own = APT_CONFIGS[0]
    assert recipe(config=own).method.adapter.design == "V"
    assert recipe("--prompts.num_vision_tokens", "5", config=own).method.adapter.num_vision_tokens == 5
    short = ("--prompts.vision_depth", "3", "--prompts.text_depth", "3")
    found = recipe("--objective", "FAP", *short).method.adapter
    assert (found.design, found.coupling, found.text_depth) == ("VLJ", "vision_to_text", 3)
    assert recipe().method.adapter is None
    assert recipe("--prompts.design", "V").method.adapter.design == "V"
    rivals = recipe("--compare", "[tecoa, fap]", "--prompts.vision_depth", "2", config=own).rivals
    assert [rival.title for rival in rivals] == ["TeCoA", "FAP"]
    assert rivals[0].adapter is None and rivals[1].adapter.vision_depth == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts.design", "X"], "prompts.design.*X"),
        (["--prompts.desing", "V"], "did you mean 'prompts.design'"),
        (["--prompts.vision_depth", "nine"], "prompts.vision_depth.*int.*nine"),
        (["--use_peft", "--lora_r", "4"], "use_peft=true and prompts don't go together"),
        (["--tasks", "[{dataset: digits, augment: true}]"], "evaluated as they are"),
        (["--objective.batch_mix", "half"], "batch_mix.*half"),
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
    design = found.method.adapter.design
    assert list(found.defences) == [f"TAPT-{design} released", f"TAPT-{design} paper"]
    released, paper = found.defences.values()
    assert (released.num_views, released.selected, released.learning_rate) == (64, 0.1, 5e-4)
    assert released.align_weight == pytest.approx(100 / 9)
    assert (released.reset_to, paper.reset_to) == ("released", "trained")
    assert tuple(task.dataset for task in found.tasks) == TAPT_SETS


def test_the_first_defence_is_saved_and_settings_change_every_preset():
    words = ["--defence.gamma", "1", "--defence.crop", "{scale: [0.5, 1]}", "--defence_evaluation.radius", "8/255"]
    found = recipe(*words, config=TAPT)
    assert [(d.gamma, d.crop.scale, d.num_views) for d in found.defences.values()] == [(1.0, (0.5, 1.0), 32)] * 2
    worst = found.through
    assert (worst.attack.pgd_steps, worst.attack.num_queries) == (10, 40)
    assert [threat.eps for threat in worst.threat_models()] == [8 / 255]
    assert list(recipe("--defence.preset", "null", config=TAPT).defences) == ["TAPT-VLI", "TAPT-VLI released"]
    own = recipe("--defence_evaluation.attack", "{class_path: AdaptiveWorst, init_args: {pgd_steps: 1}}", config=TAPT)
    assert (own.through.attack.pgd_steps, own.through.attack.num_queries) == (1, 500)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--defence.preset", "papre"], "defence.preset='papre'"),
        (["--defence.gama", "1"], "did you mean 'gamma'"),
        (["--defence.num_views", "1"], "num_views=1"),
        (["--defence.selected", "0.001"], "selected=0.001"),
        (["--defence.gamma", "2"], "gamma=2.0"),
        (["--defence.crop", "{scal: 1}"], "did you mean 'scale'"),
        (["--fit_images", "0"], "fit_images=0 must be at least 1"),
        (["--defence_evaluation.attack", "pgd-20"], "defence_evaluation.attack='pgd-20'"),
        (["--defence_evaluation.presets", "paper"], "presets.*paper"),
        (["--defence_evaluation.max_images", "0"], "defence_evaluation.max_images=0 must be at least 1"),
        (["--defence_evaluation.eot", "0"], "eot=0"),
        (["--defence_evaluation.radius", "3/255"], "defence_evaluation.radius='3/255'"),
        (["--compare", "[tapt]"], "compare='tapt'"),
    ],
)
def test_wrong_settings_of_a_defence_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        recipe(*words, config=TAPT)


def test_what_is_of_a_defence_goes_with_one():
    apt = RECIPES / "configs/digits-clip/apt.yaml"
    for words in (["--defence.gamma", "1"], ["--defence_evaluation.eot", "2"], ["--fit_images", "9"]):
        with pytest.raises(ValueError, match="defence"):
            recipe(*words, config=apt)
    with pytest.raises(ValueError, match="TTC is saved with prompts, and PMG-AFT trains none"):
        recipe("--defence", "TTC")


def test_an_evaluation_takes_a_defence():
    found = evaluation("--defence", "ensemble", "--defence.num_views", "16", "--evaluation.attacks",
                       "[pgd-5, {class_path: AdaptiveWorst, init_args: {pgd_steps: 5, num_queries: 9}}]")  # fmt: skip
    assert (found.defence.name, found.defence.parameters()["num_views"]) == ("ensemble-16", 16)
    assert [how.seen.name for how in found.evaluations] == ["defence_blind", "adaptive_worst"]
    assert found.evaluations[1].attack.num_queries == 9
    assert evaluation("--defence", "ttc", "--evaluation.view", "bpda").evaluations[0].view == BPDA()
    assert evaluation().defence is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--defence.num_views", "16"], "give --defence CLASS"),
        (["--defence", "tadt"], "did you mean 'TAPT'"),
        (["--defence", "ttc", "--defence.num_views", "16"], "TTC has no 'num_views'"),
        (["--defence", "ttc", "--reference", "digits-clip"], "is undefended"),
        (["--defence", "ttc", "--evaluation.view", "static"], "view 'static' says nothing of ttc"),
        (["--evaluation.view", "adaptive"], "view 'adaptive' attacks"),
        (["--evaluation.attacks", "AdaptiveWorst"], "view 'adaptive_worst' attacks"),
        (["--defence", "ttc", "--evaluation.view", "adaptiv"], "evaluation.view='adaptiv' is unknown"),
    ],
)
def test_a_defence_that_makes_no_sense_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        evaluation(*words)


def test_every_config_is_of_a_method_or_known():
    others = set((RECIPES / "configs").rglob("*.yaml")) - {*METHOD_CONFIGS, *EVALUATION_CONFIGS}
    left = {path.stem for path in others if not path.stem.endswith("benchmark")}
    assert left == {"pretrain", "defences", *BACKDOORS}


OWN = {  # what a method has of its own beside its loss: texts, views, a schedule
    "saft": {"template", "descriptions"},
    "simple_at": {"augment", "crop_scale", "erasing", "warmup_steps", "lr_scheduler_type"},
    "acl": {"augment", "crop_scale", "jitter", "greyscale"},
    "adv_cl": {"augment", "crop_scale", "jitter", "greyscale"},
}


def test_methods_of_the_mini_benchmark_share_everything_but_themselves():
    """The same data, attack and budget for all; each learning rate is one of those that are tried for all."""
    own = [path for path in METHOD_CONFIGS if path.parent.name == "mini-clip" and method_of(path) not in PROMPTS]
    weights = {"clean", "pmg_aft_paper", "pmg_aft_released"} | {*METHODS} - {"pmg_aft", *PROMPTS}
    assert {path.stem for path in own} == weights - WITHOUT_CONFIGS
    plain = yaml.safe_load((RECIPES / "configs/mini-clip/tecoa.yaml").read_text())
    shared = {key: value for key, value in plain.items() if key not in ("output_dir", "learning_rate", "objective")}
    for path in own:
        found = yaml.safe_load(path.read_text())
        assert found.pop("output_dir") == f"out/mini-benchmark/{path.stem}"
        assert found.pop("learning_rate") in ("1e-4", "3e-4", "1e-3")
        objective = found.pop("objective")
        preset = {"pmg_aft_paper": "paper", "pmg_aft_released": "released"}.get(path.stem)
        assert (objective["init_args"]["preset"] if preset else None) == preset
        assert recipe(config=path).training.threat_model().eps == 2 / 255
        assert {key for key in {*found, *shared} if found.get(key) != shared.get(key)} == OWN.get(path.stem, set())


# ---- evaluation


@pytest.mark.parametrize("config", **named(EVALUATION_CONFIGS))
def test_every_evaluation_config_is_read(config):
    found = evaluation(config=config)
    assert found.evaluations
    assert found.tasks


def test_flags_of_an_evaluation():
    Path("names.txt").write_text("cat\ndog\n")
    found = evaluation(
        "--model_name_or_path", "org/robust", "--model_revision", "abc", "--dataset_name", "my/pictures",
        "--class_names", "names.txt", "--max_images", "7", "--template", "a {}", "--evaluation.attacks",
        "[cw-5, autoattack]", "--evaluation.radii", "[1/255]", "--compare", "org/other", "--reference", "digits-clip",
        "--output_dir", "here",
    )  # fmt: skip
    assert (found.model.model_name_or_path, found.model.model_revision) == ("org/robust", "abc")
    assert (found.reference, found.output_dir, found.template) == ("digits-clip", "here", "a {}")
    assert found.names == ["org/robust", "org/other", "digits-clip"]
    assert [(t.dataset, t.split, t.class_names, t.max_images) for t in found.tasks] == [
        ("my/pictures", "test", "names.txt", 7)
    ]
    assert [e.attack.name(10) for e in found.evaluations] == ["CW-5", "AutoAttack"]


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
    assert suite_named(name).name(10) == expected


def test_step_size_reaches_pgd():
    (found,) = evaluation("--evaluation.step_size", "1/255").evaluations
    assert found.attack.parameters(found.threat_models(), 10)["step_size"] == pytest.approx([1 / 255] * 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluation.attacks", "[pgd-20, autoatack]"], "attack='autoatack'"),
        (["--evaluation.attacks", "autoattack", "--evaluation.step_size", "1/255"], "goes with pgd-N"),
        (["--max_images", "3"], "max_images=3 does nothing beside tasks"),
        (["--dataset_name", "digits", "--max_images", "0"], "max_images=0"),
        (["--dataset_name", "digits", "--dataset_split", "test"], "did you mean 'dataset_test_split'"),
        (["--evaluation.radii", "8"], "radii.*8"),
        (["--evaluation.radii", "[8]"], "8/255"),
        (["--evaluation.radii", "[]"], "radii"),
        (["--seed", "1"], "unknown option --seed"),
        (["--compare", "[[a]]"], "compare"),
        (["--tasks", "[]"], "tasks"),
        (["--evaluation.precision", "fp16"], "precision"),
        (["--push_to_hub"], "unknown option --push_to_hub"),
        (["--template", "3"], "has no"),
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
