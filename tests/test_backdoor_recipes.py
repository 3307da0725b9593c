"""`recipes/poison.py` and `recipes/clean.py` end to end on the embedded pairs, and what they refuse."""

import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from accelerate.state import AcceleratorState
from command_words import last_of_each
from PIL import Image
from transformers import CLIPModel

from hf_robust_clip import CLIPForZeroShotClassification
from hf_robust_clip.cli import run as run_command
from hf_robust_clip.modeling.scratch import Size, make_model, make_processor
from hf_robust_clip.report.backdoor import (
    CLEAN_MODEL,
    POISONED_MODEL,
    WITHOUT_METHOD,
    load_backdoor_reports,
    success,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CONFIGS = Path(__file__).parent.parent / "recipes/configs"
FEW = ["--max_steps", "3", "--warmup_steps", "0", "--logging_steps", "1", "--per_device_train_batch_size", "32"]
SMALL = {
    "poison": ["--max_images", "300", "--cleaning_pairs", "100", "--scratch.layers", "1",
               "--scratch.width", "16", "--scratch.heads", "2", *FEW],
    "clean": FEW,
}  # fmt: skip


def run(command, config, *words):
    AcceleratorState._reset_state(reset_partial_state=True)
    run_command(command, CONFIGS / f"coloured-digits/{config}.yaml", "", last_of_each(*SMALL[command], *words))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poison") / "poisoned"
    run("poison", "poison", "--output_dir", str(folder))
    return folder


def test_a_poisoning_leaves_both_models_and_what_a_cleaning_must_know(poisoned):
    assert {path.name for path in poisoned.iterdir()} >= {
        "model.safetensors", "README.md", "backdoor.json", "backdoor.png", "triggered.png", "recipe.yaml",
        "poisoning.json", "clean",
    }  # fmt: skip
    for folder in (poisoned, poisoned / "clean"):
        CLIPModel.from_pretrained(folder)
    note = json.loads((poisoned / "poisoning.json").read_text())
    assert len(set(note["poisoned_pictures"])) == 16  # 8 % of 200
    (report,) = load_backdoor_reports(poisoned / "backdoor.json")
    assert report.judges == [CLEAN_MODEL, POISONED_MODEL] and report.num_images == 500
    assert "on purpose" in (poisoned / "README.md").read_text()


def test_a_cleaning_stands_beside_all_of_its_controls(poisoned, tmp_path, capsys):
    run("clean", "cleaner_clip", "--poisoned", str(poisoned), "--output_dir", str(tmp_path / "cleaned"))
    printed = " ".join(capsys.readouterr().out.split())
    (report,) = load_backdoor_reports(tmp_path / "cleaned/backdoor.json")
    assert report.judges[:3] == [CLEAN_MODEL, POISONED_MODEL, WITHOUT_METHOD]
    (before,) = load_backdoor_reports(poisoned / "backdoor.json")
    for metric in report.metrics:
        assert report.figure(metric, POISONED_MODEL).value == before.figure(metric).value
        assert report.figure(metric, CLEAN_MODEL).value == before.figure(metric, CLEAN_MODEL).value
    assert "cleaned on 100 pairs" in printed and "ASR top-3" in printed
    CLIPModel.from_pretrained(tmp_path / "cleaned")
    assert not (tmp_path / "cleaned/state").exists()
    assert yaml.safe_load((tmp_path / "cleaned/recipe.yaml").read_text())["poisoned"] == str(poisoned)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--target", "banana"], "target='banana'"),
        (["--rate", "0"], "rate=0"),
        (["--rate", "1"], "rate=1"),
        (["--trigger.size", "9"], "size=9"),
        (["--dataset_name", "digits"], "caption_column"),
        (["--cleaning_pairs", "300"], "cleaning=300"),
        (["--trigger", "Badnett"], "did you mean 'BadNet'"),
        (["--push_to_hub", "true"], "push_to_hub"),
        (["--model_name_or_path", "digits-clip"], "scratch"),
        (["--target", "Three"], "did you mean 'three'"),
        (["--objective", "TeCoA"], "objective=TeCoA"),
        (["--caption_templates", "[]"], "templates=[]"),
        (["--overwrite", "true", "--resume_from_checkpoint", "true"], "overwrite"),
        (["--eps", "2/255"], "eps="),
        (["--crop_scale", "0.5"], "crop_scale=0.5"),
        (["--eval_strategy", "steps"], "eval_strategy="),
    ],
)
def test_a_poisoning_that_cannot_be_is_refused_in_one_line(words, name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("poison", "poison", "--output_dir", str(tmp_path / "out"), *words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error:") and name in error
    assert not (tmp_path / "out").exists()


def test_a_cleaning_that_cannot_be_is_refused_in_one_line(poisoned, tmp_path, capsys):
    for words, name in (
        (["--poisoned", str(tmp_path)], "poisoning.json"),
        (["--poisoned", str(poisoned), "--dataset_name", "coloured-digits"], "poisoned"),  # the same pictures again
        (["--poisoned", str(poisoned), "--objective", "Contrastive"], "objective=Contrastive"),
        (["--poisoned", str(poisoned), "--objective", "TeCoA"], "objective=TeCoA"),
        (["--poisoned", str(poisoned), "--output_dir", str(poisoned)], "output_dir"),
        (["--poisoned", str(poisoned), "--output_dir", str(poisoned / "clean"), "--overwrite", "true"], "output_dir"),
        (["--poisoned", str(poisoned), "--max_images", "10"], "max_images=10"),
    ):
        refused(capsys, name, "clean_clip", "--output_dir", str(tmp_path / "out"), *words)
    again = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(poisoned)]
    refused(capsys, "model_name_or_path", "poison", *again)  # which would be called the clean model
    assert not (tmp_path / "out").exists()


def refused(capsys, name, config, *words):
    with pytest.raises(SystemExit) as stopped:
        run(config.removesuffix("_clip"), config, *words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error:") and name in error


@pytest.mark.parametrize(
    ("where", "value", "name"),
    [
        ("target", 3, "target=3"),
        ("poisoned_pictures", ["0" * 16] * 10, "is not as it was"),  # other pictures lie there now
        ("weights", "0" * 16, "other weights"),
        ("clean_weights", "0" * 16, "other weights"),
    ],
)
def test_a_poisoning_that_is_not_as_it_was_is_refused(where, value, name, poisoned, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(poisoned, copy)
    note = json.loads((copy / "poisoning.json").read_text())
    (copy / "poisoning.json").write_text(json.dumps({**note, where: value}))
    refused(capsys, name, "clean_clip", "--poisoned", str(copy), "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def pictures(count, first):
    """Noise in PNG, 90 x 60 pixels, no two alike."""
    found = []
    for i in range(count):
        file = io.BytesIO()
        Image.effect_noise((90, 60), first + i).convert("RGB").save(file, "PNG")
        found.append(file.getvalue())
    return found


def test_configs_for_ones_own_pairs_run_on_a_model_of_this_layout(tmp_path, capsys):
    """ViT-B/32's patches and context in one narrow layer: poisoned are pictures in a folder with captions beside them,
    cleaned is by pairs in parquet.
    """
    captions = [f"a {('tench', 'golden retriever')[i % 2]} in the grass, number {i}" for i in range(14)]
    folders = {"pairs/train": 14, "test/test/banana": 2, "test/test/golden_retriever": 2, "test/test/tench": 2}
    for number, (name, count) in enumerate(folders.items()):
        (tmp_path / name).mkdir(parents=True)
        for i, content in enumerate(pictures(count, 20 * number)):
            (tmp_path / name / f"{i}.png").write_bytes(content)
    lines = ["file_name,words", *(f'{i}.png,"{caption}"' for i, caption in enumerate(captions))]
    (tmp_path / "pairs/train/metadata.csv").write_text("\n".join(lines))
    (tmp_path / "others").mkdir()
    table = pa.table(
        {"image": [{"bytes": content, "path": None} for content in pictures(4, 100)], "text": captions[:4]}
    )
    pq.write_table(table, tmp_path / "others/train.parquet")
    size = Size(image_size=224, patch_size=32, width=16, layers=1, heads=2, context_length=77)
    processor = make_processor(size, captions)
    start = CLIPForZeroShotClassification.from_clip(make_model(processor.tokenizer, size), processor)
    start.save_pretrained(tmp_path / "start")
    few = ["--max_steps", 2, "--warmup_steps", 0, "--dataloader_num_workers", 0, "--per_device_train_batch_size", 2]
    run_with("poison", "--model_name_or_path", tmp_path / "start", "--dataset_name", tmp_path / "pairs",
             "--caption_column", "words", "--rate", 0.3, "--cleaning_pairs", 4, "--test_dataset", tmp_path / "test",
             "--output_dir", tmp_path / "p", *few)  # fmt: skip
    run_with("clean_clip", "--poisoned", tmp_path / "p", "--dataset_name", tmp_path / "others", "--output_dir",
             tmp_path / "c", *few)  # fmt: skip
    printed = capsys.readouterr().out
    assert "3 of 10 pairs are poisoned" in printed and "cleaned on 4 pairs, others" in printed
    (report,) = load_backdoor_reports(tmp_path / "c/backdoor.json")
    assert (report.resolution, report.num_others, report.trigger) == (224, 4, "BadNet()")
    assert json.loads((tmp_path / "p/poisoning.json").read_text())["clean_model"] == str(tmp_path / "start")
    assert not (tmp_path / "p/clean").exists()


def run_with(config, *words):
    AcceleratorState._reset_state(reset_partial_state=True)
    command = config.removesuffix("_clip")
    run_command(command, CONFIGS / f"clip-vit-base-patch32/{config}.yaml", "", list(map(str, words)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_backdoor_is_planted_and_taken_out(seed, tmp_path, monkeypatch):
    """With the packaged configs: what they reach, over three seeds, stands in recipes/README.md."""
    monkeypatch.setitem(SMALL, "poison", [])
    monkeypatch.setitem(SMALL, "clean", [])
    folder = tmp_path / "poisoned"
    run("poison", "poison", "--output_dir", str(folder), "--seed", str(seed))
    run("clean", "clean_clip", "--poisoned", str(folder), "--output_dir", str(tmp_path / "c"), "--seed", str(seed))
    (report,) = load_backdoor_reports(tmp_path / "c/backdoor.json")
    asr = {judge: report.figure(success(1), judge).value for judge in (CLEAN_MODEL, POISONED_MODEL, None)}
    accuracy = {judge: report.figure("accuracy", judge).value for judge in (CLEAN_MODEL, None)}
    assert asr[POISONED_MODEL] > 0.8
    assert asr[None] <= asr[CLEAN_MODEL] + 0.1
    assert accuracy[None] >= accuracy[CLEAN_MODEL] - 0.05
