"""Pictures of every mode, and every switch of a processor, to the pixels that they mean."""

import base64
import io
import logging
import struct
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_processor

from hf_robust_clip import pictures
from hf_robust_clip.pictures import model_side, normalisation_of, open_picture, to_pixels, to_rgb

RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
ROUNDED = np.rint(RAMP / 257).astype(np.uint8)
WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
COLOUR = (204, 51, 102)  # of the web palette


@pytest.fixture(autouse=True)
def forget_warnings():
    pictures._say_transparent.cache_clear()


def stored(picture, file_format, **settings):
    """A picture read back from a file's bytes."""
    file = io.BytesIO()
    picture.save(file, file_format, **settings)
    return loaded(file.getvalue())


def loaded(content):
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


def png(levels_HW, depth, transparent=None, colour_type=0):
    """A PNG by hand: Pillow writes no grey of 2 or 4 bits, and no colours of 16."""
    rows = [b"".join(struct.pack(">H" if depth == 16 else ">B", v) for v in np.ravel(row)) for row in levels_HW]
    if depth < 8:
        bits = ["".join(f"{v:0{depth}b}" for v in row) for row in levels_HW]
        rows = [bytes(int(row[i : i + 8], 2) for i in range(0, len(row), 8)) for row in bits]
    height, width = np.shape(levels_HW)[:2]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))]
    if transparent is not None:
        parts.append((b"tRNS", b"".join(struct.pack(">H", v) for v in np.ravel(transparent))))
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return loaded(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


# ---- more than 8 bits


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(RAMP),
        Image.fromarray(RAMP.astype(">u2")),
        stored(Image.fromarray(RAMP), "PNG"),
        stored(Image.fromarray(RAMP), "TIFF"),
        stored(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        stored(Image.fromarray(RAMP), "PPM"),  # mode I, of a format that has 16 bits
        loaded(b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes()),
    ],
    ids=lambda picture: f"{picture.mode} {picture.format}",
)
def test_16_bits_are_scaled_and_not_clipped(picture):
    assert picture.mode in ("I", "I;16", "I;16B")
    rgb = np.asarray(to_rgb(picture))
    np.testing.assert_array_equal(rgb, np.repeat(ROUNDED[..., None], 3, axis=2))
    assert to_pixels(make_processor(), [picture]).mean() == pytest.approx(0.5, abs=0.01)


def test_16_bit_grey_with_a_transparent_level():
    rgb = np.asarray(to_rgb(png(RAMP, 16, transparent=int(RAMP[0, 3])), "red"))
    assert tuple(rgb[0, 3]) == RED
    assert (np.delete(rgb.reshape(-1, 3), 3, axis=0) == np.delete(ROUNDED.ravel(), 3)[:, None]).all()


def test_a_tiff_whose_white_is_zero():
    picture = stored(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert picture.tag_v2[262] == 0
    np.testing.assert_array_equal(np.asarray(to_rgb(picture))[..., 0], 255 - ROUNDED)


def test_12_bits_of_a_tiff_are_scaled_by_their_own_range():
    """Written by hand: Pillow writes none. Two levels in three bytes."""
    levels = np.linspace(0, 4095, 64).round().astype(int)
    data = b"".join(struct.pack(">I", (a << 12 | b) << 8)[:3] for a, b in levels.reshape(-1, 2).tolist())
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 8, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    picture = loaded(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + data)
    assert picture.mode == "I;16"
    expected = np.rint(levels * 255 / 4095).reshape(8, 8)
    np.testing.assert_array_equal(np.asarray(to_rgb(picture))[..., 0], expected)


def test_signed_numbers_of_a_tiff_are_refused():
    picture = stored(Image.fromarray(ROUNDED), "TIFF", tiffinfo={339: 2})
    assert picture.mode == "L"
    with pytest.raises(ValueError, match="signed"):
        to_rgb(picture)
    np.testing.assert_array_equal(np.asarray(to_rgb(stored(Image.fromarray(ROUNDED), "TIFF")))[..., 0], ROUNDED)


def test_16_bits_of_a_format_that_tells_no_range_are_refused():
    """FITS: signed, with a scale of its own."""
    lines = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 8, "NAXIS2": 8}
    header = "".join(f"{key:8}= {value!s:>20}".ljust(80) for key, value in lines.items()) + "END"
    picture = loaded(header.ljust(2880).encode() + (RAMP // 2).astype(">i2").tobytes().ljust(2880, b"\0"))
    with pytest.raises(ValueError, match="FITS"):
        to_rgb(picture)


def test_floats_between_0_and_1_are_grey_levels():
    floats = (RAMP / 65535).astype(np.float32)
    for picture in (Image.fromarray(floats), stored(Image.fromarray(floats), "TIFF")):
        assert picture.mode == "F"
        np.testing.assert_array_equal(np.asarray(to_rgb(picture))[..., 0], np.rint(floats * 255))


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, float("nan"), float("inf")])
def test_floats_of_unknown_range_are_refused(value):
    floats = np.full((4, 4), 0.5, dtype=np.float32)
    floats[1, 2] = value
    with pytest.raises(ValueError, match="mode F"):
        to_rgb(Image.fromarray(floats))


