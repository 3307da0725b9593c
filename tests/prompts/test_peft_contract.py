"""What PEFT promises of every method, over every design and every model that takes prompts."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_script import train_steps
from conftest import through_transformers_adapters
from hub_server import HubServer
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from prompted_clip import (
    NAMES,
    ROWS,
    TEMPLATE,
    TEXT_ROWS,
    _clip_config,
    _weights,
    make_base,
    make_config,
    make_images,
    make_prompted,
    prompt_parameters,
    randomise,
)
from safetensors.torch import load_file
from tiny import CONTEXT_LENGTH, make_processor
from tokenizers import pre_tokenizers
from torch.func import functional_call
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Trainer,
    TrainingArguments,
)

from hf_robust_clip.modeling import CLIPForZeroShotClassification
from hf_robust_clip.modeling.shared_prefix import end_positions
from hf_robust_clip.prompts import ClipPromptConfig, ClipPromptLayer

HERE = Path(__file__).parent
VISION_ROWS = [name for name, row in ROWS.items() if row["design"] in ("V", "pixel")]
T_ROWS = [name for name, row in ROWS.items() if row["design"] == "T"]
CASES = [
    pytest.param(cls, row, id=f"{cls.__name__}-{row}")
    for classes, rows in (
        ((CLIPForZeroShotClassification, CLIPModel), ROWS),
        ((CLIPVisionModel, CLIPVisionModelWithProjection), VISION_ROWS),
        ((CLIPTextModel, CLIPTextModelWithProjection), T_ROWS),
    )
    for cls in classes
    for row in rows
]
every_case = pytest.mark.parametrize(("cls", "row"), CASES)
every_row = pytest.mark.parametrize("row", ROWS)


def model_of(cls: type, seed: int = 0) -> torch.nn.Module:
    """A frozen random model of any class, with the weights of `make_base`."""
    if issubclass(cls, CLIPModel):
        return make_base(seed, cls=cls)
    tower = "vision" if "Vision" in cls.__name__ else "text"
    config = getattr(_clip_config(), f"{tower}_config")
    config.projection_dim = 12
    model = cls(config).double()
    weights = {
        name if "Projection" in cls.__name__ else name.removeprefix(f"{tower}_model."): value
        for name, value in _weights(seed).items()
        if name.startswith((f"{tower}_model.", "visual_projection." if tower == "vision" else "text_projection."))
    }
    model.load_state_dict(weights, strict="Projection" in cls.__name__)
    return model.requires_grad_(False).eval()


def settings(cls: type, row: str, **changes) -> ClipPromptConfig:
    """The row's config; a model without a tokenizer gets the token ids."""
    config = make_config(row, **changes)
    if cls is not CLIPForZeroShotClassification and config.context_init is not None:
        config.context_token_ids = make_processor().tokenizer("a bc d", add_special_tokens=False).input_ids
    return config


