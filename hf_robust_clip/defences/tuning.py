"""Tuning prompts on each test image, many images at once: the one loop behind TAPT, TPT, PromptAlign and R-TPT."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_whole
from ..crops import RandomResizedCrop
from ..modeling import ZeroShotClassifier
from ..prompts.access import prompts_of, words_as_prompts
from .base import Defence, GradientPath, Prediction, Traits
from .memory import activation_bytes
from .moments import layer_inputs
from .prompted import Prompts, Run, differentiable_twice, embed_pixels
from .views import draw_boxes

BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's, as everywhere


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Defence):
    """Views -> the most confident of them -> a loss without labels -> AdamW steps on the prompts -> a prediction.

    For every image by itself: of `num_views` views the floor(selected * num_views) with the lowest entropy under the
    initial prompts are kept; the loss of these is minimised in `num_steps` steps of AdamW with a fresh state; the
    image is classified with the tuned prompts. A method overrides `loss`, and `predict_tuned` if it doesn't classify
    the image itself.

    B images run together: each has prompts of its own, (B, n, d), and nothing in CLIP mixes images. The views are
    chosen without a graph, and only the kept ones are differentiated. In the first step all images have the same
    prompts, so the text tower's graph is built once for all of them, and each image adds a vector-Jacobian product.

    Args:
        num_views: the image itself and num_views - 1 random crops, at least 2.
        selected: fraction of them that is kept, at least one view.
        learning_rate, weight_decay: of AdamW.
        num_steps: of AdamW, at least 1.
        crop: how crops are drawn.
        chunk_size: at most so many views, and so many classes, in one forward; None takes all at once. The results
            are the same.
        choose_bf16: choose the views by embeddings in bfloat16, all else stays in float32: a view at the margin may
            be another. It pays where vision prompts are tuned; else what is embedded for the choice is embedded again.

    Raises ValueError for numbers out of range.
    """

    num_views: int = 64
    selected: float = 0.1
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    num_steps: int = 1
    crop: RandomResizedCrop = field(default_factory=RandomResizedCrop)
    chunk_size: int | None = None
    choose_bf16: bool = False

    aligns: ClassVar[bool] = False  # whether `loss` looks at the inputs of the encoder's layers

    def __post_init__(self) -> None:
        super().__post_init__()
        check_views(self.num_views, self.chunk_size)
        if not 0 < self.selected <= 1 or self.num_kept < 1:
            raise ValueError(f"selected={self.selected!r} must be in [1 / {self.num_views}, 1], to keep a view.")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number of at least 0.")
        check_whole(1, num_steps=self.num_steps)

    @property
    def traits(self) -> Traits:
        return Traits(randomised=True, optimising=True)

    def check(self, classifier: ZeroShotClassifier) -> None:
        super().check(classifier)
        if self.choose_bf16 and classifier.dtype in (torch.float64, torch.bfloat16):  # autocast leaves both alone
            raise ValueError(f"choose_bf16=True does nothing with a classifier in {classifier.dtype}; leave it out.")

    @property
    def num_kept(self) -> int:
        """K = floor(selected * num_views)."""
        return math.floor(self.selected * self.num_views + 1e-9)

    @abstractmethod
    def loss(self, logits_BKC: Tensor, layer_inputs: Sequence[Tensor]) -> Tensor:
        """What is minimised for each image, (B,), from the logits of its kept views.

        Args:
            layer_inputs: where `aligns` is set, what each layer of the image encoder reads, (B * K, tokens, width).
        """

    def tuned(self, classifier: ZeroShotClassifier) -> Prompts:
        """What is tuned, by parameter name."""
        return {name: parameter.detach() for name, parameter in prompts_of(classifier).items()}

    def initial(self, classifier: ZeroShotClassifier, own: Prompts) -> Prompts:
        """The values that tuning begins from, the same for all images. `own` are those that the classifier has."""
        return own

    def predict_tuned(self, run: Run, prompts: Prompts) -> Tensor:
        """The logits (B, C) with the tuned prompts: those of the image itself, not of a view."""
        return run.classifier.score(run.embed_image(prompts), run.class_embeds(prompts))[0]

    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        run = self.run(classifier, images_BCHW, seed, path)
        return self.tune(run, self.initial(classifier, run.own))

    def run(self, classifier: ZeroShotClassifier, images_BCHW: Tensor, seed: int, path: GradientPath) -> Run:
        """The batch with its views drawn."""
        views = draw_boxes(images_BCHW, self.num_views, self.crop, seed)
        return Run(classifier, images_BCHW, views, self.tuned(classifier), path, self.chunk_size)

    def tune(self, run: Run, start: Prompts) -> Prediction:
        """Tune from `start`, (n, d) or (B, n, d), and predict."""
        kept_BK = self.choose(run, start)
        prompts = {name: value.expand(len(run.images), *run.own[name].shape) for name, value in start.items()}
        state = {name: (_zeros(p), _zeros(p)) for name, p in prompts.items()}
        finite_B = torch.ones(len(run.images), dtype=torch.bool, device=run.images.device)
        first_loss = None
        attention: Any = differentiable_twice() if run.path == "through" else nullcontext()
        with attention:
            images = run.images
            if run.path == "through" and images.requires_grad:  # 0 * nan is nan: what fell back has no gradient here
                images = images.clone()
                images.register_hook(lambda grad: grad.where(finite_B.view(-1, 1, 1, 1), 0.0))
            kept = run.kept(kept_BK, images)
            for step in range(1, self.num_steps + 1):
                shared = start if step == 1 and run.is_shared(start) else None
                loss_B, gradient = self.gradient(run, kept, prompts, shared)
                finite_B = finite_B & loss_B.isfinite()
                for name, grad in gradient.items():
                    finite_B = finite_B & grad.flatten(1).isfinite().all(dim=1)
                    prompts[name], state[name] = self.adamw(prompts[name], grad, state[name], step)
                    finite_B = finite_B & prompts[name].detach().flatten(1).isfinite().all(dim=1)
                first_loss = loss_B if first_loss is None else first_loss
            prompts = {name: _where(finite_B, value, run.own[name]) for name, value in prompts.items()}
            if run.path != "through":
                prompts = {name: value.detach() for name, value in prompts.items()}
            with torch.set_grad_enabled(run.path != "none"):
                logits_BC = self.predict_tuned(run, prompts)
        return Prediction(logits_BC, ~finite_B, prompts, loss=first_loss, kept=kept_BK)

    def choose(self, run: Run, start: Prompts) -> Tensor:
        """The views (B, K) of lowest entropy, most confident first."""
        with torch.no_grad():
            embeds_BVD = run.roughly_embedded(start) if self.choose_bf16 else run.embed_views(start)
            logits_BVC = run.logits(embeds_BVD, run.class_embeds(start))
            return entropy(logits_BVC).argsort(dim=1, stable=True)[:, : self.num_kept]

    def gradient(self, run: Run, kept: Tensor, prompts: Prompts, shared: Prompts | None) -> tuple[Tensor, Prompts]:
        """The loss (B,), and its gradient by each image's prompts.

        Args:
            kept: the kept views (B, K, C, H, W), or their embeddings (B, K, D) if no tuned prompt moves them.
            shared: the prompts that all images have, if they do: the text side is differentiated at these.
        """
        through = run.path == "through"
        leaves = {name: p if p.requires_grad else p.detach().clone().requires_grad_() for name, p in prompts.items()}
        wanted = list(leaves.values())
        class_embeds = run.class_embeds(leaves) if shared is None else run.class_embeds(shared)
        if shared is not None and run.text_names:
            size = (len(run.images), *class_embeds.shape[-2:])
            class_embeds = class_embeds.detach().expand(size).clone().requires_grad_()
            wanted.append(class_embeds)
        nothing: list[Tensor] = []
        with layer_inputs(run.classifier) if self.aligns else nullcontext(nothing) as inputs:
            embeds_BKD = kept if kept.dim() == 3 else embed_pixels(run.classifier, kept, leaves)
        loss_B = self.loss(run.logits(embeds_BKD, class_embeds), inputs)
        found = torch.autograd.grad(loss_B.sum(), wanted, create_graph=through, allow_unused=True)
        gradient = {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(leaves.items(), found, strict=False)
        }
        if len(found) > len(leaves):
            assert shared is not None
            for name, grad in run.text_gradient(shared, found[-1]).items():
                gradient[name] = gradient[name] + grad
        return loss_B, gradient

    def adamw(
        self, p: Tensor, grad: Tensor, state: tuple[Tensor, Tensor], step: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One step of AdamW, element by element, at least in float32; the first is
        p (1 - lr wd) - lr g / (|g| + eps).
        """
        kind, p, grad = p.dtype, p.to(state[0]), grad.to(state[0])  # eps is 0 in half precision
        m = BETAS[0] * state[0] + (1 - BETAS[0]) * grad
        v = BETAS[1] * state[1] + (1 - BETAS[1]) * grad.square()
        if step == 1:
            direction = grad / (grad.abs() + EPSILON)
        else:  # the floor is far below eps squared; without it the root of 0 has no derivative
            root = (v / (1 - BETAS[1] ** step)).clamp_min(torch.finfo(v.dtype).tiny).sqrt()
            direction = m / (1 - BETAS[0] ** step) / (root + EPSILON)
        moved = p * (1 - self.learning_rate * self.weight_decay) - self.learning_rate * direction
        return moved.to(kind), (m, v)

    def _bytes_per_image(self, classifier: ZeroShotClassifier) -> float:
        at_once = self.num_views if self.chunk_size is None else min(self.num_views, self.chunk_size)
        views = at_once * activation_bytes(classifier, graph=False)
        return views + self.num_kept * activation_bytes(classifier, graph=True)


