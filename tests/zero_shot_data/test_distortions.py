"""Changes of colours against formulas written out and the standard library's, erased boxes, and what draws follow."""

import colorsys
import itertools
import math

import pytest
import torch

from hf_robust_clip.crops import RandomResizedCrop
from hf_robust_clip.distortions import (
    COLOUR_DRAWS,
    ERASING_DRAWS,
    Augmentation,
    ColourDistortion,
    RandomErasing,
    brightened,
    contrasted,
    grey,
    saturated,
    turned,
)

PIXELS = [[0.2, 0.4, 0.6], [1.0, 0.0, 0.5]]  # two of one image, beside one another
ALL = ColourDistortion(jitter=0.8, greyscale=0.2)


def image(pixels=PIXELS):
    """(1, 3, 1, W), float64."""
    return torch.tensor(pixels, dtype=torch.float64).T[None, :, None]


def pixels_of(images):
    return images[0, :, 0].T.tolist()


def factor(value):
    return torch.tensor([value], dtype=torch.float64)


def draws(rows=1, count=COLOUR_DRAWS, seed=0):
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count=4):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (3, 20 + i, 24), generator=generator, dtype=torch.uint8) for i in range(count)]


def luma(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


# ---- formulas


@pytest.mark.parametrize("f", [0.0, 0.6, 1.0, 1.4])
def test_brightness_contrast_and_saturation_are_the_documented_blends(f):
    greys = [luma(*pixel) for pixel in PIXELS]
    assert greys == pytest.approx([0.36298, 0.3559], abs=1e-12)
    assert grey(image())[0, 0, 0].tolist() == pytest.approx(greys, abs=1e-12)
    others = {brightened: [0, 0], contrasted: [sum(greys) / 2] * 2, saturated: greys}
    for change, blended in others.items():
        expected = [
            [min(1, max(0, f * value + (1 - f) * other)) for value in pixel]
            for pixel, other in zip(PIXELS, blended, strict=True)
        ]
        found = pixels_of(change(image(), factor(f)))
        assert found == [pytest.approx(pixel, abs=1e-12) for pixel in expected], change.__name__


@pytest.mark.parametrize("f", [-0.5, -0.1, 0.0, 0.05, 0.3, 0.5])
def test_hue_turns_as_in_the_standard_library(f):
    """Greys, black, white, and colours of which two channels are the largest included."""
    some = [list(pixel) for pixel in itertools.product((0.0, 0.25, 1.0), repeat=3)]
    some += torch.rand(40, 3, generator=torch.Generator().manual_seed(1)).tolist()
    expected = []
    for pixel in some:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + f) % 1, saturation, value))
    assert pixels_of(turned(image(some), factor(f))) == [pytest.approx(pixel, abs=1e-9) for pixel in expected]


def test_changes_are_made_in_the_order_drawn_by_the_factors_drawn():
    """Of two images with other orders; a third is left as it is, a fourth loses its colours alone."""
    some, strengths = torch.cat([image(), image(), image(), image()]), (0.4, 0.3, 0.2)
    rows = draws(4)
    rows[:, 0], rows[:, 9] = torch.tensor([0.1, 0.7, 0.9, 0.95]), torch.tensor([0.5, 0.1, 0.3, 0.0])
    rows[0, 5:9], rows[1, 5:9] = torch.tensor([0.3, 0.1, 0.4, 0.2]), torch.tensor([0.9, 0.8, 0.7, 0.6])
    found = ColourDistortion(0.8, *strengths, hue=0.1, greyscale=0.2)(some, rows)
    changes = [brightened, contrasted, saturated, turned]
    for i, order in ((0, (1, 3, 0, 2)), (1, (3, 2, 1, 0))):
        expected = image()
        for change in order:
            u = rows[i, 1 + change].item()
            f = 0.1 * (2 * u - 1) if change == 3 else 1 + strengths[change] * (2 * u - 1)
            expected = changes[change](expected, factor(f))
        if i == 1:
            expected = grey(expected).expand_as(expected)
        torch.testing.assert_close(found[i], expected[0], rtol=0, atol=1e-12)
    assert torch.equal(found[2], image()[0])
    torch.testing.assert_close(found[3], grey(image())[0].expand(3, 1, 2), rtol=0, atol=1e-12)
    assert torch.equal(some, torch.cat([image()] * 4))


def test_a_strength_above_one_begins_at_zero():
    low = draws()
    low[:, 0], low[:, 1:5] = 0, 0
    found = ColourDistortion(1.0, brightness=0, contrast=0, saturation=3, hue=0)(image(), low)
    torch.testing.assert_close(found, grey(image()).expand_as(found), rtol=0, atol=1e-12)


