import pytest
import torch
from worked_pairs import OTHER_TEXTS, TEXTS, worked

from hf_robust_clip import CleanCLIP, CleanerCLIP, GrammarEditor

NEGATIVE = [[0.6, 0.8], [0.8, 0.6]]


def test_the_worked_example():
    """Beside CleanCLIP's terms, which stay."""
    terms = CleanerCLIP()(worked(TEXTS, OTHER_TEXTS, TEXTS, NEGATIVE), None)
    assert 2 * terms["image_sub"].item() == pytest.approx(1.006409, abs=5e-7)
    assert 2 * terms["sub_image"].item() == pytest.approx(0.313262, abs=5e-7)
    assert (terms["image_sub"] + terms["sub_image"]).item() == pytest.approx(0.659835, abs=1e-6)
    own = CleanCLIP()(worked(TEXTS, OTHER_TEXTS), None)
    assert all(torch.equal(terms[name], own[name]) for name in own)
    half = CleanerCLIP(sub_caption_weight=0.5)(worked(TEXTS, OTHER_TEXTS, TEXTS, NEGATIVE), None)
    assert half["image_sub"].item() == pytest.approx(terms["image_sub"].item() / 2, abs=1e-12)


def test_texts_that_equal_an_images_own_positive_one_are_no_negatives():
    same = CleanerCLIP()(worked(TEXTS, OTHER_TEXTS, TEXTS, NEGATIVE, ids=[[1, 2], [3, 4], [5, 5], [5, 5]]), None)
    assert same["image_sub"] == same["sub_image"] == 0  # also a negative where no word could be replaced
    negatives = CleanerCLIP()(worked(TEXTS, OTHER_TEXTS, TEXTS, NEGATIVE, ids=[[1, 2], [3, 4], [5, 5], [6, 7]]), None)
    assert negatives["image_sub"] > 0 and negatives["sub_image"] == 0


def test_captions_are_edited_in_three_ways():
    varied, positive, negative = CleanerCLIP(editor=GrammarEditor()).edited_captions(["a red seven"], 0)
    assert positive == ["a seven"] and negative[0] not in ("a red seven", "a seven")
    assert varied[0] in ("a red seven", "a seven")


def test_a_weight_out_of_range_is_refused():
    with pytest.raises(ValueError, match="sub_caption_weight"):
        CleanerCLIP(sub_caption_weight=-1)
