import copy
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from transformers import AutoModel, CLIPModel, CLIPProcessor

from hf_robust_clip.modeling import PAPER_TEMPLATE, CLIPForZeroShotClassification, tokenize_prompts
from hf_robust_clip.runs.shared import load_model

NAMES = ("zero", "one", "two", "three", "four", "five", "six")


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))


@pytest.fixture
def saved(tiny_clip, tmp_path):
    """A folder with a checkpoint in float32, normalised in a way of its own, and the model it was made from."""
    model = tiny_clip(dtype=torch.float32)
    model.set_normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


# ---- what is written and read


def test_checkpoint_is_a_plain_clip_with_the_same_logits(saved, picture):
    """Pixels in [0, 1] here; the picture through the saved processor and plain CLIPModel there."""
    folder, model = saved
    clip, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    prompts = [PAPER_TEMPLATE.format(name) for name in NAMES]
    inputs = processor(text=prompts, images=picture, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image
        logits = model(pixels).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1


def test_files_name_nothing_but_clip(saved):
    folder, model = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"]
    assert "CLIPForZeroShotClassification" not in "".join(path.read_text() for path in folder.glob("*.json"))
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == set(CLIPModel(model.config).state_dict())
    assert type(AutoModel.from_pretrained(folder)) is CLIPModel


def test_loaded_model_equals_the_saved_one(saved, tiny_batch):
    """Buffers that no file holds are set after loading, not left as raw memory."""
    folder, model = saved
    loaded = CLIPForZeroShotClassification.from_pretrained(folder)
    assert loaded.image_mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert loaded.image_std.flatten().tolist() == pytest.approx([0.2, 0.25, 0.3])
    loaded.set_classes(NAMES)
    images, _ = tiny_batch(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)


def test_loading_in_another_precision_and_with_report(saved, tiny_batch):
    folder, model = saved
    loaded, report = CLIPForZeroShotClassification.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    loaded.set_classes(NAMES)
    images, _ = tiny_batch()
    with torch.no_grad():
        logits = loaded(images).logits
        torch.testing.assert_close(logits, model(images.float()).logits.double(), rtol=0, atol=1e-4)
    assert logits.dtype == torch.float64


def test_normalisation_reaches_the_saved_processor(saved):
    folder, _ = saved
    image_processor = CLIPProcessor.from_pretrained(folder).image_processor
    assert list(image_processor.image_mean) == [0.4, 0.5, 0.6]
    assert list(image_processor.image_std) == [0.2, 0.25, 0.3]


def test_saving_again_gives_the_same_weights_and_processor(saved, tmp_path):
    folder, _ = saved
    CLIPForZeroShotClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_saving_without_a_processor_is_refused(saved, tmp_path):
    _, model = saved
    model.processor = None
    with pytest.raises(ValueError, match="no processor"):
        model.save_pretrained(tmp_path / "other")


# ---- the forward


def test_logits_are_scaled_cosines_of_normalised_pixels(tiny_clip, tiny_batch):
    model = tiny_clip()
    images, labels = tiny_batch()
    output = model(images, labels)
    mean = torch.tensor(model.processor.image_processor.image_mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(model.processor.image_processor.image_std, dtype=torch.float64).view(3, 1, 1)
    features = model.get_image_features(pixel_values=(images - mean) / std).pooler_output
    tokens = model.processor.tokenizer([PAPER_TEMPLATE.format(n) for n in NAMES], padding=True, return_tensors="pt")
    texts = model.get_text_features(**tokens).pooler_output
    cosine = torch.cosine_similarity(features[:, None], texts[None], dim=-1)
    logits = math.exp(model.logit_scale.item()) * cosine
    loss = -sum(logits.log_softmax(1)[i, label] for i, label in enumerate(labels)) / len(labels)
    expected = (loss, logits, cosine, features)
    given = (output.loss, output.logits, output.cosine, output.image_embeds)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)


def test_several_templates_average_unit_embeddings(tiny_clip):
    """The normalised mean of normalised text features, as CLIP's own ensembles."""
    model = tiny_clip()
    templates = ("a {}.", "the long word {} here")
    model.set_classes(NAMES, templates)
    ensemble = model.class_embeds
    parts = []
    for template in templates:
        model.set_classes(NAMES, template)
        parts.append(model.class_embeds)
    mean = (parts[0] + parts[1]) / 2
    torch.testing.assert_close(ensemble, mean / mean.square().sum(1, keepdim=True).sqrt(), rtol=0, atol=1e-12)
    assert (parts[0] - parts[1]).abs().max() > 1e-3


def test_short_padding_equals_the_whole_context(tiny_clip):
    """Prompts are cut behind the longest one; rows of different lengths still get their own embedding."""
    model = tiny_clip(class_names=("a", "longer one"))
    prompts = [PAPER_TEMPLATE.format(name) for name in model.class_names]
    tokens = model.processor.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    assert model.class_token_ids.shape[-1] < tokens.shape[-1]
    texts = model.get_text_features(input_ids=tokens).pooler_output
    torch.testing.assert_close(model.class_embeds, texts / texts.norm(dim=1, keepdim=True), rtol=0, atol=1e-12)


def test_trainable_text_is_encoded_anew_with_a_gradient(tiny_clip, tiny_batch):
    model = tiny_clip()
    images, labels = tiny_batch()
    cached = model(images, labels)
    assert not model.text_is_trainable()
    for parameter in model.text_parameters():
        parameter.requires_grad_(True)
    fresh = model(images, labels)
    torch.testing.assert_close(fresh.logits, cached.logits, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(fresh.loss, model.text_parameters())
    assert sum(grad.abs().sum() for grad in grads) > 0
    with torch.no_grad():
        model.text_projection.weight.mul_(torch.linspace(0.5, 2, 12, dtype=torch.float64)[:, None])
    assert (model(images).logits - cached.logits).abs().max() > 1e-3


def test_text_frozen_after_training_is_not_read_from_the_old_cache(tiny_clip, tiny_batch):
    """Class embeddings follow the text tower also when it changes first and is frozen afterwards."""
    model = tiny_clip()
    images, _ = tiny_batch()
    model.text_projection.weight.requires_grad_(True)
    with torch.no_grad():
        model.text_projection.weight.mul_(torch.linspace(0.5, 2, 12, dtype=torch.float64)[:, None])
    trained = model(images).logits.detach()
    model.text_projection.weight.requires_grad_(False)
    torch.testing.assert_close(model(images).logits, trained, rtol=0, atol=1e-12)


def test_another_size_is_taken_on_request(tiny_clip):
    model = tiny_clip()
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    assert model(images, interpolate_pos_encoding=True).logits.shape == (2, 7)


# ---- sharing and copies


def test_smaller_images_are_enlarged_inside_on_request(tiny_clip):
    """Bicubic, before the normalisation; None brings the encoder's own size back."""
    model = tiny_clip()
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    large = torch.nn.functional.interpolate(small, size=(8, 8), mode="bicubic", align_corners=False)
    expected = model.train()(large).logits  # bicubic leaves [0, 1] a little, which eval mode refuses
    model.eval().set_input_size(4)
    torch.testing.assert_close(model(small).logits, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"this model takes \(batch, 3, 4, 4\)"):
        model(large.clamp(0, 1))
    model.set_input_size(None)
    assert model(large.clamp(0, 1)).logits.shape == (2, 7)
    with pytest.raises(ValueError, match=r"this model takes \(batch, 3, 8, 8\)"):
        model(small)


@pytest.mark.parametrize("side", [0, -1, 9])
def test_input_sizes_beyond_the_encoder_are_refused(tiny_clip, side):
    model = tiny_clip()
    with pytest.raises(ValueError, match=rf"side={side} must be in 1 \.\. 8"):
        model.set_input_size(side)
    assert model.input_size == 8


def test_from_clip_shares_weights_and_mode(saved, tiny_batch):
    folder, model = saved
    clip = CLIPModel.from_pretrained(folder).train()
    wrapped = CLIPForZeroShotClassification.from_clip(clip, CLIPProcessor.from_pretrained(folder))
    assert wrapped.training
    assert all(a is b for a, b in zip(wrapped.parameters(), clip.parameters(), strict=True))
    assert set(wrapped.state_dict()) == set(clip.state_dict())
    wrapped.set_classes(NAMES)
    images, _ = tiny_batch(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(wrapped(images).logits, model(images).logits)
        clip.visual_projection.weight.mul_(torch.linspace(0.5, 2, 12)[:, None])
        assert not torch.equal(wrapped(images).logits, model(images).logits)


def test_copies_are_independent(tiny_clip, tiny_batch):
    model = tiny_clip()
    images, _ = tiny_batch()
    expected = model(images).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images).logits, expected)
    twin.set_normalisation((0.1, 0.1, 0.1), (0.5, 0.5, 0.5))
    twin.set_classes(("another", "pair"))
    with torch.no_grad():
        twin.visual_projection.weight.zero_()
    assert torch.equal(model(images).logits, expected)
    assert model.processor.image_processor.image_mean[0] != 0.1


# ---- refusals


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 1, 8, 8), r"\(2, 1, 8, 8\); this model takes \(batch, 3, 8, 8\): convert the images to RGB"),
        ((2, 3, 9, 9), r"\(2, 3, 9, 9\).*resize them"),
        ((2, 3, 8, 12), r"\(2, 3, 8, 12\).*resize them"),
        ((3, 8, 8), r"\(3, 8, 8\); this model takes \(batch, 3, 8, 8\)"),
    ],
)
def test_images_of_another_shape_are_refused(tiny_clip, shape, text):
    with pytest.raises(ValueError, match=text):
        tiny_clip()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("images", "text"), [(-0.5, "Did you normalise"), (2.0, "Did you normalise"), (math.nan, "NaN")]
)
def test_values_outside_the_range_are_refused_in_eval_mode(tiny_clip, images, text):
    with pytest.raises(ValueError, match=text):
        tiny_clip()(torch.full((1, 3, 8, 8), images, dtype=torch.float64))


