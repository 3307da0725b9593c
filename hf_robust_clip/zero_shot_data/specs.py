"""Known datasets, one literal row each: where they are, what their columns are called, what their classes are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of the Hub.

    Args:
        hub_id: name on the Hub, or `"digits"`.
        splits: `"train"` and `"test"` to the dataset's own split names, where they differ.
        image_column, label_column: names of the columns.
        class_names: key in `class_names.json`: a list in label order, or a mapping from the dataset's own label names
            (WordNet ids, say); None takes the names of the label feature.
        test_every: where the Hub has a single split: every n-th of its rows is `"test"`, the others are `"train"`.
        checked: False where the layout on the Hub was taken from its documentation and not seen.
        source: who published it.
    """

    hub_id: str
    splits: Mapping[str, str] = field(default_factory=dict)
    image_column: str = "image"
    label_column: str = "label"
    class_names: str | None = None
    test_every: int | None = None
    checked: bool = True
    source: str = ""

    def names_in_label_order(self, feature_names: Sequence[str] | None) -> list[str] | None:
        """Class names in label order. Raises ValueError if the dataset's labels are not those the names belong to."""
        if self.class_names is None:
            return None
        names = _class_names()[self.class_names]
        if isinstance(names, list):
            if feature_names is not None and len(feature_names) != len(names):
                raise ValueError(f"{self.hub_id} has {len(feature_names)} labels, expected {len(names)}.")
            return names
        if feature_names is None:
            return list(names.values())
        unknown = [name for name in feature_names if name not in names]
        if unknown:
            raise ValueError(f"{self.hub_id} has a label {unknown[0]!r} that has no class name; give class_names.")
        return [names[name] for name in feature_names]


SPECS = (
    DatasetSpec("digits", source="UCI ML hand-written digits, as shipped by scikit-learn"),
    DatasetSpec("uoft-cs/cifar10", image_column="img", source="Krizhevsky, 2009"),
    DatasetSpec("zalando-datasets/fashion_mnist", class_names="fashion_mnist", source="Xiao et al., 2017"),
    DatasetSpec("flwrlabs/pacs", splits={"test": "train"}, test_every=5, source="Li et al., 2017"),
    DatasetSpec(
        "zh-plus/tiny-imagenet",
        splits={"test": "valid"},
        class_names="tiny_imagenet",
        checked=False,
        source="Le and Yang, Tiny ImageNet Visual Recognition Challenge, 2015",
    ),
    DatasetSpec(
        "ILSVRC/imagenet-1k",
        splits={"test": "validation"},
        class_names="imagenet",
        checked=False,
        source="Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015",
    ),
)


def find_spec(name: str) -> DatasetSpec | None:
    """The row of a dataset, or None if it is not a known one."""
    return next((spec for spec in SPECS if spec.hub_id == name), None)


@cache
def _class_names() -> dict[str, list[str] | dict[str, str]]:
    return json.loads((files(__package__) / "class_names.json").read_text(encoding="utf-8"))
