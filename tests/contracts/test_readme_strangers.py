"""What somebody else writes by the README's "Add a method", through the public names alone: nothing about it but the
method.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import hf_robust_clip as rc
from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.report.card import make_card, make_unmeasured_card
from hf_robust_clip.training.summary import card_info

EPS = 24 / 255


@dataclass(frozen=True)
class HalfClean(rc.Objective):
    """L = w * CE(z(x), y) + (1 - w) * CE(z(x_adv), y)."""

    weight: float = 0.5

    def __call__(self, batch, adv_BCHW):
        adv, clean = batch.student_on_both(adv_BCHW)
        return {
            "clean": self.weight * cross_entropy(clean.logits, batch.labels).mean(),
            "adv": (1 - self.weight) * cross_entropy(adv.logits, batch.labels).mean(),
        }


@dataclass(frozen=True, kw_only=True)
class Rounding(rc.Defence):
    """Classifies images rounded to so many grey levels."""

    levels: int = 8

    def _predict(self, classifier, images_BCHW, state, seed, path):
        with torch.set_grad_enabled(path != "none"):
            rounded = (images_BCHW * self.levels).round() / self.levels
            if path == "identity":  # BPDA: backwards as if nothing had been rounded
                rounded = images_BCHW + (rounded - images_BCHW).detach()
            return rc.Prediction(classifier(pixel_values=rounded).logits)


@dataclass(frozen=True)
class Noise(rc.Suite):
    """A random point of the ball."""

    scale: float = 1.0

    def members(self, num_classes):
        def run(victim, images, labels, threat_model):
            start = threat_model.random_start(images, victim.seed)
            return images + self.scale * (start - images)

        return [rc.Member("noise", run)]


@dataclass(frozen=True)
class Halfway(rc.AttackView):
    """Through the defence, of an image that lost half its contrast."""

    name: ClassVar[str] = "halfway"
    text: ClassVar[str] = "through the defence, at half the contrast"
    goes_through: ClassVar[bool] = True

    def victim(self, scene, images_BCHW):
        return scene.defended(lambda pixels: scene.drawn(0.5 * pixels + 0.25, "identity").logits)


@dataclass(frozen=True, kw_only=True)
class Shaken(Rounding):
    """Draws, and doesn't say so."""

    def _predict(self, classifier, images_BCHW, state, seed, path):
        noise = torch.randn(images_BCHW.shape, generator=torch.Generator().manual_seed(seed))
        return super()._predict(classifier, (images_BCHW + noise).clamp(0, 1), state, seed, path)


@dataclass(frozen=True, kw_only=True)
class Tuned(Rounding):
    """Takes gradients, and doesn't say so."""

    def _predict(self, classifier, images_BCHW, state, seed, path):
        pixels = images_BCHW.detach().requires_grad_()
        (grad,) = torch.autograd.grad(classifier(pixel_values=pixels).logits.max(dim=1).values.sum(), pixels)
        return super()._predict(classifier, (images_BCHW + 0.01 * grad.sign()).clamp(0, 1), state, seed, path)


@pytest.fixture(scope="module")
def digits():
    model = rc.CLIPForZeroShotClassification.from_pretrained("digits-clip")
    data = rc.load_image_dataset("digits", "test", model.processor).first(24)
    model.set_classes(data.class_names)
    return model, data


def report_of(digits, attack, view=None, defence=None):
    settings = rc.EvaluationSettings([EPS], attack=attack, view=view or rc.Static(), batch_size=24)
    names = dict(name="mine", task="digits", model_id="digits-clip")
    return rc.evaluate_robustness(*digits, settings, defence=defence, **names)


