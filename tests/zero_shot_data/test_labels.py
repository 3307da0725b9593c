"""Which class name belongs to which label."""

import json
import logging

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from tiny import make_processor

from hf_robust_clip import image_dataset, load_image_dataset
from hf_robust_clip.zero_shot_data import specs
from hf_robust_clip.zero_shot_data.labels import class_names_of, names_of_spec, read_class_names

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ANIMALS = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def rows(own, feature=None):
    """One picture of each label, in their order: class labels called `own`, or the plain values `own`."""
    features = Features({"image": datasets.Image(), "label": feature or ClassLabel(names=own)})
    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(len(own))]
    labels = own if feature else range(len(own))
    return Dataset.from_dict({"image": pictures, "label": list(labels)}, features=features)


def named(data):
    """The class name of each picture, in the order of the pictures."""
    return [data.class_names[row["labels"]] for row in data]


# ---- names given over the dataset's own


def test_names_of_class_folders_are_matched_by_name(tmp_path, processor):
    """Whatever their order, spelling and case; those without pictures are classes too."""
    for label in ("Hot_Dog", "ice cream", "soup"):
        (tmp_path / "food" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "food" / label / "1.png")
    given = ["soup", "Ice-Cream", "tea", "hot dog"]
    data = load_image_dataset(str(tmp_path / "food"), "train", processor, class_names=given)
    assert data.class_names == tuple(given)
    assert named(data) == ["hot dog", "Ice-Cream", "soup"]
    assert named(data.only(["hot dog", "soup"])) == ["hot dog", "soup"]
    assert {name: len(data.only([name])) for name in given} == {"soup": 1, "Ice-Cream": 1, "tea": 0, "hot dog": 1}


@pytest.mark.parametrize("order", [ANIMALS, ANIMALS[::-1], ["dog", "ant", "cat", "bee"]])
def test_every_order_of_the_same_names_is_the_same(order, processor):
    assert named(image_dataset(rows(ANIMALS), processor, class_names=order)) == ANIMALS


def test_classes_without_pictures_are_told(processor, caplog):
    caplog.set_level(logging.INFO, "hf_robust_clip")
    data = image_dataset(rows(ANIMALS), processor, class_names=["yak", *ANIMALS[::-1], "fox"])
    assert (len(data.class_names), named(data)) == (6, ANIMALS)
    assert "2 of the 6 class_names" in caplog.text


def test_names_that_are_labels_only_in_part_are_refused(processor):
    with pytest.raises(ValueError, match=r"labels 'bee', 'dog', which are none of the 4 class names"):
        image_dataset(rows(ANIMALS), processor, class_names=["ant", "cat", "wasp", "wolf"])


def test_class_folders_sorted_as_text_take_no_list_in_numeric_order(tmp_path, processor):
    """1, 10, 2, ... as `datasets` sorts them: the second name is not that of the second label."""
    for number in range(1, 11):
        (tmp_path / "set" / str(number)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "set" / str(number) / "1.png")
    with pytest.raises(ValueError, match=r"1, 10, 2.*class_names"):
        load_image_dataset(str(tmp_path / "set"), "train", processor, class_names=WORDS)
    for numbers in (range(1, 11), [str(i) for i in range(1, 11)]):
        mapping = dict(zip(numbers, WORDS, strict=True))
        data = load_image_dataset(str(tmp_path / "set"), "train", processor, class_names=mapping)
        red = [round(255 * row["pixel_values"][0, 0, 0].item()) for row in data]
        assert named(data) == [WORDS[number - 1] for number in red] != WORDS


