"""Saved adversarial pictures: in the ball whatever the format, read again pixel for pixel, the same after a stop."""

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from tiny import make_clip, make_processor

from hf_robust_clip import (
    AdaptiveWorst,
    BaFTA,
    CLIPForZeroShotClassification,
    Defence,
    DefenceBlind,
    Detector,
    EvaluationSettings,
    NoAttack,
    Prediction,
    SaveAdversarial,
    ThreatModel,
    digits_clip_path,
    evaluate_robustness,
    image_dataset,
    load_image_dataset,
)
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.evaluation import adversarial
from hf_robust_clip.evaluation.adversarial import clear_adversarial, rounded, split_name
from hf_robust_clip.report import prompt_hash
from hf_robust_clip.report.adversarial import SavedSplit, make_adversarial_card
from hf_robust_clip.storage import NotWritten
from hf_robust_clip.zero_shot_data.adversarial import AdversarialImages
from hf_robust_clip.zero_shot_data.fingerprint import dataset_digest
from hf_robust_clip.zero_shot_data.licences import Licence
from hf_robust_clip.zero_shot_data.specs import prompt_templates

NAMES = dict(name="name", task="task", model_id="id")
ODD = [6.4 / 255, "16/255"]  # the first between grey levels


# ---- rounding


def perturbed(side, threat_model, on_grid=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, side, side, generator=generator)
    images = (images * 255).round() / 255 if on_grid else images
    noise = torch.randn(images.shape, generator=generator)
    far = images + (noise.sign() if threat_model.norm == "linf" else noise)
    return images, threat_model.project(far, images)


@pytest.mark.parametrize("pixels", ["uint8", "float16"])
@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", 0.5 / 255), ("linf", 1 / 255), ("linf", 6.4 / 255), ("l2", 0.25), ("l2", 1.0)]
)
def test_rounded_pictures_stay_in_the_ball_and_are_what_the_format_holds(pixels, norm, eps):
    threat_model = ThreatModel(eps, norm)
    images, adv = perturbed(32, threat_model)
    found, away = (rounded(adv, images, threat_model, pixels, away=away) for away in (False, True))
    assert bool((threat_model.contains(found, images) & threat_model.contains(away, images)).all())
    change, other = ((pictures - images).abs() for pictures in (found, away))
    assert bool((other >= change - 1e-7).all()) or norm == "l2"
    again = found.half().float() if pixels == "float16" else (found * 255).round() / 255
    assert torch.equal(again, found)
    step = 1 / 255 if pixels == "uint8" else 2**-11
    assert float(torch.stack([found - adv, away - adv]).abs().max()) < step  # of two neighbours one
    nearest = adv.half().float() if pixels == "float16" else (adv * 255).round() / 255
    where = (nearest != found) & ((nearest - found).abs() > 1e-7)
    assert bool(((found - images).abs() <= (nearest - images).abs())[where].all())


def test_what_the_nearest_values_would_do():
    """Rounding to float16 leaves a ball of 1/255 by 6 %; grey levels leave those that lie between levels."""
    threat_model = ThreatModel("1/255")
    images, adv = perturbed(32, threat_model)
    assert float(threat_model.distance(adv.half().float(), images).max()) / threat_model.eps == pytest.approx(
        1.06, abs=0.01
    )
    between = ThreatModel(1.5 / 255)
    images, adv = perturbed(32, between)
    assert not bool(between.contains((adv * 255).round() / 255, images).any())
    length = ThreatModel(0.5, "l2")
    images, adv = perturbed(224, length)
    assert not bool(length.contains((adv * 255).round() / 255, images).any())
    found = rounded(adv, images, length, "uint8")
    assert float(length.distance(found, images).min()) > 0.49  # not given up for one value too many


def test_whole_grey_levels_are_the_nearest_and_float32_is_exact():
    threat_model = ThreatModel("4/255")
    images, adv = perturbed(8, threat_model)
    assert torch.equal(rounded(adv, images, threat_model, "uint8"), (adv * 255).round() / 255)
    assert torch.equal(rounded(adv, images, threat_model, "float32"), adv)


