"""A language model whose vision tower was replaced sees by the robust encoder, and is in all else what it was."""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import make_processor
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)

from hf_robust_clip import ClipPromptConfig, replace_vision_tower, robust_vision_tower
from hf_robust_clip.training.checkpoints import save_adapter

IMAGE, PATCHES = 63, 16
RECIPES = (Path(__file__).parents[2] / "recipes/README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def robust(tiny_clip):
    return tiny_clip(seed=3, dtype=torch.float32)


@pytest.fixture
def llava(robust):
    """A random LLaVA with the tower of another CLIP of the same sizes."""
    vision = copy.deepcopy(robust.config.vision_config)
    text = LlamaConfig(vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pixels():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def answers(model):
    ids = torch.tensor([[1] + [IMAGE] * PATCHES + [5, 6]] * 2)
    found = model.generate(input_ids=ids, pixel_values=pixels().to(model.dtype), max_new_tokens=6, do_sample=False,
                           output_logits=True, return_dict_in_generate=True)  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def words(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 6, 7]])).logits


def features(model):
    with torch.no_grad():
        return torch.stack(list(model.get_image_features(pixels()).pooler_output))


def seen_by(robust, model):
    """What the language model must get of the robust encoder: the last layer but one, without the class token."""
    with torch.no_grad():
        hidden = robust.vision_model(pixels(), output_hidden_states=True).hidden_states[-2][:, 1:]
        return model.model.multi_modal_projector(hidden)


ROUNDING = dict(rtol=0, atol=1e-5)  # of patches as a matrix product, which a plain tower cuts by a convolution


def test_it_generates_from_the_features_of_the_robust_encoder(robust, llava, processor, tmp_path):
    text, before = words(llava), answers(llava)
    rest = {name: value.clone() for name, value in llava.state_dict().items() if "vision_tower" not in name}
    replace_vision_tower(llava, robust, processor=processor)
    torch.testing.assert_close(features(llava), seen_by(robust, llava), **ROUNDING)
    after = answers(llava)
    assert (after[1] - before[1]).abs().max() > 1e-3
    assert torch.equal(words(llava), text)
    assert all(torch.equal(llava.state_dict()[name], value) for name, value in rest.items())
    llava.save_pretrained(tmp_path)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = answers(plain)
    assert torch.equal(again[0], after[0])
    torch.testing.assert_close(again[1], after[1], rtol=0, atol=1e-6)


def test_a_tower_keeps_its_precision_and_which_weights_are_trained(robust, llava, processor):
    llava.to(torch.bfloat16)
    llava.model.vision_tower.requires_grad_(False)
    own = llava.model.vision_tower
    replace_vision_tower(llava, robust, processor=processor)
    assert llava.model.vision_tower is own
    assert {(p.dtype, p.requires_grad) for p in own.parameters()} == {(torch.bfloat16, False)}
    assert torch.equal(own.embeddings.class_embedding, robust.vision_model.embeddings.class_embedding.bfloat16())


def test_a_tower_is_saved_as_a_plain_vision_model(robust, llava, processor, tmp_path):
    robust.save_pretrained(tmp_path / "robust")
    tower = robust_vision_tower(tmp_path / "robust", like=llava.config, processor=processor)
    assert type(tower.embeddings.patch_embedding) is torch.nn.Conv2d, "a class of transformers' own"
    tower.save_pretrained(tmp_path / "tower")
    assert "embeddings.class_embedding" in load_file(tmp_path / "tower/model.safetensors")
    plain = CLIPVisionModel.from_pretrained(tmp_path / "tower").eval()
    assert plain.config.hidden_act == robust.config.vision_config.hidden_act
    with torch.no_grad():
        wanted = robust.vision_model(pixels()).last_hidden_state
        torch.testing.assert_close(plain(pixels()).last_hidden_state, wanted, **ROUNDING)


