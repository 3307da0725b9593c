"""Every wrong argument ends in one error that names it, its value and the mend, and changes nothing."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from prompted_clip import (
    NAMES,
    TEMPLATE,
    make_base,
    make_config,
    make_images,
    make_prompted,
    prompt_parameters,
    randomise,
)
from test_peft_contract import model_of, output, snapshot, wrappers
from tiny import CONTEXT_LENGTH, make_processor
from torch import nn
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from hf_robust_clip.modeling import CLIPForZeroShotClassification
from hf_robust_clip.prompts import ClipPromptConfig

SMALL = dict(vision_depth=3, text_depth=3, context_init=None)


class Unchanged:
    """A model's state before, to be compared with the state after."""

    def __init__(self, model: nn.Module):
        self.model, self.state, self.modules = model, snapshot(model), [name for name, _ in model.named_modules()]
        self.trained = [parameter.requires_grad for parameter in model.parameters()]
        self.attributes, self.logits = set(vars(model)), output(model)

    def check(self) -> None:
        assert [name for name, _ in self.model.named_modules()] == self.modules
        assert [parameter.requires_grad for parameter in self.model.parameters()] == self.trained
        assert set(vars(self.model)) == self.attributes
        after = self.model.state_dict()
        assert after.keys() == self.state.keys()
        assert all(torch.equal(after[name], value) for name, value in self.state.items())
        assert torch.equal(output(self.model), self.logits)