@pytest.mark.parametrize(
    ("pixels", "norm", "eps", "side"), [("uint8", "linf", 0.2 / 255, 8), ("float16", "l2", 0.02, 224)]
)
def test_a_format_that_cannot_hold_the_clean_pictures_closely_enough_is_refused(pixels, norm, eps, side):
    threat_model = ThreatModel(eps, norm)
    images, adv = perturbed(side, threat_model, on_grid=False)
    with pytest.raises(ValueError, match=f"save_adversarial='{pixels}'"):
        rounded(adv, images, threat_model, pixels)


def test_splits_have_names_that_tell_their_radii_apart():
    radii = ["1/255", 0.00392, 1e-5, "16/255"]
    names = [split_name(ThreatModel(radius)) for radius in radii] + [split_name(ThreatModel(0.5, "l2"))]
    assert names == ["linf_1_255", "linf_0p00392", "linf_1em05", "linf_16_255", "l2_0p5"]
    assert all(re.fullmatch(r"\w+", name) for name in names)


# ---- an evaluation, and its folder


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """40 digits, some of them wrong from the start, at two radii, in every format."""
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).requires_grad_(False)
    data, found = load_image_dataset("digits", "test", model.processor).first(40), {}
    labels = [(label + 1) % 10 if i < 3 else label for i, label in enumerate(data.rows["label"])]
    columns = {"image": data.rows["image"], "label": labels}
    data = replace(data, rows=datasets.Dataset.from_dict(columns, features=data.rows.features))
    model.set_classes(data.class_names)
    for pixels in ("uint8", "float16", "float32"):
        folder = tmp_path_factory.mktemp(pixels)
        settings = EvaluationSettings(ODD, attack=PGD(3), batch_size=16, seed=4)
        save = SaveAdversarial(folder / "out", pixels)
        found[pixels] = (
            evaluate_robustness(model, data, settings, **NAMES, state_dir=folder / "state", save=save),
            save,
        )
    return model, data, found


@pytest.mark.parametrize("pixels", ["uint8", "float16", "float32"])
def test_pictures_read_again_give_the_figures_of_the_report(attacked, pixels):
    model, data, found = attacked
    report, save = found[pixels]
    as_saved = {row.eps: row.value for row in report.measurements if row.metric == f"robust_accuracy_as_{pixels}"}
    plain = evaluate_robustness(model, data, EvaluationSettings(ODD, attack=PGD(3), seed=4), **NAMES)
    assert report.robust_accuracy == plain.robust_accuracy and list(as_saved) == list(plain.robust_accuracy)
    for eps, robust in report.robust_accuracy.items():
        again = load_image_dataset(str(save.folder), split_name(ThreatModel(eps)), model.processor)
        measured = evaluate_robustness(model, again, EvaluationSettings([], attack=NoAttack()), **NAMES)
        assert measured.clean_accuracy == as_saved[eps] and measured.robust_accuracy == {}
        rows = load_dataset(str(save.folder), split=split_name(ThreatModel(eps)))
        assert np.mean(rows["withstood"]) == pytest.approx(robust, abs=1e-9)
        assert np.mean(rows["withstood_as_saved"]) == pytest.approx(as_saved[eps], abs=1e-9)
        if pixels == "float32":
            assert as_saved[eps] == robust
    assert len(set(report.robust_accuracy.values())) == 2 and min(report.robust_accuracy.values()) > 0


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_each_row_says_what_its_picture_is(attacked, pixels):
    model, data, found = attacked
    _, save = found[pixels]
    rows = load_dataset(str(save.folder), split="linf_16_255")
    again = load_image_dataset(str(save.folder), "linf_16_255", model.processor)
    assert rows["row"] == list(range(40)) and rows["label"] == data.rows["label"] and set(rows["seed"]) == {4}
    radii = []
    for i, row in enumerate(rows):
        clean, adv = data[i]["pixel_values"][None], again[i]["pixel_values"][None]
        if row["attack"] == "none":
            assert (row["view"], row["radius"]) == ("none", 0) and torch.equal(clean, adv)
            assert not row["withstood"] and row["clean_label"] != row["label"]
        else:
            assert (row["view"], row["attack"]) == ("static", "pgd") and row["clean_label"] == row["label"]
            assert bool(ThreatModel(row["radius"]).contains(adv, clean)) and not torch.equal(clean, adv)
        assert row["attacked_label"] == int(model(adv).logits.argmax())
        assert row["withstood_as_saved"] == (row["attacked_label"] == row["label"])
        assert not row["withstood"] or row["radius"] == pytest.approx(16 / 255)
        radii.append(row["radius"])
    assert {round(255 * radius, 1) for radius in radii} == {0, 6.4, 16}
    assert rows.features["label"].names == list(data.class_names)


