"""Texts that objectives ask for beside the classes: of student and teacher, by a frozen tower, from the trainer."""

import json

import pytest
import torch
from training_script import arguments, state, tiny_data, tiny_model, tiny_prompts

from hf_robust_clip import SAFT, TGAZSR, CompTGA, RobustClipTrainer

MANY = {name: [f"a {name}", f"{name} b"] for name in tiny_model().class_names}


def described():
    model = tiny_model()
    model.set_classes(model.class_names, descriptions=MANY)
    return model


def trainer_of(objective, folder, model, **changes):
    settings = dict(max_steps=1, per_device_train_batch_size=8, learning_rate=0.05)
    return RobustClipTrainer(model, arguments(folder, **{**settings, **changes}), objective, tiny_data(8))


@pytest.mark.parametrize(("objective", "model"), [(CompTGA(), tiny_model), (SAFT(), described)])
def test_outputs_of_student_and_teacher_have_them(objective, model, tmp_path):
    trainer = trainer_of(objective, tmp_path, model())
    images = torch.stack([example["pixel_values"] for example in tiny_data(8)])
    batch = trainer.make_batch({"pixel_values": images, "labels": torch.arange(8) % 7}, trainer.model)
    core = trainer.classifier()
    expected = core.text_embeds(objective.templates or None)
    for output in (batch.student(images), batch.teacher_on_clean, batch.student_on_both(images)[1].rows([1])):
        assert torch.equal(output.text_embeds, expected)
    before = state(trainer.model)
    trainer.train()
    changed = [name for name, value in state(trainer.model).items() if not torch.equal(value, before[name])]
    assert changed and all("vision" in name or "visual" in name for name in changed)


def test_with_one_text_the_terms_are_those_of_the_method_it_is_built_on(tmp_path):
    """One description that is the template's own text: SAFT is TGA-ZSR."""
    model = tiny_model()
    model.set_classes(model.class_names, descriptions={name: [f"a {name}"] for name in model.class_names})
    plain = tiny_model()
    plain.set_classes(plain.class_names, "a {}")
    ends = []
    for objective, own in ((SAFT(), model), (TGAZSR(), plain)):
        trainer = trainer_of(objective, tmp_path / type(objective).__name__, own)
        trainer.train()
        ends.append(state(trainer.model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-9)


def test_what_they_need_is_missing(tmp_path):
    model = tiny_model()
    names = model.class_names
    model.set_classes(names, descriptions={name: MANY[name][: 1 + i % 2] for i, name in enumerate(names)})
    with pytest.raises(ValueError, match="1 to 2 texts"):
        trainer_of(SAFT(), tmp_path, model).train()
    with pytest.raises(ValueError, match="CompTGA asks for texts of a frozen text side"):
        RobustClipTrainer(tiny_model(), arguments(tmp_path), CompTGA(), tiny_data(), peft_config=tiny_prompts("T"))


def test_a_checkpoint_says_its_descriptions(tmp_path):
    trainer = trainer_of(CompTGA(), tmp_path, described())
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved/descriptions.json").read_text()) == MANY
    card = str(trainer.unmeasured_card("me/clip"))
    assert 'load_descriptions("me/clip", names)' in card and "hypothesis_template" not in card
