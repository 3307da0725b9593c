"""Views chosen in bfloat16: only the choice is rough."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from naive import targets_of
from prompted_clip import make_images, make_prompted

from hf_robust_clip.defences import prompted
from hf_robust_clip.defences.r_tpt import RTPT
from hf_robust_clip.defences.tapt import TAPT
from hf_robust_clip.defences.tpt import TPT

FEW = dict(num_views=12, selected=0.25, learning_rate=0.05)


def cases():
    for row in ("V", "VLI"):
        yield row, lambda classifier: TAPT.released_preset(targets_of(classifier))
    for cls in (TPT, RTPT):
        yield "T", lambda classifier, cls=cls: cls()


@pytest.mark.parametrize(("row", "make"), cases(), ids=["TAPT-V", "TAPT-VLI", "TPT", "R-TPT"])
@pytest.mark.parametrize("path", ["none", "through"])
def test_only_the_choice_is_rough(row, make, path, monkeypatch):
    classifier, images = make_prompted(row).get_base_model(), make_images(4).float()
    exact = replace(make(classifier), **FEW)
    classifier.float()
    casts = []
    embed = prompted.embed_pixels
    monkeypatch.setattr(
        prompted, "embed_pixels", lambda *given: (casts.append(torch.is_autocast_enabled("cpu")), embed(*given))[1]
    )
    wanted = exact.predict(classifier, images, seed=3, path=path)
    assert not any(casts)
    monkeypatch.setattr(prompted.Run, "roughly_embedded", lambda run, start: run.embed_views(start).float())
    same = replace(exact, choose_bf16=True).predict(classifier, images, seed=3, path=path)
    assert torch.equal(same.kept, wanted.kept) and torch.equal(same.logits, wanted.logits)
    monkeypatch.undo()
    rough = replace(exact, choose_bf16=True).predict(classifier, images, seed=3, path=path)
    assert rough.logits.dtype == rough.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in rough.prompts.values())
    agree = (rough.kept.sort().values == wanted.kept.sort().values).all(dim=1)
    assert agree.double().mean() >= 0.5
    torch.testing.assert_close(rough.logits[agree], wanted.logits[agree], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_classifier_that_it_leaves_alone_is_refused(dtype):
    classifier = make_prompted("VLI").get_base_model()
    tapt = replace(TAPT.released_preset(targets_of(classifier)), **FEW, choose_bf16=True)
    with pytest.raises(ValueError, match="choose_bf16"):
        tapt.predict(classifier.to(dtype), make_images(2).to(dtype))


def test_the_choice_is_made_in_bfloat16(monkeypatch):
    classifier, images = make_prompted("VLI").get_base_model(), make_images(2).float()
    tapt = replace(TAPT.released_preset(targets_of(classifier)), **FEW, choose_bf16=True)
    classifier.float()
    casts = []
    forward = type(classifier).encode_images
    monkeypatch.setattr(
        type(classifier),
        "encode_images",
        lambda model, *given: (casts.append(torch.is_autocast_enabled("cpu")), forward(model, *given))[1],
    )
    tapt.predict(classifier, images)
    assert casts[0] and not any(casts[1:])
