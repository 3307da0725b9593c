"""`hf-robust-clip convert`: the checkpoint computes what the file's own architecture does, or there is none."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_files import FILES, halved, open_clip_text, tecoa, visual
from openai_clip import OpenAIClip
from PIL import Image
from prompt_learner_files import texts
from safetensors.torch import load_file, save_file
from tiny import make_clip, make_processor
from transformers import CLIPModel, CLIPProcessor, pipeline

from hf_robust_clip.checkpoint_notes import named_base, trained_templates
from hf_robust_clip.cli import main
from hf_robust_clip.modeling import CLIPForZeroShotClassification
from hf_robust_clip.modeling.checkpoints import UnfitWeights
from hf_robust_clip.report.card import card_state
from hf_robust_clip.runs.convert import convert_checkpoint
from hf_robust_clip.runs.shared import load_model

TEXTS = ["a photo of a cat", "dog", "a longer text of a bird"]
VOCABULARY = len(make_processor().tokenizer)
CLIP = {name: OpenAIClip(VOCABULARY, name) for name in ("quick_gelu", "gelu")}
IMAGENET = [0.485, 0.456, 0.406]


def base_in(folder, **changes):
    """A folder with the base: quick_gelu, as OpenAI's."""
    processor = make_processor(changes.get("image_size", 8))
    model = CLIPForZeroShotClassification.from_clip(make_clip(processor, **changes), processor)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_in(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def base_model(base):
    return CLIPForZeroShotClassification.from_pretrained(base).eval()


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def convert(content, base, **settings):
    torch.save(content, "weights.pt")
    return convert_checkpoint("weights.pt", base, "out", **settings)


def loaded(folder):
    return CLIPForZeroShotClassification.from_pretrained(folder).eval()


def provenance(folder="out"):
    return json.loads(Path(folder, "provenance.json").read_text())


def token_ids(model):
    return model.processor.tokenizer(TEXTS, padding="max_length", max_length=32, return_tensors="pt").input_ids


@torch.no_grad()
def embeddings(model):
    """Of images and texts, by a converted model."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.encode_images(images), model.get_text_features(token_ids(model)).pooler_output


@torch.no_grad()
def expected(clip, model):
    """The same by the independent forward."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return clip.encode_image((images - model.image_mean) / model.image_std), clip.encode_text(token_ids(model))


def check(model, clip, base_model=None):
    """The text features are the base's where one is given."""
    found, (images, texts) = embeddings(model), expected(clip, model)
    wanted = images, texts if base_model is None else embeddings(base_model)[1]
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


def rounded(clip):
    """The same CLIP with the weights that a file of half precision holds."""
    own = copy.deepcopy(clip)
    own.load_state_dict({name: weight.float() for name, weight in halved(clip.state_dict()).items()})
    return own


# ---- every layout


ROWS = [*zip(FILES, 4 * ("quick_gelu", "gelu"), strict=True), ("open_clip_training", "quick_gelu"), ("tecoa", "gelu")]


@pytest.mark.parametrize(("name", "activation"), ROWS)
def test_features_are_those_of_the_files_own_architecture(name, activation, base, base_model):
    content, whole = FILES[name](CLIP[activation]), name.startswith("open")
    folder = convert(content, base, activation=None if activation == "quick_gelu" else activation)
    half = name in ("openai", "visual", "agft")
    clip = rounded(CLIP[activation]) if half else CLIP[activation]
    model = loaded(folder)
    check(model, clip, None if whole else base_model)
    assert model.dtype == torch.float32 == CLIPModel.from_pretrained(folder).dtype
    assert model.config.vision_config.hidden_act == activation
    assert model.config.text_config.hidden_act == (activation if whole else "quick_gelu")
    scale = clip.logit_scale if whole else base_model.logit_scale
    assert model.logit_scale.item() == scale.item()
    assert provenance()["source"]["dtypes"][0] == ("float16" if half else "float32")


def test_safetensors_of_open_clip_are_read_with_the_config_beside_them(base):
    vision = {"width": 16, "head_width": 8, "layers": 2, "image_size": 8, "patch_size": 2}
    model = {"quick_gelu": True, "vision_cfg": vision, "text_cfg": {"width": 16, "heads": 2, "layers": 2}}
    preparation = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    Path("repo").mkdir()
    save_file(CLIP["quick_gelu"].state_dict(), "repo/open_clip_model.safetensors")
    torch.save({}, "repo/open_clip_pytorch_model.bin")  # the same weights once more, as open_clip publishes them

    def run(content=None, **settings):
        Path("repo/open_clip_config.json").write_text(
            json.dumps(content or {"model_cfg": model, "preprocess_cfg": preparation})
        )
        return convert_checkpoint("repo", base, "out", overwrite=True, **settings)

    check(loaded(run()), CLIP["quick_gelu"])
    assert "open_clip_config.json" in provenance()["activation"]["why"]
    with pytest.raises(ValueError, match="activation"):  # open_clip takes gelu where nothing is said
        run({"model_cfg": {**model, "quick_gelu": None}})
    assert (
        loaded(run({"model_cfg": {**model, "quick_gelu": None}}, activation="gelu")).config.text_config.hidden_act
        == "gelu"
    )
    with pytest.raises(ValueError, match="normalisation"):
        run({"model_cfg": model, "preprocess_cfg": {**preparation, "mean": IMAGENET}})
    with pytest.raises(ValueError, match="heads"):
        run({"model_cfg": {**model, "vision_cfg": {**vision, "head_width": 4}}})
    with pytest.raises(ValueError, match="pool_type"):
        run({"model_cfg": {**model, "vision_cfg": {**vision, "pool_type": "avg"}}})


def hugging_face(folder, base_model, vision_act="gelu", **changes):
    """A folder as LEAF's: weights and config alone."""
    own = CLIPModel.from_pretrained(base_model.name_or_path)
    own.config.vision_config.hidden_act = vision_act
    with torch.no_grad():
        own.visual_projection.weight.mul_(2.0)
    own.save_pretrained(folder)
    file = Path(folder, "config.json")
    content = json.loads(file.read_text())
    for part in ("vision_config", "text_config"):
        content[part].update(changes)
        content[part] = {name: value for name, value in content[part].items() if value is not None}
    file.write_text(json.dumps(content))
    return CLIPModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("pickled", [False, True])
def test_a_folder_of_transformers_gets_the_processor_that_it_lacks(pickled, base, base_model):
    own = hugging_face("theirs", base_model)
    if pickled:
        torch.save(load_file("theirs/model.safetensors"), "theirs/pytorch_model.bin")
        Path("theirs/model.safetensors").unlink()
    model = loaded(convert_checkpoint("theirs", base, "out"))
    found = embeddings(model)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = own.get_image_features((images - model.image_mean) / model.image_std).pooler_output
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-5)
    assert model.config.vision_config.hidden_act == "gelu"
    assert CLIPProcessor.from_pretrained("out").image_processor.crop_size["height"] == 8
    with pytest.raises(ValueError, match="activation"):
        convert_checkpoint("theirs", base, "other", activation="quick_gelu")


