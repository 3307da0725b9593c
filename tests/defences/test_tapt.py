"""TAPT against `naive.py`: one image at a time, every view in one graph, torch's own AdamW."""

import math
from dataclasses import replace

import pytest
import torch
from naive import (
    CONTEXT,
    Alignment,
    NaiveCLIP,
    TAPTLoss,
    differentiable_logits,
    entropy_of_the_mean,
    own_prompts,
    targets_of,
    tune,
)
from prompted_clip import make_images, make_prompted

from hf_robust_clip.defences.tapt import TAPT
from hf_robust_clip.defences.views import draw_boxes

CLOSE = dict(rtol=0, atol=1e-8)
SAME = dict(rtol=0, atol=1e-10)
DESIGNS = {"V": "V", "VLI": "VLI", "VLJ": "VLJ", "VLJ-vision": "VLJ"}
SEED, VIEWS, KEPT = 5, 10, 3
FEWER = dict(num_views=VIEWS, selected=KEPT / VIEWS)
WANTED = {  # the table in the papers' and the released code's words: weight, alignment
    "paper": (1.0, Alignment(layers=9, reduction="norm", unbiased=True)),
    "released": (100 / 9, Alignment(layers=8, reduction="mean", unbiased=False)),
}


def classifier_of(row: str = "VLI", **changes):
    return make_prompted(row, **changes).get_base_model()


def grey_images(count: int, seed: int = 0):
    """Images of whole grey levels, whose views stay where they are when a pixel moves a little."""
    return (make_images(count, seed) * 255).round() / 255


def preset_of(name: str, classifier, design: str = "VLI", **changes) -> TAPT:
    targets = targets_of(classifier)
    made = TAPT.paper_preset(targets) if name == "paper" else TAPT.released_preset(targets)
    return replace(made, **{**FEWER, **changes})


def naive_loss(tapt: TAPT, weight: float, alignment: Alignment, gamma: float = 0.5) -> TAPTLoss:
    both = tapt.targets.adversarial, tapt.targets.clean
    moments = [(statistics.mean, statistics.variance) for statistics in both]
    return TAPTLoss(*moments, weight=weight, gamma=gamma, alignment=alignment)


def views_of(images, size: int = 8, count: int = VIEWS, seed: int = SEED):
    return draw_boxes(images, count, TAPT().crop, seed).render(images, size)


def starts_of(tapt: TAPT, classifier) -> dict[str, torch.Tensor]:
    """Where tuning begins: what steps of size 0 lead to."""
    still = replace(tapt, learning_rate=0.0, num_steps=1)
    return {name: value[0] for name, value in still.predict(classifier, make_images(1)).prompts.items()}


def assert_equal(found, b: int, wanted, near=CLOSE) -> None:
    assert found.kept[b].tolist() == wanted.kept
    torch.testing.assert_close(found.loss[b], wanted.loss, **near)
    assert list(found.prompts) == list(wanted.prompts)
    for name, value in wanted.prompts.items():
        torch.testing.assert_close(found.prompts[name][b], value, **near)
    torch.testing.assert_close(found.logits[b], wanted.logits, **near)


def assert_same(found, wanted, rows=slice(None), near=SAME) -> None:
    assert torch.equal(found.kept, wanted.kept[rows]) and torch.equal(found.fell_back, wanted.fell_back[rows])
    torch.testing.assert_close(found.loss, wanted.loss[rows], **near)
    torch.testing.assert_close(found.logits, wanted.logits[rows], **near)
    for name, value in wanted.prompts.items():
        torch.testing.assert_close(found.prompts[name], value[rows], **near)


# ---- one image


