"""A run that keeps the most robust weights by training images that it doesn't train on."""

import json
import re
from pathlib import Path

import pytest
import torch
from command_words import last_of_each
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_robust_clip.cli import run as run_command
from hf_robust_clip.runs import train
from hf_robust_clip.training.trainer import RobustClipTrainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

DEFAULT = Path(__file__).parent.parent / "recipes/configs/digits-clip/pmg_aft.yaml"
# fmt: off
SMALL = ["--max_images", "48", "--max_steps", "4", "--per_device_train_batch_size", "16", "--save_steps", "1",
         "--attack_steps", "1", "--eval_attack_steps", "1", "--output_dir", "out", "--save_total_limit", "5",
         "--evaluation.attack", "pgd-1", "--evaluation.radii", "[24/255]", "--held_out_images", "0.2",
         "--tasks", "[{name: trained, dataset: digits, split: test, classes: [zero, one], max_images: 8}]"]
# fmt: on


def test_the_weights_with_the_best_robust_accuracy_are_kept(monkeypatch, capsys):
    """Robust accuracies as if the second update's were best."""
    seen, evaluate = [], RobustClipTrainer.evaluation_loop

    def measured(self, dataloader, *args, **kwargs):
        found = evaluate(self, dataloader, *args, **kwargs)
        seen.append((dataloader.dataset, self.train_dataset))
        found.metrics["eval_robust_accuracy"] = (0.1, 0.3, 0.2, 0.4)[self.state.global_step - 1]
        return found

    monkeypatch.setattr(RobustClipTrainer, "evaluation_loop", measured)
    run_command("train", DEFAULT, "", [*SMALL, "--early_stopping_patience", "1"])
    assert len(seen) == 3 and {held.split for held, _ in seen} == {"train"}
    held, trained = seen[0]
    pictures = [{row["image"]["bytes"] for row in data.rows} for data in (held, trained)]
    assert len(held) + len(trained) == 48 and not pictures[0] & pictures[1]
    assert f"{len(trained)} images and {len(held)} held out" in capsys.readouterr().out
    kept, best = load_file("out/model.safetensors"), load_file("out/checkpoint-2/model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in kept.items())
    card = ModelCard.load("out/README.md").text
    assert f"| weights chosen | by robust accuracy (PGD-1) on {len(held)} held-out training images, early" in card
    assert "| weights of update | 2 |" in card and "| updates | 3 |" in card
    assert json.loads(Path("out/checkpoint-3/trainer_state.json").read_text())["best_metric"] == 0.3


def read(*words):
    return train.read(last_of_each(*SMALL, *words), DEFAULT)


def test_evaluations_come_with_checkpoints_unless_told_otherwise():
    args = read("--save_steps", "7").training
    assert (args.eval_strategy, args.eval_steps, args.load_best_model_at_end) == ("steps", 7, True)
    assert args.metric_for_best_model == "robust_accuracy" and args.greater_is_better
    assert read("--save_strategy", "epoch").training.eval_strategy == "epoch"
    assert read("--metric_for_best_model", "eval_loss").training.greater_is_better is False
    assert not read("--load_best_model_at_end", "false", "--eval_steps", "2").training.load_best_model_at_end


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--held_out_images", "0"], "held_out_images=0"),
        (["--held_out_images", "1"], "held_out_images=1"),
        (["--save_steps", "6", "--eval_steps", "3"], "save_steps=6 eval_steps=3"),
        (["--metric_for_best_model", "accuracy"], "metric_for_best_model='accuracy' robust_accuracy"),
        (["--early_stopping_patience", "0"], "early_stopping_patience=0"),
        (["--compare", "tecoa"], "compare held_out_images"),
        (["--save_strategy", "best"], "load_best_model_at_end eval_strategy"),
        (["--load_best_model_at_end", "false", "--eval_strategy", "no"], "held_out_images=0.2 eval_strategy"),
        (["--do_eval", "true"], "do_eval=True"),
    ],
)
def test_what_chooses_nothing_is_refused_in_one_line(words, named):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, named.split(" ")))) as refused:
        read(*words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("flag", ["early_stopping_patience", "eval_steps", "load_best_model_at_end"])
def test_without_held_out_images_nothing_is_evaluated(flag):
    words = ["--output_dir", "out", f"--{flag}", "true" if "best" in flag else "1"]
    with pytest.raises(ValueError, match=f"{flag}=.* held_out_images"):
        train.read(words, DEFAULT)
