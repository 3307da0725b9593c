"""The training scripts, end to end on the model that ships with the package, and what they say to wrong settings."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_words import last_of_each
from huggingface_hub import ModelCard
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from hf_robust_clip import CLIPForZeroShotClassification, digits_clip_path
from hf_robust_clip.cli import main
from hf_robust_clip.cli import run as run_command
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs.shared import load_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parent.parent
SCRIPT, DEFAULT = ROOT / "recipes/pmgaft.py", ROOT / "recipes/configs/digits-clip/pmg_aft.yaml"
FILES = {"README.md", "report.json", "accuracy.png", "recipe.yaml", "model.safetensors", "config.json",
         "processor_config.json"}  # fmt: skip
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SMALL = ["--objective.image_mean", str(MEAN), "--objective.image_std", str(STD),
         "--max_images", "24", "--max_steps", "2", "--logging_steps", "1",
         "--per_device_train_batch_size", "8",
         "--evaluation.attack", "pgd-2", "--evaluation.radii", "[24/255]",
         "--tasks", "[{name: trained, dataset: digits, split: test, classes: [zero, one], max_images: 20},"
         " {name: held out, dataset: digits, split: test, classes: [six, nine], max_images: 19}]"]  # fmt: skip


def launch(*command: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_MIXED_PRECISION", None)
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


def run(*words: str | Path) -> None:
    run_command("train", DEFAULT, "", last_of_each(*SMALL, *words))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the script as a user starts it: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("recipes") / "out"
    done = launch(SCRIPT, *SMALL, "--output_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- a run


def test_script_writes_everything_and_says_how_to_load_it(finished):
    folder, printed = finished
    assert {path.name for path in folder.iterdir()} >= FILES
    assert "PMG-AFT: 24 images, 6 classes, one process on cpu, float32\n" in printed
    assert f'AutoModelForZeroShotClassification.from_pretrained("{folder}")' in printed
    for row in ("\ntrained under PGD-2, ", "\nheld out under PGD-2, ", "\n  undefended ", "\n  PMG-AFT "):
        assert row in printed
    assert Image.open(folder / "accuracy.png").width > 800
    assert not list(folder.glob("*.part"))
    assert not (folder / "training_args.bin").exists()


def test_reports_card_and_recipe_agree(finished):
    folder, _ = finished
    own, compared = load_reports(folder / "report.json")
    assert [(r.name, r.task, r.num_images) for r in own] == [("PMG-AFT", "trained", 20), ("PMG-AFT", "held out", 19)]
    assert [(r.name, r.task) for r in compared] == [("undefended", "trained"), ("undefended", "held out")]
    card = ModelCard.load(folder / "README.md")
    values = {row.dataset_config: row.metric_value for row in card.data.eval_results}
    assert values["trained, clean, n=20"] == round(own[0].clean_accuracy, 4)
    assert len(values) == 4
    assert "| updates | 2 |" in card.text
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["max_steps"] == 2
    assert recipe["objective"]["init_args"]["image_std"] == STD


def test_saved_folder_is_a_plain_clip_that_has_changed(finished):
    folder, _ = finished
    clip, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    before = CLIPModel.from_pretrained(ROOT / "hf_robust_clip/digits_clip")
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, clip.state_dict()[name])}
    assert changed
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)
    assert list(processor.image_processor.image_mean) == MEAN


def test_recipe_that_was_saved_gives_the_same_model(finished):
    folder, _ = finished
    run_command("train", DEFAULT, "", ["--config", str(folder / "recipe.yaml"), "--output_dir", "again"])
    for name in ("model.safetensors", "recipe.yaml"):
        old, new = (folder / name).read_bytes(), Path("again", name).read_bytes()
        assert old.replace(str(folder).encode(), b"again") == new, name


def test_second_run_is_refused_and_changes_nothing(finished, capsys):
    folder, _ = finished
    before = contents(folder)
    with pytest.raises(SystemExit) as stopped:
        run("--output_dir", folder)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--overwrite" in error and "--resume" in error
    assert contents(folder) == before


def test_resume_goes_on_from_the_checkpoint(capfd):
    words = ("--max_steps", "3", "--save_steps", "2", "--save_total_limit", "5")
    run("--output_dir", "out", *words)
    before = Path("out/model.safetensors").read_bytes()
    shutil.rmtree("out/checkpoint-3")
    capfd.readouterr()
    run("--output_dir", "out", "--resume_from_checkpoint", "true", *words)
    assert "| updates | 3 |" in Path("out/README.md").read_text()
    assert Path("out/checkpoint-3").is_dir()
    assert Path("out/model.safetensors").read_bytes() == before
    assert capfd.readouterr().out.count("'loss'") == 1, "two of three steps were done before"


def test_resume_of_a_finished_run_trains_nothing(finished):
    """Two updates of three in an epoch: weights, report and card stay as they were."""
    folder, _ = finished
    shutil.copytree(folder, "out")
    run("--output_dir", "out", "--resume_from_checkpoint", "true")
    for name in ("model.safetensors", "README.md", "report.json"):
        assert Path("out", name).read_bytes() == (folder / name).read_bytes(), name


def test_old_figures_are_gone_before_new_weights_come(finished, monkeypatch, capsys):
    """A run over a finished folder that is killed where sharded weights would be written into it."""
    folder, _ = finished
    shutil.copytree(folder, "out")

    def killed(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_robust_clip.runs.train.plain_model", killed)
    with pytest.raises(SystemExit):
        run("--output_dir", "out", "--overwrite")
    assert not {"README.md", "report.json", "accuracy.png", "recipe.yaml"} & {
        path.name for path in Path("out").iterdir()
    }


def test_card_does_not_confirm_other_weights(finished, capsys):
    folder, _ = finished
    shutil.copytree(folder, "out")
    main(["card", "out"])
    card = Path("out/README.md").read_text()
    shutil.copy(ROOT / "hf_robust_clip/digits_clip/model.safetensors", "out")
    with pytest.raises(SystemExit):
        main(["card", "out"])
    assert re.fullmatch(
        r"error: out/report\.json .*other weights than model\.safetensors.*\n", capsys.readouterr().err
    )
    assert Path("out/README.md").read_text() == card


@pytest.mark.parametrize(
    ("method", "words", "named"),
    [
        ("tecoa", [], "method was 'PMG-AFT', is 'TeCoA' now"),
        ("fare", [], "method was 'PMG-AFT', is 'FARE' now"),
        ("pmg_aft", ["--eps", "4/255"], "arguments.eps was '24/255', is '4/255' now"),
        ("pmg_aft", ["--max_steps", "3"], "arguments.max_steps was 2, is 3 now"),
        ("pmg_aft", ["--classes", "[six, nine]"], "classes"),
        ("pmg_aft", ["--template", "digit {}"], "model.templates"),
    ],
)
def test_resume_of_another_training_is_refused(method, words, named, finished, capfd):
    """In one line, before what it is compared with is trained; the folder stays as it is."""
    folder, _ = finished
    shutil.copytree(folder, "out")
    before = contents(Path("out"))
    config, settings = DEFAULT.with_stem(method), SMALL if method == "pmg_aft" else SMALL[4:]
    capfd.readouterr()
    more = ["--output_dir", "out", "--resume_from_checkpoint", "true", "--compare", "clean"]
    words = last_of_each(*settings, *words, *more)
    with pytest.raises(SystemExit) as stopped:
        run_command("train", config, "", words)
    printed = capfd.readouterr()
    assert stopped.value.code == 2
    (error,) = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert "checkpoint-2" in error and named in error
    assert "'loss'" not in printed.out
    assert contents(Path("out")) == before


def test_resume_without_a_checkpoint_says_that_it_begins_anew(capfd):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("kept")
    run("--output_dir", "out", "--resume_from_checkpoint", "true", "--max_steps", "1")
    assert "no whole checkpoint in out: the training begins anew" in capfd.readouterr().out
    assert Path("out/notes.txt").read_text() == "kept"


def test_overwrite_begins_anew(finished):
    folder, _ = finished
    shutil.copytree(folder, "out")
    run("--output_dir", "out", "--overwrite", "--max_steps", "1", "--save_total_limit", "5")
    assert "| updates | 1 |" in Path("out/README.md").read_text()
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_another_method_in_the_same_folder_leaves_nothing_of_the_one_before(finished):
    """An adapter beside older weights would be passed over for them."""
    folder, _ = finished
    shutil.copytree(folder, "out")
    Path("out/notes.txt").write_text("mine")
    words = ["--output_dir", "out", "--overwrite", "--shots", "2", "--max_steps", "1", "--tasks",
             "[{dataset: digits, split: test, max_images: 4}]", "--evaluation.attack", "pgd-1"]  # fmt: skip
    run_command("train", ROOT / "recipes/configs/digits-clip/apt.yaml", "", words)
    names = {path.name for path in Path("out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "report.json", "notes.txt"} <= names
    assert not names & {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json"}
    model = load_model("out")
    assert model.num_text_prompts() == 2


def test_cards_and_reports_of_folders_tell_no_path(finished):
    folder, _ = finished
    for name in ("README.md", "report.json"):
        text = (folder / name).read_text()
        assert str(folder.parent) not in text
        assert str(ROOT) not in text


def test_a_blind_attack_is_told_loudly_and_in_the_card(capsys):
    """Logits so far apart that the gradient of a right prediction is exactly zero."""
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    with torch.no_grad():
        model.logit_scale.fill_(16.0)
    model.save_pretrained("masked")
    run("--output_dir", "out", "--model_name_or_path", "masked", "--learning_rate", "1e-9")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert "undefended, trained" in line
    assert line in Path("out/README.md").read_text()


def test_compare_trains_and_shows_both(capsys):
    run("--output_dir", "out", "--compare", "[tecoa]", "--max_steps", "1")
    own, compared = load_reports("out/report.json")
    assert [r.name for r in own] == ["PMG-AFT"] * 2
    assert [r.name for r in compared] == ["undefended"] * 2 + ["TeCoA"] * 2
    assert capsys.readouterr().out.count("\n  TeCoA ") == 2


@pytest.mark.slow  # that two processes train what one does is tested without a recipe too
def test_two_processes_train_together_and_write_one_report(tmp_path):
    """With `drop_last` off, 24 images in batches of 8 on each of 2 processes make 2 updates of 16 an epoch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = ROOT / "recipes/accelerate/two_cpu_processes.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", port]
    done = launch(*launcher, SCRIPT, *SMALL, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes on cpu (gloo), float32\n") == 1
    assert done.stdout.count("load it: ") == 1
    own, _ = load_reports(tmp_path / "out/report.json")
    assert [(report.task, report.num_images) for report in own] == [("trained", 20), ("held out", 19)]
    card = (tmp_path / "out/README.md").read_text()
    assert "| images per update | 16 |" in card
    assert "| updates | 2 |" in card


# ---- precision


@pytest.mark.parametrize("launched", [False, True], ids=["bf16", "accelerate config"])
def test_bf16_runs_and_is_named_in_the_card(launched, monkeypatch):
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what `mixed_precision: bf16` of a config sets
    run("--output_dir", "out", *([] if launched else ["--bf16", "true"]))
    assert "| precision | bf16 |" in Path("out/README.md").read_text()
    assert all(value.dtype == torch.float32 for value in CLIPModel.from_pretrained("out").state_dict().values())
    assert load_reports("out/report.json")[0][0].precision == "float32", "the evaluation never runs in bf16"


# ---- wrong settings

WRONG = {
    "eps in grey levels": (["--eps", "8"], "'8/255'"),
    "negative eps": (["--eps", "-1/255"], "eps='-1/255' must be finite and at least 0"),
    "eps is no number": (["--eps", "abc"], "eps='abc' is not a number or a fraction"),
    "unknown norm": (["--norm", "l7"], "norm='l7' is unknown; choose one of linf, l2"),
    "unknown norm of the evaluation": (["--evaluation.norm", "l7"], "norm='l7' is unknown"),
    "unknown method": (["--compare", "tekoa"], "did you mean 'TeCoA'"),
    "unknown key": (["--epz", "1"], "--epz; did you mean 'eps'"),
    "step of zero": (["--attack_step_size", "0"], "step_size=0 never moves an image"),
    "missing value": (["--eps"], "--eps has no value"),
    "missing config": (["--config", "none.yaml"], "--config 'none.yaml' is not a file"),
    "too many layers": (["--trainable_layers", "9"], "trainable_layers=9"),
    "no such model": (
        ["--model_name_or_path", "no/such"],
        "can't load 'no/such': no such folder, and the Hub is switched off",
    ),
    "no such dataset": (["--dataset_name", "no/such"], "can't load dataset 'no/such'"),
    "no such split": (["--dataset_train_split", "dev"], "split='dev' does not exist"),
    "no such split of a task": (["--tasks", "[{dataset: digits, split: dev}]"], "split='dev' does not exist"),
    "unknown class": (["--classes", "[zero, ten]"], "class 'ten' is not in digits"),
    "class twice": (["--classes", "[zero, zero]"], "'zero'"),
    "no classes": (["--classes", "[]"], "class_names is empty"),
    "template without place": (["--template", "a photo"], "template='a photo' has no '{}'"),
    "text beyond the context": (["--template", "very " * 60 + "{}"], "shorten it"),
    "layers beside an adapter": (["--trainable_layers", "1", "--use_peft", "--lora_r", "2"], "trainable_layers=1"),
    "layers beside another's prompts": (
        ["--trainable_layers", "1", "--compare", "apt"],
        "trainable_layers=1",
    ),
    "an attack from nowhere": (["--attack_random_start", "false", "--compare", "fare"], "FARE"),
    "crops of finished pictures": (["--flip", "0"], "flip=0.0 does nothing"),
    "a setting that does nothing": (["--label_smoothing_factor", "0.1"], "label_smoothing_factor=0.1"),
    "a learning rate that is none": (["--learning_rate", ".nan"], "learning_rate='.nan'"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_setting_ends_with_one_line_and_writes_nothing(words, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stopped:
        run("--output_dir", "out", *words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_output_that_is_there_stays_as_it_is(kind, capsys):
    Path("folder").mkdir()
    for name in ("file", "folder/mine.txt"):
        Path(name).write_text("mine")
    before = contents(Path())
    with pytest.raises(SystemExit) as stopped:
        run("--output_dir", kind)
    assert stopped.value.code == 2
    assert f"output_dir={kind!r} is " in capsys.readouterr().err
    assert contents(Path()) == before


def test_a_loss_that_is_not_finite_stops_the_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--output_dir", "out", "--learning_rate", "1e30", "--warmup_steps", "0")
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: step 2: the loss term" in last
    assert "lower the learning rate" in last
    assert not Path("out/model.safetensors").exists()
    assert not Path("out/report.json").exists()