def test_the_columns_that_a_stranger_reads(attacked):
    for pixels, (_, save) in attacked[2].items():
        splits = load_dataset(str(save.folder))
        assert list(splits) == [split_name(ThreatModel(ODD[0])), "linf_16_255"]
        features = splits["linf_16_255"].features
        picture = datasets.Image() if pixels == "uint8" else datasets.Array3D((3, 8, 8), pixels)
        assert features["image" if pixels == "uint8" else "pixels"] == picture
        told = "label clean_label attacked_label withstood withstood_as_saved view attack radius row seed"
        assert list(features)[1:] == told.split()


@pytest.mark.parametrize(
    ("templates", "told"),
    [
        (["an {}"], "--dataset_test_split linf_16_255 --template 'an {}' --evaluation.attack none"),
        (prompt_templates("clip_cifar10"), '"template": "clip_cifar10"'),
        (["a {}", "an {}"], "No flag holds the prompts"),
    ],
)
def test_the_command_of_the_card_says_the_prompts(templates, told, attacked):
    """Another prompt would give another figure."""
    report, _ = attacked[2]["uint8"]
    hashed = prompt_hash(report.class_names, templates)
    report = replace(report, templates=tuple(templates), prompt_hash=hashed)
    card = make_adversarial_card(report, "out", "uint8", [SavedSplit("linf_16_255", "data/*", "16/255", 40, 3, 3, 1)],
                                 Licence())  # fmt: skip
    assert told in card and "Nobody says under which licence `digits` is" in card


def test_saved_pictures_are_not_attacked_again_nor_prepared_otherwise(attacked):
    model, _, found = attacked
    folder = str(found["uint8"][1].folder)
    data = load_image_dataset(folder, "linf_16_255", model.processor)
    with pytest.raises(ValueError, match=r"attack='PGD-1': .* adversarial already"):
        evaluate_robustness(model, data, EvaluationSettings(["1/255"], attack=PGD(1)), **NAMES)
    with pytest.raises(ValueError, match="attack_resolution=4"):
        load_image_dataset(folder, "linf_16_255", model.processor, attack_resolution=4)
    with pytest.raises(ValueError, match="label_column='attacked_label'"):
        load_image_dataset(folder, "linf_16_255", model.processor, label_column="attacked_label")
    with pytest.raises(ValueError, match="8 px, and the model takes 4"):
        load_image_dataset(folder, "linf_16_255", make_processor(4))
    assert len(data.only(["one", "two"]).first(3)) == 3 and isinstance(data.first(3), AdversarialImages)


def test_arrays_have_digests_and_refuse_what_is_no_pixel(attacked):
    model, _, found = attacked
    data = load_image_dataset(str(found["float32"][1].folder), "linf_16_255", model.processor)
    rows = load_dataset(str(found["float32"][1].folder), split="linf_16_255")
    assert dataset_digest(data) != dataset_digest(data.first(39))
    changed = rows.map(lambda row: {"pixels": np.array(row["pixels"], np.float32) * 1.0001}, features=rows.features)
    other = image_dataset(changed, model.processor)
    assert dataset_digest(other) != dataset_digest(image_dataset(rows, model.processor))
    bright = rows.map(lambda row: {"pixels": np.array(row["pixels"], np.float32) * 2}, features=rows.features)
    with pytest.raises(ValueError, match=r"row 0 .*pixels"):
        [image_dataset(bright, model.processor)[i] for i in range(1)]
    with pytest.raises(ValueError, match="augment"):
        replace(data, augment=True)


