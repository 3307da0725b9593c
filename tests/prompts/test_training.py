"""Prompts trained by `RobustClipTrainer`."""

import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from training_script import arguments, state, tiny_data, tiny_model, tiny_prompts
from transformers import CLIPModel

from hf_robust_clip import (
    APT,
    FAP,
    PMGAFT,
    APTTrainer,
    CLIPForZeroShotClassification,
    CoOp,
    CoOpTrainer,
    EvaluationSettings,
    FAPTrainer,
    PMGAFTTrainer,
    RandomResizedCrop,
    TeCoATrainer,
    evaluate_robustness,
    load_image_dataset,
    pgd,
)
from hf_robust_clip.objectives.base import Objective

METHODS = {
    "apt-v": (APTTrainer, APT(), dict(design="V")),
    "apt-vli": (APTTrainer, APT("adv_full"), dict(design="VLI")),
    "apt-vlj": (APTTrainer, APT("trades"), dict(design="VLJ")),
    "apt-t": (APTTrainer, APT("clean"), dict(design="T")),
    "apt-pixel": (APTTrainer, APT(), dict(design="pixel", border_width=1)),
    "fap": (FAPTrainer, FAP(), dict(design="VLJ", coupling="vision_to_text")),
    "coop": (CoOpTrainer, None, dict(design="T", num_text_tokens=4, depth=1)),
}


def moved(after, before):
    return {name for name in before if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("method", METHODS)
def test_prompts_train_and_nothing_else(method, tmp_path):
    trainer_cls, objective, prompts = METHODS[method]
    torch.manual_seed(0)
    trainer = trainer_cls(
        tiny_model(), arguments(tmp_path), objective, tiny_data(), peft_config=tiny_prompts(**prompts)
    )
    before = state(trainer.model)
    own = {name for name in before if "clip_prompt_" in name}
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == own
    trainer.train()
    assert moved(state(trainer.model), before) == own
    assert all(torch.isfinite(log["loss"]) if torch.is_tensor(log["loss"]) else log["loss"] > 0
               for log in trainer.state.log_history if "loss" in log)  # fmt: skip


@pytest.mark.parametrize(
    ("trainer_cls", "expected"),
    [
        (APTTrainer, ("VLI", 2, 9, None)),
        (FAPTrainer, ("VLJ", 2, 9, "vision_to_text")),
        (CoOpTrainer, ("T", 4, 1, None)),
        (TeCoATrainer, None),
    ],
)
def test_methods_bring_the_prompts_they_were_published_with(trainer_cls, expected):
    config = trainer_cls.objective_cls.peft_config
    found = config and (config.design, config.num_text_tokens, config.text_depth, config.coupling)
    assert found == expected


def test_coop_trains_four_words_where_no_prompts_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(CoOp, "peft_config", replace(CoOp.peft_config, context_init="this"))
    model = tiny_model()
    trainer = CoOpTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=tiny_data())
    assert trainer.settings()["prompts"] == 'design T, 4 text tokens in 1 layer from "this"'
    assert trainer.settings()["trainable_parameters"] == 4 * 16


@pytest.mark.parametrize(("depth", "words"), [(1, "in 1 layer"), (2, "in 2 layers"), (11, "in 11 layers")])
def test_a_summary_counts_layers_as_one_speaks(depth, words):
    assert tiny_prompts("V", depth).summary().endswith(words)


