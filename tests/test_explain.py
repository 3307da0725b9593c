"""Where a classifier looks: against loops in float64, and what is left out of it."""

import copy

import pytest
import torch
from prompted_clip import NAMES, ROWS, TOKEN_ROWS, make_base, make_images, make_prompted
from tiny_siglip import make_siglip, make_siglip_processor, tiny_siglip
from torch.nn import functional as F

from hf_robust_clip.defences.defended import DefendedClassifier
from hf_robust_clip.defences.r_tpt import RTPT
from hf_robust_clip.explain import map_share, patch_map, saliency
from hf_robust_clip.modeling import SiglipForZeroShotClassification

CLOSE = dict(rtol=0, atol=1e-9)
EPS = torch.finfo(torch.float64).eps ** (1 / 3)


def norm_of(x: torch.Tensor, module: torch.nn.LayerNorm) -> torch.Tensor:
    mean = x.mean()
    return (x - mean) / ((x - mean) ** 2).mean().add(module.eps).sqrt() * module.weight + module.bias


def clip_patch(model, token: torch.Tensor) -> torch.Tensor:
    return model.visual_projection.weight @ norm_of(token, model.vision_model.post_layernorm)


def siglip_patch(model, token: torch.Tensor) -> torch.Tensor:
    """Attention to one token returns its value."""
    head, width = model.vision_model.head, len(token)
    attention = head.attention
    value = attention.in_proj_weight[2 * width :] @ token + attention.in_proj_bias[2 * width :]
    pooled = attention.out_proj.weight @ value + attention.out_proj.bias
    hidden = head.mlp.fc1.weight @ norm_of(pooled, head.layernorm) + head.mlp.fc1.bias
    return pooled + head.mlp.fc2.weight @ F.gelu(hidden, approximate="tanh") + head.mlp.fc2.bias


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_map_is_the_cosine_of_each_patch_with_each_text(family):
    model, images = (make_base() if family == "clip" else tiny_siglip()), make_images(3)
    project, first = (clip_patch, 1) if family == "clip" else (siglip_patch, 0)
    found = patch_map(model, images)
    classes = len(model.class_names)
    assert found.shape == (3, classes, 2, 2) and not found.requires_grad
    for b in range(3):
        pixels = ((images[b] - model.image_mean) / model.image_std)[None]
        tokens = model.vision_model(pixel_values=pixels).last_hidden_state[0, first:]
        for c in range(classes):
            text = model.class_embeds[c]
            for i in range(2):
                for j in range(2):
                    patch = project(model, tokens[2 * i + j])
                    cosine = float(patch @ text) / float(patch @ patch) ** 0.5 / float(text @ text) ** 0.5
                    assert float(found[b, c, i, j]) == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("score", ["logit", "log_odds"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_saliency_is_the_slope_by_finite_differences(family, score):
    model, images = (make_base() if family == "clip" else tiny_siglip()), 0.1 + 0.8 * make_images(2)
    labels = torch.tensor([2, 0])

    def g(pixels, label):
        logits = model(pixels).logits
        others = [c for c in range(logits.shape[1]) if c != label]
        rest = 0 if score == "logit" else torch.log(sum(torch.exp(logits[:, c]) for c in others))
        return logits[:, label] - rest

    found = saliency(model, images, labels, score=score)
    assert found.shape == (2, 8, 8) and not found.requires_grad
    for b in range(2):
        steps = EPS * torch.eye(3 * 64, dtype=torch.float64).view(-1, 3, 8, 8)
        with torch.no_grad():
            slope = (g(images[b] + steps, int(labels[b])) - g(images[b] - steps, int(labels[b]))) / (2 * EPS)
        torch.testing.assert_close(found[b], slope.view(3, 8, 8).square().sum(dim=0).sqrt(), rtol=1e-6, atol=1e-6)


def test_the_log_odds_leave_out_what_all_classes_share():
    """A pixel that adds to every logit alike."""
    model, images = make_base(), 0.1 + 0.8 * make_images(2)
    score = model.score

    def shifted(embeds, classes):
        logits, cosine, embeds = score(embeds, classes)
        return logits + 1e3 * pixels["x"][:, 0, 0, :1], cosine, embeds

    pixels, forward = {}, model.encode_images
    before = {kind: saliency(model, images, score=kind) for kind in ("logit", "log_odds")}
    model.encode_images = lambda x, *rest: (pixels.update(x=x), forward(x, *rest))[1]
    model.score = shifted
    after = {kind: saliency(model, images, score=kind) for kind in ("logit", "log_odds")}
    torch.testing.assert_close(after["log_odds"], before["log_odds"], rtol=0, atol=1e-6)
    assert (after["logit"] - before["logit"])[:, 0, 0].min() > 500


def test_without_labels_it_is_of_the_predicted_class():
    model, images = make_base(), make_images(4)
    predicted = model(images).logits.argmax(dim=1)
    assert torch.equal(saliency(model, images), saliency(model, images, predicted))
    other = (predicted + 1) % len(NAMES)
    assert not torch.allclose(saliency(model, images), saliency(model, images, other))
    assert torch.equal(saliency(model, images, other), saliency(model, images, other.tolist()))


def test_a_text_that_is_one_patch_lights_up_there():
    model, images = make_base(), make_images(2)
    planted = model.class_embeds.clone()
    planted[3] = F.normalize(model(images, output_patches=True).patch_embeds[1, 2], dim=0)
    model.encode_classes = lambda *_, **__: planted
    model.set_classes(NAMES, "a bc d {}.")
    found = patch_map(model, images)
    assert float(found[1, 3, 1, 0]) == pytest.approx(1, abs=1e-9)
    assert (found > 1 - 1e-6).sum() == 1 and found.abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("row", ["VLI", "V-shallow", "VLJ-vision", "pixel-border"])
def test_prompts_are_no_patches(row):
    """Whatever stands behind the patches in the last layer: only through attention does it change a map."""
    assert row in ROWS
    model, images = make_prompted(row), make_images(2)
    found = patch_map(model, images)
    assert found.shape == (2, len(NAMES), 2, 2)
    core = model.get_base_model()
    assert torch.equal(found, patch_map(core, images))
    if row in TOKEN_ROWS:
        read = []
        handle = core.vision_model.encoder.layers[-1].register_forward_hook(lambda *call: read.append(call[-1]))
        patch_map(model, images)
        handle.remove()
        tokens = read[0][:, 1:5]  # a class token, four patches, prompts
        assert read[0].shape[1] > 5
        wanted = torch.stack([torch.stack([clip_patch(core, token) for token in own]) for own in tokens])
        cosine = F.normalize(wanted, dim=-1) @ core.class_embeds.mT
        torch.testing.assert_close(found, cosine.mT.unflatten(2, (2, 2)), **CLOSE)
    assert saliency(model, images).shape == (2, 8, 8)


@pytest.mark.parametrize("make", [make_base, tiny_siglip, lambda: make_prompted("VLI")])
def test_an_image_does_not_depend_on_its_batch(make):
    model, images = make(), make_images(3)
    for look in (patch_map, saliency):
        together = look(model, images)
        for b in range(3):
            torch.testing.assert_close(look(model, images[b : b + 1])[0], together[b], **CLOSE)


def test_groups_of_images_with_texts_of_their_own():
    """Two images of each of two groups, whose text prompts differ."""
    model, images = make_prompted("T").get_base_model(), make_images(4)
    prompts = [p for name, p in model.named_parameters() if ".clip_prompt_tokens." in name]
    own = [p.data for p in prompts]
    for prompt, values in zip(prompts, own, strict=True):
        prompt.data = torch.stack([values, -values])
    together = patch_map(model, images)
    for sign, rows in ((1, slice(0, 2)), (-1, slice(2, 4))):
        for prompt, values in zip(prompts, own, strict=True):
            prompt.data = sign * values
        torch.testing.assert_close(together[rows], patch_map(model, images[rows]), **CLOSE)
    assert not torch.allclose(together[:2], patch_map(model, images[:2]))


def test_images_that_are_enlarged_inside():
    model, images = make_base(), make_images(2)[..., :6, :6]
    model.set_input_size(6)
    larger = F.interpolate(images, size=(8, 8), mode="bicubic", align_corners=False).clamp(0, 1)
    found = patch_map(model, images)
    assert found.shape == (2, len(NAMES), 2, 2)
    assert saliency(model, images).shape == (2, 6, 6)
    model.set_input_size(None)
    torch.testing.assert_close(found, patch_map(model, larger), rtol=0, atol=0.05)  # bicubic leaves [0, 1]


def test_pixels_beyond_the_last_whole_patch_are_in_no_map():
    processor = make_siglip_processor(image_size=10)
    plain = make_siglip(processor, image_size=10).double()
    model = SiglipForZeroShotClassification.from_siglip(plain, processor).eval()
    model.set_classes(NAMES)
    images = torch.rand(1, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert map_share(model) == 0.8 and map_share(make_base()) == 1
    found, seen = patch_map(model, images), saliency(model, images)
    assert found.shape == (1, len(NAMES), 2, 2)
    assert not seen[:, 8:].any() and not seen[..., 8:].any() and seen[:, :8, :8].all()
    images[:, :, 8:] = 0
    assert torch.equal(patch_map(model, images), found)


def test_the_model_comes_back_as_it_was():
    model, images = make_base().requires_grad_().train(), make_images(2)
    model.vision_model.encoder.layers[0].self_attn.dropout = 0.5
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.inference_mode():
        inside = patch_map(model, images), saliency(model, images)
    with torch.no_grad():
        within = patch_map(model, images.clone().requires_grad_()), saliency(model, images)
    for one, other, look in zip(inside, within, (patch_map, saliency), strict=True):
        assert torch.equal(one, other) and torch.equal(one, look(make_base(), images))
    assert model.training and all(p.requires_grad and bool((p.grad == 1).all()) for p in model.parameters())


def test_nothing_is_computed_in_half_the_precision_that_the_model_has():
    model, images = make_base(dtype=torch.float32), make_images(2, dtype=torch.float32)
    alone = patch_map(model, images), saliency(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(patch_map(model, images), alone[0]) and torch.equal(saliency(model, images), alone[1])


def test_half_precision_gives_float32():
    model, images = copy.deepcopy(make_base()).to(torch.bfloat16), make_images(2)
    model.set_processor(model.processor)
    found = patch_map(model, images.bfloat16())
    assert found.dtype == saliency(model, images.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(found.double(), patch_map(make_base(), images), rtol=0, atol=0.05)


@pytest.mark.parametrize("look", [patch_map, saliency])
def test_wrong_input_is_refused(look):
    model, images = make_base(), make_images(2)
    with pytest.raises(TypeError, match="classifier"):
        look(DefendedClassifier(model, RTPT()), images)
    with pytest.raises(TypeError, match="images_BCHW"):
        look(model, images.tolist())
    for wrong in (images[..., :6], images[0], images[:, :1], 255 * images, images - 1):
        with pytest.raises(ValueError, match=r"images_BCHW|pixel_values"):
            look(model, wrong)
    without = make_base()
    without.class_names = ()
    with pytest.raises(ValueError, match="set_classes"):
        look(without, images)


def test_labels_and_scores_that_do_not_fit_are_refused():
    model, images = make_base(), make_images(2)
    for labels in ([0], [0, len(NAMES)], [0.5, 1]):
        with pytest.raises(ValueError, match="labels"):
            saliency(model, images, labels)
    with pytest.raises(ValueError, match="score"):
        saliency(model, images, score="probability")
    model.set_classes(NAMES[:1], "a {}")
    with pytest.raises(ValueError, match="score"):
        saliency(model, images, score="log_odds")
    model.visual_projection.weight.data[0] = torch.nan
    for look in (patch_map, saliency):
        with pytest.raises(FloatingPointError):
            look(model, images)
