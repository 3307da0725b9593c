"""Cards with a text wherever one comes in from outside, and what a reader's program makes of them."""

import ast
import functools
from dataclasses import replace

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


@functools.cache
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


@functools.cache
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