@pytest.mark.parametrize("row", list(DESIGNS))
@pytest.mark.parametrize("preset", list(WANTED))
def test_tapt_is_the_naive_implementation(row, preset, monkeypatch):
    classifier, images = classifier_of(row), make_images(2)
    tapt = preset_of(preset, classifier, DESIGNS[row])
    start, clip = starts_of(tapt, classifier), NaiveCLIP(classifier)
    gradients, adamw = [], TAPT.adamw
    monkeypatch.setattr(TAPT, "adamw", lambda self, p, g, *rest: gradients.append(g) or adamw(self, p, g, *rest))
    found = tapt.predict(classifier, images, seed=SEED)
    assert not found.fell_back.any() and found.images is None
    moved = (found.logits - classifier(images).logits).abs().amax(dim=1)
    assert moved.min() > 1e-5
    for b, views in enumerate(views_of(images)):
        wanted = tune(clip, start, views, naive_loss(tapt, *WANTED[preset]), KEPT, learning_rate=5e-4)
        assert_equal(found, b, wanted)
        for name, gradient in zip(found.prompts, gradients, strict=True):
            assert wanted.gradients[name].abs().max() > 1e-6
            torch.testing.assert_close(gradient[b], wanted.gradients[name], **CLOSE)


@pytest.mark.parametrize("row", ["VLI", "VLJ-vision"])
def test_more_steps_go_on_with_the_optimiser_and_the_views_of_the_first(row):
    classifier, images = classifier_of(row), make_images(1)
    tapt = preset_of("paper", classifier, num_steps=3, learning_rate=0.02, weight_decay=0.3)
    found = tapt.predict(classifier, images, seed=SEED)
    for b, views in enumerate(views_of(images)):
        loss = naive_loss(tapt, *WANTED["paper"])
        wanted = tune(NaiveCLIP(classifier), own_prompts(classifier), views, loss, KEPT, 0.02, 0.3, num_steps=3)
        assert_equal(found, b, wanted)


def test_parts_of_the_loss_can_be_left_out():
    classifier, images = classifier_of("VLI"), make_images(1)
    targets, clip, views = targets_of(classifier), NaiveCLIP(classifier), views_of(images)[0]
    one_layer = Alignment(layers=1, reduction="norm", unbiased=True)
    alone = TAPT(targets=replace(targets, clean=None), gamma=1.0, align_layers=1, **FEWER)
    bare = TAPT(align_weight=0.0, **FEWER)
    for tapt, loss in (
        (alone, naive_loss(TAPT(targets=targets), 1.0, one_layer, gamma=1.0)),
        (
            TAPT(targets=targets, gamma=0.0, align_layers=1, **FEWER),
            naive_loss(TAPT(targets=targets), 1.0, one_layer, gamma=0.0),
        ),
        (bare, entropy_of_the_mean),
    ):
        wanted = tune(clip, own_prompts(classifier), views, loss, KEPT, 5e-4)
        assert_equal(tapt.predict(classifier, images, seed=SEED), 0, wanted)


def test_small_images_are_enlarged_before_they_are_classified_and_cropped_before_they_are_enlarged():
    classifier, images = classifier_of("VLI"), make_images(2)[..., 1:7, 2:8]
    tapt = preset_of("paper", classifier)
    classifier.set_input_size(6)
    found = tapt.predict(classifier, images, seed=SEED)
    for b, views in enumerate(views_of(images)):
        loss = naive_loss(tapt, *WANTED["paper"])
        assert_equal(found, b, tune(NaiveCLIP(classifier), own_prompts(classifier), views, loss, KEPT, 5e-4))


def test_presets_are_those_of_the_paper_and_of_the_released_code():
    shared = dict(num_views=64, selected=0.1, learning_rate=5e-4, weight_decay=0.01, num_steps=1, gamma=0.5)
    paper = dict(align_weight=1.0, align_layers=9, align_reduction="norm", unbiased=True, reset_to="trained")
    released = dict(align_weight=100 / 9, align_layers=8, align_reduction="mean", unbiased=False)
    rows = {
        "paper": (TAPT.paper_preset(), paper),
        "default": (TAPT(), paper),
        "released": (TAPT.released_preset(), {**released, "reset_to": "released"}),
    }
    for made, wanted in rows.values():
        found = made.parameters()
        assert {name: found[name] for name in (*shared, *wanted)} == {**shared, **wanted}
        assert made.num_kept == 6 and made.reset_every == 1
        assert made.crop.scale == (0.08, 1.0) and made.crop.flip == 0.5