def test_the_erased_box_is_one_of_the_crops_boxes():
    erasing, some = RandomErasing(0.5), torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 0.01
    rows = draws(60, ERASING_DRAWS)
    found = erasing(some, rows)
    black = (found == 0).all(dim=1)
    assert torch.equal(found, some.masked_fill(black[:, None], 0))
    assert torch.equal(black.flatten(1).any(dim=1), rows[:, 0] < 0.5)
    boxes, _ = RandomResizedCrop((0.02, 0.33), (0.3, 3.3)).boxes(32, 32, rows[:, 1:])
    shares = []
    for i in (rows[:, 0] < 0.5).nonzero().flatten().tolist():
        top, left, height, width = boxes[i].tolist()
        assert black[i, top : top + height, left : left + width].all()
        assert black[i].sum() == height * width
        shares.append(height * width / 32**2)
    assert 0.015 < min(shares) < 0.08
    assert 0.25 < max(shares) < 0.35


# ---- draws


def test_draws_follow_the_picture_and_the_seed_alone():
    augmentation, some = Augmentation(colours=ALL, erasing=RandomErasing(0.5)), pictures(6)
    views = augmentation(some, 16, 5)
    assert views.dtype == torch.float32 and views.min() >= 0 and views.max() <= 1
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(augmentation(some[::-1], 16, 5), views.flip(0))
    assert torch.equal(augmentation(some[2:4], 16, 5), views[2:4])
    assert torch.equal(torch.get_rng_state(), before)
    floats = augmentation([picture.double() / 255 for picture in some], 16, 5)
    torch.testing.assert_close(floats, views, rtol=0, atol=1e-5)
    other = augmentation(some, 16, 6)
    assert (other != views).flatten(1).any(dim=1).all()
    boxes = Augmentation(erasing=RandomErasing(1.0))(some, 16, 5).eq(0).all(dim=1)
    assert len(boxes.unique(dim=0)) == len(some)


def test_crops_stay_those_of_a_training_without_distortions():
    crop, some = RandomResizedCrop(), pictures()
    plain = crop(some, 16, 5)
    assert torch.equal(Augmentation(crop)(some, 16, 5), plain)
    erased = Augmentation(crop, erasing=RandomErasing(1.0))(some, 16, 5)
    assert (erased != plain).flatten(1).any(dim=1).all()
    assert torch.equal(torch.where(erased == 0, plain, erased), plain)
    greys = Augmentation(crop, ColourDistortion(greyscale=1.0))(some, 16, 5)
    torch.testing.assert_close(greys, grey(plain).expand_as(plain), rtol=0, atol=1e-6)


def test_probabilities_are_those_of_the_images():
    """And of jitter and greyscale by themselves, over 600 seeds of one picture (4 standard deviations)."""
    some = [torch.randint(1, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)]
    crop = RandomResizedCrop((1, 1), (1, 1), flip=0)
    augmentation = Augmentation(crop, ColourDistortion(jitter=0.8, hue=0.2, greyscale=0.2), RandomErasing(0.3))
    plain = crop(some, 8, 0)
    found = torch.cat([augmentation(some, 8, seed) for seed in range(600)])
    black = (found == 0).all(dim=1, keepdim=True)
    is_grey = (found.amax(1) - found.amin(1)).flatten(1).amax(1) < 1e-6
    changed = ((found - plain).abs().amax(1, keepdim=True) > 1e-6).logical_and(~black).flatten(1).any(dim=1)
    for seen, share in ((black.flatten(1).any(1), 0.3), (is_grey, 0.2), (changed, 1 - 0.2 * 0.8)):
        assert abs(seen.double().mean() - share) < 4 * math.sqrt(share * (1 - share) / 600)


@pytest.mark.parametrize(
    ("made", "setting", "value"),
    [
        *((ColourDistortion, name, value)
          for name in ("jitter", "greyscale", "hue", "brightness", "contrast", "saturation")
          for value in (-0.1, float("nan"), float("inf"), "0.4")),
        (ColourDistortion, "jitter", 1.1),
        (ColourDistortion, "greyscale", 2),
        (ColourDistortion, "hue", 0.6),
        (ColourDistortion, "hue", True),
        (RandomErasing, "erasing", 1.5),
        (RandomErasing, "scale", (0, 0.3)),
        (RandomErasing, "ratio", (2, 1)),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(made, setting, value):
    with pytest.raises(ValueError, match=f"^{setting}="):
        made(**{setting: value})
