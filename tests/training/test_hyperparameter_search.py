import ast
import inspect
import textwrap

import pytest
import torch
from peft import LoraConfig
from training_script import arguments, state, tiny_data, tiny_model
from transformers import Trainer, TrainerCallback

from hf_robust_clip import PMGAFT, APTTrainer, PMGAFTTrainer, TAPTTrainer, TeCoA, TeCoATrainer
from hf_robust_clip.training.resuming import ResumingTrainer
from hf_robust_clip.training.trainer import RobustClipTrainer


def assigned(*classes):
    """Names of the attributes that methods of the classes give to `self`."""
    found = set()
    for cls in classes:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
            is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if is_set and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
    return found


def new_model():
    return tiny_model()


def test_no_attribute_is_the_trainers_own():
    """Those that are set here and there, on purpose: after `train`, before it, and in place of a count of labels."""
    ours = (RobustClipTrainer, ResumingTrainer, TAPTTrainer)
    theirs = assigned(Trainer) | set(dir(Trainer)) | {"objective"}  # set from outside too, for each trial
    assert assigned(*ours) & theirs == {"is_in_train", "model_accepts_loss_kwargs", "_train_batch_size"}
    own = {name for cls in ours for name in vars(cls)} - set(dir(Trainer))
    assert not own & theirs


def test_a_model_or_what_makes_one(tmp_path):
    for given in ({}, {"model": tiny_model(), "model_init": new_model}):
        with pytest.raises(ValueError, match="model_init"):
            TeCoATrainer(**{"model": None, **given}, args=arguments(tmp_path))


@pytest.mark.parametrize("lora", [False, True])
def test_made_models_are_prepared_as_given_ones(lora, tmp_path):
    """Frozen parts, teacher, normalisation, adapter; anew for each training."""

    def trainer(**model):
        adapter = LoraConfig(r=2, target_modules=["q_proj"]) if lora else None
        return PMGAFTTrainer(**{"model": None, **model}, args=arguments(tmp_path), train_dataset=tiny_data(),
                             peft_config=adapter)  # fmt: skip

    given, made = trainer(model=tiny_model()), trainer(model_init=new_model)
    given.train()
    expected = state(given.model)
    for _ in range(2):
        made.train()
        assert {n for n, p in made.model.named_parameters() if p.requires_grad} == {
            n for n, p in given.model.named_parameters() if p.requires_grad
        }
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state(made.model).items())
        assert all(torch.equal(t, state(given.teacher)[n]) for n, t in state(made.teacher).items())
    with pytest.raises(ValueError, match="no classes"):
        TeCoATrainer(None, arguments(tmp_path), model_init=lambda: tiny_model(classes=None))


class Keep(TrainerCallback):
    """With what each training was made, and the weights with which it ended."""

    def __init__(self):
        self.optimizers, self.ends = [], []

    def on_train_begin(self, args, state_, control, optimizer=None, **kwargs):
        self.optimizers.append({(group["lr"], group["momentum"]) for group in optimizer.param_groups})

    def on_train_end(self, args, state_, control, model=None, **kwargs):
        self.ends.append(state(model))


class Measured(TeCoATrainer):
    """Knows how far the images of its last update were moved."""

    def perturb(self, loss_fn, images, *rest):
        adv = super().perturb(loss_fn, images, *rest)
        self.moved = float((adv - images).abs().max()) if self.model.training else self.moved
        return adv


TRIALS = [
    {"learning_rate": 0.1},
    {"learning_rate": 0.01, "eps": "32/255", "attack_steps": 8, "trainable_layers": 1},
    {"learning_rate": 0.1, "momentum": 0.5, "seed": 8, "per_device_train_batch_size": 4},
]