CONFIGS = [
    (dict(design="X"), r"design='X' is unknown; choose one of V, VLI, VLJ, T, pixel\."),
    (dict(design=None), "design=None is unknown"),
    (dict(design="VLJ", coupling="both"), "coupling='both' is unknown; choose one of text_to_vision, "),
    (dict(design="pixel", pixel_region="middle"), "pixel_region='middle' is unknown; choose one of border, full"),
    (dict(design="VLJ", num_text_tokens=3), r"num_vision_tokens=2 and num_text_tokens=3 must be equal for design='V"),
    (dict(design="VLJ", vision_depth=3), r"vision_depth=3 and text_depth=9 must be equal for design='VLJ'"),
    *(
        (dict(design=design, coupling="text_to_vision"), f"coupling='text_to_vision' goes with design='VLJ', not with "
                                                         f"'{design}'")
        for design in ("V", "VLI", "T", "pixel")
    ),
    *(
        (dict(design=design, **{name: value}), f"{name}={value!r} must be a whole number of at least {least}")
        for design, name, least in [
            ("V", "num_vision_tokens", 0), ("T", "num_text_tokens", 0), ("VLI", "vision_depth", 0),
            ("VLI", "text_depth", 0), ("pixel", "border_width", 1),
        ]
        for value in (-1, 2.0, True, "2", None)
    ),
    (dict(design="pixel", border_width=0), "border_width=0 must be a whole number of at least 1"),
    (dict(init_std=-0.1), r"init_std=-0\.1 must be at least 0"),
    (dict(init_std=float("nan")), "init_std=nan must be at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), CONFIGS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_config_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipPromptConfig(**settings)


WORDS = make_processor().tokenizer("a bc d", add_special_tokens=False).input_ids
MISFITS = [
    (CLIPForZeroShotClassification, dict(design="V", vision_depth=4), r"vision_depth=4 is more than the tower's 3 "
     r"layers; choose 0 \.\. 3"),
    (CLIPForZeroShotClassification, dict(design="T", text_depth=4), r"text_depth=4 is more than the tower's 3 layers"),
    (CLIPForZeroShotClassification, dict(design="VLJ", vision_depth=4, text_depth=4), "vision_depth=4 is more than"),
    (CLIPVisionModel, dict(design="V", vision_depth=9), "vision_depth=9 is more than"),
    (CLIPTextModel, dict(design="T", text_depth=9), "text_depth=9 is more than"),
    (CLIPForZeroShotClassification, dict(design="T", num_text_tokens=CONTEXT_LENGTH - 2),
     "num_text_tokens=30 leaves no place among 32; choose at most 29"),
    (CLIPForZeroShotClassification, dict(design="VLI", num_text_tokens=500), "num_text_tokens=500 leaves no place"),
    (CLIPForZeroShotClassification, dict(design="T", context_init="a " * (CONTEXT_LENGTH - 2)),
     r"context_init='a a .*' has 30 tokens, too long"),
    (CLIPForZeroShotClassification, dict(design="T", context_init="ab", num_text_tokens=3),
     "context_init='ab' has 2 tokens for num_text_tokens=3"),
    (CLIPForZeroShotClassification, dict(design="VLI", context_init=""), "context_init='' has 0 tokens for"),
    (CLIPForZeroShotClassification, dict(design="T", context_init="a <|endoftext|> b"),
     r"context_init='a <\|endoftext\|> b' has words that the model's tokenizer doesn't know"),
    (CLIPForZeroShotClassification, dict(design="T", context_token_ids=[1, 514]),
     r"context_token_ids=\[1, 514\] must lie in 0 \.\. 513"),
    (CLIPForZeroShotClassification, dict(design="T", context_token_ids=[-1, 1]), r"context_token_ids=\[-1, 1\] must "),
    (CLIPModel, dict(design="T", context_init="a bc d"), "context_init='a bc d' needs a tokenizer"),
    (CLIPModel, dict(design="VLI", context_init="a bc d"), "context_init='a bc d' needs a tokenizer"),
    (CLIPTextModelWithProjection, dict(design="T", context_init="a bc d"), "context_init='a bc d' needs a tokenizer"),
    (CLIPForZeroShotClassification, dict(design="pixel", border_width=4), "border_width=4 must be below half of 8 px"),
    (CLIPVisionModelWithProjection, dict(design="pixel"), "border_width=30 must be below half of 8 px"),
    *((cls, dict(design=design), f"design='{design}' needs a text tower; {cls.__name__} has none")
      for cls in (CLIPVisionModel, CLIPVisionModelWithProjection) for design in ("VLI", "VLJ", "T")),
    *((cls, dict(design=design), f"design='{design}' needs a vision tower; {cls.__name__} has none")
      for cls in (CLIPTextModel, CLIPTextModelWithProjection) for design in ("V", "VLI", "VLJ", "pixel")),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "settings", "message"), MISFITS, ids=range(len(MISFITS)))
def test_prompts_that_do_not_fit_are_refused_and_leave_the_model_alone(cls, settings, message):
    model = model_of(cls).requires_grad_(True)
    config = ClipPromptConfig(**{**SMALL, **settings})
    given, before = copy.deepcopy(config), Unchanged(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    before.check()
    assert config == given  # free to be used on another model


@pytest.mark.parametrize(("cls", "settings", "message"), [m for m in MISFITS if issubclass(m[0], CLIPModel)],
                         ids=lambda x: "")  # fmt: skip
def test_a_further_adapter_that_does_not_fit_leaves_the_first_alone(cls, settings, message):
    model = get_peft_model(model_of(cls), ClipPromptConfig(**SMALL, context_token_ids=WORDS))
    randomise(model, 1)
    before = Unchanged(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("b", ClipPromptConfig(**{**SMALL, **settings}))
    before.check()
    assert list(model.peft_config) == ["default"]
    model.add_adapter("b", ClipPromptConfig(**SMALL))
    assert list(model.peft_config) == ["default", "b"]


@pytest.mark.parametrize("name", ["copy", "keys", "a.b", "", "training"])
def test_an_adapter_name_that_torch_can_not_hold_is_refused(name):
    model = make_base()
    before = Unchanged(model)
    with pytest.raises(ValueError, match=f"adapter_name='{name}' can't name parameters; choose another"):
        get_peft_model(model, ClipPromptConfig(**SMALL), adapter_name=name)
    before.check()
    model = make_prompted("VLJ")
    before = Unchanged(model)
    with pytest.raises(ValueError, match=f"adapter_name='{name}' can't name parameters"):
        model.add_adapter(name, ClipPromptConfig(**SMALL))
    with pytest.raises(ValueError, match=r"coupled prompts|can't name"):
        model.add_weighted_adapter(["default"], [1.0], name)
    before.check()
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("design", ["V", "VLI", "VLJ", "T", "pixel"])
def test_only_clip_takes_prompts(design):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    model.config = {"model_type": "custom"}
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"prompts go into CLIPModel .* not into a Sequential"):
        get_peft_model(model, ClipPromptConfig(design=design, **SMALL))
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def other_sizes(**changes) -> CLIPForZeroShotClassification:
    """A classifier whose towers differ from `make_base`'s: "vision_hidden_size" and the like."""
    config = copy.deepcopy(make_base().config)
    for name, value in changes.items():
        tower, _, field = name.partition("_")
        setattr(getattr(config, f"{tower}_config"), field, value)
    model = CLIPForZeroShotClassification.from_clip(CLIPModel(config).double().eval(), make_processor())
    model.set_classes(NAMES, TEMPLATE)
    return model


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ("V", dict(vision_hidden_size=24), "vision_width=20, this one has 24"),
        ("VLJ", dict(vision_hidden_size=24), "vision_width=20, this one has 24"),
        ("VLI", dict(text_hidden_size=24), "text_width=16, this one has 24"),
        ("T", dict(text_hidden_size=24), "text_width=16, this one has 24"),
        ("T-random", dict(text_hidden_size=24), "text_width=16, this one has 24"),
        ("pixel-full", dict(vision_image_size=16), "image_size=8, this one has 16"),
        ("pixel-border", dict(vision_image_size=16), "image_size=8, this one has 16"),
    ],
)
def test_an_adapter_of_another_size_is_refused(row, changes, message, tmp_path):
    adapter = make_prompted(row)
    adapter.peft_config["default"].base_model_name_or_path = "org/clip"
    adapter.save_pretrained(tmp_path)
    model = other_sizes(**changes)
    output_here = model(pixel_values=images_for(model)).logits
    names = [name for name, _ in model.named_modules()]
    message = f"the adapter was made for a model with {message}; load it on the model that it was trained on, org/clip"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(pixel_values=images_for(model)).logits, output_here)
    further = get_peft_model(model, ClipPromptConfig(**{**SMALL, "design": "V"}))
    with pytest.raises(ValueError, match=message):
        further.load_adapter(tmp_path, adapter_name="b")
    assert list(further.peft_config) == ["default"]
    assert all("b" not in layer.clip_prompt_tokens for layer in wrappers(further))


