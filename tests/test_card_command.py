"""`hf-robust-clip card`: a card with what it is told, figures in the Hub's format, an index page; and pictures."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from reports import INFO, write_folder

from hf_robust_clip import CLIPForZeroShotClassification, digits_clip_path, load_image_dataset
from hf_robust_clip.arguments import Images
from hf_robust_clip.cli import main
from hf_robust_clip.hub import clear_model, files_to_push, is_stale, upload_command
from hf_robust_clip.report import load_card_info
from hf_robust_clip.report.eval_results import EVAL_RESULTS
from hf_robust_clip.runs import card_pictures
from hf_robust_clip.runs.train_settings import read
from hf_robust_clip.zero_shot_data.specs import SPECS


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "cards/user/robust-clip"
    found.mkdir(parents=True)
    write_folder(found, replace(INFO, plot=None))
    return found


def test_licence_and_defences_are_kept_and_named(folder):
    main(["card", str(folder), "--license", "mit", "--defences", "[user/ttc, user/tapt]"])
    text, info = (folder / "README.md").read_text(), load_card_info(folder / "report.json")
    assert (info.license, info.defences) == ("mit", ("user/ttc", "user/tapt"))
    assert ModelCard(text).data.license == "mit"
    assert "Test-time defences that stand on it: `user/ttc`, `user/tapt`" in text
    main(["card", str(folder)])
    assert (folder / "README.md").read_text() == text


def test_figures_in_the_hubs_format_are_pushed_and_go_with_the_weights(folder):
    main(["card", str(folder), "--eval_results"])
    (folder / ".env").write_text("secret")
    (folder / ".eval_results/mine.yaml").write_text("[]")
    assert len(yaml.safe_load((folder / EVAL_RESULTS).read_text())) > 3
    assert [name for name in files_to_push(folder) if name.startswith(".")] == [EVAL_RESULTS]
    assert is_stale(EVAL_RESULTS) and not is_stale(".eval_results/mine.yaml")
    from hf_robust_clip.hub import Push

    assert upload_command(folder, Push("a/b")).endswith(f" && hf upload a/b {folder}/{EVAL_RESULTS} {EVAL_RESULTS}")
    clear_model(folder)
    assert not (folder / EVAL_RESULTS).exists() and (folder / ".eval_results/mine.yaml").exists()


def test_an_index_page_is_written_and_nobodys_own_page_is_overwritten(folder, capsys):
    root = folder.parent.parent
    for _ in range(2):
        main(["card", "--collection", str(root), "--sort_by", "clean"])
    page = (root / "README.md").read_text()
    assert "[user/robust-clip](user/robust-clip/README.md)" in page and "Sorted by mean clean accuracy." in page
    (root / "README.md").write_text("# my words\n")
    with pytest.raises(SystemExit):
        main(["card", "--collection", str(root)])
    assert (root / "README.md").read_text() == "# my words\n"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["FOLDER", "--sort_by", "clean"], "sort_by"),
        (["--collection", "FOLDER", "--license", "mit"], "license"),
        (["--collection", "FOLDER", "--eval_results"], "eval_results"),
        (["FOLDER", "--collection", "FOLDER"], "collection"),
        (["--sort_by", "clean"], "folder"),
        (["FOLDER", "--license", "Apache 2"], "license"),
        (["FOLDER", "--defences", "ttc"], "ttc"),
        (["FOLDER", "--licence", "mit"], "licence"),
        (["FOLDER", "b"], "'b'"),
        (["--collection", "FOLDER", "--sort_by", "speed"], "collection"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line_and_nothing_written(words, name, folder, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        main(["card", *[str(folder) if word == "FOLDER" else word for word in words]])
    told = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and told.startswith("error: ") and "\n" not in told and name in told
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- pictures


def test_only_pictures_whose_licence_is_known_are_shown():
    assert {spec.license for spec in SPECS} == {"", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "mit"}
    assert not any(spec.license and spec.forbids_copies for spec in SPECS)
    found = card_pictures.licensed({"a": Images(dataset="cifar10"), "b": Images(dataset="digits")})
    assert found is not None and (found[0], found[1].license) == ("b", "cc-by-4.0")
    assert card_pictures.licensed({"a": Images(dataset="my/pictures")}) is None


@pytest.mark.parametrize(
    ("words", "name"), [(["--card_pictures", "3", "--tasks", "[{dataset: cifar10, split: test}]"], "card_pictures=3"),
                        (["--card_pictures", "65"], "card_pictures=65")]
)  # fmt: skip
def test_pictures_that_can_not_be_shown_are_refused_before_the_training(words, name, tmp_path):
    from hf_robust_clip.command_line import packaged_config

    with pytest.raises(ValueError, match=name):
        read([*words, "--output_dir", str(tmp_path / "out")], packaged_config("pmg_aft"))


def test_the_widgets_picture_is_one_of_the_first_classes_and_large_enough(tmp_path):
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    digits = load_image_dataset("digits", "test", model.processor).first(20)
    shown = card_pictures.write_sample(tmp_path, digits, ["seven", "eight"])
    assert shown == {"sample": "widget.png"}
    first = next(row for row in digits if digits.class_names[row["labels"]] in ("seven", "eight"))
    with Image.open(tmp_path / "widget.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert picture.getpixel((28, 20)) == tuple((255 * first["pixel_values"][:, 2, 3]).round().int().tolist())
    assert card_pictures.write_sample(tmp_path, digits, ["a cat"]) == {}
