"""Every design against a forward written anew in plain tensor operations, and every fast way against the plain one."""

import pytest
import torch
from peft import PeftModel
from plain_forward import image_feature, text_feature
from prompted_clip import (
    NAMES,
    ROWS,
    TEMPLATE,
    TEXT_ROWS,
    TOKEN_ROWS,
    make_base,
    make_images,
    make_prompted,
    prompt_parameters,
)
from torch.func import functional_call
from torch.nn import functional as F

EXACT = dict(rtol=0, atol=1e-10)
SINGLE_SOFTMAX = dict(rtol=0, atol=1e-5)  # transformers' eager attention takes the softmax in float32


def parts(model: PeftModel, kind: str, tower: str) -> dict[int, torch.nn.Parameter]:
    """An adapter's parameters by layer: `kind` is tokens, projection.weight or projection.bias."""
    name, _, leaf = kind.partition(".")
    ending = f"clip_prompt_{name}.default" + (f".{leaf}" if leaf else "")
    found = {}
    for full, parameter in model.named_parameters():
        if f".{tower}_model." in full and full.endswith(ending):
            pieces = full.split(".")
            found[int(pieces[pieces.index("layers") + 1]) if "layers" in pieces else 0] = parameter
    return found


def prompts_by_layer(model: PeftModel) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The prompts of the vision and of the text tower, layer by layer, as the design defines them."""
    own = {tower: parts(model, "tokens", tower) for tower in ("vision", "text")}
    found = {tower: dict(own[tower]) for tower in own}
    for tower, other in (("vision", "text"), ("text", "vision")):
        weights, biases = (parts(model, f"projection.{leaf}", tower) for leaf in ("weight", "bias"))
        for i, weight in weights.items():
            found[tower][i] = torch.stack([weight @ token + biases[i] for token in own[other][i]])
    return tuple([found[tower][i] for i in sorted(found[tower])] for tower in ("vision", "text"))


def plain_logits(model: PeftModel, images: torch.Tensor) -> torch.Tensor:
    """Logits by `plain_forward`, with the prompts that `prompts_by_layer` finds."""
    core = model.get_base_model()
    weights = {
        name.replace(".base_layer", ""): value
        for name, value in core.state_dict().items()
        if "clip_prompt" not in name
    }
    vision, text = prompts_by_layer(model)
    pixels = (images - core.image_mean) / core.image_std
    tokenizer = core.processor.tokenizer
    rows = [tokenizer(TEMPLATE.replace("{}", name)).input_ids for name in NAMES]
    image_ND = torch.stack([image_feature(weights, core.config, x, vision) for x in pixels])
    text_CD = torch.stack([text_feature(weights, core.config, row, text) for row in rows])
    return weights["logit_scale"].exp() * F.normalize(image_ND, dim=1) @ F.normalize(text_CD, dim=1).T


@pytest.mark.parametrize("row", TOKEN_ROWS)
def test_logits_and_gradients_are_those_of_a_plain_forward(row):
    model, images = make_prompted(row), make_images().requires_grad_(True)
    wanted, found = plain_logits(model, images), model(pixel_values=images).logits
    torch.testing.assert_close(found, wanted, **EXACT)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5), dtype=wanted.dtype)
    inputs = [images, *prompt_parameters(model).values()]
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("row", ["pixel-border", "pixel-full"])
def test_a_pixel_prompt_is_added_to_the_normalised_pixels(row):
    model, images = make_prompted(row), make_images()
    (values,) = prompt_parameters(model).values()
    canvas = torch.zeros(3, 8, 8, dtype=torch.float64)
    inside = 2 if row == "pixel-border" else 4
    k = 0
    for r in range(8):
        for c in range(8):
            if not (inside <= r < 8 - inside and inside <= c < 8 - inside):
                canvas[:, r, c] = values.detach()[:, k]
                k += 1
    assert k == values.shape[1]
    core = model.get_base_model()
    with model.disable_adapter():
        features = core.get_image_features(pixel_values=(images - core.image_mean) / core.image_std + canvas)
    wanted = F.normalize(features.pooler_output, dim=1) @ core.class_embeds.T * core.logit_scale.exp()
    torch.testing.assert_close(model(pixel_values=images).logits, wanted, **EXACT)


@pytest.mark.parametrize("row", TEXT_ROWS)
def test_cut_texts_and_a_shared_prefix_change_nothing(row):
    """Whole context = cut to the longest prompt = prefix computed once, in features and in gradients."""
    core = make_prompted(row).get_base_model()
    parameters = [p for p in core.text_parameters() if p.requires_grad]
    cut = core.class_token_ids
    whole = F.pad(cut, (0, core.config.text_config.max_position_embeddings - cut.shape[2]), value=int(cut[0, 0, -1]))
    found = []
    for ids, shared in ((whole, False), (cut, False), (cut, True), (whole, True)):
        core.class_token_ids, core._packed = ids, {}
        embeds = core.encode_classes(shared_prefix=shared)
        weights = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1), dtype=embeds.dtype)
        found.append([embeds, *torch.autograd.grad((embeds * weights).sum(), parameters)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.abs().max() > 1e-6
            torch.testing.assert_close(b, a, **EXACT)


@pytest.mark.parametrize(
    ("names", "template"),
    [
        (("one",), "a {}."),
        (("a", "ab", "abc", "a b c d e f g"), "{}"),
        (NAMES, ["a bc d {}.", "a picture: {}", "the {} of a b"]),
        (("x" * 20, "y"), "a bc d {}"),  # up to the context limit
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_prefix_without_prompts_changes_nothing(names, template, attention):
    core = make_base()
    core.set_attn_implementation(attention)
    core.set_classes(names, template)
    near = EXACT if attention == "sdpa" else SINGLE_SOFTMAX
    torch.testing.assert_close(core.encode_classes(), core.encode_classes(shared_prefix=False), **near)


def test_a_shared_prefix_saves_the_tokens_that_all_prompts_begin_with():
    core = make_prompted("VLI").get_base_model()
    seen = []
    core.text_model.encoder.layers[0].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    core.encode_classes()
    tokenizer = core.processor.tokenizer
    rows = [tokenizer(TEMPLATE.replace("{}", name)).input_ids for name in NAMES]
    shared = 1 + len(tokenizer("a bc d", add_special_tokens=False).input_ids)
    assert seen == [shared + sum(len(row) - shared for row in rows)]


@pytest.mark.parametrize("training", [False, True])
def test_the_shared_prefix_respects_gradient_checkpointing(training):
    core = make_prompted("VLI").get_base_model()
    parameters = [p for p in core.text_parameters() if p.requires_grad]
    wanted = core.encode_classes()
    grads = torch.autograd.grad(wanted.sum(), parameters)
    core.gradient_checkpointing_enable()
    core.train(training)
    calls = []
    layer = core.text_model.encoder.layers[1].base_layer
    layer.layer_norm1.register_forward_hook(lambda *args: calls.append(1))
    found = core.encode_classes()
    torch.testing.assert_close(found, wanted, **EXACT)
    for a, b in zip(torch.autograd.grad(found.sum(), parameters), grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert len(calls) == (2 if training else 1)  # the backward pass ran the layer again


def test_layers_that_are_watched_are_called_as_a_whole():
    core = make_base()
    wanted, calls = core.encode_classes(), []
    core.text_model.encoder.layers[1].register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(core.encode_classes(), wanted, **EXACT)
    assert calls == [1]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("views", [1, 3])
def test_prompts_of_each_sample_in_a_batch_equal_one_sample_at_a_time(row, views):
    """(B, n, D) prompts, B * views images: as B runs with (n, D) prompts, in logits and in gradients."""
    model = make_prompted(row)
    parameters = prompt_parameters(model)
    batch, generator = 3, torch.Generator().manual_seed(3)
    per_sample = {
        name: (value + 0.3 * torch.randn(batch, *value.shape, generator=generator, dtype=value.dtype)).detach()
        for name, value in parameters.items()
    }
    images = make_images(batch * views)
    for value in per_sample.values():
        value.requires_grad_(True)
    found = functional_call(model, per_sample, (), {"pixel_values": images}).logits
    assert found.shape == (batch * views, len(NAMES))
    weights = torch.randn(found.shape, generator=generator, dtype=found.dtype)
    grads = torch.autograd.grad((found * weights).sum(), list(per_sample.values()))
    for i in range(batch):
        own = {name: value[i].detach().requires_grad_(True) for name, value in per_sample.items()}
        rows = slice(i * views, (i + 1) * views)
        wanted = functional_call(model, own, (), {"pixel_values": images[rows]}).logits
        torch.testing.assert_close(found[rows], wanted, **EXACT)
        for a, b in zip(grads, torch.autograd.grad((wanted * weights[rows]).sum(), list(own.values())), strict=True):
            assert b.abs().max() > 1e-7
            torch.testing.assert_close(a[i], b, **EXACT)


@pytest.mark.parametrize("row", TEXT_ROWS)
def test_prompts_of_each_sample_need_no_shared_prefix(row):
    core = make_prompted(row).get_base_model()
    own = {
        name: torch.stack([value, 2 * value]).detach()
        for name, value in core.named_parameters()
        if "clip_prompt_tokens" in name
    }

    class Encoder(torch.nn.Module):
        def __init__(self, shared: bool):
            super().__init__()
            self.core, self.shared = core, shared

        def forward(self) -> torch.Tensor:
            return self.core.encode_classes(shared_prefix=self.shared)

    own = {f"core.{name}": value for name, value in own.items()}
    fast, plain = (functional_call(Encoder(shared), own, ()) for shared in (True, False))
    assert plain.shape == (2, len(NAMES), 12)
    assert (plain[0] - plain[1]).abs().max() > 1e-3
    torch.testing.assert_close(fast, plain, **EXACT)


def test_prompts_for_several_samples_refuse_images_that_do_not_divide():
    model = make_prompted("V")
    own = {name: torch.stack([value] * 3) for name, value in prompt_parameters(model).items()}
    with pytest.raises(ValueError, match="4 inputs don't divide among prompts for 3 samples"):
        functional_call(model, own, (), {"pixel_values": make_images(4)})
    model = make_prompted("T")
    own = {name: torch.stack([value] * 3) for name, value in prompt_parameters(model).items()}
    with pytest.raises(ValueError, match="4 images don't divide among prompts for 3 samples"):
        functional_call(model, own, (), {"pixel_values": make_images(4)})


@pytest.mark.parametrize("row", ROWS)
def test_attention_kernels_agree(row):
    model, images = make_prompted(row), make_images()
    wanted = model(pixel_values=images).cosine
    model.get_base_model().set_attn_implementation("eager")
    torch.testing.assert_close(model(pixel_values=images).cosine, wanted, **SINGLE_SOFTMAX)


@pytest.mark.parametrize("row", ["V", "VLI", "VLJ", "VLJ-vision", "pixel-border"])
def test_gradient_checkpointing_changes_nothing(row):
    found = []
    for checkpointing in (False, True):
        model = make_prompted(row).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        logits = model(pixel_values=make_images()).logits
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(prompt_parameters(model).values()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("row", ROWS)
def test_bfloat16_models_and_autocast_come_near(row):
    """Prompts stay float32 over a bfloat16 model; both are within bfloat16's precision of float32."""
    wanted = make_prompted(row, dtype=torch.float32)(pixel_values=make_images(dtype=torch.float32)).cosine
    low = make_prompted(row, dtype=torch.bfloat16)
    assert {p.dtype for p in prompt_parameters(low).values()} == {torch.float32}
    found = low(pixel_values=make_images(dtype=torch.bfloat16)).cosine
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.05)
    model = make_prompted(row, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(pixel_values=make_images(dtype=torch.float32)).cosine
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.05)


WHOLE = [pytest.param(row, "aot_eager", marks=pytest.mark.slow) for row in ("V", "VLI", "VLJ", "T", "pixel-border")]


@pytest.mark.parametrize(("row", "backend"), [("V", "eager"), *WHOLE])
def test_a_compiled_forward_gives_the_same_logits(row, backend):
    """`eager` traces and guards, `aot_eager` makes the graphs of forward and backward too."""
    model, images = make_prompted(row), make_images()
    wanted = model(pixel_values=images).logits
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(pixel_values=images).logits, wanted, **EXACT)
    with model.disable_adapter():
        torch.testing.assert_close(
            compiled(pixel_values=images).logits, make_base()(pixel_values=images).logits, **EXACT
        )