def test_trials_train_with_their_own_settings(tmp_path):
    """Each ends where a training with these settings ends, and leaves nothing to the next."""
    pytest.importorskip("optuna")
    keep = Keep()
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    trainer = Measured(
        None, args, None, tiny_data(), tiny_data(5), model_init=new_model, callbacks=[keep]
    )  # fmt: skip

    def space(trial):
        return {**TRIALS[trial.number], "weight_decay": trial.suggest_float("weight_decay", 0.1, 0.1)}

    found, moved = [], []

    def compute_objective(metrics):
        moved.append(trainer.moved)
        found.append(metrics["eval_loss"])
        return found[-1]

    best = trainer.hyperparameter_search(space, compute_objective, len(TRIALS), "minimize", "optuna")
    assert best.objective == min(found) and len(set(found)) == len(TRIALS)
    assert keep.optimizers == [{(0.1, 0.9)}, {(0.01, 0.9)}, {(0.1, 0.5)}]
    assert moved == pytest.approx([8 / 255, 32 / 255, 8 / 255], abs=1e-6)
    for number, settings in enumerate(TRIALS):
        alone = TeCoATrainer(
            tiny_model(), arguments(tmp_path / "alone", weight_decay=0.1, **settings), None, tiny_data(), tiny_data(5)
        )
        alone.train()
        expected = state(alone.model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in keep.ends[number].items()), number
        assert alone.evaluate()["eval_loss"] == found[number]
        assert (tmp_path / f"run-{number}" / "checkpoint-3").is_dir()
    assert (trainer.args.learning_rate, trainer.args.eps, trainer.args.trainable_layers) == (1e-2, "8/255", None)


def test_settings_of_the_objective_can_be_searched(tmp_path, caplog):
    """Each trial has its own, from those that were given, and the trainer has these again in the end."""
    pytest.importorskip("optuna")
    keep, own = Keep(), [{"objective.alpha": 3.0}, {"objective.beta": 0.25, "learning_rate": 0.1}]
    trainer = PMGAFTTrainer(
        None, arguments(tmp_path), PMGAFT(alpha=0.5), tiny_data(), tiny_data(5), model_init=new_model, callbacks=[keep]
    )
    trainer.hyperparameter_search(lambda trial: own[trial.number], lambda metrics: 0.0, 2, backend="optuna")
    assert trainer.training_objective == PMGAFT(alpha=0.5) and "objective." not in caplog.text
    for number, (objective, rate) in enumerate([(PMGAFT(alpha=3.0), 1e-2), (PMGAFT(alpha=0.5, beta=0.25), 0.1)]):
        alone = PMGAFTTrainer(tiny_model(), arguments(tmp_path, learning_rate=rate), objective, tiny_data())
        alone.train()
        assert all(torch.equal(value, state(alone.model)[name]) for name, value in keep.ends[number].items())


@pytest.mark.parametrize(
    ("space", "named"),
    [({"epsilon": "8/255"}, "hp_space gives 'epsilon'"), ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
     ({"objective.alpha": 1.0}, "hp_space gives 'objective.alpha'.* TeCoA")],
)  # fmt: skip
def test_trials_with_settings_that_there_are_not_are_refused(space, named, tmp_path):
    pytest.importorskip("optuna")
    trainer = TeCoATrainer(None, arguments(tmp_path), TeCoA(), tiny_data(), tiny_data(5), model_init=new_model)
    with pytest.raises(ValueError, match=named):
        trainer.hyperparameter_search(lambda trial: space, n_trials=1, backend="optuna")


def test_prompts_can_be_searched_too(tmp_path):
    pytest.importorskip("optuna")
    from training_script import tiny_prompts

    trainer = APTTrainer(
        None, arguments(tmp_path), None, tiny_data(), tiny_data(5), peft_config=tiny_prompts(), model_init=new_model
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1)}, n_trials=2, backend="optuna"
    )
    assert 1e-3 <= best.hyperparameters["learning_rate"] <= 1e-1


def test_the_settings_of_a_trial_act_on_nothing_after_it(tmp_path):
    pytest.importorskip("optuna")

    def trainer(folder, **model):
        args = arguments(tmp_path / folder, max_steps=2)
        return TeCoATrainer(
            **{"model": None, **model}, args=args, train_dataset=tiny_data(), eval_dataset=tiny_data(8)
        )

    def space(trial):
        values = {"data_seed": 7, "per_device_train_batch_size": 3}
        return {name: trial.suggest_categorical(name, [value]) for name, value in values.items()}

    given, searched = trainer("given", model=tiny_model()), trainer("searched", model_init=new_model)
    given.train()
    searched.hyperparameter_search(space, lambda metrics: 0.0, n_trials=1, backend="optuna")
    searched.train()
    assert all(torch.equal(value, state(given.model)[name]) for name, value in state(searched.model).items())
    searched.args.per_device_train_batch_size = 3  # as the best run says
    searched.train()
    assert any(not torch.equal(value, state(given.model)[name]) for name, value in state(searched.model).items())


@pytest.mark.parametrize(("name", "value"), [("bf16", True), ("trainable_layers", 1)])
def test_settings_that_act_when_a_trainer_is_made_are_refused_later(name, value, tmp_path):
    trainer = TeCoATrainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_data())
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        trainer.train()