@pytest.mark.parametrize("picture", [Image.new("I", (4, 4), 99), stored(Image.new("I", (4, 4), 99), "TIFF")])
def test_32_bit_integers_are_refused(picture):
    with pytest.raises(ValueError, match="mode I"):
        to_rgb(picture)


# ---- every mode of Pillow


@pytest.mark.parametrize("mode", sorted({*Image.MODES, "I;16L", "I;16B", "RGBX", "RGBa", "La", "LAB"}))
def test_every_mode_is_right_or_refused(mode):
    if mode in ("I", "F"):
        pytest.skip("above")
    if mode.startswith("I;16"):
        picture, expected = Image.new(mode, (5, 3), 200 * 257), (200,) * 3
    elif mode in ("1", "L", "LA", "La"):
        picture, expected = Image.new("L", (5, 3), 255).convert("LA").convert(mode), WHITE
    elif mode == "RGBa":
        picture, expected = Image.new("RGBA", (5, 3), (*COLOUR, 255)).convert(mode), COLOUR
    else:
        picture, expected = Image.new("RGB", (5, 3), COLOUR).convert(mode), COLOUR
    assert picture.mode == mode
    rgb = to_rgb(picture)
    assert (rgb.mode, rgb.size) == ("RGB", (5, 3))
    assert np.abs(np.asarray(rgb).astype(int) - expected).max() <= 3  # HSV has 256 hues


def test_what_is_no_picture_is_refused():
    for value in (None, np.zeros((4, 4, 3), dtype=np.uint8), "picture.png"):
        with pytest.raises(TypeError, match=f"picture must be.*{type(value).__name__}"):
            to_rgb(value)


# ---- transparency


def drawn_in_alpha(mode):
    """A black left half that is opaque, and a right half that is transparent, of the same black; left, right."""
    alpha = Image.new("L", (8, 8), 255)
    alpha.paste(0, (4, 0, 8, 8))
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    picture.putalpha(alpha)
    if mode == "La":
        return picture.convert("LA").convert("La")
    if mode == "P key":
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([0, 0, 0, 9, 9, 9])
        palette.paste(1, (4, 0, 8, 8))
        return stored(palette, "PNG", transparency=1)
    if mode == "P alphas":
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(1, (4, 0, 8, 8))
        return stored(palette, "PNG", transparency=b"\xff\x00")
    if mode == "P RGBA":
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([0, 0, 0, 255, 0, 0, 0, 0], "RGBA")
        palette.paste(1, (4, 0, 8, 8))
        return palette
    if mode in ("L key", "RGB key"):
        grey = Image.new("L", (8, 8), 0)
        grey.paste(7, (4, 0, 8, 8))
        return stored(grey, "PNG", transparency=7) if mode == "L key" else stored(
            grey.convert("RGB"), "PNG", transparency=(7, 7, 7))  # fmt: skip
    if mode == "1 key":
        grey = Image.new("1", (8, 8), 0)
        grey.paste(1, (4, 0, 8, 8))
        return stored(grey, "PNG", transparency=1)
    if mode == "GIF":
        return stored(drawn_in_alpha("P key"), "GIF")
    return stored(picture, "PNG") if mode == "RGBA" else picture.convert(mode)


FORMS = ["RGBA", "LA", "PA", "La", "RGBa", "P key", "P alphas", "P RGBA", "L key", "RGB key", "1 key", "GIF"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("background", "colour"), [("white", WHITE), ("red", RED), ((0, 0, 255), BLUE)])
def test_transparent_pixels_show_the_background(form, background, colour, caplog):
    picture = drawn_in_alpha(form)
    rgb = np.asarray(to_rgb(picture, background))
    assert (rgb[:, :4] == 0).all()
    assert (rgb[:, 4:] == colour).all()
    pixels = to_pixels(make_processor(), [picture, picture], background=background)
    assert torch.equal(pixels[0, :, 0, 7], torch.tensor(colour) / 255)
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "said, and only once"
    assert "background" in caplog.text


