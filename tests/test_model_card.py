import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_report import make_report

from hf_robust_clip.model_card import CardInfo, make_card
from hf_robust_clip.objectives.pmg_aft import PMGAFT

EXPECTED = Path(__file__).parent / "data" / "expected_card.md"
SETTINGS = {
    "method": "PMG-AFT",
    "objective": {"alpha": 1.0, "temperature": None},
    "threat_model": "L-inf eps=4/255",
    "attack": {"num_steps": 2, "step_size": 1 / 255, "random_start": True, "keep_best": False},
    "optimizer": "sgd",
    "learning_rate": 5e-05,
    "images_per_update": 256,
}
INFO = CardInfo(
    repo_id="user/robust-clip",
    base_model="user/clip",
    training_data="user/pictures, split train, 1000 images of 4 classes (cat, dog, newt, owl), main",
    paper=PMGAFT.paper,
    settings=SETTINGS,
    template="This is a photo of a {}",
    class_names=("cat", "dog", "newt", "owl"),
    limits="It knows four animals.",
    datasets=["user/pictures"],
    plot="accuracy.png",
    license="apache-2.0",
)
OWN = [
    make_report(name="PMG-AFT"),
    make_report(
        name="PMG-AFT",
        task="held-out classes",
        clean_accuracy=0.6,
        robust_accuracy={1 / 255: 0.4, 4 / 255: 0.1},
        zero_gradient_share=0.0,
    ),
]
BEFORE = [make_report(name="undefended", clean_accuracy=1.0, robust_accuracy={1 / 255: 0.05})]


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a text, as rows of cells; fails on a table that a renderer would cut or refuse."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert set(rows[1]) == {"---"}, "a table starts with a heading and a rule"
        assert {len(row) for row in rows} == {len(rows[0])}, "every row has as many cells as the heading"
        found.append([rows[0], *rows[2:]])
    return found


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_whole_card():
    """After a wanted change: write str(make_card(OWN, BEFORE, INFO)) to the file and read it through."""
    assert str(make_card(OWN, BEFORE, INFO)) == EXPECTED.read_text(encoding="utf-8").rstrip("\n")


def test_tables_are_whole_and_hold_every_report():
    training, results = tables(make_card(OWN, BEFORE, INFO).text + "\n")
    assert ["temperature" in row[0] for row in training].count(True) == 1
    assert ["images per update", "256"] in training
    assert results[0][1:] == ["n", "classes", "clean", "L-inf eps=1/255", "L-inf eps=4/255"]
    assert [row[0] for row in results[1:]] == [
        "undefended, trained classes",
        "PMG-AFT, trained classes",
        "PMG-AFT, held-out classes",
    ]
    assert [row[-1][:4] for row in results[1:]] == ["-", "25.0", "10.0"]


def test_metadata_keeps_tasks_and_attacks_apart_through_a_file(tmp_path):
    make_card(OWN, BEFORE, INFO).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    rows = {(row.dataset_name, row.dataset_config): row.metric_value for row in data.eval_results}
    assert len(rows) == len(data.eval_results) == 6
    assert rows["user/pictures, trained classes", "trained classes, clean"] == 0.9
    assert rows["user/pictures, held-out classes", "held-out classes, clean"] == 0.6
    assert rows["user/pictures, held-out classes", "held-out classes, PGD-20 L-inf eps=4/255"] == 0.1
    assert (data.base_model, data.datasets, data.library_name) == ("user/clip", ["user/pictures"], "transformers")
    assert (data.model_name, data.pipeline_tag) == ("robust-clip", "zero-shot-image-classification")
    assert {"hf_robust_clip", "pmg-aft"} <= set(data.tags)


def test_a_card_without_figures_is_refused():
    with pytest.raises(ValueError, match="reports is empty"):
        make_card([], BEFORE, INFO)


def test_paths_are_no_hub_ids():
    info = replace(
        INFO, repo_id="out/robust/", base_model="digits-clip", datasets=["digits", "/data/pictures"], license=None
    )
    card = make_card(OWN, [], info)
    assert (card.data.model_name, card.data.base_model, card.data.datasets) == ("robust", None, None)
    assert "license" not in card.data.to_dict()
    assert "# robust\n" in card.text
    assert "`digits-clip`" in card.text


def test_unattacked_training_is_said():
    text = make_card(OWN, [], replace(INFO, settings={**SETTINGS, "attack": None}, plot=None)).text
    assert "without an attack" in text
    assert "Trained without an attack." in text
    assert "steps of" not in text
    assert "![" not in text
    assert len(tables(text + "\n")) == 2


@pytest.mark.parametrize("name", ["cat", "Tom's", 'a "big" cat', "back\\slash", "{}", "naïve <b> & so on"])
def test_examples_are_python_whatever_the_names(name):
    template = 'a "{}" picture'
    blocks = code_blocks(make_card(OWN, [], replace(INFO, class_names=[name, "dog"], template=template)).text)
    assert len(blocks) == 2
    seen = []

    class Stub:
        def __init__(self, *args, **kwargs):
            pass

        from_pretrained = classmethod(lambda cls, _: cls())
        __call__ = set_classes = lambda self, *args, **kwargs: seen.append((args, kwargs))

    for block in blocks:
        code = compile(re.sub(r"^from .*", "", block, flags=re.MULTILINE), "card", "exec")
        exec(code, {"pipeline": Stub, "CLIPForZeroShotClassification": Stub})
    assert seen[0][1]["candidate_labels"] == [name, "dog"]
    assert seen[1] == (([name, "dog"],), {"template": template})


def test_bars_and_line_breaks_in_names_do_not_break_tables():
    odd = [replace(OWN[0], task="in | out"), replace(OWN[1], task="two\nlines")]
    text = make_card(odd, [], replace(INFO, training_data="a | b\nc")).text
    training, results = tables(text + "\n")
    assert ["data", r"a \| b c"] in training
    assert [row[0] for row in results[1:]] == [r"PMG-AFT, in \| out", "PMG-AFT, two lines"]
