import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from reports import BEFORE, INFO, OWN, SETTINGS, auto_attack, make_defence, make_report, write_folder

from hf_robust_clip.attacks.views import KNOWN_VIEWS
from hf_robust_clip.report import (
    Measurement,
    blind_warning,
    load_card_info,
    load_reports,
    make_card,
    make_unmeasured_card,
    regenerate_card,
)
from hf_robust_clip.report.card import card_state, contradiction, eval_results, name_repository

EXPECTED = Path(__file__).parent.parent / "data" / "expected_card.md"


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
    """After a wanted change: write str(make_card(...)) to the file and read it through."""
    card = make_card([*OWN, auto_attack()], BEFORE, INFO)
    assert str(card) == EXPECTED.read_text(encoding="utf-8").rstrip("\n")


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
    assert rows["user/pictures, trained classes", "trained classes, clean, n=40"] == 0.9
    assert rows["user/pictures, held-out classes", "held-out classes, clean, n=40"] == 0.6
    assert rows["user/pictures, held-out classes", "held-out classes, PGD-20 L-inf eps=4/255, n=40"] == 0.1
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
        exec(code, {"pipeline": Stub, "AutoModelForZeroShotClassification": Stub})
    assert seen[0][1]["candidate_labels"] == [name, "dog"]
    assert seen[1] == (([name, "dog"],), {"template": template})


def test_bars_and_line_breaks_in_names_do_not_break_tables():
    odd = [replace(OWN[0], task="in | out"), replace(OWN[1], task="two\nlines")]
    text = make_card(odd, [], replace(INFO, training_data="a | b\nc")).text
    training, results = tables(text + "\n")
    assert ["data", r"a \| b c"] in training
    assert [row[0] for row in results[1:]] == [r"PMG-AFT, in \| out", "PMG-AFT, two lines"]


# ---- model-index


def test_eval_results_tell_task_and_radius_apart():
    rows = eval_results([make_report(task=task) for task in ("trained", "held-out")])
    assert len({row.unique_identifier for row in rows}) == len(rows) == 6
    values = [(row.dataset_config, row.metric_type, row.metric_value) for row in rows[:3]]
    assert values == [
        ("trained, clean, n=40", "accuracy", 0.9),
        ("trained, PGD-20 L-inf eps=1/255, n=40", "robust_accuracy", 0.7),
        ("trained, PGD-20 L-inf eps=4/255, n=40", "robust_accuracy", 0.25),
    ]
    assert rows[2].metric_args["eps"] == 4 / 255
    assert rows[2].metric_args["step_size"] == 0.2
    assert rows[2].metric_args["attack_target"] == "static"
    assert rows[0].metric_args is None


def test_eval_results_tell_attacks_targets_and_numbers_of_images_apart():
    reports = [
        make_report(),
        make_report(attack="AutoAttack", attack_parameters={"version": "standard", "step_size": 0.5}),
        make_report(attack_target="adaptive", defence=make_defence()),
        make_report(num_images=20),
    ]
    rows = [row for report in reports for row in eval_results([report])]
    robust = [row for row in rows if row.metric_type == "robust_accuracy"]
    assert len({row.unique_identifier for row in robust}) == len(robust) == 8
    assert robust[3].metric_args["step_size"] == 0.5
    configs = [row.dataset_config for row in rows]
    assert "trained classes, tapt, PGD-20 (adaptive) L-inf eps=1/255, n=40" in configs
    assert "trained classes, tapt, clean, n=40" in configs
    assert [row.metric_args.get("defence") for row in robust[3:6]] == [None, "tapt", "tapt"]
    assert {row.metric_value for row in rows if row.dataset_config == "trained classes, clean, n=20"} == {0.9}


def test_any_metric_becomes_a_row_and_a_column(tmp_path):
    area = Measurement("detection_auroc", 0.75, 80, 4 / 255, counted=False)
    report = replace(OWN[0], measurements=[*OWN[0].measurements, area])
    card = make_card([report, OWN[1]], BEFORE, INFO)
    row = card.data.eval_results[3]
    assert (row.metric_type, row.metric_value, row.metric_args["eps"]) == ("detection_auroc", 0.75, 4 / 255)
    results = tables(card.text + "\n")[1]
    assert results[0][-1] == "detection auroc 4/255"
    assert [line[-1] for line in results[1:]] == ["-", "75.0", "-"]


