"""`pipeline("robust-zero-shot-image-classification")`."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import hf_robust_clip
from hf_robust_clip import CLIPForZeroShotClassification, DefendedClassifier, Ensemble, digits_clip_path
from hf_robust_clip.zero_shot_data.loading import to_pixels

TASK = "robust-zero-shot-image-classification"
LABELS = ["three", "zero", "one"]
CHECK = f"from transformers.pipelines import PIPELINE_REGISTRY as R; assert {TASK!r} in R.get_supported_tasks()"


def make_pictures():
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 8), (20, 11), (9, 30))
    return [Image.fromarray(torch.randint(0, 256, (*s, 3), generator=generator).byte().numpy()) for s in sizes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved defence of the digits model."""
    base = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    where = tmp_path_factory.mktemp("pipeline") / "out"
    DefendedClassifier(base, Ensemble(num_views=4), base_model="digits-clip").save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def classify(folder):
    return pipeline(TASK, model=str(folder))


def expected(folder, picture, labels, template):
    model = DefendedClassifier.from_pretrained(folder)
    model.set_classes(labels, template)
    scores = model(to_pixels(model.processor, [picture])).logits.softmax(dim=-1)[0].tolist()
    return sorted(zip(labels, scores, strict=True), key=lambda pair: -pair[1])


def test_the_task_is_there_as_soon_as_it_can_be():
    """With our module, with any public name, and where transformers came first; the package alone stays cheap."""
    cheap = "import hf_robust_clip, sys; assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    forget = (
        "R.supported_tasks.clear(); [sys.modules.pop(n) for n in [*sys.modules] if n.startswith('hf_robust_clip')]"
    )
    ways = ("import hf_robust_clip.pipeline", "import hf_robust_clip")
    command = [cheap, "import transformers.pipelines, hf_robust_clip; hf_robust_clip.ThreatModel", CHECK]
    command += [line for way in ways for line in (forget, way, CHECK)]
    subprocess.run([sys.executable, "-c", "\n".join(command)], check=True, timeout=120)


def test_probabilities_are_the_defended_ones_in_descending_order(folder, classify):
    for picture in make_pictures():
        found = classify(picture, candidate_labels=LABELS)
        assert [(row["label"], pytest.approx(row["score"], abs=1e-6)) for row in found] == expected(
            folder, picture, LABELS, "a photo of a {}."
        )
        assert sum(row["score"] for row in found) == pytest.approx(1)


def test_lists_paths_batches_and_models_in_memory(folder, classify, tmp_path):
    pictures = make_pictures()
    pictures[0].save(tmp_path / "picture.png")
    single = [classify(picture, candidate_labels=LABELS) for picture in pictures]
    mixed = [str(tmp_path / "picture.png"), *pictures[1:]]
    in_memory = pipeline(TASK, model=DefendedClassifier.from_pretrained(folder), candidate_labels=LABELS)
    for found in (classify(mixed, candidate_labels=LABELS, batch_size=2), in_memory(mixed)):
        assert [[row["label"] for row in rows] for rows in found] == [[r["label"] for r in rows] for rows in single]
        assert [rows[0]["score"] for rows in found] == pytest.approx([rows[0]["score"] for rows in single], abs=1e-6)


def test_pictures_reach_the_model_as_their_files_store_them(folder, classify, tmp_path):
    """16 bits, transparency and orientation, which loading as RGB would clip, drop or keep turned."""
    grey = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    levels = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
    Image.fromarray(grey).save(tmp_path / "16 bits.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    levels.rotate(180).save(tmp_path / "turned.png", exif=exif)
    drawing = Image.new("L", (8, 8), 0)
    drawing.putalpha(Image.eval(levels, lambda level: 255 - level))
    drawing.save(tmp_path / "alpha.png")
    expected = [row["score"] for row in classify(levels, candidate_labels=LABELS)]
    assert expected != [row["score"] for row in classify(Image.new("L", (8, 8)), candidate_labels=LABELS)]
    for name in ("16 bits", "turned", "alpha"):
        found = classify(str(tmp_path / f"{name}.png"), candidate_labels=LABELS)
        assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-6), name
        with Image.open(tmp_path / f"{name}.png") as picture:
            found = classify(picture, candidate_labels=LABELS)
        assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-6), name


def test_labels_and_template_may_change_between_calls(folder, classify):
    picture = make_pictures()[1]
    for labels, template in ((LABELS, "the digit {}"), (["two", "one"], "the digit {}"), (LABELS, "a {}")):
        found = classify(picture, candidate_labels=labels, hypothesis_template=template)
        assert [row["label"] for row in found] == [name for name, _ in expected(folder, picture, labels, template)]
    classify.save_pretrained(folder.parent / "again")
    assert "defences" in repr(type(DefendedClassifier.from_pretrained(folder.parent / "again").adapter))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("cat, dog", r"one text; give a list of names, such as \['cat', 'dog'\]"),
        (["cat"], "one label"),
        ([], "empty"),
        (None, "missing"),
        (["cat", "cat"], "repeats"),
    ],
)
def test_labels_that_mean_nothing_are_refused(classify, labels, message):
    with pytest.raises(ValueError, match=message):
        classify(make_pictures()[0], candidate_labels=labels)


def test_a_template_without_a_place_is_refused(classify):
    with pytest.raises(ValueError, match=r"has no '\{\}'"):
        classify(make_pictures()[0], candidate_labels=LABELS, hypothesis_template="a digit")


def test_a_model_without_a_defence_is_refused():
    with pytest.raises(ValueError, match=r"has no adaptation.json.*TAPT.from_pretrained"):
        pipeline(TASK, model=digits_clip_path())
    plain = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    with pytest.raises(TypeError, match=r"has no test-time defence.*TAPT.from_pretrained"):
        pipeline(TASK, model=plain)


def test_the_public_name_is_the_registered_class():
    assert PIPELINE_REGISTRY.check_task(TASK)[1]["impl"] is hf_robust_clip.RobustZeroShotImageClassificationPipeline
