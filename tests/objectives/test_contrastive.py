import math

import pytest
import torch
from tiny_siglip import tiny_siglip
from training_script import tiny_model

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.modeling.texts import _say_cut
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.contrastive import Contrastive
from hf_robust_clip.training.batches import with_further

ANGLES = (0.1, 0.9, 2.0)  # of images; of texts below, in the plane
TEXTS = (0.3, 1.2, 1.7)
SCALE = 3.0


def student(images, captions):
    def directions(angles):
        angles = torch.as_tensor(angles, dtype=torch.float64)
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    return ZeroShotOutput(
        image_embeds=2 * directions(images.flatten().double()),  # not of unit length
        class_embeds=directions([TEXTS[i] for i in captions[:, 0].tolist()]),
        logit_scale=torch.tensor(SCALE, dtype=torch.float64),
    )


def worked_out(captions):
    """Both terms in plain arithmetic: of each row and column, what is no other image's same caption."""
    z = [[SCALE * math.cos(angle - TEXTS[c]) for c in captions] for angle in ANGLES]
    n = range(len(captions))
    others = [[j for j in n if j == i or captions[j] != captions[i]] for i in n]
    by_image = -sum(z[i][i] - math.log(sum(math.exp(z[i][j]) for j in others[i])) for i in n) / len(captions)
    by_text = -sum(z[i][i] - math.log(sum(math.exp(z[j][i]) for j in others[i])) for i in n) / len(captions)
    return by_image / 2, by_text / 2


@pytest.mark.parametrize("captions", [(0, 1, 2), (1, 0, 1), (2, 2, 2)])
def test_terms_are_those_worked_out_by_hand_and_equal_captions_are_no_negatives(captions):
    images = torch.tensor(ANGLES, dtype=torch.float64).view(3, 1, 1, 1)
    batch = Batch((images,), None, torch.tensor([[i, 9] for i in captions]), student)
    terms = Contrastive()(batch, images)
    for name, wanted in zip(("image", "text"), worked_out(captions), strict=True):
        assert terms[name].item() == pytest.approx(wanted, abs=1e-12)
    if captions == (2, 2, 2):
        assert sum(terms.values()) == 0


def test_it_says_what_it_needs():
    objective = Contrastive()
    assert objective.needs == {"captions"}
    assert objective.couples_images and not objective.attacked
    images = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match="captions"):
        objective(Batch((images,), None, None, student), images)


@pytest.mark.parametrize("model", [tiny_model(), tiny_siglip()], ids=["CLIP", "SigLIP"])
def test_captions_that_are_too_long_are_cut_as_tokenizers_do_it(model, caplog):
    length, tokenizer = model.config.text_config.max_position_embeddings, model.processor.tokenizer
    captions = ["two " * length, "a two"]
    _say_cut.cache_clear()
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8), "captions": captions}
    found = with_further(batch, Contrastive(), 0, model.tokenize)["captions"]
    asked = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    assert torch.equal(found, tokenizer(captions, **asked).input_ids)
    assert f"more than {length} tokens" in caplog.text
    with pytest.raises(ValueError, match="shorten it"):
        model.tokenize(captions)
