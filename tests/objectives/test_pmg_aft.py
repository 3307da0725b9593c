"""PMG-AFT against a float64 computation that shares nothing with the package but the vision and text towers."""

import copy
import math

import pytest
import torch

from hf_robust_clip.attacks.pgd import pgd
from hf_robust_clip.modeling import PAPER_TEMPLATE
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.pmg_aft import PMGAFT
from hf_robust_clip.objectives.tecoa import TeCoA
from hf_robust_clip.threat_model import ThreatModel

EPS, STEP, STEPS = 4 / 255, 1 / 255, 3
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def probabilities(model, images, statistics, temperature):
    """softmax(temperature * cos(f((x - mean) / std), t)), written out; prompts padded to the whole context."""
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1) for values in statistics)
    image_rows = model.get_image_features(pixel_values=(images - mean) / std).pooler_output
    prompts = [PAPER_TEMPLATE.replace("{}", name) for name in model.class_names]
    tokens = model.processor.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    text_rows = model.get_text_features(input_ids=tokens).pooler_output.detach()
    lengths = (image_rows**2).sum(1, keepdim=True).sqrt() * (text_rows**2).sum(1).sqrt()
    scores = temperature * (image_rows @ text_rows.T) / lengths
    powers = (scores - scores.detach().max()).exp()
    return powers / powers.sum(1, keepdim=True)


def cross_entropies(probs, labels):
    return torch.stack([-probs[i, label].log() for i, label in enumerate(labels.tolist())])


def divergence_sum(first, second):
    """sum over images and classes of p * (log p - log q)."""
    return (first * first.log() - first * second.log()).sum()


def hand_attack(model, images, labels, start, statistics, temperature):
    """K sign steps on the summed cross-entropy, kept in the ball and in [0, 1] value by value."""
    adv = start
    for _ in range(STEPS):
        adv = adv.detach().requires_grad_()
        loss = cross_entropies(probabilities(model, adv, statistics, temperature), labels).sum()
        (grad,) = torch.autograd.grad(loss, adv)
        moved = adv.detach() + STEP * (grad > 0).double() - STEP * (grad < 0).double()
        change = moved - images
        change = torch.where(change > EPS, torch.full_like(change, EPS), change)
        change = torch.where(change < -EPS, torch.full_like(change, -EPS), change)
        adv = images + change
        adv = torch.where(adv > 1, torch.ones_like(adv), torch.where(adv < 0, torch.zeros_like(adv), adv))
    return adv


def hand_loss(student, teacher, images, adv, labels, statistics, temperature, direction, kl_scale):
    """CE mean + kl_scale * (KL against the teacher on adv + KL against the student's own clean prediction)."""
    on_adv = probabilities(student, adv, statistics, temperature)
    guide = probabilities(teacher, adv, statistics, temperature).detach()
    clean = probabilities(student, images, statistics, temperature)
    pairs = [(guide, on_adv), (clean, on_adv)]
    if direction == "adv_first":
        pairs = [(second, first) for first, second in pairs]
    kl = sum(divergence_sum(first, second) for first, second in pairs)
    return cross_entropies(on_adv, labels).sum() / len(labels) + kl_scale * kl


def relative_gap(values, expected):
    """The largest difference over all tensors, as a share of the largest expected value."""
    gap = max((value - right).abs().max().item() for value, right in zip(values, expected, strict=True))
    return gap / max(right.abs().max().item() for right in expected)


def vision_gradients(model, loss):
    return torch.autograd.grad(loss, model.vision_parameters())


@pytest.fixture
def pair(tiny_clip):
    """A student that has moved away from its frozen teacher."""
    student, teacher = tiny_clip(), tiny_clip().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.vision_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return student, teacher


def make_batch(pair, images, labels, objective=None, **kwargs):
    student, teacher = pair
    if objective is not None and objective.normalisation is not None:
        student.set_normalisation(*objective.normalisation)
        teacher.set_normalisation(*objective.normalisation)
    return Batch((images,), labels, None, student, teacher, **kwargs)


