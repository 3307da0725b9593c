"""The index page of a folder of cards: what stands in one table, in which order, and what is refused."""

import re
from dataclasses import replace

import pytest
from reports import BEFORE, INFO, OWN, make_controls, make_defence, make_report

from hf_robust_clip.report import make_card, save_reports
from hf_robust_clip.report.card import FROM_SCRATCH
from hf_robust_clip.report.collection import make_collection, read_collection

START = replace(BEFORE[0], model=INFO.base_model)


def robust(name, one, four, **changes):
    """A report of two tasks' images: 0.9 clean."""
    return make_report(name=name, robust_accuracy={1 / 255: one, 4 / 255: four}, **changes)


def write(root, place, reports, compared=(), **changes):
    folder = root / place
    folder.mkdir(parents=True)
    info = replace(INFO, repo_id=f"user/{place}", plot=None, **changes)
    save_reports(folder / "report.json", reports, compared, card=info)
    make_card(reports, compared, info).save(folder / "README.md")


def tables(page):
    """By heading, the rows of its tables as cells."""
    found = []
    for heading, text in re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", page, re.MULTILINE):
        rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
        found.append((heading, [[cell.strip() for cell in row] for row in rows]))
    return found


def places(rows):
    return [re.sub(r"\[(.*?)\].*", r"\1", row[0]) for row in rows[2:]]


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "weak", [robust("Weak", 0.2, 0.1), robust("Weak", 0.8, 0.0, task="held-out classes")])
    write(
        tmp_path, "strong", [robust("Strong", 0.6, 0.3), robust("Strong", 0.5, 0.1, task="held-out classes")], [START]
    )
    write(tmp_path, "other images", [robust("Other", 0.9, 0.8, num_images=20)], [START])
    return tmp_path


def test_what_was_measured_alike_stands_in_one_table(root):
    entries, left = read_collection(root)
    assert [entry.place for entry in entries] == ["other images", "strong", "weak"] and left == []
    page = make_collection("mine", entries)
    assert page.startswith("<!--") and "\n# mine\n" in page
    found = tables(page)
    assert [heading for heading, _ in found] == ["PGD-20"] * 3, "other numbers of images, and tasks, are other tables"
    heads = [rows[0][2:] for _, rows in found]
    assert sorted(map(len, heads)) == [1, 1, 3]
    both = next(rows for _, rows in found if len(rows[0]) == 5)
    assert both[0][2:] == ["trained classes (n=40)", "held-out classes (n=40)", "mean: clean / 1/255"]
    assert places(both) == ["strong", "weak"]
    assert both[2][2:] == ["90.0 / 60.0 / 30.0", "90.0 / 50.0 / 10.0", "90.0 / 55.0"]
    assert "[other images](other%20images/README.md)" in page
    assert page.count("undefended") == 1, "the start of several cards is one line"


def test_a_start_is_a_link_where_it_lies_beside_and_else_a_name(root):
    write(root, "further", [robust("Further", 0.5, 0.4)], base_model="user/strong")
    write(root, "first", [robust("First", 0.5, 0.1)], base_model="", settings={"start": FROM_SCRATCH})
    page = make_collection("mine", read_collection(root)[0])
    starts = {row.split("|")[1].strip().partition("]")[0]: row.split("|")[3].strip() for row in page.splitlines()
              if row.startswith("| [") and "| PMG-AFT |" in row}  # fmt: skip
    assert starts["[further"] == "[strong](strong/README.md)" and starts["[first"] == FROM_SCRATCH
    assert starts["[weak"] == f"`{INFO.base_model}`"


