"""PGD towards each other class: whom it tries, and when it is done."""

import pytest
import torch
from prompted_clip import make_base, make_images

from hf_robust_clip.attacks.pgd import pgd
from hf_robust_clip.attacks.suites import Victim, find_adversarial, plain_victim
from hf_robust_clip.attacks.targeted import TargetedPGD
from hf_robust_clip.prediction import Prediction
from hf_robust_clip.threat_model import ThreatModel

THREAT = ThreatModel("16/255")


@pytest.fixture(scope="module")
def world():
    model, images = make_base(), make_images(6, seed=3)
    logits_fn = lambda pixels: model(pixel_values=pixels).logits  # noqa: E731
    with torch.no_grad():
        return logits_fn, images, logits_fn(images).argmax(dim=1)


def test_an_image_falls_to_the_class_that_alone_convinces(world):
    """Only one class is believed: others are tried in vain."""
    logits_fn, images, labels = world
    believed = 4
    (member,) = TargetedPGD(8).members(6)

    def predict(pixels):
        logits = logits_fn(pixels)
        return Prediction(logits, flagged=logits.argmax(dim=1) != believed)

    adv = find_adversarial(member, Victim(predict, logits_fn), images, labels, THREAT)
    with torch.no_grad():
        named = logits_fn(adv).argmax(dim=1)
        by_hand = pgd(
            lambda pixels: logits_fn(pixels)[:, believed], images, THREAT, num_steps=8, step_size=2.5 * THREAT.eps / 8
        )
        reached = logits_fn(by_hand).argmax(dim=1) == believed
    others = labels != believed
    assert (named == believed)[others & reached].all() and (others & reached).any()


def test_few_targets_are_those_next_in_value_and_rows_are_alone(world):
    logits_fn, images, labels = world
    (member,) = TargetedPGD(3, num_targets=1).members(6)
    asked = []

    def surrogate(pixels):
        logits = logits_fn(pixels)
        asked.append(len(pixels))
        return logits

    victim = Victim(
        lambda pixels: Prediction(logits_fn(pixels), flagged=torch.ones(len(pixels), dtype=bool)), surrogate
    )
    whole = find_adversarial(member, victim, images, labels, THREAT)
    assert sum(asked) == len(images) * (1 + 3 + 1)  # its rank, steps, its margin
    alone = torch.cat(
        [find_adversarial(member, victim, images[i : i + 1], labels[i : i + 1], THREAT) for i in range(6)]
    )
    torch.testing.assert_close(whole, alone)


def test_settings_and_names():
    suite = TargetedPGD(4, "2/255", num_targets=9)
    assert suite.name(6) == "targeted PGD-4" and suite.parameters([THREAT], 6)["num_targets"] == 5
    assert suite.parameters([THREAT], 6)["step_size"] == [2 / 255]
    for wrong in (dict(num_steps=0), dict(step_size=0), dict(num_targets=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TargetedPGD(**wrong)
    images = make_images(2)
    adv = find_adversarial(
        suite.members(6)[0], plain_victim(lambda x: x.flatten(1)[:, :6]), images, torch.zeros(2).long(), ThreatModel(0)
    )
    assert torch.equal(adv, images)
