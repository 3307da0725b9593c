"""Loading gives what was saved or an error; what changes a prediction travels with what is saved."""

import json
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import through_transformers_adapters
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CLASS_NAMES
from torch.utils.data import ConcatDataset, Subset
from transformers import CLIPModel

from hf_robust_clip import RTPT, ClipPromptConfig, DefendedClassifier, digits_clip_path
from hf_robust_clip.modeling import CLIPForZeroShotClassification, with_adapter
from hf_robust_clip.modeling.checkpoints import UnfitWeights
from hf_robust_clip.runs.shared import load_model
from hf_robust_clip.training.checkpoints import save_adapter

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LORA = LoraConfig(r=2, target_modules=r".*vision_model.*q_proj", init_lora_weights=False)
V = dict(design="VLI", vision_depth=2, text_depth=2, context_init=None)


@pytest.fixture
def images():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tiny_clip, tmp_path):
    tiny_clip(dtype=torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder):
    return CLIPForZeroShotClassification.from_pretrained(folder).eval()


def logits(model, images):
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    core.set_classes(CLASS_NAMES, "a photo of a {}.")
    with torch.no_grad():
        return core.eval()(images).logits


def rewrite(folder, change, file="model.safetensors"):
    weights = change(load_file(folder / file))
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, folder / file, {"format": "pt"})


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- settings that are damaged


@pytest.mark.parametrize("tower", ["vision_config", "text_config"])
@pytest.mark.parametrize(
    ("name", "value"), [("num_hidden_layers", 100_000), ("hidden_size", 2**30), ("hidden_size", 0),
                        ("num_attention_heads", -2), ("intermediate_size", "32"), (None, None)],
)  # fmt: skip
def test_a_tower_that_its_files_do_not_hold_is_not_built(name, value, tower, folder, monkeypatch):
    monkeypatch.setattr(CLIPForZeroShotClassification, "__init__", lambda *_: pytest.fail("built"))
    own = {**json.loads((folder / "config.json").read_text())[tower], name: value} if name else value
    edit(folder / "config.json", **{tower: own})
    about = name if value in (0, -2, "32") else "config.json"
    with pytest.raises(OSError, match=rf"^(?=[^\n]*base)[^\n]*{about}[^\n]*$"):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 100_000])
def test_a_damaged_file_of_settings_is_one_line(content, file, folder):
    if file == "adapter_config.json":
        get_peft_model(load(folder), LORA).save_pretrained(folder.with_name("adapter"))
        folder = folder.with_name("adapter")
    (folder / file).write_text(content)
    with pytest.raises((OSError, ValueError), match=rf"^[^\n]*{folder.name}[^\n]*$"):
        load(folder)


@pytest.mark.parametrize("base", ["itself", "circle", "", None, 3])
def test_an_adapter_stands_on_a_model(base, folder):
    places = [folder.with_name(name) for name in ("adapter", "circle")]
    for place in places:
        get_peft_model(load(folder), LORA).save_pretrained(place)
        edit(place / "adapter_config.json", base_model_name_or_path=str(places[0]))
    named = {"itself": str(places[0]), "circle": str(places[1])}.get(base, base)
    edit(places[0] / "adapter_config.json", base_model_name_or_path=named)
    for loader in (load, lambda place: load_model(str(place))):
        with pytest.raises(OSError, match=r"^[^\n]*adapter[^\n]*$"):
            loader(places[0])


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.bool])
def test_weights_that_are_no_floats_are_refused(kind, folder):
    rewrite(folder, lambda weights: {name: value.to(kind) for name, value in weights.items()})
    with pytest.raises(OSError, match=r"stored as (I8|I32|BOOL)"):
        load(folder)


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(b""), lambda file: file.write_bytes(file.read_bytes()[:-10]),
               lambda file: file.write_bytes(b"\xff" * 100), lambda file: save_file({}, file),
               lambda file: save_file({k: v[:, :-1].contiguous() for k, v in load_file(file).items()}, file)],
    ids=["empty", "cut short", "garbage", "no weights", "shapes"],
)  # fmt: skip
def test_damaged_adapters_are_one_line(damage, folder):
    place = folder.with_name("adapter")
    get_peft_model(load(folder), LORA).save_pretrained(place)
    edit(place / "adapter_config.json", base_model_name_or_path=str(folder))
    damage(place / "adapter_model.safetensors")
    for loader in (load, lambda place: with_adapter(load(folder), place)):
        with pytest.raises(OSError, match=r"^[^\n]*adapter'[^\n]*$"):
            loader(place)


# ---- weights that don't fit