@pytest.mark.parametrize("levels", [3, 15])
def test_a_transparent_level_of_2_or_4_bits(levels):
    """Pillow scales the levels to 0 .. 255, but not the one that is transparent."""
    depth = levels.bit_length()
    drawing = np.zeros((2, 4), dtype=int)
    drawing[1], drawing[0, 3] = 2, levels
    rgb = np.asarray(to_rgb(png(drawing, depth, transparent=2), "red"))
    assert (rgb[1] == RED).all()
    assert rgb[0].tolist() == [[0, 0, 0]] * 3 + [[255, 255, 255]]


def test_a_transparent_colour_of_16_bits_is_refused():
    colours = np.zeros((2, 4, 3), dtype=int)
    with pytest.raises(ValueError, match="transparency"):
        to_rgb(png(colours, 16, transparent=(300, 300, 300), colour_type=2))


def test_half_transparent_pixels_are_mixed():
    picture = Image.new("RGBA", (2, 2), (100, 0, 200, 51))
    for form in (picture, picture.convert("RGBa")):
        assert np.abs(np.asarray(to_rgb(form)).astype(int) - (224, 204, 244)).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_opaque_alpha_changes_and_says_nothing(mode, caplog):
    rgb = Image.new("RGB", (4, 4), (50, 50, 50))
    assert np.array_equal(np.asarray(to_rgb(rgb.convert("RGBA").convert(mode), "red")), np.asarray(rgb))
    assert not caplog.records


@pytest.mark.parametrize(
    "background", ["whiite", (1, 2), (1, 2, 256), (0.5, 0, 0), (True, 0, 0), 7, None, "#ffffff80"]
)
def test_a_background_that_is_no_colour(background):
    with pytest.raises(ValueError, match="background"):
        to_rgb(Image.new("RGB", (2, 2)), background)


# ---- orientation, and every way in


def turned():
    """A JPEG that is red on its left and blue on its right once its EXIF orientation is followed."""
    picture = Image.new("RGB", (8, 16), RED)
    picture.paste(BLUE, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif, quality=95, subsampling=0)
    return file.getvalue()


def is_red_then_blue(rgb):
    array = np.asarray(rgb).astype(int)
    return array.shape == (8, 16, 3) and abs(array[4, 2] - RED).max() < 20 and abs(array[4, 13] - BLUE).max() < 20


def test_pictures_are_turned_upright(tmp_path):
    (tmp_path / "turned.jpg").write_bytes(turned())
    for source in (loaded(turned()), tmp_path / "turned.jpg", str(tmp_path / "turned.jpg")):
        assert is_red_then_blue(to_rgb(open_picture(source)))
    assert is_red_then_blue(to_rgb(to_rgb(loaded(turned())))), "and only once"


def test_a_picture_is_opened_as_it_is(tmp_path):
    grey = Image.fromarray(RAMP)
    grey.save(tmp_path / "grey.png")
    text = base64.b64encode((tmp_path / "grey.png").read_bytes()).decode()
    for source in (grey, tmp_path / "grey.png", str(tmp_path / "grey.png"), text, f"data:image/png;base64,{text}"):
        assert np.asarray(open_picture(source)).max() == 65535
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert np.asarray(open_picture(f"{address}/grey.png", timeout=20)).max() == 65535
        with pytest.raises(OSError, match="404"):
            open_picture(f"{address}/none.png", timeout=20)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match="picture='no such file"):
        open_picture("no such file.png")
    with pytest.raises(TypeError, match="ndarray"):
        open_picture(RAMP)


# ---- a processor's switches

SIZES = ((8, 8), (20, 11), (9, 30), (5, 6), (13, 13))


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor_with(**settings):
    processor = make_processor()
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    return processor


FOLLOWED = {
    "as usual": {},
    "no resize": {"do_resize": False},
    "nearest": {"resample": 0},
    "box": {"resample": 4},
    "squeezed": {"size": {"height": 8, "width": 8}, "do_center_crop": False},
    "squeezed, no crop_size": {"size": {"height": 8, "width": 8}, "do_center_crop": False, "crop_size": None},
    "squeezed, then cropped": {"size": {"height": 12, "width": 10}},
    "a number as size": {"size": 12},
    "a number as crop_size": {"crop_size": 6},
    "both edges": {"size": {"shortest_edge": 8, "longest_edge": 12}},
    "not normalised": {"do_normalize": False},
    "one mean": {"image_mean": 0.5, "image_std": 0.25},
    "no conversion": {"do_convert_rgb": False},
}


