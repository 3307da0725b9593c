"""The lines that recipes/README.md gives newcomers run, and end as it says."""

import re
import shlex
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from digit_folders import write_digits

from hf_robust_clip import (
    CLIPForZeroShotClassification,
    EvaluationSettings,
    digits_clip_path,
    evaluate_robustness,
    load_image_dataset,
)
from hf_robust_clip.checkpoint_notes import trained_templates
from hf_robust_clip.cli import main
from hf_robust_clip.hub import dump_recipe
from hf_robust_clip.report import load_reports

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

README = (Path(__file__).parents[1] / "recipes/README.md").read_text(encoding="utf-8")
FEW = ["--max_steps", "1", "--evaluation.attack", "pgd-1", "--use_cpu", "true"]


def lines_of(heading):
    """The lines of the last block of commands in a section."""
    section = README[README.index(f"\n## {heading}\n") :].partition("\n## ")[2].partition("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)[-1].splitlines()


def test_ten_lines_lead_from_a_folder_of_pictures_to_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digits(Path("my/pictures"), 2)
    first, *settings, last, command = lines_of("From my own folder of pictures to a robust model")
    assert 2 + len(settings) <= 10
    assert (first, last) == ("cat > mine.yaml <<END", "END")
    text = "\n".join(settings)
    assert "openai/clip-vit-base-patch32" in text
    Path("mine.yaml").write_text(text.replace("openai/clip-vit-base-patch32", "digits-clip"))
    program, *words = shlex.split(command)
    assert program == "hf-robust-clip"
    main([*words, *FEW])
    (report,), _ = load_reports("out/mine/report.json")
    assert (report.num_images, report.num_classes) == (20, 10)
    assert {"model.safetensors", "README.md", "accuracy.png"} <= {path.name for path in Path("out/mine").iterdir()}
    assert "zero" in Path("out/mine/README.md").read_text()
    assert yaml.safe_load(Path("out/mine/recipe.yaml").read_text())["dataset_name"] == "my/pictures"


def test_common_mistakes_come_to_what_the_table_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).save_pretrained("out/pmgaft")
    recipe = {"template": "This is a photo of a {}", "dataset_name": "digits"}
    Path("out/pmgaft/recipe.yaml").write_text(dump_recipe(recipe))
    assert trained_templates("out/pmgaft") == ("This is a photo of a {}",)
    begin, *commands = lines_of("Common mistakes")
    base = begin.removeprefix('E="hf-robust-clip ').removesuffix('"')
    printed = []
    for command in commands:
        words = shlex.split(command.replace("$E", base))
        with suppress(SystemExit):
            main(words)
        said = capsys.readouterr()
        printed.append(said.out + said.err)
    for number, text in enumerate(printed, start=1):
        table = [re.findall(r"`(.*?)`", row) for row in README.splitlines() if f"({number})" in row and row[0] == "|"]
        for told in (text for found in table for text in found):
            for part in told.split("..."):
                assert part.strip() in " ".join(text.split()), (number, part)
    model = CLIPForZeroShotClassification.from_pretrained("out/pmgaft")
    data = load_image_dataset("digits", "test", model.processor).first(2)
    with pytest.raises(ValueError, match="pixel_values") as error:
        model.check_pixels(255 * data[0]["pixel_values"][None], values=True)
    assert re.search(r"`(pixel_values .*?)`", README).group(1) in str(error.value)
    model.set_classes(["nine", "eight"])
    settings = EvaluationSettings(["16/255"])
    with pytest.raises(ValueError, match="classes") as error:
        evaluate_robustness(model, data, settings, name="n", task="t", model_id="m")
    told = re.search(r"`(dataset 'digits' .*?)`", README).group(1).split("...")
    assert all(part.strip(" ,") in str(error.value) for part in told)
    by_batch, one_by_one = (load_reports(f"out/{number}/report.json")[0][0] for number in (3, 4))
    assert by_batch.robust_accuracy == one_by_one.robust_accuracy
