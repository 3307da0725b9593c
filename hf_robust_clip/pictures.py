"""Pictures to pixels in [0, 1]: every mode that Pillow opens, prepared as a checkpoint's own processor does it."""

from __future__ import annotations

import logging
import math
import os
from base64 import b64decode
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import CLIPProcessor
from transformers.image_processing_utils import get_size_dict

from .checks import checked_images

logger = logging.getLogger(__name__)

ORIENTATION = 0x0112  # the EXIF tag: 1 is upright
BITS_PER_SAMPLE = 258  # the TIFF tag: Pillow gives 12 bits as they are in 16
SAMPLE_FORMAT = 339  # the TIFF tag: 2 is signed
PHOTOMETRIC = 262  # the TIFF tag: 0 says that white is 0, which Pillow inverts for 8 bits only
COLOURS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")  # `convert("RGB")` is right for them
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
WITH_KEY = ("1", "L", "P", "RGB", "I")  # one colour of these, and of 16 bits, may stand for transparent
FOLLOWED = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def open_picture(source: Any, timeout: float | None = None) -> Image.Image:
    """A picture as its file stores it, where `transformers.image_utils.load_image` would convert it to RGB.

    Args:
        source: a PIL picture, a path, an address (http, https), or a base64 text, with `data:image/...,` or without.
        timeout: seconds to wait for an address.

    Raises TypeError for another type, OSError for an address without an answer and for what is no picture, ValueError
    for another text.
    """
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | Path):
        raise TypeError(f"picture must be a PIL picture, a path or an address, got {type(source).__name__}.")
    text = str(source)
    if text.startswith(("http://", "https://")):
        with urlopen(text, timeout=timeout) as answer:
            return opened(answer.read())
    if os.path.isfile(text):
        return Image.open(text)
    try:
        content = b64decode(text.partition(",")[2] if text.startswith("data:image/") else text, validate=True)
    except ValueError:
        content = b""
    if not content:
        raise ValueError(f"picture={text[:80]!r} is no file, no address and no base64 text.")
    return opened(content)


def opened(content: bytes) -> Image.Image:
    """The picture that bytes encode. Raises OSError for what Pillow doesn't know as one."""
    try:
        return Image.open(BytesIO(content))
    except UnidentifiedImageError:  # which tells an address in memory
        raise OSError(f"its {len(content)} bytes are no picture of a known kind") from None


def to_rgb(picture: Image.Image, background: str | Sequence[int] = "white") -> Image.Image:
    """A PIL picture of any mode, upright, in RGB with 8 bits: 16 bits are scaled by 1 / 257 (12 bits of a TIFF by
    255 / 4095), floats in [0, 1] by 255, and what is transparent shows the background.

    Args:
        background: name of a colour, or (red, green, blue) in 0 .. 255.

    Raises TypeError for what is no picture; ValueError for integers whose range no file format tells, floats
    outside [0, 1], an unknown mode, and a background that is no colour.
    """
    if not isinstance(picture, Image.Image):
        raise TypeError(f"picture must be a PIL picture, got {type(picture).__name__}.")
    colour = checked_colour(background)
    picture.load()
    file_format, tags = picture.format, getattr(picture, "tag_v2", {})
    if 2 in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)):
        raise ValueError(f"a TIFF of signed numbers (mode {picture.mode}) tells no range; save it with 8 bits.")
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    mode, key = picture.mode, picture.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        values_HW = _grey_levels(picture, file_format, np.max(tags.get(BITS_PER_SAMPLE, 16)))
        grey = Image.fromarray(255 - values_HW if tags.get(PHOTOMETRIC) == 0 else values_HW)
        if isinstance(key, int) and mode != "F":
            return _on_background(_with_hole(grey, np.asarray(picture) == key), colour)
        return grey.convert("RGB")
    palette_has_alpha = mode == "P" and picture.palette is not None and picture.palette.mode == "RGBA"
    if mode in WITH_ALPHA or palette_has_alpha or (key is not None and mode in WITH_KEY):
        return _on_background(_with_alpha(picture, key), colour)
    if mode not in COLOURS:
        raise ValueError(f"a picture of mode {mode!r} can't be read; save it as PNG in RGB.")
    return picture.convert("RGB")


def checked_colour(background: str | Sequence[int]) -> tuple[int, int, int]:
    """(red, green, blue) in 0 .. 255. Raises ValueError for what is neither a colour's name nor such numbers."""
    try:
        colour: tuple[int, ...] = ImageColor.getrgb(background) if isinstance(background, str) else tuple(background)
    except (TypeError, ValueError):
        colour = (-1,)
    whole = all(isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= 255 for part in colour)
    if len(colour) != 3 or not whole:
        raise ValueError(f"background={background!r} is no colour; give a name, or (red, green, blue) in 0 .. 255.")
    red, green, blue = colour
    return red, green, blue