def output(model: torch.nn.Module) -> torch.Tensor:
    """Logits, or the features of a model with one tower."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(core, CLIPForZeroShotClassification):
        return model(pixel_values=make_images()).logits
    texts = make_processor().tokenizer(
        [TEMPLATE.replace("{}", name) for name in NAMES], padding=True, return_tensors="pt"
    )
    if isinstance(core, CLIPModel):
        return model(pixel_values=make_images(), **texts).logits_per_image
    found = model(pixel_values=make_images()) if hasattr(core.config, "patch_size") else model(**texts)
    name = next(name for name in ("image_embeds", "text_embeds", "pooler_output") if name in found)
    return found[name]


def prompted(cls: type, row: str, seed: int = 0, **changes) -> PeftModel:
    model = get_peft_model(model_of(cls), settings(cls, row, **changes))
    randomise(model, seed + 1)
    return model.eval()


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def without_prompts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer", ""): value for name, value in state.items() if "clip_prompt" not in name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wrappers(model: torch.nn.Module) -> list[ClipPromptLayer]:
    return [module for module in model.modules() if isinstance(module, ClipPromptLayer)]


def assert_near(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to the last digits: sums over weights read from a file may run in another order."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def assert_acts(a: torch.Tensor, b: torch.Tensor) -> None:
    """The prompts matter: otherwise an equality says nothing."""
    assert (a - b).abs().max() > 1e-3


@every_case
def test_only_prompts_learn_and_the_base_stays(cls, row):
    base = model_of(cls).requires_grad_(True)
    before = snapshot(base)
    model = get_peft_model(base, settings(cls, row))
    assert same(without_prompts(base.state_dict()), before)
    learned = prompt_parameters(model)
    assert learned and all("clip_prompt_" in name for name in learned)
    assert len(learned) == sum("clip_prompt_" in name for name in model.state_dict())
    start = {name: value.detach().clone() for name, value in learned.items()}
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    out = output(model)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learned), name
    for name, parameter in learned.items():
        assert parameter.grad.abs().max() > 1e-9, name
    optimiser.step()
    assert same(without_prompts(base.state_dict()), before)
    for name, parameter in learned.items():
        assert not torch.equal(parameter, start[name]), name


@every_case
def test_an_adapter_is_saved_in_kilobytes_and_loads_bit_for_bit(cls, row, tmp_path):
    model = prompted(cls, row)
    wanted = output(model)
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "CLIP_PROMPT" and written["design"] == ROWS[row]["design"]
    assert not {"target_modules", "places"} & written.keys()
    assert "/" not in (tmp_path / "adapter_config.json").read_text()  # no path of this machine
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = {name.replace(".default", ""): value for name, value in prompt_parameters(model).items()}
    assert same(saved, own)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000
    assert isinstance(PeftConfig.from_pretrained(tmp_path), ClipPromptConfig)

    loaded = PeftModel.from_pretrained(model_of(cls), tmp_path)
    assert_near(output(loaded), wanted)
    assert same(loaded.state_dict(), model.state_dict())
    assert not prompt_parameters(loaded)
    assert_acts(wanted, output(model_of(cls)))
    trainable = PeftModel.from_pretrained(model_of(cls), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    assert_near(output(trainable), wanted)
    assert prompt_parameters(trainable).keys() == prompt_parameters(model).keys()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a base checkpoint, and its classifier loaded from there."""
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    make_base().save_pretrained(folder)
    return folder


def load_base(folder: Path) -> CLIPForZeroShotClassification:
    model = CLIPForZeroShotClassification.from_pretrained(folder, dtype=torch.float64).eval()
    model.set_classes(NAMES, TEMPLATE)
    return model


def adapter_on(checkpoint: Path, row: str, folder: Path) -> torch.Tensor:
    """Save a random adapter of the checkpoint; returns its logits."""
    model = get_peft_model(load_base(checkpoint), make_config(row))
    randomise(model, 1)
    model.eval().save_pretrained(folder)
    return output(model).detach()


@every_row
@through_transformers_adapters()
def test_transformers_loads_an_adapter_by_itself(checkpoint, row, tmp_path):
    wanted = adapter_on(checkpoint, row, tmp_path)
    model = load_base(checkpoint)
    model.load_adapter(tmp_path)
    assert_near(output(model), wanted)
    model.disable_adapters()
    assert_near(output(model), output(make_base()))
    model.enable_adapters()
    assert_near(output(model), wanted)
    plain = CLIPModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    classifier = CLIPForZeroShotClassification.from_clip(plain, make_processor())
    classifier.set_classes(NAMES, TEMPLATE)
    assert_near(output(classifier), wanted)


@pytest.mark.parametrize("row", ["V", "VLI", "VLJ", "pixel-border"])
def test_an_adapter_folder_loads_as_a_classifier(checkpoint, row, tmp_path):
    wanted = adapter_on(checkpoint, row, tmp_path)
    model = CLIPForZeroShotClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    model.set_classes(NAMES, TEMPLATE)
    assert_near(output(model), wanted)


@pytest.fixture(scope="module")
def shelf(checkpoint):
    """Adapters beside their base, each with its state, its logits and what they were computed from."""
    for row in ("VLI", "VLJ", "pixel-border"):
        model = get_peft_model(load_base(checkpoint), make_config(row))
        randomise(model, 1)
        model.eval().save_pretrained(checkpoint.parent / row)
        found = {"state": model.state_dict(), "logits": output(model).detach(), "images": make_images()}
        torch.save({**found, "names": NAMES, "template": TEMPLATE}, checkpoint.parent / f"{row}.pt")
    return checkpoint.parent