def images_for(model: CLIPForZeroShotClassification) -> torch.Tensor:
    side = model.config.vision_config.image_size
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_an_adapter_of_another_size_fits_where_its_tower_does(tmp_path):
    """Only what the prompts touch is compared."""
    make_prompted("V").save_pretrained(tmp_path)
    model = other_sizes(text_hidden_size=24)
    assert prompt_parameters(PeftModel.from_pretrained(model, tmp_path, is_trainable=True))


def test_token_ids_mend_a_missing_tokenizer():
    config = ClipPromptConfig(design="T", num_text_tokens=2, text_depth=1, context_token_ids=WORDS)
    model = get_peft_model(model_of(CLIPModel), config)
    (prompts,) = prompt_parameters(model).values()
    assert torch.equal(prompts, model_of(CLIPModel).text_model.embeddings.token_embedding.weight[WORDS[:2]])
    assert torch.equal(output(model), output(model_of(CLIPModel)))


def test_prompts_never_overwrite_class_names():
    message = (
        r"the text prompts replace the first 2 tokens of every prompt, but among the templates \['{}'\] one has only "
        r"0 before the class name; choose a template with more words there, such as 'a photo of a {}\.', or fewer text"
    )
    model = make_prompted("VLI")
    core = model.get_base_model()
    before, ids = output(model), core.class_token_ids
    with pytest.raises(ValueError, match=message):
        core.set_classes(("x", "y"), "{}")
    assert core.class_names == NAMES and core.templates == (TEMPLATE,) and core.class_token_ids is ids
    assert torch.equal(output(model), before)
    with pytest.raises(ValueError, match="one has only 1 before the class name"):
        core.set_classes(NAMES, [TEMPLATE, "a {}"])
    assert torch.equal(output(model), before)

    base = make_base()
    base.set_classes(NAMES, "{}")
    wanted = output(base)
    model = get_peft_model(base, ClipPromptConfig(**SMALL))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), wanted)
    with pytest.raises(ValueError, match=message):
        base.encode_classes(shared_prefix=False)
    base.set_classes(NAMES, TEMPLATE)
    assert torch.isfinite(output(model)).all()
    assert torch.equal(output(model.unload()), output(make_base()))


def test_names_that_begin_alike_are_no_context():
    """ "ab" and "abc" share tokens, but these are the names': prompts may not stand there."""
    model = make_prompted("VLI")
    with pytest.raises(ValueError, match="one has only 1 before"):
        model.get_base_model().set_classes(("abx", "aby"), "a {}")


