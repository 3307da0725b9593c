import math

import pytest
import torch
from worked_pairs import IMAGES, OTHER_IMAGES, OTHER_TEXTS, SCALE, TEXTS, worked

from hf_robust_clip import CleanCLIP, Contrastive, GrammarEditor
from hf_robust_clip.objectives.base import Batch


def ce(z, target, left_out=()):
    return -z[target] + math.log(sum(math.exp(value) for j, value in enumerate(z) if j not in left_out))


def test_the_worked_example():
    terms = CleanCLIP()(worked(TEXTS, OTHER_TEXTS), None)
    assert (terms["image"] + terms["text"]).item() == pytest.approx(0.313262, abs=5e-7)
    assert 2 * terms["image_self"].item() == pytest.approx(0.072539, abs=5e-7)
    assert 2 * terms["text_self"].item() == pytest.approx(0.649014, abs=5e-7)
    assert (terms["image_self"] + terms["text_self"]).item() == pytest.approx(0.360777, abs=5e-7)
    assert sum(terms.values()).item() == pytest.approx(0.674038, abs=5e-7)


def test_terms_by_plain_arithmetic_with_weights_and_both_directions():
    terms = CleanCLIP(0.5, 3.0, symmetric=True)(worked(TEXTS, OTHER_TEXTS), None)

    def dots(a, b):
        return [[SCALE * (x[0] * y[0] + x[1] * y[1]) for y in b] for x in a]

    def mean(a, b):
        return sum(ce(row, i) for i, row in enumerate(dots(a, b))) / 2

    expected = {"image": 0.25 * mean(IMAGES, TEXTS), "text": 0.25 * mean(TEXTS, IMAGES),
                "image_self": 1.5 * (mean(IMAGES, OTHER_IMAGES) + mean(OTHER_IMAGES, IMAGES)) / 2,
                "text_self": 1.5 * (mean(TEXTS, OTHER_TEXTS) + mean(OTHER_TEXTS, TEXTS)) / 2}  # fmt: skip
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-12)


def test_equal_captions_are_no_negatives():
    """Of two images with one caption nothing is contrasted but the images themselves."""
    alike = CleanCLIP()(worked(TEXTS, OTHER_TEXTS, ids=[[1, 1], [2, 2]]), None)
    assert alike["image"] == alike["text"] == alike["text_self"] == 0
    assert alike["image_self"].item() == pytest.approx(
        CleanCLIP()(worked(TEXTS, OTHER_TEXTS), None)["image_self"].item(), abs=1e-12
    )
    edited = CleanCLIP()(worked(TEXTS, OTHER_TEXTS, ids=[[1, 2], [3, 1]]), None)  # the second, edited, is the first
    assert edited["text_self"] == 0 and edited["text"] > 0


def test_views_and_captions_are_functions_of_the_image_and_the_seed():
    objective, images = CleanCLIP(editor=GrammarEditor()), torch.rand(3, 3, 8, 8)
    (views,) = objective.further_views(images, 3)
    assert views.shape == images.shape and views.min() >= 0 and views.max() <= 1
    assert torch.equal(objective.further_views(images[1:2], 3)[0][0], views[1])
    assert not torch.equal(objective.further_views(images, 4)[0], views)
    captions = [f"a red seven on a {ground} ground" for ground in ("black", "grey", "brown")]
    assert objective.edited_captions(captions, 3) == objective.edited_captions(captions, 4)
    anew = CleanCLIP(editor=GrammarEditor(), edited_once=False)
    assert len({str(anew.edited_captions(captions, seed)) for seed in range(9)}) > 1


def test_its_control_is_the_contrast_of_clip_alone():
    assert CleanCLIP(self_supervised_weight=3).control() == Contrastive() and Contrastive().control() is None


def test_weights_out_of_range_and_missing_captions_are_refused():
    with pytest.raises(ValueError, match="clip_weight"):
        CleanCLIP(clip_weight=-1)
    with pytest.raises(ValueError, match="self_supervised_weight"):
        CleanCLIP(0, 0)
    batch = worked(TEXTS, OTHER_TEXTS)
    with pytest.raises(ValueError, match="captions"):
        CleanCLIP()(Batch(batch.views, None, None, batch.student), None)
