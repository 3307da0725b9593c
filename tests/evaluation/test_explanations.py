"""Where a model looks in attacked images: which attack, which classes, and how far it moves."""

import pytest
import torch
from tiny_siglip import tiny_siglip

from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.attacks.named import suite_named
from hf_robust_clip.attacks.pgd import pgd
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.evaluation.explanations import explain_images
from hf_robust_clip.evaluation.settings import EvaluationSettings
from hf_robust_clip.explain import patch_map, saliency
from hf_robust_clip.threat_model import ThreatModel
from hf_robust_clip.zero_shot_data.loading import collate_images, load_image_dataset

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def model():
    return tiny_siglip(dtype=torch.float32, class_names=NAMES)


@pytest.fixture(scope="module")
def data(model):
    return load_image_dataset("digits", "test", model.processor).first(5)


def how(batch_size=2, attack=None):
    return EvaluationSettings(["4/255", "12/255"], attack=attack or PGD(4), batch_size=batch_size, seed=3)


@pytest.fixture(scope="module")
def found(model, data):
    return explain_images(model, data, how(), 3, name="m", task="t")


def test_the_first_images_are_attacked_to_the_end_at_the_largest_radius(model, data, found):
    batch = collate_images([data[i] for i in range(3)])
    images, labels = batch["pixel_values"], batch["labels"]
    threat = ThreatModel("12/255")
    adv = pgd(lambda x: cross_entropy(model(x).logits, labels), images, threat, num_steps=4,
              step_size=2.5 * threat.eps / 4, keep_best=True, seed=3)  # fmt: skip
    assert found.attack == "PGD-4 at L-inf eps=12/255" and torch.equal(found.labels, labels)
    torch.testing.assert_close(found.clean.images, images, rtol=0, atol=0)
    torch.testing.assert_close(found.attacked.images, adv, rtol=0, atol=1e-6)
    alone = explain_images(model, data, how(attack=suite_named("apgd", None)), 1, name="m", task="t")
    assert alone.attack == "apgd-ce alone, until misclassified, at L-inf eps=12/255"


def test_maps_are_of_the_true_class_and_of_its_strongest_rival_under_attack(model, found):
    for b, label in enumerate(found.labels.tolist()):
        after = model(found.attacked.images[b : b + 1]).logits[0].detach()
        rival = max((c for c in range(len(NAMES)) if c != label), key=lambda c: float(after[c]))
        assert int(found.rivals[b]) == rival
        for look in (found.clean, found.attacked):
            pixels = look.images[b : b + 1]
            maps = patch_map(model, pixels)[0]
            torch.testing.assert_close(look.true_maps[b], maps[label])
            torch.testing.assert_close(look.rival_maps[b], maps[rival])
            torch.testing.assert_close(look.saliency[b], saliency(model, pixels, [label])[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(look.probabilities[b], model(pixels).logits[0].detach().softmax(dim=0))


def test_the_rival_of_an_image_that_withstands_is_not_its_own_class(model):
    data = load_image_dataset("digits", "test", model.processor).first(60)
    settings = EvaluationSettings(["0.01/255"], attack=PGD(1))
    found = explain_images(model, data, settings, 60, name="m", task="t")
    ranked = found.attacked.probabilities.argsort(dim=1, descending=True)
    withstood = ranked[:, 0] == found.labels
    assert withstood.any() and (~withstood).any()
    assert torch.equal(found.rivals, torch.where(withstood, ranked[:, 1], ranked[:, 0]))


def test_batches_make_no_difference_and_the_model_comes_back(model, data, found):
    model.train()
    whole = explain_images(model, data, how(batch_size=64), 9, name="m", task="t")
    assert model.training and len(whole.labels) == 5  # as many as there are
    model.eval()
    for one, other in ((whole.clean, found.clean), (whole.attacked, found.attacked)):
        for name in ("images", "probabilities", "true_maps", "rival_maps", "saliency"):
            torch.testing.assert_close(getattr(one, name)[:3], getattr(other, name), rtol=1e-4, atol=1e-4)


def test_bad_input_is_refused(model, data):
    for count in (0, -1, 2.5):
        with pytest.raises(ValueError, match="count"):
            explain_images(model, data, how(), count, name="m", task="t")
    with pytest.raises(ValueError, match="class"):
        explain_images(model, data.only(NAMES[:3]), how(), 1, name="m", task="t")