def without(*parts):
    return lambda weights: {name: value for name, value in weights.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("visual_projection"), "visual_projection.weight"),
        (without("text_model"), "text_model"),
        (without("logit_scale"), "logit_scale"),
        (without("layers.1.mlp.fc1.bias"), "fc1.bias"),
        (lambda weights: {f"module.{name}": value for name, value in weights.items()}, "'module.'"),
        (lambda weights: {**weights, "vision_model.encoder.layers.2.mlp.fc1.bias": torch.zeros(32)}, "layers.2"),
        (lambda weights: {**weights, "visual_projection.weight": torch.zeros(12, 8)}, "visual_projection.weight"),
    ],
    ids=["no projection", "no text tower", "no scale", "one bias", "DataParallel", "one layer more", "another shape"],
)
def test_weights_that_do_not_fit_are_named(change, named, folder, caplog):
    rewrite(folder, change)
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match=named) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and "MISSING" not in caplog.text


def test_a_position_table_of_old_checkpoints_is_no_weight(folder, images):
    wanted = logits(load(folder), images)
    rewrite(folder, lambda weights: {**weights, "text_model.embeddings.position_ids": torch.arange(32)[None]})
    assert torch.equal(logits(load(folder), images), wanted)


def test_a_processor_that_is_changed_after_it_was_given_is_saved_as_the_model_reads_images(folder, images):
    model = load(folder)
    wanted = logits(model, images)
    model.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    model.save_pretrained(folder.parent / "again")
    assert torch.equal(logits(load(folder.parent / "again"), images), wanted)


@pytest.mark.parametrize("family", ["siglip", "chinese_clip", "clip_vision_model", "clip_text_model", "bert"])
def test_a_model_of_another_family_is_told_so_in_one_line(family, folder):
    edit(folder / "config.json", model_type=family)
    towers = {"clip_vision_model": "image", "clip_text_model": "text"}
    with pytest.raises(OSError, match=towers.get(family, family)) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and "ignore_mismatched" not in str(caught.value)


# ---- adapters


@pytest.fixture(params=["prompts", "lora"])
def adapter(request, folder, images):
    """A saved adapter, and the logits that it gives; trained under a normalisation of its own."""
    base = load(folder)
    base.set_normalisation(MEAN, STD)
    base.set_classes(CLASS_NAMES, "a photo of a {}.")
    torch.manual_seed(0)
    model = get_peft_model(base, ClipPromptConfig(**V) if request.param == "prompts" else LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clip_prompt" in name:
                parameter.normal_()
    place = folder.parent / "adapter"
    model.save_pretrained(place)
    if request.param == "lora":  # as the trainers save it
        base.processor.save_pretrained(place)
    edit(place / "adapter_config.json", base_model_name_or_path=str(folder))
    return place, logits(model, images)


DOORS = {
    "transformers": lambda adapter, base: load(adapter),
    "command line": lambda adapter, base: load_model(str(adapter)),
    "with_adapter": lambda adapter, base: with_adapter(load(base), adapter),
}


@pytest.mark.parametrize("door", list(DOORS))
def test_an_adapter_brings_its_normalisation_by_every_door(door, adapter, folder, images):
    place, wanted = adapter
    model = DOORS[door](place, folder)
    torch.testing.assert_close(logits(model, images), wanted, rtol=0, atol=1e-5)
    assert (logits(load(folder), images) - wanted).abs().max() > 0.1
    model.set_normalisation([0.5] * 3, [0.5] * 3)
    assert (logits(model, images) - wanted).abs().max() > 0.1, "the test can't tell normalisations apart"


def test_prompts_bring_it_by_pefts_own_door_too(folder, images, caplog):
    base = load(folder)
    base.set_classes(CLASS_NAMES, "a photo of a {}.")
    model = get_peft_model(base, ClipPromptConfig(**V))
    base.set_normalisation(MEAN, STD)  # after the prompts were put in, as a trainer may do
    wanted = logits(model, images)
    model.save_pretrained(folder.parent / "prompts")
    with caplog.at_level(logging.WARNING, "hf_robust_clip"):
        loaded = PeftModel.from_pretrained(load(folder), folder.parent / "prompts")
    torch.testing.assert_close(logits(loaded, images), wanted, rtol=0, atol=1e-5)
    assert "mean" in caplog.text
    other = load(folder)
    second = get_peft_model(other, ClipPromptConfig(**V))
    with pytest.raises(ValueError, match="mean"):
        second.load_adapter(folder.parent / "prompts", adapter_name="b")


@pytest.fixture
def lora(folder, images):
    """A LoRA that a trainer saved, trained under a normalisation of its own; and the logits that it gives."""
    base = load(folder)
    base.set_normalisation(MEAN, STD)
    model = get_peft_model(base, LORA)
    save_adapter(model, folder.parent / "lora")
    return folder.parent / "lora", logits(model, images)


@through_transformers_adapters()
def test_a_lora_brings_its_normalisation_by_pefts_own_door_too(lora, folder, images, caplog):
    place, wanted = lora
    with caplog.at_level(logging.WARNING, "hf_robust_clip"):
        model = PeftModel.from_pretrained(load(folder), place)
    assert torch.equal(logits(model, images), wanted) and "mean" in caplog.text
    again = load(place)  # and on, by transformers' door
    again.save_pretrained(place.parent / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder), place.parent / "again"), images), wanted)
    merged = model.merge_and_unload()
    merged.save_pretrained(place.parent / "merged")
    torch.testing.assert_close(logits(load(place.parent / "merged"), images), wanted, rtol=0, atol=1e-5)