@pytest.fixture(scope="module")
def children(shelf):
    """Three processes of their own, one thread each; two of them are also the two ranks of a training run."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "RANK", "MASTER", "WORLD"))}
    clean |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with HubServer() as server:
        hub = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_dummy", "HF_HUB_OFFLINE": "0",
               "HF_HOME": str(shelf / "home"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip
        running = {
            name: subprocess.Popen(
                [sys.executable, str(HERE / "child_script.py"), name, str(shelf)],
                env={**clean, **(hub if name == "peft_first" else {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in ("package_first", "peft_first", "strange")
        }
        try:
            said = {name: (*process.communicate(timeout=200), process.returncode) for name, process in running.items()}
        finally:
            for process in running.values():
                process.kill()
    for name in ("package_first", "peft_first"):
        assert said[name][2] == 0, said[name][1][-3000:]
    return said, server.repos, shelf


@pytest.mark.parametrize("first", ["package_first", "peft_first"])
def test_another_process_loads_adapters_whichever_package_comes_first(children, first):
    assert children[0][first][0].splitlines()[-1] == "9 equal"


def test_without_this_package_peft_names_the_method_it_lacks(children):
    printed, errors, code = children[0]["strange"]
    assert code == 1
    assert errors.splitlines()[-1] == "KeyError: 'CLIP_PROMPT'"
    assert printed.splitlines() == ["KeyError('CLIP_PROMPT')"] * 2


def test_an_adapter_goes_to_the_hub_and_back(children):
    """What comes back is compared in the child, as a `PeftModel` and as transformers loads it."""
    files = children[1]["user/adapter"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/base"
    assert len(files["adapter_model.safetensors"]) < 20_000


@pytest.mark.parametrize("row", ["VLI", "VLJ"])
def test_two_processes_train_what_one_does(children, row):
    """Two real processes on half of every batch each: bitwise one model, and that of one process on whole batches."""
    found = [torch.load(children[2] / "ranks" / f"{row}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(*found)
    start, alone = prompt_parameters(make_prompted(row)), train_steps(row, 0, 1)
    for name, value in alone.items():
        assert not torch.equal(start[name], value)
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-10)


@every_case
def test_switched_off_it_is_the_base_and_on_again_the_prompts_act(cls, row):
    model, wanted = prompted(cls, row), output(model_of(cls))
    with_prompts = output(model)
    assert_acts(with_prompts, wanted)
    with model.disable_adapter():
        assert torch.equal(output(model), wanted)
    assert torch.equal(output(model), with_prompts)
    assert prompt_parameters(model)


@every_case
def test_unload_gives_the_base_back(cls, row):
    model, fresh = prompted(cls, row), model_of(cls)
    wanted = output(fresh)
    output(model)
    base = model.unload()
    assert type(base) is cls and not wrappers(base)
    assert same(base.state_dict(), fresh.state_dict())
    assert [name for name, _ in base.named_modules()] == [name for name, _ in fresh.named_modules()]
    assert torch.equal(output(base), wanted)
    again = get_peft_model(base, settings(cls, row))
    randomise(again, 1)
    assert torch.equal(output(again), output(prompted(cls, row)))


@every_case
def test_merging_is_refused_and_harms_nothing(cls, row):
    model = prompted(cls, row)
    wanted, state = output(model), snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"prompts can't be merged into the weights.* unload\(\)"):
            merge()
        assert torch.equal(output(model), wanted)
        assert same(model.state_dict(), state)
    with pytest.raises(ValueError, match="can't be merged"):
        wrappers(model)[0].merge()
    model.unmerge_adapter()
    assert torch.equal(output(model), wanted)


PAIRS = [
    pytest.param(a, b, id=f"{a}+{b}")
    for a, b in [*((row, row) for row in ROWS), ("V", "T"), ("T", "VLI"), ("VLJ", "VLI"), ("VLJ", "VLJ-vision"),
                 ("pixel-border", "pixel-full"), ("pixel-border", "V"), ("V-shallow", "V"), ("T-shallow", "T-random")]
]  # fmt: skip


def active_layers(model: PeftModel) -> set[tuple[str, ...]]:
    return {tuple(layer.active_adapters) for layer in wrappers(model)}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_adapters_take_turns(first, second, tmp_path):
    alone = {"a": prompted(CLIPForZeroShotClassification, first, 10),
             "b": prompted(CLIPForZeroShotClassification, second, 20)}  # fmt: skip
    wanted = {name: output(model) for name, model in alone.items()}
    assert_acts(wanted["a"], wanted["b"])
    for name, model in alone.items():
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(make_base(), tmp_path / "a", adapter_name="a")
    assert_near(output(model), wanted["a"])
    model.load_adapter(tmp_path / "b", adapter_name="b")
    assert not prompt_parameters(model)
    assert_near(output(model), wanted["a"])
    for name in ("b", "a", "b"):
        model.set_adapter(name)
        assert_near(output(model), wanted[name])
        trained = prompt_parameters(model)
        assert len(trained) == len(prompt_parameters(alone[name]))
        assert all(f".{name}." in parameter + "." for parameter in trained)
        with model.disable_adapter():
            assert_near(output(model), output(make_base()))
    with pytest.raises(ValueError, match=r"adapter_name=\['a', 'b'\].* choose one"):
        model.base_model.set_adapter(["a", "b"])
    with pytest.raises(TypeError, match="list"):  # PEFT's own door takes one name
        model.set_adapter(["a", "b"])
    assert_near(output(model), wanted["b"])
    assert active_layers(model) == {("b",)}
    model.delete_adapter("b")
    assert_near(output(model), wanted["a"])
    assert active_layers(model) == {("a",)} and list(model.peft_config) == ["a"] and model.active_adapters == ["a"]
    assert not any(name.endswith(".b") or ".b." in name for name, _ in model.named_parameters())


def test_a_second_adapter_leaves_the_first_trainable_or_frozen_as_it_was(tmp_path):
    make_prompted("VLI").save_pretrained(tmp_path)
    model = make_prompted("VLJ")
    learned = prompt_parameters(model).keys()
    model.load_adapter(tmp_path, adapter_name="b")
    assert prompt_parameters(model).keys() == learned
    model.add_adapter("c", make_config("T"))
    assert prompt_parameters(model).keys() == learned
    frozen = PeftModel.from_pretrained(make_base(), tmp_path)
    frozen.add_adapter("b", make_config("V"))
    assert not prompt_parameters(frozen)


@pytest.mark.parametrize("order", [("v", "t", "both"), ("both", "t", "v"), ("t", "v", "both")])
def test_after_deleting_one_design_all_layers_follow_the_same_other(order):
    rows = {"v": "V", "t": "T", "both": "VLI"}
    model = get_peft_model(make_base(), make_config(rows[order[0]]), adapter_name=order[0])
    for name in order[1:]:
        model.add_adapter(name, make_config(rows[name]))
    for seed, name in enumerate(order):
        model.set_adapter(name)
        randomise(model, seed)
    model.set_adapter("both")
    output(model)
    model.delete_adapter("both")
    (left,) = {name for layer in wrappers(model) for name in layer.active_adapters}
    assert active_layers(model) == {(left,)} and model.active_adapters == [left]
    found = output(model)
    model.set_adapter(left)
    assert torch.equal(output(model), found)
    model.delete_adapter(left)
    (last,) = model.peft_config
    assert active_layers(model) == {(last,)}
    model.delete_adapter(last)
    assert torch.equal(output(model.base_model.model), output(make_base()))


@through_transformers_adapters()
def test_transformers_refuses_two_active_adapters_in_the_forward(checkpoint, tmp_path):
    for name in ("a", "b"):
        adapter_on(checkpoint, "VLI", tmp_path / name)
    model = load_base(checkpoint)
    model.load_adapter(tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"2 prompt adapters are active \(a, b\)"):
        output(model)
    model.set_adapter("a")
    assert torch.isfinite(output(model)).all()


def frozen_text(row: str) -> PeftModel:
    """Prompts that are not trained, so that class embeddings are cached, with the cache filled."""
    model = make_prompted(row)
    model.requires_grad_(False)
    output(model)
    return model


def fresh(model: PeftModel) -> torch.Tensor:
    """The logits with class embeddings computed now, past any cache."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    features = core.get_image_features(pixel_values=(make_images() - core.image_mean) / core.image_std).pooler_output
    return core.logit_scale.exp() * (F.normalize(features, dim=-1) @ core.encode_classes().T)