# ---- several attacks


def test_each_attack_has_its_table_and_its_parameters():
    held_out = auto_attack(
        task="held-out classes",
        attack_parameters={"version": "standard", "members": ["apgd-ce", "square"], "queries": None},
    )
    card = make_card([*OWN, auto_attack(), held_out], [*BEFORE, auto_attack(name="undefended")], INFO)
    text = card.text + "\n"
    assert re.findall(r"^### (.*)", text, re.MULTILINE) == ["PGD-20", "AutoAttack"]
    _, pgd, auto, members = tables(text)
    assert [row[0] for row in pgd[1:]] == [
        "undefended, trained classes",
        "PMG-AFT, trained classes",
        "PMG-AFT, held-out classes",
    ]
    assert [row[0] for row in auto[1:]] == [
        "undefended, trained classes",
        "PMG-AFT, trained classes",
        "PMG-AFT, held-out classes",
    ]
    assert members[:3] == [
        ["", "radius", "left"],
        ["undefended, trained classes", "L-inf eps=1/255", "apgd-ce 65.0, square 65.0"],
        ["undefended, trained classes", "L-inf eps=4/255", "apgd-ce 20.0, square 15.0"],
    ]
    assert len(members) == 1 + 3 * 2
    assert "; num steps 20, step size 0.1 / 0.2, random start yes, loss cross_entropy.\n" in text
    left_out = "Left out: apgd-t (needs 4 classes) on trained classes."
    assert f"; version standard, members apgd-ce / square, queries none. {left_out}\n" in text
    assert "Where AutoAttack is given, its figure is the one to quote" in text


def test_without_autoattack_the_card_says_what_is_missing():
    text = make_card(OWN, [auto_attack(name="undefended")], INFO).text
    assert "stronger ones (AutoAttack) can only lower these figures" in text
    assert "to quote" not in text


def test_other_parameters_targets_and_norms_make_other_tables():
    slow = make_report(attack_parameters={**OWN[0].attack_parameters, "step_size": 0.003})
    flags = {"randomised": True, "optimising": False}
    through = make_report(attack_target="adaptive", model_flags=flags, defence=make_defence())
    card = make_card([OWN[0], slow, through, make_report(norm="l2", robust_accuracy={0.5: 0.5}), slow], [], INFO)
    text = card.text + "\n"
    assert re.findall(r"^### (.*)", text, re.MULTILINE) == [
        "PGD-20, norm L-inf, step size 0.1 / 0.2",
        "PGD-20, norm L-inf, step size 0.003",
        "PGD-20 (adaptive)",
        "PGD-20, norm L2, step size 0.1 / 0.2",
        "tapt on TeCoA, trained classes",
    ]
    assert [len(table) for table in tables(text)[1:]] == [2, 3, 2, 2, 5]
    assert tables(text)[-2][0][-1] == "L2 eps=0.5"
    assert f"Attack: {KNOWN_VIEWS['adaptive'].text} (`attack_target: adaptive`)" in text
    assert "before the attack: randomised **yes**, optimising no." in text
    assert len(card.data.eval_results) == len({row.unique_identifier for row in card.data.eval_results}) == 9


def test_attacks_of_one_name_are_told_apart_by_what_they_differ_in():
    fewer = [auto_attack(task=f"of {n}", attack_parameters={"version": "standard", "num_targets": n}) for n in (9, 6)]
    text = make_card([*OWN, *fewer], BEFORE, INFO).text
    assert re.findall(r"^### (.*)", text, re.MULTILINE) == [
        *("PGD-20", "AutoAttack, num targets 9", "AutoAttack, num targets 6")
    ]


