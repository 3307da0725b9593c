"""A card says what it is told, and only that: no text that comes in becomes a heading, a link, HTML or code."""

import ast
import json
from dataclasses import replace
from html import unescape

import pytest
import yaml
from card_texts import BEGINNINGS, BENIGN, HOSTILE, cards, outline, python_blocks
from markdown_it import MarkdownIt
from reports import INFO, make_report

from hf_robust_clip.report import make_card


@pytest.mark.parametrize("kind", list(cards(BENIGN)))
def test_hostile_texts_change_the_words_of_a_card_and_nothing_else(kind):
    hostile, benign = cards(HOSTILE)[kind], cards(BENIGN)[kind]
    assert outline(hostile) == {**outline(benign), "metadata": outline(hostile)["metadata"]}
    assert set(outline(hostile)["metadata"]) <= {*outline(benign)["metadata"], "model-index"}
    assert outline(hostile)["html"] == []
    assert yaml.safe_load(hostile.removeprefix("---\n").partition("\n---\n")[0]).get("license") != "stolen"


@pytest.mark.parametrize("text", BEGINNINGS)
def test_no_text_begins_a_block(text):
    for kind, card in cards(text).items():
        assert outline(card)["blocks"] == outline(cards(BENIGN)[kind])["blocks"]


@pytest.mark.parametrize("kind", list(cards(BENIGN)))
def test_code_in_a_card_holds_hostile_names_as_texts_alone(kind):
    def shape(tree: ast.Module) -> str:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = "text"
        return ast.dump(tree)

    blocks = python_blocks(cards(HOSTILE)[kind])
    assert blocks and [shape(tree) for tree in blocks] == [shape(tree) for tree in python_blocks(cards(BENIGN)[kind])]
    told = [node.value for tree in python_blocks(cards(HOSTILE)[kind]) for node in ast.walk(tree)
            if isinstance(node, ast.Constant)]  # fmt: skip
    assert f"user/{HOSTILE}" in told and f"{HOSTILE} {{}}" in told


def test_words_that_need_no_care_are_left_as_they_are():
    """Names as people write them: what a reader sees is what was given."""
    name = "a_b*c* (1 < 2) & [v2] 5 > 4 ünï #1"
    card = str(make_card([make_report(task=name)], [], replace(INFO, limits=name)))
    rendered = MarkdownIt("commonmark").enable("table").render(card)
    assert name in unescape(rendered).replace("<em>c</em>", "*c*")
    assert json.dumps(["cat", "dog", "newt"]) in card
