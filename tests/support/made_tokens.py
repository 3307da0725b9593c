"""Tokens of one image, class token first, for maps worked out by hand."""

import torch

TEXTS = [[0, 0, 1], [0.6, 0.8, 0]]
FROZEN = [[1, 2, 0], [1, 0, 1], [0, 1, 1], [2, 1, 0], [1, 1, 1]]
ATTACKED = [[1, 1, 1], [1, 1, 0], [0, 1, 2], [1, 2, 0], [0, 1, 1]]
CLEAN = [[1, 2, 1], [1, 0, 2], [1, 1, 1], [2, 1, 1], [1, 1, 1]]
LABELS = torch.tensor([1])


def of(tokens):
    """An output of one image: its class token is the image's embedding."""
    return dict(image_embeds=[tokens[0]], patch_embeds=[tokens[1:]], logits=[[0, 0]], class_embeds=TEXTS)