def test_a_defence_stands_beside_its_controls_and_the_attack_through_it():
    blind = make_report(name="APT", attack_target="defence_blind", defence=make_defence())
    worst = make_report(
        name="APT",
        attack="PGD-20+Square-500",
        attack_target="adaptive_worst",
        robust_accuracy={1 / 255: 0.2, 4 / 255: 0.0},
        defence=make_defence(fallbacks=3, ms_per_image=20.0),
    )
    card = make_card([worst, blind, OWN[0]], BEFORE, INFO)
    text = card.text + "\n"
    section = text[text.index("## Test-time defences") : text.index("## Limits")]
    assert "tapt on APT, trained classes" in section
    assert (
        "randomised and optimising and tunes 13,824 values for each image; num views 64, statistics none." in section
    )
    assert "12.5 ms per image on CPU; predictions whose tuning was not finite: 3." in section
    heading, *rows = tables(section)[0]
    assert heading == ["attack", "judged", "n", "clean", "L-inf eps=1/255", "L-inf eps=4/255"]
    assert [row[1] for row in rows] == [
        *("tapt", "control: static prompts", "control: random prompts", "control: ensemble-64")
    ] * 2
    assert [row[0] for row in rows[::4]] == ["PGD-20 (defence_blind)", "PGD-20+Square-500 (adaptive_worst)"]
    assert [row[-1].split()[0] for row in rows] == ["25.0", "50.0", "25.0", "75.0", "0.0", "50.0", "25.0", "75.0"]
    assert [table[1][0] for table in tables(text)[-3:-1]] == ["APT with tapt, trained classes"] * 2
    configs = {row.dataset_config for row in card.data.eval_results}
    assert "trained classes, tapt, PGD-20 (defence_blind) L-inf eps=1/255, n=40" in configs


@pytest.mark.parametrize(
    "change",
    [{}, {"task": "held-out classes"}, {"dataset": "user/others"}, {"name": "TeCoA"}, {"defence": "tpt"}],
    ids=str,
)
def test_a_blind_figure_never_stands_alone(change):
    """Neither of the model itself nor of one that it is compared with; elsewhere measured is not measured."""
    blind = make_report(name="APT", attack_target="defence_blind", defence=make_defence())
    other = {key: make_defence(name=value) if key == "defence" else value for key, value in change.items()}
    through = replace(make_report(name="APT", attack_target="adaptive", defence=make_defence()), **other)
    for own, compared in (([blind, *([through] if change else [])], []), (OWN, [blind, through][: 1 + bool(change)])):
        with pytest.raises(ValueError, match=r"'tapt' of APT, trained classes .*defence_blind report and none of"):
            make_card(own, compared, INFO)


def test_metadata_of_several_attacks_goes_through_a_file(tmp_path):
    slow = make_report(attack_parameters={"num_steps": 20}, robust_accuracy={1 / 255: 0.6, 4 / 255: 0.25})
    make_card([*OWN, auto_attack(), slow, auto_attack(num_images=20)], BEFORE, INFO).save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"[:-] [&*]id\d", text), "YAML aliases are hard to read"
    data = ModelCard.load(tmp_path / "README.md").data
    found = {row.dataset_config: row.metric_value for row in data.eval_results if "trained" in row.dataset_config}
    assert found == {
        "trained classes, clean, n=40": 0.9,
        "trained classes, PGD-20 L-inf eps=1/255, n=40": 0.7,
        "trained classes, PGD-20 L-inf eps=4/255, n=40": 0.25,
        "trained classes, AutoAttack L-inf eps=1/255, n=40": 0.65,
        "trained classes, AutoAttack L-inf eps=4/255, n=40": 0.15,
        "trained classes, PGD-20 L-inf eps=1/255, n=40 (2)": 0.6,
        "trained classes, PGD-20 L-inf eps=4/255, n=40 (2)": 0.25,
        "trained classes, clean, n=20": 0.9,
        "trained classes, AutoAttack L-inf eps=1/255, n=20": 0.65,
        "trained classes, AutoAttack L-inf eps=4/255, n=20": 0.15,
    }
    assert {row.metric_args["left_out"]["apgd-t"] for row in data.eval_results if "Auto" in row.dataset_config} == {
        "needs 4 classes"
    }


def test_limits_of_several_sentences_and_lines():
    text = make_card(OWN, [], replace(INFO, limits="It knows four. It fears dogs.\n\n  It is small.\n")).text
    points = [line for line in text.split("## Limits")[1].split("## Citation")[0].splitlines() if line]
    assert points[2:] == ["- It knows four. It fears dogs.", "- It is small."]
    assert all(point.startswith("- ") for point in points)


def test_where_it_was_measured_is_said_for_every_report():
    text = make_card(OWN, [make_report(hardware="1 x H100", precision="bfloat16", attack_resolution=224)], INFO).text
    assert "Measured in bfloat16 at 224 px on 1 x H100; float32 at 8 px on CPU; every setting" in text


