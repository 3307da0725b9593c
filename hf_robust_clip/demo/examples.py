"""Pictures of a dataset that visitors may choose, with its class names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

from ..arguments import DataArguments
from ..modeling import ZeroShotClassifier
from ..runs.shared import load_data
from ..zero_shot_data.dataset import ImageDataset

DEFAULT = "digits"  # of scikit-learn: nothing is downloaded


@dataclass(frozen=True)
class Examples:
    """Pictures with the names of their classes.

    Args:
        pictures: in RGB, of their own size.
        labels: of each the name of its class.
        class_names: that the page begins with.
        templates: of a known dataset; else none.
    """

    pictures: tuple[Image.Image, ...]
    labels: tuple[str, ...]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def examples_of(data: DataArguments, count: int, classifier: ZeroShotClassifier, most_names: int) -> Examples:
    """Pictures of the dataset's test split: as many of each class, or, where there are more classes than pictures, a
    draw of all. They are whole, whatever the size at which an evaluation of the dataset attacks them.

    Args:
        most_names: with more classes than that the page begins with those of the pictures alone.

    Raises OSError and ValueError for a dataset that can't be loaded.
    """
    images = data.images(data.dataset_test_split)
    dataset = load_data(images if images.dataset else replace(images, dataset=DEFAULT), classifier)
    chosen = [replace(_some(dataset, count), augment=True)[i] for i in range(min(count, len(dataset)))]
    labels = tuple(dataset.class_names[example["labels"]] for example in chosen)
    few = len(dataset.class_names) <= most_names
    return Examples(
        tuple(Image.fromarray(example["picture"].permute(1, 2, 0).numpy()) for example in chosen),
        labels,
        dataset.class_names if few else tuple(dict.fromkeys(labels)),
        tuple(dataset.templates),
    )


def _some(dataset: ImageDataset, count: int) -> ImageDataset:
    """At most `count` images, of each class as many where that goes."""
    of_each = count // len(dataset.class_names)
    try:
        drawn = dataset.shots(of_each) if of_each else dataset.first(max(count, 1))
    except ValueError:  # a class has too few
        drawn = dataset.first(max(count, 1))
    return drawn if len(drawn) >= min(count, len(dataset)) else dataset.first(count)