def test_the_step_is_that_of_torchs_adamw():
    """The closed form of the first step, and the later ones, over gradients of all sizes."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    scales = 10.0 ** torch.arange(-14, 1).repeat(2)
    tapt = TAPT(learning_rate=0.1, weight_decay=0.2)
    wanted = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([wanted], lr=0.1, weight_decay=0.2)
    state = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 5):
        grad = scales * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        grad[:, 0] = 0
        p, state = tapt.adamw(p, grad, state, step)
        wanted.grad = grad
        optimizer.step()
        torch.testing.assert_close(p, wanted.detach(), rtol=0, atol=1e-13)


# ---- many images


@pytest.mark.parametrize(("row", "preset"), [("VLI", "released"), ("VLJ", "paper")])
def test_neither_batch_nor_order_nor_memory_matter_and_the_seed_does(row, preset):
    classifier, images = classifier_of(row), make_images(8)
    tapt = preset_of(preset, classifier, DESIGNS[row], num_steps=2)
    whole = tapt.predict(classifier, images, seed=SEED)
    order = torch.tensor([6, 2, 0, 7, 5, 1, 4, 3])
    for rows in (slice(0, 1), slice(3, 4), slice(2, 7), order):
        assert_same(tapt.predict(classifier, images[rows], seed=SEED), whole, rows)
    tiny = 1e-9  # GiB: one image at a time
    for changes in (dict(chunk_size=4), dict(memory_budget=tiny)):
        assert_same(replace(tapt, **changes).predict(classifier, images, seed=SEED), whole)
    other = tapt.predict(classifier, images, seed=SEED + 1)
    assert not torch.equal(other.kept, whole.kept)
    assert (other.logits - whole.logits).abs().amax(dim=1).min() > 1e-6
    assert set(whole.kept[:, 0].tolist()) != {0}


def test_memory_budgets_divide_the_batch(monkeypatch):
    classifier, images = classifier_of("V"), make_images(5)
    tapt = preset_of("paper", classifier)
    sizes, run = [], TAPT.run
    monkeypatch.setattr(TAPT, "run", lambda self, c, x, *rest: sizes.append(len(x)) or run(self, c, x, *rest))
    each = tapt._bytes_per_image(classifier) / 2**30
    replace(tapt, memory_budget=2.5 * each).predict(classifier, images)
    assert sizes == [2, 2, 1]


# ---- where tuning begins


def test_a_random_reset_forgets_all_training_but_the_first_words():
    """The released code's slip. Fresh prompts ~ N(0, 0.02^2), the same for all images, by `random_seed` alone."""
    classifier, images = classifier_of("VLI", num_vision_tokens=40), make_images(3)
    tapt = preset_of("released", classifier)
    still = replace(tapt, learning_rate=0.0)
    torch.manual_seed(0)
    found = still.predict(classifier, images, seed=SEED)
    torch.manual_seed(1)
    own, start = own_prompts(classifier), starts_of(tapt, classifier)
    for name, value in found.prompts.items():
        assert all(torch.equal(row, start[name]) for row in value)
        assert torch.equal(start[name], own[name]) == (name == CONTEXT)
    vision = torch.cat([value.flatten() for name, value in start.items() if name.startswith("vision")])
    assert len(vision) == 1600
    assert abs(vision.std() - 0.02) < 1e-3 and abs(vision.mean()) < 2e-3
    deep = torch.cat([v.flatten() for n, v in start.items() if n.startswith("text") and n != CONTEXT])
    assert abs(deep.std() - 0.02) < 6e-3
    assert len(torch.cat([vision, deep]).unique()) == len(vision) + len(deep)
    another = starts_of(replace(tapt, random_seed=1), classifier)
    assert all(torch.equal(another[name], start[name]) == (name == CONTEXT) for name in start)
    clip, views = NaiveCLIP(classifier), views_of(images)
    for b in range(len(images)):
        torch.testing.assert_close(found.logits[b], clip.logits(views[b, :1], start)[0][0], **CLOSE)


