"""Class embeddings are those of the text side as it is, whatever way it was changed; the same in parts as whole."""

import copy
import itertools

import pytest
import torch
from counting import Operations
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import CLASS_NAMES
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from hf_robust_clip.modeling import CLIPForZeroShotClassification, class_texts, freshness
from hf_robust_clip.modeling.freshness import content_key, device_keys, module_key, weights_digest

NEAR = dict(rtol=0, atol=1e-12)
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=r".*text_model.*q_proj", init_lora_weights=False)


@pytest.fixture
def images():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def frozen(tiny_clip, lora=False):
    model = tiny_clip()
    if lora:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            get_peft_model(model, LORA)
    return model.requires_grad_(False)


def assert_fresh(model, images, before=None):
    """The logits are those of embeddings computed now, and others than before."""
    found = model(images).logits
    cosine = model.score(model.encode_images(images), model.encode_classes(shared_prefix=False))[0]
    torch.testing.assert_close(found, cosine, rtol=0, atol=1e-10)
    if before is not None:
        assert (found - before).abs().max() > 1e-3


def lora_layer(model):
    return model.text_model.encoder.layers[0].self_attn.q_proj


def edit_data(model):
    model.text_projection.weight.data[0, 0] += 1.0


def average(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.text_projection.weight[:6].mul_(5)
    for own, add in zip(model.parameters(), other.parameters(), strict=True):
        own.data = 0.5 * own.data + 0.5 * add.data


def half_of_a_tensor(model):
    """The same sum and length, in another order."""
    weight = model.text_projection.weight.data
    weight[:6], weight[6:] = weight[6:].clone(), weight[:6].clone()


def swap(model):
    """Two layers of one shape change places: the set of all values stays."""
    a, b = (layer.mlp.fc1.weight for layer in model.text_model.encoder.layers)
    a.data, b.data = b.data, a.data


def rescale(model):
    lora_layer(model).scaling["default"] *= 3


def set_scale(model):
    lora_layer(model).set_scale("default", 5.0)


def hotswap(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.ones_like(parameter))


def disable(model):
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def merge(model):
    lora_layer(model).merge()
    lora_layer(model).scaling["default"] = 0.0  # merged: the scale acts no longer, the weight did change
    lora_layer(model).base_layer.weight.data *= 1.5


def activation(model):
    for layer in model.text_model.encoder.layers:
        layer.mlp.activation_fn = torch.nn.ReLU()


def attention_scale(model):
    model.text_model.encoder.layers[1].self_attn.scale *= 3


def load(model):
    model.load_state_dict({"text_projection.weight": model.text_projection.weight.flip(0)}, strict=False)


CHANGES = {
    "data": (edit_data, False),
    "averaged weights": (average, False),
    "halves exchanged": (half_of_a_tensor, False),
    "layers exchanged": (swap, False),
    "load_state_dict": (load, False),
    "another activation": (activation, False),
    "a number of a module": (attention_scale, False),
    "LoRA's scale": (rescale, True),
    "set_scale": (set_scale, True),
    "hot-swapped LoRA": (hotswap, True),
    "LoRA switched off": (disable, True),
    "merged LoRA": (merge, True),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_every_change_of_a_frozen_text_side_is_seen(name, tiny_clip, images):
    change, lora = CHANGES[name]
    model = frozen(tiny_clip, lora)
    with torch.no_grad():
        before = model(images).logits
        change(model)
        after = model(images).logits
    assert_fresh(model, images, before)
    torch.testing.assert_close(model(images).logits, after, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lora", [False, True])
def test_compiled_code_sees_every_change_of_a_frozen_text_side(lora, tiny_clip, images):
    """One after another in one compiled model, which is never given up for uncompiled code."""
    model = frozen(tiny_clip, lora)
    compiled = torch.compile(model, backend="eager")
    changes = {name: change for name, (change, of_lora) in CHANGES.items() if of_lora == lora}
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        before = compiled(images).logits
        for name, change in changes.items():
            change(model)
            after = compiled(images).logits
            assert (after - before).abs().max() > 1e-3, name
            torch.testing.assert_close(after, model(images).logits, rtol=0, atol=1e-10, msg=name)
            before = after
    torch.compiler.reset()
    assert_fresh(model, images)


def test_nothing_is_computed_twice_while_nothing_changes(tiny_clip, images, monkeypatch):
    calls = []
    own = CLIPForZeroShotClassification.encode_classes
    monkeypatch.setattr(
        CLIPForZeroShotClassification, "encode_classes", lambda self, *a: calls.append(1) or own(self, *a)
    )
    model = frozen(tiny_clip)
    calls.clear()
    for _ in range(3):
        model.train()(images)
        model.eval()(images)
    assert calls == []
    edit_data(model)
    model(images), model(images)
    assert calls == [1]
    with model.fixed_class_embeds():
        model(images), model(images)
    assert calls == [1]


def test_what_cannot_be_told_is_computed_every_time(tiny_clip, images):
    """Hooks, dropout in training, a replaced forward, and modules of kinds that nobody here knows."""
    model = frozen(tiny_clip)
    modules = list(model.text_model.modules())
    assert module_key(modules, []) is not None
    handle = model.text_model.final_layer_norm.register_forward_hook(lambda module, args, output: 2 * output)
    assert module_key(modules, []) is None
    assert_fresh(model, images)
    handle.remove()
    model.text_model.encoder.layers[0].self_attn.dropout = 0.5
    assert module_key(modules, []) is not None
    model.train()
    assert module_key(modules, []) is None
    model.eval()
    model.text_projection.forward = lambda x: x[..., :12]
    assert module_key([model.text_projection], []) is None

    class Stranger(torch.nn.Linear):
        pass

    assert module_key([Stranger(2, 2)], []) is None


def test_a_look_in_inference_mode_leaves_nothing_behind(tiny_clip, images):
    model = frozen(tiny_clip)
    edit_data(model)
    with torch.inference_mode():
        looked = model(images).logits
    pixels = images.clone().requires_grad_()
    logits = model(pixels).logits
    torch.autograd.grad(logits.sum(), pixels)
    torch.testing.assert_close(logits.detach(), looked.clone(), **NEAR)
    model.vision_model.post_layernorm.weight.requires_grad_(True)
    model(images, torch.zeros(2, dtype=torch.long)).loss.backward()
    model.requires_grad_(True)
    with torch.inference_mode():
        model.set_classes(CLASS_NAMES, "a {}")
        model.set_normalisation([0.5] * 3, [0.2] * 3)
        model(images)
    model(images, torch.zeros(2, dtype=torch.long)).loss.backward()


def test_averaged_models_work_before_and_after_the_classes_are_chosen(tiny_clip, images):
    model = tiny_clip(class_names=None)
    averaged = AveragedModel(model, use_buffers=True)
    model.set_classes(CLASS_NAMES)
    with torch.no_grad():
        model.visual_projection.weight.mul_(2)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    averaged.module.set_classes(CLASS_NAMES)
    assert averaged(images).logits.shape == (2, 7)
    assert_fresh(averaged.module, images)


def test_fixed_embeddings_see_tensors_put_in_the_place_of_parameters(tiny_clip, images):
    model = frozen(tiny_clip)
    other = {"text_projection.weight": model.text_projection.weight.flip(0)}
    wanted = functional_call(model, other, (images,)).logits
    plain = model(images).logits
    with model.fixed_class_embeds():
        assert torch.equal(functional_call(model, other, (images,)).logits, wanted)
        assert torch.equal(model(images).logits, plain)
    assert (wanted - plain).abs().max() > 1e-3


def test_a_copy_made_inside_is_not_fixed(tiny_clip, images):
    model = frozen(tiny_clip)
    with model.fixed_class_embeds():
        twin = copy.deepcopy(model)
    before = twin(images).logits
    edit_data(twin)
    assert_fresh(twin, images, before)


def test_quantised_models_predict_and_say_that_they_cannot_be_attacked(tiny_clip, images):
    from hf_robust_clip import ThreatModel, pgd
    from hf_robust_clip.attacks.auto_attack import AutoAttack, auto_attack

    model = frozen(tiny_clip).float()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    pixels = images.float()
    with torch.no_grad():
        assert (quantised(pixels).logits - model(pixels).logits).abs().max() < 5
    with pytest.raises(ValueError, match="gradient"):
        pgd(lambda x: quantised(x).logits.sum(1), pixels, ThreatModel("8/255"), num_steps=1, step_size="8/255")
    last = model.vision_model.encoder.layers[-1]  # beside which the residual still carries a gradient
    torch.ao.quantization.quantize_dynamic(last, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    model.requires_grad_(False)
    labels, threat = model(pixels).logits.argmax(1), ThreatModel("8/255")
    for member in ("apgd-ce", "fab-t"):
        with pytest.raises(ValueError, match="gradient"):
            auto_attack(lambda x: model(x).logits, pixels, labels, threat, version=AutoAttack((member,), num_steps=1))


# ---- in parts


def test_many_prompts_are_encoded_in_parts_with_the_same_values(tiny_clip, monkeypatch):
    model = frozen(tiny_clip)
    templates = [f"{word} {{}}." for word in ("a", "the", "one more", "yet another")]
    model.set_classes(CLASS_NAMES, templates)
    whole = model.encode_classes()
    sizes = []
    own = model._encode
    monkeypatch.setattr(model, "_encode", lambda classes, *rest: sizes.append(classes) or own(classes, *rest))
    monkeypatch.setattr(class_texts, "TEXT_MEMORY", 2 * 4 * model.class_token_ids.shape[2] * 500 * 8)
    for shared in (True, False):
        sizes.clear()
        torch.testing.assert_close(model.encode_classes(shared), whole, **NEAR)
        assert len(sizes) == 4 and sizes[0] == slice(0, 2) and sizes[-1].stop == 7
    monkeypatch.setattr(class_texts, "TEXT_MEMORY", 1)
    torch.testing.assert_close(model.encode_classes(), whole, **NEAR)
    model.text_projection.weight.requires_grad_(True)
    sizes.clear()
    assert model.encode_classes().requires_grad and len(sizes) == 1, "a graph holds everything in any case"


def test_the_memory_of_an_ensemble_of_imagenet_size_stays_small(tiny_clip):
    """80 templates for 1000 classes at ViT-B/16's text size would take tens of GiB at once."""
    model = frozen(tiny_clip)
    model.config.text_config.hidden_size, model.config.text_config.intermediate_size = 512, 2048
    model.config.text_config.num_attention_heads = 8
    model.class_token_ids = torch.zeros(1000, 80, 16, dtype=torch.long)
    parts = model.float()._class_slices(slice(None), 0)
    assert len(parts) > 20 and parts[-1].stop == 1000
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]


# ---- keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_key_changes_with_every_value_and_its_place(dtype):
    values = torch.rand(5, 1001, generator=torch.Generator().manual_seed(0)) * 200
    values = values > 100 if dtype is torch.bool else values.to(dtype)
    for key in (lambda t: content_key([t]), lambda t: device_keys([t]).tolist()):
        known = key(values)
        assert key(values.clone()) == known
        for place in (0, 2500, 5004):
            other = values.clone().flatten()
            other[place] = other[place] + 1 if dtype is not torch.bool else ~other[place]
            assert key(other.view_as(values)) != known
        assert key(values.flip(0)) != known and key(values.roll(2048)) != known
    assert content_key([values]) != content_key([values.flatten()])


def made_of_all_kinds():
    """Tensors with more and fewer bytes than a word, one that isn't contiguous and one that shares a storage's end."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 9, generator=generator)
    return [values.T[1:4], values[:, 0].bfloat16(), torch.tensor([True, False, True]), torch.zeros(0, 3),
            torch.tensor(2.5), torch.arange(250, 255).to(torch.uint8)[1:], torch.tensor([2**40, -1])]  # fmt: skip


def away(tensors):
    return device_keys(tensors).tolist()


@pytest.mark.parametrize("piece", [8192, freshness.PIECE])
def test_a_key_away_from_the_cpu_changes_with_every_bit(piece, monkeypatch):
    monkeypatch.setattr(freshness, "PIECE", piece)
    tensors = made_of_all_kinds()
    tensors.insert(0, torch.zeros(8192 - 50, dtype=torch.uint8))  # with the small pieces the third one is divided
    known, flipped = away(tensors), 0
    assert away([tensor.clone() for tensor in tensors]) == known and len(known) == (2 if piece == 8192 else 1)
    for place in range(1, len(tensors)):
        whole = tensors[place].contiguous().flatten().view(torch.uint8)
        for byte in range(len(whole)):
            for bit in range(8):
                changed = whole.clone()
                changed[byte] ^= 1 << bit
                other = changed.view(tensors[place].dtype).view(tensors[place].shape)
                assert away([*tensors[:place], other, *tensors[place + 1 :]]) != known
                flipped += 1
    assert flipped == 8 * (48 + 8 + 3 + 4 + 4 + 16)


def test_a_key_away_from_the_cpu_sees_changes_that_could_cancel_out(monkeypatch):
    """Signs, which are the highest bits, and values that change places within a piece and between pieces."""
    first, second = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    known = away([first, second])
    for one, other in itertools.combinations(range(12), 2):
        signs = torch.ones(12).index_fill(0, torch.tensor([one, other]), -1).view(2, 6)
        assert away([first * signs[0], second * signs[1]]) != known
    assert away([second, first]) != known
    places = torch.cat([first, second]).index_select(0, torch.tensor([0, 1, 9, 3, 4, 5, 6, 7, 8, 2, 10, 11]))
    assert away([*places.split(6)]) != known
    rows = torch.randn(3, 2048, generator=torch.Generator().manual_seed(1))
    assert away([rows.flip(0)]) != away([rows])
    monkeypatch.setattr(freshness, "PIECE", 8192)
    keys = away([rows])
    assert len(keys) == 3 and away([rows.flip(0)]) == keys[::-1] != keys


def test_few_operations_make_the_key_of_many_tensors(monkeypatch):
    """As on another device; on a card each of them is a kernel, save for views."""
    tensors = [torch.randn(16, 16) for _ in range(100)]
    monkeypatch.setattr(freshness, "PIECE", 8192 * 5)
    with Operations() as seen:
        keys = device_keys(tensors)
    assert len(keys) == 3 and seen.count < 40


def test_the_digest_of_weights_outlives_casts_and_adapters_and_sees_training(tiny_clip):
    model = frozen(tiny_clip)
    known = weights_digest(model)
    assert known == weights_digest(frozen(tiny_clip).float()) == weights_digest(frozen(tiny_clip, lora=True))
    for name, parameter in model.named_parameters():
        before = parameter.data.clone()
        parameter.data.flatten()[-1].mul_(1.1).add_(0.1)
        assert weights_digest(model) != known, name
        parameter.data = before
    assert weights_digest(model) == known
