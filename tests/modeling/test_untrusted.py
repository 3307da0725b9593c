"""A checkpoint of somebody else gives numbers and texts: it runs no code, opens no other file, fetches nothing."""

import json
import pickle
import shutil
import socket
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CLASS_NAMES

from hf_robust_clip import ClipPromptConfig, pictures
from hf_robust_clip.modeling import CLIPForZeroShotClassification, with_adapter
from hf_robust_clip.runs.shared import load_model

LORA = LoraConfig(r=2, target_modules=r".*vision_model.*q_proj")


class Bomb:
    """A pickle that leaves a file where it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Whoever asks a question or opens a connection fails the test."""

    def forbidden(*args, **kwargs):
        raise AssertionError(f"asked or called: {args}")

    monkeypatch.setattr("builtins.input", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)


@pytest.fixture
def folder(tiny_clip, tmp_path):
    tiny_clip(dtype=torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def load(folder):
    return CLIPForZeroShotClassification.from_pretrained(folder)


def adapter_of(folder, config=LORA):
    place = folder.parent / "adapter"
    get_peft_model(load(folder), config).save_pretrained(place)
    edit(place / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(folder)))
    return place


# ---- code


@pytest.mark.parametrize("through", ["model", "adapter"])
@pytest.mark.parametrize("layout", ["preprocessor_config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_beside_a_checkpoint_is_not_run(layout, through, folder, tmp_path):
    mark = tmp_path / "run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    maps = {
        "AutoImageProcessor": "evil.Evil",
        "AutoProcessor": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    place = adapter_of(folder) if through == "adapter" else folder
    if layout == "preprocessor_config.json":
        own = json.loads((folder / "processor_config.json").read_text())["image_processor"]
        (folder / "processor_config.json").unlink()
        (folder / layout).write_text(json.dumps({**own, "auto_map": maps}))
    else:
        edit(folder / layout, lambda c: c.update(auto_map=maps))
    edit(folder / "config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}))
    for loader in (load, lambda place: load_model(str(place))):
        model = loader(place)
        model.set_classes(CLASS_NAMES)
    assert not mark.exists() and not any("evil" in name for name in sys.modules)


@pytest.mark.parametrize("present", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_pickled_weights_are_not_opened(present, folder, tmp_path):
    mark = tmp_path / "opened"
    (folder / "model.safetensors").unlink()
    (folder / present).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("config", [LORA, ClipPromptConfig(design="V", vision_depth=1)], ids=["lora", "prompts"])
def test_pickled_adapters_are_not_opened(config, folder, tmp_path):
    mark, place = tmp_path / "opened", adapter_of(folder, config)
    (place / "adapter_model.safetensors").unlink()
    (place / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    for loader in (load, lambda place: with_adapter(load(folder), place)):
        with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
            loader(place)
    with pytest.raises(Exception, match="weights_only|pickle"):  # noqa: RUF043  # PEFT's own door
        PeftModel.from_pretrained(load(folder), place)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("where", ["", "text_config", "vision_config"])
def test_no_kernel_is_fetched_for_attention(where, key, folder):
    edit(folder / "config.json", lambda c: (c[where] if where else c).update({key: "somebody/kernel"}))
    model = load(folder)
    own = {m.config._attn_implementation for m in (model, model.text_model, model.vision_model)}
    assert own == {"sdpa"}
    eager = CLIPForZeroShotClassification.from_pretrained(folder, attn_implementation="eager")
    assert eager.text_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "torchao"])
def test_no_library_is_called_for_quantised_weights(method, folder):
    quantised = {"quant_method": method, "load_in_8bit": True, "bits": 4}
    edit(folder / "config.json", lambda c: c.update(quantization_config=quantised))
    with pytest.raises(OSError, match="quantised"):
        load(folder)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": "(([a-z_.0-9])*)*X"}, {"rank_pattern": {"(a+)+b": 4}}, {"exclude_modules": ["(x){9,}"]}],
)
def test_no_pattern_of_an_adapter_runs_for_ever(settings, folder, tmp_path):
    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules=r".*vision_model.*(q_proj|v_proj)"))
    model.save_pretrained(tmp_path / "adapter")
    CLIPForZeroShotClassification.from_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", lambda c: c.update(settings))
    with pytest.raises(OSError, match=next(iter(settings))):
        CLIPForZeroShotClassification.from_pretrained(tmp_path / "adapter")


# ---- files elsewhere


def test_a_config_names_no_other_weights(folder):
    shutil.copy(folder / "model.safetensors", folder / "others.safetensors")
    edit(folder / "config.json", lambda c: c.update(transformers_weights="others.safetensors"))
    with pytest.raises(OSError, match="transformers_weights"):
        load(folder)


def sharded(folder, second="b.safetensors"):
    """The weights in two files, and an index that calls the second one as given."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    half = len(names) // 2
    save_file({name: weights[name] for name in names[:half]}, folder / "a.safetensors", {"format": "pt"})
    save_file({name: weights[name] for name in names[half:]}, folder / "b.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    places = {name: "a.safetensors" if name in names[:half] else second for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_several_files(folder):
    wanted = load(folder).state_dict()
    sharded(folder)
    assert all(torch.equal(value, wanted[name]) for name, value in load(folder).state_dict().items())


@pytest.mark.parametrize(
    "other", ["../other/b.safetensors", "/tmp/b.safetensors", "C:\\b.safetensors", "..", "b.bin", 3]
)
def test_an_index_that_names_files_elsewhere_is_refused(other, folder):
    sharded(folder, other)
    (folder.parent / "other").mkdir()
    (folder / "b.safetensors").rename(folder.parent / "other/b.safetensors")
    with pytest.raises(OSError, match="index"):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_named(content, folder):
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(OSError, match="index"):
        load(folder)


# ---- memory


@pytest.mark.parametrize("name", ["size", "crop_size"])
def test_a_processor_far_beyond_its_model_is_refused(name, folder):
    values = {"size": {"shortest_edge": 100_000}, "crop_size": {"height": 100_000, "width": 100_000}}
    edit(folder / "processor_config.json", lambda c: c["image_processor"].update({name: values[name]}))
    with pytest.raises(ValueError, match=name):
        load(folder)


def test_a_picture_that_would_fill_the_memory_is_refused(folder):
    """One row of 300,000 pixels: its shorter side becomes 224, and it 67 million pixels long."""
    from PIL import Image

    processor = load(folder).processor
    narrow = Image.new("RGB", (300_000, 1))
    assert pictures.to_pixels(processor, [narrow]).shape == (1, 3, 8, 8)
    processor.image_processor.size = {"shortest_edge": 224}
    with pytest.raises(ValueError, match="1 x 300000"):
        pictures.to_pixels(processor, [narrow])
