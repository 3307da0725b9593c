"""TPT, PromptAlign, R-TPT, TTC and Ensemble against `naive.py`: one image at a time, from the methods' formulas."""

from dataclasses import replace

import pytest
import torch
from naive import (
    CONTEXT,
    NaiveCLIP,
    PromptAlignLoss,
    by_layer,
    counter_attack,
    ensemble_probabilities,
    entropy_of_the_mean,
    mean_of_the_entropies,
    own_prompts,
    r_tpt_logits,
    r_tpt_weights,
    targets_of,
    tune,
)
from prompted_clip import NAMES, make_base, make_images, make_prompted

from hf_robust_clip.defences.ensemble import Ensemble
from hf_robust_clip.defences.prompt_align import PromptAlign
from hf_robust_clip.defences.r_tpt import RTPT
from hf_robust_clip.defences.tpt import TPT
from hf_robust_clip.defences.ttc import TTC
from hf_robust_clip.defences.views import draw_boxes

CLOSE = dict(rtol=0, atol=1e-8)
SEED = 5
WORDS = {"TPT": (TPT, entropy_of_the_mean), "R-TPT": (RTPT, mean_of_the_entropies)}


def views_of(images, adapter, seed: int = SEED):
    return draw_boxes(images, adapter.num_views, adapter.crop, seed).render(images, 8)


def assert_tuned(found, b: int, wanted) -> None:
    assert found.kept[b].tolist() == wanted.kept
    torch.testing.assert_close(found.loss[b], wanted.loss, **CLOSE)
    assert list(found.prompts) == list(wanted.prompts)
    for name, value in wanted.prompts.items():
        torch.testing.assert_close(found.prompts[name][b], value, **CLOSE)


def assert_same(found, wanted, rows) -> None:
    assert torch.equal(found.fell_back, wanted.fell_back[rows])
    torch.testing.assert_close(found.logits, wanted.logits[rows], rtol=0, atol=1e-10)
    for name, value in wanted.prompts.items():
        torch.testing.assert_close(found.prompts[name], value[rows], rtol=0, atol=1e-10)


def prompt_align() -> tuple[torch.nn.Module, PromptAlign]:
    classifier = make_prompted("VLJ").get_base_model()
    targets = replace(targets_of(classifier), clean=None)
    return classifier, PromptAlign(targets=targets, num_views=10, selected=0.3)


# ---- words


@pytest.mark.parametrize("method", list(WORDS))
@pytest.mark.parametrize("num_views", [10, 30])
def test_the_words_of_a_plain_classifier_are_tuned(method, num_views):
    cls, loss = WORDS[method]
    classifier, images = make_base(), make_images(2)
    classifier.set_classes(NAMES[:4], "a bc d {}.")
    adapter, clip = cls(num_views=num_views, selected=3 / num_views, num_steps=2), NaiveCLIP(classifier)
    plain = classifier(images).logits
    start = {CONTEXT: clip.words(4)}
    torch.testing.assert_close(clip.logits(images, start)[0], plain, **CLOSE)
    found = adapter.predict(classifier, images, seed=SEED)
    still = replace(adapter, learning_rate=0.0).predict(classifier, images, seed=SEED)
    assert torch.equal(still.prompts[CONTEXT], start[CONTEXT].expand(2, -1, -1))
    for b, views in enumerate(views_of(images, adapter)):
        wanted = tune(clip, start, views, loss, 3, learning_rate=5e-3, num_steps=2)
        assert_tuned(found, b, wanted)
        logits = wanted.logits if cls is TPT else r_tpt_logits(clip, views, wanted.prompts)
        torch.testing.assert_close(found.logits[b], logits, **CLOSE)
        untuned = plain[b] if cls is TPT else r_tpt_logits(clip, views, start)
        torch.testing.assert_close(still.logits[b], untuned, **CLOSE)
        assert (logits - untuned).abs().max() > 1e-4
        if cls is RTPT:
            weights = r_tpt_weights(clip, views)
            assert 1.5 / num_views < weights.max() < 0.9


def test_all_words_before_the_name_are_tuned_and_none_after_it():
    """`prompts` names as many as every class prompt shares in its template."""
    classifier, images = make_base(), make_images(1)
    for template, count in (("ab {}", 2), ("a bc d e {} f", 5)):
        classifier.set_classes(("ab", "ac", "b"), template)
        found = TPT(num_views=2, selected=1.0).predict(classifier, images)
        assert found.prompts[CONTEXT].shape == (1, count, 16)


