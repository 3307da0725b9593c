"""What objectives ask of a training: labels, classes, teacher, patches, captions, views."""

import shutil
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from training_script import arguments, state, tiny_data, tiny_model, tiny_pictures
from transformers import CLIPModel

from hf_robust_clip import (
    ACL,
    APT,
    ASCL,
    FARE,
    PMGAFT,
    AdvCL,
    Contrastive,
    Objective,
    RandomResizedCrop,
    RobustClipTrainer,
    TeCoA,
)
from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.paper import Paper

PAPER = Paper("Mine", "t", "v", "0", "b")


def one_step(objective, folder, data, model=None, **changes):
    args = arguments(folder, **{"max_steps": 1, "per_device_train_batch_size": 8, **changes})
    trainer = RobustClipTrainer(model or tiny_model(torch.float32), args, objective, data)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("objective", "passes"), [(FARE(), 1), (PMGAFT(), 1), (PMGAFT(alpha=0), 0)])
def test_the_teacher_is_asked_once_a_step(objective, passes, tmp_path):
    """FARE's attack and loss compare with the same clean pass; PMG-AFT asks on adversarial images."""
    calls = []
    args = arguments(tmp_path, max_steps=3)
    trainer = RobustClipTrainer(tiny_model(), args, objective, tiny_data())
    trainer.teacher.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert calls == [False] * 3 * passes


@dataclass(frozen=True)
class Classes(Objective):
    """Uses the classes, but no labels, as one does that follows a teacher's predictions."""

    needs: ClassVar = frozenset({"classes"})
    paper: ClassVar = PAPER

    def attack_loss(self, batch):
        target = batch.student(batch.images).logits.argmax(1).detach()
        return lambda adv: cross_entropy(batch.student(adv).logits, target)

    def __call__(self, batch, adv):
        assert batch.labels is None
        return {"ce": batch.student(adv).logits.logsumexp(1).mean()}


def test_classes_are_asked_for_without_labels(tmp_path):
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in tiny_data(8)]
    one_step(Classes(), tmp_path, unlabelled, tiny_model())
    with pytest.raises(ValueError, match="no classes"):
        one_step(Classes(), tmp_path, unlabelled, tiny_model(classes=None))


@dataclass(frozen=True)
class Patches(TeCoA):
    needs: ClassVar = frozenset({"labels", "patches", "teacher"})

    def __call__(self, batch, adv):
        both, teacher = batch.student_on_both(adv), batch.teacher_on_clean
        assert all(output.patch_embeds.shape == (len(adv), 16, 12) for output in (*both, teacher))
        return {"patches": (both[0].patch_embeds - teacher.patch_embeds).square().mean()}


def test_patch_embeddings_are_there_for_those_who_need_them(tmp_path):
    trainer = one_step(Patches(), tmp_path, tiny_data(8), tiny_model())
    assert trainer.state.log_history[0]["patches"] > 0


@dataclass(frozen=True)
class Pair(Objective):
    """Two views, the first of which is attacked so that it leaves the second one, clean (ACL's A2S)."""

    num_views: ClassVar = 2
    couples_images: ClassVar = True
    needs: ClassVar = frozenset()
    paper: ClassVar = PAPER
    seen: list = field(default_factory=list, compare=False, repr=False)

    def attacked_rows(self, count):
        return slice(count // 2)

    def attack_loss(self, batch):
        with torch.no_grad():
            other = batch.student(batch.whole.views[1]).image_embeds
        return lambda adv: (batch.student(adv).image_embeds - other).square().sum(1)

    def __call__(self, batch, adv):
        self.seen.append((batch.views, adv))
        first, second = batch.student(adv).image_embeds.chunk(2)
        return {"distance": (first - second).square().sum(1).mean()}


def test_views_are_crops_of_their_own_and_those_chosen_are_attacked(tmp_path):
    objective, data = Pair(), tiny_pictures()
    trainer = one_step(objective, tmp_path, data, eps="8/255")
    ((views, adv),) = objective.seen
    crop, seed = RandomResizedCrop(), trainer.args.seed << 32
    expected = crop([row["picture"] for row in data], 8, seed)  # as an objective of one view gets them
    distances = (views[0][:, None] - expected[None]).flatten(2).abs().amax(2)
    assert (distances.amin(1) == 0).all()
    assert (views[0] - views[1]).flatten(1).abs().amax(1).gt(0.01).all()
    moved = (adv - torch.cat(views)).flatten(1).abs().amax(1)
    assert (moved[:8] > 4 / 255).all() and (moved[:8] <= 8 / 255 + 1e-6).all()
    assert (moved[8:] == 0).all()


def test_several_views_need_whole_pictures(tmp_path):
    with pytest.raises(ValueError, match="views"):
        one_step(Pair(), tmp_path, tiny_data(8, torch.float32))


@pytest.mark.parametrize(
    "objective", [ACL(anchor="none"), AdvCL(), Contrastive(), ASCL()], ids=lambda o: type(o).__name__
)
def test_a_contrast_needs_images_together(objective, tmp_path):
    """Neither a batch of one, nor a last batch of one, whether or not that is known before."""
    data = tiny_pictures(9) if objective.num_views > 1 else tiny_data(9, torch.float32, captions=True)
    with pytest.raises(ValueError, match="per_device_train_batch_size=1"):
        one_step(objective, tmp_path, data, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="dataloader_drop_last"):
        one_step(objective, tmp_path, data, per_device_train_batch_size=4)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data[:1])

    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        one_step(objective, tmp_path, Stream())


