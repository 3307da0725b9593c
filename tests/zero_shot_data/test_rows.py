"""Every row of datasets.json against a tiny copy of its dataset, in the layout that its card on the Hub shows.

The layouts are written out here a second time, so that a slip in a row makes a test fail.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import datasets
import pytest
import tiny
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from tiny import make_clip, make_processor

from hf_robust_clip.modeling import CLIPForZeroShotClassification
from hf_robust_clip.zero_shot_data import specs
from hf_robust_clip.zero_shot_data.loading import load_image_dataset
from hf_robust_clip.zero_shot_data.rows import DATA_ROOT_VARIABLE
from hf_robust_clip.zero_shot_data.specs import SPECS, find_spec, prompt_templates

COUNT = 6


@dataclass(frozen=True)
class Layout:
    """How a dataset looks on the Hub.

    Args:
        classes: number of labels.
        own: the Hub's spelling of one of our class names, where its labels may stand in any order; None where they
            must stand in ours.
        labels: the Hub's names of some labels by their number, where `own` doesn't give them.
        names: class names expected for some of the Hub's label names.
        test, whole: split files that `"test"` and `"all"` read.
        others: further columns of integers.
    """

    hub_id: str
    classes: int
    own: Callable[[str], str] | None = None
    labels: dict[int, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    image: str = "image"
    label: str = "label"
    splits: tuple[str, ...] = ("train", "test")
    test: str = "test"
    whole: tuple[str, ...] = ()
    attack: int | None = None
    others: tuple[str, ...] = ()


def underscores(name):
    return name.lower().replace(" ", "_")


def camel_case(name):
    return name.replace(" ", "")


def same(name):
    return name


EUROSAT = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial",
           "Pasture", "PermanentCrop", "Residential", "River", "SeaLake")  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PACS = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
THREE_WAYS = ("train", "validation", "test")
WITH_VALIDATION = ("train", "validation")
LAYOUTS = {
    "fashion_mnist": Layout("zalando-datasets/fashion_mnist", 10, names={"9": "ankle boot"}),
    "pacs": Layout("flwrlabs/pacs", 7, labels=dict(enumerate(PACS)), names={"dog": "dog"}, splits=("train",),
                   test="train", others=("domain",)),
    "cifar10": Layout("uoft-cs/cifar10", 10, labels=dict(enumerate(CIFAR10)), names={"truck": "truck"}, image="img",
                      attack=32),
    "cifar100": Layout("uoft-cs/cifar100", 100, labels={26: "cra"}, names={"cra": "crab", "0": "apple"}, image="img",
                       label="fine_label", attack=32, others=("coarse_label",)),
    "stl10": Layout("tanganke/stl10", 10, same, names={"airplane": "airplane", "truck": "truck"}, attack=96),
    "tiny_imagenet": Layout("zh-plus/tiny-imagenet", 200, labels=dict(enumerate(sorted(
        specs.class_names("tiny_imagenet"), reverse=True))), names={"n01443537": "goldfish"},
        splits=("train", "valid"), test="valid"),
    "imagenet": Layout("ILSVRC/imagenet-1k", 1000, labels={0: "tench, Tinca tinca", 474: "cardigan"},
                       names={"tench, Tinca tinca": "tench", "999": "toilet paper"}, splits=WITH_VALIDATION,
                       test="validation"),
    "sun397": Layout("tanganke/sun397", 397, same, names={"bakery shop": "bakery shop"}),
    "food101": Layout("ethz/food101", 101, underscores, splits=WITH_VALIDATION, test="validation",
                      names={"cheese_plate": "cheese plate", "cheesecake": "cheesecake"}),
    "pets": Layout("timm/oxford-iiit-pet", 37, underscores, names={"american_bulldog": "American Bulldog"},
                   others=("label_cat_dog",)),
    "flowers102": Layout("dpdl-benchmark/oxford_flowers102", 102, splits=THREE_WAYS,
                         labels={0: "pink primrose", 58: "orange dahlia", 59: "pink-yellow dahlia?"},
                         names={"pink primrose": "pink primrose", "pink-yellow dahlia?": "pink and yellow dahlia"}),
    "dtd": Layout("tanganke/dtd", 47, same, names={"polka-dotted": "polka-dotted"}),
    "eurosat": Layout("timm/eurosat-rgb", 10, labels=dict(enumerate(EUROSAT)), splits=THREE_WAYS,
                      names={"SeaLake": "lake or sea", "AnnualCrop": "annual crop land"}, whole=THREE_WAYS),
    "aircraft": Layout("Donghyun99/FGVC-Aircraft", 100, same, names={"MD-80": "MD-80", "737-200": "737-200"},
                       label="variation", splits=("train", "val", "test"), others=("label", "manufacturer")),
    "caltech101": Layout("flwrlabs/caltech101", 101, labels=dict(enumerate(map(
        str.lower, specs.class_names("caltech101")))), splits=("train",), test="train", whole=("train",),
        names={"faces_easy": "centered face", "faces": "off-center face", "airplanes": "airplane"}),
    "caltech256": Layout("ilee0022/Caltech-256", 257, names={"1": "ak47", "257": "clutter"}, splits=THREE_WAYS,
                         whole=THREE_WAYS, others=("text",)),
    "cars": Layout("tanganke/stanford_cars", 196, same, names={"Acura RL Sedan 2012": "Acura RL Sedan 2012"}),
    "pcam": Layout("dpdl-benchmark/patch_camelyon", 2, names={"1": "lymph node containing metastatic tumor tissue"},
                   splits=THREE_WAYS),
    "ucf101": Layout("flwrlabs/ucf101", 101, camel_case, names={"ApplyEyeMakeup": "Apply Eye Makeup"}),
    "imagenet_r": Layout("axiong/imagenet-r", 200, label="wnid", splits=("test",), names={"n01443537": "goldfish"}),
    "imagenet_sketch": Layout("clip-benchmark/wds_imagenet_sketch", 1000, image="webp", label="cls", splits=("test",),
                              names={"0": "tench", "999": "toilet paper"}),
}  # fmt: skip
EVERY_FIFTH = ("pacs", "caltech101")
PLAIN_NUMBERS = ("caltech256",)  # from 1, no names
FROM_ZERO = ("imagenet_sketch",)  # numbers without names
WORDNET_IDS = tuple(specs.class_names("imagenet_r"))


@pytest.fixture(scope="module")
def processor():
    return make_processor(224)


@pytest.fixture(scope="module")
def model():
    """Random, with room for the longest prompt in single letters."""
    before = tiny.CONTEXT_LENGTH
    tiny.CONTEXT_LENGTH = 120
    try:
        letters = make_processor()
        return CLIPForZeroShotClassification.from_clip(make_clip(letters), letters).eval().requires_grad_(False)
    finally:
        tiny.CONTEXT_LENGTH = before


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA_ROOT_VARIABLE, raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def label_names(key):
    """What the Hub calls the labels, in the order of their numbers; for labels in any order, ours backwards."""
    layout = LAYOUTS[key]
    if key == "imagenet_r":
        return list(WORDNET_IDS)
    if layout.own:
        return [layout.own(name) for name in reversed(specs.class_names(find_spec(key).class_names))]
    return [layout.labels.get(i, str(i)) for i in range(layout.classes)]


def colour(split, row):
    return (40 * row, 100 * split, 7)


def write(root, key):
    """Each split as parquet: six pictures, known by their colours; labels 0, 1, .. and the last at the end."""
    layout = LAYOUTS[key]
    feature = Value("int64") if key in (*PLAIN_NUMBERS, *FROM_ZERO) else ClassLabel(names=label_names(key))
    feature = Value("string") if key == "imagenet_r" else feature
    for i, split in enumerate(layout.splits):
        columns = {layout.image: [Image.new("RGB", (10, 12), colour(i, row)) for row in range(COUNT)]}
        columns[layout.label] = own_numbers(key)
        features = {layout.image: datasets.Image(), layout.label: feature}
        columns |= {other: [0] * COUNT for other in layout.others}
        features |= {other: Value("int64") for other in layout.others}
        if key == "ucf101":  # two videos, the second one's frames out of order
            columns |= {"clip_id": ["v_a"] * 3 + ["v_b"] * 3, "frame": [1, 2, 3, 30, 10, 20]}
            features |= {"clip_id": Value("string"), "frame": Value("int64")}
        folder = root / layout.hub_id / "data"
        folder.mkdir(parents=True, exist_ok=True)
        rows = Dataset.from_dict(columns, features=Features(features))
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def own_numbers(key):
    last = LAYOUTS[key].classes - 1
    if key == "imagenet_r":
        return [*WORDNET_IDS[: COUNT - 1], WORDNET_IDS[last]]
    numbers = [*(min(row, last) for row in range(COUNT - 1)), last]
    return [number + 1 for number in numbers] if key in PLAIN_NUMBERS else numbers


def seen(data):
    """(colour of a picture, the class name of its label) of each image."""
    rows = [data[i] for i in range(len(data))]
    return [(tuple((255 * row["pixel_values"][:, 0, 0]).round().int().tolist()), data.class_names[row["labels"]])
            for row in rows]  # fmt: skip


def test_every_row_is_here():
    whole = [spec for spec in SPECS if spec.where is None]
    assert {spec.key for spec in whole} == {"digits", "coloured-digits", *LAYOUTS}
    seen_rows = [spec.key for spec in whole if spec.checked == "data"]
    assert seen_rows == ["digits", "coloured-digits", "fashion_mnist", "pacs", "cifar10"]
    assert {spec.checked for spec in SPECS} == {"data", "card", ""}
    assert all(spec.source for spec in SPECS)


@pytest.mark.parametrize("key", LAYOUTS)
def test_row(key, tmp_path, processor, model):
    """Columns, split, names in label order, attack resolution and prompts."""
    layout = LAYOUTS[key]
    write(tmp_path, key)
    data = load_image_dataset(key, "test", processor, data_root=tmp_path)
    assert len(data.class_names) == layout.classes == find_spec(key).num_classes
    own = [str(i + 1) for i in range(257)] if key in PLAIN_NUMBERS else label_names(key)
    named = dict(zip(own, data.class_names, strict=True))
    assert {label: named[label] for label in layout.names} == layout.names
    if layout.own:
        assert [layout.own(name) for name in data.class_names] == own

    split = layout.splits.index(layout.test)
    labels = label_names(key)
    numbers = [labels.index(number) if key == "imagenet_r" else number - (key in PLAIN_NUMBERS)
               for number in own_numbers(key)]  # fmt: skip
    rows = [1, 5] if key == "ucf101" else [0, 5] if key in EVERY_FIFTH else range(COUNT)
    assert seen(data) == [(colour(split, row), data.class_names[numbers[row]]) for row in rows]
    assert (data.dataset_id, data.revision) == (layout.hub_id, "local")
    assert data.split == layout.test or (key in EVERY_FIFTH and "every 5th row of train is test" in data.split)

    assert data.attack_resolution == layout.attack
    assert data.resolution == (layout.attack or 224)
    assert data[0]["pixel_values"].shape == (3, data.resolution, data.resolution)

    assert data.templates == ("This is a photo of a {}",)
    model.set_classes(data.class_names, data.templates)
    assert model.class_embeds.shape == (layout.classes, 12)


@pytest.mark.parametrize("key", [key for key, layout in LAYOUTS.items() if layout.whole])
def test_the_whole_set_for_papers_that_test_on_all_of_it(key, tmp_path, processor):
    layout = LAYOUTS[key]
    write(tmp_path, key)
    data = load_image_dataset(layout.hub_id, "all", processor, data_root=tmp_path)
    expected = [colour(layout.splits.index(split), row) for split in layout.whole for row in range(COUNT)]
    assert [picture for picture, _ in seen(data)] == expected
    if len(layout.whole) > 1:  # a part that is missing isn't passed over
        (tmp_path / layout.hub_id / "data" / f"{layout.whole[0]}-00000-of-00001.parquet").unlink()
        with pytest.raises(ValueError, match="has no split"):
            load_image_dataset(key, "all", processor, data_root=tmp_path)


def test_own_names_for_labels_that_count_from_one(tmp_path, processor):
    write(tmp_path, "caltech256")
    own = [f"class {i}" for i in range(257)]
    data = load_image_dataset("caltech256", "test", processor, data_root=tmp_path, class_names=own)
    assert [name for _, name in seen(data)] == [own[i] for i in (0, 1, 2, 3, 4, 256)]
    with pytest.raises(ValueError, match=r"run from 1 to 257 \(6 different\), but there are 2 class names"):
        load_image_dataset("caltech256", "test", processor, data_root=tmp_path, class_names=own[:2])


@pytest.mark.parametrize("key", EVERY_FIFTH)
def test_train_and_test_of_a_single_split_share_nothing(key, tmp_path, processor):
    write(tmp_path, key)
    parts = {split: set(seen(load_image_dataset(key, split, processor, data_root=tmp_path)))
             for split in ("train", "test")}  # fmt: skip
    assert not parts["train"] & parts["test"]
    assert len(parts["train"]) == 4 and len(parts["test"]) == 2


def test_a_label_in_another_place_is_not_named_by_its_number():
    """Where the spelling of a copy doesn't match ours in full, a name that stands elsewhere is an error."""
    names = list(specs.class_names("flowers102"))
    names[0], names[1], names[58] = names[1], names[0], "something else"
    with pytest.raises(ValueError, match="the label 'hard-leaved pocket orchid', not 'pink primrose'"):
        find_spec("flowers102").names_in_label_order(names)


def test_templates_of_every_row_and_by_key(tmp_path, processor):
    assert prompt_templates("tapt") == ("a photo of a {}.",)
    assert prompt_templates("coop_pets") == ("a photo of a {}, a type of pet.",)
    assert len(prompt_templates("clip_imagenet")) == 80
    for spec in SPECS:
        assert prompt_templates(spec.templates) == ("This is a photo of a {}",)
    write(tmp_path, "stl10")
    data = load_image_dataset("stl10", "test", processor, data_root=tmp_path, templates="clip_stl10")
    assert data.templates == ("a photo of a {}.", "a photo of the {}.")
    for key in ("clip_stl11", "_sources", "version"):
        with pytest.raises(ValueError, match=f"templates='{key}' is not in templates.json; it has .*'tapt'"):
            prompt_templates(key)


def test_every_template_takes_a_name():
    keys = [key for key, texts in specs._facts("templates.json").items() if isinstance(texts, list)]
    assert len(keys) > 30
    assert all(text.count("{}") == 1 and "{c}" not in text for key in keys for text in prompt_templates(key))
