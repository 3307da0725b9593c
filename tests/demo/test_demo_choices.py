"""What visitors typed and uploaded: bounded, or refused in one sentence."""

import io

import numpy as np
import pytest
from PIL import Image

from hf_robust_clip.attacks.suites import Suite
from hf_robust_clip.defences.undefended import Undefended
from hf_robust_clip.demo.choices import (
    NO_DEFENCE,
    Limits,
    attack_named,
    attack_names,
    defences_of,
    first_templates,
    read_classes,
    read_label,
    read_picture,
    read_radius,
    read_templates,
    takes_steps,
)

LIMITS = Limits(classes=100, steps=30, side=64, megabytes=1)


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def test_class_names_are_separated_by_commas_and_lines():
    assert read_classes(" cat , dog,\n\nred panda,", LIMITS) == ("cat", "dog", "red panda")
    assert len(read_classes(", ".join(f"class {i}" for i in range(100)), LIMITS)) == 100


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "no class names"), (" ,\n", "no class names"), ("cat", "'cat'"), ("cat, dog, Cat", "'Cat'"),
     (",".join(map(str, range(101))), "101"), (f"cat,{'x' * 101}", "101"), ("cat, d\x00g", "class name"),
     (None, "no class names")],
)  # fmt: skip
def test_class_names_that_cannot_be(text, told):
    with pytest.raises(ValueError, match=told):
        read_classes(text, LIMITS)


def test_the_true_class_is_found_whatever_its_capitals():
    assert read_label("DOG ", ("cat", "dog")) == 1
    assert read_label("", ("cat", "dog")) is None
    with pytest.raises(ValueError, match="'cow'"):
        read_label("cow", ("cat", "dog"))


def test_every_attack_that_is_offered_can_be_made_with_its_steps():
    for name in attack_names():
        suite = attack_named(name, 7, LIMITS)
        assert isinstance(suite, Suite) and suite.members(10)
        assert not takes_steps(name) or suite.name(10).endswith("-7")
    assert sum(map(takes_steps, attack_names())) >= 2
    for name, steps in (("pgd-20", 31), ("pgd-20", 0), ("pgd-20", 2.5), ("pgd-20", None), ("pgd-21", 5), ("os", 5)):
        with pytest.raises(ValueError, match=r"steps=|attack="):
            attack_named(name, steps, LIMITS)


def test_defences_that_lack_what_they_need_are_not_offered(tiny_clip):
    model = tiny_clip()
    own = Undefended()
    offered = defences_of(model, {"mine": own})
    assert list(offered)[:2] == ["mine", NO_DEFENCE] and offered["mine"] is own
    assert "ttc" in offered and "r_tpt" in offered
    assert "tapt" not in offered  # needs prompts and statistics
    assert model.class_names == tiny_clip().class_names


def test_prompts_and_radii():
    assert read_templates("a {}.\n\n the {}\n") == ("a {}.", "the {}")
    for text in ("", "no braces", "{description}", "\n".join(f"{i} {{}}" for i in range(101)), "x" * 501 + "{}"):
        with pytest.raises(ValueError, match=r"prompt|template"):
            read_templates(text)
    assert first_templates((), ("{}: {description}",), ("a {}",), otherwise="the {}") == ("a {}",)
    assert first_templates((), otherwise="the {}") == ("the {}",)
    assert read_radius(8, 64) == 8 / 255
    for levels in (-1, 65, float("nan"), "8", None, True):
        with pytest.raises(ValueError, match="radius"):
            read_radius(levels, 64)


def test_pictures_come_in_rgb(tmp_path):
    grey16 = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    clear = Image.new("RGBA", (5, 5), (0, 0, 0, 0))
    for picture, size in ((grey16, (6, 4)), (clear, (5, 5))):
        path = tmp_path / "x.png"
        path.write_bytes(png(picture))
        found = read_picture(path, LIMITS)
        assert found.mode == "RGB" and found.size == size and found.getpixel((0, 0)) == (255, 255, 255)


def test_uploads_that_are_no_pictures_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    whole = png(Image.fromarray(noise))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    uploads = {
        "text": b"no picture at all",
        "none": b"",
        "cut": whole[: len(whole) // 2],
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
        "eps": eps,  # Pillow would start Ghostscript for it
        "ppm": b"P6 8 8 255\n" + bytes(192),  # which Pillow would read: only a few decoders are let in
        "wide": png(Image.new("L", (65, 4))),
        "bomb": png(Image.new("1", (300, 10))),
        "thin": png(Image.new("L", (60, 1))),
        "heavy": b"\0" * (2**20 + 1),
    }
    for name, content in uploads.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"picture|file") as error:
            read_picture(path, LIMITS)
        assert str(tmp_path) not in str(error.value)
    with pytest.raises(ValueError, match="no picture"):
        read_picture(None, LIMITS)