def test_one_image_is_enough_beside_texts(tmp_path):
    trainer = one_step(ASCL(text_anchors=True), tmp_path, tiny_data(9, torch.float32), per_device_train_batch_size=1)
    assert trainer.state.global_step == 1


def test_that_forward_batches_matter_is_told(tmp_path, caplog):
    """In log and card, where an update has several batches: its loss is another one."""
    caplog.set_level("INFO", "hf_robust_clip")
    split = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer = one_step(ACL(), tmp_path, tiny_pictures(), **split)
    assert any("ACL looks at forward batches, of 4" in text for text in caplog.messages)
    assert trainer.settings()["couples_images"] == "within forward batches of 4"
    whole = one_step(ACL(), tmp_path, tiny_pictures())
    split_loss, loss = (part.state.log_history[0]["loss"] for part in (trainer, whole))
    assert split_loss < loss - 0.3  # three others in place of seven
    assert AdvCL().couples_images


# ---- captions


def contrastive(folder, size=24, **changes):
    args = arguments(folder, **{"optim": "adamw_torch", "learning_rate": 1e-3, **changes})
    return RobustClipTrainer(tiny_model(), args, Contrastive(), tiny_data(size, captions=True))


def test_captions_train_both_towers_and_the_scale(tmp_path):
    trainer = contrastive(tmp_path)
    before = state(trainer.model)
    trainer.train()
    moved = {name for name, tensor in state(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in moved} == {
        "vision_model", "visual_projection", "text_model", "text_projection", "logit_scale",
    }  # fmt: skip
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    assert trainer.settings()["couples_images"] == "within forward batches of 8"
    trainer.save_model()
    plain = CLIPModel.from_pretrained(tmp_path)
    assert torch.equal(plain.text_projection.weight.double(), trainer.model.text_projection.weight)
    for other in (TeCoA(), FARE()):
        assert not RobustClipTrainer(tiny_model(), trainer.args, other).model.text_is_trainable()


def test_a_loss_of_captions_is_that_of_whole_texts_in_the_models_own_words(tmp_path):
    """Against CLIPModel's own forward on padded texts."""
    trainer = contrastive(tmp_path)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    model, ids = trainer.model, inputs["captions"]
    pixels = (inputs["pixel_values"] - model.image_mean) / model.image_std
    images, texts = model.get_image_features(pixels).pooler_output, model.get_text_features(ids).pooler_output
    images, texts = (x / x.norm(dim=1, keepdim=True) for x in (images, texts))
    z = model.logit_scale.exp() * images @ texts.T
    same = torch.tensor([[i != j and torch.equal(a, b) for j, b in enumerate(ids)] for i, a in enumerate(ids)])
    targets = torch.arange(len(ids))
    own = [torch.nn.functional.cross_entropy(part.masked_fill(same, -torch.inf), targets) for part in (z, z.T)]
    assert loss.item() == pytest.approx(sum(own).item() / 2, rel=1e-9)


def test_a_resumed_training_by_captions_is_bitwise_that_without_a_break(tmp_path):
    def train(resume=None):
        trainer = contrastive(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume)
        return state(trainer.model)

    expected = train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    found = train(resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("captions", [None, "", 3])
def test_captions_that_are_missing_or_no_texts_are_refused(captions, tmp_path):
    data = [{**row, "captions": captions} for row in tiny_data(8)]
    data = [{key: value for key, value in row.items() if value is not None} for row in data]
    with pytest.raises(ValueError, match="captions"):
        one_step(Contrastive(), tmp_path, data, tiny_model())


def test_an_objective_brings_the_adapter_that_it_trains(tmp_path):
    """And without one the image encoder, as chosen by trainable_layers."""
    args = arguments(tmp_path, trainable_layers=1)
    assert RobustClipTrainer(tiny_model(), args, APT()).adapter_base() is None
    with pytest.raises(ValueError, match="vision_depth=9"):  # published for towers of twelve layers
        RobustClipTrainer(tiny_model(), arguments(tmp_path), APT())


def test_a_need_that_nobody_meets_is_refused(tmp_path):
    class Typo(Classes):
        needs = frozenset({"label"})

    with pytest.raises(ValueError, match="Typo needs"):
        RobustClipTrainer(tiny_model(), arguments(tmp_path), Typo(), tiny_data(8))
