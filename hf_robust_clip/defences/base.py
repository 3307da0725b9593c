"""What a test-time defence is: images in, logits out, the classifier left as it was found.

Shapes: B images, V views of each, K of them kept, C classes, D embedding width, n prompts of width d.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import check_logits
from ..modeling import CLIPForZeroShotClassification, without_gradients
from ..paper import Paper
from ..processes import Processes

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

    from ..zero_shot_data.dataset import ImageDataset

logger = logging.getLogger(__name__)
GradientPath = Literal["none", "through", "identity"]
T = TypeVar("T")


@dataclass(frozen=True)
class Traits:
    """What an attack and an evaluation must know of a defence.

    Args:
        randomised: it draws random numbers (views, noise). Each draw follows from `seed` and the image's own grey
            levels, so that `predict` is a function; to an attack, which changes the image, the draws are random.
        optimising: it takes gradients while it predicts.
        episodic: no image leaves a trace for the next; order and batches don't matter. A defence that isn't has a
            stream state (`Defence.start`), and is evaluated in order, on one process.
    """

    randomised: bool = False
    optimising: bool = False
    episodic: bool = True


@dataclass
class Prediction:
    """What a defence made of a batch.

    Args:
        logits: (B, C).
        fell_back: (B,), images whose tuning was not finite: their logits are those without tuning.
        prompts: by parameter name in the classifier, the prompts tuned for each image, (B, ...); empty if none are.
        images: (B, C, H, W), what was classified in place of the given images, if anything was.
        loss: (B,), the loss that was minimised, before the first step.
        kept: (B, K), indices of the views that were kept, most confident first; 0 is the image itself.
        score: (B,), of a detector: the higher, the more an image looks attacked.
        flagged: (B,), of a detector: the images that it takes for attacked and gives no class.
        state: of a defence with a stream state: what the next images begin from.
    """

    logits: Tensor
    fell_back: Tensor | None = None
    prompts: dict[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None
    loss: Tensor | None = None
    kept: Tensor | None = None
    score: Tensor | None = None
    flagged: Tensor | None = None
    state: Any = None

    def right(self, labels_B: Tensor, *, attacked: bool = False) -> Tensor:
        """Whether the verdict on each image is right, (B,): its class is the label, and it isn't flagged. An attacked
        image that is flagged withstood the attack.

        Raises FloatingPointError for logits that are not finite, which name no class.
        """
        check_logits(self.logits)
        named_B = self.logits.argmax(dim=1) == labels_B
        if self.flagged is None:
            return named_B
        return named_B | self.flagged if attacked else named_B & ~self.flagged


@dataclass(frozen=True, kw_only=True)
class Defence(ABC):
    """A test-time defence: a frozen dataclass of its hyperparameters with functions of a classifier and images.

    A new method is one file with one subclass that has `paper`, `traits` and `_predict`. The classifier is an
    argument: `CLIPForZeroShotClassification` with its classes set, and with the prompts in it that the method tunes
    (`needs_prompts`); methods that tune the words of a plain CLIP put them in for the time being. Parameters, mode and
    class embeddings come back as they were.

    Args:
        memory_budget: GiB that activations may take; None takes the batch whole. A batch that doesn't fit (by
            estimate, or when a GPU runs out of memory) is divided: the results are the same.

    Raises ValueError for a budget that isn't positive.
    """

    __test__: ClassVar[bool] = False  # pytest: no test, for all its name
    paper: ClassVar[Paper]
    needs_prompts: ClassVar[bool] = False

    memory_budget: float | None = None

    def __post_init__(self) -> None:
        if self.memory_budget is not None and not self.memory_budget > 0:
            raise ValueError(f"memory_budget={self.memory_budget!r} must be a positive number of GiB, or None.")

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What an attack must know."""

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.paper.method

    def parameters(self) -> dict[str, Any]:
        """All settings as JSON types, for reports and saved folders."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.repr}

    def idle_settings(self) -> dict[str, str]:
        """Settings that do nothing beside the others, by name, with why."""
        return {}

    @abstractmethod
    def _predict(
        self,
        classifier: CLIPForZeroShotClassification,
        images_BCHW: Tensor,
        state: Any,
        seed: int,
        path: GradientPath,
    ) -> Prediction:
        """`predict` on images that fit into memory, with the classifier prepared; gradients are on. `state` is None
        for episodic defences, else that before the first of these images.
        """

    def fit(
        self,
        classifier: CLIPForZeroShotClassification,
        dataset: ImageDataset,
        *,
        batch_size: int = 64,
        processes: Processes = None,
        state_dir: str | Path | None = None,
        num_workers: int = 0,
        progress: bool = False,
    ) -> Self:
        """The defence with what it learns from (training) images: statistics, second moments, thresholds.

        Most learn nothing and are given back as they are.

        Args:
            classifier: with its classes set.
            dataset: images that the defence is not judged on.
            batch_size: images per forward.
            processes: divides the images; each process gets the same defence.
            state_dir: a folder for what is done already, where fitting takes long.
        """
        return self

    def start(self, classifier: CLIPForZeroShotClassification) -> Any:
        """The stream state before the first image; None for episodic defences."""
        return None

    def predict(
        self,
        classifier: CLIPForZeroShotClassification,
        images_BCHW: Tensor,
        *,
        state: Any = None,
        seed: int = 0,
        path: GradientPath = "none",
    ) -> Prediction:
        """Defend each image by itself, or, with a stream state, one after the other.

        Args:
            classifier: with its classes set.
            images_BCHW: (B, C, H, W) in [0, 1], of the classifier's `input_size`.
            state: the stream state that the first image meets; None takes `start(classifier)`. It isn't changed: the
                prediction holds the next one, which an evaluation carries on and an attack lets go.
            seed: of all that is drawn.
            path: what a gradient by the images goes through. `"none"`: nothing, results are detached. `"through"`:
                the views and the tuning steps (exact; second derivatives of the classifier). `"identity"`: the views
                and the prediction, while the tuned prompts count as constants (BPDA). Which views are kept is
                discrete and carries no gradient.

        Raises ValueError for images of wrong shape or outside [0, 1], and a classifier without classes or without the
        prompts that the method tunes.
        """
        if not isinstance(classifier, CLIPForZeroShotClassification):
            raise TypeError(
                f"classifier is a {type(classifier).__name__}; give a CLIPForZeroShotClassification (of a PeftModel "
                "its get_base_model())."
            )
        if path not in get_args(GradientPath):
            raise ValueError(f"path={path!r} is unknown; choose {', '.join(map(repr, get_args(GradientPath)))}.")
        self.check(classifier)
        if not isinstance(images_BCHW, Tensor):
            raise TypeError(
                f"images_BCHW is a {type(images_BCHW).__name__}; give one tensor (B, C, H, W). Pictures of mixed "
                "sizes are brought to one by the classifier's processor (zero_shot_data.loading.to_pixels)."
            )
        classifier.check_pixels(images_BCHW)
        if len(images_BCHW) == 0:
            raise ValueError("images_BCHW is empty; give at least one image.")
        with self.prepared(classifier):
            images_BCHW = images_BCHW.clone() if images_BCHW.is_inference() else images_BCHW
            if not self.traits.episodic and state is None:
                state = self.start(classifier)
            size = self._images_at_once(classifier, len(images_BCHW))

            def part(rows: slice) -> Prediction:
                nonlocal state
                found = self._predict(classifier, images_BCHW[rows], state, seed, path)
                state = found.state
                return _detached(found) if path == "none" else found

            return _joined(_in_parts(part, len(images_BCHW), size, self._group))

    def check(self, classifier: CLIPForZeroShotClassification) -> None:
        """Raise ValueError unless the classifier has what the method needs."""
        if not classifier.class_names:
            raise ValueError("the classifier has no classes; call set_classes(class_names) first.")
        if len(classifier.class_names) == 1:
            raise ValueError(
                f"there is one class, {classifier.class_names[0]!r}: its probability is 1 whatever the image; "
                "set_classes more."
            )
        if self.needs_prompts and not prompts_of(classifier):
            raise ValueError(
                f"{self.name} tunes prompts and the classifier has none: train some (TAPTTrainer, APTTrainer), or "
                "load an adapter with PeftModel.from_pretrained."
            )

    @contextmanager
    def prepared(self, classifier: CLIPForZeroShotClassification) -> Iterator[None]:
        """The classifier in eval mode, its parameters frozen, with gradients on, ready to be defended.

        Enter it around many calls to spare each of them the preparation; it may be entered again inside.
        """
        training = [module for module in classifier.modules() if module.training]
        with ExitStack() as stack:
            stack.callback(_train_again, training)
            classifier.eval()
            stack.enter_context(without_gradients(classifier))
            stack.enter_context(classifier.fixed_class_embeds())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.inference_mode(False))
            yield

    @property
    def _group(self) -> int:
        """How many images depend on one another: batches are divided between such groups alone."""
        return 1

    def _images_at_once(self, classifier: CLIPForZeroShotClassification, count: int) -> int:
        """How many images are defended together."""
        if self.memory_budget is None:
            return max(count, 1)
        fit = int(self.memory_budget * 2**30 / self._bytes_per_image(classifier))
        return self._group * max(1, fit // self._group)

    def _bytes_per_image(self, classifier: CLIPForZeroShotClassification) -> float:
        """What the activations of one image take, roughly; for `memory_budget`."""
        return activation_bytes(classifier, graph=True)


def _train_again(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = True


def prompts_of(classifier: CLIPForZeroShotClassification) -> dict[str, nn.Parameter]:
    """The active adapter's prompts, and the maps that make prompts of others, by parameter name."""
    found: dict[str, nn.Parameter] = {}
    for name, module in classifier.named_modules():
        if not hasattr(module, "put_prompts") or module.prompts() is None:
            continue
        active = module.active_adapters[0]
        for own_name, parameter in module.named_parameters(prefix=name):
            if ".clip_prompt_" in own_name and active in own_name.removeprefix(name).split("."):
                found[own_name] = parameter
    return found