def test_a_config_without_activation_is_not_taken_for_quick_gelu(base, base_model, tmp_path):
    other = base_in(tmp_path / "gelu")
    config = json.loads(Path(other, "config.json").read_text())
    for part in ("vision_config", "text_config"):
        config[part]["hidden_act"] = "gelu"
    Path(other, "config.json").write_text(json.dumps(config))
    hugging_face("theirs", base_model, hidden_act=None)
    assert loaded(convert_checkpoint("theirs", base, "same")).config.text_config.hidden_act == "quick_gelu"
    with pytest.raises(ValueError, match="activation"):
        convert_checkpoint("theirs", other, "out")
    folder = convert_checkpoint("theirs", other, "out", activation="gelu")
    assert loaded(folder).config.text_config.hidden_act == "gelu"


def test_prompts_of_a_trainer_become_an_adapter_of_the_base(base, base_model):
    count = len(base_model.processor.tokenizer("a photo of a", add_special_tokens=False).input_ids)
    context = 0.5 * torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
    learner = {"prompt_learner.ctx": context, **texts(base_model, "a photo of a", ["cat", "dog"], count)}
    file = {"state_dict": learner, "epoch": 50, "optimizer": None, "val_result": None}
    folder = convert(file, base)
    model = load_model(str(folder))
    (layer,) = [own for name, own in model.state_dict().items() if "clip_prompt_tokens" in name]
    assert torch.equal(layer, context)
    assert provenance()["layout"] == "prompt_learner" and card_state("out/README.md") == "unmeasured"
    assert trained_templates("out") == ("a photo of a {}.",)
    with pytest.raises(ValueError, match="activation"):
        convert(file, base, activation="gelu", overwrite=True)
    convert({"state_dict": {"prompt_learner.ctx": context}}, base, overwrite=True)  # without the texts
    with pytest.raises(ValueError, match="give template"):
        trained_templates("out")
    assert "doesn't tell the texts" in Path("out/README.md").read_text()