def test_l2_step_is_no_grey_level():
    attack = {**SETTINGS["attack"], "step_size": 0.125}
    text = make_card(
        OWN, [], replace(INFO, settings={**SETTINGS, "threat_model": "L2 eps=0.5", "attack": attack})
    ).text
    assert "PGD with 2 steps of 0.125, from" in text


# ---- the card from the files beside it


@pytest.mark.parametrize(
    "info", [INFO, replace(INFO, license=None, plot=None, settings={**SETTINGS, "betas": (0.9, 1)})]
)
def test_card_is_made_again_from_its_report(info, tmp_path):
    written = write_folder(tmp_path, info)
    assert load_card_info(tmp_path / "report.json") == info
    assert load_reports(tmp_path / "report.json") == ([*OWN, auto_attack()], BEFORE)
    assert str(regenerate_card(tmp_path)) == written
    assert str(regenerate_card(str(tmp_path))) == written


@pytest.mark.parametrize("name", ["report.json", "recipe.yaml"])
def test_no_card_without_its_files(name, tmp_path):
    write_folder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {name}; a card is not made without"):
        regenerate_card(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(reports=[]), r"report\.json has no reports"),
        (lambda content: content.pop("card"), r"report\.json has no card entry"),
        (lambda content: content["card"].pop("limits"), r"card entry of .*report\.json lacks or adds: limits"),
        (lambda content: content["card"].update(colour="red"), "lacks or adds: colour"),
        (lambda content: content["card"]["paper"].pop("bibtex"), "lacks or adds: bibtex"),
        (lambda content: content["card"].update(paper=None), "lacks or adds: arxiv, bibtex"),
        (lambda content: content["card"].update(plot="http://elsewhere/a.png"), "plot='http"),
        (lambda content: content["card"]["settings"].update(objective="text"), r"report\.json holds an entry"),
    ],
)
def test_no_card_from_half_a_report(change, message, tmp_path):
    write_folder(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    change(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        regenerate_card(tmp_path)


def test_settings_that_json_cannot_hold_are_refused():
    with pytest.raises(TypeError, match="JSON"):
        replace(INFO, settings={**SETTINGS, "optimizer": object()})


# ---- what is not said, and what nobody measured


def test_a_blind_attack_is_told_in_the_card_and_only_then():
    blind = replace(OWN[0], zero_gradient_share=0.3)
    assert f"\n\n**{blind_warning([blind])}**\n\n| | n |" in make_card([blind], [], INFO).text
    assert "WARNING" not in make_card(OWN, [], INFO).text


def test_prompts_are_told_where_the_reports_say_them():
    told = [replace(report, templates=("a {}",)) for report in OWN]
    assert 'on CPU, with the prompt "a {}"; every setting' in make_card(told, [], INFO).text
    assert "with the prompt" not in make_card(OWN, [], INFO).text


def test_a_start_that_others_can_not_have_is_not_named():
    card = make_card(OWN, [], replace(INFO, base_model="", ancestor="org/clip"))
    assert "It started from a checkpoint made from `org/clip` and loads" in card.text
    assert card.data.base_model == "org/clip"
    card = make_card(OWN, [], replace(INFO, base_model=""))
    assert "started from" not in card.text
    assert "It loads as a plain `CLIPModel`" in card.text
    assert card.data.base_model is None
    adapter = replace(INFO, base_model="", ancestor="org/clip", settings={**SETTINGS, "prompts": "design V"})
    assert make_card(OWN, [], adapter).data.base_model is None, "an adapter fits no other weights"


def test_cards_of_before_have_no_ancestor(tmp_path):
    write_folder(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    del content["card"]["ancestor"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert load_card_info(tmp_path / "report.json") == INFO


@pytest.mark.parametrize("holds", ["model", "adapter", "defence"])
def test_an_unmeasured_card_says_so_and_how_to_load(holds, tmp_path):
    settings = {"num_views": 64} if holds == "defence" else SETTINGS
    card = make_unmeasured_card(replace(INFO, settings=settings), holds)
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert card.text.count("**Nothing was measured of this repository.**") == 1
    assert "## Results" not in card.text
    assert "## Limits" not in card.text
    assert (data.eval_results, data.base_model) == (None, "user/clip")
    assert ("num views", "64") in [tuple(row) for row in tables(card.text + "\n")[0]] or holds != "defence"
    assert 'from_pretrained("user/robust-clip")' in card.text or '(clip, "user/robust-clip")' in card.text
    assert ("import hf_robust_clip" in card.text) == (holds == "adapter")
    assert INFO.paper.bibtex in card.text
    assert card_state(tmp_path / "README.md") == "unmeasured"
    for block in code_blocks(card.text):
        compile(block, "card", "exec")


def test_the_states_of_a_readme(tmp_path):
    file = tmp_path / "README.md"
    assert card_state(file) == "none"
    make_card(OWN, [], INFO).save(file)
    assert card_state(file) == "measured"
    file.write_text("# mine, made with hf_robust_clip\n")
    assert card_state(file) == "theirs"
    file.write_text("---\nlibrary_name: peft\n---\n" + "[More Information Needed]\n" * 25)
    assert card_state(file) == "draft"
    file.write_text(file.read_text().replace("[More Information Needed]\n", "words\n", 10))
    assert card_state(file) == "theirs", "somebody filled it in"


def test_a_card_contradicts_other_settings_only():
    text = make_card(OWN, [], INFO).text
    assert contradiction(text, SETTINGS) is None
    assert contradiction(text, {**SETTINGS, "seed": 3}) is None, "the card is silent there"
    assert contradiction(text, {**SETTINGS, "learning_rate": 1e-3}) == "learning rate 5e-05, not 0.001"
    assert contradiction(text, {**SETTINGS, "objective": {"alpha": 2.0}}) == "objective.alpha 1.0, not 2.0"


def test_another_repository_renames_card_and_rows(tmp_path):
    before = write_folder(tmp_path)
    name_repository(tmp_path, INFO.repo_id)
    assert (tmp_path / "README.md").read_text() == before
    name_repository(tmp_path, "me/other")
    assert 'model="me/other"' in (tmp_path / "README.md").read_text()
    own, compared = load_reports(tmp_path / "report.json")
    assert {report.model for report in own} == {"me/other"}
    assert {report.model for report in compared} == {BEFORE[0].model}
    assert str(regenerate_card(tmp_path)) == (tmp_path / "README.md").read_text()


# ---- metadata and pictures


def test_the_relation_to_the_base_is_told_where_there_is_one():
    related = {holds: make_unmeasured_card(INFO, holds).data.to_dict() for holds in ("model", "adapter", "defence")}
    assert {holds: data["base_model_relation"] for holds, data in related.items()} == {
        "model": "finetune", "adapter": "adapter", "defence": "adapter",
    }  # fmt: skip
    nobodys = replace(INFO, base_model="digits-clip")
    for holds in ("model", "adapter", "defence"):
        assert not {"base_model", "base_model_relation"} & set(make_unmeasured_card(nobodys, holds).data.to_dict())


def test_a_defended_model_is_found_by_its_tag_with_figures_too():
    worst = make_report(attack_target="adaptive_worst", defence=make_defence())
    assert "test-time-defence" in make_card([worst], BEFORE, INFO).data.tags
    assert "test-time-defence" not in make_card(OWN, BEFORE, INFO).data.tags


def test_pictures_stand_on_the_card_and_the_widget_begins_with_one(tmp_path):
    info = replace(INFO, examples="examples.png", sample="widget.png", pictures="Pictures: mine (cc-by-4.0).",
                   class_names=("cat", "dog, wild", "newt"))  # fmt: skip
    card = make_card(OWN, BEFORE, info)
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.widget == [{"src": "widget.png", "candidate_labels": "cat, newt", "example_title": "A test picture"}]
    assert "![attacked images](examples.png)\n\nPictures: mine (cc-by-4.0).\n" in card.text
    prompts = {**SETTINGS, "prompts": "two tokens"}
    for other in (
        replace(info, settings=prompts),
        replace(info, described=True),
        replace(info, class_names=("cat",)),
        INFO,
    ):
        assert "widget" not in make_card(OWN, BEFORE, other).data.to_dict()


@pytest.mark.parametrize(
    "change", [{"license": "Apache 2.0"}, {"license": ""}, {"defences": ["ttc"]}, {"defences": ["a/b/c"]}]
)
def test_a_licence_or_defence_that_is_none_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(INFO, **change)
