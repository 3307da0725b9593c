"""What a test-time defence is: images in, logits out, the classifier left as it was found.

Shapes: B images, V views of each, K of them kept, C classes, D embedding width, n prompts of width d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..modeling import ZeroShotClassifier, without_gradients
from ..paper import Paper, Unpublished
from ..prediction import Prediction
from ..processes import Processes
from ..prompts.access import prompts_of
from .memory import activation_bytes, in_parts

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..zero_shot_data.dataset import ImageDataset

GradientPath = Literal["none", "through", "identity"]


@dataclass(frozen=True)
class Traits:
    """What an attack and an evaluation must know of a defence.

    Args:
        randomised: it draws random numbers (views, noise). Each draw follows from `seed` and the image's own grey
            levels, so that `predict` is a function; to an attack, which changes the image, the draws are random.
        optimising: it takes gradients while it predicts.
        episodic: no image leaves a trace for the next; order and batches don't matter. A defence that isn't has a
            stream state (`Defence.start`), and is evaluated in order, on one process.
        couples_images: what becomes of an image depends on the others of its batch. Batches are never divided then,
            are evaluated in order on one process, and attacked as wholes.
    """

    randomised: bool = False
    optimising: bool = False
    episodic: bool = True
    couples_images: bool = False


class Fitted(ABC):
    """Something that a defence learned by `fit` and that is saved beside its settings, in a file of its own.

    Numbers need none of it: plain fields (a threshold) are settings like others.
    """

    file: ClassVar[str]  # its name in a saved folder, `<what it is called>.safetensors`

    @property
    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What it was made from and with, in JSON types, for reports and cards."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write `file` into a folder."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises OSError, or ValueError, for a file that can't be read."""

    @abstractmethod
    def check(self, classifier: ZeroShotClassifier) -> None:
        """Raise ValueError unless it belongs to this classifier."""


class StreamState(ABC):
    """A stream state that can be written down, so that an evaluation that was stopped goes on from it: a frozen
    dataclass that a defence gives from `start` and in its predictions. A state of another kind begins anew there.
    """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that images change in it, by name."""

    @abstractmethod
    def restored(self, tensors: Mapping[str, Tensor]) -> Self:
        """This state, as `start` gives it, with what another one's `tensors` gave."""