# ---- what no file tells


@pytest.mark.parametrize(
    ("asked", "mean"), [("imagenet", IMAGENET), ("0.5,0.25", [0.5] * 3), ("0.1,0.2,0.3;0.4,0.5,0.6", [0.1, 0.2, 0.3])]
)
def test_normalisation_as_it_was_given(asked, mean, base):
    folder = convert(visual(CLIP["quick_gelu"]), base, normalisation=asked)
    assert list(CLIPProcessor.from_pretrained(folder).image_processor.image_mean) == mean
    assert list(loaded(folder).normalisation[0]) == mean
    assert provenance()["normalisation"]["mean"] == mean


def test_weights_that_were_not_trained_from_the_base_are_told(base, base_model, caplog):
    own = {**CLIP["quick_gelu"].visual.state_dict()}
    convert(own, base)
    assert "base" in caplog.text and abs(provenance()["likeness_to_base"]) < 0.1
    caplog.clear()
    save_file(base_model.state_dict(), "near.safetensors")
    convert_checkpoint("near.safetensors", base, "near")
    assert provenance("near")["likeness_to_base"] == 1.0 and not caplog.text


# ---- what comes out


def test_a_converted_folder_is_a_plain_clip_with_its_pipeline(base):
    folder = convert(FILES["openai"](CLIP["quick_gelu"]), base)
    classifier = pipeline("zero-shot-image-classification", model=str(folder))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    found = classifier(picture, candidate_labels=["cat", "dog"], hypothesis_template="a {}")
    model = loaded(folder)
    model.set_classes(["cat", "dog"], "a {}")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        own = model(pixels).logits.softmax(-1)[0].tolist()
    assert {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in found} == dict(
        zip(["cat", "dog"], own, strict=True)
    )


def test_provenance_and_card_say_where_it_is_from(base):
    import hashlib

    folder = convert(tecoa(CLIP["quick_gelu"]), base)
    told = provenance()
    file = told["source"]["files"][0]
    assert file["sha256"] == hashlib.sha256(Path("weights.pt").read_bytes()).hexdigest()
    assert told["layout"] == "tecoa" and told["base"]["name"] == "base"
    left_out = {"epoch", "optimizer", "state_dict", "add_prompter", "best_acc1", "best_robust"}
    assert set(told["source"]["left_out"]) == left_out
    card = (folder / "README.md").read_text()
    assert re.fullmatch(r"[0-9a-f]{16}", told["base"]["weights"]) and told["base"]["weights"] in card
    assert file["sha256"] in card and "license" not in card.split("\n---")[0] and "model-index" not in card
    assert card_state(folder / "README.md") == "unmeasured"
    assert named_base(folder) is None  # a folder on this disk, which others don't have
    for name in ("README.md", "provenance.json", "config.json"):
        assert str(Path.cwd()) not in (folder / name).read_text() and base not in (folder / name).read_text()


def test_a_replaced_folder_keeps_nothing_of_what_was_there(base):
    convert(visual(CLIP["quick_gelu"]), base)
    Path("out/report.json").write_text("{}")
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(OSError, match="output_dir"):
        convert(visual(CLIP["gelu"]), base)
    convert(visual(CLIP["gelu"]), base, activation="gelu", overwrite=True)
    assert not Path("out/report.json").exists() and Path("out/mine.txt").read_text() == "mine"
    assert loaded("out").config.vision_config.hidden_act == "gelu"
    Path("out/README.md").write_text("my own words")
    with pytest.raises(OSError, match=r"README\.md"):
        convert(visual(CLIP["gelu"]), base, overwrite=True)


# ---- the command


