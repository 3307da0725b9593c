"""`open_clip_config.json`, which lies beside weights that open_clip published: what the weights don't tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage import read_json

NAME = "open_clip_config.json"
HEAD = 64  # channels of a head of the image tower, by default
HEADS = 8  # of the text tower, by default
KNOWN = {
    "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
}
SAME = {("vision_cfg", "pool_type"): "tok", ("text_cfg", "pool_type"): "argmax", ("text_cfg", "proj_type"): "linear"}


@dataclass(frozen=True)
class OpenClipConfig:
    """What it says of a CLIP.

    Args:
        activation: quick_gelu or gelu, of both towers.
        mean, std: of the images, per channel in units of [0, 1]; None where it says nothing.
    """

    activation: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def read_open_clip_config(path: str | Path, base: Any) -> OpenClipConfig:
    """Read the file.

    Args:
        base: a `CLIPConfig`, with which it is compared.

    Raises ValueError for a file that can't be read, for heads that aren't the base's (which no weights tell), and for
    what a CLIPModel doesn't compute.
    """
    content = read_json(path)
    try:
        model = content.get("model_cfg", content)  # as the first ones were written
        vision, text = model["vision_cfg"], model["text_cfg"]
        for part in ("vision_cfg", "text_cfg"):
            _check_known(part, model[part])
        own = base.vision_config.num_attention_heads, base.text_config.num_attention_heads
        heads = {
            "vision_cfg": (vision["width"] // vision.get("head_width", HEAD), own[0]),
            "text_cfg": (text.get("heads", HEADS), own[1]),
        }
        preparation = content.get("preprocess_cfg") or {}
        mean, std = (_channels(preparation.get(name)) for name in ("mean", "std"))
        quick = model.get("quick_gelu", False)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{NAME} is damaged, or of another kind of model ({error!r}); correct it.") from error
    for part, (there, here) in heads.items():
        if there != here:
            raise ValueError(f"{part} in {NAME} has {there} attention heads, the base {here}; name another base.")
    return OpenClipConfig("quick_gelu" if quick is True else "gelu", mean, std)


def _check_known(part: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of a tower that changes what it computes, other than its sizes."""
    for name, value in settings.items():
        if name not in KNOWN[part] and value and SAME.get((part, name)) != value:
            raise ValueError(f"{part}.{name}={value!r} in {NAME} is nothing that a CLIPModel computes.")


def _channels(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    return tuple(float(own) for own in (value if isinstance(value, list) else [value] * 3))