def test_a_model_that_has_prompts_is_trained_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), tiny_prompts("VLI"))
    trainer = APTTrainer(model, arguments(tmp_path), train_dataset=tiny_data())
    assert trainer.model is model
    before = state(model)
    trainer.train()
    assert moved(state(model), before) == {name for name in before if "clip_prompt_" in name}
    for name, value in (("peft_config", tiny_prompts()), ("trainable_layers", 1)):
        changes = {"trainable_layers": 1} if name == "trainable_layers" else {}
        with pytest.raises(ValueError, match=f"{name}=.* this one has its adapter already"):
            APTTrainer(model, arguments(tmp_path, **changes), peft_config=value if name == "peft_config" else None)
    with pytest.raises(TypeError, match="model is a CLIPModel"):
        APTTrainer(get_peft_model(CLIPModel(tiny_model().config), tiny_prompts("V")), arguments(tmp_path))


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_teacher_of_prompts_has_none(tmp_path, wrapped):
    """Also where the prompts stand in the text tower, which teacher and student share otherwise."""
    plain = tiny_model()
    images = torch.stack([row["pixel_values"] for row in tiny_data(4)])
    wanted = plain.eval()(images).logits.detach()
    config = tiny_prompts("VLI")
    model = get_peft_model(tiny_model(), config) if wrapped else tiny_model()
    trainer = PMGAFTTrainer(model, arguments(tmp_path), PMGAFT(), tiny_data(), peft_config=None if wrapped else config)
    trainer.train()
    assert (trainer.classifier().eval()(images).logits - wanted).abs().max() > 1e-3
    torch.testing.assert_close(trainer.teacher(images).logits, wanted, rtol=0, atol=1e-12)
    assert not [name for name in trainer.teacher.state_dict() if "clip_prompt_" in name]


def test_half_of_the_batch_is_attacked_and_only_that(tmp_path):
    torch.manual_seed(0)
    trainer = APTTrainer(tiny_model(), arguments(tmp_path), train_dataset=tiny_data(), peft_config=tiny_prompts())
    seen = []

    class Watched(APT):
        def __call__(self, batch, adv_BCHW):
            seen.append((batch.images, adv_BCHW))
            return super().__call__(batch, adv_BCHW)

    trainer.training_objective = Watched("adv_half")
    core, data = trainer.classifier().train(), tiny_data(5)
    inputs = {
        "pixel_values": torch.stack([row["pixel_values"] for row in data]),
        "labels": torch.tensor([row["labels"] for row in data]),
    }
    trainer.compute_loss(trainer.model, inputs)
    ((clean, mixed),) = seen
    assert torch.equal(mixed[:2], clean[:2])
    wanted = pgd(
        lambda x: torch.nn.functional.cross_entropy(core(x).logits, inputs["labels"][2:], reduction="none"),
        clean[2:],
        trainer.threat_model,
        num_steps=2,
        step_size="4/255",
        seed=trainer.args.seed << 32,
    )
    torch.testing.assert_close(mixed[2:], wanted, rtol=0, atol=1e-12)


def test_texts_are_encoded_once_for_an_attack_and_once_for_the_loss(tmp_path, monkeypatch):
    trainer = APTTrainer(
        tiny_model(), arguments(tmp_path, attack_steps=5, max_steps=2), train_dataset=tiny_data(),
        peft_config=tiny_prompts(),
    )  # fmt: skip
    graphs = []
    own = CLIPForZeroShotClassification.encode_classes
    monkeypatch.setattr(
        CLIPForZeroShotClassification,
        "encode_classes",
        lambda self: graphs.append(torch.is_grad_enabled()) or own(self),
    )
    trainer.train()
    assert graphs == [False, True] * 2


def test_fixed_embeddings_change_no_attack_and_end_with_it():
    torch.manual_seed(0)
    core = get_peft_model(tiny_model(), tiny_prompts()).get_base_model()
    images = torch.stack([row["pixel_values"] for row in tiny_data(3)])
    free = core(images).logits
    with core.fixed_class_embeds():
        with core.fixed_class_embeds():
            torch.testing.assert_close(core(images).logits, free, rtol=0, atol=0)
        assert not core.class_embeds.requires_grad
        with torch.no_grad():
            for parameter in core.text_parameters():
                if parameter.requires_grad:
                    parameter.mul_(3)
        torch.testing.assert_close(core(images).logits, free, rtol=0, atol=0)
    assert (core(images).logits - free).abs().max() > 1e-3
    assert core.class_embeds.requires_grad
    with pytest.raises(RuntimeError), core.fixed_class_embeds():
        raise RuntimeError
    assert core.class_embeds.requires_grad