class _Inside(nn.Module):
    """Runs any function of a classifier as a module's forward, which is what `functional_call` takes."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def with_prompts(
    classifier: CLIPForZeroShotClassification, prompts: Mapping[str, Tensor], function: Callable[[], T]
) -> T:
    """`function()` while these tensors stand in the place of the classifier's parameters of the same names."""
    if not prompts:
        return function()
    inside = {f"classifier.{name}": value for name, value in prompts.items()}
    return functional_call(_Inside(classifier), inside, (function,))


def differentiable_twice() -> Any:
    """Attention whose gradient has a gradient: fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH)


def activation_bytes(classifier: CLIPForZeroShotClassification, graph: bool) -> float:
    """Roughly what one picture's forward through the image encoder keeps: its peak, or with a graph all layers."""
    vision = classifier.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 8
    values = tokens * (8 * vision.hidden_size + 2 * vision.intermediate_size)
    return values * (vision.num_hidden_layers if graph else 2) * torch.finfo(classifier.dtype).bits / 8


def _in_parts(run: Callable[[slice], T], count: int, size: int, group: int = 1) -> list[T]:
    """`run` on slices of at most `size` of `count` images; halved, down to one, where a GPU runs out of memory.

    Raises RuntimeError with the mend if one image alone doesn't fit.
    """
    found: list[T] = []
    start = 0
    while start < count:
        rows = slice(start, min(start + size, count))
        try:
            found.append(run(rows))
        except torch.OutOfMemoryError as error:
            if size <= group:
                raise RuntimeError(
                    "one image with its views doesn't fit into the memory; set memory_budget (GiB), fewer num_views, "
                    "or load the model in bfloat16."
                ) from error
            size = group * max(1, min(size, rows.stop - rows.start) // (2 * group))
            logger.info("out of memory: going on with %d images at a time", size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start = rows.stop
    return found


def _joined(parts: Sequence[Prediction]) -> Prediction:
    if len(parts) == 1:
        return parts[0]

    def joined(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], dict):
            return {name: torch.cat([value[name] for value in values]) for name in values[0]}
        return torch.cat(values)

    whole = {
        f.name: joined([getattr(part, f.name) for part in parts]) for f in fields(Prediction) if f.name != "state"
    }
    return Prediction(**whole, state=parts[-1].state)


def _detached(found: Prediction) -> Prediction:
    """The same without graphs; a stream state as the defence made it."""

    def detached(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tensor.detach() for name, tensor in value.items()}
        return None if value is None else value.detach()

    return Prediction(
        **{f.name: detached(getattr(found, f.name)) for f in fields(found) if f.name != "state"}, state=found.state
    )


def _plain(value: Any) -> Any:
    """A setting as JSON types."""
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
