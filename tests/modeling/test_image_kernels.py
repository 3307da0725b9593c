"""Patches as a matrix product and the choice of attention: the same values and gradients, by the faster kernel."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_siglip import tiny_siglip
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_robust_clip.modeling import image_kernels
from hf_robust_clip.modeling.image_kernels import AttentionByProducts, PatchProduct, image_attention

PLACES = [{}, {"padding": 1}, {"dilation": 2}, {"stride": 2}, {"groups": 3}, {"padding": "valid"}, {"bias": True}]


def as_product(convolution: nn.Conv2d) -> PatchProduct:
    product = deepcopy(convolution)
    product.__class__ = PatchProduct
    return product


def value_and_gradients(module: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    pixels = pixels.clone().requires_grad_()
    value = module(pixels)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    first = torch.autograd.grad((weights * value.tanh()).sum(), [pixels, *module.parameters()], create_graph=True)
    (second,) = torch.autograd.grad(sum(g.square().sum() for g in first), pixels)
    return [value, *first, second]


@pytest.mark.parametrize("settings", PLACES)
@pytest.mark.parametrize("side", [(12, 12), (8, 12), (13, 14)])
def test_a_product_is_the_convolution_with_its_gradients_of_both_orders(settings, side):
    torch.manual_seed(0)
    options = {"stride": 4, "bias": False} | settings
    convolution = nn.Conv2d(3, 6, 4, **options).double()
    pixels = torch.rand(2, 3, *side, dtype=torch.float64)
    wanted, given = (value_and_gradients(way, pixels) for way in (convolution, as_product(convolution)))
    for one, other in zip(wanted, given, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)


def test_plain_patches_take_the_product_and_others_the_convolution(monkeypatch):
    seen = []
    linear = image_kernels.F.linear
    monkeypatch.setattr(image_kernels.F, "linear", lambda *given: (seen.append(1), linear(*given))[1])
    as_product(nn.Conv2d(3, 6, 4, 4))(torch.rand(1, 3, 8, 8).to(memory_format=torch.channels_last))
    assert seen
    del seen[:]
    as_product(nn.Conv2d(3, 6, 4, 4, padding=2))(torch.rand(1, 3, 8, 8))
    as_product(nn.Conv2d(3, 6, 4, 4))(torch.rand(1, 3, 9, 8))
    as_product(nn.Conv2d(3, 6, 4, 4))(torch.rand(3, 8, 8))
    assert not seen


def test_a_row_is_what_the_picture_gives_alone():
    product = as_product(nn.Conv2d(3, 64, 8, 8, bias=False))
    pixels = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(product(pixels)[2:3], product(pixels[2:3]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_classifier_cuts_patches_by_the_product_and_keeps_its_keys(family, tiny_clip):
    model = tiny_clip() if family == "clip" else tiny_siglip()
    embedding = model.image_modules[0].embeddings.patch_embedding
    assert type(embedding) is PatchProduct
    keys = [name for name in model.state_dict() if "patch_embedding" in name]
    assert keys[0] == "vision_model.embeddings.patch_embedding.weight"


def test_lora_on_the_patches_is_the_convolution_with_its_update(tiny_clip):
    model = tiny_clip()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["patch_embedding"], init_lora_weights=False))
    layer = next(module for name, module in adapted.named_modules() if name.endswith("patch_embedding"))
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    whole = layer.get_base_layer().weight + layer.get_delta_weight("default")
    wanted = nn.functional.conv2d(pixels, whole, layer.get_base_layer().bias, layer.get_base_layer().stride)
    torch.testing.assert_close(layer(pixels), wanted, rtol=1e-11, atol=1e-12)


@pytest.fixture
def chosen(tiny_clip):
    def find(device: str = "cpu", cast: torch.dtype | None = torch.bfloat16, **changes) -> bool:
        """Whether attention is two products."""
        tower = tiny_clip(dtype=changes.get("weights", torch.float32)).image_modules[0]
        tower.encoder.layers[0].gradient_checkpointing = changes.get("checkpointing", False)
        autocast = nullcontext() if cast is None else torch.autocast("cpu", cast)
        with torch.set_grad_enabled(changes.get("gradient", True)), autocast:
            kernel = image_attention(tower, torch.rand(1, 3, 8, 8, device=device))
        return not isinstance(kernel, nullcontext)

    return find


ATTENTION = nn.functional.scaled_dot_product_attention
ASKED = [
    ({}, True),
    ({"scale": 0.3}, True),
    ({"attn_mask": None, "dropout_p": 0.0, "is_causal": False}, True),  # as transformers calls it
    ({"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}, False),
    ({"is_causal": True}, False),
    ({"dropout_p": 1.0}, False),
]


@pytest.mark.parametrize(("asked", "taken"), ASKED)
def test_attention_by_products_is_attention_with_its_gradients(asked, taken, monkeypatch):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    seen, own = [], image_kernels.attention_by_products
    monkeypatch.setattr(image_kernels, "attention_by_products", lambda *a, **k: (seen.append(1), own(*a, **k))[1])

    def value_and_gradients(by_name: bool) -> list[torch.Tensor]:
        named = dict(zip(("query", "key", "value"), inputs, strict=True))
        value = ATTENTION(**named, **asked) if by_name else ATTENTION(*inputs, **asked)
        return [value, *torch.autograd.grad((value * torch.arange(4.0)).sum(), inputs)]

    wanted = value_and_gradients(False)
    for by_name in (False, True):
        del seen[:]
        with AttentionByProducts():
            given = value_and_gradients(by_name)
        assert bool(seen) == taken
        for one, other in zip(wanted, given, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tokens", "taken"), [(257, True), (577, False)])
def test_attention_by_products_is_for_few_tokens(tokens, taken, monkeypatch):
    own = torch.ones(1, 1, tokens, 2)
    monkeypatch.setattr(image_kernels, "attention_by_products", lambda *given, **named: None)
    with AttentionByProducts():
        assert (ATTENTION(own, own, own) is None) == (ATTENTION(query=own, key=own, value=own) is None) == taken


@pytest.mark.parametrize("mask", [torch.ones(4, 4, dtype=torch.bool).tril(), None])
def test_a_mask_given_by_its_place_is_kept(mask):
    query, key, value = torch.randn(3, 1, 1, 4, 2, dtype=torch.float64)
    with AttentionByProducts():
        given = ATTENTION(query, key, value, mask)
    torch.testing.assert_close(given, ATTENTION(query, key, value, mask))


def test_attention_by_products_is_for_bfloat16_on_a_cpu(chosen):
    assert chosen()
    assert chosen(cast=None, weights=torch.bfloat16)
    assert chosen(gradient=False)
    assert not chosen(cast=None)
    assert not chosen(cast=None, weights=torch.float16)
    assert not chosen(checkpointing=True)
    assert not chosen(device="meta")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert not chosen()


def test_bfloat16_gradients_are_those_of_float32_up_to_rounding(tiny_clip, tiny_batch):
    model = tiny_clip(dtype=torch.float32)
    images, labels = tiny_batch(dtype=torch.float32)

    def gradient(bfloat16: bool) -> torch.Tensor:
        pixels = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(pixel_values=pixels).logits
        return torch.autograd.grad(nn.functional.cross_entropy(logits, labels), pixels)[0]

    whole, half = gradient(False), gradient(True)
    assert 0 < float((half - whole).norm() / whole.norm()) < 0.1


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_each_layer_of_the_image_encoder_takes_its_attention_by_products(family, tiny_clip, monkeypatch):
    model = tiny_clip(dtype=torch.bfloat16) if family == "clip" else tiny_siglip().to(torch.bfloat16)
    side, seen = model.input_size, []
    own = image_kernels.attention_by_products
    monkeypatch.setattr(image_kernels, "attention_by_products", lambda *a, **k: (seen.append(1), own(*a, **k))[1])
    model.encode_images(torch.rand(2, 3, side, side, dtype=torch.bfloat16))
    assert len(seen) == model.config.vision_config.num_hidden_layers


def test_gradients_through_checkpointed_layers_are_there_in_bfloat16(tiny_clip, tiny_batch):
    model = tiny_clip(dtype=torch.float32).train()
    model.gradient_checkpointing_enable()
    images, labels = tiny_batch(dtype=torch.float32)
    pixels = images.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(pixel_values=pixels).logits
    assert torch.autograd.grad(nn.functional.cross_entropy(logits, labels), pixels)[0].abs().sum() > 0
