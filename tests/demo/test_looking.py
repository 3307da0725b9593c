"""One picture before one model, without a page."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import CLASS_NAMES

from hf_robust_clip.attacks.auto_attack import AutoAttack
from hf_robust_clip.attacks.suites import PGD, plain_victim
from hf_robust_clip.defences.r_tpt import RTPT
from hf_robust_clip.defences.ttc import TTC
from hf_robust_clip.demo.looking import Question, Stopped, Subject, Turn, look
from hf_robust_clip.explain import patch_map, saliency
from hf_robust_clip.pictures import to_pixels
from hf_robust_clip.threat_model import ThreatModel

TEMPLATE = "a photo of a {}."


@pytest.fixture
def picture() -> Image.Image:
    levels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def asked(**changes):
    question = Question(CLASS_NAMES[:4], (TEMPLATE,), PGD(5), 16 / 255)
    return replace(question, **changes)


def test_figures_are_those_of_the_classifier_and_its_attack(tiny_clip, picture):
    model = tiny_clip().requires_grad_(False)
    found = look(Subject("tiny", model), picture, asked())
    model.set_classes(CLASS_NAMES[:4], TEMPLATE)
    pixels = to_pixels(model.processor, [picture]).double()
    label = torch.tensor([found.label])
    logits = model(pixel_values=pixels).logits
    assert found.label == int(logits.argmax()) == found.clean.named
    torch.testing.assert_close(found.clean.probabilities_C, logits[0].softmax(0), rtol=0, atol=1e-12)
    (member,) = PGD(5).members(4)
    victim = plain_victim(lambda x: model(pixel_values=x).logits)
    adv = member.run(victim, pixels, label, ThreatModel(16 / 255))
    torch.testing.assert_close(found.attacked.image_CHW, adv[0].float(), rtol=0, atol=0)
    after = model(pixel_values=adv).logits[0].softmax(0)
    torch.testing.assert_close(found.attacked.probabilities_C, after, rtol=0, atol=1e-12)
    assert found.fell == (int(after.argmax()) != found.label) == (found.broken_by == "pgd")
    for seen, own in ((found.clean, pixels), (found.attacked, adv)):
        torch.testing.assert_close(seen.map_HW, patch_map(model, own)[0, found.label])
        torch.testing.assert_close(seen.saliency_HW, saliency(model, own, label)[0])


def test_the_model_comes_back_as_it_was(tiny_clip, picture):
    model = tiny_clip().train()
    grads = [parameter.requires_grad for parameter in model.parameters()]
    look(Subject("tiny", model, TTC()), picture, asked())
    assert model.class_names == CLASS_NAMES and model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(parameter.grad is None for parameter in model.parameters())


def test_radius_zero_and_a_wrong_class_attack_nothing(tiny_clip, picture):
    model = tiny_clip()
    calm = look(Subject("tiny", model), picture, asked(eps=0))
    assert calm.attacked is None and calm.right and not calm.fell
    wrong = look(Subject("tiny", model), picture, asked(label=(calm.label + 1) % 4))
    assert wrong.attacked is None and not wrong.right and not wrong.fell
    assert wrong.label == (calm.label + 1) % 4


def test_the_switch_says_what_the_attack_sees(tiny_clip, picture):
    model = tiny_clip()
    blind, through = (
        look(Subject("t", model, RTPT(num_views=4, selected=0.5)), picture, asked(through=on)) for on in (False, True)
    )
    assert "without its defence" in blind.seen and "through the whole defence" in through.seen
    assert not torch.equal(blind.attacked.image_CHW, through.attacked.image_CHW)
    # the blind attack is the one on the classifier, of which the iterate of highest loss is shown
    other = look(Subject("t", model, TTC()), picture, asked(through=False, label=blind.label))
    assert torch.equal(blind.attacked.image_CHW, other.attacked.image_CHW)


def test_members_go_on_until_one_succeeds(tiny_clip, picture):
    model = tiny_clip()
    suite = AutoAttack(("apgd-ce", "square"), num_steps=20, num_queries=5)
    held = look(Subject("t", model), picture, asked(attack=suite, eps=1e-6))
    assert held.broken_by is None and not held.fell and held.attacked is not None
    fallen = look(Subject("t", model), picture, asked(attack=suite, eps=0.9, class_names=CLASS_NAMES))
    assert fallen.fell and fallen.broken_by == "apgd-ce" and fallen.attacked.named != fallen.label


class Stopping(Turn):
    """A visitor who has enough at the fifth call."""

    def step(self) -> None:
        if self.calls == 4:
            self.cancelled.set()
        super().step()


@pytest.mark.parametrize("attack", [PGD(50), AutoAttack(("apgd-t",), 20, 3), AutoAttack(("fab-t",), 20),
                                    AutoAttack(("square",), num_queries=50)])  # fmt: skip
def test_a_turn_is_ended_inside_every_attack(tiny_clip, picture, attack):
    turn = Stopping(60)
    with pytest.raises(Stopped):
        look(Subject("t", tiny_clip()), picture, asked(attack=attack, eps=1e-6), turn)
    assert turn.calls == 4


def test_a_turn_takes_no_longer_than_it_may(tiny_clip, picture):
    turn = Turn(seconds=1e-3)
    turn.begin()
    with pytest.raises(Stopped, match="not finished"):
        look(Subject("t", tiny_clip()), picture, asked(attack=PGD(100), eps=1e-6), turn)


def test_what_cannot_be_asked(tiny_clip, picture):
    for changes, named in (({"class_names": ["one"]}, "class_names"), ({"label": 4}, "label"), ({"eps": 1.5}, "eps")):
        with pytest.raises(ValueError, match=named):
            asked(**changes)
    with pytest.raises(ValueError, match="attack"):  # averages draws of a classifier that draws nothing
        look(Subject("t", tiny_clip(), TTC()), picture, asked(attack=AutoAttack.rand()))