def _grey_levels(picture: Image.Image, file_format: str | None, bits: int) -> np.ndarray:
    """The levels in uint8, (H, W), of a picture with one channel of more than 8 bits."""
    values_HW = np.asarray(picture)
    if picture.mode == "F":
        if values_HW.size and not (values_HW.min() >= 0 and values_HW.max() <= 1):  # NaN too
            low, high = values_HW.min(), values_HW.max()
            raise ValueError(f"a picture of floats (mode F) is in [{low:.4g}, {high:.4g}]; scale it to [0, 1].")
        return np.rint(values_HW * 255.0).astype(np.uint8)
    if file_format not in (("PNG", "PPM") if picture.mode == "I" else (None, "PNG", "PPM", "TIFF", "JPEG2000")):
        raise ValueError(
            f"a picture of mode {picture.mode}, format {file_format}, tells no range; save it with 8 bits."
        )
    return np.rint(values_HW * (255.0 / (2**bits - 1))).astype(np.uint8)


def _with_alpha(picture: Image.Image, key: Any) -> Image.Image:
    """A picture with an alpha channel, a transparent colour or a palette that has such, in RGBA."""
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode == "L" and isinstance(key, int):
        values_HW = np.asarray(picture)
        return _with_hole(picture, values_HW == _scaled_key(values_HW, key))
    if picture.mode == "RGB" and not (isinstance(key, tuple) and max(key) <= 255):
        raise ValueError(f"transparency={key!r} is no colour of 8 bits; save the picture with an alpha channel.")
    return picture.convert("RGBA")


def _scaled_key(values_HW: np.ndarray, key: int) -> int:
    """The transparent grey level: Pillow scales levels of 2 and 4 bits to 0 .. 255, but not this one."""
    if not (values_HW == key).any():
        for levels in (3, 15):
            step = 255 // levels
            if key <= levels and not (values_HW % step).any():
                return key * step
    return key


def _with_hole(grey: Image.Image, hole_HW: np.ndarray) -> Image.Image:
    picture = grey.convert("RGB")
    picture.putalpha(Image.fromarray(np.where(hole_HW, 0, 255).astype(np.uint8)))
    return picture


def _on_background(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    if picture.getchannel("A").getextrema()[0] == 255:  # opaque all over
        return picture.convert("RGB")
    _say_transparent(colour)
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*colour, 255)), picture).convert("RGB")


@cache
def _say_transparent(colour: tuple[int, int, int]) -> None:
    logger.warning("pictures have transparent pixels; they are shown on background=%s.", colour)