def test_integer_images_are_refused(tiny_clip):
    with pytest.raises(TypeError, match=r"torch.uint8"):
        tiny_clip()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(("label", "text"), [(7, r"0 \.\. 7, but there are 7 classes \(0 \.\. 6\)"), (-100, "-100")])
def test_labels_without_a_class_are_refused(tiny_clip, tiny_batch, label, text):
    images, labels = tiny_batch()
    labels[0], labels[1] = 0, label
    with pytest.raises(ValueError, match=text):
        tiny_clip()(images, labels)


def test_a_model_without_classes_says_what_to_call(tiny_clip, tiny_batch):
    images, _ = tiny_batch()
    with pytest.raises(ValueError, match=r"no classes; call set_classes"):
        tiny_clip(class_names=None)(images)


@pytest.mark.parametrize(
    ("names", "template", "text"),
    [
        ([], PAPER_TEMPLATE, "class_names is empty"),
        ("cat", PAPER_TEMPLATE, "class_names='cat' is one text; give a list"),
        ({0: "cat"}, PAPER_TEMPLATE, "class_names is a dict"),
        ({"cat"}, PAPER_TEMPLATE, "class_names is a set"),
        (["cat", "dog", "cat"], PAPER_TEMPLATE, r"class_names\[2\]='cat' repeats class_names\[0\]"),
        (["cat", ""], PAPER_TEMPLATE, r"class_names\[1\]='' is not a name"),
        (["  ", "cat"], PAPER_TEMPLATE, r"class_names\[0\]='  ' is not a name"),
        (["cat", 3], PAPER_TEMPLATE, r"class_names\[1\]=3 is not a name"),
        (["cat"], "a photo", "template='a photo' has no '{}'"),
        (["cat"], ("a {}", "a photo"), "template='a photo' has no '{}'"),
        (["cat"], (), r"template=\(\) has no '{}'"),
        (["cat", "x" * 40], "{}", "x+. has 42 tokens.* 32"),
    ],
)
def test_unusable_classes_are_refused_and_change_nothing(tiny_clip, tiny_batch, names, template, text):
    model = tiny_clip()
    images, _ = tiny_batch()
    expected = model(images).logits
    with pytest.raises(ValueError, match=text):
        model.set_classes(names, template)
    assert model.class_names == NAMES
    assert torch.equal(model(images).logits, expected)


