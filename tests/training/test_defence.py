"""A test-time defence in the trainer: it judges when training is over, and is fitted and saved there."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig
from training_script import arguments, digits, tiny_data, tiny_model

from hf_robust_clip import TTC, DefendedClassifier, RobustClipTrainer, TeCoA
from hf_robust_clip.defences.base import Defence, Prediction, Traits
from hf_robust_clip.paper import Paper
from hf_robust_clip.training.trainer import robust_accuracy

PAPER = Paper("Mine", "t", "v", "0", "b")


@dataclass(frozen=True, kw_only=True)
class Bright(Defence):
    """A detector that flags images brighter than a threshold."""

    threshold: float = 0.5
    paper: ClassVar = PAPER
    traits: ClassVar = Traits()

    def _predict(self, classifier, images, state, seed, path):
        score = images.mean(dim=(1, 2, 3))
        return Prediction(classifier(images).logits, score=score, flagged=score > self.threshold)


@dataclass(frozen=True, kw_only=True)
class Counts(Defence):
    """Numbers the images of a stream: the k-th is class k."""

    paper: ClassVar = PAPER
    traits: ClassVar = Traits(episodic=False)

    def start(self, classifier):
        return 0

    def _predict(self, classifier, images, state, seed, path):
        places = (state + torch.arange(len(images))) % 7
        return Prediction(torch.nn.functional.one_hot(places, 7).double(), state=state + len(images))


@dataclass(frozen=True, kw_only=True)
class Fitted(Bright):
    """Its threshold is the brightest of the images that it is fitted to."""

    threshold: float | None = None

    def check(self, classifier):
        super().check(classifier)
        if self.threshold is None:
            raise ValueError("threshold is missing: fit it.")

    def fit(self, classifier, dataset, **settings):
        return replace(self, threshold=max(float(row["pixel_values"].mean()) for row in dataset))


def make(folder, defence, model=None, data=None, **changes):
    args = arguments(folder, per_device_eval_batch_size=3, **changes)
    data = tiny_data(8) if data is None else data
    return RobustClipTrainer(model or tiny_model(), args, TeCoA(), data, data, defence=defence)


def test_a_detectors_verdicts_count(tmp_path):
    """Flagging a clean image is an error; an attacked one that is flagged withstood."""
    model, data = digits(12)
    plain = make(tmp_path, None, model, data, eps="32/255", attack_step_size="16/255").predict(data)
    assert len(plain.predictions) == 2
    threshold = sorted(float(row["pixel_values"].mean()) for row in data)[6]
    trainer = make(tmp_path, Bright(threshold=threshold), model, data, eps="32/255", attack_step_size="16/255")
    found = trainer.predict(data)
    clean, attacked, clean_flags, attacked_flags = map(torch.as_tensor, found.predictions)
    assert torch.equal(clean, torch.as_tensor(plain.predictions[0]))
    assert torch.equal(attacked, torch.as_tensor(plain.predictions[1]))  # the attack knows nothing of the defence
    assert clean_flags.sum() == 5 and attacked_flags.sum() > 0
    labels = torch.as_tensor(found.label_ids)
    right = (clean.argmax(1) == labels) & ~clean_flags.bool()
    robust = right & ((attacked.argmax(1) == labels) | attacked_flags.bool())
    assert found.metrics["test_clean_accuracy"] == pytest.approx(right.double().mean().item())
    assert found.metrics["test_robust_accuracy"] == pytest.approx(robust.double().mean().item())
    assert robust_accuracy(found)["robust_accuracy"] != robust_accuracy(plain)["robust_accuracy"]


def test_a_stream_goes_through_all_batches_in_their_order_and_begins_anew(tmp_path):
    trainer = make(tmp_path, Counts())
    for _ in range(2):
        assert trainer.evaluate()["eval_robust_accuracy"] == 1  # label i is i modulo 7
    trainer.accelerator.state._shared_state["num_processes"] = 2
    try:
        with pytest.raises(ValueError, match="one process"):
            trainer.evaluate()
    finally:
        trainer.accelerator.state._shared_state["num_processes"] = 1


def test_what_must_be_fitted_is_before_it_judges(tmp_path):
    trainer = make(tmp_path, Fitted(), max_steps=1)
    trainer.train()
    for act in (trainer.evaluate, trainer.defended):
        with pytest.raises(ValueError, match="threshold"):
            act()
    assert trainer.fit_defence() is trainer.defence
    assert trainer.evaluate()["eval_clean_accuracy"] <= 1
    assert trainer.settings()["adaptation.threshold"] == trainer.defence.threshold
    with pytest.raises(ValueError, match="defence is missing"):
        make(tmp_path, None).fit_defence()


def test_an_adapter_beside_which_no_defence_can_be_saved_is_refused_at_once(tmp_path):
    args, lora = arguments(tmp_path), LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="defence"):
        RobustClipTrainer(tiny_model(), args, TeCoA(), tiny_data(8), peft_config=lora, defence=TTC())


def test_trained_weights_are_saved_with_their_defence(tmp_path):
    model, data = digits(6)
    model = model.float()
    trainer = make(tmp_path, TTC(), model, [replace_dtype(row) for row in data], max_steps=1, eps="4/255")
    trainer.train()
    trainer.save_model()
    images = torch.stack([row["pixel_values"].float() for row in data])
    again = DefendedClassifier.from_pretrained(tmp_path)
    assert isinstance(again.adapter, TTC)
    torch.testing.assert_close(again(images).logits, trainer.defended()(images).logits, rtol=0, atol=1e-4)


def replace_dtype(row):
    return {**row, "pixel_values": row["pixel_values"].float()}
