"""Statistics over many images, collected once: over several processes, and over a run that was killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..checks import check_whole
from ..digests import digest
from ..environment import library_versions
from ..modeling import ZeroShotClassifier, resolution_of
from ..processes import Processes, check_agreed, together
from ..prompts.access import coupled_parameters, prompts_of, summary
from ..storage import check_writable, whole_file
from ..zero_shot_data.fingerprint import dataset_digest
from ..zero_shot_data.loading import ImageDataset, collate_images
from .moments import RunningMoments, VisionStatistics, layer_inputs

if TYPE_CHECKING:
    from typing_extensions import Self

BATCHES_PER_STATE = 50  # after how many batches a resumable collection writes down what it has


class Running(Protocol):
    """Sums over the images seen so far: made of `(count, *tensors)`, and of nothing before the first image."""

    count: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All but the count, by name, in the order in which they are given to make it."""

    def merge(self, other: Self) -> None:
        """Add the images of another."""


R = TypeVar("R", bound=Running)


def collect_statistics(
    classifier: ZeroShotClassifier,
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
    `alignment.AlignmentTargets.check` knows them again.

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
    with layer_inputs(classifier) as inputs:

        def see(moments: RunningMoments, pixels_BCHW: Tensor) -> None:
            classifier.encode_images(pixels_BCHW)
            moments.update(inputs)

        moments, record = over_images(
            classifier,
            dataset,
            RunningMoments,
            see,
            batch_size=batch_size,
            processes=processes,
            state_dir=state_dir,
            num_workers=num_workers,
            progress=progress,
            data_id=data_id,
        )
    return moments.statistics(record, torch.promote_types(classifier.dtype, torch.float32))


def over_images(
    classifier: ZeroShotClassifier,
    dataset: ImageDataset | Dataset,
    make: Callable[..., R],
    see: Callable[[R, Tensor], None],
    *,
    batch_size: int,
    processes: Processes = None,
    state_dir: str | Path | None = None,
    num_workers: int = 0,
    progress: bool = False,
    data_id: str | None = None,
) -> tuple[R, dict[str, Any]]:
    """Sums over all images in one pass, with the classifier in eval mode and without gradients; and where they come
    from. What the sums are is the caller's; processes, state and errors are those of `collect_statistics`.

    Args:
        make: the class of the sums.
        see: adds a batch (B, C, H, W) to them.
    """
    count = len(dataset)  # type: ignore[arg-type]  # torch's Dataset doesn't say that it has a length
    if count == 0:
        raise ValueError("dataset is empty; there is nothing to collect statistics of.")
    if getattr(dataset, "augment", False):
        raise ValueError("dataset.augment=True gives whole pictures; collect from replace(data, augment=False).")
    check_whole(1, batch_size=batch_size)
    if state_dir is not None:
        check_writable(state_dir, "state_dir")
    before = classifier.training, classifier.input_size
    try:
        classifier.eval().set_input_size(resolution_of(dataset, before[1]))
        record = fitting_record(classifier, dataset, data_id)
        rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
        found, start, state = make(), 0, None
        if state_dir is not None or world > 1:
            key = {"statistics": type(found).__name__, **_state_key(classifier, dataset, world)}
            check_agreed(key, processes)
        if state_dir is not None:
            state = _State(Path(state_dir), rank, key)
            found, start = together(lambda: state.read(make, classifier.device), processes)  # before any writes
        own = range(rank, count, world)[start:]
        loader = DataLoader(
            Subset(dataset, own),
            batch_size,
            collate_fn=collate_images,
            num_workers=num_workers,
            generator=torch.Generator(),  # its own, so that the global one stays as it is
        )
        with torch.no_grad():
            bar = tqdm(loader, desc="statistics", disable=not progress or rank > 0, leave=False)
            for number, batch in enumerate(bar, start=1):
                pixels = batch["pixel_values"].to(classifier.device)
                classifier.check_pixels(pixels, values=False)
                see(found, pixels)
                start += len(pixels)
                if state is not None and (number % BATCHES_PER_STATE == 0 or number == len(loader)):
                    state.write(found, start)
        if world > 1:
            found = _merged_over_processes(found, make, classifier.device)
    finally:
        classifier.train(before[0]).set_input_size(before[1])
    return found, record


def fingerprints(classifier: ZeroShotClassifier) -> tuple[str, str]:
    """Two short hashes: of the image encoder without its prompts, and of the active prompts that it reads.

    The first is of the shapes of all its parameters, the first 16 values of each, and mean and std of the
    normalisation; the second of all values that its prompts are made from (for coupled ones those of the text tower
    too), `"none"` without any. Values count to the precision of bfloat16: casting a float32 model to it changes
    neither hash.
    """
    named = [named for module in classifier.image_modules for named in module.named_parameters()]
    weights: list[Tensor] = [parameter for name, parameter in named if "clip_prompt_" not in name]
    weights += [classifier.image_mean, classifier.image_std]
    prompts = vision_prompts(classifier)
    return _hash(weights, 16), _hash(prompts)


def _hash(tensors: Sequence[Tensor], first: int | None = None) -> str:
    """Of the shapes and the (first) values of tensors, 16 hexadecimal digits."""
    if not tensors:
        return "none"
    values = torch.cat([tensor.detach().flatten()[:first].float().bfloat16() for tensor in tensors])
    shapes = str([tuple(tensor.shape) for tensor in tensors]).encode()
    return sha256(shapes + values.cpu().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def vision_prompts(classifier: ZeroShotClassifier) -> list[Tensor]:
    """The active parameters that prompts in the image encoder are made from."""
    inside = {id(parameter) for parameter in classifier.vision_parameters()}
    own: list[Tensor] = [p for p in prompts_of(classifier).values() if id(p) in inside]
    return [*own, *coupled_parameters(classifier.image_modules[0])]


def fitting_record(classifier: ZeroShotClassifier, dataset: Any, data_id: str | None = None) -> dict[str, Any]:
    """What something was fitted on, in JSON types; of folders only the last part of their path."""
    model, prompts = fingerprints(classifier)
    name = classifier.name_or_path
    return {
        "model": (Path(name).name if Path(name).is_dir() else name) or "unknown",
        "model_revision": getattr(classifier.config, "_commit_hash", None) or "local",
        "model_fingerprint": model,
        "prompts": summary(classifier),
        "prompts_fingerprint": prompts,
        "dataset": data_id or getattr(dataset, "dataset_id", "unknown"),
        "dataset_revision": getattr(dataset, "revision", "unknown"),
        "split": getattr(dataset, "split", "unknown"),
        "num_images": len(dataset),
        "image_size": classifier.input_size,
        "precision": str(classifier.dtype).removeprefix("torch."),
        "library_versions": library_versions(),
    }


def _merged_over_processes(found: R, make: Callable[..., R], device: torch.device) -> R:
    """Those of all processes, merged in the order of their ranks: the same on each."""
    from accelerate.utils import gather_object

    merged = make()
    for count, *tensors in gather_object([(found.count, *(tensor.cpu() for tensor in found.tensors.values()))]):
        merged.merge(make(count, *(tensor.to(device) for tensor in tensors)))
    return merged


def _state_key(classifier: ZeroShotClassifier, dataset: Any, world: int) -> dict[str, Any]:
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

    def read(self, make: Callable[..., R], device: torch.device) -> tuple[R, int]:
        """The sums, and how many of the process's images are in them. Raises ValueError for a damaged file, and for
        another's state.
        """
        found = make(), 0
        for path in sorted(self.folder.glob("state-*.safetensors")):  # all: so every process refuses, or none
            try:
                tensors, metadata = read_tensors(path)
                text = metadata["state"]
                if metadata["digest"] != _digest(text, tensors):
                    raise ValueError("the digest is another")
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"{path} is damaged or of another format; delete it to begin anew.") from error
            about = json.loads(text)
            other = [name for name in self.key if about["key"].get(name) != self.key[name]]
            if other:
                raise ValueError(
                    f"{path} is the state of another collection: its {other[0]} is {about['key'].get(other[0])!r}, "
                    f"now it is {self.key[other[0]]!r}. Delete the folder, or choose another."
                )
            if path == self.path:
                own = (tensors[name].to(device) for name in make().tensors)
                found = make(about["count"], *own), about["position"]
        return found

    def write(self, found: Running, position: int) -> None:
        text = json.dumps({"key": self.key, "count": found.count, "position": position})
        write_tensors(
            self.path, found.tensors, {"format": "pt", "state": text, "digest": _digest(text, found.tensors)}
        )


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of a text and all bytes of some tensors."""
    parts = [tensors[name].detach().cpu().contiguous().numpy().tobytes() for name in sorted(tensors)]
    return digest(b"".join([text.encode(), *parts]))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    with whole_file(path) as draft:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft, metadata)


def read_tensors(path: Path, mend: str = "collect it again") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises OSError if it is missing (with what makes one) or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {str(path)!r}; {mend}.") from error
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} is cut short or damaged ({error}); copy or collect it again.") from error