def test_pictures_of_several_sizes_are_refused(attacked):
    """Somebody joined two folders: the smaller ones would be enlarged before they are looked at."""
    model, _, found = attacked
    rows = load_dataset(str(found["uint8"][1].folder), split="linf_16_255")
    small = rows.map(lambda row: {"image": row["image"].resize((4, 4))}, features=rows.features)
    data = image_dataset(datasets.concatenate_datasets([rows, small]), model.processor)
    with pytest.raises(ValueError, match=r"row 40 .*4 x 4"):
        data[40]


# ---- an evaluation that was stopped


class Stopped(Exception):
    pass


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_files(attacked, tmp_path, monkeypatch):
    model, data, found = attacked
    report, save = found["uint8"]
    settings, whole = EvaluationSettings(ODD, attack=PGD(3), batch_size=16, seed=4), contents(save.folder)
    where = dict(state_dir=tmp_path / "state", save=SaveAdversarial(tmp_path / "out"))
    write, written = adversarial.AdversarialLog._write, []

    def stop(log, pictures):
        if len(written) == 4:
            raise Stopped
        written.append(len(pictures))
        return write(log, pictures)

    monkeypatch.setattr(adversarial.AdversarialLog, "_write", stop)
    with pytest.raises(Stopped):
        evaluate_robustness(model, data, settings, **NAMES, **where)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(adversarial.AdversarialLog, "_write", write)
    (tmp_path / "state/pictures-0123456789abcdef.arrow").write_bytes(b"of nobody")
    kept = [path for path in sorted((tmp_path / "state").glob("pictures-*")) if path.stat().st_size > 100]
    kept[0].write_bytes(b"cut short")
    assert evaluate_robustness(model, data, settings, **NAMES, **where).measurements == report.measurements
    again = contents(tmp_path / "out")
    assert [again.pop("README.md").splitlines()[-1], again] == [whole.pop("README.md").splitlines()[-1], whole]
    for changes in (dict(save=None), dict(save=SaveAdversarial(tmp_path / "x", "float16"))):
        with pytest.raises(ValueError, match="pictures"):
            evaluate_robustness(model, data, settings, **NAMES, **{**where, **changes})


def test_other_pictures_in_the_folder_are_replaced_and_strange_files_kept(attacked, tmp_path):
    model, data, _ = attacked
    save = SaveAdversarial(tmp_path / "out", "float16")
    for radii in (["4/255", "8/255"], ["8/255"]):
        settings = EvaluationSettings(radii, attack=PGD(1))
        evaluate_robustness(model, data.first(4), settings, **NAMES, state_dir=tmp_path / radii[0][:1], save=save)
        (tmp_path / "out/mine.txt").write_text("mine")
    (pictures,) = (tmp_path / "out/data").iterdir()
    assert re.fullmatch(r"linf_8_255-00000-of-00001-[0-9a-f]{16}\.parquet", pictures.name)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "data", "mine.txt"}
    clear_adversarial(tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["mine.txt"]


def test_large_sets_are_several_files(attacked, tmp_path, monkeypatch):
    model, data, _ = attacked
    monkeypatch.setattr(adversarial, "AT_ONCE", 8)
    monkeypatch.setattr(adversarial, "LARGEST_FILE", 16 * 3 * 64)
    save = SaveAdversarial(tmp_path / "out")
    evaluate_robustness(model, data, EvaluationSettings(["8/255"], attack=PGD(1)), **NAMES, state_dir=tmp_path / "s",
                        save=save)  # fmt: skip
    assert [path.name[17:25] for path in sorted((tmp_path / "out/data").iterdir())] == ["of-00003"] * 3
    assert load_dataset(str(tmp_path / "out"), split="linf_8_255")["row"] == list(range(40))


def test_a_full_disk_leaves_no_folder_that_looks_whole(attacked, tmp_path, monkeypatch):
    model, data, _ = attacked

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adversarial, "_write_split", full)
    with pytest.raises(NotWritten, match="out"):
        evaluate_robustness(model, data.first(4), EvaluationSettings(["8/255"], attack=PGD(1)), **NAMES,
                            state_dir=tmp_path / "state", save=SaveAdversarial(tmp_path / "out"))  # fmt: skip
    assert not (tmp_path / "out").exists()