def test_the_command_says_what_it_took_and_evaluate_runs_on_the_result(base, capsys, fresh_accelerate):
    torch.save(tecoa(CLIP["gelu"]), "tecoa.pth.tar")
    main(["convert", "tecoa.pth.tar", "--base", base, "--output_dir", "out", "--activation", "gelu"])
    out = capsys.readouterr().out
    for word in ("tecoa", "gelu", "--activation", "processor"):
        assert word in out
    words = ["--dataset_name", "digits", "--max_images", "2", "--evaluation.attacks", "[pgd-1]", "--use_cpu",
             "--evaluation.radii", "[1/255]", "--output_dir", "report"]  # fmt: skip
    main(["evaluate", "--model_name_or_path", "out", *words])
    assert Path("report/report.json").is_file()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["weights.pt", "--base", "BASE"], "output_dir"),
        (["--base", "BASE", "--output_dir", "out"], "source"),
        (["./nowhere.pt", "--base", "BASE", "--output_dir", "out"], "source"),
        (["weights.pt", "--base", "BASE", "--output_dir", "out", "--activatoin", "gelu"], "--activatoin"),
        (["weights.pt", "--base", "BASE", "--output_dir", "out", "--activation", "relu"], "activation"),
        (["weights.pt", "--base", "BASE", "--output_dir", "out", "--layout", "fare"], "layout"),
        (["weights.pt", "--base", "BASE", "--output_dir", "out", "--normalisation", "1,2,3"], "normalisation"),
        (["weights.pt", "--base", "BASE", "--output_dir", "out", "--normalisation", "123.7,58.4"], "normalisation"),
        (["weights.pt", "--base", "BASE", "--output_dir", "out", "--source_revision", "v1"], "source_revision"),
        (["weights.pt", "--base", "BASE", "--output_dir", "out", "--base_revision", "v1"], "base_revision"),
        (["weights.pt", "--base", "BASE", "--output_dir", "out", "--source_file", "a.pt"], "source_file"),
        (["weights.pt", "--base", "BASE", "--output_dir", "weights.pt"], "output_dir"),
        (["weights.pt", "--base", "BASE", "--output_dir", "BASE", "--overwrite"], "output_dir"),
        (["weights.pt", "--base", "nowhere/", "--output_dir", "out"], "nowhere"),
    ],
)
def test_a_wrong_setting_is_one_line(words, named, base, capsys):
    torch.save(visual(CLIP["quick_gelu"]), "weights.pt")
    with pytest.raises(SystemExit) as ended:
        main(["convert", *(word.replace("BASE", base) for word in words)])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and named in error and "\n" not in error, error
    assert not Path("out").exists()


# ---- weights that are refused


def without(name):
    return lambda own: {key: value for key, value in own.items() if key != name}


def changed(**tensors):
    return lambda own: own | {name.replace("__", "."): value for name, value in tensors.items()}


WRONG: dict = {  # of an image tower: what is done to it, and what the error names
    "missing": (without("ln_post.bias"), "post_layernorm.bias"),
    "missing_projection": (without("proj"), "visual_projection"),
    "missing_part_of_attention": (without("transformer.resblocks.1.attn.in_proj_weight"), "layers.1.self_attn.q_proj"),
    "extra": (changed(attn_pool__query=torch.zeros(2)), "attn_pool.query"),
    "extra_layer": (changed(transformer__resblocks__2__ln_1__bias=torch.zeros(16)), "layers.2.layer_norm1"),
    "duplicate_tower": (lambda own: own | {f"tower.{name}": value for name, value in own.items()}, "tower."),
    "size": (changed(positional_embedding=torch.zeros(5, 16)), "position_embedding"),
    "attention_of_another_size": (changed(transformer__resblocks__0__attn__in_proj_bias=torch.zeros(50)), "in_proj"),
    "not_finite": (changed(ln_pre__bias=torch.full((16,), float("nan"))), "pre_layrnorm.bias"),
    "whole_numbers": (changed(ln_pre__bias=torch.zeros(16, dtype=torch.int8)), "pre_layrnorm.bias"),
    "visual_prompts": (changed(prompt_pos_embedding=torch.zeros(3, 16)), "prompt"),
    "clipa": (lambda own: {name: value for name, value in own.items() if "ln_pre" not in name}, "CLIPA"),
    "resnet": (lambda own: {"conv1.weight": own["conv1.weight"], "layer1.0.conv1.weight": torch.zeros(2)}, "RN50"),
    "nothing_known": (lambda own: {"encoder.weight": torch.zeros(2)}, "layout"),
}  # fmt: skip


