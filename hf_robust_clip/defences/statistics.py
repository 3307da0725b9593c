"""Statistics of what the layers of an image encoder read, with which views of a test image are aligned.

Shapes: N images, L layers, T tokens of an image (class token, patches, prompts), D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..digests import digest
from ..environment import library_versions
from ..modeling import CLIPForZeroShotClassification, resolution_of
from ..processes import Processes, together
from ..shared_prefix import plain_layer
from ..storage import check_writable, whole_file
from ..zero_shot_data.fingerprint import dataset_digest
from ..zero_shot_data.loading import ImageDataset, collate_images
from .base import prompts_of

FILE = "statistics.safetensors"
BATCHES_PER_STATE = 50  # after how many batches a resumable collection writes down what it has


@contextmanager
def layer_inputs(classifier: CLIPForZeroShotClassification) -> Iterator[list[Tensor]]:
    """A list that every forward of the image encoder fills anew: what its layers read, L tensors (N, T, D).

    They are the hidden states with the layer's prompts in their place, before its layer norm, with their graph; the
    first comes out of `pre_layrnorm`.
    """
    found: list[Tensor] = []
    layers = [plain_layer(layer) for layer in classifier.vision_model.encoder.layers]

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if layer is layers[0]:
            found.clear()
        found.append(args[0])

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class VisionStatistics:
    """Moments over images of what each layer of an image encoder reads: see `layer_inputs`.

    Args:
        mean: (L, T, D).
        variance: (L, T, D), with divisor `count`.
        count: number of images.
        record: what they were made from and with, in JSON types; see `collect_statistics`.

    Raises ValueError for shapes that differ or aren't (L, T, D), no images, and values that aren't finite.
    """

    mean: Tensor
    variance: Tensor
    count: int
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mean.dim() != 3 or self.mean.shape != self.variance.shape:
            raise ValueError(
                f"mean {tuple(self.mean.shape)} and variance {tuple(self.variance.shape)} must both have the shape "
                "(layers, tokens, width)."
            )
        if self.count < 1:
            raise ValueError(f"count={self.count!r}: statistics need at least one image.")
        if not (self.mean.isfinite().all() and self.variance.isfinite().all()):
            raise ValueError("mean or variance has values that aren't finite; check the weights that they come from.")


class RunningMoments:
    """Mean and sum of squared deviations in float64, of all images seen so far.

    Groups of n_a and n_b images merge as mean = m_a + d n_b / n, squares = s_a + s_b + d^2 n_a n_b / n, with
    d = m_b - m_a and n = n_a + n_b (Chan, Golub and LeVeque 1979): no difference of large numbers is taken.

    Args:
        count: images so far.
        mean, squares: (L, T, D) float64; without meaning while there are no images.
    """

    def __init__(self, count: int = 0, mean: Tensor | None = None, squares: Tensor | None = None):
        self.count = count
        self.mean = torch.zeros(0, dtype=torch.float64) if mean is None else mean
        self.squares = torch.zeros(0, dtype=torch.float64) if squares is None else squares

    def update(self, inputs: Sequence[Tensor]) -> None:
        """Add a batch: L tensors (N, T, D). Raises ValueError for another shape than that of the images before."""
        moments = []
        for hidden_NTD in inputs:
            hidden_NTD = hidden_NTD.detach().double()
            mean_TD = hidden_NTD.mean(dim=0)
            moments.append((mean_TD, (hidden_NTD - mean_TD).square().sum(dim=0)))
        mean, squares = (torch.stack(parts) for parts in zip(*moments, strict=True))
        self.merge(RunningMoments(len(inputs[0]), mean, squares))

    def merge(self, other: RunningMoments) -> None:
        """Add the images of another. Raises ValueError for another shape than one's own."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.squares = other.count, other.mean, other.squares
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"statistics of (layers, tokens, width) {tuple(self.mean.shape)} and {tuple(other.mean.shape)} don't "
                "merge; take images of one size and one set of prompts."
            )
        count = self.count + other.count
        apart = other.mean - self.mean
        self.mean = self.mean + apart * (other.count / count)
        self.squares = self.squares + other.squares + apart.square() * (self.count * other.count / count)
        self.count = count

    def statistics(self, record: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> VisionStatistics:
        """What was found. Raises ValueError if there were no images."""
        variance = self.squares / max(self.count, 1)
        return VisionStatistics(self.mean.to(dtype), variance.to(dtype), self.count, dict(record))


@dataclass(frozen=True, eq=False)
class AlignmentTargets:
    """The statistics that a defence aligns views with.

    Args:
        adversarial: of training images under the classifier's own prompts.
        clean: of the same under clean-trained prompts in the same model; None for methods that don't use them.
    """

    adversarial: VisionStatistics
    clean: VisionStatistics | None = None

    def check(self, classifier: CLIPForZeroShotClassification) -> None:
        """Raise ValueError unless these statistics belong to the classifier: its layers, tokens and width, its image
        encoder, and (`adversarial`) the prompts that are active in this.
        """
        self.check_shapes(classifier)
        model, prompts = fingerprints(classifier)
        for name, statistics in self._parts().items():
            if statistics.record.get("model_fingerprint") != model:
                raise ValueError(
                    f"the {name} statistics were made with another image encoder "
                    f"({statistics.record.get('model', 'of unknown name')}); collect them anew with this one, or load "
                    "the model that they belong to."
                )
        if self.adversarial.record.get("prompts_fingerprint") != prompts:
            raise ValueError(
                f"the adversarial statistics were made with other prompts in the image encoder "
                f"({self.adversarial.record.get('prompts', 'unknown')}) than the active ones "
                f"({_describe_prompts(classifier)}); collect them anew after training, or choose their adapter."
            )

    def check_shapes(self, classifier: CLIPForZeroShotClassification) -> None:
        """Raise ValueError unless layers, tokens and width are those of the classifier's image encoder."""
        vision = classifier.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + 1 + _num_vision_prompts(classifier)
        expected = vision.num_hidden_layers, tokens, vision.hidden_size
        for name, statistics in self._parts().items():
            given = tuple(statistics.mean.shape)
            if given != expected:
                raise ValueError(
                    f"the {name} statistics are of (layers, tokens, width) {given}, but this classifier's image "
                    f"encoder has {expected}; collect them anew with its model and prompts."
                )

    def _parts(self) -> dict[str, VisionStatistics]:
        return {"adversarial": self.adversarial, **({} if self.clean is None else {"clean": self.clean})}

    def save(self, path: str | Path) -> None:
        """Write `statistics.safetensors` into a folder, or a file of the given name `*.safetensors`, whole or not at
        all: the tensors in their own precision, counts and records in its metadata.
        """
        tensors: dict[str, Tensor] = {}
        metadata = {"format": "pt"}
        for name, statistics in self._parts().items():
            tensors |= {f"{name}.mean": statistics.mean, f"{name}.variance": statistics.variance}
            metadata[name] = json.dumps({"count": statistics.count, "record": statistics.record})
        _write(_file(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> AlignmentTargets:
        """Read what `save` wrote, from the folder or the file.

        Raises OSError if the file is missing or damaged, ValueError if it holds something else.
        """
        path = _file(path)
        tensors, metadata = _read(path)
        found: dict[str, VisionStatistics] = {}
        try:
            for name in ("adversarial", *(["clean"] if "clean" in metadata else [])):
                about = json.loads(metadata[name])
                moments = tensors[f"{name}.mean"], tensors[f"{name}.variance"]
                found[name] = VisionStatistics(*moments, int(about["count"]), dict(about["record"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{str(path)!r} holds no statistics of AlignmentTargets.save ({error!r}).") from error
        return cls(**found)


def collect_statistics(
    classifier: CLIPForZeroShotClassification,
    dataset: ImageDataset | Dataset,
    *,
    batch_size: int,
    processes: Processes = None,
    state_dir: str | Path | None = None,
    num_workers: int = 0,
    progress: bool = False,
    data_id: str | None = None,
) -> VisionStatistics:
    """Statistics over clean images, in one pass, with the classifier as it is (its active prompts in it).

    The result has the model's precision, at least float32; sums are taken in float64. The classifier is left as it
    was found. The record names the model, the prompts, the images and the versions, with fingerprints by which
    `AlignmentTargets.check` knows them again.

    Args:
        dataset: prepared images; those with an `attack_resolution` are enlarged inside the model.
        processes: divides the images among processes; all get the same statistics.
        state_dir: a folder for what is done already. A run that was killed goes on there (with as many processes), and
            with the same batch size ends with the very same numbers.
        progress: show a bar on the main process.
        data_id: what the record calls the images; default the dataset's own id.

    Raises ValueError for no images, whole pictures (`augment`), images of wrong size or outside [0, 1], and the state
    of another collection.
    """
    count = len(dataset)  # type: ignore[arg-type]  # torch's Dataset doesn't say that it has a length
    if count == 0:
        raise ValueError("dataset is empty; there is nothing to collect statistics of.")
    if getattr(dataset, "augment", False):
        raise ValueError("dataset.augment=True gives whole pictures; collect from replace(data, augment=False).")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be at least 1.")
    if state_dir is not None:
        check_writable(state_dir, "state_dir")
    before = classifier.training, classifier.input_size
    try:
        classifier.eval().set_input_size(resolution_of(dataset, before[1]))
        record = _record(classifier, dataset, data_id)
        rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
        state = None if state_dir is None else _State(Path(state_dir), rank, _state_key(classifier, dataset, world))
        moments, start = RunningMoments(), 0
        if state is not None:
            moments, start = together(lambda: state.read(classifier.device), processes)  # before any writes
        own = range(rank, count, world)[start:]
        loader = DataLoader(
            Subset(dataset, own),
            batch_size,
            collate_fn=collate_images,
            num_workers=num_workers,
            generator=torch.Generator(),  # its own, so that the global one stays as it is
        )
        with torch.no_grad(), layer_inputs(classifier) as inputs:
            bar = tqdm(loader, desc="statistics", disable=not progress or rank > 0, leave=False)
            for number, batch in enumerate(bar, start=1):
                pixels = batch["pixel_values"].to(classifier.device)
                classifier.check_pixels(pixels, values=False)
                classifier.encode_images(pixels)
                moments.update(inputs)
                start += len(pixels)
                if state is not None and (number % BATCHES_PER_STATE == 0 or number == len(loader)):
                    state.write(moments, start)
        if world > 1:
            moments = _merged_over_processes(moments, classifier.device)
    finally:
        classifier.train(before[0]).set_input_size(before[1])
    return moments.statistics(record, torch.promote_types(classifier.dtype, torch.float32))


def fingerprints(classifier: CLIPForZeroShotClassification) -> tuple[str, str]:
    """Two short hashes: of the image encoder without its prompts, and of the active prompts that it reads.

    The first is of the shapes of all its parameters, the first 16 values of each, and mean and std of the
    normalisation; the second of all values that its prompts are made from (for coupled ones those of the text tower
    too), `"none"` without any. Values count to the precision of bfloat16: casting a float32 model to it changes
    neither hash.
    """
    named = (*classifier.vision_model.named_parameters(), *classifier.visual_projection.named_parameters())
    weights: list[Tensor] = [parameter for name, parameter in named if "clip_prompt_" not in name]
    weights += [classifier.image_mean, classifier.image_std]
    prompts = _vision_prompts(classifier)
    return _hash(weights, 16), _hash(prompts)


def _hash(tensors: Sequence[Tensor], first: int | None = None) -> str:
    """Of the shapes and the (first) values of tensors, 16 hexadecimal digits."""
    if not tensors:
        return "none"
    values = torch.cat([tensor.detach().flatten()[:first].float().bfloat16() for tensor in tensors])
    shapes = str([tuple(tensor.shape) for tensor in tensors]).encode()
    return sha256(shapes + values.cpu().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def _prompt_layers(module: nn.Module) -> list[Any]:
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "put_prompts")]
    return [layer for layer in layers if layer.prompts() is not None]


def _vision_prompts(classifier: CLIPForZeroShotClassification) -> list[Tensor]:
    """The active parameters that prompts in the image encoder are made from."""
    own = [p for name, p in prompts_of(classifier).items() if name.startswith("vision_model.")]
    coupled = [p for layer in _prompt_layers(classifier.vision_model) for p in layer.coupled_parameters()]
    return [*own, *coupled]


def _num_vision_prompts(classifier: CLIPForZeroShotClassification) -> int:
    layers = [layer for layer in _prompt_layers(classifier.vision_model) if layer.place.tower == "vision"]
    return max((layer.prompts().shape[-2] for layer in layers), default=0)


def _describe_prompts(classifier: CLIPForZeroShotClassification) -> str:
    layers = _prompt_layers(classifier)
    return classifier.peft_config[layers[0].active_adapters[0]].summary() if layers else "none"


def _record(classifier: CLIPForZeroShotClassification, dataset: Any, data_id: str | None) -> dict[str, Any]:
    """Where statistics come from, in JSON types; of folders only the last part of their path."""
    model, prompts = fingerprints(classifier)
    name = classifier.name_or_path
    return {
        "model": (Path(name).name if Path(name).is_dir() else name) or "unknown",
        "model_revision": getattr(classifier.config, "_commit_hash", None) or "local",
        "model_fingerprint": model,
        "prompts": _describe_prompts(classifier),
        "prompts_fingerprint": prompts,
        "dataset": data_id or getattr(dataset, "dataset_id", "unknown"),
        "dataset_revision": getattr(dataset, "revision", "unknown"),
        "split": getattr(dataset, "split", "unknown"),
        "num_images": len(dataset),
        "image_size": classifier.input_size,
        "precision": str(classifier.dtype).removeprefix("torch."),
        "library_versions": library_versions(),
    }


def _merged_over_processes(moments: RunningMoments, device: torch.device) -> RunningMoments:
    """Those of all processes, merged in the order of their ranks: the same on each."""
    from accelerate.utils import gather_object

    merged = RunningMoments()
    for count, mean, squares in gather_object([(moments.count, moments.mean.cpu(), moments.squares.cpu())]):
        merged.merge(RunningMoments(count, mean.to(device), squares.to(device)))
    return merged


def _state_key(classifier: CLIPForZeroShotClassification, dataset: Any, world: int) -> dict[str, Any]:
    """What must be the same for a state to be of use."""
    model, prompts = fingerprints(classifier)
    return {
        "model": model,
        "prompts": prompts,
        "precision": str(classifier.dtype),
        "dataset": f"{len(dataset)} images of {getattr(dataset, 'dataset_id', 'unknown')}, {dataset_digest(dataset)}",
        "number of processes": world,
    }


class _State:
    """What a process of a collection has done so far, in a file of its own."""

    def __init__(self, folder: Path, rank: int, key: dict[str, Any]):
        self.folder, self.key = folder, key
        self.path = folder / f"state-{rank}.safetensors"

    def read(self, device: torch.device) -> tuple[RunningMoments, int]:
        """The moments, and how many of the process's images are in them. Raises ValueError for a damaged file, and for
        another's state.
        """
        found = RunningMoments(), 0
        for path in sorted(self.folder.glob("state-*.safetensors")):  # all: so every process refuses, or none
            try:
                tensors, metadata = _read(path)
                text = metadata["state"]
                if metadata["digest"] != _digest(text, tensors):
                    raise ValueError("the digest is another")
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(
                    f"{path} is damaged or of another format; delete it, and its images are looked at again."
                ) from error
            about = json.loads(text)
            other = [name for name in self.key if about["key"].get(name) != self.key[name]]
            if other:
                raise ValueError(
                    f"{path} is the state of another collection: its {other[0]} is {about['key'].get(other[0])!r}, "
                    f"now it is {self.key[other[0]]!r}. Delete the folder, or choose another."
                )
            if path == self.path:
                mean, squares = (tensors[name].to(device) for name in ("mean", "squares"))
                found = RunningMoments(about["count"], mean, squares), about["position"]
        return found

    def write(self, moments: RunningMoments, position: int) -> None:
        text = json.dumps({"key": self.key, "count": moments.count, "position": position})
        tensors = {"mean": moments.mean, "squares": moments.squares}
        _write(self.path, tensors, {"format": "pt", "state": text, "digest": _digest(text, tensors)})


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of a text and all bytes of some tensors."""
    parts = [tensors[name].detach().cpu().contiguous().numpy().tobytes() for name in sorted(tensors)]
    return digest(b"".join([text.encode(), *parts]))


def _file(path: str | Path) -> Path:
    """The file itself, or that of the usual name in a folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / FILE


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    with whole_file(path) as draft:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft, metadata)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises OSError if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no {str(path)!r}; make it with collect_statistics and AlignmentTargets.save, or TAPTTrainer."
        ) from error
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} is cut short or damaged ({error}); copy or collect it again.") from error