def test_a_tokenizer_without_the_towers_end_is_refused(tiny_clip):
    """Such prompts would all be pooled at their first token and look alike."""
    model = tiny_clip()
    with pytest.raises(ValueError, match="EOS id 5"):
        tokenize_prompts(model.processor.tokenizer, ["q"], 32, 5)
    model.text_model.eos_token_id = 5
    with pytest.raises(ValueError, match="EOS id 5"):
        model.set_classes(("q", "r"))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5,), (0.5, 0.5, 0.5)),
        ((0.5, 0.5, 0.5), (0.5,)),
        ((0.5, 0.5, 0.5), (0.5, 0.0, 0.5)),
        ((0.5, math.nan, 0.5), (0.5, 0.5, 0.5)),
        ((0.5, 0.5, 0.5), (0.5, math.inf, 0.5)),
    ],
)
def test_unusable_normalisation_is_refused(tiny_clip, mean, std):
    model = tiny_clip()
    before = model.image_mean.clone()
    with pytest.raises(ValueError, match="mean"):
        model.set_normalisation(mean, std)
    assert torch.equal(model.image_mean, before)


# ---- checkpoints that can't be read


@pytest.mark.parametrize("kept", [0.5, 0.001])
def test_weights_cut_short_are_named(saved, kept):
    folder, _ = saved
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(OSError, match="cut short or damaged") as caught:
        CLIPForZeroShotClassification.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_folder_that_lacks_a_file_is_named(saved, missing):
    folder, _ = saved
    (folder / missing).unlink()
    with pytest.raises(OSError, match=missing) as caught:
        CLIPForZeroShotClassification.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("eos_token_id", ["own", "legacy"])