@pytest.mark.parametrize("saved", [True, False])
def test_a_lora_is_merged_and_the_source_left_as_it_was(saved, robust, llava, processor, tmp_path):
    robust.save_pretrained(tmp_path / "base")
    robust.name_or_path = str(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=r".*(vision|text)_model.*q_proj", init_lora_weights=False)
    peft = get_peft_model(robust, lora)
    wanted = seen_by(peft.get_base_model(), llava)
    if saved:
        save_adapter(peft, tmp_path / "lora")
    replace_vision_tower(llava, tmp_path / "lora" if saved else peft.get_base_model(), processor=processor)
    torch.testing.assert_close(features(llava), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen_by(peft.get_base_model(), llava), wanted, rtol=0, atol=0)
    assert not hasattr(llava.model.vision_tower.encoder.layers[0].self_attn.q_proj, "lora_A")


WRONG_TOWERS = {
    "image_size": dict(image_size=12),
    "patch_size": dict(patch_size=4),
    "hidden_size": dict(hidden_size=32),
    "num_hidden_layers": dict(num_hidden_layers=3),
    "num_attention_heads": dict(num_attention_heads=4),
    "hidden_act": dict(hidden_act="gelu"),
}


@pytest.mark.parametrize("name", WRONG_TOWERS)
def test_a_tower_of_another_kind_is_refused_by_what_differs(name, robust, llava, processor):
    config = copy.deepcopy(llava.config)
    for key, value in WRONG_TOWERS[name].items():
        setattr(config.vision_config, key, value)
    mend = "clip-vit-large-patch14-336" if name == "image_size" else "encoder"
    with pytest.raises(ValueError, match=rf"^(?=[^\n]*{name})[^\n]*{mend}[^\n]*$"):
        robust_vision_tower(robust, like=config, processor=processor)


def test_what_would_make_wrong_features_is_refused_and_the_model_left_alone(robust, llava, processor):
    before = features(llava)
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [0.485, 0.456, 0.406]
    with pytest.raises(ValueError, match="image_mean"):
        replace_vision_tower(llava, robust, processor=other)
    prompted = get_peft_model(copy.deepcopy(robust), ClipPromptConfig(design="V", vision_depth=1)).get_base_model()
    with pytest.raises(ValueError, match="prompts"):
        replace_vision_tower(llava, prompted, processor=processor)
    with pytest.raises(TypeError, match="processor"):
        replace_vision_tower(llava, robust, processor=processor.tokenizer)
    with pytest.raises(TypeError, match="source"):
        replace_vision_tower(llava, llava, processor=processor)
    with pytest.raises(TypeError, match="language_model"):
        replace_vision_tower(llava.model.language_model, robust, processor=processor)
    with pytest.raises(TypeError, match="SiglipVisionConfig"):
        robust_vision_tower(robust, like=LlavaConfig(vision_config=SiglipVisionConfig()), processor=processor)
    with pytest.raises(OSError, match="nowhere"):
        replace_vision_tower(llava, "nowhere", processor=processor)
    assert torch.equal(features(llava), before)
    llava.model.vision_tower.to("meta")
    with pytest.raises(ValueError, match="language_model"):
        replace_vision_tower(llava, robust, processor=processor)


def test_padding_of_the_language_model_is_its_own_affair(robust, llava, processor):
    padding = copy.deepcopy(processor)
    padding.image_processor.do_pad = True
    replace_vision_tower(llava, robust, processor=padding)
    torch.testing.assert_close(features(llava), seen_by(robust, llava), **ROUNDING)
    assert padding.image_processor.do_pad


def test_the_snippet_of_the_recipes_runs(robust, llava, processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    robust.save_pretrained("out/fare-336")
    llava.save_pretrained("llava")
    LlavaProcessor(processor.image_processor, processor.tokenizer).save_pretrained("llava")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", RECIPES, re.DOTALL) if "replace_vision" in code]
    exec(compile(block.replace('"llava-hf/llava-1.5-7b-hf"', '"llava"'), "recipes", "exec"), {})
    plain = LlavaForConditionalGeneration.from_pretrained("out/robust-llava").eval()
    torch.testing.assert_close(features(plain), seen_by(robust, plain), **ROUNDING)
