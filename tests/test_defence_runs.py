"""Defences through the evaluation's command: saved ones, those that are refused, and the figures of others."""

import json
import re
from pathlib import Path

import pytest
import torch

from hf_robust_clip import CLIPForZeroShotClassification, DefendedClassifier, digits_clip_path
from hf_robust_clip.cli import main
from hf_robust_clip.defences.bafta import BaFTA
from hf_robust_clip.defences.encoders import SmallEncoder
from hf_robust_clip.defences.mirror_check import MirrorCheck
from hf_robust_clip.defences.rfi import RFI
from hf_robust_clip.report import load_reports
from hf_robust_clip.zero_shot_data.loading import load_image_dataset

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CONFIG = Path(__file__).parents[1] / "recipes/configs/evaluate.yaml"
FIT = "--fit_on.dataset digits --fit_on.split train --fit_on.max_images 60"


def evaluate(words, folder="out"):
    words = f"--dataset_name digits --max_images 6 --evaluation.radii [16/255] --output_dir {folder} {words}"
    words += "" if "attack" in words else " --evaluation.attacks [pgd-1]"
    main(["evaluate", "--config", str(CONFIG), *words.split()])
    return load_reports(Path(folder, "report.json"))[0]


def refused(words, capsys, folder="out"):
    """The one line that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate(words, folder)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("hf_robust_clip.runs.evaluate.draw", lambda *_: None)
    monkeypatch.setattr("hf_robust_clip.evaluation.loop.adversarial_examples", lambda *_: ())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """RFI and MirrorCheck in front of the embedded model, saved; the first, too, as if it were another model's."""
    root = tmp_path_factory.mktemp("folders")
    classifier = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).requires_grad_(False).eval()
    data = load_image_dataset("digits", "train", classifier.processor).first(80)
    classifier.set_classes(data.class_names, "a photo of a {}.")
    made = {"rfi": RFI(top_k=1), "mirror": MirrorCheck(encoder_steps=1), "bafta": BaFTA(num_views=2, beta=0)}
    for name, defence in made.items():
        DefendedClassifier(classifier, defence.fit(classifier, data), base_model="digits-clip").save_pretrained(
            root / name
        )
    DefendedClassifier(classifier, RFI(top_k=1).fit(classifier, data), base_model="digits-clip").save_pretrained(
        root / "moved"
    )
    classifier.visual_projection.weight.add_(0.05)
    classifier.save_pretrained(root / "other")
    settings = json.loads((root / "moved/adaptation.json").read_text())
    (root / "moved/adaptation.json").write_text(json.dumps({**settings, "base_model": str(root / "other")}))
    return root


def test_a_saved_defence_is_evaluated_by_its_folder(folders, capsys):
    (report,) = evaluate(f"--model_name_or_path {folders / 'rfi'} --defence RFI")
    assert report.defence["parameters"]["top_k"] == 1 and report.templates == ("a photo of a {}.",)
    assert "not asked for" not in capsys.readouterr().out
    (plain,) = evaluate(f"--model_name_or_path {folders / 'rfi'}", "plain")
    assert plain.defence is None and "not asked for" in capsys.readouterr().out
    assert plain.clean_accuracy == report.controls["static prompts"][0.0]


def test_a_saved_defence_that_learned_nothing_keeps_its_settings(folders):
    (report,) = evaluate(f"--model_name_or_path {folders / 'bafta'} --defence BaFTA --defence.alpha 0.7")
    told = report.defence["parameters"]
    assert (told["num_views"], told["beta"], told["alpha"]) == (2, 0.0, 0.7) and report.defence["name"] == "bafta_te"
    evaluate(f"--model_name_or_path {folders / 'bafta'} --defence BaFTA --defence.alpha 0.7 --resume")


def test_what_is_refused_leaves_nothing(folders, capsys):
    before = sorted(Path().rglob("*"))
    for words, told in {
        "--defence RFI": "rfi was fitted with",
        "--defence MirrorCheck": "mirror_check was fitted with",
        "--defence CAVP": "class-wise prompts",
        "--defence CLIPure --defence.templates [nothing]": "template='nothing'",
        f"--defence RFI --defence.top_k 65 {FIT}": "top_k=65",
        f"--defence RFI --defence.top_k 61 {FIT}": "top_k=61",
        f"--defence MirrorCheck --defence.fpr 0.001 {FIT}": r"fpr=0\.001",
        f"--defence RFI --model_name_or_path {folders / 'moved'}": "another image encoder",
        f"--defence RTPT --model_name_or_path {folders / 'moved'}": "another image encoder",
        f"--defence MirrorCheck --defence.noise 0.1 --model_name_or_path {folders / 'mirror'}": "noise",
    }.items():
        assert re.search(told, refused(words, capsys)), words
        assert sorted(Path().rglob("*")) == before, words


def test_a_threshold_that_no_images_tell_is_refused_before_anything_is_trained(monkeypatch, capsys):
    monkeypatch.setattr(SmallEncoder, "forward", lambda *_: pytest.fail("an encoder was trained"))
    assert "fpr=0.02" in refused(f"--defence MirrorCheck --defence.fpr 0.02 {FIT}", capsys)


def test_the_figures_of_another_defence_are_not_lost(capsys):
    evaluate("--defence CLIPure")
    kept = Path("out/report.json").read_bytes()
    for words, told in {
        "--resume": "with clipure",
        "--resume --defence Ensemble --defence.num_views 2": "with clipure",
        "--resume --defence CLIPure --evaluation.view adaptive": "defence_blind",
        "--resume --defence CLIPure --defence.num_steps 3": "'num_steps': 10.*'num_steps': 3",
    }.items():
        line = refused(words, capsys)
        assert re.search(told, line) and len(line) < 600, line
        assert Path("out/report.json").read_bytes() == kept


def test_captions_of_other_classes_are_refused_whatever_the_images_show(folders):
    saved = DefendedClassifier.from_pretrained(folders / "mirror")
    saved.set_classes(["zero", "one", "else"], "a photo of a {}.")
    with pytest.raises(ValueError, match="else"):
        saved.predict(torch.zeros(1, 3, 8, 8))
