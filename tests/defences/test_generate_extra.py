"""Captioning models of transformers and pipelines of diffusers: tiny random ones, made from configs."""

import json

import pytest
import torch
from tiny import make_processor

from hf_robust_clip.defences.captioners import CaptioningModel
from hf_robust_clip.defences.generators import DiffusionGenerator


@pytest.fixture(scope="module")
def captioning_folder(tmp_path_factory):
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[ENC]", "[DEC]", *"abcdefghij", "photo", "of"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(
        **size, encoder_hidden_size=16, vocab_size=len(words), max_position_embeddings=32, projection_dim=8,
        bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0,
    )  # fmt: skip
    vision = dict(**size, image_size=16, patch_size=8)
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8, image_text_hidden_size=8)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return str(folder)


def test_a_captioning_model_says_the_same_of_an_image_alone_and_in_a_batch(captioning_folder):
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    captioner = CaptioningModel(captioning_folder, max_new_tokens=4)
    texts = captioner(images, ["a"] * 3)
    assert len(texts) == 3 and all(isinstance(text, str) for text in texts)
    assert texts == [captioner(image[None], ["b"])[0] for image in images]
    assert captioner.of_classes(["a"]) is None
    began = CaptioningModel(captioning_folder, prompt="photo of", max_new_tokens=3)(images, ["a"] * 3)
    assert all(text.startswith("photo of") for text in began)


def test_a_missing_model_is_an_error_at_first_use(tmp_path):
    captioner = CaptioningModel(str(tmp_path / "none"))
    with pytest.raises(OSError, match="none"):
        captioner(torch.zeros(1, 3, 8, 8), ["a"])


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers", reason="the extra `generate` isn't installed")
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("diffusion")
    tokenizer = make_processor().tokenizer
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    blocks = dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
            **blocks,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=16, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **blocks,
        ),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


def test_a_pipeline_makes_the_picture_of_a_text_and_a_seed(pipeline_folder):
    generator = DiffusionGenerator(pipeline_folder, num_inference_steps=2, side=16)
    pictures = generator(["a", "b"], seed=2**62 + 1)
    assert pictures.shape == (2, 3, 16, 16) and pictures.min() >= 0 and pictures.max() <= 1
    torch.testing.assert_close(generator(["b"], seed=2**62 + 1)[0], pictures[1], rtol=0, atol=1e-4)
    assert (generator(["b"], seed=3)[0] - pictures[1]).abs().max() > 1e-3


def test_settings_are_checked_and_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="num_inference_steps"):
        DiffusionGenerator("a", num_inference_steps=0)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match="diffusers"):
        DiffusionGenerator(json.dumps("never loaded"))(["a"], 0)
