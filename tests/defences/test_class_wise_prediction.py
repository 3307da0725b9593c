"""C-AVP's prediction: its values, what attacks see of it, and what it refuses."""

import pytest
import torch
from prompted_clip import NAMES, make_base, make_class_wise, make_images, make_prompted
from torch.utils.data import Dataset

from hf_robust_clip.defences.c_avp import CAVP
from hf_robust_clip.defences.ensemble import Ensemble
from hf_robust_clip.defences.ttc import TTC
from hf_robust_clip.defences.undefended import Undefended
from hf_robust_clip.evaluation.attack_views import VIEWS, AdaptiveWorst, Scene
from hf_robust_clip.evaluation.loop import evaluate_robustness
from hf_robust_clip.evaluation.settings import EvaluationSettings
from hf_robust_clip.evaluation.state import fingerprint_of


def naive(images, prompts_KCN, temperature=1.0):
    """log softmax(z(clip(x + m delta_c)))_c, one class after the other, of the classifier without prompts."""
    base, inside = make_base(), torch.ones(8, 8, dtype=torch.bool)
    inside[2:-2, 2:-2] = False
    found = []
    for c, prompt_CN in enumerate(prompts_KCN.detach()):
        delta = torch.zeros(3, 8, 8, dtype=torch.float64)
        delta[:, inside] = prompt_CN
        logits = base((images + delta).clamp(0, 1)).logits / temperature
        found.append(logits[:, c] - logits.exp().sum(dim=1).log())
    return torch.stack(found, dim=1)


def prompts_in(classifier):
    return classifier.vision_model.embeddings.patch_embedding.clip_prompt_tokens["default"]


def test_predictions_are_those_of_one_class_after_the_other():
    classifier, images = make_class_wise(), make_images(5)
    assert prompts_in(classifier).shape == (len(NAMES), 3, 48)
    for settings in ({}, {"temperature": 30.0}, {"chunk_size": 1}, {"chunk_size": 4}, {"memory_budget": 1e-6}):
        wanted = naive(images, prompts_in(classifier), settings.get("temperature", 1.0))
        found = CAVP(**settings).predict(classifier, images).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert (wanted.exp().sum(dim=1) - 1).abs().min() > 1e-3


def test_gradients_are_those_of_finite_differences():
    classifier = make_class_wise()
    with torch.no_grad():
        prompts_in(classifier).mul_(0.3)
    images, defence = 0.3 + 0.4 * make_images(2), CAVP(temperature=10.0)
    given = images.clone().requires_grad_()
    weights = torch.randn(2, len(NAMES), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits = defence.predict(classifier, given, path="through").logits
    (grad,) = torch.autograd.grad((weights * logits).sum(), given)
    ends = [(weights * defence.predict(classifier, images + s * direction).logits).sum() for s in (1e-6, -1e-6)]
    slope = float(ends[0] - ends[1]) / 2e-6
    assert slope == pytest.approx(float((grad * direction).sum()), rel=1e-5)


def test_clipped_pixels_have_no_gradient_but_where_clipping_counts_as_the_identity():
    classifier = make_class_wise()
    with torch.no_grad():
        prompts_in(classifier).fill_(2.0)
    images, grads, logits = make_images(2).requires_grad_(), [], []
    for path in ("through", "identity"):
        logits.append(CAVP().predict(classifier, images, path=path).logits)
        grads += torch.autograd.grad(logits[-1].sum(), images)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-9)
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    assert not grads[0][:, :, :2].any()
    assert grads[0][inside].all() and grads[1].all()
    torch.testing.assert_close(grads[0][inside], grads[1][inside], rtol=0, atol=1e-9)


def test_every_view_sees_what_it_says():
    """Blind ones the network without prompts, others the prediction."""
    classifier, images, defence, base = make_class_wise(), make_images(3), CAVP(), make_base()
    with defence.prepared(classifier):
        defended, bare = defence.predict(classifier, images).logits, base(images).logits
        for name, view in VIEWS.items():
            victim = view.victim(Scene(defence, classifier), images)
            blind = name in ("static", "defence_blind", "transfer_from_adapted")
            wanted = bare if blind else defended
            torch.testing.assert_close(victim.gradient_fn(images), wanted, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="class_prompts"):
        classifier(images)


class Pictures(Dataset):
    """Images with labels of some classes."""

    dataset_id, revision, split, augment = "pictures", "1", "test", False

    def __init__(self, images, labels, class_names=NAMES):
        self.images, self.labels, self.class_names = images, labels, tuple(class_names)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def test_an_attack_through_it_is_worse_than_a_blind_one():
    classifier = make_class_wise()
    with torch.no_grad():
        prompts_in(classifier).mul_(0.1)
    images = make_images(8)
    labels = CAVP().predict(classifier, images).logits.argmax(dim=1).tolist()
    data = Pictures(images, labels)
    names = dict(name="name", task="task", model_id="id")
    reports = {}
    for how in (dict(view=VIEWS["defence_blind"]), dict(attack=AdaptiveWorst(4, 4, 5))):
        settings = EvaluationSettings(radii=["4/255"], **how)
        reports[settings.seen.name] = evaluate_robustness(classifier, data, settings, defence=CAVP(), **names)
    blind, worst = reports["defence_blind"], reports["adaptive_worst"]
    assert blind.clean_accuracy == worst.clean_accuracy == 1
    assert max(worst.robust_accuracy.values()) < max(blind.robust_accuracy.values())
    assert set(worst.controls) == {"static prompts", "random prompts", "ensemble-64"}
    bare = (make_base()(images).logits.argmax(dim=1) == torch.tensor(labels)).double().mean().item()
    assert worst.controls["static prompts"][0.0] == pytest.approx(bare)
    with pytest.raises(ValueError, match="class_prompts"):
        evaluate_robustness(classifier, data, EvaluationSettings(radii=["4/255"]), **names)
    other = Pictures(images, labels, (*NAMES[1:], NAMES[0]))
    with pytest.raises(ValueError, match="order"):
        evaluate_robustness(classifier, other, settings, defence=CAVP(), **names)


def test_classifiers_without_class_wise_prompts_are_refused():
    images, defence = make_images(2), CAVP()
    for other in (make_base(), make_prompted("V").get_base_model(), make_prompted("pixel-full").get_base_model()):
        with pytest.raises(ValueError, match="class-wise prompts"):
            defence.predict(other, images)
    classifier = make_class_wise()
    classifier.class_names = (*NAMES[1:], NAMES[0])
    with pytest.raises(ValueError, match="class_names"):
        defence.predict(classifier, images)


@pytest.mark.parametrize("defence", [TTC(), Ensemble(num_views=2)])
def test_other_defences_refuse_class_wise_prompts(defence):
    with pytest.raises(ValueError, match="class_prompts"):
        defence.predict(make_class_wise(), make_images(2))


def test_a_run_never_goes_on_with_prompts_of_other_units():
    data, settings = Pictures(make_images(2), [0, 1]), EvaluationSettings(radii=["4/255"])
    models = [make_prompted("pixel-border", clipped=clipped) for clipped in (True, False, True)]
    clipped, plain, again = (
        fingerprint_of(model.get_base_model(), data, settings, Undefended())["model"] for model in models
    )
    assert clipped == again != plain