@pytest.mark.parametrize("direction", ["clean_first", "adv_first"])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_attack_loss_and_gradient_equal_a_hand_computation(pair, tiny_batch, preset, direction):
    images, labels = tiny_batch(6)
    student, teacher = pair
    preset_objective = {"paper": PMGAFT.paper_preset(), "released": PMGAFT.released_preset()}[preset]
    objective = PMGAFT(**{**vars(preset_objective), "kl_direction": direction})
    statistics = {"paper": CLIP_STATISTICS, "released": IMAGENET_STATISTICS}[preset]
    temperature = {"paper": math.exp(student.logit_scale.item()), "released": 1.0}[preset]
    kl_scale = {"paper": 1 / len(images), "released": 1.0}[preset]
    batch = make_batch(pair, images, labels, objective, images_per_update=len(images))
    threat_model = ThreatModel(EPS)

    adv = pgd(objective.attack_loss(batch), images, threat_model, num_steps=STEPS, step_size=STEP, seed=3)
    start = threat_model.random_start(images, 3)
    assert relative_gap([adv], [hand_attack(student, images, labels, start, statistics, temperature)]) < 1e-14
    assert (adv - start).abs().max() > STEP  # the walk left its start

    loss = sum(objective(batch, adv).values())
    expected = hand_loss(student, teacher, images, adv, labels, statistics, temperature, direction, kl_scale)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_gap(vision_gradients(student, loss), vision_gradients(student, expected)) < 1e-10


def test_presets_prescribe_what_they_follow():
    """The paper's preset keeps the checkpoint's normalisation; the released one brings ImageNet's."""
    assert PMGAFT.paper_preset() == PMGAFT()
    assert PMGAFT.paper_preset().normalisation is None
    mean, std = PMGAFT.released_preset().normalisation
    assert (tuple(mean), tuple(std)) == IMAGENET_STATISTICS


def test_weights_scale_their_own_term(pair, tiny_batch):
    images, labels = tiny_batch()
    batch = make_batch(pair, images, labels)
    adv = ThreatModel(EPS).random_start(images, 0)
    once = PMGAFT(alpha=1, beta=1)(batch, adv)
    weighted = PMGAFT(alpha=2, beta=0.5)(batch, adv)
    assert list(weighted) == ["ce", "kl_general", "kl_clean"]
    assert once["kl_general"].item() > 0
    assert once["kl_clean"].item() > 0
    expected = (once["ce"], 2 * once["kl_general"], 0.5 * once["kl_clean"])
    torch.testing.assert_close(tuple(weighted.values()), expected, rtol=1e-12, atol=0)


def test_without_weights_it_is_tecoa_and_asks_no_teacher(pair, tiny_batch):
    images, labels = tiny_batch()
    student, _ = pair

    def refuse(images):
        raise AssertionError("the teacher was asked")

    batch = Batch((images,), labels, None, student, refuse)
    objective, tecoa = PMGAFT(alpha=0, beta=0), TeCoA()
    settings = dict(images_BCHW=images, threat_model=ThreatModel(EPS), num_steps=2, step_size=STEP)
    adv = pgd(objective.attack_loss(batch), **settings)
    assert torch.equal(adv, pgd(tecoa.attack_loss(batch), **settings))
    loss, expected = (sum(each(batch, adv).values()) for each in (objective, tecoa))
    assert loss.item() == expected.item()
    assert relative_gap(vision_gradients(student, loss), vision_gradients(student, expected)) < 1e-14


@pytest.mark.parametrize(("alpha", "beta", "left_out"), [(0, 1, "kl_general"), (1, 0, "kl_clean")])
def test_a_weight_of_zero_leaves_out_its_pass(pair, tiny_batch, alpha, beta, left_out):
    images, labels = tiny_batch()
    student, teacher = pair
    seen = {"student": 0, "teacher": 0}

    def counted(name, model):
        def ask(images):
            seen[name] += len(images)
            return model(images)

        return ask

    batch = Batch((images,), labels, None, counted("student", student), counted("teacher", teacher))
    adv = ThreatModel(EPS).random_start(images, 0)
    terms = PMGAFT(alpha=alpha, beta=beta)(batch, adv)
    full = PMGAFT()(make_batch(pair, images, labels), adv)
    assert seen == {"student": len(images) * (2 if beta else 1), "teacher": len(images) if alpha else 0}
    assert set(full) - set(terms) == {left_out}
    for name, value in terms.items():
        assert value.item() == pytest.approx(full[name].item(), rel=1e-12)


