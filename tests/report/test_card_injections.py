"""A card says what it is told, and only that: no text that comes in becomes a heading, a link, HTML or code."""

import ast
import json
from dataclasses import replace
from html import unescape

import pytest
import yaml
from markdown_it import MarkdownIt
from reports import BEFORE, INFO, PER_CLASS, SETTINGS, make_defence, make_report

from hf_robust_clip.paper import Paper
from hf_robust_clip.report import make_card, make_unmeasured_card, prompt_hash

HOSTILE = (
    'x"); import os; os.abort() #\n\n# Owned\n\n```python\nimport antigravity\n```\n<script>alert(1)</script>'
    "<img src=x onerror=alert(2)> ![p](http://evil/p.png) [click](javascript:alert(3)) [r]: http://evil\r\n"
    "| a | b |\n|---|---|\n---\nlicense: stolen\n---\u2028## Also owned\n> quoted\n- listed"
    r" ![a[b]c](http://evil/t.png) [a[b]c](http://evil) [a\]b](http://evil) \\[a](http://evil) ~~~"
)
BEGINNINGS = (
    "~~~",
    "1. x",
    "2) y",
    "    code",
    "***",
    "_ _ _",
    "- - -",
    "+ x",
    "# x",
    "> x",
    "=",
    "```",
    "[a]: http://evil",
)
BENIGN = "plain words"


def cards(text: str) -> dict[str, str]:
    """Every kind of card, with a text wherever one comes in from outside."""
    settings = {
        **SETTINGS, "optimizer": text, text: text, "objective": {"alpha": text}, "threat_model": f"L-inf {text}",
    }  # fmt: skip
    paper = Paper(text, text, text, text, f"@misc{{{text}}}")
    info = replace(
        INFO, repo_id=f"user/{text}", base_model=text, training_data=text, template=f"{text} {{}}",
        class_names=(text, "dog"), limits=" ".join(text.split()), datasets=[text], settings=settings, paper=paper,
    )  # fmt: skip
    defence = make_defence(name=text, parameters={text: text})
    told = dict(
        name=text, task=text, model=text, dataset=text, split=text, attack=text, hardware=text, precision=text,
        attack_parameters={"steps": text, "left_out": {text: text}}, templates=(f"{text} {{}}",),
        prompt_hash=prompt_hash(list(PER_CLASS), [f"{text} {{}}"]),
    )  # fmt: skip
    own = make_report(**told)
    through = make_report(**{**told, "defence": defence, "attack_target": "adaptive_worst"})
    prompts = replace(info, settings={**settings, "prompts": f"design VLI {text}", "text_tokens": 2})
    return {
        "model": str(make_card([own], BEFORE, info)),
        "prompts": str(make_card([own], BEFORE, prompts)),
        "defence": str(make_card([own, through], BEFORE, prompts)),
        "unmeasured": str(make_unmeasured_card(replace(info, base_model="", ancestor=text), "model")),
        "unmeasured defence": str(make_unmeasured_card(replace(info, settings={text: text}), "defence")),
    }


def outline(card: str) -> dict[str, object]:
    """What a reader's program makes of a card, without the words of its paragraphs."""
    metadata, _, body = card.removeprefix("---\n").partition("\n---\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    return {
        "metadata": sorted(yaml.safe_load(metadata)),
        "blocks": [token.type for token in tokens if token.type != "inline"],
        "html": [token.content for token in (*tokens, *inline) if token.type.startswith("html")],
        "links": [token.attrs.get("href") or token.attrs.get("src") for token in inline
                  if token.type in ("link_open", "image")],
    }  # fmt: skip


def python_blocks(card: str) -> list[ast.Module]:
    tokens = MarkdownIt("commonmark").parse(card.partition("\n---\n")[2])
    return [ast.parse(token.content) for token in tokens if token.type == "fence" and token.info == "python"]


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
