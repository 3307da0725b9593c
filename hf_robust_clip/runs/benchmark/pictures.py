"""A set of pictures of one's own classes, made of those of ImageNet."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import datasets

from ...storage import whole_file, write_text
from .settings import MADE_OF, PICTURES, Benchmark
from .single_runs import pictures_labels


def are_written(benchmark: Benchmark) -> bool:
    """Whether the set of pictures is there."""
    noted = benchmark.out / PICTURES / MADE_OF
    return noted.is_file() and noted.read_text(encoding="utf-8") == pictures_labels(benchmark)


def write_pictures(benchmark: Benchmark) -> None:
    """Parquet of the pictures of imagenet-sample-images that belong to one of the classes, labelled by these."""
    folder = benchmark.out / PICTURES
    shutil.rmtree(folder, ignore_errors=True)
    root = os.environ["HF_ROBUST_CLIP_DATA_ROOT"]
    source = datasets.load_dataset(str(Path(root) / "imagenet-sample-images"), split="test")
    names = list(benchmark.pictures)
    new = {int(label): i for i, name in enumerate(names) for label in benchmark.pictures[name]}
    labels = source["label"]
    rows = [i for i in range(len(source)) if labels[i] in new]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pictures = source.cast_column("image", datasets.Image(decode=False)).select(rows)
    chosen = {"image": list(pictures["image"]), "label": [new[labels[i]] for i in rows]}
    with whole_file(folder / "test-00000-of-00001.parquet") as draft:
        datasets.Dataset.from_dict(chosen, features=features).to_parquet(str(draft))
    write_text(folder / MADE_OF, pictures_labels(benchmark))
