"""What was seen, as HTML."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_robust_clip.demo.drawing import drawn, mapped, over, percent, shown_classes, status, verdict
from hf_robust_clip.demo.looking import Look, Seen

EVIL = "<img src=x onerror='alert(1)'>\""


def seen(*shares: float, level: float = 0.5, flagged: bool | None = None) -> Seen:
    return Seen(torch.full((3, 4, 4), level), torch.tensor(shares), 1.5, flagged, torch.eye(2), torch.eye(4))


@pytest.fixture
def found() -> Look:
    return Look(
        name="a model", defence="TTC", class_names=("cat", EVIL, "dog"), eps=8 / 255, attack="PGD-20",
        seen="white box", label=0, right=True, clean=seen(0.9, 0.1, 0.0),
        attacked=seen(0.2, 0.8, 0.0, level=0.5 + 8 / 255), fell=True, broken_by="pgd", falls_rounded=True,
        attack_seconds=0.25, map_share=1.0,
    )  # fmt: skip


def pictures_of(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in found]


def test_what_visitors_typed_is_text_and_nothing_else(found):
    html = drawn(found, "Robust") + status(EVIL)
    assert "<img src=x" not in html and "&lt;img src=x" in html
    assert EVIL not in html


def test_numbers_stand_in_the_page(found):
    html = drawn(found, "Robust")
    assert re.findall(r'class="bar (\w+)" data-share="([\d.]+)"', html)[:2] == [
        ("clean", "0.900000"), ("attacked", "0.200000")
    ]  # fmt: skip
    assert 'data-verdict="fell"' in html and "90.0 %" in html and "0.25 s" in html and "1.5 ms" in html


def test_pictures_show_pixels_and_the_change_enlarged(found):
    clean, attacked, change, *maps = pictures_of(drawn(found, "Robust"))
    assert clean.shape == (224, 224, 3) and len(maps) == 4
    assert (clean == 128).all() and (attacked == 136).all() and (change == 255).all()
    calm = replace(found, attacked=None, fell=False, broken_by=None, falls_rounded=None, eps=0.0)
    assert len(pictures_of(drawn(calm, "Robust"))) == 3
    assert 'data-verdict="none"' in drawn(calm, "Robust") and "attacked" not in re.sub(
        "was attacked", "", drawn(calm, "")
    )


def test_maps_go_from_dark_to_bright():
    levels = np.asarray(mapped(torch.tensor([[0.0, 0.5], [1.0, 2.0]]), 0.0, 1.0)).astype(int).sum(axis=2)
    assert levels[0, 0] < levels[0, -1] < levels[-1, 0] == levels[-1, -1]
    flat = np.asarray(mapped(torch.full((2, 2), 3.0), 3.0, 3.0))
    assert (flat == flat[0, 0]).all()
    whole = np.asarray(over(torch.ones(3, 4, 4), mapped(torch.zeros(2, 2), 0, 1), 0.5))
    assert (whole[-1, -1] == 255).all() and (whole[0, 0] < 255).all()


def test_verdicts(found):
    assert verdict(found).startswith("Fooled by pgd: cat became ")
    held = replace(found, fell=False, attacked=seen(0.6, 0.4, 0.0), broken_by=None)
    assert verdict(held) == "Withstood PGD-20: still cat."
    assert "flagged" in verdict(replace(held, attacked=seen(0.1, 0.9, 0.0, flagged=True)))
    assert "false alarm" in verdict(
        replace(found, clean=seen(0.9, 0.1, 0.0, flagged=True), right=False, attacked=None)
    )
    assert "Wrong as it is" in verdict(replace(found, clean=seen(0.1, 0.9, 0.0), right=False, attacked=None))


def test_the_class_that_is_asked_about_is_among_the_rows(found):
    shares = [0.3, *[0.7 / 18] * 18, 0.0]
    many = replace(
        found, class_names=tuple(map(str, range(20))), clean=seen(*shares), attacked=seen(*shares), label=19
    )
    assert shown_classes(many)[0] == 0 and 19 in shown_classes(many) and len(shown_classes(many)) == 6
    assert "14 more" in drawn(many, "x")


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.0 %"), (0.9996, "> 99.9 %"), (0.0004, "< 0.1 %"), (0.0, "0.0 %"), (0.12345, "12.3 %")],
)
def test_a_probability_is_not_rounded_to_certainty(share, text):
    assert percent(share) == text


def test_rounding_that_changes_the_verdict_is_told(found):
    assert "8 bits" in drawn(replace(found, falls_rounded=False), "x")
    assert "8 bits" not in drawn(found, "x")