@pytest.mark.parametrize(
    ("own", "orderly"),
    [
        (["1", "10", "2"], False),
        (["class_1", "class_10", "class_2"], False),
        (["1_cat", "10_dog", "2_bee"], False),
        (["part 2b", "part 10", "part 2a"], False),
        (["1", "2", "10"], True),
        (["01", "02", "10"], True),
        (["x2", "x9", "x10"], True),
        (["class_a", "class_b", "class_c"], True),
        (["n01440764", "n01443537", "n02123045"], True),
        (["a2", "b1", "c0"], False),
        (["World", "Sports", "Business"], False),
        (["001.cow", "002.ant", "003.bee"], False),
        (["n01440764-cow", "n01443537-ant", "n02123045-bee"], False),
        (["the ant", "the bee", "the cow"], False),
        (["ants", "bees", "cows"], False),
        (["x9", "x9a", "x10"], False),
    ],
)
def test_a_list_stands_for_ids_in_their_natural_order_alone(own, orderly, processor, caplog):
    given = ["ant", "bee", "cow"]
    if not orderly:
        with pytest.raises(ValueError, match="class_names"):
            image_dataset(rows(own), processor, class_names=given)
        return
    data = image_dataset(rows(own), processor, class_names=given)
    assert (named(data), data.label_map) == (given, None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{own[0]!r} is 'ant', {own[1]!r} is 'bee'" in caplog.text


@pytest.mark.parametrize("feature", [None, Value("string")])
def test_texts_from_0_are_the_places_in_a_list(feature, tmp_path, processor):
    """In whatever order they are stored; the same of a dict, in memory and in a file."""
    own = sorted(str(i) for i in range(12))
    words = [f"the {i}th" for i in range(12)]
    assert own[:3] == ["0", "1", "10"]
    in_file = read_class_names(written(tmp_path, json.dumps(dict(enumerate(words)))))
    for given in (
        words,
        tuple(words),
        dict(enumerate(words)),
        {str(i): word for i, word in enumerate(words)},
        in_file,
    ):
        assert named(image_dataset(rows(own, feature=feature), processor, class_names=given)) == [
            words[int(label)] for label in own
        ]
    some = image_dataset(rows(["3", "10"], feature=feature), processor, class_names=dict(enumerate(words)))
    assert named(some) == [words[3], words[10]]


def test_a_dict_from_0_over_named_labels_is_a_list(tmp_path, processor):
    given = dict(enumerate(ANIMALS[::-1]))
    for names in (given, read_class_names(written(tmp_path, json.dumps(given)))):
        data = image_dataset(rows(ANIMALS), processor, class_names=names)
        assert (data.class_names, named(data)) == (tuple(ANIMALS[::-1]), ANIMALS)
        integers = image_dataset(rows([2, 0], feature=Value("int64")), processor, class_names=names)
        assert named(integers) == ["bee", "dog"]
        with pytest.raises(ValueError, match=r"mapping \{label: name\}: \{'one': '\.\.\.', 'two': "):
            image_dataset(rows(WORDS[:4]), processor, class_names=names)


@pytest.mark.parametrize("values", [[3, 1, 0, 2], ["3", "1", "0", "2"]])
def test_a_mapping_the_other_way_round_is_turned(values, tmp_path, processor):
    given = dict(zip(["dog", "bee", "ant", "cat"], values, strict=True))
    for names in (given, read_class_names(written(tmp_path, json.dumps(given)))):
        data = image_dataset(rows(ANIMALS), processor, class_names=names)
        assert (data.class_names, named(data)) == (tuple(ANIMALS), ANIMALS)
        assert named(image_dataset(rows([2, 0], feature=Value("int64")), processor, class_names=names)) == [
            "cat",
            "ant",
        ]


@pytest.mark.parametrize("values", [[0, 1, 1, 2], ["n01440764", "n01443537", "n02123045", "n00000001"]])
def test_a_mapping_from_names_to_ids_is_refused(values, tmp_path, processor):
    given = dict(zip(ANIMALS, values, strict=True))
    with pytest.raises(ValueError, match=r"class_names.*'ant'.*\{label: name\}"):
        image_dataset(rows(ANIMALS), processor, class_names=given)
    with pytest.raises(ValueError, match=r"names\.txt.*class_names.*'ant'.*\{label: name\}"):
        read_class_names(written(tmp_path, json.dumps(given)))


@pytest.mark.parametrize("numbers", [[1, 2, 3, 4], [21, 7, 14, 0]])
def test_a_mapping_from_names_to_any_numbers_is_turned(numbers, tmp_path, processor):
    given = dict(zip(ANIMALS, numbers, strict=True))
    for names in (given, read_class_names(written(tmp_path, json.dumps(given)))):
        assert named(image_dataset(rows(numbers, feature=Value("int64")), processor, class_names=names)) == ANIMALS
        with pytest.raises(ValueError, match="'5'"):
            image_dataset(rows([5], feature=Value("int64")), processor, class_names=names)


@pytest.mark.parametrize(
    ("labels", "names", "absent"),
    [
        ([0, 1, 2, 3], ["Animal", *ANIMALS], ["4", "'dog'", "0 to 3"]),
        ([1, 2, 3], ANIMALS, ["0", "'ant'", "1 to 3"]),
        ([1.0, 2.0], ANIMALS, ["0", "'ant'", "3", "'dog'", "1 to 2"]),
    ],
)
def test_an_end_of_a_list_that_no_integer_means_is_warned_of_once(
    labels, names, absent, tmp_path, processor, caplog, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after every shuffled stream
    plain = rows(labels, feature=Value("float64" if isinstance(labels[0], float) else "int64"))
    plain.to_parquet(tmp_path / "test.parquet")
    loads = [
        lambda names: image_dataset(plain, processor, class_names=names),
        lambda names: load_image_dataset(str(tmp_path), "test", processor, class_names=names),
        lambda names: load_image_dataset(str(tmp_path), "test[:100%]", processor, class_names=names),
        lambda names: load_image_dataset(
            str(tmp_path), "test", processor, class_names=names, streaming=True, max_images=9
        ),
    ]
    for load in loads:
        caplog.clear()
        assert sorted(row["labels"] for row in load(names)) == labels
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert not [word for word in absent if word not in record.getMessage()]
        caplog.clear()
        load(dict(enumerate(names)))
        assert not caplog.records, "a mapping says which number is which"


def test_lists_that_fit_known_sets_and_named_labels_are_not_warned_of(processor, caplog):
    image_dataset(rows([0, 3, 3], feature=Value("int64")), processor, class_names=ANIMALS)
    image_dataset(rows(ANIMALS[1:3], feature=Value("string")), processor, class_names=ANIMALS)
    labels = ClassLabel(names=ANIMALS)
    image_dataset(rows([1, 2], feature=Value("int64")).cast_column("label", labels), processor, class_names=ANIMALS)
    known = specs.find_spec("fashion_mnist")
    own = names_of_spec(known, Value("int64"), None)
    assert image_dataset(rows([3], feature=Value("uint8")), processor, class_names=own).class_names[3] == own[3]
    assert not caplog.records


def test_floats_without_a_fraction_and_bytes_are_labels(processor):
    floats = image_dataset(rows([3.0, 0.0], feature=Value("float32")), processor, class_names=ANIMALS)
    assert named(floats) == ["dog", "ant"] and named(floats.only(["dog"])) == ["dog"]
    mapped = image_dataset(rows([7.0, 2.0], feature=Value("float64")), processor, class_names={2: "bee", 7: "ant"})
    assert named(mapped) == ["ant", "bee"] and named(mapped.shots(1)) == ["ant", "bee"]
    texts = image_dataset(rows([b"dog", b"bee"], feature=Value("binary")), processor, class_names=ANIMALS)
    assert named(texts) == ["dog", "bee"] and named(texts.only(["bee"])) == ["bee"]
    for odd, what in ((0.5, "0.5"), (float("nan"), "row 1"), (float("inf"), "inf")):
        with pytest.raises(ValueError, match=rf"{what}.*'label'|'label'.*{what}"):
            image_dataset(rows([0.0, odd], feature=Value("float64")), processor, class_names=ANIMALS)


def test_integers_from_1_and_a_file_for_names_tell_the_mend(tmp_path, processor):
    plain = rows([1, 2, 3, 4], feature=Value("int64"))
    with pytest.raises(ValueError, match=r"from 1 to 4.*\{1: 'ant'"):
        image_dataset(plain, processor, class_names=ANIMALS)
    for path in (tmp_path / "names.txt", str(tmp_path / "names.txt")):
        with pytest.raises(ValueError, match=r"names\.txt'.*read_class_names"):
            image_dataset(plain, processor, class_names=path)


def test_what_a_file_holds_is_cut_short_in_errors(tmp_path):
    coco = {"categories": [{"id": i, "name": f"thing {i}"} for i in range(999)]}
    with pytest.raises(ValueError, match=r"class_names\['categories'\]") as caught:
        read_class_names(written(tmp_path, json.dumps(coco)))
    assert len(str(caught.value)) < 600


def test_the_class_index_of_imagenet_gives_names(tmp_path):
    pairs = {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}
    assert read_class_names(written(tmp_path, json.dumps(pairs))) == ["tench", "goldfish"]


def test_digits_may_be_the_names_of_numbers(processor):
    data = image_dataset(rows([1, 0], feature=Value("int64")), processor, class_names={0: "7", 1: "3"})
    assert named(data) == ["3", "7"]


@pytest.mark.parametrize("odd", ["n01440764", "class_3", "a1b2c3d4", "class b"])
def test_names_that_are_ids_are_warned_of(odd, processor, caplog):
    for given in (["ant", odd], {0: "ant", 1: odd}):
        caplog.clear()
        assert named(image_dataset(rows([0, 1], feature=Value("int64")), processor, class_names=given)) == ["ant", odd]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert repr(odd) in caplog.text
    caplog.clear()
    image_dataset(rows([0, 1], feature=Value("int64")), processor, class_names=["5", "10"])
    assert not caplog.records


@pytest.mark.parametrize("part", ["test[:2]", "test[50%:]", "test[:1]+test[3:]"])
def test_a_part_of_integers_from_1_is_refused(part, tmp_path, processor, monkeypatch):
    """Which alone would look like classes from 0."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for start in (1, 0):
        (tmp_path / str(start)).mkdir()
        labels = [2, 1, 4, 3] if start else [1, 0, 2, 3]
        rows(labels, feature=Value("int64")).to_parquet(tmp_path / str(start) / "test.parquet")
    with pytest.raises(ValueError, match=r"from 1 to 4.*4 class names"):
        load_image_dataset(str(tmp_path / "1"), part, processor, class_names=ANIMALS)
    data = load_image_dataset(str(tmp_path / "0"), part, processor, class_names=ANIMALS)
    assert named(data) == {"test[:2]": ["bee", "ant"], "test[50%:]": ["cat", "dog"]}.get(part, ["bee", "dog"])


def test_labels_that_are_texts_need_names_in_no_order(processor):
    with pytest.raises(ValueError, match=r"class_names.*'dog'.*any order"):
        image_dataset(rows(["dog", "ant"], feature=Value("string")), processor)


@pytest.mark.parametrize(("count", "odd"), [(3, "dog"), (5, "'five'"), (10, "'five'")])
def test_another_number_of_unrelated_names_is_refused(count, odd, processor):
    with pytest.raises(ValueError, match=rf"class_names has {count} names.*{odd}"):
        image_dataset(rows(ANIMALS), processor, class_names=WORDS[:count])


def test_a_mapping_translates_the_own_labels(processor):
    """By letters and digits; entries without a label are no classes."""
    own = ["n02123045", "Great_White", "x"]
    given = {"great white": "shark", "n02123045": "tabby", "X": "letter", "n00000001": "nothing"}
    data = image_dataset(rows(own), processor, class_names=given)
    assert (data.class_names, named(data)) == (("tabby", "shark", "letter"), ["tabby", "shark", "letter"])
    with pytest.raises(ValueError, match="label 'x', which is none"):
        image_dataset(rows(own), processor, class_names={k: v for k, v in given.items() if k != "X"})
    with pytest.raises(ValueError, match=r"class_names.*repeats"):
        image_dataset(rows(own), processor, class_names=dict.fromkeys(own, "same"))
    with pytest.raises(ValueError, match=r"class_names\[2\]=7"):
        image_dataset(rows(own), processor, class_names={**given, "X": 7})


@pytest.mark.parametrize(
    ("labels", "kind", "mapping", "expected"),
    [
        ([3, 1, 2], "int64", {1: "a", 2: "b", 3: "c"}, ["c", "a", "b"]),
        ([3, 1, 3], "int64", {"1": "a", "3": "c", "9": "z"}, ["c", "a", "c"]),
        ([True, False, True], "bool", {False: "no", True: "yes"}, ["yes", "no", "yes"]),
        (["x y", "X_Y", "z"], "string", {"z": "a", "x-y": "b"}, ["b", "b", "a"]),
    ],
)
def test_a_mapping_translates_plain_labels(labels, kind, mapping, expected, processor):
    data = image_dataset(rows(labels, feature=Value(kind)), processor, class_names=mapping)
    assert (data.class_names, named(data)) == (tuple(mapping.values()), expected)


def test_a_missing_label_is_not_class_1(processor):
    """Letters and digits alone would make -1 the label 1."""
    with pytest.raises(ValueError, match="label '-1'"):
        image_dataset(rows([1, -1, 2], feature=Value("int64")), processor, class_names={1: "a", 2: "b"})


def test_a_known_dataset_has_no_label_minus_one(tmp_path, processor, monkeypatch):
    plain = rows([1, 2, -1], feature=Value("int64"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: plain)
    monkeypatch.delenv("HF_ROBUST_CLIP_DATA_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="label '-1'"):
        load_image_dataset("caltech256", "test", processor)


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["C", "C++"], ["C++", "Java"]), (["version 1.5", "version 15"], ["version 15", "b"]), (["+", "-"], ["+", "x"])],
)
def test_labels_that_differ_in_signs_are_not_one_class(labels, names, processor):
    for feature in (None, Value("string")):
        with pytest.raises(ValueError, match=r"class|mapping"):
            image_dataset(rows(labels, feature=feature), processor, class_names=names)


def test_a_number_is_no_other_with_the_same_digits(processor):
    with pytest.raises(ValueError, match=r"'version 1\.5'"):
        image_dataset(rows(["version 1.5", "x"]), processor, class_names=["version 15", "x"])


def test_accents_of_their_own_are_the_same_letters(processor):
    data = image_dataset(rows(["Zu\u0308rich", "Bern"]), processor, class_names=["Bern", "Z\u00fcrich"])
    assert named(data) == ["Z\u00fcrich", "Bern"]


def test_plain_integers_keep_their_meaning(processor):
    data = image_dataset(rows([2, 0, 1], feature=Value("int32")), processor, class_names=ANIMALS)
    assert (named(data), data.label_map, len(data.class_names)) == (["cat", "ant", "bee"], None, 4)


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ("cat, dog", "class_names='cat, dog'"),
        ("_sources", "class_names='_sources'"),
        ({"ant", "bee", "cat", "dog"}, "class_names is a set"),
        ([], "class_names is empty"),
        ({}, "class_names is empty"),
        ({1: "a", "1": "b"}, "class_names"),
        ([1, 2, 3, 4], r"class_names\[0\]=1"),
    ],
)
def test_names_that_are_none(given, argument, processor):
    with pytest.raises(ValueError, match=argument):
        image_dataset(rows(ANIMALS), processor, class_names=given)


# ---- labels that are ids


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        (["n01440764", "n01443537"], "n01440764"),
        (["cat", "n01443537"], "n01443537"),
        (["n02085620-Chihuahua", "n02085782-Japanese_spaniel"], "n02085620-Chihuahua"),
        (["0", "1"], "0"),
        (["dog", "7"], "7"),
        (["class_3", "dog"], "class_3"),
        (["dog", "label 7"], "label 7"),
        (["id12", "dog"], "id12"),
        (["Category-4", "dog"], "Category-4"),
        (["c0", "c1", "c12"], "c0"),
        (["sub-1-a", "sub-2-a"], "sub-1-a"),
        (["a1b2c3d4", "deadbee5"], "a1b2c3d4"),
        (["dog", "0a8b3c4d-1e2f-4a5b-8c6d-7e8f90a1b2c3"], "0a8b3c4d"),
        (["dog", "d41d8cd98f00b204e9800998ecf8427e"], "d41d8"),
        (["class_a", "class_b"], "class_a"),
        (["001.Albatross", "002.Auklet"], "001.Albatross"),
    ],
)
def test_labels_that_are_ids_are_refused(own, shown, processor):
    with pytest.raises(ValueError, match=rf"{shown}.*class_names"):
        image_dataset(rows(own), processor)
    with pytest.raises(ValueError, match=r"class_names"):
        image_dataset(rows(range(len(own)), feature=ClassLabel(num_classes=len(own))), processor)


@pytest.mark.parametrize(
    "own",
    [
        ANIMALS,
        ["MD-80", "737-200"],
        ["x 1", "y 2"],
        ["+", "-"],
        ["4x4", "18-wheeler", "car"],
        ["class_1st", "b"],
        ["NO2", "b"],
        ["defaced", "effaced", "acceded", "fadedbeaded"],
        ["classa", "vitamin a"],
    ],
)
def test_labels_that_are_names_are_prompts(own, processor):
    assert image_dataset(rows(own), processor).class_names == tuple(own)


def test_numbers_are_names_if_one_says_so(processor):
    digits = [str(i) for i in range(10)]
    data = image_dataset(rows(digits), processor, class_names=digits)
    assert (data.class_names, named(data)) == (tuple(digits), digits)


def test_a_known_set_of_names_by_its_key(processor):
    """Class folders called by WordNet ids, of which the error names the table; and names in label order."""
    wnids = ["n02123045", "n01443537"]
    with pytest.raises(ValueError, match="class_names='tiny_imagenet'"):
        image_dataset(rows(wnids), processor)
    with pytest.raises(ValueError, match=r"class_names(?!.*tiny_imagenet)"):
        image_dataset(rows([*wnids, "n00000001"]), processor)
    with pytest.raises(ValueError, match=r"class_names(?!.*caltech256)"):
        image_dataset(rows(["1", "2"]), processor)
    data = image_dataset(rows(wnids), processor, class_names="tiny_imagenet")
    assert (data.class_names, named(data)) == (("tabby", "goldfish"), ["tabby", "goldfish"])
    data = image_dataset(rows([3, 9], feature=Value("int64")), processor, class_names="stl10")
    assert named(data) == [specs.class_names("stl10")[i] for i in (3, 9)]


# ---- files of names


def written(tmp_path, text):
    file = tmp_path / "names.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    "text",
    [
        "{0: 'tench, Tinca tinca',\n 1: 'goldfish',\n 2: \"hen's\"}",
        '{"0": "tench, Tinca tinca", "1": "goldfish", "2": "hen\'s"}',
        "{2: \"hen's\", 1: 'goldfish', 0: 'tench, Tinca tinca'}",
        "['tench, Tinca tinca',\n 'goldfish',\n \"hen's\",]",
        "('tench, Tinca tinca', ' goldfish ', \"hen's\")",
        '["tench, Tinca tinca", "goldfish", "hen\'s"]',
        "tench, Tinca tinca\ngoldfish\nhen's\n",
    ],
)
def test_lists_and_dicts_in_label_order(text, tmp_path):
    assert read_class_names(written(tmp_path, text)) == ["tench, Tinca tinca", "goldfish", "hen's"]


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("{'n01440764': 'tench', 'n01443537': ' goldfish'}", {"n01440764": "tench", "n01443537": "goldfish"}),
        ('{"1": "a", "2": "b"}', {"1": "a", "2": "b"}),
        ("{1: 'a', 10: 'b'}", {"1": "a", "10": "b"}),
    ],
)
def test_other_dicts_are_mappings(text, mapping, tmp_path):
    assert read_class_names(written(tmp_path, text)) == mapping


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"n01440764": ["tench"]}', r"class_names\['n01440764'\].*list"),
        ('[{"name": "tench"}]', r"class_names\[0\].*dict"),
        ("{'tench', 'goldfish'}", "set"),
        ('{"0": "a", "0": "b"}', "twice"),
        ("{0: 'a', 0: 'b'}", "twice"),
        ("{0: 'a', '0': 'b'}", "twice"),
        ("{0: 'a', 1: }", "begin like a JSON dict"),
        ("{0: open('x')}", "begin like a JSON dict"),
        ("{0: 'a', 1: 'a'}", "repeats"),
        ("{}", "class_names is empty"),
        ("Käse\nBrot\n".encode("latin-1"), "UTF-8"),
        ("cat\ndog\n".encode("utf-16-le"), "zero bytes"),
        ("cat\ndog\n".encode("utf-16"), "UTF-8"),
        ("n01440764 tench\nn01443537 goldfish\n", "n01440764 tench"),
        ("n01440764\ttench\nn01443537\tgoldfish\n", "columns"),
        ("0 tench\n1 goldfish\n", "0 tench"),
        ("0,tench\n1,goldfish\n", "0,tench"),
        ("0: tench\n1: goldfish\n", "0: tench"),
        ("1. tench\n2. goldfish\n", "1. tench"),
        ("tench 0\ngoldfish 1\n", "tench 0"),
        ("tench: 0\ngoldfish: 1\n", "tench: 0"),
        ("- cat\n- dog\n", "'-'"),
        ("* cat\n* dog\n", r"'\*'"),
        ('"cat",\n"dog",\n"bee"\n', "'\"'"),
        ("cat,\ndog,\n", "columns"),
        ("cat;\ndog;\n", "columns"),
        ("cat|\ndog|\n", "columns"),
        ("cat: feline\ndog: canine\n", "columns"),
        ("cat # feline\ndog # canine\n", "columns"),
        ("cat\t0\ndog\n", "columns"),
        ("cat: 1\ndog: 0\n", "columns"),
        ("cat 1\ndog 0\n", "their numbers"),
        ("a) cat\nb) dog\n", r"a\) cat"),
        ("2\ncat\ndog\n", "first line '2'"),
        ("Animals:\ncat\ndog\n", "Animals:"),
        ("<h1>animals</h1>\ncat\ndog\n", "<h1>"),
        ("cat|feline\ndog|canine\n", "columns"),
        ("cat = feline\ndog = canine\n", "columns"),
        ("cat,feline\ndog,canine\n", "columns"),
        ("cat\tfeline\ndog\tcanine\n", "columns"),
        ("cat, dog, bee\n", "columns"),
        ("label\ncat\ndog\n", "label"),
        ("names:\n  0: cat\n  1: dog\n", "names:"),
        ("# classes\ncat\ndog\n", "# classes"),
        ("// digits\ncat\ndog\n", "// digits"),
        ("-- animals\ncat\ndog\n", "-- animals"),
        ("cat\n; animals\ndog\n", "; animals"),
        ("% animals\ncat\ndog\n", "% animals"),
        ("0_tench\n1_goldfish\n", "0_tench"),
        ("0-tench\n1-goldfish\n", "0-tench"),
        ("0=tench\n1=goldfish\n", "0=tench"),
        ("0|tench\n1|goldfish\n", "0|tench"),
        ("tench|0\ngoldfish|1\n", "tench|0"),
        ("tench_1\ngoldfish_2\n", "tench_1"),
        ("label 0: tench\nlabel 1: goldfish\n", "label 0: tench"),
        ("class1 = tench\nclass2 = goldfish\n", "class1 = tench"),
        ("n01440764_tench\nn01443537_goldfish\n", "n01440764_tench"),
        ("n01440764\nn01443537\n", "n01440764"),
        ("class_1\nclass_3\n", "class_1"),
        ("names = ['cat',\n'dog']\n", "names = "),
    ],
)
def test_files_that_hold_more_than_names_are_refused(text, what, tmp_path):
    with pytest.raises(ValueError, match=rf"names\.txt(?s:.*){what}") as caught:
        read_class_names(written(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["tench, Tinca tinca", "goldfish", "shark, white, great"],
        ["7 up", "cola"],
        ["Boeing 737", "Airbus 320"],
        ["t-shirt", "'s-Hertogenbosch", "C++"],
        ["(none)", "cat"],
        ["737-200", "747-300"],
        ["0", "1", "2"],
        ["7", "3"],
        ["C#", "C", "F#"],
        ["Alien: Romulus", "Heat", "Se7en"],
        ["U 2", "U 10"],
        ["हिन्दी", "अंग्रेज़ी"],
        ["only"],
    ],
)
def test_lines_that_are_names_are_read(names, tmp_path):
    assert read_class_names(written(tmp_path, "\n".join(names))) == names


def test_names_of_a_file_or_a_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert class_names_of("stl10") == specs.class_names("stl10")
    assert class_names_of(str(written(tmp_path, json.dumps(ANIMALS)))) == ANIMALS
    with pytest.raises(OSError, match=r"class_names='nams\.txt'"):
        class_names_of("nams.txt")
    (tmp_path / "stl10").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"class_names='stl10'.*\./stl10"):
        class_names_of("stl10")
    assert class_names_of("./stl10") == ["cat", "dog"]