@pytest.mark.parametrize("wrap", [lambda own: own, lambda own: {"vision_encoder_state_dict": own}], ids=["", "tecoa"])
@pytest.mark.parametrize("name", WRONG)
def test_image_towers_that_are_refused_by_name(name, wrap, base):
    change, named = WRONG[name]
    with pytest.raises((ValueError, UnfitWeights), match=re.escape(named)):
        convert(wrap(change(CLIP["quick_gelu"].visual.state_dict())), base)
    assert not Path("out").exists()


CLEAN = CLIP["quick_gelu"]
WHOLE, VISUAL, Z = CLEAN.state_dict(), CLEAN.visual.state_dict(), torch.zeros
WRONG_FILES: dict = {  # what a file holds, and what the error names
    "timm": ({"visual.trunk.stem.weight": Z(2), "token_embedding.weight": Z(2)}, "timm"),
    "siglip": ({"visual.trunk.x": Z(2), "logit_bias": Z(())}, "SigLIP"),
    "logit_bias": ({**WHOLE, "logit_bias": Z(())}, "logit_bias"),
    "prompter": (tecoa(CLEAN) | {"state_dict": {"module.pad_up": Z(1, 3, 2, 8)}}, "state_dict"),
    "token_prompts": (tecoa(CLEAN) | {"add_prompter": {"prompt": Z(1, 2, 16)}}, "add_prompter"),
    "agft_prompt": (FILES["agft"](CLEAN) | {"params": {"image_prompt": Z(1)}}, "params"),
    "other_weights_beside": (tecoa(CLEAN) | {"text_encoder": {"x": Z(3)}}, "text_encoder"),
    "scale_beside": (tecoa(CLEAN) | {"logit_scale": torch.tensor(4.6)}, "logit_scale"),
    "several": ({"state_dict": WHOLE, "vision_encoder_state_dict": VISUAL}, "layout"),
    "both_forms": ({**WHOLE, **VISUAL}, "layout"),
    "scale": ({**WHOLE, "logit_scale": torch.tensor(100.0)}, "logit_scale"),
    "context": ({**WHOLE, "context_length": torch.tensor(77)}, "context_length"),
    "vocabulary": ({**WHOLE, "token_embedding.weight": Z(9, 16)}, "token_embedding"),
    "half_a_text_tower": (without("text.ln_final.bias")(open_clip_text(CLEAN)), "final_layer_norm"),
    "no_names": (list(WHOLE.values()), "state_dict"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_are_refused_by_name(name, base):
    content, named = WRONG_FILES[name]
    with pytest.raises((ValueError, UnfitWeights), match=re.escape(named)):
        convert(content, base)
    assert not Path("out").exists()


def test_one_of_several_models_is_taken_where_it_is_asked_for(base):
    other = {name: 2 * own for name, own in WHOLE.items()}
    content = {"state_dict": other, "vision_encoder_state_dict": VISUAL}
    model = loaded(convert(content, base, layout="tecoa"))
    assert torch.equal(model.visual_projection.weight, CLIP["quick_gelu"].visual.proj.T)
    assert provenance()["source"]["left_out"] == ["state_dict"]
    with pytest.raises(ValueError, match="layout"):
        convert(content, base, layout="agft", overwrite=True)


def test_another_base_is_refused(tmp_path):
    other = base_in(tmp_path / "other", image_size=16)
    with pytest.raises(UnfitWeights, match="position_embedding"):
        convert(visual(CLIP["quick_gelu"]), other)
    assert not Path("out").exists()


def test_which_of_several_files_is_asked(base):
    Path("folder").mkdir()
    for name in ("epoch_1.pt", "epoch_2.pt"):
        torch.save(visual(CLIP["quick_gelu"]), Path("folder", name))
    with pytest.raises(ValueError, match="source_file"):
        convert_checkpoint("folder", base, "out")
    with pytest.raises(ValueError, match="source_file"):
        convert_checkpoint("folder", base, "out", source_file="epoch_3.pt")
    convert_checkpoint("folder", base, "out", source_file="epoch_2.pt")
    assert provenance()["source"]["files"][0]["file"] == "epoch_2.pt"
