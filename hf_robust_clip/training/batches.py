"""Which images of the batches make an update, and how much each batch counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..modeling import ZeroShotClassifier, ZeroShotOutput
    from ..objectives.base import Objective

VIEW = 1 << 28  # apart lie the seeds of an image's views, further than any step
OWN_IMAGES = "own_images"  # key of a batch that was filled up: how many of its images belong to this process's share


def count_images(batch: Mapping[str, Any]) -> int:
    """Images of a batch that belong to the update."""
    if OWN_IMAGES in batch:
        return int(batch[OWN_IMAGES])
    return len(batch["pictures"] if "pictures" in batch else batch["pixel_values"])


def without_fill(batch: Mapping[str, Any], own: int) -> dict[str, Any]:
    """A batch without the images that fill it up, its first `own` kept; where these are none, one image stays (every
    process must take part in an update), which counts for nothing.
    """
    count = count_images(batch)
    kept = {
        name: values[: max(own, 1)] if hasattr(values, "__len__") and len(values) == count else values
        for name, values in batch.items()
    }
    return {**kept, OWN_IMAGES: own}


def with_further(
    inputs: dict[str, Any], objective: Objective, seed: int, tokenize: Callable[..., Tensor]
) -> dict[str, Any]:
    """A batch with the objective's further views and captions, where it has any; of captions that it needs, the token
    ids (B, L), L the context length, so that they can be compared over processes; longer ones are cut.

    Raises ValueError where there are none.
    """
    pixels_BCHW = inputs["pixel_values"]
    views = objective.further_views(pixels_BCHW, seed + VIEW * objective.num_views)
    if views:
        inputs = {**inputs, "views": (*inputs.get("views", (pixels_BCHW,)), *views)}
    if "captions" not in objective.needs:
        return inputs
    if "captions" not in inputs:
        raise ValueError(f"{type(objective).__name__} needs captions; the dataset gives none.")
    texts = inputs["captions"], *objective.edited_captions(inputs["captions"], seed)
    own, *others = (token_ids(text, tokenize).to(pixels_BCHW.device) for text in texts)
    return {**inputs, "captions": own, "further_captions": tuple(others)}


def token_ids(texts: Sequence[str], tokenize: Callable[..., Tensor]) -> Tensor:
    """Token ids (B, L), L the context length, to which longer texts are cut; of equal texts one is tokenised."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return tokenize(list(places), whole=True, cut=True)[[places[text] for text in texts]]


def own_images_of_last_batch(images: int, batch_size: int, processes: int, process: int) -> int:
    """How many of an epoch's `images` are left for a process in its last batch.

    Batches are dealt in turn, and the last ones filled up with images from the beginning of the epoch, so that each
    process gets as many.
    """
    rounds = -(-images // (batch_size * processes)) - 1
    before = (rounds * processes + process) * batch_size
    return min(max(images - before, 0), batch_size)


def share_of_update(images: int, images_in_update: int, processes: int) -> float:
    """The factor on a batch's mean loss that makes gradients, summed over accumulated batches and averaged over
    processes, those of the mean over all images of the update.
    """
    return images * processes / images_in_update


def gathering(own: int, processes: Accelerator) -> Callable[[Tensor], Tensor]:
    """A function from the rows (B, ...) of this process, the first `own` of which belong to the update, to those of
    all processes that do, in their order, with gradients to each. All processes must call it alike.
    """
    counts: list[list[int]] = []

    def gather(rows: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_gather

        if not counts:
            told = torch.tensor([[own, len(rows)]], device=rows.device)
            counts.extend(processes.gather(told).tolist())
        longest = max(length for _, length in counts)
        padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, longest - len(rows)))
        return torch.cat([part[:count] for part, (count, _) in zip(all_gather(padded), counts, strict=True)])

    return gather


def in_bfloat16(student: Callable[..., ZeroShotOutput]) -> Callable[..., ZeroShotOutput]:
    """A student whose forwards, and the gradients through them, are computed in bfloat16: matrix products are, while
    weights stay as they are, and logits, losses and all that it gives are in float32 at least.
    """

    def call(pixels: Tensor, **captions: Tensor) -> ZeroShotOutput:
        with torch.autocast(pixels.device.type, torch.bfloat16):
            output = student(pixels, **captions)
        if output.patch_embeds is not None:
            output["patch_embeds"] = output.patch_embeds.to(output.logits.dtype)
        return output

    return call


@contextmanager
def still_texts(*models: ZeroShotClassifier | None) -> Iterator[None]:
    """Inside, the class embeddings of models with a frozen text side stand still (`fixed_class_embeds`): what they
    depend on is looked at once for all forwards, and images are not looked at, which were checked.
    """
    with ExitStack() as stack:
        for model in models:
            if model is not None and not model.text_is_trainable():
                stack.enter_context(model.fixed_class_embeds())
        yield


def as_objectives_call(
    model: nn.Module, classifier: ZeroShotClassifier, objective: Objective
) -> Callable[..., ZeroShotOutput]:
    """A model, with the classifier inside, as an objective calls it: with the patch and text embeddings that it asks
    for.
    """
    patches = {"output_patches": True} if "patches" in objective.needs else {}
    own = [classifier.text_embeds()] if "texts" in objective.needs else []
    others = [classifier.text_embeds(objective.templates)] if objective.templates else []
    texts_KCD = torch.cat([*own, *others]) if own or others else None

    def call(pixels: Tensor, **captions: Tensor) -> ZeroShotOutput:
        output = model(pixel_values=pixels, **patches, **captions)
        if texts_KCD is not None:
            output["text_embeds"] = texts_KCD
        return output

    return call
