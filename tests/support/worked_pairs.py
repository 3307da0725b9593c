"""A batch of two images and their captions whose embeddings are given."""

import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch

SCALE = 5.0
IMAGES = [[1, 0], [0, 1]]
TEXTS = [[0.8, 0.6], [0.6, 0.8]]
OTHER_IMAGES = [[0.8, 0.6], [0, 1]]
OTHER_TEXTS = [[1, 0], [0.6, 0.8]]


def worked(*texts, ids=None):
    """A batch whose embeddings are given: images, augmented ones, and each list of texts, by their ids."""
    count = len(texts[0])
    every = torch.tensor([row for own in texts for row in own], dtype=torch.float64)
    ids = ids or [[10 * k + i for i in range(count)] for k in range(len(texts))]
    images = torch.tensor(IMAGES + OTHER_IMAGES, dtype=torch.float64)

    def student(pixels, captions):
        assert captions[:, 0].tolist() == [i for own in ids for i in own]
        order = pixels.flatten().long()
        return ZeroShotOutput(
            image_embeds=3 * images[order], class_embeds=every, logit_scale=torch.tensor(SCALE).double()
        )

    views = tuple(torch.arange(k * count, (k + 1) * count).double().view(count, 1, 1, 1) for k in range(2))
    captions, *further = (torch.tensor(own)[:, None] for own in ids)
    return Batch(views, None, captions, student, further_captions=tuple(further))