def test_a_second_adapter_of_another_normalisation_is_refused_by_every_door(lora, folder):
    place, _ = lora
    get_peft_model(load(folder), LORA).save_pretrained(place.parent / "plain")
    ours = load(folder)
    ours.load_adapter(place.parent / "plain")
    for changes in ({"adapter_name": "b"}, {"adapter_name": "default", "hotswap": True}):
        with pytest.raises(ValueError, match="mean"):
            ours.load_adapter(place, **changes)
    pefts = PeftModel.from_pretrained(load(folder), place.parent / "plain")
    with pytest.raises(RuntimeError, match="mean"):
        pefts.load_adapter(place, "b")


def test_a_lora_under_its_bases_own_normalisation_is_pefts_file_and_no_more(folder):
    model = get_peft_model(load(folder), LORA)
    save_adapter(model, folder.parent / "lora")
    assert all("lora_" in name for name in load_file(folder.parent / "lora" / "adapter_model.safetensors"))
    assert isinstance(PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), folder.parent / "lora"), PeftModel)


@pytest.mark.parametrize("door", list(DOORS))
def test_an_adapter_that_lacks_a_tensor_is_refused_by_every_door(door, adapter, folder):
    place, _ = adapter
    file = "adapter_model.safetensors"
    names = sorted(load_file(place / file))
    rewrite(place, without(names[0]), file)
    with pytest.raises((OSError, ValueError), match=names[0].split(".")[-2]) as caught:
        DOORS[door](place, folder)
    assert "\n" not in str(caught.value)


def test_pefts_own_door_refuses_prompts_that_lack_a_tensor_or_have_one_too_many(folder):
    get_peft_model(load(folder), ClipPromptConfig(**V)).save_pretrained(folder.parent / "p")
    file = "adapter_model.safetensors"
    whole = load_file(folder.parent / "p" / file)
    first = min(whole)
    for weights in (
        without(first)(whole),
        {**whole, first.replace("text_model", "vision_model"): whole[first].clone()},
    ):
        save_file(weights, folder.parent / "p" / file)
        with pytest.raises(ValueError, match="default"):
            PeftModel.from_pretrained(load(folder), folder.parent / "p")


def test_pefts_own_door_refuses_a_lora_that_lacks_a_tensor_and_takes_a_whole_one(folder, images):
    model = get_peft_model(load(folder), LORA)
    model.save_pretrained(folder.parent / "lora")
    wanted = logits(model, images)
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder), folder.parent / "lora"), images), wanted)
    second = PeftModel.from_pretrained(load(folder), folder.parent / "lora", adapter_name="another")
    second.load_adapter(folder.parent / "lora", "one more")
    second.set_adapter("one more")
    assert torch.equal(logits(second, images), wanted)
    file = "adapter_model.safetensors"
    lacking = sorted(load_file(folder.parent / "lora" / file))[-1]
    rewrite(folder.parent / "lora", without(lacking), file)
    with pytest.raises(RuntimeError, match=lacking.split(".")[-2]):
        PeftModel.from_pretrained(load(folder), folder.parent / "lora")
    with pytest.raises(RuntimeError, match="'third'"):
        second.load_adapter(folder.parent / "lora", "third")


@pytest.mark.parametrize("damage", ["shape", "bytes"])
def test_damaged_adapters_are_told_as_such_by_every_door(damage, adapter, folder):
    place, _ = adapter
    file = place / "adapter_model.safetensors"
    if damage == "shape":
        rewrite(
            place, lambda weights: {name: value.repeat_interleave(2, 0) for name, value in weights.items()}, file.name
        )
    else:
        file.write_bytes(file.read_bytes()[:-5])
    for door in DOORS.values():
        with pytest.raises(UnfitWeights) as caught:
            door(place, folder)
        text = str(caught.value)
        assert "\n" not in text and "ignore_mismatched" not in text and "processor" not in text


