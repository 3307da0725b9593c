"""Pixel prompts in units of [0, 1], for all classes or for each, bound to their classes."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from prompted_clip import (
    CLASS_WISE,
    NAMES,
    TEMPLATE,
    make_base,
    make_class_wise,
    make_images,
    make_prompted,
    randomise,
)
from tiny import make_processor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from hf_robust_clip import CLIPForZeroShotClassification, ClipPromptConfig
from hf_robust_clip.prompts.access import without_class_prompts

CLIPPED = dict(design="pixel", border_width=2, clipped=True)


def layer_of(classifier):
    return classifier.vision_model.embeddings.patch_embedding


def picture_of(prompt_CN, side=8, edge=2):
    """A prompt at the pixels of its border, row by row, else 0."""
    delta = torch.zeros(3, side, side, dtype=torch.float64)
    places = [(y, x) for y in range(side) for x in range(side) if not (edge <= y < side - edge <= side and
              edge <= x < side - edge)]  # fmt: skip
    for n, (y, x) in enumerate(places):
        delta[:, y, x] = prompt_CN[:, n]
    return delta


def clipped(**changes):
    model = get_peft_model(make_base(), ClipPromptConfig(**{**CLIPPED, **changes}))
    randomise(model, 5)
    return model.eval()


def test_a_universal_prompt_is_added_in_pixels_and_clipped():
    model, images = clipped(), make_images(3)
    core = model.get_base_model()
    delta = picture_of(layer_of(core).clip_prompt_tokens["default"].detach())
    wanted = make_base()((images + delta).clamp(0, 1)).logits
    torch.testing.assert_close(core(images).logits, wanted, rtol=0, atol=1e-9)
    base = make_base()
    unclipped = base.score(base.encode_images(images + delta), base.class_embeds)[0]
    assert (unclipped - wanted).abs().max() > 1e-3
    with pytest.raises(ValueError, match="class_prompts"):
        core(images, class_prompts=torch.zeros(3, dtype=torch.long))
    with model.disable_adapter():
        torch.testing.assert_close(core(images).logits, make_base()(images).logits, rtol=0, atol=1e-9)


def test_each_image_gets_the_prompt_of_the_class_that_is_chosen():
    classifier, images, chosen = make_class_wise(), make_images(4), torch.tensor([3, 0, 3, 5])
    prompts = layer_of(classifier).clip_prompt_tokens["default"].detach()
    assert prompts.shape == (len(NAMES), 3, 48)
    prompted = torch.stack([(x + picture_of(prompts[k])).clamp(0, 1) for x, k in zip(images, chosen, strict=True)])
    wanted = make_base()(prompted)
    found = classifier(images, class_prompts=chosen, output_patches=True)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-9)
    one = classifier(images[:1], class_prompts=chosen[:1]).logits
    torch.testing.assert_close(one, wanted.logits[:1], rtol=0, atol=1e-9)
    with without_class_prompts(classifier):
        torch.testing.assert_close(classifier(images).logits, make_base()(images).logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(classifier(images, class_prompts=chosen).logits, found.logits)


def test_prompts_begin_as_nothing_and_count_as_many_values_as_said():
    model = get_peft_model(make_base(), ClipPromptConfig(**CLASS_WISE))
    images, chosen = make_images(2), torch.tensor([1, 4])
    wanted = make_base()(images).logits
    torch.testing.assert_close(model(images, class_prompts=chosen).logits, wanted, rtol=0, atol=1e-9)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == len(NAMES) * 3 * (64 - 16)
    assert "one for each of 6 classes" in model.active_peft_config.summary()


@pytest.mark.parametrize("per_class", [False, True])
def test_prompts_stand_on_pictures_of_their_size_before_or_after_these_are_enlarged(per_class):
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    choice = {"class_prompts": torch.tensor([1, 2])} if per_class else {}

    def enlarged(pixels):
        return F.interpolate(pixels, size=(8, 8), mode="bicubic", align_corners=False)

    for prompt_size, side in ((6, 6), (None, 8)):
        changes = dict(per_class=per_class, clipped=True, border_width=2, prompt_size=prompt_size)
        model = get_peft_model(make_base(), ClipPromptConfig(design="pixel", **changes))
        randomise(model, 7)
        core = model.eval().get_base_model()
        core.set_input_size(6)
        prompts = layer_of(core).clip_prompt_tokens["default"].detach()
        deltas = torch.stack([picture_of(prompts[k] if per_class else prompts, side) for k in (1, 2)])
        pixels = enlarged((images + deltas).clamp(0, 1)) if side == 6 else (enlarged(images) + deltas).clamp(0, 1)
        base = make_base()
        wanted = base.score(base.encode_images(pixels), base.class_embeds)[0]
        torch.testing.assert_close(core(images, **choice).logits, wanted, rtol=0, atol=1e-9)
        if prompt_size is not None:
            core.set_input_size(None)
            with pytest.raises(ValueError, match="6 px"):
                core(make_images(2), **choice)


def test_a_forward_without_a_choice_and_wrong_choices_are_refused():
    classifier, images = make_class_wise(), make_images(2)
    for call in (classifier, classifier.encode_images, classifier.encode_patches):
        with pytest.raises(ValueError, match="class_prompts"):
            call(images)
    wrong = [torch.tensor([0]), torch.tensor([0, 6]), torch.tensor([-1, 0]), torch.tensor([[0], [1]])]
    for index in wrong:
        with pytest.raises(ValueError, match="class_prompts"):
            classifier(images, class_prompts=index)
    for index in (torch.tensor([0.0, 1.0]), [0, 1]):
        with pytest.raises(TypeError, match="class_prompts"):
            classifier(images, class_prompts=index)
    for other in (make_base(), make_prompted("pixel-full")):
        with pytest.raises(ValueError, match="class_prompts"):
            other(images, class_prompts=torch.tensor([0, 1]))
    large = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="8 px"):
        classifier(large, interpolate_pos_encoding=True, class_prompts=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(design="V", per_class=True), "per_class"),
        (dict(design="VLI", clipped=True), "clipped"),
        (dict(design="pixel", per_class=True, clipped=False), "clipped"),
        (dict(design="pixel", prompt_size=6), "prompt_size"),
        (dict(design="pixel", clipped=True, prompt_size=0), "prompt_size"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        ClipPromptConfig(**settings)


def test_prompts_that_do_not_fit_are_refused_and_the_model_stays():
    plain = make_base(cls=CLIPModel)
    nameless = make_base()
    nameless.class_names = ()
    wrong = [
        (make_base(), dict(CLASS_WISE, border_width=4), "border_width"),
        (make_base(), dict(CLASS_WISE, prompt_size=4), "border_width"),
        (make_base(), dict(CLASS_WISE, prompt_size=9), "prompt_size"),
        (make_base(), dict(CLASS_WISE, class_names=list(NAMES[::-1])), "class_names"),
        (make_base(), dict(CLASS_WISE, class_names=list(NAMES[:2])), "class_names"),
        (nameless, CLASS_WISE, "set_classes"),
        (plain, CLASS_WISE, "per_class"),
        (plain, CLIPPED, "clipped"),
    ]
    for model, settings, named in wrong:
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(ValueError, match=named):
            get_peft_model(model, ClipPromptConfig(**settings))
        assert names == [name for name, _ in model.named_parameters()]


def test_prompts_are_bound_to_their_classes():
    classifier = make_class_wise()
    for others in (NAMES[:3], NAMES[::-1], (*NAMES[:5], "seven")):
        with pytest.raises(ValueError, match="class_names"):
            classifier.set_classes(others, TEMPLATE)
        assert classifier.class_names == NAMES
    classifier.set_classes(NAMES, "an a {}.")
    with classifier.same_classes_after(), pytest.raises(ValueError, match="class_names"):
        classifier.set_classes(["a", "b"], TEMPLATE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = get_peft_model(make_base(), ClipPromptConfig(**CLASS_WISE))
    randomise(model, 3)
    folder = tmp_path_factory.mktemp("class wise")
    model.save_pretrained(folder)
    return model.eval(), folder


def test_saved_prompts_come_back_with_their_classes(saved):
    model, folder = saved
    images, chosen = make_images(3), torch.tensor([5, 0, 1])
    base = make_base()
    base.class_names = ()
    again = PeftModel.from_pretrained(base, folder)
    assert again.active_peft_config.class_names == list(NAMES)
    with pytest.raises(ValueError, match="class_names"):
        again.set_classes(NAMES[::-1], TEMPLATE)
    again.set_classes(NAMES, TEMPLATE)
    wanted = model(images, class_prompts=chosen).logits
    torch.testing.assert_close(again(images, class_prompts=chosen).logits, wanted, rtol=0, atol=1e-12)
    for call in (again.merge_and_unload, again.merge_adapter):
        with pytest.raises(ValueError, match="merge"):
            call()
    torch.testing.assert_close(again.unload()(images).logits, make_base()(images).logits, rtol=0, atol=1e-9)


def test_saved_prompts_are_refused_by_other_models(saved, tmp_path):
    _, folder = saved
    other = make_base()
    other.set_classes(NAMES[::-1], TEMPLATE)
    config = other.config.to_dict()
    config["vision_config"]["image_size"] = 16
    clip = CLIPModel(CLIPConfig.from_dict(config)).double()
    larger = CLIPForZeroShotClassification.from_clip(clip, make_processor(16))
    larger.set_classes(NAMES, TEMPLATE)
    for model, named in ((other, "class_names"), (larger, "image_size"), (make_base(cls=CLIPModel), "per_class")):
        with pytest.raises(ValueError, match=named):
            PeftModel.from_pretrained(model, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    for changed in ({"class_names": None}, {"class_names": NAMES[:3]}, {"per_class": False}, {"border_width": 3}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
        (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
        nameless = make_base()
        nameless.class_names = ()
        with pytest.raises((ValueError, RuntimeError)):
            PeftModel.from_pretrained(nameless, tmp_path)


def test_adapters_of_both_kinds_stand_in_one_model_and_mix_only_with_their_like(saved):
    model = make_prompted("pixel-full")
    images, chosen = make_images(2), torch.tensor([2, 2])
    before = model(images).logits
    for name in ("one", "two"):
        model.add_adapter(name, ClipPromptConfig(**CLASS_WISE))
    layer = layer_of(model.get_base_model())
    for seed, name in enumerate(("one", "two")):
        with torch.no_grad():
            layer.clip_prompt_tokens[name].normal_(generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(model(images).logits, before)
    model.set_adapter("one")
    with pytest.raises(ValueError, match="class_prompts"):
        model(images)
    model.base_model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mixed")
    model.set_adapter("mixed")
    mean = (layer.clip_prompt_tokens["one"] + layer.clip_prompt_tokens["two"]).detach()[2] / 2
    wanted = make_base()((images + picture_of(mean)).clamp(0, 1)).logits
    torch.testing.assert_close(model(images, class_prompts=chosen).logits, wanted, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="differ"):
        model.base_model.add_weighted_adapter(["default", "two"], [0.5, 0.5], "wrong")
