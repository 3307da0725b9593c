"""How much a training step asks of torch beside the model's own work. No time is asserted."""

import pytest
import torch
from counting import Operations
from training_script import arguments, tiny_data, tiny_model, tiny_prompts

from hf_robust_clip import APT, PMGAFT, SAFT, RobustClipTrainer, TeCoA
from hf_robust_clip.modeling import class_texts


def described():
    model = tiny_model()
    model.set_classes(model.class_names, descriptions={name: [f"a {name}", f"{name} b"] for name in model.class_names})
    return model


@pytest.fixture
def keys(monkeypatch):
    """One entry for each time that a text side is looked at."""
    found, own = [], class_texts.module_key
    monkeypatch.setattr(class_texts, "module_key", lambda *given: found.append(1) or own(*given))
    return found


def steps_of(objective, model, folder, prompts=None):
    """The trainer, and a function that takes a step of it without the update."""
    trainer = RobustClipTrainer(
        model, arguments(folder, attack_steps=2), objective, tiny_data(4),
        peft_config=None if prompts is None else tiny_prompts(prompts),
    )  # fmt: skip
    data = tiny_data(4)
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in data]),
              "labels": torch.tensor([row["labels"] for row in data])}  # fmt: skip
    trainer.model.train()
    return trainer, lambda: trainer.compute_loss(trainer.model, inputs).backward()


@pytest.mark.parametrize(
    ("objective", "model", "prompts", "most"),
    [
        (TeCoA(), tiny_model, None, 1),
        (PMGAFT(), tiny_model, None, 2),
        (SAFT(), described, None, 2),
        (PMGAFT(), tiny_model, "V", 2),
        (APT("adv_full"), tiny_model, "VLI", 0),
    ],
)
def test_a_step_looks_at_each_frozen_text_side_once(objective, model, prompts, most, keys, tmp_path):
    trainer, step = steps_of(objective, model(), tmp_path, prompts)
    step()
    keys.clear()
    step()
    assert len(keys) == most
    keys.clear()
    trainer.evaluate(tiny_data(4))
    assert len(keys) == min(most, 1), "evaluations have no teacher"


def test_a_step_has_few_operations_beside_the_models_own(tmp_path):
    """PMG-AFT: two gradients by the pixels, one of the weights for twice as many images, and the teacher's forward."""
    trainer, step = steps_of(PMGAFT(), tiny_model(), tmp_path)
    step()
    with Operations() as seen:
        step()
    student, images = trainer.classifier(), torch.stack([row["pixel_values"] for row in tiny_data(4)])
    with student.fixed_class_embeds():
        with Operations() as gradient:
            pixels = images.clone().requires_grad_()
            torch.autograd.grad(student(pixels).logits.sum(), pixels)
        with Operations() as loss:
            student(torch.cat([images, images])).logits.sum().backward()
        with Operations() as teacher, torch.no_grad():
            student(images)
    own = 2 * gradient.count + loss.count + teacher.count
    assert 0 <= seen.count - own <= 170