@pytest.mark.parametrize("row", TEXT_ROWS)
def test_cached_class_embeddings_are_never_stale(row, tmp_path):
    near = dict(rtol=0, atol=1e-12)
    model = frozen_text(row)
    core = model.get_base_model()
    seen = [output(model)]

    def changed(back_to: int | None = None) -> None:
        found = output(model)
        torch.testing.assert_close(found, fresh(model), **near)
        if back_to is not None:
            assert torch.equal(found, seen[back_to])
            return
        for other in seen:
            assert_acts(found, other)
        seen.append(found)

    assert not core.text_is_trainable()
    with model.disable_adapter():
        model.requires_grad_(False)
        changed()
    model.requires_grad_(False)
    changed(back_to=0)
    make_prompted(row, seed=0).save_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if "clip_prompt_" in name:
                parameter.mul_(1.5)
    changed()
    own = {name: 0.7 * value for name, value in model.named_parameters() if "clip_prompt_" in name}
    with torch.no_grad():
        found = functional_call(model, own, (), {"pixel_values": make_images()}).logits
        assert_acts(found, seen[-1])
        changed(back_to=2)
        again = functional_call(model, own, (), {"pixel_values": make_images()}).logits
        assert torch.equal(found, again)
    changed(back_to=2)
    model.add_adapter("b", make_config(row, num_text_tokens=1, num_vision_tokens=1))
    model.requires_grad_(False)
    changed(back_to=2)
    model.base_model.set_adapter("b", inference_mode=True)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if "clip_prompt_" in name and (".b." in name + "."):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    changed()
    model.delete_adapter("b")
    model.requires_grad_(False)
    changed(back_to=2)
    model.load_adapter(tmp_path, adapter_name="default")
    changed(back_to=0)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items() if "clip_prompt_" in name},
                          strict=False)  # fmt: skip
    changed()
    model = model.unload()
    changed(back_to=1)