@pytest.mark.parametrize(("reset_to", "every"), [("trained", 2), ("random", 3)])
def test_prompts_are_carried_on_inside_a_group(reset_to, every):
    """The prompts go on from image to image, the optimiser doesn't."""
    classifier, images = classifier_of("VLI"), make_images(5)
    tapt = preset_of("released", classifier, reset_to=reset_to, reset_every=every, learning_rate=0.01)
    assert not tapt.traits.episodic and replace(tapt, reset_every=1).traits.episodic
    found, start = tapt.predict(classifier, images, seed=SEED), starts_of(tapt, classifier)
    clip, views = NaiveCLIP(classifier), views_of(images)
    for b in range(len(images)):
        prompts = start if b % every == 0 else wanted.prompts  # noqa: F821  # of the image before
        wanted = tune(clip, prompts, views[b], naive_loss(tapt, *WANTED["released"]), KEPT, 0.01)
        assert_equal(found, b, wanted)
    for changes in (dict(chunk_size=3), dict(memory_budget=1e-9)):
        assert_same(replace(tapt, **changes).predict(classifier, images, seed=SEED), found)


@pytest.mark.parametrize(("design", "reset_to"), [("V", "random"), ("VLI", "random"), ("VLJ", "trained")])
def test_the_released_code_resets_by_the_design_of_the_prompts(design, reset_to):
    classifier = classifier_of(design)
    tapt = preset_of("released", classifier)
    own, wanted = own_prompts(classifier), starts_of(replace(tapt, reset_to=reset_to), classifier)
    found = starts_of(tapt, classifier)
    assert all(torch.equal(found[name], wanted[name]) for name in own)
    assert all(torch.equal(found[name], own[name]) for name in own) == (reset_to == "trained")


# ---- what isn't finite


@pytest.mark.parametrize("reset_to", ["trained", "random"])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_an_image_whose_tuning_is_not_finite_keeps_its_prediction(reset_to, broken, monkeypatch):
    classifier, images = classifier_of("VLI"), make_images(4)
    tapt = preset_of("released", classifier, reset_to=reset_to)
    sound, loss = tapt.predict(classifier, images, seed=SEED), TAPT.loss

    def spoilt(self, logits_BKC, inputs):
        values = list(loss(self, logits_BKC, inputs))
        values[2] = values[2] * math.nan if broken == "loss" else values[2] + (0 * logits_BKC[2, 0, 0]).sqrt()
        return torch.stack(values)

    monkeypatch.setattr(TAPT, "loss", spoilt)
    found = tapt.predict(classifier, images, seed=SEED)
    assert found.fell_back.tolist() == [False, False, True, False]
    others = [0, 1, 3]
    torch.testing.assert_close(found.logits[others], sound.logits[others], **SAME)
    torch.testing.assert_close(found.logits[2], classifier(images).logits[2], **SAME)
    assert (found.logits[2] - sound.logits[2]).abs().max() > 1e-6
    for name, own in own_prompts(classifier).items():
        torch.testing.assert_close(found.prompts[name][2], own, rtol=0, atol=0)
        torch.testing.assert_close(found.prompts[name][others], sound.prompts[name][others], **SAME)
    weights = torch.ones(4, 6, dtype=torch.float64).cumsum(1)
    plain = images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((classifier(plain).logits * weights).sum(), plain)
    for path in ("identity", "through"):
        gradient = gradient_by(images, tapt, classifier, path, weights)
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient[2], wanted[2], **SAME)


# ---- gradients by the images