# ---- defences


@dataclass(frozen=True, kw_only=True)
class Levels(Defence):
    """Classifies images of few grey levels."""

    levels: int = 8

    def _predict(self, classifier, images_BCHW, state, seed, path):
        with torch.set_grad_enabled(path != "none"):
            coarse = (images_BCHW * self.levels).round() / self.levels
            if path == "identity":
                coarse = images_BCHW + (coarse - images_BCHW).detach()
            return Prediction(classifier(pixel_values=coarse).logits)


@pytest.mark.parametrize(
    ("attack", "views"),
    [
        (AdaptiveWorst(1, 1, 3), {("blind pgd", "defence_blind"), ("square", "queries")}),
        (PGD(2), {("pgd", "defence_blind")}),
    ],
    ids=["worst", "blind"],
)
def test_attacks_on_a_defence_tell_their_views_and_are_judged_by_it_again(attack, views, attacked, tmp_path):
    """A blind attack is made on those that the defence lost, too: their picture is the first that it fell to."""
    model, whole, _ = attacked
    view = {} if attack.about else {"view": DefenceBlind()}
    settings = EvaluationSettings(["8/255", "16/255"], attack=attack, batch_size=5, **view)
    save, data = SaveAdversarial(tmp_path / "out", "float32"), whole.first(8)
    report = evaluate_robustness(model, data, settings, **NAMES, defence=Levels(), state_dir=tmp_path / "s", save=save)
    found = set()
    for eps, robust in report.robust_accuracy.items():
        rows = load_dataset(str(tmp_path / "out"), split=split_name(ThreatModel(eps)))
        found |= set(zip(rows["attack"], rows["view"], strict=True))
        assert [whole.rows[row]["label"] for row in rows["row"]] == rows["label"] and rows["row"] != list(range(8))
        again = load_image_dataset(str(tmp_path / "out"), split_name(ThreatModel(eps)), model.processor)
        pixels = torch.stack([again[i]["pixel_values"] for i in range(8)])
        right = Levels().predict(model, pixels).right(torch.tensor(rows["label"]))
        assert right.tolist() == rows["withstood_as_saved"] and float(right.double().mean()) == robust
    assert views <= found
    assert "CLIPModel" not in (tmp_path / "out/README.md").read_text()  # transformers alone knows no defence


@dataclass(frozen=True, kw_only=True)
class Bright(Detector):
    """Flags images that are brighter than another."""

    def scored(self, classifier, images_BCHW, seed, path):
        with torch.set_grad_enabled(path != "none"):
            return Prediction(classifier(images_BCHW).logits, score=images_BCHW.mean(dim=(1, 2, 3)))


def test_an_alarm_on_an_attacked_picture_is_right_and_on_a_clean_one_wrong(attacked, tmp_path):
    model, whole, _ = attacked
    data = whole.first(20)
    brightness = sorted(float(data[i]["pixel_values"].mean()) for i in range(20))
    defence, save = Bright(threshold=brightness[-4] + 1e-4), SaveAdversarial(tmp_path / "out", "float32")
    settings = EvaluationSettings(["16/255"], attack=PGD(2), view=DefenceBlind())
    report = evaluate_robustness(model, data, settings, **NAMES, defence=defence, state_dir=tmp_path / "s", save=save)
    rows = load_dataset(str(tmp_path / "out"), split="linf_16_255")
    table = rows.remove_columns("pixels").to_pandas()
    assert np.mean(rows["withstood"]) == report.robust_accuracy[16 / 255]
    assert rows["withstood"] == rows["withstood_as_saved"]
    assert table[(table["attack"] != "none") & table["flagged"]]["withstood"].all()
    wrong = table[(table["attack"] == "none") & table["flagged"]]
    assert len(wrong) and not wrong["withstood"].any() and (wrong["label"] == wrong["clean_label"]).any()
    again = load_image_dataset(str(tmp_path / "out"), "linf_16_255", model.processor)
    clean = EvaluationSettings([], attack=NoAttack(), view=DefenceBlind())
    with pytest.raises(ValueError, match="alarm"):
        evaluate_robustness(model, again, clean, **NAMES, defence=defence)
    assert "evaluation.attack none" not in (tmp_path / "out/README.md").read_text()