def test_an_objective_is_trained_and_has_a_card(tmp_path):
    model = rc.CLIPForZeroShotClassification.from_pretrained("digits-clip")
    data = rc.load_image_dataset("digits", "train", model.processor).first(8)
    model.set_classes(data.class_names)
    args = rc.RobustClipConfig(str(tmp_path), eps=EPS, max_steps=1, per_device_train_batch_size=8, report_to=[])
    trainer = rc.RobustClipTrainer(model, args, HalfClean(0.3), train_dataset=data)
    assert trainer.train().global_step == 1
    assert trainer.settings()["method"] == "HalfClean" and trainer.settings()["objective"] == {"weight": 0.3}
    card = make_unmeasured_card(card_info(trainer, "me/half-clean"), "model").text
    assert "by **HalfClean**, as" not in card and "on adversarial examples by **HalfClean**." in card
    assert "Citation" not in card and "()" not in card


def test_a_defence_and_an_attack_are_judged_and_have_a_card(digits):
    report = report_of(digits, Noise(), rc.BPDA(), Rounding(levels=4))
    assert report.defence["name"] == "Rounding" and report.defence["parameters"]["levels"] == 4
    assert report.defence["traits"] == {
        "randomised": False,
        "optimising": False,
        "episodic": True,
        "couples_images": False,
    }
    assert report.attack == "Noise" and report.attack_parameters == {
        "class": f"{__name__}.Noise", "scale": 1.0, "eot": 1,
    }  # fmt: skip
    plain = report_of(digits, rc.PGD(2))
    model, data = digits
    images = torch.stack([data[i]["pixel_values"] for i in range(24)])
    labels = torch.tensor([data[i]["labels"] for i in range(24)])
    with torch.no_grad():
        right = model(pixel_values=(images * 4).round() / 4).logits.argmax(1) == labels
    assert report.clean_accuracy == float(right.double().mean()) and report.robust_accuracy[EPS] > 0
    info = card_info_of(report)
    card = make_card([plain, report], [], info).text
    assert "Rounding" in card and "Citation" not in card
    defended = rc.DefendedClassifier(model, Rounding(), base_model="digits-clip").card("me/rounding").text
    assert "the test-time defence **Rounding**: for every image" in defended


def card_info_of(report):
    from hf_robust_clip.report.card import CardInfo

    paper = rc.Paper("Mine")
    settings = {"trainable_parameters": 1}
    return CardInfo("me/mine", "digits-clip", "digits", paper, settings, "{}", report.class_names, "")


def test_a_view_has_a_report(digits):
    report = report_of(digits, rc.PGD(2), Halfway(), Rounding())
    assert (report.view.name, report.view.text, report.view.goes_through) == (
        "halfway", "through the defence, at half the contrast", True,
    )  # fmt: skip
    assert report.full_attack == "PGD-2 (halfway)" and report.attack_parameters["eot"] == 1
    assert report.robust_accuracy != report_of(digits, rc.PGD(2), rc.BPDA(), Rounding()).robust_accuracy


def test_a_view_under_the_name_of_one_of_ours_is_refused():
    for cls in (type("Adaptive", (Halfway,), {"name": "adaptive"}), type("Mine", (rc.Adaptive,), {})):
        with pytest.raises(ValueError, match="view="):
            rc.EvaluationSettings([EPS], view=cls())


@pytest.mark.parametrize(("defence", "trait"), [(Shaken(), "randomised"), (Tuned(), "optimising")])
def test_a_defence_that_hides_its_traits_is_refused(digits, defence, trait):
    with pytest.raises(ValueError, match=trait):
        report_of(digits, Noise(), rc.DefenceBlind(), defence)


class Twice(rc.Suite):
    """Gives two attacks one name, or brings a view and says nothing of it."""

    def __init__(self, members):
        self.own = members

    def members(self, num_classes):
        return self.own


NOISE = Noise().members(2)[0]


@pytest.mark.parametrize("members", [[], [NOISE, NOISE], [replace(NOISE, view=rc.DefenceBlind())]])
def test_members_that_no_report_could_tell_apart_are_refused(digits, members):
    with pytest.raises(ValueError, match="attack="):
        report_of(digits, Twice(members))