@pytest.mark.parametrize("case", FOLLOWED)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_processor_before_it_normalises(case, size):
    processor = processor_with(**FOLLOWED[case])
    picture = noise(*size)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation_of(processor.image_processor))
    expected = torch.as_tensor(processor.image_processor([picture]).pixel_values[0]) * std + mean
    pixels = to_pixels(processor, [picture])
    assert pixels.shape[2:] == (model_side(processor),) * 2
    torch.testing.assert_close(pixels[0], expected.float(), rtol=0, atol=1e-6)


def test_pictures_that_are_neither_resized_nor_cropped_keep_their_size():
    processor = processor_with(do_resize=False, do_center_crop=False)
    pixels = to_pixels(processor, [noise(5, 6), noise(5, 6, seed=1)])
    assert torch.equal(pixels[1], torch.from_numpy(np.array(noise(5, 6, seed=1))).permute(2, 0, 1) / 255)
    for call in (lambda: model_side(processor), lambda: to_pixels(processor, [noise(5, 6)], resolution=4)):
        with pytest.raises(ValueError, match="do_resize"):
            call()
    with pytest.raises(ValueError, match="6 x 5"):
        to_pixels(processor, [noise(5, 6), noise(6, 5)])


def test_without_a_crop_only_squares_become_squares():
    processor = processor_with(do_center_crop=False)
    assert to_pixels(processor, [noise(13, 13), noise(8, 8)]).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"20 x 11.*do_center_crop"):
        to_pixels(processor, [noise(13, 13), noise(20, 11)])


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"do_rescale": False}, "do_rescale"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"rescale_factor": 1 / 256}, "rescale_factor"),
        ({"rescale_factor": None}, "rescale_factor"),
        ({"do_pad": True}, "do_pad"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
    ],
)
def test_steps_that_cannot_be_followed_are_refused(settings, argument):
    processor = processor_with(**settings)
    with pytest.raises(ValueError, match=argument):
        to_pixels(processor, [noise(8, 8)])
    with pytest.raises(ValueError, match=argument):
        normalisation_of(processor.image_processor)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"crop_size": {"height": 8, "width": 6}}, "crop_size"),
        ({"crop_size": None}, "crop_size"),
        ({"size": {"height": 8, "width": 6}, "do_center_crop": False}, "size"),
    ],
)
def test_pixels_that_are_no_squares_are_refused(settings, argument):
    processor = processor_with(**settings)
    for call in (lambda: model_side(processor), lambda: to_pixels(processor, [noise(8, 8)])):
        with pytest.raises(ValueError, match=argument):
            call()


def test_normalisation():
    usual = make_processor().image_processor
    assert normalisation_of(usual) == (tuple(usual.image_mean), tuple(usual.image_std))
    assert normalisation_of(processor_with(do_normalize=False).image_processor) == ((0.0,) * 3, (1.0,) * 3)
    both = {"image_mean": 0.5, "image_std": 0.25}
    assert normalisation_of(processor_with(**both).image_processor) == ((0.5,) * 3, (0.25,) * 3)
    for name, value in (
        ("image_mean", None),
        ("image_mean", [0.5]),
        ("image_mean", ["0.5"] * 3),
        ("image_std", [0.5, 0.5, 0.0]),
    ):
        with pytest.raises(ValueError, match=name):
            normalisation_of(processor_with(**{name: value}).image_processor)


@pytest.mark.parametrize("switch", [{"do_resize": False}, {"do_center_crop": False}])
def test_resizing_that_is_asked_for_is_done(switch):
    """A smaller attack resolution, or `resize`, means squares: the switches are on for that call."""
    square = {"size": {"height": 8, "width": 8}} if "do_center_crop" in switch else {}
    processor, usual = processor_with(**switch, **square), make_processor()
    picture = noise(20, 11)
    for asked in ({"resolution": 4}, {"resize": 10}):
        assert torch.equal(to_pixels(processor, [picture], **asked), to_pixels(usual, [picture], **asked))
    assert to_pixels(processor, [picture], resolution=4).shape == (1, 3, 4, 4)
    assert to_pixels(processor, [picture], resize=10).shape == (1, 3, 8, 8)
    assert processor.image_processor.do_resize == ("do_resize" not in switch), "and as they were afterwards"


@pytest.mark.parametrize(
    ("asked", "argument"),
    [
        ({"resize": 7}, "resize=7"),
        ({"resize": 9.5}, r"resize=9\.5"),
        ({"resize": 12, "resolution": 4}, "resize=12"),
        ({"resolution": 0}, "resolution=0"),
    ],
)
def test_sizes_that_do_nothing_or_leave_a_border_are_refused(asked, argument):
    with pytest.raises(ValueError, match=argument):
        to_pixels(make_processor(), [noise(8, 8)], **asked)
