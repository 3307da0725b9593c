"""The images of a trainer: of the model's classes, at their own resolution, given in a way that it can read."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from torch.utils.data import Subset
from training_script import arguments, tiny_model

from hf_robust_clip import FARETrainer, PMGAFTTrainer, TeCoATrainer, image_dataset
from hf_robust_clip.modeling import CLIPForZeroShotClassification
from hf_robust_clip.training.checkpoints import save_adapter
from hf_robust_clip.zero_shot_data.dataset import ImageDataset

NAMES = ("one", "two", "three")


def rows(count=12, side=8):
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=list(NAMES))})
    return Dataset.from_dict({"image": pictures, "label": [i % 3 for i in range(count)]}, features=features)


def model_and_data(names=NAMES, **settings):
    model = tiny_model(torch.float32, classes=NAMES)
    return model, ImageDataset(rows(), model.processor, names, "user/set", "local", "train", **settings)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(8))], ids=["whole", "subset"])
@pytest.mark.parametrize("names", [("two", "one", "three"), ("one", "two", "four")], ids=["order", "others"])
def test_classes_other_than_the_models_are_refused_wherever_labels_are_used(names, wrap, tmp_path):
    model, data = model_and_data()
    other = wrap(replace(data, class_names=names))
    with pytest.raises(ValueError, match="class"):
        TeCoATrainer(model, arguments(tmp_path), train_dataset=other).train()
    trainer = TeCoATrainer(model, arguments(tmp_path), train_dataset=data, eval_dataset=other)
    for look in (trainer.evaluate, lambda: trainer.predict(other), lambda: trainer.evaluate({"a": data, "b": other})):
        with pytest.raises(ValueError, match="class"):
            look()
    during = TeCoATrainer(
        model, arguments(tmp_path, eval_strategy="steps", eval_steps=1), train_dataset=data, eval_dataset=other
    )
    with pytest.raises(ValueError, match="class"):
        during.train()
    assert trainer.evaluate(data)["eval_clean_accuracy"] >= 0


def test_a_method_that_looks_at_no_labels_trains_on_any_classes(tmp_path):
    _, data = model_and_data(("a", "b", "c"))
    model = tiny_model(torch.float32, classes=None)
    FARETrainer(model, arguments(tmp_path), train_dataset=data).train()
    assert model.class_names == ("image",)


def test_training_and_evaluation_at_resolutions_of_their_own(tmp_path):
    """Images are attacked as they are and enlarged inside the model, which takes its own size again afterwards."""
    model, small = model_and_data(attack_resolution=4)
    _, large = model_and_data()
    seen = set()
    own = CLIPForZeroShotClassification.encode_images

    class Watched(CLIPForZeroShotClassification):
        def encode_images(self, pixel_values, *rest):
            seen.add((self.training, tuple(pixel_values.shape[2:])))
            return own(self, pixel_values, *rest)

    model.__class__ = Watched
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer = PMGAFTTrainer(model, args, train_dataset=small, eval_dataset=large)
    trainer.train()
    assert seen >= {(True, (4, 4)), (False, (8, 8))} and (True, (8, 8)) not in seen
    assert model.input_size == 8 and trainer.teacher.input_size == 8
    assert trainer.evaluate(small)["eval_clean_accuracy"] == trainer.evaluate(small)["eval_clean_accuracy"]
    assert (False, (4, 4)) in seen and model.input_size == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_raw_rows_are_told_what_makes_examples_of_them(workers, tmp_path):
    model, _ = model_and_data()
    args = arguments(tmp_path, dataloader_num_workers=workers)
    with pytest.raises(ValueError, match="image_dataset") as caught:
        TeCoATrainer(model, args, train_dataset=rows()).train()
    assert "\n" not in str(caught.value)
    TeCoATrainer(model, args, train_dataset=image_dataset(rows(), model.processor)).train()


@pytest.mark.parametrize("change", ["classes", "template", "normalisation"])
def test_a_teacher_of_other_classes_or_pixels_than_the_students_is_refused(change, tmp_path):
    model, data = model_and_data()
    trainer = PMGAFTTrainer(model, arguments(tmp_path), train_dataset=data)
    if change == "classes":
        model.set_classes(("three", "two", "one"))
        trainer.train_dataset = replace(data, class_names=("three", "two", "one"))
    elif change == "template":
        model.set_classes(NAMES, "a {}")
    else:
        model.set_normalisation((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="teacher"):
        trainer.train()


def test_an_adapter_is_saved_with_the_normalisation_that_it_was_trained_under(tmp_path):
    from peft import LoraConfig

    from hf_robust_clip import PMGAFT

    base = tiny_model(torch.float32, classes=NAMES)
    base.save_pretrained(tmp_path / "base")
    model, data = CLIPForZeroShotClassification.from_pretrained(tmp_path / "base"), model_and_data()[1]
    model.set_classes(NAMES)
    trainer = PMGAFTTrainer(
        model,
        arguments(tmp_path / "run", learning_rate=0.1, save_strategy="steps", save_steps=1, max_steps=1),
        PMGAFT.released_preset(),
        data,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.save_model()
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), tmp_path / "alone")
    images = torch.stack([data[i]["pixel_values"] for i in range(4)])
    wanted = trainer.classifier().eval()(images).logits.detach()
    for folder in ("run", "run/checkpoint-1", "alone"):
        loaded = CLIPForZeroShotClassification.from_pretrained(tmp_path / folder).eval()
        loaded.set_classes(NAMES)
        torch.testing.assert_close(loaded(images).logits.detach(), wanted, rtol=0, atol=1e-4)


def test_adapters_that_would_not_be_trained_or_saved_are_refused(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    tiny_model(torch.float32, classes=NAMES).save_pretrained(tmp_path / "base")

    def base():
        model = CLIPForZeroShotClassification.from_pretrained(tmp_path / "base")
        model.set_classes(NAMES)
        return model

    lora, data = (
        LoraConfig(r=2, target_modules=r".*vision_model.*q_proj", init_lora_weights=False),
        model_and_data()[1],
    )
    made = get_peft_model(base(), lora)
    made.save_pretrained(tmp_path / "adapter")
    loaded = CLIPForZeroShotClassification.from_pretrained(tmp_path / "adapter")  # by transformers' door
    loaded.set_classes(NAMES)
    frozen = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    named = get_peft_model(base(), lora, adapter_name="other")
    two = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    two.load_adapter(tmp_path / "adapter", "two", is_trainable=True)
    for model, told in (
        (loaded, "PeftModel"),
        (made.get_base_model(), "PeftModel"),
        (frozen, "is_trainable"),
        (named, "other"),
        (two, "two"),
    ):
        with pytest.raises(ValueError, match=told):
            TeCoATrainer(model, arguments(tmp_path), train_dataset=data)
    with pytest.raises(ValueError, match="PeftModel"):
        TeCoATrainer(loaded, arguments(tmp_path), train_dataset=data, peft_config=lora)
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    TeCoATrainer(again, arguments(tmp_path), train_dataset=data).train()


def test_an_evaluation_without_gradients_warns(tmp_path, caplog):
    import logging

    model, data = model_and_data()
    trainer = TeCoATrainer(model, arguments(tmp_path), train_dataset=data, eval_dataset=data)
    for saturated in (False, True):
        if saturated:
            with torch.no_grad():
                model.logit_scale.fill_(20.0)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_robust_clip"):
            trainer.evaluate()
        assert any("blind" in record.message for record in caplog.records) == saturated