@pytest.mark.parametrize("method", list(WORDS))
@pytest.mark.parametrize("row", ["VLI", "T"])
def test_text_prompts_that_are_there_are_tuned_and_vision_prompts_stay(method, row):
    cls, loss = WORDS[method]
    classifier, images = make_prompted(row).get_base_model(), make_images(1)
    adapter, clip, own = cls(num_views=10, selected=0.3), NaiveCLIP(classifier), own_prompts(classifier)
    found = adapter.predict(classifier, images, seed=SEED)
    vision, text = ({n: v for n, v in own.items() if n.startswith(tower)} for tower in ("vision", "text"))
    assert list(found.prompts) == list(text)
    views = views_of(images, adapter)[0]
    wanted = tune(clip, own, views, loss, 3, learning_rate=5e-3)
    prompts = {**vision, **{name: wanted.prompts[name] for name in text}}
    for name in text:
        torch.testing.assert_close(found.prompts[name][0], prompts[name], **CLOSE)
    logits = clip.logits(views[:1], prompts)[0][0] if cls is TPT else r_tpt_logits(clip, views, prompts)
    torch.testing.assert_close(found.logits[0], logits, **CLOSE)


def test_defaults_are_the_papers():
    for made in (TPT(), RTPT()):
        found = made.parameters()
        assert (found["num_views"], made.num_kept, found["num_steps"]) == (64, 6, 1)
        assert (found["learning_rate"], found["weight_decay"]) == (5e-3, 0.01)
    assert (RTPT().num_neighbours, RTPT().temperature) == (20, 0.01)
    assert (PromptAlign().align_weight, PromptAlign().align_layers) == (100 / 3, 2)
    assert Ensemble().num_views == 64
    ttc = TTC()
    assert (ttc.eps, ttc.step_size, ttc.num_steps, ttc.tau, ttc.beta) == ("4/255", "1/255", 2, 0.2, 2.0)


# ---- PromptAlign


def test_prompt_align_is_the_naive_implementation():
    classifier, adapter = prompt_align()
    images, clip = make_images(2), NaiveCLIP(classifier)
    found = adapter.predict(classifier, images, seed=SEED)
    statistics = adapter.targets.adversarial
    for b, views in enumerate(views_of(images, adapter)):
        loss = PromptAlignLoss((statistics.mean, statistics.variance))
        wanted = tune(clip, own_prompts(classifier), views, loss, 3, adapter.learning_rate)
        assert_tuned(found, b, wanted)
        torch.testing.assert_close(found.logits[b], wanted.logits, **CLOSE)


# ---- TTC


@pytest.mark.parametrize("row", ["plain", "VLI"])
def test_ttc_is_the_naive_counter_attack(row):
    """Noise of its own is read off a defence whose threshold lets no image be countered: that shows x + d_0."""
    classifier = make_base() if row == "plain" else make_prompted(row).get_base_model()
    images, clip = (1.1 * make_images(8) - 0.05).clamp(0, 1), NaiveCLIP(classifier)
    prompts = {} if row == "plain" else own_prompts(classifier)
    noisy = TTC(tau=0.0).predict(classifier, images, seed=SEED).images
    starts = noisy - images
    assert starts.abs().max() <= 4 / 255 + 1e-12 and noisy.min() >= 0 and noisy.max() <= 1
    ratios = torch.tensor(
        [counter_attack(clip, x, d, by_layer(prompts)[0])[1] for x, d in zip(images, starts, strict=True)]
    )
    tau = float(ratios.sort().values[3:5].mean())  # half of the images are countered
    for adapter, near in ((TTC(), 0.2), (TTC(tau=tau), tau), (TTC(tau=1e9, num_steps=4, beta=0.5), 1e9)):
        found = adapter.predict(classifier, images, seed=SEED)
        for b, (image, start) in enumerate(zip(images, starts, strict=True)):
            vision = by_layer(prompts)[0]
            more = dict(num_steps=adapter.num_steps, beta=adapter.beta)
            wanted, _ = counter_attack(clip, image, start, vision, tau=near, **more)
            torch.testing.assert_close(found.images[b], wanted, **CLOSE)
            torch.testing.assert_close(found.logits[b], clip.logits(wanted[None], prompts)[0][0], **CLOSE)
    countered = (TTC(tau=tau).predict(classifier, images, seed=SEED).images - noisy).abs().amax(dim=(1, 2, 3)) > 1e-9
    assert countered.sum() == 4


def test_ttcs_noise_is_uniform_in_the_ball_and_follows_from_seed_and_image():
    classifier, images = make_base(), 0.2 + 0.6 * make_images(8)
    adapter = TTC(tau=0.0)
    noise = adapter.predict(classifier, images, seed=SEED).images - images
    again = adapter.predict(classifier, images[3:], seed=SEED).images - images[3:]
    other = adapter.predict(classifier, images, seed=SEED + 1).images - images
    assert torch.equal(noise[3:], again) and not torch.equal(noise, other)
    scaled = (noise * 255 / 4).flatten()
    assert scaled.abs().max() <= 1 + 1e-9
    quarters = torch.histc(scaled, 4, -1, 1) / len(scaled)
    assert (quarters - 0.25).abs().max() < 0.06
    assert len(noise.flatten().unique()) > 1500


