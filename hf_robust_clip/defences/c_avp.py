"""C-AVP's prediction by class-wise visual prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_above, check_whole
from ..modeling import ZeroShotClassifier
from ..paper import Paper
from ..prompts.access import check_same_names, classes_with_prompts, unclipped_gradients, without_class_prompts
from .base import Defence, GradientPath, Prediction
from .memory import activation_bytes
from .prompted import slices


@dataclass(frozen=True, kw_only=True)
class CAVP(Defence):
    """z_c = log softmax(z(x(+)c) / t)_c: how sure the classifier is of class c on the picture with its prompt.

    x(+)c = clip(x + m * delta_c, 0, 1) with the class-wise prompts in the classifier
    (`ClipPromptConfig(design="pixel", per_class=True)`), which the objective C-AVP trains. An image takes C forwards;
    nothing is drawn and nothing tuned. exp(z) doesn't add up to 1. Without this defence such a classifier has no
    logits; while it is `prepared`, its plain forwards are those of the network without prompts: that is what blind
    attacks see, and what controls call static prompts.

    Args:
        temperature: t, above 0; the paper has 1.
        chunk_size: prompts in one forward, for each image; None takes all classes' at once.

    A gradient `"through"` is exact: where clipping binds it is 0. `"identity"` takes clipping for the identity.
    Raises ValueError for numbers out of range, and for a classifier without class-wise prompts.
    Source: arXiv 2210.06284 and the code released with it, whose test attack is made on the network without prompts.
    """

    temperature: float = 1.0
    chunk_size: int | None = None

    paper = Paper.cited("c_avp", "chen2023cavp", arxiv="2210.06284")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above(0, temperature=self.temperature)
        if self.chunk_size is not None:
            check_whole(1, chunk_size=self.chunk_size)

    def check(self, classifier: ZeroShotClassifier) -> None:
        super().check(classifier)
        bound = classes_with_prompts(classifier)
        if bound is None:
            raise ValueError(
                f"{self.name} predicts by class-wise prompts and the classifier has none; train some, or load them."
            )
        check_same_names(bound, classifier.class_names, "class_names: the prompts")

    @contextmanager
    def prepared(self, classifier: ZeroShotClassifier) -> Iterator[None]:
        with super().prepared(classifier), without_class_prompts(classifier):
            yield

    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        count = len(images_BCHW)
        clipping = unclipped_gradients(classifier) if path == "identity" else nullcontext()
        with torch.set_grad_enabled(path != "none"), clipping:
            found = []
            for part in slices(len(classifier.class_names), self.chunk_size):
                classes_K = torch.arange(part.start, part.stop, device=images_BCHW.device)
                rows = images_BCHW.repeat(len(classes_K), 1, 1, 1)
                embeds = classifier.encode_images(rows, class_prompts=classes_K.repeat_interleave(count))
                logits_KBC = classifier.score(embeds, classifier.class_embeds)[0].unflatten(0, (-1, count))
                sure_KBC = (logits_KBC / self.temperature).log_softmax(dim=2)
                found.append(sure_KBC[:, :, part].diagonal(dim1=0, dim2=2))
            logits_BC = torch.cat(found, dim=1)
        return Prediction(logits_BC, torch.zeros(count, dtype=torch.bool, device=logits_BC.device), {})

    def _bytes_per_image(self, classifier: ZeroShotClassifier) -> float:
        classes = len(classifier.class_names)
        at_once = classes if self.chunk_size is None else min(classes, self.chunk_size)
        return at_once * activation_bytes(classifier, graph=True)
