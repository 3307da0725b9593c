import random
import time
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tiny import make_processor

from hf_robust_clip.zero_shot_data.loading import ImageDataset, load_image_dataset

NAMES = tuple("abcde")
SIZES = (12, 7, 30, 5, 9)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def dataset(processor, label_map=None, feature=None, values=None, names=NAMES, sizes=SIZES):
    """Mixed rows of five classes, known by their number; the pictures can't be decoded."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes)).tolist()
    labels = labels if values is None else [values[label] for label in labels]
    features = Features(
        {"image": datasets.Image(), "row": Value("int64"), "label": feature or ClassLabel(names=list(NAMES))}
    )
    rows = Dataset.from_dict(
        {
            "image": [{"bytes": b"none", "path": None}] * len(labels),
            "row": list(range(len(labels))),
            "label": labels,
        },
        features=features,
    )
    return ImageDataset(rows, processor, names, "user/five", "local", "train", label_map=label_map)


@pytest.fixture
def five(processor):
    return dataset(processor)


def drawn(data):
    """{class name: its rows}, from the columns as they are."""
    found = {}
    for row, label in zip(data.rows["row"], data.rows["label"], strict=True):
        label = label if data.label_map is None else data.label_map[label]
        found.setdefault(data.class_names[label], []).append(row)
    return found


@pytest.mark.parametrize("per_class", [1, 2, 5])
def test_so_many_of_every_class(five, per_class):
    few = five.shots(per_class)
    assert len(few) == 5 * per_class
    assert {name: len(rows) for name, rows in drawn(few).items()} == dict.fromkeys(NAMES, per_class)
    everything = drawn(five)
    for name, rows in drawn(few).items():
        assert set(rows) <= set(everything[name])
        assert len(set(rows)) == per_class
    assert few.rows["row"] == sorted(few.rows["row"]), "in dataset order"
    assert replace(few, rows=five.rows) == five
    assert len(five) == sum(SIZES), "the dataset itself stays as it was"


def test_none_is_all(five):
    assert five.shots(None) is five


def test_seeds(five):
    assert drawn(five.shots(3)) == drawn(five.shots(3, seed=0))
    random.seed(1), np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    draws = [tuple(five.shots(3, seed).rows["row"]) for seed in range(20)]
    assert draws[0] == tuple(five.shots(3).rows["row"])
    assert np.random.get_state()[1].tolist() == state
    assert len(set(draws)) == 20
    assert five.shots(3, -1).rows["row"] != five.shots(3, 2**70).rows["row"]


def test_every_image_of_a_class_is_as_likely(five):
    of_a = five.only(["a"])
    counts = Counter(row for seed in range(600) for row in of_a.shots(4, seed).rows["row"])
    assert set(counts) == set(drawn(five)["a"])
    assert all(abs(count / 600 - 1 / 3) < 0.08 for count in counts.values())  # 4 deviations of 0.019


def test_classes_are_drawn_apart(processor):
    """Classes of one size in blocks, so that a draw shared by all would show."""
    same = dataset(processor, sizes=(20,) * 5)
    order = drawn(same)
    places = {tuple(order[name].index(row) for row in rows) for name, rows in drawn(same.shots(5)).items()}
    assert len(places) == 5


def test_classes_left_out_change_nothing_for_the_others(five):
    everything = drawn(five.shots(4, seed=3))
    for kept in (["c"], ["b", "e"], ["e", "b", "a"], list(NAMES[::-1])):
        part = five.only(kept).shots(4, seed=3)
        assert drawn(part) == {name: everything[name] for name in kept}
        assert drawn(five.shots(4, seed=3).only(kept)) == drawn(part)
        assert part.class_names == tuple(kept)


def test_fewer_are_among_more(five):
    more = drawn(five.shots(5, seed=2))
    for name, rows in drawn(five.shots(3, seed=2)).items():
        assert set(rows) < set(more[name])


def test_labels_that_are_texts(processor, five):
    texts = ("Eins", "zwei", "drei", "vier", "fünf")
    named = dataset(processor, {text: i for i, text in enumerate(texts)}, feature=Value("string"), values=texts)
    assert drawn(named.shots(3)) == drawn(five.shots(3))
    assert drawn(named.only(["e", "c"]).shots(3)) == {name: drawn(five.shots(3))[name] for name in "ce"}


def test_two_labels_of_one_class(processor):
    merged = dataset(processor, {0: 0, 1: 1, 2: 1, 3: 0, 4: 2}, names=("x", "y", "z"))
    few = merged.shots(9)
    assert {name: len(rows) for name, rows in drawn(few).items()} == {"x": 9, "y": 9, "z": 9}
    assert set(few.rows["label"]) == {0, 1, 2, 3, 4}


def test_true_and_false(processor):
    flags = dataset(processor, feature=Value("bool"), values=(True, False, True, False, True), names=("no", "yes"))
    assert Counter(flags.shots(6).rows["label"]) == {True: 6, False: 6}


def test_rows_of_no_class_are_left_out(processor):
    odd = dataset(processor, feature=Value("int64"), values=(0, 1, -1, None, 7), names=("x", "y"))
    assert Counter(odd.shots(3).rows["label"]) == {0: 3, 1: 3}


@pytest.mark.parametrize("per_class", [0, -1, 1.0, "2", True])
def test_no_number_of_shots(five, per_class):
    with pytest.raises(ValueError, match=f"shots: per_class={per_class!r} must be a whole number of at least 1"):
        five.shots(per_class)


def test_a_class_with_too_few(five, processor):
    message = "class 'd' of dataset 'user/five', split 'train' has 5 images, fewer than the 6 asked for.*to 5"
    with pytest.raises(ValueError, match=message):
        five.shots(6)
    assert len(five.only(["c", "a", "e"]).shots(9)) == 27
    with pytest.raises(ValueError, match=r"class 'e' .* has 9 images"):
        five.only(["c", "e", "a"]).shots(10)
    with pytest.raises(ValueError, match=r"class 'f' .* has 0 images.*leave the class out"):
        replace(five, class_names=(*NAMES, "f")).shots(1)


def test_digits(processor):
    data = load_image_dataset("digits", "train", processor)
    few = data.shots(16)
    assert Counter(row["labels"] for row in few) == dict.fromkeys(range(10), 16)
    chosen = [row["labels"] for row in data.only(["seven", "three"]).shots(2)]
    assert sorted(chosen) == [0, 0, 1, 1]


def test_a_million_rows(processor):
    """As many as ImageNet: 0.3 s where no loop goes over the rows."""
    count = 1_281_167
    labels = np.random.default_rng(0).integers(0, 1000, count)
    names = tuple(f"class {i}" for i in range(1000))
    rows = Dataset.from_dict({"label": labels}, features=Features({"label": ClassLabel(names=list(names))}))
    data = ImageDataset(rows, processor, names, "user/many", "local", "train")
    began = time.process_time()
    few = data.shots(16)
    assert time.process_time() - began < 5
    assert (np.bincount(few.rows["label"]) == 16).all()