def test_prompts_are_no_numbers_until_they_are_loaded(folder):
    """Whatever loads them: what a file lacks shows."""
    model = get_peft_model(load(folder), ClipPromptConfig(**V, inference_mode=True))
    values = [p for name, p in model.named_parameters() if "clip_prompt" in name]
    assert values and all(value.isnan().all() for value in values)


def test_a_folder_with_a_whole_model_and_an_adapter_is_refused(adapter, folder):
    place, _ = adapter
    (folder / "adapter_config.json").write_text((place / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load(folder)


@pytest.mark.parametrize("first", ["lora", "prompts"])
def test_two_methods_in_one_model_are_refused_before_one_is_lost(first, folder, tmp_path):
    base = load(folder)
    if first == "lora":
        with pytest.raises(ValueError, match="merge"):
            get_peft_model(get_peft_model(base, LORA), ClipPromptConfig(**V))
        return
    nested = get_peft_model(get_peft_model(base, ClipPromptConfig(**V)), LORA)
    with pytest.raises(ValueError, match="merge"):
        nested.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="adapters"):
        base.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_model_with_an_adapter_inside_is_not_saved_as_a_whole_one(folder, tmp_path):
    for config in (LORA, ClipPromptConfig(**V)):
        model = get_peft_model(load(folder), config)
        with pytest.raises(ValueError, match="adapter"):
            model.get_base_model().save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- defences


def test_a_defence_keeps_the_normalisation(folder, images, tmp_path):
    model = load(folder)
    model.set_normalisation([0.1, 0.2, 0.3], [0.9, 0.8, 0.7])
    model.set_classes(CLASS_NAMES, "a photo of a {}.")
    defended = DefendedClassifier(model, RTPT(num_views=2, selected=0.5))
    wanted = defended(images).logits
    defended.save_pretrained(tmp_path / "defended")
    loaded = DefendedClassifier.from_pretrained(tmp_path / "defended")
    torch.testing.assert_close(loaded(images).logits, wanted, rtol=0, atol=1e-4)


def test_a_defence_over_weights_that_no_name_stands_for_is_not_saved(folder, images, tmp_path):
    model = load(folder)
    model.set_classes(CLASS_NAMES, "a photo of a {}.")
    with torch.no_grad():
        model.visual_projection.weight.mul_(torch.linspace(0.5, 2, 12)[:, None])
    defended = DefendedClassifier(model, RTPT(num_views=2, selected=0.5))
    with pytest.raises(ValueError, match="base_model"):
        defended.save_pretrained(tmp_path / "defended")
    assert not (tmp_path / "defended").exists()
    model.save_pretrained(tmp_path / "own")
    DefendedClassifier(model, defended.adapter, base_model=str(tmp_path / "own")).save_pretrained(tmp_path / "d")
    loaded = DefendedClassifier.from_pretrained(tmp_path / "d")
    torch.testing.assert_close(loaded(images).logits, defended(images).logits, rtol=0, atol=1e-4)


# ---- names


def test_the_embedded_model_by_its_name_and_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("digits-clip").config.to_dict() == load(digits_clip_path()).config.to_dict()
    (tmp_path / "digits-clip/mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"\./digits-clip"):
        load("digits-clip")


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "cat "),
        ("cardigan", "Cardigan"),
        ("hot dog", "hot  dog"),
        ("a b", "a\u2003b"),
        ("caf\u00e9", "cafe\u0301"),
    ],
)
def test_names_alike_to_the_tokenizer_are_refused(names, tiny_clip):
    model = load(digits_clip_path()) if names[0] == "caf\u00e9" else tiny_clip()
    before = model.class_names
    with pytest.raises(ValueError, match=r"class_names\[2\].*class_names\[0\]"):
        model.set_classes((names[0], "other", names[1]), "{}")
    assert model.class_names == before


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "cat\n", "\ud800", "a\x1b[31mb"])
def test_names_that_can_not_be_shown_are_refused(name, tiny_clip):
    model = tiny_clip()
    with pytest.raises(ValueError, match=r"class_names\[1\]="):
        model.set_classes(("one", name))
    with pytest.raises(ValueError, match="template="):
        model.set_classes(("one", "two"), f"{name} {{}}")
    assert model.class_names == CLASS_NAMES


