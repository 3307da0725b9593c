"""Several texts for each class: the mean of unit embeddings, whatever their numbers; and what is refused."""

import json

import pytest
import torch
from tiny import CLASS_NAMES
from tiny_siglip import tiny_siglip
from torch.nn import functional as F

from hf_robust_clip.checkpoint_notes import load_descriptions, save_descriptions, trained_descriptions
from hf_robust_clip.modeling import class_texts, descriptions_digest

NAMES = ("cat", "dog", "ox")
TEXTS = {
    "cat": ["soft and quick", "a photo of a {}"],
    "dog": ["it barks"],
    "ox": ["{} with a yoke", "it pulls", "horns"],
}
NEAR = dict(rtol=0, atol=1e-12)
FAMILIES = ["clip", "siglip"]


@pytest.fixture(params=FAMILIES)
def model(request, tiny_clip):
    return {"clip": tiny_clip, "siglip": tiny_siglip}[request.param](class_names=None).requires_grad_(False)


def one_by_one(model, texts):
    """The normalised mean of texts, each of which goes through the tower alone."""
    units = [F.normalize(model.encode_texts(model.tokenize([text]), 1)[0, 0], dim=0) for text in texts]
    return F.normalize(torch.stack(units).mean(dim=0), dim=0)


FORMS = {
    "as they are": (None, TEXTS, lambda name, texts: texts),
    "equally many": (
        None, {name: texts[:1] for name, texts in TEXTS.items()}, lambda name, texts: texts
    ),
    "in a template": (
        "{}, which has {description}", TEXTS, lambda name, texts: [f"{name}, which has {text}" for text in texts]
    ),
    "one text more": (
        ("a {}.", "{description}"), TEXTS, lambda name, texts: [f"a {name}.", *texts]
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_are_the_normalised_means_of_each_class(model, form, monkeypatch):
    template, descriptions, texts_of = FORMS[form]
    model.set_classes(NAMES, template, descriptions)
    texts = {name: [t.replace("{}", name) for t in texts_of(name, descriptions[name])] for name in NAMES}
    expected = torch.stack([one_by_one(model, texts[name]) for name in NAMES])
    torch.testing.assert_close(model.class_embeds, expected, **NEAR)
    torch.testing.assert_close(model.encode_classes(shared_prefix=False), expected, **NEAR)
    torch.testing.assert_close(model.encode_classes(classes=slice(1, 3)), expected[1:], **NEAR)
    monkeypatch.setattr(class_texts, "TEXT_MEMORY", 1)  # a class at a time
    torch.testing.assert_close(model.encode_classes(), expected, **NEAR)


def test_gradients_reach_the_text_side_as_those_of_each_text_do(tiny_clip):
    model = tiny_clip(class_names=None)
    model.set_classes(NAMES, descriptions=TEXTS)
    weight = model.text_projection.weight.requires_grad_(True)
    weights = torch.rand(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, parts = model.class_embeds, torch.stack([
        one_by_one(model, [text.replace("{}", name) for text in TEXTS[name]]) for name in NAMES
    ])  # fmt: skip
    found, expected = (torch.autograd.grad((weights * embeds).sum(), weight)[0] for embeds in (whole, parts))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_order_of_the_mapping_is_nothing_and_that_of_classes_is_all(tiny_clip):
    model = tiny_clip(class_names=None)
    model.set_classes(NAMES, descriptions=TEXTS)
    before = model.class_embeds
    model.set_classes(NAMES, descriptions=dict(reversed(TEXTS.items())))
    assert torch.equal(model.class_embeds, before) and list(model.descriptions) == [*NAMES]
    model.set_classes(NAMES[::-1], descriptions=TEXTS)
    torch.testing.assert_close(model.class_embeds, before.flip(0), **NEAR)


def test_the_digest_sees_every_text_and_class():
    known = descriptions_digest(TEXTS)
    others = [{**TEXTS, "dog": ["it bark"]}, {**TEXTS, "dog": ["it barks", "tail"]}, {"cat": ["x"]},
              {**TEXTS, "cat": TEXTS["cat"][::-1]}, dict(reversed(TEXTS.items()))]  # fmt: skip
    assert len({known, *map(descriptions_digest, others)}) == 6 and descriptions_digest({}) is None


WRONG = {
    "unknown class": ({**TEXTS, "cow": ["horns too"]}, None, "descriptions has texts for 'cow'"),
    "missing class": ({"cat": ["a"], "dog": ["b"]}, None, "descriptions has no texts for the class 'ox'"),
    "empty list": ({**TEXTS, "dog": []}, None, r"descriptions\['dog'\] is empty"),
    "one text": ({**TEXTS, "dog": "it barks"}, None, r"descriptions\['dog'\]='it barks'"),
    "no text": ({**TEXTS, "dog": ["b", None]}, None, r"descriptions\['dog'\]\[1\]"),
    "empty text": ({**TEXTS, "dog": [" "]}, None, r"descriptions\['dog'\]\[0\]"),
    "twice": ({**TEXTS, "dog": ["b", "c", "b"]}, None, r"descriptions\['dog'\]\[2\]='b' repeats"),
    "twice to the tokenizer": ({**TEXTS, "dog": ["b", "b "]}, None, r"descriptions\['dog'\]: texts 0 and 1"),
    "too long": ({**TEXTS, "dog": ["b" * 200]}, None, "descriptions: the prompt 'bbb"),
    "no mapping": ([["a"], ["b"], ["c"]], None, "descriptions is a list"),
    "two classes alike": ({"cat": ["b", "a"], "dog": ["a", "b"], "ox": ["c"]}, None, "are the same to the tokenizer"),
    "a template without place": (TEXTS, "a photo of a {}.", "template='a photo of a {}.' has no '{description}'"),
    "a place without descriptions": (None, "{description}", "template='{description}' takes descriptions"),
    "a place in a text": ({**TEXTS, "dog": ["{description}"]}, None, r"descriptions\['dog'\]\[0\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_meant_is_refused_in_one_line(what, tiny_clip):
    descriptions, template, named = WRONG[what]
    model = tiny_clip()
    before = model.class_embeds
    with pytest.raises(ValueError, match=named) as refused:
        model.set_classes(NAMES, template, descriptions)
    assert "\n" not in str(refused.value)
    assert model.class_names == CLASS_NAMES and torch.equal(model.class_embeds, before)


def test_classes_set_for_a_dataset_are_put_back(tiny_clip, tiny_batch):
    class Data:
        class_names = NAMES

    images, _ = tiny_batch()
    model = tiny_clip()
    before = model(images).logits
    with model.prepared_for(Data(), descriptions=TEXTS):
        assert model(images).logits.shape == (5, 3) and model.text_counts == (2, 1, 3)
    assert torch.equal(model(images).logits, before)
    assert (model.descriptions, model.text_counts, model.class_names) == ({}, (), CLASS_NAMES)


# ---- one by one


def test_texts_one_by_one_and_in_other_templates(model):
    many = {name: [f"{word} {name}" for word in ("a", "the", "my")] for name in NAMES}
    model.set_classes(NAMES, descriptions=many)
    own, other = model.text_embeds(), model.text_embeds(("not a {}", "no {}"))
    for k in range(3):
        torch.testing.assert_close(own[k], torch.stack([one_by_one(model, [many[n][k]]) for n in NAMES]), **NEAR)
    for k, template in enumerate(("not a {}", "no {}")):
        expected = torch.stack([one_by_one(model, [template.replace("{}", n)]) for n in NAMES])
        torch.testing.assert_close(other[k], expected, **NEAR)
    assert model.descriptions["ox"] == ("a ox", "the ox", "my ox"), "the classes are as they were"
    assert model.text_embeds() is own and model.text_embeds(("not a {}", "no {}")) is other
    model.set_classes(NAMES[::-1])
    torch.testing.assert_close(model.text_embeds(("no {}",))[0].flip(0), other[1], **NEAR)
    model.text_parameters()[-1].data[..., 0] += 1
    assert (model.text_embeds(("no {}",))[0].flip(0) - other[1]).abs().max() > 1e-6


def test_texts_one_by_one_must_be_equally_many_and_stand_still(tiny_clip):
    model = tiny_clip(class_names=None)
    with pytest.raises(ValueError, match="set_classes"):
        model.text_embeds()
    model.set_classes(NAMES, descriptions=TEXTS)
    with pytest.raises(ValueError, match="1 to 3 texts"):
        model.text_embeds()
    model.text_projection.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen text side"):
        model.text_embeds(("no {}",))


# ---- files


def test_files_of_descriptions(tmp_path):
    save_descriptions(tmp_path, TEXTS)
    assert load_descriptions(tmp_path / "descriptions.json") == load_descriptions(tmp_path) == TEXTS
    assert load_descriptions(tmp_path, ["ox", "cat"]) == {"ox": TEXTS["ox"], "cat": TEXTS["cat"]}
    assert trained_descriptions(str(tmp_path), ("{description}",)) == TEXTS
    assert trained_descriptions(str(tmp_path), ("a {}",)) is None
    with pytest.raises(ValueError, match="1 of 2 classes, among them 'cow'"):
        load_descriptions(tmp_path, ["cat", "cow"])
    with pytest.raises(OSError, match=r"no descriptions\.json"):
        trained_descriptions(str(tmp_path / "elsewhere"), ("{description}",))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"cat": ["a"], "cat": ["b"]}', "'cat' is there twice"),
        ("[1]", "must hold"),
        ("{}", "must hold"),
        ('{"cat": ["a"]', "no JSON"),
    ],
)
def test_files_that_say_it_otherwise(tmp_path, text, named):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=named):
        load_descriptions(tmp_path / "file.json")


def test_the_defence_that_was_saved_says_them_too(tmp_path):
    (tmp_path / "adaptation.json").write_text(json.dumps({"descriptions": TEXTS}))
    assert load_descriptions(tmp_path) == TEXTS
