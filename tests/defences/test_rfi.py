"""RFI: worked numbers, a naive float64 version, its fit over parts and processes, and what it refuses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prompted_clip import NAMES, make_base, make_images, make_prompted, randomise
from safetensors.torch import save_file
from torch.nn import functional as F

from hf_robust_clip import CLIPForZeroShotClassification, DefendedClassifier, digits_clip_path
from hf_robust_clip.defences import fit, rfi
from hf_robust_clip.defences.alignment import AlignmentTargets
from hf_robust_clip.defences.rfi import RFI, SecondMoment, SecondMomentSum, projected
from hf_robust_clip.zero_shot_data.loading import load_image_dataset

CLOSE = dict(rtol=0, atol=1e-9)


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def moment_of(vectors: torch.Tensor) -> SecondMoment:
    sums = SecondMomentSum()
    sums.update(vectors)
    return SecondMoment(sums.outer_DD, sums.total_D, sums.count)


# ---- the formula

SEEN = torch.eye(3, dtype=torch.float64)[[0] * 5 + [1] * 3 + [2] * 2]
CLASSES, IMAGE = double([[0.6, 0.8, 0.0], [0.0, 0.6, 0.8]]), double([0.8, 0.6, 0.0])
WORKED = {  # settings: which directions are kept, and logits
    "plain": (None, None, [9.6, 3.6]),
    "eigenvalue": (RFI(top_k=1), [False, True, True], [4.8, 3.6]),
    "squared": (RFI(top_k=1, score="squared"), [True, True, False], [9.6, 3.6]),
    "renormalised": (RFI(top_k=1, renormalised=True), [False, True, True], [6.0, 3.6]),
    "centred": (RFI(top_k=1, centred=True), None, [3.066667, -2.933333]),
}


@pytest.mark.parametrize("name", list(WORKED))
def test_worked_numbers(name):
    defence, kept, wanted = WORKED[name]
    classes = CLASSES
    if defence is not None:
        defence = replace(defence, moment=moment_of(SEEN))
        classes, found = projected(CLASSES, defence._directions(), defence.top_k, defence.score)
        assert kept is None or found.tolist() == kept
        classes = F.normalize(classes, dim=-1) if defence.renormalised else classes
    torch.testing.assert_close(10 * classes @ IMAGE, double(wanted), rtol=0, atol=1e-6 if name == "centred" else 1e-9)


def test_eigenvalues_of_the_worked_example():
    moment = moment_of(3 * SEEN)  # lengths don't count
    torch.testing.assert_close(moment.plain[0], double([0.5, 0.3, 0.2]), **CLOSE)
    torch.testing.assert_close(moment.centred[0], double([0.388102, 0.231898]), rtol=0, atol=1e-6)


def naive(images_ND, classes_CD, image_D, top_k, score, centred):
    """One class and one direction after the other, in numpy."""
    phi = images_ND.numpy() / np.linalg.norm(images_ND.numpy(), axis=1, keepdims=True)
    phi_0 = phi - phi.mean(axis=0) if centred else phi
    values, vectors = np.linalg.eig(phi_0.T @ phi_0 / len(phi))  # in no order
    order = sorted(range(len(values)), key=lambda i: -values[i])
    union = set()
    for t in classes_CD.numpy():
        worth = {
            "eigenvalue": lambda i, t=t: values[i] * (t @ vectors[:, i]) ** 2,
            "squared": lambda i, t=t: values[i] ** 2 * (t @ vectors[:, i]) ** 2,
            "first": lambda i: -order.index(i),
        }[score]
        union |= set(sorted(order, key=worth, reverse=True)[:top_k])
    basis = vectors[:, sorted(union)]
    return len(union), (image_D.numpy() / np.linalg.norm(image_D.numpy())) @ basis @ basis.T @ classes_CD.numpy().T


@pytest.mark.parametrize("score", ["eigenvalue", "squared", "first"])
@pytest.mark.parametrize("centred", [False, True])
def test_the_naive_version_and_rotations(score, centred):
    generator = torch.Generator().manual_seed(0)
    vectors, classes, images = (
        torch.randn(n, 7, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 1.5, 7).double()
        for n in (40, 3, 2)
    )
    classes, images = F.normalize(classes, dim=-1), F.normalize(images, dim=-1)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64))[0]
    for top_k in (1, 2, 7):
        defence = RFI(moment=moment_of(vectors), top_k=top_k, score=score, centred=centred)
        found, kept = projected(classes, defence._directions(), top_k, score)
        for image in images:
            rank, wanted = naive(vectors, classes, image, top_k, score, centred)
            assert int(kept.sum()) == rank
            torch.testing.assert_close(found @ image, torch.from_numpy(wanted), **CLOSE)
        turned = replace(defence, moment=moment_of(vectors @ turn))
        again = projected(classes @ turn, turned._directions(), top_k, score)[0]
        torch.testing.assert_close(images @ turn @ again.T, images @ found.T, **CLOSE)
        assert top_k < 7 or torch.allclose(found, classes, **CLOSE)


# ---- in front of a classifier


def examples(count=30, seed=2):
    return [{"pixel_values": image, "labels": 0} for image in make_images(count, seed)]


def embeds(classifier, data):
    return classifier.encode_images(torch.stack([example["pixel_values"] for example in data])).detach()


@pytest.mark.parametrize("row", ["plain", "VLI"])
def test_predictions_are_those_of_the_embeddings_and_new_classes_need_no_new_fit(row):
    classifier = make_base() if row == "plain" else make_prompted(row).get_base_model()
    data, images = examples(), make_images(3)
    defence = RFI(top_k=2).fit(classifier, data, batch_size=7)
    seen, scale = embeds(classifier, data), float(classifier.logit_scale.exp())
    for names in (NAMES, NAMES[1:4]):
        classifier.set_classes(names, "a bc d {}.")
        found = defence.predict(classifier, images).logits
        for image, logits in zip(embeds(classifier, examples(3, 0)), found, strict=True):
            rank, wanted = naive(seen, classifier.class_embeds.detach(), image, 2, "eigenvalue", False)
            torch.testing.assert_close(logits, scale * torch.from_numpy(wanted), rtol=0, atol=1e-8)
        assert defence.union(classifier).shape == (12, rank) and rank < 12
        assert any(f"rank {rank} of 12" in remark for remark in defence.remarks(classifier, images))
        assert (found - classifier(images).logits).abs().max() > 1e-2


def test_a_full_union_is_the_classifier_and_is_told(caplog):
    classifier, images = make_base(), make_images(2)
    defence = RFI(top_k=12).fit(classifier, examples())
    rfi._warn_once.cache_clear()
    found = defence.predict(classifier, images).logits
    torch.testing.assert_close(found, classifier(images).logits.detach(), rtol=0, atol=1e-9)
    defence.predict(classifier, images)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert any("does nothing" in remark for remark in defence.remarks(classifier, images))
    assert not any("does nothing" in told for told in replace(defence, top_k=1).remarks(classifier, images))


def test_ties_for_the_last_place_are_told():
    classifier = make_base()
    defence = RFI(top_k=2).fit(classifier, examples())
    even = replace(defence.moment, outer_DD=30 * torch.eye(12, dtype=torch.float64) / 12)
    assert not any("tie" in told for told in defence.remarks(classifier, make_images(1)))
    tied = replace(defence, moment=even, score="first").remarks(classifier, make_images(1))
    assert any("tie" in told for told in tied)


# ---- fitting


def assert_moments_equal(found: SecondMoment, other: SecondMoment) -> None:
    assert found.count == other.count
    torch.testing.assert_close(found.outer_DD, other.outer_DD, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.total_D, other.total_D, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_the_moment_is_that_of_all_unit_embeddings_at_once(batch_size):
    classifier, data = make_base(), examples(11)
    found = RFI().fit(classifier, data, batch_size=batch_size).moment
    unit = F.normalize(embeds(classifier, data), dim=-1)
    assert found.outer_DD.dtype == torch.float64
    assert_moments_equal(found, SecondMoment(unit.T @ unit, unit.sum(0), 11))


def test_processes_fit_together_what_one_fits(monkeypatch):
    classifier, data, given = make_base(), examples(11), []
    one = RFI().fit(classifier, data, batch_size=2)
    ranks = [SimpleNamespace(process_index=rank, num_processes=3, wait_for_everyone=lambda: None) for rank in range(3)]
    monkeypatch.setattr(
        "accelerate.utils.gather_object", lambda own: own if isinstance(own[0], dict) else given.extend(own) or own
    )
    for rank in ranks:
        RFI().fit(classifier, data, batch_size=2, processes=rank)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: own if isinstance(own[0], dict) else given)
    found = [RFI().fit(classifier, data, batch_size=2, processes=rank).moment for rank in ranks]
    assert torch.equal(found[0].outer_DD, found[2].outer_DD)
    assert_moments_equal(found[1], one.moment)


def test_a_killed_fit_goes_on_and_the_state_of_other_sums_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "BATCHES_PER_STATE", 1)
    classifier, data = make_base(), examples(6)
    whole = RFI().fit(classifier, data, batch_size=2)
    encode, calls = type(classifier).encode_images, []

    def killed(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(type(classifier), "encode_images", killed)
    with pytest.raises(KeyboardInterrupt):
        RFI().fit(classifier, data, batch_size=2, state_dir=tmp_path)
    found = RFI().fit(classifier, data, batch_size=2, state_dir=tmp_path)
    assert len(calls) == 4 and torch.equal(found.moment.outer_DD, whole.moment.outer_DD)
    assert found.moment.record == whole.moment.record
    with pytest.raises(ValueError, match="its statistics is 'SecondMomentSum'"):
        fit.collect_statistics(classifier, data, batch_size=2, state_dir=tmp_path)


# ---- what is refused


def test_wrong_moments_and_numbers_are_refused():
    classifier, images = make_base(), make_images(1)
    with pytest.raises(ValueError, match="moment is missing"):
        RFI().predict(classifier, images)
    fitted = RFI(top_k=2).fit(classifier, examples())
    with pytest.raises(ValueError, match="another image encoder"):
        fitted.predict(make_base(seed=1), images)
    with pytest.raises(ValueError, match="other prompts"):
        fitted.predict(make_prompted("V").get_base_model(), images)
    prompted = make_prompted("V").get_base_model()
    own = RFI(top_k=2).fit(prompted, examples())
    randomise(prompted, 5)
    with pytest.raises(ValueError, match="other prompts"):
        own.predict(prompted, images)
    with pytest.raises(ValueError, match="top_k=13"):
        replace(fitted, top_k=13).predict(classifier, images)
    few = RFI().fit(classifier, examples(4))  # four images span four directions, and there are six classes
    with pytest.raises(ValueError, match="top_k=None"):
        few.predict(classifier, images)
    assert len(few.moment.plain[0]) == 4
    with torch.no_grad():
        classifier.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        RFI().fit(classifier, examples(2))
    for outer, total, count in ((torch.eye(3), torch.zeros(2), 1), (torch.eye(2), torch.zeros(2), 0)):
        with pytest.raises(ValueError, match=r"outer_DD|count"):
            SecondMoment(outer, total, count)


def test_presets():
    assert RFI.paper_preset() == RFI() and RFI().score == "eigenvalue"
    assert RFI.released_preset().score == "squared" and RFI.first_k_preset().score == "first"


# ---- saved and loaded


def test_a_folder_has_the_moment_and_a_card_says_of_what(tmp_path):
    classifier = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).eval()
    data = load_image_dataset("digits", "train", classifier.processor).first(80)
    classifier.set_classes(data.class_names, "a photo of a {}.")
    defended = DefendedClassifier(classifier, RFI(top_k=3).fit(classifier, data))
    defended.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adaptation.json").read_text())["fitted"] == {"moment": SecondMoment.file}
    restored = DefendedClassifier.from_pretrained(tmp_path, method=RFI).adapter
    assert torch.equal(restored.moment.outer_DD, defended.adapter.moment.outer_DD)
    assert "80 images of" in str(defended.card("user/rfi"))


def test_files_that_hold_no_second_moment(tmp_path):
    with pytest.raises(OSError, match=r"RFI\.fit"):
        SecondMoment.load(tmp_path)
    for metadata in ({"format": "pt"}, {"second_moment": "{"}, {"second_moment": "{}"}):
        save_file({"outer": torch.eye(2), "total": torch.zeros(2)}, tmp_path / SecondMoment.file, metadata)
        with pytest.raises(ValueError, match="no second moment"):
            SecondMoment.load(tmp_path)
    (tmp_path / SecondMoment.file).write_bytes(b"half")
    with pytest.raises(OSError, match="damaged"):
        SecondMoment.load(tmp_path)
    assert SecondMoment.file != AlignmentTargets.file