@dataclass(frozen=True, kw_only=True)
class WordTuning(PromptTuning):
    """Tunes the words that all class prompts begin with: in a plain CLIP the template's own, at the input.

    Tuning starts at the plain classifier's predictions: the prompts stand for every token between the start token and
    the class name, with that token's embedding (in a family without a start token, from the first word on). In a
    classifier that has text prompts already, those are tuned.

    Raises ValueError for several templates, a template without words before the class name, and a classifier with
    vision prompts alone.
    """

    def tuned(self, classifier: ZeroShotClassifier) -> Prompts:
        text = {id(p) for module in classifier.text_modules for p in module.parameters()}
        return {name: p.detach() for name, p in prompts_of(classifier).items() if id(p) in text}

    def check(self, classifier: ZeroShotClassifier) -> None:
        super().check(classifier)
        if prompts_of(classifier):
            if not self.tuned(classifier):
                raise ValueError(f"{self.name} tunes words; the classifier has vision prompts alone.")
        elif len(classifier.templates) > 1:
            raise ValueError(f"{self.name} tunes one template, not {len(classifier.templates)}; set_classes with one.")
        elif classifier.context_length < 1:
            raise ValueError(f"{self.name} tunes words before the class name: {classifier.templates[0]!r} has none.")

    @contextmanager
    def prepared(self, classifier: ZeroShotClassifier) -> Iterator[None]:
        if prompts_of(classifier):
            with super().prepared(classifier):
                yield
            return
        first = classifier.first_word
        words = classifier.class_token_ids[0, 0, first : first + classifier.context_length]
        with words_as_prompts(classifier.text_model, words, first), super().prepared(classifier):
            yield


