"""Outputs of models that are made of numbers, for formulas worked out by hand."""

import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch

OF_ALL = ("class_embeds", "text_embeds", "logit_scale")


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def made_output(**values):
    return ZeroShotOutput(**{name: tensor(value) for name, value in values.items()})


def made_batch(adv, clean=None, on_adv=None, on_clean=None, labels=None, side=1):
    """A batch and its adversarial images, of which student (`adv`, `clean`) and teacher (`on_adv`, `on_clean`) say
    what is given; the second image is told apart by its pixels.
    """
    count = len(next(value for value in adv.values() if value is not None))
    images = torch.zeros(count, 3, side, side, dtype=torch.float64)

    def model(attacked, unattacked):
        def outputs(pixels):
            parts = [attacked if pixel > 0.5 else unattacked for pixel in pixels[:, 0, 0, 0]]
            rows = [made_output(**part).rows([i % count]) for i, part in enumerate(parts)]
            joined = {
                name: rows[0][name] if name in OF_ALL else torch.cat([row[name] for row in rows]) for name in parts[0]
            }
            return ZeroShotOutput(**joined)

        return outputs

    labels = None if labels is None else torch.tensor(labels)
    return Batch((images,), labels, None, model(adv, clean), model(on_adv, on_clean)), images + 1


def views_as_embeddings(views, attacked, labels=None, logits=None):
    """A batch of several views and its attacked images, a pixel each, which are their own embeddings: V x B x 3.

    The student's logits are ten times the first two numbers, or those given for the first rows; its cosines a tenth of
    these numbers. The frozen model has the two the other way round.
    """

    def model(turned):
        def outputs(pixels):
            embeds = pixels.flatten(1)
            pair = embeds[:, :2].flip(1) if turned else embeds[:, :2]
            scores = 10 * pair
            if logits is not None and not turned:
                scores = torch.cat([tensor(logits), scores[len(logits) :]])
            return ZeroShotOutput(image_embeds=embeds, logits=scores, cosine=pair / 10)

        return outputs

    views, attacked = (tensor(part)[..., None, None] for part in (views, attacked))
    labels = None if labels is None else torch.tensor(labels)
    return Batch(tuple(views), labels, None, model(False), model(True)), attacked.flatten(0, 1)
