"""What a forward gives, on request too, and what it doesn't look at."""

import pytest
import torch
from prompted_clip import NAMES, ROWS, make_base, make_images, make_prompted
from torch.utils._python_dispatch import TorchDispatchMode

from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.attacks.pgd import pgd
from hf_robust_clip.threat_model import ThreatModel

CLOSE = dict(rtol=0, atol=1e-12)


def classifier_of(row: str | None):
    return make_base() if row is None else make_prompted(row).get_base_model()


@pytest.mark.parametrize("index", [slice(1, 3), [3, 0], torch.tensor([False, True, False, True])], ids=str)
def test_rows_are_the_output_of_these_images(index):
    model, images = classifier_of("VLI"), make_images(4)
    found = model(images, labels=torch.arange(4), output_patches=True).rows(index)
    wanted = model(images[index], output_patches=True)
    assert found.loss is None
    for name in ("logits", "cosine", "image_embeds", "class_embeds", "patch_embeds"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), **CLOSE)
    assert model(images).rows(index).patch_embeds is None


def test_rows_of_groups_have_class_embeddings_of_their_own():
    model, images = classifier_of("T"), make_images(4)
    for name, parameter in model.named_parameters():
        if ".clip_prompt_tokens." in name:
            parameter.data = torch.stack([parameter.data, 2 * parameter.data])
    whole = model(images)
    assert whole.class_embeds.shape[:2] == (2, len(NAMES))
    found = whole.rows([3, 0])
    assert torch.equal(found.class_embeds, whole.class_embeds[[1, 0]])
    cosine = torch.nn.functional.normalize(found.image_embeds, dim=-1)[:, None] @ found.class_embeds.mT
    torch.testing.assert_close(cosine[:, 0], found.cosine, **CLOSE)


def test_patch_embeddings_are_those_of_the_plain_tower():
    model, images = classifier_of(None), make_images(3)
    found = model(images, output_patches=True)
    hidden = model.vision_model((images - model.image_mean) / model.image_std).last_hidden_state
    wanted = model.visual_projection(model.vision_model.post_layernorm(hidden))
    torch.testing.assert_close(found.patch_embeds, wanted[:, 1:], **CLOSE)
    torch.testing.assert_close(found.image_embeds, wanted[:, 0], **CLOSE)
    torch.testing.assert_close(found.logits, model(images).logits, **CLOSE)


@pytest.mark.parametrize("row", list(ROWS))
def test_patch_embeddings_are_of_patches_with_every_design_of_prompts(row):
    """A token of the last layer is a patch's where its position is, whatever stands behind them."""
    model, images = classifier_of(row), make_images(2)
    vision = model.config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    read = []
    layer = model.vision_model.encoder.layers[-1]
    handle = layer.register_forward_hook(lambda _, __, hidden: read.append(hidden))
    found = model(images, output_patches=True)
    handle.remove()
    (hidden,) = read
    extra = {"V": 2, "V-shallow": 3, "VLI": 3, "VLJ": 2, "VLJ-vision": 2}.get(row, 0)
    assert hidden.shape[1] == 1 + count + extra and found.patch_embeds.shape[:2] == (2, count)
    wanted = model.visual_projection(model.vision_model.post_layernorm(hidden[:, 1 : 1 + count]))
    torch.testing.assert_close(found.patch_embeds, wanted, **CLOSE)


def test_patches_of_other_sizes():
    model = classifier_of("VLI")
    patch = model.config.vision_config.patch_size
    larger = model(make_images(1).repeat(1, 1, 2, 2), interpolate_pos_encoding=True, output_patches=True)
    assert larger.patch_embeds.shape[1] == (16 // patch) ** 2
    model.set_input_size(6)
    smaller = model(make_images(1)[..., :6, :6], output_patches=True)
    assert smaller.patch_embeds.shape[1] == (8 // patch) ** 2


# ---- pixels are looked at where they enter


class Looks(TorchDispatchMode):
    """Counts the times that Python asks for the value of a tensor, for which it waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.aminmax.default)
        return func(*args, **(kwargs or {}))


def test_normalised_pixels_are_refused_outside_of_attacks():
    model, images = classifier_of(None), make_images(2)
    normalised = (images - model.image_mean) / model.image_std
    with pytest.raises(ValueError, match="pixel_values"):
        model(normalised)
    with pytest.raises(ValueError, match="pixel_values"):
        model(normalised.requires_grad_())
    with model.fixed_class_embeds():
        model(normalised)
    with pytest.raises(ValueError, match="pixel_values"):
        model(normalised)


@pytest.mark.parametrize("row", [None, "VLI", "VLJ"])
def test_a_forward_inside_an_attack_looks_at_no_value(row):
    model, images = classifier_of(row), make_images(2)
    with Looks() as outside:
        model(images)
    with model.fixed_class_embeds(), Looks() as inside:
        model(images.requires_grad_()).logits.sum().backward()
    assert outside.count > 0 == inside.count


def test_more_steps_of_an_attack_look_no_more_often():
    model, images = classifier_of(None), make_images(2)
    labels, counts = torch.tensor([0, 1]), []
    for steps in (1, 5):
        with model.fixed_class_embeds(), Looks() as looks:
            pgd(lambda x: cross_entropy(model(x).logits, labels), images, ThreatModel("8/255"), num_steps=steps,
                step_size="2/255")  # fmt: skip
        counts.append(looks.count)
    assert counts[0] == counts[1]


def test_whether_layers_are_quantised_is_looked_at_once_in_an_attack_and_each_time_elsewhere():
    model, images = classifier_of(None).float(), make_images(2).float()
    layer = model.vision_model.encoder.layers[-1]

    def refuses(pixels):
        try:
            model(pixels)
        except ValueError:
            return True
        return False

    found = []
    with model.fixed_class_embeds():
        found.append(refuses(images.requires_grad_()))
        torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
        found.append(refuses(images))
        with model.fixed_class_embeds():
            found.append(refuses(images))
    found += [refuses(images), refuses(images.detach())]
    with model.fixed_class_embeds():
        found += [refuses(images.detach()), refuses(images), refuses(images)]
    assert found == [False, False, True, True, False, False, True, True]
