"""`TAPTTrainer`: prompts, statistics, and tuning over a dataset."""

import functools
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import ProgressCallback

from hf_robust_clip import (
    APT,
    TAPT,
    TPT,
    CLIPForZeroShotClassification,
    ClipPromptConfig,
    RobustClipConfig,
    TAPTTrainer,
    digits_clip_path,
)
from hf_robust_clip.arguments import Images
from hf_robust_clip.defences.alignment import AlignmentTargets
from hf_robust_clip.defences.defended import SETTINGS
from hf_robust_clip.defences.fit import collect_statistics
from hf_robust_clip.runs.shared import load_data
from hf_robust_clip.zero_shot_data.loading import collate_images

STATISTICS = AlignmentTargets.file

TEMPLATE = "a photo of a {}."
SETTING = TAPT(num_views=8, selected=0.25, learning_rate=0.05)


@pytest.fixture(autouse=True, scope="module")
def no_precision_of_others():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@functools.cache
def digits(split, count):
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    return load_data(Images("digits", split=split, max_images=count), model)


def make_trainer(folder, defence=SETTING, design="VLI", objective=None, **changes):
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    model.set_classes(digits("train", 24).class_names, TEMPLATE)
    args = RobustClipConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=8, per_device_eval_batch_size=8, use_cpu=True,
        learning_rate=0.5, eps="16/255", eval_attack_steps=3, report_to=[], **{"save_strategy": "no", **changes},
    )  # fmt: skip
    config = ClipPromptConfig(design=design, vision_depth=2, text_depth=2)
    return TAPTTrainer(
        model, args, objective, train_dataset=digits("train", 24), eval_dataset=digits("test", 20), peft_config=config,
        defence=defence,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that was trained and has its statistics."""
    trainer = make_trainer(tmp_path_factory.mktemp("tapt"))
    trainer.train()
    trainer.collect_statistics()
    return trainer


def test_nothing_is_defended_before_the_statistics_are_there(tmp_path):
    trainer = make_trainer(tmp_path)
    for act in (trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset), trainer.defended):
        with pytest.raises(ValueError, match="targets is missing"):
            act()


def test_statistics_are_those_of_both_kinds_of_prompts(trained):
    targets = trained.defence.targets
    assert (targets.adversarial.mean - targets.clean.mean).abs().max() > 1e-4
    assert targets.adversarial.count == targets.clean.count == 24
    given = trained.collect_statistics(clean_model=trained.model)
    assert given.clean.mean.equal(targets.adversarial.mean)
    assert trained.defence.targets is given
    trained.defence = replace(trained.defence, targets=targets)


def test_clean_prompts_leave_the_trained_ones_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    clean = trainer._train_clean()
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert clean.vision_model is not trainer.classifier().vision_model
    shared = clean.visual_projection.weight
    assert shared is trainer.classifier().visual_projection.weight  # the frozen model is there once


@pytest.mark.parametrize("killed_in", ["adversarial", "clean"])
def test_a_collection_that_was_killed_goes_on(killed_in, trained, tmp_path, monkeypatch):
    """In another process: its prompts are those that the state is of, and clean ones aren't trained again."""

    def killed(classifier, dataset, **settings):
        found = collect_statistics(classifier, dataset, **settings)
        if settings["state_dir"].name == killed_in:
            raise KeyboardInterrupt
        return found

    changes = dict(save_strategy="steps", save_steps=1, logging_steps=1)
    trainer = make_trainer(tmp_path, **changes)
    trainer.train()
    monkeypatch.setattr("hf_robust_clip.defences.alignment.collect_statistics", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.collect_statistics(state_dir=tmp_path / "state")
    monkeypatch.undo()
    checkpoint = tmp_path / "state" / "clean training" / "checkpoint-2"
    before = {file: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    again = make_trainer(tmp_path, **changes)
    again.train(resume_from_checkpoint=True)
    found = again.collect_statistics(state_dir=tmp_path / "state")
    targets = trained.defence.targets
    assert torch.equal(found.adversarial.mean, targets.adversarial.mean)
    assert torch.equal(found.clean.variance, targets.clean.variance)
    assert {file: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == before


def test_evaluation_tunes_every_image(trained):
    found = trained.predict(trained.eval_dataset)
    defended, attacked = map(torch.tensor, found.predictions)
    labels = torch.tensor(found.label_ids)
    images = collate_images([trained.eval_dataset[i] for i in range(20)])["pixel_values"]
    torch.testing.assert_close(defended, trained.defended().predict(images).logits, rtol=0, atol=1e-4)
    with torch.no_grad():
        assert (defended - trained.classifier()(images).logits).abs().max() > 1e-2
    right = [logits.argmax(1) == labels for logits in (defended, attacked)]
    metrics = trained.evaluate()
    for name, wanted in {
        "clean_accuracy": right[0],
        "robust_accuracy": right[0] & right[1],
    }.items():
        assert metrics[f"eval_{name}"] == pytest.approx(wanted.float().mean().item()), name


def test_the_bar_shows_the_accuracy_so_far(trained):
    seen = []

    class Watch(ProgressCallback):
        def on_prediction_step(self, *args, **kwargs):
            super().on_prediction_step(*args, **kwargs)
            seen.append(self.prediction_bar.postfix)

    trained.add_callback(Watch)
    metrics = trained.evaluate()
    trained.remove_callback(Watch)
    assert len(seen) == 3
    assert seen[-1] == f"clean={metrics['eval_clean_accuracy']:.1%}, robust={metrics['eval_robust_accuracy']:.1%}"


def test_save_model_writes_what_tapt_restores(trained, tmp_path):
    trained.save_model(str(tmp_path))
    assert {SETTINGS, STATISTICS, "adapter_config.json"} <= {file.name for file in tmp_path.iterdir()}
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    restored = TAPT.from_pretrained(tmp_path)
    assert torch.equal(restored(images).logits, trained.defended()(images).logits)


def test_evaluations_while_training_are_those_of_the_classifier(tmp_path, monkeypatch):
    def defended(*args, **settings):
        raise AssertionError("an image was defended")

    monkeypatch.setattr(TAPT, "predict", defended)
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    seen = [row for row in trainer.state.log_history if "eval_robust_accuracy" in row]
    assert len(seen) == 2


def test_without_clean_statistics_where_they_are_not_used(tmp_path):
    trainer = make_trainer(tmp_path, TAPT(num_views=8, selected=0.25, gamma=1.0), design="V")
    assert trainer.collect_statistics().clean is None
    assert trainer.evaluate()["eval_clean_accuracy"] <= 1


def test_another_defence_is_refused(tmp_path):
    for other in ("tapt", TPT()):
        with pytest.raises(TypeError, match="defence"):
            make_trainer(tmp_path, defence=other)


def test_clean_prompts_are_those_of_training_without_an_attack(tmp_path):
    """As APT's clean mix trains them, bit for bit."""
    clean = make_trainer(tmp_path / "a")._train_clean()
    other = make_trainer(tmp_path / "b", objective=APT("clean"))
    other.train()
    own, expected = clean.state_dict(), other.classifier().state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