@dataclass(frozen=True, kw_only=True)
class Defence(ABC):
    """A test-time defence: a frozen dataclass of its hyperparameters with functions of a classifier and images.

    A new method is one file with one subclass that has `_predict`, `traits` unless it has none, and a `paper` if there
    is one. The classifier is an argument: `ZeroShotClassifier` with its classes set, and with the prompts
    in it that the method tunes (`needs_prompts`); methods that tune the words of a plain CLIP put them in for the time
    being. Parameters, mode and class embeddings come back as they were. A method whose gradients vanish along a path
    says so by `masked`, with the reason, which reports repeat; one without a graph can't be attacked along it.

    Args:
        memory_budget: GiB that activations may take; None takes the batch whole. A batch that doesn't fit (by
            estimate, or when a GPU runs out of memory) is divided: the results are the same. One whose images are
            coupled never is.

    Raises ValueError for a budget that isn't positive.
    """

    __test__: ClassVar[bool] = False  # pytest: no test, for all its name
    defends: ClassVar[bool] = True  # whether there is something to attack and to control beyond the classifier
    paper: ClassVar[Paper] = Unpublished()  # type: ignore[assignment]
    needs_prompts: ClassVar[bool] = False
    masked: ClassVar[Mapping[GradientPath, str]] = {}  # paths along which its gradients vanish, each with the reason

    memory_budget: float | None = None

    def __post_init__(self) -> None:
        if self.memory_budget is not None and not self.memory_budget > 0:
            raise ValueError(f"memory_budget={self.memory_budget!r} must be a positive number of GiB, or None.")

    @property
    def traits(self) -> Traits:
        """What an attack must know; nothing of a defence that draws nothing, tunes nothing and keeps no state."""
        return Traits()

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.paper.method

    def parameters(self) -> dict[str, Any]:
        """All settings as JSON types, for reports and saved folders; of what was fitted its record."""
        settings = {
            field.name: _plain(getattr(self, field.name))
            for field in fields(self)
            if field.repr and field.name not in self.learns()
        }
        for name, kind in self.learns().items():
            part = getattr(self, name)
            settings[Path(kind.file).stem] = None if part is None else part.record
        return settings

    @classmethod
    def learns(cls) -> dict[str, type[Fitted]]:
        """The fields that `fit` fills, and with what: those with `field(default=None, metadata={"fitted": Kind})`."""
        return {field.name: field.metadata["fitted"] for field in fields(cls) if "fitted" in field.metadata}

    @property
    def fitted(self) -> dict[str, Fitted]:
        """What was fitted, by field."""
        return {name: part for name in self.learns() if (part := getattr(self, name)) is not None}

    @property
    def needs(self) -> frozenset[str]:
        """What `fit` must be given beside classifier and images: `"clean_classifier"` or nothing."""
        return frozenset()

    def idle_settings(self) -> dict[str, str]:
        """Settings that do nothing beside the others, by name, with why."""
        return {}

    def remarks(self, classifier: ZeroShotClassifier, images_BCHW: Tensor) -> tuple[str, ...]:
        """What a report must say of it in front of this classifier beside its settings, a sentence without its full
        stop each: what makes it useless, say. Asked once, with the classifier prepared.

        Args:
            images_BCHW: a few of those that it is judged on.
        """
        return ()

    @abstractmethod
    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        """`predict` on images that fit into memory, with the classifier prepared; gradients are on. `state` is None
        for episodic defences, else that before the first of these images.
        """

    def fit(
        self,
        classifier: ZeroShotClassifier,
        dataset: ImageDataset,
        *,
        clean_classifier: ZeroShotClassifier | None = None,
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
            clean_classifier: the same model with what was trained in it trained on clean images; see `needs`.
            batch_size: images per forward.
            processes: divides the images; each process gets the same defence.
            state_dir: a folder for what is done already, where fitting takes long.
        """
        return self

    def start(self, classifier: ZeroShotClassifier) -> Any:
        """The stream state before the first image; None for episodic defences."""
        return None

    def predict(
        self,
        classifier: ZeroShotClassifier,
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

        Raises ValueError for images of wrong shape or (outside of `prepared`) outside [0, 1], a classifier without
        classes or without the prompts that the method tunes, and a memory_budget below what a batch of coupled images
        takes; TypeError or ValueError for a method whose prediction
        isn't what `Prediction` says.
        """
        if not isinstance(classifier, ZeroShotClassifier):
            raise TypeError(
                f"classifier is a {type(classifier).__name__}; give one of AutoModelForZeroShotClassification."
            )
        check_choice(GradientPath, path=path)
        self.check(classifier)
        if not isinstance(images_BCHW, Tensor):
            raise TypeError(f"images_BCHW is a {type(images_BCHW).__name__}; mixed sizes go through to_pixels.")
        classifier.check_pixels(images_BCHW)
        if len(images_BCHW) == 0:
            raise ValueError("images_BCHW is empty; give at least one image.")
        with self.prepared(classifier):
            images_BCHW = images_BCHW.clone() if images_BCHW.is_inference() else images_BCHW
            if not self.traits.episodic and state is None:
                state = self.start(classifier)
                if state is None:
                    raise TypeError(f"{type(self).__name__} isn't episodic, and its start() gives no state.")
            size = self._images_at_once(classifier, len(images_BCHW))

            def part(rows: slice) -> Prediction:
                nonlocal state
                found = self._predict(classifier, images_BCHW[rows], state, seed, path)
                self._check_prediction(found, len(images_BCHW[rows]), len(classifier.class_names))
                state = found.state
                return _detached(found) if path == "none" else found

            if not self.traits.couples_images:
                return joined(in_parts(part, len(images_BCHW), size))
            if size < len(images_BCHW):
                given = f"memory_budget={self.memory_budget!r} holds {size} of {len(images_BCHW)} images"
                raise ValueError(f"{given}, which {self.name} must see together; raise it, or take smaller batches.")
            return part(slice(None))

    def check(self, classifier: ZeroShotClassifier) -> None:
        """Raise ValueError unless the classifier has what the method needs."""
        if not classifier.class_names:
            raise ValueError("the classifier has no classes; call set_classes(class_names) first.")
        if len(classifier.class_names) == 1:
            raise ValueError(f"there is one class, {classifier.class_names[0]!r}, always right; set_classes more.")
        if self.needs_prompts and not prompts_of(classifier):
            raise ValueError(f"{self.name} tunes prompts and the classifier has none; train some, or load an adapter.")

    def _check_prediction(self, found: Any, count: int, num_classes: int) -> None:
        """Raise TypeError/ValueError unless a method gave what `Prediction` says."""
        name = f"{type(self).__name__}._predict"
        if not isinstance(found, Prediction):
            raise TypeError(f"{name} gives a {type(found).__name__}; give a Prediction.")
        shapes: dict[str, tuple[int, ...]] = {"logits": (count, num_classes), "class_scores": (count, num_classes)}
        shapes |= dict.fromkeys(("score", "flagged", "fell_back"), (count,))
        for key, shape in shapes.items():
            value = getattr(found, key)
            if key != "logits" and value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != shape:
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} gives {key} {given}; give a tensor {shape}.")
            if key in ("flagged", "fell_back") and value.dtype != torch.bool:
                raise TypeError(f"{name} gives {key} of {value.dtype}; give truth values (torch.bool).")
        if not self.traits.episodic and found.state is None:
            raise ValueError(f"{name} gives no state, and the method isn't episodic; give Prediction(state=...).")

    @contextmanager
    def prepared(self, classifier: ZeroShotClassifier) -> Iterator[None]:
        """The classifier in eval mode, its parameters frozen, with gradients on, ready to be defended.

        Enter it around many calls, of images that were checked, to spare each of them the preparation; it may be
        entered again inside.
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

    def _images_at_once(self, classifier: ZeroShotClassifier, count: int) -> int:
        """How many images are defended together."""
        if self.memory_budget is None:
            return max(count, 1)
        return max(1, int(self.memory_budget * 2**30 / self._bytes_per_image(classifier)))

    def _bytes_per_image(self, classifier: ZeroShotClassifier) -> float:
        """What the activations of one image take, roughly; for `memory_budget`."""
        return activation_bytes(classifier, graph=True)


def _train_again(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = True


def joined(parts: Sequence[Prediction]) -> Prediction:
    """The predictions of the parts of a batch as one, with the state of the last."""
    if len(parts) == 1:
        return parts[0]

    def whole_of(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], dict):
            return {name: torch.cat([value[name] for value in values]) for name in values[0]}
        return torch.cat(values)

    whole = {
        f.name: whole_of([getattr(part, f.name) for part in parts]) for f in fields(Prediction) if f.name != "state"
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
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