@pytest.mark.parametrize(("objective", "design"), [(APT("adv_full"), "VLI"), (FAP(), "VLJ"), (APT("trades"), "V")])
def test_accumulated_single_images_equal_one_batch(objective, design, tmp_path):
    def train(batch, accumulation):
        torch.manual_seed(0)
        args = arguments(
            tmp_path, learning_rate=0.1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        trainer = APTTrainer(tiny_model(), args, objective, tiny_data(), peft_config=tiny_prompts(design))
        start = state(trainer.model)
        trainer.train()
        return start, state(trainer.model)

    start, whole = train(8, 1)
    _, split = train(1, 8)
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 1e-3
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("design", ["VLI", "VLJ"])
def test_a_resumed_run_is_bitwise_that_without_a_break(design, tmp_path):
    def train(resume=None):
        torch.manual_seed(0)
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        trainer = APTTrainer(tiny_model(), args, train_dataset=tiny_data(), peft_config=tiny_prompts(design))
        trainer.train(resume)
        return state(trainer.model)

    expected = train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    found = train(resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "checkpoint-2/model.safetensors").exists()
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-4")
    for name, value in state(again).items():
        assert torch.equal(value, expected[name])


def whole_pictures(size=24):
    """Pictures of unequal size, as a dataset with `augment=True` gives them."""
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "picture": torch.randint(0, 256, (3, 12 + i % 3, 20), generator=generator, dtype=torch.uint8),
            "labels": i % 7,
        }
        for i in range(size)
    ]


def test_crops_depend_on_seed_step_and_picture_alone(tmp_path):
    def train(batch, accumulation, **changes):
        torch.manual_seed(0)
        args = arguments(
            tmp_path, learning_rate=0.1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            **changes,
        )  # fmt: skip
        trainer = APTTrainer(
            tiny_model(torch.float32), args, APT("adv_full"), whole_pictures(), peft_config=tiny_prompts()
        )
        trainer.train()
        return state(trainer.model)

    whole, split = train(8, 1), train(1, 8)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=1e-4, msg=name)
    other = train(8, 1, crop_scale=1.0, flip=0.0)
    assert max(float((whole[name] - other[name]).abs().max()) for name in whole) > 1e-3


def test_whole_pictures_are_not_evaluated(tmp_path):
    trainer = APTTrainer(
        tiny_model(torch.float32), arguments(tmp_path), train_dataset=whole_pictures(), eval_dataset=whole_pictures(4),
        peft_config=tiny_prompts("V"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="eval_dataset gives whole pictures"):
        trainer.evaluate()
    model = tiny_model(torch.float32)
    data = load_image_dataset("digits", "test", model.processor)
    settings = EvaluationSettings(radii=["1/255"])
    with pytest.raises(ValueError, match="augment=True gives whole pictures"):
        evaluate_robustness(model, replace(data, augment=True), settings, name="a", task="b", model_id="c")


def test_each_step_sees_new_crops(tmp_path):
    seen = []

    class Watched(APT):
        def __call__(self, batch, adv_BCHW):
            seen.append(batch.images)
            return super().__call__(batch, adv_BCHW)

    args = arguments(tmp_path, per_device_train_batch_size=4, max_steps=3)
    pictures = whole_pictures(4)
    trainer = APTTrainer(tiny_model(torch.float32), args, Watched(), pictures, peft_config=tiny_prompts("V"))
    trainer.train()
    crop = RandomResizedCrop()
    for step, images in enumerate(seen):
        wanted = crop([row["picture"] for row in pictures], 8, (args.seed << 32) + step)
        distances = (images[:, None] - wanted[None]).flatten(2).abs().amax(2)
        assert (distances.amin(1) == 0).all()
    assert not torch.equal(seen[0].sort(0).values, seen[1].sort(0).values)


def test_bf16_trains_prompts_and_saves_float32(tmp_path):
    trainer = APTTrainer(
        tiny_model(torch.float32), arguments(tmp_path, bf16=True), train_dataset=tiny_data(dtype=torch.float32),
        peft_config=tiny_prompts(),
    )  # fmt: skip
    before = state(trainer.model)
    trainer.train()
    after = state(trainer.model)
    assert moved(after, before) == {name for name in before if "clip_prompt_" in name}
    assert {value.dtype for name, value in after.items() if "clip_prompt_" in name} == {torch.float32}


def test_every_objective_says_what_it_attacks():
    assert list(range(5))[Objective.attacked_rows(APT("adv_full"), 5)] == [0, 1, 2, 3, 4]