@pytest.mark.parametrize("leave", ["delete_adapter", "unload", "disable_adapter_layers", "add_adapter"])
def test_compiled_code_sees_what_comes_in_by_every_door_of_peft(leave):
    model = frozen_text("T")
    core = model.get_base_model()
    compiled = torch.compile(core, backend="eager")
    before = compiled(pixel_values=make_images()).logits
    arguments = {"delete_adapter": ["default"], "add_adapter": ["b", make_config("T", num_text_tokens=1)]}
    getattr(model if leave in ("delete_adapter", "add_adapter") else model.base_model, leave)(
        *arguments.get(leave, [])
    )
    if leave == "add_adapter":
        model.base_model.set_adapter("b", inference_mode=True)
    after = compiled(pixel_values=make_images()).logits
    assert_acts(after, before)
    assert_near(after, fresh(core))


MIXABLE = [row for row in ROWS if ROWS[row]["design"] != "VLJ"]


@pytest.mark.parametrize("row", MIXABLE)
def test_weighted_adapters_are_the_weighted_sum(row):
    model = make_prompted(row)
    model.add_adapter("b", make_config(row))
    model.set_adapter("b")
    randomise(model, 7)
    model.set_adapter("default")
    before, active, learned = output(model), model.active_adapters, prompt_parameters(model).keys()
    model.add_weighted_adapter(["default", "b"], [0.25, -2.0], "mixed")
    assert torch.equal(output(model), before) and model.active_adapters == active
    assert prompt_parameters(model).keys() == learned
    for layer in wrappers(model):
        own = layer.clip_prompt_tokens
        torch.testing.assert_close(own["mixed"], 0.25 * own["default"] - 2 * own["b"], rtol=0, atol=1e-14)
    model.add_weighted_adapter(["b"], [1.0], "twin")
    model.set_adapter("b")
    wanted = output(model)
    model.set_adapter("twin")
    assert torch.equal(output(model), wanted)
    assert all(".twin" in name for name in prompt_parameters(model))
    model.set_adapter("mixed")
    assert_acts(output(model), wanted)


