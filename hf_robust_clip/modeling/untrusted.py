"""What a checkpoint of somebody else may do here: give numbers and texts, and nothing else.

No code that lies beside it is run or asked about (`NO_CODE`), no pickle is opened, no file elsewhere is read, and no
kernel is fetched or library called because a configuration says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers.utils import cached_file

from ..storage import read_json

NO_CODE = {"trust_remote_code": False}
LARGEST, MODEST = 4, 1024  # a processor may enlarge to 4 times the model's side, or to 1024 pixels
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
MOST_LABELS = 1_000_000
ADAPTER_CONFIG = "adapter_config.json"
WHOLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"


def check_weight_files(source: str, where: Mapping[str, Any]) -> None:
    """Raise OSError unless the weights of a model are safetensors files that lie beside their index."""
    index = present(source, INDEX, where)
    if present(source, WHOLE, where) is not None:
        return
    if index is None:
        raise OSError(f"{source!r} has no {WHOLE}; pickles (*.bin, *.pt, *.pth) can run code and aren't opened.")
    shards = set(_weight_map(index, source).values())
    for shard in shards:
        if not isinstance(shard, str) or not _is_plain(shard) or not shard.endswith(".safetensors"):
            raise OSError(f"{INDEX} of {source!r} names {shard!r}, which is no safetensors file in the same folder.")


def _weight_map(index: Path, source: str) -> dict[str, Any]:
    try:
        found = read_json(index)["weight_map"]
        if not isinstance(found, dict):
            raise TypeError("weight_map is no mapping")
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{INDEX} of {source!r} is damaged ({error}); copy or download it again.") from error
    return found


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder, on any system."""
    return all(path(name).name == name for path in (PurePosixPath, PureWindowsPath)) and name not in ("", ".", "..")


def check_adapter_file(source: str, where: Mapping[str, Any]) -> None:
    """Raise OSError unless the weights of an adapter are a safetensors file, and for patterns in its configuration
    that may take for ever: a group that is repeated.
    """
    config = present(source, ADAPTER_CONFIG, where)
    if config is not None and isinstance(settings := read_json(config), dict):
        for name in PATTERNS:
            value = settings.get(name)
            patterns = value if isinstance(value, list | dict) else [value]
            if any(isinstance(pattern, str) and re.search(r"\)[*+{]", pattern) for pattern in patterns):
                raise OSError(f"{name} in {ADAPTER_CONFIG} of {source!r} repeats a group; write it without.")
    if present(source, ADAPTER, where) is None:
        raise OSError(f"{source!r} has no {ADAPTER}; adapter_model.bin is a pickle, which can run code: not opened.")


def present(source: str, name: str, where: Mapping[str, Any]) -> Path | None:
    """A file of a folder, or of a Hub repository (fetched, if it is there); None if there is none."""
    if Path(source).is_dir():
        path = Path(source, where.get("subfolder") or "", name)
        return path if path.is_file() else None
    options = {key: value for key, value in where.items() if key != "force_download"}
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        **options,
    )  # fmt: skip
    return None if found is None else Path(found)


def check_config(source: str, config: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise OSError for a configuration that calls other libraries (quantised weights), unless they were asked for,
    that names other files for its weights, or that asks for tuples or for more labels than any model has.
    """
    for part in (config, config.get("vision_config"), config.get("text_config")):
        if isinstance(part, Mapping):
            labels = part.get("num_labels", 0)
            if not isinstance(labels, int) or labels > MOST_LABELS:
                raise OSError(f"num_labels={labels!r} in config.json of {source!r} is no number of labels; delete it.")
            if part.get("return_dict") is False:
                raise OSError(f"return_dict=false in config.json of {source!r} can't be followed; delete it.")
    if "transformers_weights" in config:
        raise OSError(f"config.json of {source!r} names other weights (transformers_weights); delete it.")
    if config.get("quantization_config") and not asked.get("quantization_config"):
        raise OSError(f"config.json of {source!r} asks for quantised weights; load weights in floating point.")


def check_sizes(image_processor: Any, side: int) -> None:
    """Raise ValueError for an image processor that enlarges pictures far beyond what a model of this side takes."""
    for name in ("size", "crop_size"):
        given = getattr(image_processor, name, None)
        edges = [given] if isinstance(given, int | float) else list(dict(given or {}).values())
        largest = max((edge for edge in edges if isinstance(edge, int | float)), default=0)
        if largest > max(LARGEST * side, MODEST):
            raise ValueError(f"{name} of the image processor is {largest} pixels, for a model that takes {side}.")
