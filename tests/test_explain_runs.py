"""evaluate --explain, as a user starts it."""

import csv

import pytest
import yaml
from PIL import Image

from hf_robust_clip.cli import main
from hf_robust_clip.runs.explanations import CSV, PNG, clear_explanations, pictures_of

WORDS = ["--evaluation.attack", "pgd-2", "--evaluation.radii", "[8/255]", "--max_images", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("explained") / "out"
    main(["evaluate", *WORDS, "--explain", "3", "--dataset_name", "digits", "--output_dir", str(out)])
    return out


def test_an_evaluation_writes_figures_and_a_picture(folder):
    rows = list(csv.DictReader((folder / CSV).open()))
    assert [(row["task"], row["model"], row["image"]) for row in rows] == [
        ("digits", "digits-clip", str(i)) for i in range(3)
    ]
    assert all(-1 <= float(row["map_correlation"]) <= 1 and float(row["map_change"]) > 0 for row in rows)
    assert {row["attack"] for row in rows} == {"PGD-2 at L-inf eps=8/255"}
    assert Image.open(folder / PNG).width > 1000
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["explain"] == 3


def test_resumed_it_is_made_anew_and_begun_anew_it_goes(folder, capsys):
    before = (folder / CSV).read_text()
    (folder / CSV).unlink()
    recipe = ["--config", str(folder / "recipe.yaml")]
    main(["evaluate", *recipe, "--resume"])
    printed = capsys.readouterr().out
    assert (folder / CSV).read_text() == before
    assert "where the models look" in printed and f"{CSV}, {PNG}" in printed
    (folder / "explanations-of-mine.png").touch()
    (folder / "explanations-digits-01234567.png").touch()
    clear_explanations(folder)
    assert [path.name for path in folder.glob("explanations*")] == ["explanations-of-mine.png"]


def test_each_of_several_tasks_has_a_picture():
    assert pictures_of(["a", "a"]) == {"a": PNG}
    names = pictures_of(["a b", "a-b"])
    assert len(set(names.values())) == 2 and all(name.startswith("explanations-a-b-") for name in names.values())


@pytest.mark.parametrize("words", [["--explain", "-1"], ["--explain", "2", "--defence", "RTPT"]])
def test_what_it_cannot_explain_is_refused_in_one_line(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", *WORDS, "--dataset_name", "digits", "--output_dir", str(tmp_path / "out"), *words])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "explain=" in error and not list(tmp_path.iterdir())
