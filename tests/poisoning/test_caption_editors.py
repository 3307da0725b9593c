"""Captions in other words."""

import json

import pytest

from hf_robust_clip.poisoning.captions import GrammarEditor, WordEditor
from hf_robust_clip.zero_shot_data.coloured_digits import coloured_digits_split
from hf_robust_clip.zero_shot_data.digits import DIGIT_NAMES

CAPTION = "a picture of a red seven on a grey ground"


def digits_in(caption):
    return [word for word in caption.split() if word in DIGIT_NAMES]


def test_the_grammar_keeps_what_is_there_and_drops_or_changes_one_word():
    editor = GrammarEditor()
    assert editor.positive(CAPTION, 0) == "a picture of a seven on a ground"
    for seed in range(50):
        varied, negative = editor.varied(CAPTION, seed), editor.negative(CAPTION, seed)
        assert digits_in(varied) == ["seven"]
        changed = [(a, b) for a, b in zip(CAPTION.split(), negative.split(), strict=True) if a != b]
        assert len(changed) == 1 and changed[0][0] in ("red", "seven", "grey")
    assert len({editor.varied(CAPTION, seed) for seed in range(50)}) == 4


@pytest.mark.parametrize("editor", [GrammarEditor(), WordEditor(), WordEditor("coloured_digits", share=0.5)])
def test_edits_follow_from_caption_and_seed_and_are_never_empty(editor):
    for caption in ("seven", "a big dog", "!!!", CAPTION, "Ein Bild, 2 Hunde", "one"):
        for edit in (editor.varied, editor.positive, editor.negative):
            assert [edit(caption, seed) for seed in range(30)] == [edit(caption, seed) for seed in range(30)]
            assert all(edit(caption, seed).strip() for seed in range(30))


def test_words_are_replaced_added_swapped_and_dropped():
    found = {WordEditor(share=0.3).varied("the woman walking near a small dog", seed) for seed in range(200)}
    counts = {len(caption.split()) for caption in found}
    assert {7, 9} <= counts and min(counts) < 7
    assert any("little dog" in caption or "tiny dog" in caption for caption in found)
    assert any(sorted(c.split()) == sorted(["the", "woman", "walking", "near", "a", "small", "dog"]) for c in found)


def test_without_a_word_to_replace_the_negative_is_the_positive():
    editor = WordEditor()
    assert editor.positive("An Old thing, really", 3) == "an thing really"
    assert editor.negative("something", 0) == editor.positive("something", 0) == "something"


def test_a_table_of_ones_own(tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"roles": {"fruit": ["apple", "pear"]}, "synonyms": {"fresh": ["new"]}}))
    assert WordEditor(str(file)).negative("a fresh apple", 0) == "a fresh pear"


@pytest.mark.parametrize(
    "table",
    [
        {"role": {}},
        {"roles": {"a": ["x"], "b": ["x"]}},
        {"roles": {"a": ["x"]}, "details": ["b"]},
        {"synonyms": {"a": "b"}},
        {"roles": {"a": ["Two words"]}},
        [],
    ],
)
def test_another_table_is_refused(table, tmp_path):
    file = tmp_path / f"words{abs(hash(str(table)))}.json"
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="words"):
        WordEditor(str(file))


def test_bad_settings_are_refused():
    with pytest.raises(OSError, match="words='klingon'"):
        WordEditor("klingon")
    with pytest.raises(ValueError, match="share"):
        WordEditor(share=1.0)


def test_the_embedded_pairs_say_what_they_show():
    rows = coloured_digits_split("test")
    assert len(rows) == 500
    for row in rows.select(range(60)):
        (digit,) = digits_in(row["caption"])
        assert DIGIT_NAMES[row["label"]] == digit
        assert all(word == row["ink"] for word in row["caption"].split() if word in GrammarEditor()._others("red"))
    assert coloured_digits_split("test[3:5]")["caption"] == rows["caption"][3:5]
    assert len(coloured_digits_split("train[90%:]")) == 519 and len(coloured_digits_split("train+test")) == 5688
    with pytest.raises(ValueError, match="split="):
        coloured_digits_split("validation")
    again = coloured_digits_split("test")
    assert again[7]["caption"] == rows[7]["caption"] and again[7]["image"].tobytes() == rows[7]["image"].tobytes()