@pytest.mark.parametrize(
    ("sort_by", "order"),
    [
        ("robust", ["strong", "weak"]),  # 55.0, 50.0
        ("held-out classes", ["weak", "strong"]),  # 80, 50
        ("model", ["strong", "weak"]),
        ("method", ["strong", "weak"]),
        ("clean", ["strong", "weak"]),  # the same: by name
    ],
)
def test_the_order_is_the_one_asked_for_and_said(root, sort_by, order):
    page = make_collection("mine", read_collection(root)[0], sort_by)
    both = next(rows for _, rows in tables(page) if len(rows[0]) == 5)
    assert places(both) == order
    told = {"robust": "mean accuracy at 1/255", "clean": "mean clean accuracy",
            "held-out classes": "held-out classes (n=40) at 1/255"}  # fmt: skip
    assert f"Sorted by {told.get(sort_by, sort_by)}." in page


def test_figures_without_an_attack(tmp_path):
    for name, clean in (("low", 0.6), ("high", 0.7)):
        write(tmp_path, name, [make_report(clean_accuracy=clean, robust_accuracy={})])
    page = make_collection("mine", read_collection(tmp_path)[0])
    assert "In percent, clean. Sorted by accuracy." in page
    ((_, rows),) = tables(page)
    assert places(rows) == ["high", "low"] and rows[2][2:] == ["70.0"]


def test_radii_ascend_whatever_their_order_in_the_file(tmp_path):
    write(tmp_path, "one", [make_report(robust_accuracy={4 / 255: 0.25, 1 / 255: 0.7})])
    page = make_collection("mine", read_collection(tmp_path)[0])
    assert "clean / 1/255 / 4/255 (L-inf)" in page and "| 90.0 / 70.0 / 25.0 |" in page


def test_other_prompts_attacks_and_revisions_are_other_tables(tmp_path):
    changes = [{}, {"prompt_hash": "other"}, {"dataset_revision": "v2"}, {"seed": 1}, {"split": "validation"},
               {"attack_parameters": {"num_steps": 5}}, {"precision": "bfloat16"}]  # fmt: skip
    for number, change in enumerate(changes):
        write(tmp_path, f"m{number}", [make_report(**change)])
    write(tmp_path, "same", [make_report(name="Same")])
    sizes = [len(rows) - 2 for _, rows in tables(make_collection("mine", read_collection(tmp_path)[0]))]
    assert sorted(sizes) == [1] * 6 + [2]


def test_an_attack_that_does_not_know_the_defence_comes_last_with_a_warning(tmp_path):
    blind = make_report(attack_target="defence_blind", defence=make_defence(), controls=make_controls())
    through = make_report(attack_target="adaptive_worst", defence=make_defence(), controls=make_controls())
    write(tmp_path, "tapt", [blind, through])
    page = make_collection("mine", read_collection(tmp_path)[0])
    assert [heading for heading, _ in tables(page)] == ["PGD-20 (adaptive_worst)", "PGD-20 (defence_blind)"]
    assert page.count("flatters it") == 1 and page.index("flatters it") > page.index("(defence_blind)")


def test_names_make_no_links_and_no_cells_of_their_own(tmp_path):
    odd = make_report(name="[x](http://y) | z", task="a | b")
    write(tmp_path, "odd", [odd], license="mit")
    page = make_collection("[t](http://u)", read_collection(tmp_path)[0])
    assert not re.search(r"(?<!\\)\[[xt]\]\(http", page)
    _, rows = tables(page.replace("\\|", "!"))[0]
    assert len(rows[2]) == len(rows[0]) == 3


def test_what_is_no_card_is_left_out_or_refused(root):
    save = root / "evaluation"
    save.mkdir()
    save_reports(save / "report.json", OWN)
    (root / "strong/README.md").unlink()
    entries, left = read_collection(root)
    assert [entry.place for entry in entries] == ["other images", "weak"] and left == ["evaluation", "strong"]
    with pytest.raises(ValueError, match="sort_by='speed'"):
        make_collection("mine", entries, "speed")
    with pytest.raises(OSError, match="collection="):
        read_collection(root / "nowhere")
    with pytest.raises(ValueError, match="collection="):
        read_collection(save)
