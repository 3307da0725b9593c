import json
from importlib.resources import files

import pytest

from hf_robust_clip.modeling.descriptions import check_descriptions
from hf_robust_clip.zero_shot_data.specs import SPECS, DatasetSpec, find_spec, known_descriptions

NAMES = json.loads((files("hf_robust_clip.zero_shot_data") / "class_names.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("key", "count"), [("tiny_imagenet", 200), ("imagenet", 1000)])
def test_class_names_are_many_and_distinct(key, count):
    names = NAMES[key]
    names = list(names.values()) if isinstance(names, dict) else names
    assert len(names) == len(set(names)) == count
    assert all(name == name.strip() != "" for name in names)


def test_class_names_are_in_label_order():
    """Known labels: 0 tench, 281 tabby, 999 toilet paper of ImageNet; TinyImageNet's wnids are sorted."""
    imagenet, tiny = NAMES["imagenet"], NAMES["tiny_imagenet"]
    assert (imagenet[0], imagenet[999]) == ("tench", "toilet paper")
    assert "tabby" in imagenet[281]
    assert list(tiny) == sorted(tiny)
    assert (tiny["n01443537"], tiny["n02123045"]) == ("goldfish", "tabby")


def test_specs_are_found_by_key_and_id():
    whole = [spec for spec in SPECS if spec.where is None]
    names = {name for spec in whole for name in (spec.key, spec.hub_id)}
    assert len(names) == 2 * len(whole) - 2  # the digits, plain and coloured, have one name
    assert find_spec("flwrlabs/pacs").where is None
    assert find_spec("tiny_imagenet") is find_spec("zh-plus/tiny-imagenet")
    assert find_spec("zh-plus/tiny-imagenet").splits["test"] == "valid"
    assert find_spec("zh-plus/tiny-imagenets") is None


def test_names_follow_the_dataset_and_not_our_file():
    spec = find_spec("zh-plus/tiny-imagenet")
    assert spec.names_in_label_order(["n02123045", "n01443537"]) == ["tabby", "goldfish"]
    assert len(spec.names_in_label_order(None)) == 200
    with pytest.raises(ValueError, match="label 'n99999999' that has no class name"):
        spec.names_in_label_order(["n01443537", "n99999999"])


def test_a_list_of_names_must_fit_the_labels():
    spec = find_spec("ILSVRC/imagenet-1k")
    assert spec.names_in_label_order(["whatever"] * 1000)[0] == "tench"
    with pytest.raises(ValueError, match="has 3 labels, expected 1000"):
        spec.names_in_label_order(["a", "b", "c"])
    assert DatasetSpec("b", "a/b", 1).names_in_label_order(["x"]) is None


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("digits", "zero one two three four five six seven eight nine"),
        ("cifar10", "airplane automobile bird cat deer dog frog horse ship truck"),
    ],
)
def test_known_descriptions_are_five_of_each_class_of_the_dataset(key, names):
    """By the names that the dataset itself has, in their order; each tells its class from all others."""
    texts = known_descriptions(key)
    assert list(texts) == names.split()
    assert {len(own) for own in check_descriptions(texts, names.split()).values()} == {5}
    whole = [text.replace("{}", name) for name, own in texts.items() for text in own]
    assert len(set(whole)) == 50 and all("{}" in text for own in texts.values() for text in own)