@pytest.mark.parametrize("cls", [CLIPModel, CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("count", [2, 3])
def test_texts_too_short_for_the_prompts_are_refused(cls, count):
    """n prompts and the start and end tokens need n + 2."""
    config = ClipPromptConfig(design="T", num_text_tokens=count, text_depth=2, context_init=None)
    model = get_peft_model(model_of(cls), config)
    ids = make_processor().tokenizer(["abc"], return_tensors="pt").input_ids
    assert ids.shape == (1, 5)
    core = model.get_base_model()
    encode = core.text_model if cls is not CLIPTextModel else core
    assert torch.isfinite(encode(input_ids=ids).last_hidden_state).all()
    short = ids[:, : count + 1]
    with pytest.raises(ValueError, match=f"the texts have {count + 1} tokens, too few around {count} text prompts"):
        encode(input_ids=short)
    assert torch.isfinite(encode(input_ids=ids[:, : count + 2]).last_hidden_state).all()
    with model.disable_adapter():
        encode(input_ids=short)


MIXES = [
    (dict(combination_type="cat"), "combination_type='cat' is unknown for prompts; choose 'linear'"),
    (dict(adapters=["default", "lost"]), r"adapters=\['default', 'lost'\]: choose among default, same, fewer, saved"),
    (dict(adapters=[], weights=[]), r"adapters=\[\]: choose among"),
    (dict(weights=[1.0]), r"weights=\[1.0\] must have one value for each of 2 adapters"),
    (dict(adapter_name="same"), "adapter_name='same' is taken; choose another"),
    (
        dict(adapters=["default", "fewer"]),
        "adapters 'default' and 'fewer' differ in design, number of prompts or depth",
    ),
    (dict(adapters=["default", "saved"]), "adapter 'saved' has modules_to_save beside its prompts, which can't be"),
]


@pytest.mark.parametrize(("changes", "message"), MIXES, ids=range(len(MIXES)))
def test_mixtures_that_mean_nothing_are_refused(changes, message):
    model = get_peft_model(make_base(), ClipPromptConfig(**SMALL))
    model.add_adapter("same", ClipPromptConfig(**SMALL))
    model.add_adapter("fewer", ClipPromptConfig(**SMALL, num_text_tokens=1))
    model.add_adapter("saved", ClipPromptConfig(**SMALL, modules_to_save=["visual_projection"]))
    before = Unchanged(model)
    settings = {"adapters": ["default", "same"], "weights": [0.5, 0.5], "adapter_name": "new", **changes}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**settings)
    before.check()
    assert list(model.peft_config) == ["default", "same", "fewer", "saved"]


@pytest.mark.parametrize(("one", "two"), [("V", "V-shallow"), ("T", "T-random"), ("V", "T"), ("VLI", "V"),
                                          ("pixel-border", "pixel-full")])  # fmt: skip
def test_mixtures_of_unlike_adapters_are_refused(one, two):
    model = make_prompted(one)
    model.add_adapter("b", make_config(two))
    for names in (["default", "b"], ["b", "default"]):
        with pytest.raises(ValueError, match="differ in design, number of prompts or depth"):
            model.add_weighted_adapter(names, [1, 1], "new")
    assert list(model.peft_config) == ["default", "b"]


@pytest.mark.parametrize("row", ["VLJ", "VLJ-vision"])
def test_coupled_prompts_are_not_mixed(row):
    model = make_prompted(row)
    with pytest.raises(
        ValueError, match=r"adapter 'default' has coupled prompts \(design='VLJ'\), which can't be mixed"
    ):
        model.add_weighted_adapter(["default"], [1.0], "new")
    assert list(model.peft_config) == ["default"]


def test_unknown_adapters_are_refused():
    model = make_prompted("VLI")
    before = Unchanged(model)
    with pytest.raises(ValueError, match="lost"):
        model.set_adapter("lost")
    with pytest.raises(ValueError, match="lost"):
        model.delete_adapter("lost")
    with pytest.raises(ValueError, match="default"):
        model.add_adapter("default", ClipPromptConfig(**SMALL))
    before.check()


def test_images_are_those_of_the_base_model():
    """Prompts change nothing in what the classifier takes."""
    model = make_prompted("pixel-border")
    with pytest.raises(ValueError, match=r"pixel_values have shape \(4, 3, 6, 6\)"):
        model(pixel_values=make_images()[..., :6, :6])