def gradient_by(images, tapt: TAPT, classifier, path: str, weights):
    moved = images.clone().requires_grad_()
    logits = tapt.predict(classifier, moved, seed=SEED, path=path).logits
    return torch.autograd.grad((logits * weights).sum(), moved)[0]


def smooth(classifier, row: str):
    """A loss so faint that its gradients are of the size of AdamW's epsilon: the step is no sign, but a smooth
    function, and much of the prediction's gradient goes through it."""
    with torch.no_grad():
        classifier.logit_scale.fill_(-8.0)
    return preset_of("paper", classifier, DESIGNS[row], align_weight=1e-9, learning_rate=0.5)


@pytest.mark.parametrize("row", ["V", "VLI", "VLJ"])
def test_gradients_through_the_tuning_are_exact(row):
    classifier, images = classifier_of(row), grey_images(2)
    tapt = smooth(classifier, row)
    weights = 1e4 * torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    through = gradient_by(images, tapt, classifier, "through", weights)
    identity = gradient_by(images, tapt, classifier, "identity", weights)
    clip, found = NaiveCLIP(classifier), tapt.predict(classifier, images, seed=SEED)
    moved = images.clone().requires_grad_()
    loss = naive_loss(tapt, 1e-9, WANTED["paper"][1])
    rows = [
        differentiable_logits(clip, own_prompts(classifier), views, loss, kept.tolist(), 0.5)
        for views, kept in zip(views_of(moved), found.kept, strict=True)
    ]
    torch.testing.assert_close(torch.stack(rows).detach(), found.logits, rtol=0, atol=1e-11)
    (wanted,) = torch.autograd.grad((torch.stack(rows) * weights).sum(), moved)
    torch.testing.assert_close(through, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())
    fixed = [
        clip.logits(moved[b : b + 1], {name: value[b] for name, value in found.prompts.items()})[0][0]
        for b in range(len(images))
    ]
    (held,) = torch.autograd.grad((torch.stack(fixed) * weights).sum(), moved)
    torch.testing.assert_close(identity, held, rtol=1e-6, atol=1e-6 * held.abs().max().item())
    assert (through - identity).abs().max() > 0.05 * identity.abs().max()


@pytest.mark.parametrize("num_steps", [1, 2])
def test_gradients_through_the_tuning_are_those_of_finite_differences(num_steps):
    classifier, images = classifier_of("VLI"), grey_images(2)
    tapt = replace(smooth(classifier, "VLI"), num_steps=num_steps)
    weights = 1e4 * torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    through = gradient_by(images, tapt, classifier, "through", weights)
    inside = (images > 0.01) & (images < 0.99)
    for seed in range(3):
        way = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * inside
        h = 1e-6
        ends = [tapt.predict(classifier, images + sign * h * way, seed=SEED).logits for sign in (1, -1)]
        slopes_B = ((ends[0] - ends[1]) * weights).sum(dim=1) / (2 * h)
        torch.testing.assert_close((through * way).sum(dim=(1, 2, 3)), slopes_B, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_batch_are_those_of_its_images():
    classifier, images = classifier_of("VLI"), grey_images(3)
    tapt = smooth(classifier, "VLI")
    weights = 1e4 * torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = gradient_by(images, tapt, classifier, "through", weights)
    for changes in (dict(), dict(chunk_size=2), dict(memory_budget=1e-9)):
        part = gradient_by(images[1:2], replace(tapt, **changes), classifier, "through", weights[1:2])
        torch.testing.assert_close(part, whole[1:2], rtol=0, atol=1e-8 * whole.abs().max().item())


def test_a_detached_result_has_no_graph():
    classifier, images = classifier_of("VLI"), make_images(1).requires_grad_()
    tapt = preset_of("paper", classifier)
    found = tapt.predict(classifier, images)
    tensors = [found.logits, found.loss, *found.prompts.values()]
    assert not any(tensor.requires_grad for tensor in tensors)
    bound = tapt.predict(classifier, images, path="identity")
    assert bound.logits.requires_grad and not any(value.requires_grad for value in bound.prompts.values())
