"""CLIPs of another activation than OpenAI's, and of other sizes."""

import pytest
import torch
from tiny import CLASS_NAMES, make_clip, make_processor
from transformers import CLIPConfig

from hf_robust_clip.modeling import CLIPForZeroShotClassification


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_hidden_act_is_that_of_the_configuration_everywhere(activation, tiny_batch):
    """Texts with a shared prefix, texts as a whole, and the plain model; with the other activation others."""
    processor, images = make_processor(), tiny_batch(3)[0]
    clip = make_clip(processor, hidden_act=activation).double().eval()
    texts = [f"This is a photo of a {name}" for name in CLASS_NAMES]
    preparation = processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preparation.image_mean, preparation.image_std))
    inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
    expected = clip(**inputs, pixel_values=(images - mean) / std).logits_per_image
    model = CLIPForZeroShotClassification.from_clip(clip, processor)
    model.set_classes(CLASS_NAMES)
    assert model.can_pack_texts()
    torch.testing.assert_close(model(images).logits, expected, rtol=0, atol=1e-6)
    packed, whole = model.encode_classes(), model.encode_classes(shared_prefix=False)
    torch.testing.assert_close(packed, whole, rtol=0, atol=1e-12)
    other = make_clip(processor, hidden_act={"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation]).double().eval()
    assert (other(**inputs, pixel_values=(images - mean) / std).logits_per_image - expected).abs().max() > 1e-4


def test_l14_at_336_pixels_has_its_tokens_and_input_size():
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                  image_size=336, patch_size=14)  # fmt: skip
    with torch.device("meta"):
        model = CLIPForZeroShotClassification(CLIPConfig(vision_config=vision, projection_dim=768))
    assert (model.num_image_tokens, model.input_size, len(model.image_layers)) == (577, 336, 24)
    assert model.embedding_width == 768