@pytest.mark.parametrize("tau", [0.0, 1e9])
def test_ttcs_gradients(tau):
    """`identity`: that of the classifier at the countered image. `through`: by finite differences, where the sign
    steps stay what they are."""
    classifier, images = make_base(), ((0.2 + 0.6 * make_images(2)) * 255).round() / 255
    adapter = TTC(tau=tau)
    weights = torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = {}
    for path in ("through", "identity"):
        moved = images.clone().requires_grad_()
        logits = adapter.predict(classifier, moved, seed=SEED, path=path).logits
        gradients[path] = torch.autograd.grad((logits * weights).sum(), moved)[0]
    at = adapter.predict(classifier, images, seed=SEED).images.requires_grad_()
    (wanted,) = torch.autograd.grad((classifier(at).logits * weights).sum(), at)
    torch.testing.assert_close(gradients["identity"], wanted, **CLOSE)
    way = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = [adapter.predict(classifier, images + sign * 1e-6 * way, seed=SEED).logits for sign in (1, -1)]
    slope = ((ends[0] - ends[1]) * weights).sum() / 2e-6
    torch.testing.assert_close((gradients["through"] * way).sum(), slope, rtol=1e-5, atol=1e-5)


# ---- the ensemble


@pytest.mark.parametrize("row", ["plain", "VLI"])
def test_the_ensemble_is_the_mean_of_the_views_predictions(row):
    classifier = make_base() if row == "plain" else make_prompted(row).get_base_model()
    images, clip, adapter = make_images(2), NaiveCLIP(classifier), Ensemble(num_views=8)
    prompts = {} if row == "plain" else own_prompts(classifier)
    found = adapter.predict(classifier, images, seed=SEED)
    assert not found.prompts and found.loss is None and not found.fell_back.any()
    for b, views in enumerate(views_of(images, adapter)):
        wanted = ensemble_probabilities(clip, views, prompts)
        torch.testing.assert_close(found.logits[b].softmax(0), wanted, **CLOSE)
    torch.testing.assert_close(found.logits.exp().sum(1), torch.ones(2).double(), **CLOSE)


# ---- what no method may depend on


def rows_of_methods():
    plain = make_base()
    yield "TPT", plain, TPT(num_views=10, selected=0.3, num_steps=2)
    yield "R-TPT", plain, RTPT(num_views=10, selected=0.3, num_steps=2)
    yield "PromptAlign", *prompt_align()
    yield "TTC", plain, TTC()
    yield "Ensemble", plain, Ensemble(num_views=10)


@pytest.mark.parametrize("number", range(5))
def test_neither_batch_nor_order_nor_memory_matter_and_the_seed_does(number):
    _, classifier, adapter = list(rows_of_methods())[number]
    images = make_images(8)
    whole = adapter.predict(classifier, images, seed=SEED)
    order = torch.tensor([6, 2, 0, 7, 5, 1, 4, 3])
    for rows in (slice(0, 1), slice(2, 7), order):
        assert_same(adapter.predict(classifier, images[rows], seed=SEED), whole, rows)
    assert_same(replace(adapter, memory_budget=1e-9).predict(classifier, images, seed=SEED), whole, slice(None))
    if hasattr(adapter, "chunk_size"):
        assert_same(replace(adapter, chunk_size=3).predict(classifier, images, seed=SEED), whole, slice(None))
    other = adapter.predict(classifier, images, seed=SEED + 1).logits
    assert (other - whole.logits).abs().amax(dim=1).min() > 1e-6


@pytest.mark.parametrize("method", ["TPT", "R-TPT", "Ensemble"])
def test_gradients_are_those_of_finite_differences(method):
    """At a step that is smooth: gradients about the size of AdamW's epsilon."""
    adapter = {
        "TPT": TPT(num_views=10, selected=0.3, learning_rate=0.5),
        "R-TPT": RTPT(num_views=10, selected=0.3, learning_rate=0.5),
        "Ensemble": Ensemble(num_views=10),
    }[method]
    classifier, images = make_base(), ((0.2 + 0.6 * make_images(2)) * 255).round() / 255
    with torch.no_grad():
        classifier.logit_scale.fill_(-8.0)
    weights = 1e4 * torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = {}
    for path in ("through", "identity"):
        moved = images.clone().requires_grad_()
        logits = adapter.predict(classifier, moved, seed=SEED, path=path).logits
        gradients[path] = torch.autograd.grad((logits * weights).sum(), moved)[0]
    apart = (gradients["through"] - gradients["identity"]).abs().max() / gradients["identity"].abs().max()
    assert apart < 1e-12 if method == "Ensemble" else apart > 0.05
    way = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = [adapter.predict(classifier, images + sign * 1e-6 * way, seed=SEED).logits for sign in (1, -1)]
    slopes_B = ((ends[0] - ends[1]) * weights).sum(dim=1) / 2e-6
    torch.testing.assert_close((gradients["through"] * way).sum(dim=(1, 2, 3)), slopes_B, rtol=1e-4, atol=1e-4)