def test_a_lost_vocabulary_does_not_go_unnoticed(saved, eos_token_id):
    """Without its vocabulary file a tokenizer still loads, and would turn all class names into the same tokens."""
    folder, _ = saved
    (folder / "tokenizer.json").unlink()
    model = CLIPForZeroShotClassification.from_pretrained(folder)
    if eos_token_id == "legacy":
        model.text_model.eos_token_id = 2  # as in the first published checkpoints: pool at the highest id
    with pytest.raises(ValueError, match="tokenizer"):
        model.set_classes(("one", "six"))


def test_legacy_end_id_gives_the_same_classes(tiny_clip):
    """The first published checkpoints carry eos_token_id 2, and their towers pool at the highest id instead."""
    model = tiny_clip()
    expected = model.class_embeds
    model.text_model.eos_token_id = 2
    model.set_classes(NAMES)
    torch.testing.assert_close(model.class_embeds, expected, rtol=0, atol=1e-12)


def test_a_folder_without_an_image_processor_is_named(saved):
    folder, _ = saved
    for file in folder.glob("*processor*.json"):
        file.unlink()
    with pytest.raises(OSError, match=r"lacks .*processor"):
        CLIPForZeroShotClassification.from_pretrained(folder)


def test_a_missing_folder_offline_points_to_the_switch(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"no such folder, and the Hub is switched off.*HF_HUB_OFFLINE=1"):
        CLIPForZeroShotClassification.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("message", ["404 for that name\nand a second line", ""])
def test_a_missing_folder_online_points_to_name_and_connection(monkeypatch, tmp_path, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries to reach the Hub

    def fail(*args, **kwargs):
        raise OSError(message)

    monkeypatch.setattr(CLIPModel, "from_pretrained", fail)
    with pytest.raises(OSError, match="check the name, the connection and your token") as caught:
        CLIPForZeroShotClassification.from_pretrained("someone/something")
    assert "'someone/something'" in str(caught.value)
    assert "second line" not in str(caught.value)


def test_class_embeddings_follow_a_frozen_adapter_on_the_projection_too(tiny_clip, tiny_batch):
    model, (images, _) = tiny_clip(), tiny_batch()
    base = model(images).logits
    config = LoraConfig(r=2, target_modules=["text_projection"], init_lora_weights=False)
    adapted = get_peft_model(model, config).requires_grad_(False)
    changed = adapted(pixel_values=images).logits
    assert (changed - base).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(pixel_values=images).logits, base, rtol=0, atol=1e-12)
    torch.testing.assert_close(adapted(pixel_values=images).logits, changed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("switch", ["do_normalize", "do_rescale", "rescale_factor", "do_pad"])
def test_switches_of_the_processor_are_followed_or_refused(switch, saved, picture):
    """Without its normalisation plain CLIPModel and this one agree; what can't be followed is refused."""
    folder, _ = saved
    file = folder / "processor_config.json"
    values = {"do_normalize": False, "do_rescale": False, "rescale_factor": 1 / 127.5, "do_pad": True}
    config = json.loads(file.read_text())
    config["image_processor"][switch] = values[switch]
    file.write_text(json.dumps(config))
    if switch != "do_normalize":
        with pytest.raises(ValueError, match=switch):
            CLIPForZeroShotClassification.from_pretrained(folder)
        return
    clip, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    prompts = [PAPER_TEMPLATE.format(name) for name in NAMES]
    inputs = processor(text=prompts, images=picture, padding=True, return_tensors="pt")
    model = CLIPForZeroShotClassification.from_pretrained(folder).eval()
    model.set_classes(NAMES)
    pixels = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255).permute(2, 0, 1)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, clip(**inputs).logits_per_image, rtol=1e-5, atol=1e-5)
    model.save_pretrained(folder.parent / "again")
    assert json.loads((folder.parent / "again" / file.name).read_text())["image_processor"]["do_normalize"] is False
    model.set_normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    model.save_pretrained(folder.parent / "again")
    again = CLIPProcessor.from_pretrained(folder.parent / "again").image_processor
    assert again.do_normalize and list(again.image_mean) == [0.4, 0.5, 0.6]


def test_the_model_inside_the_package_is_loaded_without_asking_anybody(monkeypatch):
    """A repository of its name could hold an adapter, and without a network the question takes half a minute."""
    monkeypatch.setattr("hf_robust_clip.runs.shared.adapter_config", lambda *_: pytest.fail("asked for an adapter"))
    assert load_model("digits-clip").config.projection_dim