NOTHING = {
    "V-tokens": dict(design="V", num_vision_tokens=0),
    "V-depth": dict(design="V", vision_depth=0),
    "T-tokens": dict(design="T", num_text_tokens=0, text_depth=3),
    "T-depth": dict(design="T", text_depth=0),
    "VLI-tokens": dict(design="VLI", num_vision_tokens=0, num_text_tokens=0, vision_depth=2, text_depth=3),
    "VLI-depth": dict(design="VLI", vision_depth=0, text_depth=0),
    "VLJ-tokens": dict(design="VLJ", num_vision_tokens=0, num_text_tokens=0, vision_depth=3, text_depth=3),
    "VLJ-depth": dict(design="VLJ", vision_depth=0, text_depth=0),
    "VLJ-vision-tokens": dict(design="VLJ", num_vision_tokens=0, num_text_tokens=0, vision_depth=2, text_depth=2,
                              coupling="vision_to_text"),
}  # fmt: skip


@pytest.mark.parametrize("cls", [CLIPForZeroShotClassification, CLIPModel])
@pytest.mark.parametrize("row", NOTHING)
def test_no_tokens_or_no_depth_is_the_base(cls, row, tmp_path):
    config = {"vision_depth": 3, "text_depth": 3, "context_init": None, **NOTHING[row]}
    model = get_peft_model(model_of(cls), ClipPromptConfig(**config))
    wanted = output(model_of(cls))
    assert_near(output(model), wanted)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_of(cls), tmp_path)
    assert_near(output(loaded), wanted)
    assert_near(output(model.unload()), wanted)


def test_one_tower_of_two_may_have_no_prompts():
    """VLI without text prompts is V, and without vision prompts T, whatever the words."""
    wanted = make_prompted("V", context_init=None)
    model = get_peft_model(
        make_base(),
        make_config(
            "VLI",
            vision_depth=3,
            text_depth=0,
            num_vision_tokens=2,
            context_init="unknown words \u2603 of any length, see " * 5,
        ),
    )
    randomise(model, 1)
    state = {name: value for name, value in wanted.state_dict().items() if "clip_prompt" in name}
    model.load_state_dict(state, strict=False)
    assert torch.equal(output(model), output(wanted))


@pytest.mark.parametrize("row", ["V", "VLJ", "T", "pixel-full"])
def test_modules_to_save_train_and_load(row, tmp_path):
    model = get_peft_model(make_base(), make_config(row, modules_to_save=["visual_projection"]))
    randomise(model, 1)
    names = [name for name in prompt_parameters(model) if "visual_projection" in name]
    assert names == ["base_model.model.visual_projection.modules_to_save.default.weight"]
    out = output(model)
    out.square().sum().backward()
    assert prompt_parameters(model)[names[0]].grad.abs().max() > 1e-6
    model.save_pretrained(tmp_path)
    assert "base_model.model.visual_projection.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert_near(output(loaded), out)
    with loaded.disable_adapter():
        assert_near(output(loaded), output(make_base()))


@every_row
def test_a_copy_is_independent(row):
    model = make_prompted(row)
    wanted = output(model)
    other = copy.deepcopy(model)
    assert torch.equal(output(other), wanted)
    own = {id(module) for module in other.modules()}
    for layer in wrappers(other):
        assert all(id(partner) in own for partner in layer.partner)
    randomise(other, 50)
    assert torch.equal(output(model), wanted)
    changed = output(other)
    assert_acts(changed, wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(output(other), changed)
    output(other).sum().backward()
    assert all(parameter.grad is not None for parameter in prompt_parameters(other).values())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (dict(design="V"), 13_824),
        (dict(design="VLI"), 23_040),
        (dict(), 23_040),
        (dict(design="VLJ"), 3_555_072),
        (dict(design="VLJ", coupling="vision_to_text"), 2 * 512 + 8 * 2 * 768 + 9 * (512 * 768) + 768 + 8 * 512),
        (dict(design="T", num_text_tokens=4, text_depth=1), 2_048),
        (dict(design="pixel"), 3 * 4 * 30 * (224 - 30)),
        (dict(design="pixel", pixel_region="full"), 3 * 224 * 224),
    ],
)
def test_parameters_at_the_size_of_vit_b_16(settings, count):
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config=dict(patch_size=16)))
    model = get_peft_model(clip, ClipPromptConfig(context_token_ids=[320, 1125, 539, 320], **settings))
    assert model.get_nb_trainable_parameters()[0] == count