@pytest.mark.parametrize("direction", ["clean_first", "adv_first"])
def test_both_divergences_vanish_for_an_unmoved_model_on_clean_images(tiny_clip, tiny_batch, direction):
    """With student = teacher and x_adv = x both terms are at their minimum: value 0, gradient 0."""
    images, labels = tiny_batch()
    student = tiny_clip()
    batch = Batch((images,), labels, None, student, copy.deepcopy(student).requires_grad_(False))
    terms = PMGAFT(kl_direction=direction)(batch, images)
    ce_size = max(
        grad.abs().max() for grad in torch.autograd.grad(terms["ce"], student.vision_parameters(), retain_graph=True)
    )
    for name in ("kl_general", "kl_clean"):
        assert abs(terms[name].item()) < 1e-14
        grads = torch.autograd.grad(terms[name], student.vision_parameters(), retain_graph=True)
        assert max(grad.abs().max() for grad in grads) < 1e-12 * ce_size


def test_gradient_flows_through_the_clean_branch(pair, tiny_batch):
    """Detaching the clean prediction would change the gradient of KL_clean."""
    images, labels = tiny_batch()
    student, _ = pair
    batch = make_batch(pair, images, labels)
    adv = ThreatModel(EPS).random_start(images, 0)
    objective = PMGAFT(alpha=0)
    with torch.no_grad():
        frozen = student(images).logits
    detached = objective.reduced_kl(frozen, student(adv).logits, batch)
    attached = objective(batch, adv)["kl_clean"]
    assert attached.item() == pytest.approx(detached.item(), rel=1e-12)
    assert relative_gap(vision_gradients(student, attached), vision_gradients(student, detached)) > 1e-2


def test_sum_is_images_per_update_times_the_mean(pair, tiny_batch):
    """The KL terms only; cross-entropy stays a mean."""
    images, labels = tiny_batch(4)
    adv = ThreatModel(EPS).random_start(images, 0)
    mean = PMGAFT()(make_batch(pair, images, labels), adv)
    for stated, factor in ((0, 4), (32, 32)):
        total = PMGAFT(reduction="sum")(make_batch(pair, images, labels, images_per_update=stated), adv)
        assert total["ce"].item() == mean["ce"].item()
        for name in ("kl_general", "kl_clean"):
            assert total[name].item() == pytest.approx(factor * mean[name].item(), rel=1e-12)


def test_sum_over_accumulated_halves_averages_to_the_whole_batch(pair, tiny_batch):
    images, labels = tiny_batch(8)
    adv = ThreatModel(EPS).random_start(images, 0)
    objective = PMGAFT(reduction="sum")

    def loss(rows):
        batch = make_batch(pair, images[rows], labels[rows], images_per_update=8)
        return sum(objective(batch, adv[rows]).values())

    whole, halves = loss(slice(8)), (loss(slice(4)) + loss(slice(4, 8))) / 2
    assert halves.item() == pytest.approx(whole.item(), rel=1e-12)
    assert relative_gap(vision_gradients(pair[0], halves), vision_gradients(pair[0], whole)) < 1e-12


def test_a_missing_teacher_is_named(pair, tiny_batch):
    images, labels = tiny_batch()
    with pytest.raises(ValueError, match="teacher"):
        PMGAFT()(Batch((images,), labels, None, pair[0]), images)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -1.0),
        ("beta", -0.1),
        ("beta", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("kl_direction", "forward"),
        ("reduction", "mean"),
        ("image_mean", (0.5, 0.5, 0.5)),
        ("image_std", (0.5, 0.5, 0.5)),
    ],
)
def test_bad_hyperparameters_are_named_with_their_value(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        PMGAFT(**{name: value})
    assert repr(value) in str(caught.value)