def entropy(logits: Tensor) -> Tensor:
    """H(softmax z) = -sum_c p_c log p_c over the last dimension, in nats."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def marginal_entropy(logits_BKC: Tensor) -> Tensor:
    """H of the prediction averaged over K views, H(mean_k softmax z_k), (B,)."""
    log_mean = log_mean_softmax(logits_BKC)
    return -(log_mean.exp() * log_mean).sum(dim=-1)


def log_mean_softmax(logits_BKC: Tensor) -> Tensor:
    """log(mean_k softmax z_k), (B, C)."""
    return logits_BKC.log_softmax(dim=-1).logsumexp(dim=1) - math.log(logits_BKC.shape[1])


def check_views(num_views: int, chunk_size: int | None) -> None:
    """Raise ValueError for fewer than 2 views, and chunks below 1."""
    check_whole(2, num_views=num_views)
    check_whole(1, chunk_size=1 if chunk_size is None else chunk_size)


def _zeros(like: Tensor) -> Tensor:
    """Where AdamW keeps its moments of a tensor: in float32 at least."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _where(rows_B: Tensor, tuned: Tensor, own: Tensor) -> Tensor:
    """Each image's tuned prompts where its tuning was finite, else the classifier's own."""
    return torch.where(rows_B.view(-1, *[1] * own.dim()), tuned, own)
