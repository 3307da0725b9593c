"""A search for settings: on training images alone, the same by the same seed, and what a run makes of it."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from command_words import last_of_each
from huggingface_hub import ModelCard
from training_script import arguments, tiny_data, tiny_model

from hf_robust_clip import TeCoATrainer
from hf_robust_clip.cli import run as run_command
from hf_robust_clip.runs import shared, train, tune
from hf_robust_clip.saving import Saving, left_by_training
from hf_robust_clip.training.trainer import RobustClipTrainer
from hf_robust_clip.zero_shot_data.dataset import ImageDataset

pytest.importorskip("optuna")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")

DEFAULT = Path(__file__).parent.parent / "recipes/configs/digits-clip/pmg_aft.yaml"
SPACE = "{objective.alpha: [0.1, 10], learning_rate: [1e-5, 1e-3]}"
SMALL = ["--max_images", "48", "--max_steps", "2", "--per_device_train_batch_size", "16", "--warmup_steps", "0",
         "--attack_steps", "1", "--eval_attack_steps", "1", "--logging_steps", "1", "--output_dir", "out",
         "--evaluation.attack", "pgd-1", "--evaluation.radii", "[24/255]",
         "--tasks", "[{name: trained, dataset: digits, split: test, classes: [zero, one], max_images: 8}]",
         "--tune.trials", "3", "--tune.max_steps", "1", "--tune.space", SPACE]  # fmt: skip


def read(*words, without=()):
    pairs = [SMALL[i : i + 2] for i in range(0, len(SMALL), 2)]
    kept = [word for pair in pairs if pair[0] not in without for word in pair]
    return train.read(last_of_each(*kept, *words), DEFAULT)


def search(*words, folder="out", say=lambda line: None):
    run = read(*words, "--resume_from_checkpoint", "true")
    model = shared.load_model(run.model.model_name_or_path)
    return tune.search(run, model, shared.load_data(run.data, model), Saving(Path(folder), say))


def told(found):
    return [(trial.values, trial.figures, trial.score) for trial in found.trials]


# ---- a search


def test_the_same_seed_gives_the_same_trials_also_when_killed_and_another_search_is_refused(monkeypatch):
    class Killed(BaseException):
        """Nothing of the process is left to say that the trial ended."""

    monkeypatch.setattr(tune, "DRAWN_AT_RANDOM", 2)
    whole = search("--tune.trials", "4", folder="whole")
    assert len({tuple(trial.values.values()) for trial in whole.trials}) == 4
    begun, evaluate = [], tune.TrialTrainer.evaluate

    def killed_in_the_third(self, *args, **kwargs):
        begun.append(self.training_objective.alpha)
        if len(begun) == 3:
            raise Killed
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(tune.TrialTrainer, "evaluate", killed_in_the_third)
    with pytest.raises(Killed):
        search("--tune.trials", "4")
    assert "--resume_from_checkpoint true" in left_by_training("out")
    with Path("out/tuning/journal.log").open("a") as file:
        file.write('{"op_code": 4, "torn')
    assert told(search("--tune.trials", "4")) == told(whole)
    assert begun == [trial.values["objective.alpha"] for trial in (*whole.trials[:3], *whole.trials[2:])]
    assert told(search("--tune.trials", "2")) == told(whole), "what is done isn't made again, and counts"
    for words in (["--seed", "1"], ["--momentum", "0.8"], ["--max_images", "40"], ["--tune.clean_weight", "0.4"],
                  ["--tune.space", "{objective.alpha: [0.1, 9], learning_rate: [1e-5, 1e-3]}"]):  # fmt: skip
        with pytest.raises(ValueError, match="of another search"):
            search(*words)
    (other,) = search("--seed", "1", "--tune.trials", "1", folder="other").trials
    assert other.values != whole.trials[0].values
    Path("out/tuning/journal.log").write_text("no journal\nat all\n")
    with pytest.raises(ValueError, match="no journal"):
        search()


def test_a_score_is_that_of_a_training_with_these_settings():
    """Trained and evaluated once more, without the search."""
    words = ("--tune.held_out_classes", "0.2", "--tune.clean_weight", "0.25", "--tune.trials", "1",
             "--warmup_steps", "2")  # fmt: skip
    (trial,) = search(*words).trials
    run = read(*words, "--output_dir", "new")
    model = shared.load_model("digits-clip")
    data = shared.load_data(run.data, model)
    parts = tune.held_out_parts(data, run.tune, run.training.seed)
    names = [set(own.class_names) for own in (parts.train, parts.images, parts.classes)]
    assert names[0] == names[1] and len(names[2]) == 2 and names[0] | names[2] == set(data.class_names)
    assert not names[0] & names[2]
    args = arguments("alone", **{name: getattr(run.training, name) for name in (
        "eps", "attack_step_size", "attack_steps", "eval_attack_steps", "seed", "lr_scheduler_type", "momentum",
        "per_device_train_batch_size")}, max_steps=1, warmup_steps=1,
        learning_rate=trial.values["learning_rate"])  # fmt: skip
    objective = replace(run.method.objective, alpha=trial.values["objective.alpha"])
    run.texts.set(model, parts.train)
    trainer = RobustClipTrainer(model, args, objective, parts.train)
    trainer.train()
    scores = []
    for part in (parts.images, parts.classes):
        run.texts.set(model, part)
        metrics = trainer.evaluate(part)
        scores.append(0.25 * metrics["eval_clean_accuracy"] + 0.75 * metrics["eval_robust_accuracy"])
    assert trial.score == pytest.approx(sum(scores) / 2, abs=1e-12)


def test_trials_that_diverge_have_no_score(capsys):
    words = ("--tune.space", "{learning_rate: [1e-4, 1e36]}", "--tune.max_steps", "2")
    found = search(*words, "--tune.trials", "3")
    scores = {trial.values["learning_rate"]: trial.score for trial in found.trials}
    assert scores[max(scores)] is None and scores[min(scores)] > 0 and found.best.score > 0
    found.show()
    assert "diverged" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"tune\.space: all 1 trials diverged"):
        search("--tune.space", "{learning_rate: [1e35, 1e36]}", *words[2:], "--tune.trials", "1", folder="none")


def test_adapters_can_be_searched_too():
    found = search("--use_peft", "--tune.trials", "1", "--tune.space", "{attack_step_size: [4/255, 24/255]}")
    assert re.fullmatch(r"[0-9.]+/255", found.best.values["attack_step_size"])


@pytest.mark.parametrize(
    ("changes", "images"),
    [(dict(max_steps=5), 21), (dict(max_steps=-1, num_train_epochs=1.5), 21),
     (dict(max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2, per_device_train_batch_size=4), 21),
     (dict(max_steps=-1, num_train_epochs=2, dataloader_drop_last=True), 21)],
)  # fmt: skip
def test_updates_are_counted_as_the_trainer_counts_them(changes, images, tmp_path):
    args = arguments(tmp_path, attack_steps=1, **changes)
    trainer = TeCoATrainer(tiny_model(), args, None, tiny_data(images))
    trainer.train()
    assert tune.updates_of(args, images) == trainer.state.global_step


def test_a_trial_is_a_quarter_of_the_run_with_its_warm_up(tmp_path):
    args = arguments(tmp_path, lr_scheduler_type="cosine", warmup_steps=30)
    assert tune.shortened(args, 402, None) == {"max_steps": 101, "warmup_steps": 8}
    assert tune.shortened(args, 400, 200) == {"max_steps": 200, "warmup_steps": 15}
    assert tune.shortened(arguments(tmp_path), 3, None) == {"max_steps": 1}
    args.lr_scheduler_kwargs = {"num_decay_steps": 10}
    assert tune.shortened(args, 400, 400)["max_steps"] == 400
    with pytest.raises(ValueError, match="num_decay_steps"):
        tune.shortened(args, 400, None)


# ---- a run


def test_a_run_searches_without_the_test_split_and_its_recipe_repeats_it(monkeypatch, capsys):
    """Test pictures are NaN, and nothing is loaded, as long as the search goes on."""
    searching, loaded = [], []
    give, find, load = ImageDataset.__getitems__, tune.search, shared.load_image_dataset

    def poisoned(self, indices):
        found = give(self, indices)
        if searching and self.split == "test":
            return [{**row, "pixel_values": torch.full_like(row["pixel_values"], torch.nan)} for row in found]
        return found

    def searched(*args):
        searching.append(True)
        try:
            return find(*args)
        finally:
            searching.clear()

    def loading(*args, **kwargs):
        loaded.append((args[1], bool(searching)))
        return load(*args, **kwargs)

    monkeypatch.setattr(ImageDataset, "__getitems__", poisoned)
    monkeypatch.setattr(tune, "search", searched)
    monkeypatch.setattr(shared, "load_image_dataset", loading)
    run_command("train", DEFAULT, "", SMALL)
    assert loaded == [("train", False), ("test", False)]
    printed = capsys.readouterr().out
    with Path("out/tuning.csv").open() as file:
        rows = list(csv.DictReader(file))
    (best,) = [row for row in rows if row["best"] == "True"]
    assert len(rows) == 3 and float(best["score"]) == max(float(row["score"]) for row in rows)
    assert f"best settings: --objective.alpha {best['objective.alpha']} --learning_rate" in printed
    assert printed.index("best settings") < printed.index("undefended")
    assert Path("out/tuning.png").stat().st_size > 10_000
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert "tune" not in recipe and recipe["learning_rate"] == float(best["learning_rate"])
    assert recipe["objective"]["init_args"]["alpha"] == float(best["objective.alpha"])
    card = ModelCard.load("out/README.md").text
    assert re.search(r"\| settings chosen \| objective.alpha, learning_rate: by 3 trials of 1 updates", card)
    assert f"| learning rate | {recipe['learning_rate']} |" in card
    run_command("train", DEFAULT, "", ["--config", "out/recipe.yaml", "--output_dir", "again"])
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    capsys.readouterr()
    before = Path("out/README.md").read_bytes()
    run_command("train", DEFAULT, "", [*SMALL, "--resume_from_checkpoint", "true"])
    assert "3 are done" in capsys.readouterr().out
    assert Path("out/README.md").read_bytes() == before
    run_command("train", DEFAULT, "", ["--config", "again/recipe.yaml", "--output_dir", "out", "--overwrite"])
    assert not list(Path("out").glob("tuning*")), "they tell of other weights"


AT_FLAGS = ("--attack_steps", "--warmup_steps", "--max_steps", "--logging_steps")
REFUSED = [
    ("--tune.space {epsilon: [0.1, 1]}", "tune.space 'epsilon'"),
    ("--tune.space {objective.alfa: [0.1, 1]}", "tune.space 'objective.alfa' 'objective.alpha'"),
    ("--tune.space {lora_r: [2, 8]}", "tune.space 'lora_r'"),
    ("--tune.space {learning_rate: [1e-3, 1e-5]}", "tune.space.learning_rate low"),
    ("--tune.space {learning_rate: [1e-3, 1e-3]}", "tune.space.learning_rate low"),
    ("--tune.space {objective.alpha: {low: 0, high: 1, log: true}}", "tune.space.objective.alpha log"),
    ("--tune.space {objective.alpha: [-1, 1]}", "tune.space.objective.alpha alpha=-1"),
    ("--tune.space {objective.alpha: [a, b]}", "tune.space.objective.alpha 'a'"),
    ("--tune.space {objective.alpha: 1}", "tune.space.objective.alpha=1"),
    ("--tune.space {objective.alpha: {low: 1}}", "tune.space.objective.alpha high"),
    ("--tune.space {objective.alpha: {low: 1, high: 2, step: 1}}", "tune.space.objective.alpha.step"),
    ("--tune.space {objective.alpha: [1, 1, 2]}", "tune.space.objective.alpha different"),
    ("--tune.space {objective.kl_direction: [1, 2]}", "tune.space.objective.kl_direction choices"),
    ("--tune.space {objective.kl_direction: {choices: [adv_first, last]}}", "tune.space.objective.kl_direction last"),
    ("--tune.space {objective.image_mean: [0, 1]}", "tune.space.objective.image_mean"),
    ("--tune.space {attack_steps: [1.5, 3]}", "tune.space.attack_steps whole"),
    ("--tune.space {warmup_steps: [0.5, 30]}", "tune.space.warmup_steps whole"),
    ("--tune.space {attack_step_size: [a/255, 4/255]}", "tune.space.attack_step_size 'a/255'"),
    ("--tune.space {adam_beta1: [0.8, 0.9]}", "tune.space.adam_beta1 'sgd'"),
    ("--tune.space {crop_scale: [0.1, 0.9]}", "tune.space.crop_scale pictures"),
    ("--tune.space {trainable_layers: [1, 2]} --use_peft", "tune.space.trainable_layers"),
    ("--tune.space {eps: [1/255, 8/255]}", "tune.space 'eps' compared"),
    ("--tune.space {seed: [1, 8]}", "tune.space 'seed'"),
    ("--tune.space {max_steps: [1, 8]}", "tune.space 'max_steps' tune.max_steps"),
    ("--tune.space {logging_steps: [1, 8]}", "tune.space 'logging_steps'"),
    ("--tune.space {eval_steps: [1, 8]}", "tune.space 'eval_steps'"),
    ("--tune.space {}", "tune.space missing"),
    ("--learning_rate 1e-4", "--learning_rate tune.space"),
    ("--objective.alpha 2", "--objective.alpha tune.space"),
    ("--tune.trials 0", "tune.trials=0"),
    ("--tune.max_steps 0", "tune.max_steps=0"),
    ("--tune.held_out_images 0", "tune.held_out_images=0"),
    ("--tune.held_out_images 1", "tune.held_out_images=1"),
    ("--tune.held_out_classes 1", "tune.held_out_classes=1"),
    ("--tune.clean_weight 1.5", "tune.clean_weight=1.5"),
    ("--compare tecoa", "compare tune.trials"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "named"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_can_not_be_searched_is_refused_in_one_line(words, named):
    flag, _, rest = words.partition(" ")
    value, *switches = rest.split(" --")
    with pytest.raises((TypeError, ValueError)) as refused:
        read(flag, value, *(f"--{own}" for own in switches), without=AT_FLAGS if "{" in value else ())
    line = str(refused.value)
    assert "\n" not in line
    for part in named.split(" "):
        assert part in line, line


def test_settings_of_a_search_without_one_are_refused():
    for flag in ("--tune.space", "--tune.max_steps"):
        others = {"--tune.trials", "--tune.space", "--tune.max_steps", "--eval_attack_steps"} - {flag}
        with pytest.raises(ValueError, match=rf"{flag[2:]}=.* does nothing without tune.trials"):
            read(without=others)


def test_without_optuna_or_in_several_processes_nothing_is_begun(monkeypatch):
    run = read()
    monkeypatch.setattr(type(run.training), "world_size", 2)
    with pytest.raises(ValueError, match=r"tune.trials=3 .* one process, 2"):
        tune.space_of(run, lambda args, objective: None)
    monkeypatch.undo()
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tune.trials=3 needs Optuna; pip install 'optuna"):
        tune.space_of(run, lambda args, objective: None)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--max_images", "7"], "class '.*' .* none would be left"),
        (["--tune.held_out_images", "0.99"], "class '.*' .* none would be left"),
        (["--tune.held_out_classes", "0.9"], "tune.held_out_classes=0.9 .* fewer than 2"),
        (["--classes", "[zero, one, two]", "--tune.held_out_classes", "0.1"], "holds out 2 of 3 .* fewer than 2"),
        (["--tune.max_steps", "3"], "tune.max_steps=3 .* 2 updates"),
    ],
)
def test_too_few_images_classes_or_updates_are_refused_before_the_first_trial(words, named):
    with pytest.raises(ValueError, match=named):
        search(*words)
    assert not Path("out/tuning/journal.log").exists()