def test_an_added_token_is_not_read_in_place_of_the_end(tiny_clip):
    """A tower of the first published checkpoints is read at the largest id."""
    model = tiny_clip()
    model.text_model.eos_token_id = 2
    model.set_classes(CLASS_NAMES)
    model.processor.tokenizer.add_tokens(["<robust>"])
    with pytest.raises(ValueError, match="embeddings"):
        model.set_classes(("<robust> one", "two"))
    model.text_model.resize_token_embeddings(len(model.processor.tokenizer))
    with pytest.raises(ValueError, match="eos_token_id"):
        model.set_classes(("<robust> one", "two"))
    model.text_model.eos_token_id = model.config.text_config.eos_token_id = model.processor.tokenizer.eos_token_id
    model.set_classes(("<robust> one", "two"))
    tokens = model.processor.tokenizer(["This is a photo of a <robust> one"], return_tensors="pt").input_ids
    hidden = model.text_model(tokens).last_hidden_state[0, -1]
    wanted = torch.nn.functional.normalize(model.text_projection(hidden), dim=-1)
    torch.testing.assert_close(model.class_embeds[0], wanted, rtol=0, atol=1e-10)


# ---- a model and the images it is for


def names_of(*class_names, **more):
    return SimpleNamespace(class_names=class_names, dataset_id="user/set", **more)


def test_classes_of_a_dataset_are_compared_with_the_models(tiny_clip):
    model = tiny_clip()
    exchanged = (CLASS_NAMES[1], CLASS_NAMES[0], *CLASS_NAMES[2:])
    for names in (exchanged, CLASS_NAMES[:3], (*CLASS_NAMES[:6], "another")):
        for dataset in (names_of(*names), Subset(names_of(*names), [0]), ConcatDataset([[1], [2]])):
            if isinstance(dataset, ConcatDataset):
                dataset.datasets = [names_of(*CLASS_NAMES), names_of(*names)]
            with pytest.raises(ValueError, match="class"), model.prepared_for(dataset):
                pass
    with model.prepared_for(names_of(*CLASS_NAMES)), model.prepared_for([1, 2]):
        pass


def test_labels_of_other_libraries_datasets_may_have_other_names_but_not_cross_the_models(tiny_clip):
    model = tiny_clip()
    crossed, renamed = (CLASS_NAMES[1], CLASS_NAMES[0], *CLASS_NAMES[2:]), [f"class_{i}" for i in range(7)]
    for names, fits in ((CLASS_NAMES, True), (renamed, True), (CLASS_NAMES[:3], True), (crossed, False)):
        pairs = {"labels": datasets.ClassLabel(names=list(names)), "pixel_values": datasets.Value("float32")}
        rows = datasets.Dataset.from_dict({"labels": [0], "pixel_values": [0.0]}, features=datasets.Features(pairs))
        fine = rows.rename_column("labels", "fine_label")
        for dataset in (rows, fine, SimpleNamespace(classes=list(names)), Subset(rows, [0])):
            with nullcontext() if fits else pytest.raises(ValueError, match="class"), model.prepared_for(dataset):
                pass


def test_a_dataset_that_says_nothing_of_its_size_leaves_the_users_own(tiny_clip, images):
    model = tiny_clip(dtype=torch.float32)
    model.set_input_size(4)
    for dataset, side in (
        ([1, 2], 4),
        (names_of(*CLASS_NAMES), 4),
        (names_of(*CLASS_NAMES, attack_resolution=None), 8),
    ):
        with model.prepared_for(dataset):
            assert model.input_size == side
    assert model.input_size == 4


def test_a_model_is_prepared_for_a_dataset_and_comes_back(tiny_clip, images):
    model = tiny_clip(dtype=torch.float32).train()
    wanted = model(images).logits
    small = names_of("five", "six", attack_resolution=4, resolution=4)
    with model.prepared_for(small, "a {}"):
        assert (model.class_names, model.templates, model.input_size) == (("five", "six"), ("a {}",), 4)
        assert not model.training and model(images[:, :, :4, :4]).logits.shape == (2, 2)
    assert model.training and (model.class_names, model.input_size) == (CLASS_NAMES, 8)
    assert torch.equal(model(images).logits, wanted)
    with pytest.raises(ValueError, match="repeats"), model.prepared_for(names_of("a", "a"), "a {}"):
        pass
    assert model.class_names == CLASS_NAMES and model.training
    with (
        pytest.raises(ValueError, match="resolution"),
        model.prepared_for(
            SimpleNamespace(
                datasets=[names_of(*CLASS_NAMES), names_of(*CLASS_NAMES, attack_resolution=4, resolution=4)]
            )
        ),
    ):
        pass