def test_what_would_have_other_figures_or_no_place_is_refused(attacked, tmp_path):
    model, data, _ = attacked
    settings, save = EvaluationSettings(["8/255"], attack=PGD(1)), SaveAdversarial(tmp_path / "out")
    with pytest.raises(ValueError, match="state_dir"):
        evaluate_robustness(model, data, settings, **NAMES, save=save)
    where = dict(save=save, state_dir=tmp_path)
    with pytest.raises(ValueError, match="an attack"):
        evaluate_robustness(model, data, EvaluationSettings([], attack=NoAttack()), **NAMES, **where)
    through = EvaluationSettings(["8/255"], attack=AdaptiveWorst(1, 0, 0))
    with pytest.raises(ValueError, match="bafta"):
        evaluate_robustness(model, data, through, **NAMES, **where, defence=BaFTA())
    known = replace(data, dataset_id="ILSVRC/imagenet-1k")
    with pytest.raises(ValueError, match="imagenet"):
        evaluate_robustness(model, known, settings, **NAMES, **where)
    with pytest.raises(ValueError, match="pixels='png'"):
        SaveAdversarial(tmp_path, "png")
    with pytest.raises(ValueError, match="radii"):
        EvaluationSettings(["8/255"], attack=NoAttack())
    assert list(tmp_path.iterdir()) == []


# ---- in the hands of a stranger


def test_the_code_of_the_card_predicts_the_same_in_a_new_process(tmp_path):
    """A CLIP whose processor resizes to 12 px and crops 8, attacked at its own size and at 4 px, which the model
    enlarges; several prompts; PNGs and arrays. The script knows nothing of this package.
    """
    processor = make_processor(8)
    processor.image_processor.size = {"shortest_edge": 12}
    model = CLIPForZeroShotClassification.from_clip(make_clip(processor), processor).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (13, 16, 3), dtype=np.uint8)) for _ in range(24)]
    names = ["cat", "dog", "bird"]
    script = ["import os"]
    for side, pixels in ((None, "uint8"), (4, "float16")):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"image": pictures, "label": [i % 3 for i in range(24)]}, features=features)
        data = image_dataset(rows, model.processor, attack_resolution=side)
        model.set_classes(names, ["a {}", "the photo of a {}."])
        with model.prepared_for(data), torch.no_grad():
            given = model(torch.stack([data[i]["pixel_values"] for i in range(24)])).logits.argmax(dim=1).tolist()
        rows = datasets.Dataset.from_dict({"image": pictures, "label": given}, features=features)
        data, folder = image_dataset(rows, model.processor, attack_resolution=side), tmp_path / f"{side}{pixels}"
        names_of = dict(name="name", task="task", model_id="model")
        where = dict(state_dir=tmp_path / f"state{side}{pixels}", save=SaveAdversarial(folder, pixels))
        settings = EvaluationSettings(["3/255"], attack=PGD(3))
        report = evaluate_robustness(model, data, settings, **names_of, **where)
        card = (folder / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        script += [code.replace(f'"{folder.name}"', repr(folder.name))]
        assert "hf_robust_clip" not in code and 0 < report.robust_accuracy[3 / 255] < 1
        again = load_image_dataset(str(folder), "linf_3_255", model.processor)
        assert again.resolution == report.attack_resolution == (side or 8)
        measured = evaluate_robustness(model, again, EvaluationSettings([], attack=NoAttack()), **NAMES)
        rows = load_dataset(str(folder), split="linf_3_255")
        assert measured.clean_accuracy == np.mean(rows["withstood_as_saved"])
        script += [f"assert share[1] == 1 and abs(share[0] - {measured.clean_accuracy!r}) < 1e-9, share"]
    (tmp_path / "script.py").write_text("\n".join(script))
    found = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("predictions as in the file 1.0000") == 2