def normalisation_of(image_processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std, per channel in units of [0, 1], by which a processor normalises: 0 and 1 with do_normalize=False.

    Raises ValueError for what can't be followed by (x - mean) / std on x in [0, 1]; see `to_pixels`.
    """
    _check_switches(image_processor)
    if not getattr(image_processor, "do_normalize", None):
        return (0.0,) * 3, (1.0,) * 3
    mean, std = (_per_channel(image_processor, name) for name in ("image_mean", "image_std"))
    return mean, std


def _per_channel(image_processor: Any, name: str) -> tuple[float, ...]:
    value = getattr(image_processor, name, None)
    values = (value,) * 3 if isinstance(value, int | float) else tuple(value or ())
    numbers = [v for v in values if isinstance(v, int | float | np.floating)]
    if len(values) != 3 or [v for v in numbers if math.isfinite(v) and (v > 0 or name == "image_mean")] != [*values]:
        raise ValueError(f"{name}={value!r} of the image processor must be three numbers; correct its file.")
    return tuple(float(v) for v in values)


def check_processor(processor: CLIPProcessor) -> None:
    """Raise ValueError for a processor of other steps than `to_pixels` follows, or whose pictures are no squares."""
    _check_switches(processor.image_processor)
    _side(processor.image_processor)


def model_side(processor: CLIPProcessor) -> int:
    """Side in pixels of the pictures that a processor makes.

    Raises ValueError if they are not square, or left at their own size.
    """
    side = _side(processor.image_processor)
    if side is None:
        raise ValueError("the image processor keeps each picture's size; switch do_resize or do_center_crop on.")
    return side


def _side(image_processor: Any) -> int | None:
    """Side of the square that pictures become; None where they keep their own size."""
    if getattr(image_processor, "do_center_crop", None):
        name, square = "crop_size", True
    elif getattr(image_processor, "do_resize", None):
        name, square = "size", image_processor.default_to_square
    else:
        return None
    given = getattr(image_processor, name, None)
    size = {} if given is None else get_size_dict(given, default_to_square=square, param_name=name)
    sides = [size.get(key) for key in ("height", "width", "shortest_edge") if size.get(key) is not None]
    if len(set(sides)) != 1 or not isinstance(sides[0], int) or sides[0] < 1:
        raise ValueError(f"{name}={given!r} of the image processor makes no squares; give both edges one length.")
    return sides[0]


def to_pixels(
    processor: CLIPProcessor,
    pictures: Sequence[Image.Image],
    resize: int | None = None,
    resolution: int | None = None,
    background: str | Sequence[int] = "white",
) -> Tensor:
    """PIL pictures to float pixels (B, 3, H, W) in [0, 1], not normalised: in RGB, prepared by the processor's own
    settings (do_resize, size, resample, do_center_crop, crop_size).

    Args:
        resize: shorter side before the centre crop to the processor's side; None leaves both to its settings.
        resolution: side to resize and crop to, where it is smaller than the processor's own.
        background: what shows where a picture is transparent: name of a colour, or (red, green, blue).

    Raises TypeError/ValueError for pictures that `to_rgb` refuses or that don't become squares of one size, a `resize`
    below the processor's side or beside a smaller `resolution`, and a processor that doesn't scale by 1/255 or does
    more than these steps.
    """
    image_processor = processor.image_processor
    _check_switches(image_processor)
    changed = _squares(processor, resize, resolution)
    rgb = [to_rgb(picture, background) for picture in pictures]
    for picture in rgb:
        _check_area(picture, image_processor, changed)
    prepared = image_processor(rgb, do_normalize=False, **changed).pixel_values
    side = changed["crop_size"]["height"] if changed else _side(image_processor)
    for picture, pixels in zip(rgb, prepared, strict=True):
        expected = tuple(prepared[0].shape) if side is None else (3, side, side)
        if tuple(pixels.shape) != expected:
            height, width = pixels.shape[-2:]
            raise ValueError(
                f"a picture of {picture.height} x {picture.width} pixels becomes {height} x {width}, not "
                f"{expected[1]} x {expected[2]}; crop the pictures alike, or set the image processor's do_resize and "
                "do_center_crop."
            )
    return checked_images(torch.stack([torch.as_tensor(pixels) for pixels in prepared]).float(), "pixel_values")


def _squares(processor: CLIPProcessor, resize: int | None, resolution: int | None) -> dict[str, Any]:
    """Settings of the processor for squares of another size than its own; empty if there is nothing to change."""
    if resize is None and resolution is None:
        return {}
    side = model_side(processor)
    check_resize(resize, resolution, side)
    if resolution is not None and resolution < side:
        resize = side = resolution
    if resize is None:
        return {}
    return {
        "do_resize": True,
        "size": {"shortest_edge": resize},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
    }


def _check_area(picture: Image.Image, image_processor: Any, changed: dict[str, Any]) -> None:
    """Raise ValueError for a picture so long and narrow that it would fill the memory when its shorter side is
    enlarged, before it is cropped.
    """
    if not (changed or getattr(image_processor, "do_resize", None)):
        return
    given = changed.get("size") or getattr(image_processor, "size", None) or {}
    short = get_size_dict(given, default_to_square=image_processor.default_to_square).get("shortest_edge") or 0
    area = short * short * max(picture.size) / max(1, min(picture.size))
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    if area > limit:
        raise ValueError(f"a picture of {picture.height} x {picture.width} pixels becomes {area:.2g}; crop it.")


def check_resize(resize: int | None, resolution: int | None, side: int) -> None:
    """Raise ValueError for a `resize` that would leave a border, or does nothing beside a smaller `resolution`."""
    for name, value, least in (("resize", resize, side), ("resolution", resolution, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}={value!r} must be a whole number of pixels, at least {least}; or None.")
    if resize is not None and resolution is not None and resolution < side:
        raise ValueError(f"resize={resize!r} does nothing: attack_resolution leaves pictures at {resolution} px.")


def _check_switches(image_processor: Any) -> None:
    """Raise ValueError for steps of an image processor that pixels in [0, 1] can't follow."""
    factor = getattr(image_processor, "rescale_factor", None)
    if not getattr(image_processor, "do_rescale", None):
        raise ValueError("do_rescale=False of the image processor leaves pixels in 0 .. 255; set do_rescale=True.")
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor={factor!r} of the image processor is not 1/255: pixels must be in [0, 1].")
    for name, value in vars(image_processor).items():
        if name.startswith("do_") and value and name not in FOLLOWED:
            raise ValueError(f"{name}={value!r} of the image processor can't be followed; set it to False.")