def joint_data(size: int = 8) -> list[dict]:
    images = make_images(size, seed=4)
    return [{"pixel_values": image, "labels": i % len(NAMES)} for i, image in enumerate(images)]


@pytest.mark.parametrize("row", ["VLI", "VLJ", "pixel-border"])
def test_the_stock_trainer_trains_and_resumes(row, tmp_path):
    arguments = dict(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=0.1, save_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="steps", logging_steps=1, seed=0,
    )  # fmt: skip

    def trainer():
        torch.manual_seed(0)
        model = get_peft_model(make_base(), make_config(row))
        return Trainer(model, TrainingArguments(**arguments), train_dataset=joint_data())

    first = trainer()
    start = snapshot(first.model)
    first.train()
    end = first.model.state_dict()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == prompt_parameters(first.model).keys()
    folder = tmp_path / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(make_base(), folder)
    assert_near(output(loaded), output(first.model.eval()))
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(second.model.state_dict(), end)


WORDS = ("photo", "of", "itap", "my", "art", "the", "this", "is", "cat", "dog's", "jack", "lantern")


def word_processor() -> CLIPProcessor:
    """Byte-pair encoding that makes one token of each of some words, and several of all others."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], start=2):
            right = letter + ("</w>" if i == len(word) else "")
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT_LENGTH
    )
    return CLIPProcessor(make_processor().image_processor, tokenizer)


def word_base() -> CLIPForZeroShotClassification:
    """`make_base` with a vocabulary of words."""
    processor, config = word_processor(), _clip_config()
    text = config.text_config
    text.vocab_size = len(processor.tokenizer)
    text.bos_token_id, text.eos_token_id = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip = CLIPModel(config).double().requires_grad_(False).eval()
        for parameter in clip.parameters():
            if parameter.dim():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return CLIPForZeroShotClassification.from_clip(clip, processor)


ODD_NAMES = ("cat", "dog's", "jack-o'-lantern", "a", "naïve café", "日本", "x, y & z!", "cat, art of the", "3.14")
CONTEXTS = ("a photo of a", "itap of my", "art, of", "a_photo_of_a", "this is a photo-", "of the dog's", "A Photo  of")


@pytest.mark.parametrize("context", CONTEXTS)
def test_context_ids_are_those_of_the_words_inside_the_prompt(context):
    base = word_base()
    tokenizer = base.processor.tokenizer
    config = ClipPromptConfig(design="T", num_text_tokens=2, text_depth=1, context_init=context)
    model = get_peft_model(base, config)
    words = context.replace("_", " ")
    ids = config.context_token_ids
    assert (
        len(ids) >= 2 and tokenizer.decode(ids).split() == tokenizer.decode(tokenizer(words).input_ids[1:-1]).split()
    )
    for name in ODD_NAMES:
        whole = tokenizer(f"{words} {name}.").input_ids
        assert whole[1 : 1 + len(ids)] == ids
    (prompts,) = prompt_parameters(model).values()
    table = base.text_model.embeddings.token_embedding.base_layer.weight
    assert torch.equal(prompts, table[ids[:2]])
    assert not any(
        a is b for a in (prompts,) for b in base.text_model.embeddings.token_embedding.base_layer.parameters()
    )


def test_frequent_words_are_single_tokens_here():
    """What the tests above rest on: the tokenizer is one of words, and tells words from their parts."""
    tokenizer = word_processor().tokenizer
    ids = tokenizer("a photo of a cat", add_special_tokens=False).input_ids
    assert len(ids) == 5 and ids[0] == ids[3] and len(set(ids)) == 4
    assert len(tokenizer("photograph", add_special_tokens=False).input_ids) > 1


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("count", [1, 3])
def test_prompts_that_start_as_words_change_nothing_yet(context, count):
    words = context.replace("_", " ")
    model = word_base()
    tokenizer = model.processor.tokenizer
    spare = CONTEXT_LENGTH - len(tokenizer(f"{words} x.").input_ids)
    names = (*ODD_NAMES, "x " * spare + "x")
    assert len(tokenizer(f"{words} {names[-1]}.").input_ids) == CONTEXT_LENGTH
    templates = [f"{words} {{}}.", f"{words} {{}} "]
    model.set_classes(names, templates)
    wanted, images = model.class_embeds.clone(), make_images()
    logits = model(pixel_values=images).logits
    model = get_peft_model(model, ClipPromptConfig(design="T", num_text_tokens=count, text_depth=1,
                                                   context_init=context))  # fmt: skip
    core = model.get_base_model()
    assert torch.equal(core.encode_classes(), wanted)
    assert torch.equal(model(pixel_values=images).logits, logits)
    torch.testing.assert_close(core.encode_classes(shared_prefix=False), wanted, rtol=0, atol=1e-12)
    assert_acts(wanted[0], wanted[1])


def test_prompts_start_small_and_different():
    """Random ones follow N(0, init_std^2), maps as `nn.Linear` starts, and a picture at 0."""
    torch.manual_seed(0)
    values = torch.cat([
        value.detach().flatten()
        for name, value in prompt_parameters(
            get_peft_model(make_base(), make_config("VLI", context_init=None, init_std=0.3))
        ).items()
    ])  # fmt: skip
    assert len(values) == 3 * 20 * 2 + 2 * 16 * 3
    assert values.std().item() == pytest.approx(0.3, rel=0.2) and len(values.unique()) == len(values)
    assert not next(iter(prompt_parameters(get_peft_model(make_base(), make_config("pixel-full"))).values())).any()


def test_lora_beside_it_works_as_before():
    """The registration leaves PEFT's own methods alone."""
    model = get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with_lora = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(make_base()))
    torch.testing.assert_close(output(model.merge_and_unload()), with_lora, rtol=0, atol=1e-8)


def test_words_that_prompts_replace_may_differ():
    """Templates that differ only where prompts stand share their prefix all the same."""
    core = make_prompted("VLI").get_base_model()
    core.set_classes(NAMES, ["a bc d {}.", "x yz d {}"])
    ids = core.class_token_ids[:, :, 1:3]
    assert (ids[:, 0] != ids[:, 1]).any() and core.context_length >= 2
    assert_near(core.encode_classes(), core.encode_classes(shared_prefix=False))


def test_texts_end_where_transformers_pools_them():
    ids = torch.tensor([[1, 7, 4, 5, 5], [1, 5, 7, 5, 4]])
    assert end_positions(ids, 5).tolist() == [3, 1]
    for old in (None, 2):
        assert end_positions(ids, old).tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_watched_layer_is_called_as_a_whole(kind):
    core, calls = make_base(), []
    wanted = core.encode_classes()
    getattr(core.text_model.encoder.layers[2], kind)(lambda *args: calls.append(1))
    assert_near(core.encode_classes(), wanted)
    assert calls == [1]


def test_attention_dropout_acts_in_training_only():
    core = make_base()
    for layer in core.text_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    assert torch.equal(core.encode_classes(), make_base().class_embeds)
    core.train()
    assert_acts(core.encode_classes(), core.encode_classes())


def test_prompts_and_words_may_fill_the_context():
    words = "a " * (CONTEXT_LENGTH - 3)
    config = ClipPromptConfig(design="T", num_text_tokens=CONTEXT_LENGTH - 3, text_depth=1, context_init=words)
    base = make_base()
    base.set_classes(("x", "y"), words + "{}")
    wanted = output(base)
    assert base.class_token_ids.shape[2] == CONTEXT_LENGTH
    model = get_peft_model(base, config)
    assert torch.equal(output(model), wanted)
    base.set_classes(("x", "y"), words + "{}")
    assert torch.equal(output(model), wanted)


def test_a_refused_merge_keeps_modules_to_save_in_their_place():
    """The module comes before the first prompts in the walk that would take all wrappers off."""
    model = get_peft_model(make_base(), make_config("V", modules_to_save=["final_layer_norm"]))
    randomise(model, 1)
    wanted, names = output(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="can't be merged"):
        model.merge_and_unload()
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(output(model), wanted)
