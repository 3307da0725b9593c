import math
import random
from dataclasses import FrozenInstanceError

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from counting import Operations
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from tiny import make_processor

from hf_robust_clip.crops import RandomResizedCrop, _on_the_cpu, picture_key
from hf_robust_clip.zero_shot_data.loading import ImageDataset, collate_images, load_image_dataset

SIZE = 8
WHOLE = dict(scale=(1, 1), ratio=(1, 1))


def ramps(height=128, width=128):
    """A picture whose first two channels are the place, (x, y)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8)


def noise(height=40, width=50, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def box_of(view_CHW):
    """(top, left, height, width, flipped) from a view of `ramps`: two pixels about its middle tell centre and slope.

    The middle of pixel i of n lies at left - 1/2 + (i + 1/2) width / n of the picture. Weights of resizing keep ramps,
    within 0.1 pixels here, where they don't reach the border: two pixels of the view away from it.
    """
    x, y = 255 * view_CHW[0, 0, [2, 5]].double(), 255 * view_CHW[1, [2, 5], 0].double()
    width, height = (SIZE * (v[1] - v[0]).item() / 3 for v in (x, y))
    left, top = (v.mean().item() + 0.5 - abs(extent) / 2 for v, extent in ((x, width), (y, height)))
    numbers = [top, left, height, abs(width)]
    assert all(abs(v - round(v)) < 0.2 for v in numbers), numbers
    return *map(round, numbers), width < 0


def boxes(crop, count, height=128, width=128):
    picture = ramps(height, width)
    return np.array([box_of(crop([picture], SIZE, seed)[0]) for seed in range(count)])


def uniform(values, low, high, tolerance=0.05):
    """Whether the sample's distribution is within `tolerance` of U[low, high] everywhere (Kolmogorov-Smirnov)."""
    expected = (np.sort(values) - low) / (high - low)
    steps = np.arange(len(values) + 1) / len(values)
    return max((steps[1:] - expected).max(), (expected - steps[:-1]).max()) < tolerance


# ---- the boxes


def test_boxes_follow_scale_and_ratio():
    """Where every box fits in: uniform areas, log-uniform ratios, even places and sides (1.63 / sqrt(1500): 0.042)."""
    top, left, height, width, flipped = boxes(RandomResizedCrop((0.1, 0.3), (1 / 3, 3)), 1500).T
    assert uniform(height * width / 128**2, 0.1, 0.3)
    assert uniform(np.log(width / height), -math.log(3), math.log(3))
    assert uniform((top + 0.5) / (129 - height), 0, 1)
    assert uniform((left + 0.5) / (129 - width), 0, 1)
    assert np.abs(np.corrcoef([top / (129 - height), left / (129 - width), height * width, width / height, flipped])
                  - np.eye(5)).max() < 0.1  # fmt: skip
    assert abs(flipped.mean() - 0.5) < 0.05


@pytest.mark.parametrize(("height", "width"), [(128, 128), (60, 120), (120, 60)])
def test_the_usual_boxes_lie_within_the_picture(height, width):
    top, left, h, w, _ = boxes(RandomResizedCrop(), 400, height, width).T
    assert top.min() == left.min() == 0
    assert (top + h).max() == height
    assert (left + w).max() == width
    areas = h * w / (height * width)
    assert 0.07 < areas.min() < 0.15
    assert 0.9 < areas.max() / min(1, 4 / 3 * min(height / width, width / height)) <= 1.02
    ratios = w / h
    assert ratios.min() > 0.75 * 0.95
    assert ratios.max() < 4 / 3 * 1.05


@pytest.mark.parametrize(
    ("height", "width", "ratio", "expected"),
    [
        (20, 120, (3 / 4, 4 / 3), (0, 46, 20, 27)),  # 20 * 4 / 3 = 26.7 wide
        (120, 20, (3 / 4, 4 / 3), (46, 0, 27, 20)),
        (60, 64, (1.2, 4 / 3), (3, 0, 53, 64)),  # 64 / 1.2 = 53.3 high
        (64, 60, (3 / 4, 0.8), (0, 4, 64, 51)),  # 64 * 0.8 = 51.2 wide
    ],
)
def test_the_central_box_where_none_fits(height, width, ratio, expected):
    crop = RandomResizedCrop((1, 1), ratio, flip=0)
    assert {tuple(map(int, box)) for box in boxes(crop, 20, height, width)} == {(*expected, 0)}


def test_ten_boxes_are_tried():
    """In 100 x 200 few boxes of half the area or more are low enough; the share that falls back is (1 - p) ** 10."""
    share, log_ratio = np.meshgrid(np.linspace(0.5, 1, 1000), np.linspace(math.log(3 / 4), math.log(4 / 3), 1000))
    fits = (np.sqrt(100 * 200 * share / np.exp(log_ratio)) <= 100.5).mean()
    assert 0.05 < fits < 0.1
    found = boxes(RandomResizedCrop(scale=(0.5, 1)), 1500, 100, 200)
    central = (found[:, :4] == (0, 33, 100, 133)).all(axis=1).mean()
    assert abs(central - (1 - fits) ** 10) < 0.03


def test_ratio_is_width_by_height():
    _, _, height, width, _ = boxes(RandomResizedCrop((0.1, 0.2), (2, 2)), 20).T
    assert np.abs(width / 2 - height).max() <= 1


def test_a_picture_of_allowed_ratio_is_taken_whole_where_no_box_fits():
    """40 x 50 has the ratio 1.25; a box of its whole area fits in only at that very ratio."""
    found = [tuple(box) for box in boxes(RandomResizedCrop((1, 1), (0.25, 4), flip=0), 30, 40, 50)]
    assert found.count((0, 0, 40, 50, 0)) > 20


@pytest.mark.parametrize("ratio", [(4, 5), (0.2, 0.25), (3 / 4, 4 / 3)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (2, 3)])
def test_pictures_of_few_pixels(shape, ratio):
    for seed in range(20):
        view = RandomResizedCrop(ratio=ratio)([noise(*shape)], 5, seed)
        assert view.shape == (1, 3, 5, 5)
        assert view.isfinite().all()


@pytest.mark.parametrize("flip", [0, 0.2, 1])
def test_flips(flip):
    flipped = boxes(RandomResizedCrop(flip=flip), 400)[:, 4]
    assert abs(flipped.mean() - flip) <= (0.06 if 0 < flip < 1 else 0)


# ---- the views


def test_a_view_is_the_box_resized():
    """Against the crop written out, for the boxes that the picture of places tells (the same draws: same bytes)."""
    crop, picture = RandomResizedCrop(), ramps(90, 120)
    picture[2] = noise(90, 120)[0]
    for seed in range(30):
        view = crop([picture], SIZE, seed)[0]
        top, left, height, width, flipped = box_of(view)
        part = picture[:, top : top + height, left : left + width] / 255
        expected = F.interpolate(part[None], size=SIZE, mode="bicubic", antialias=True)[0].clamp(0, 1)
        torch.testing.assert_close(view, expected.flip(-1) if flipped else expected, rtol=0, atol=1e-6)


def test_a_whole_square_of_the_right_size_stays_as_it_is():
    picture = noise(16, 16)
    view = RandomResizedCrop(**WHOLE, flip=0)([picture], 16, 3)
    assert (view.shape, view.dtype) == ((1, 3, 16, 16), torch.float32)
    torch.testing.assert_close(view[0], picture / 255, rtol=0, atol=1e-6)
    mirrored = RandomResizedCrop(**WHOLE, flip=1)([picture], 16, 3)
    torch.testing.assert_close(mirrored[0], picture.flip(2) / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.float64, torch.float16])
def test_views_are_float32_within_bounds(kind):
    """Black beside white: bicubic weights overshoot both before they are clamped."""
    picture = (255 * (noise() > 127)).to(torch.uint8)
    pictures = [picture if kind == torch.uint8 else picture.to(kind) / 255]
    views = torch.cat([RandomResizedCrop()(pictures, 64, seed) for seed in range(10)])
    assert views.dtype == torch.float32
    assert (views.min(), views.max()) == (0, 1)


# ---- the draws


def test_a_draw_depends_on_the_picture_and_the_seed_alone():
    crop, pictures = RandomResizedCrop(), [noise(40 + i, 50, i) for i in range(6)]
    torch.manual_seed(0)
    views = crop(pictures, 12, 5)
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(crop(pictures[::-1], 12, 5), views.flip(0))
    for picture, view in zip(pictures, views, strict=True):
        assert torch.equal(crop([picture], 12, 5)[0], view)
    assert torch.equal(crop([picture.clone() for picture in pictures[2:4]], 12, 5), views[2:4])
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_equal_pictures_share_a_draw_and_others_do_not():
    """One grey level in one value is another picture."""
    crop, picture = RandomResizedCrop(), ramps()
    near = [picture.clone() for _ in range(20)]
    for i, other in enumerate(near):
        other[2, i, i] += 1
    views = crop([picture, picture.clone(), *near], SIZE, 0)
    assert torch.equal(views[0], views[1])
    assert len({box_of(view) for view in views}) == 21


def test_seeds_of_64_bits():
    crop = RandomResizedCrop()
    seeds = [0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    assert len({box_of(crop([ramps()], SIZE, seed)[0]) for seed in seeds}) == len(seeds)
    assert torch.equal(crop([ramps()], SIZE, -1), crop([ramps()], SIZE, 2**64 - 1))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16])
def test_floats_draw_like_their_grey_levels(kind):
    picture = noise()
    bytes_, floats = (RandomResizedCrop()([x], 12, 7) for x in (picture, picture.to(kind) / 255))
    torch.testing.assert_close(bytes_, floats, rtol=0, atol=1e-6 if kind != torch.float16 else 1e-3)


def test_pictures_of_another_device_are_fetched_together_with_the_same_keys():
    pictures = [noise(5, 7, 0), noise(6, 5, 1).float() / 255, noise(5, 7, 2).half() / 255, noise(9, 9, 3)[:, ::2]]
    with Operations() as seen:
        fetched = _on_the_cpu(pictures[:1] * 10)
    assert len(fetched) == 10 and seen.count <= 2
    for own, other in zip(pictures, _on_the_cpu(pictures), strict=True):
        assert picture_key(own, 7) == picture_key(other, 7) != picture_key(other, 8)


def test_pictures_of_one_size_are_drawn_for_together():
    with Operations() as seen:
        RandomResizedCrop()([noise(40, 50, seed) for seed in range(30)], SIZE, 0)
    assert seen.count / 30 < 8


def test_layout_in_memory_does_not_count():
    """Pictures of Pillow have their channels last."""
    picture = noise()
    strided = picture.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(RandomResizedCrop()([picture], 12, 0), RandomResizedCrop()([strided], 12, 0))


# ---- refusals


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(scale=(0, 1)), r"scale=\(0, 1\) must be .* 0 < least <= largest <= 1"),
        (dict(scale=(0.5, 0.2)), "scale="),
        (dict(scale=(0.5, 1.1)), "scale="),
        (dict(scale=(float("nan"), 1)), "scale="),
        (dict(scale=0.5), r"scale=0.5 must be two numbers"),
        (dict(scale=(0.1, 0.5, 1)), "scale=.*two numbers"),
        (dict(ratio=(0, 1)), "ratio="),
        (dict(ratio=(2, 1)), "ratio="),
        (dict(ratio=(1, float("inf"))), "ratio=.*finite"),
        (dict(ratio=("x", 1)), "ratio=.*two numbers"),
        (dict(flip=-0.1), "flip=-0.1"),
        (dict(flip=1.1), "flip=1.1 is a probability"),
        (dict(flip=float("nan")), "flip=nan"),
        (dict(flip="half"), "flip='half'"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        RandomResizedCrop(**setting)


def test_settings_are_frozen_and_lists_become_tuples():
    crop = RandomResizedCrop(scale=[0.5, 1], ratio=[1, 2])
    assert crop == RandomResizedCrop((0.5, 1.0), (1.0, 2.0)) and hash(crop) is not None
    with pytest.raises(FrozenInstanceError):
        crop.flip = 0
    default = RandomResizedCrop()
    assert (default.scale, default.ratio, default.flip) == ((0.08, 1), (3 / 4, 4 / 3), 0.5)


@pytest.mark.parametrize(
    ("pictures", "size", "error", "message"),
    [
        ([], 8, ValueError, "pictures is empty"),
        ([noise()], 0, ValueError, "size=0 must be"),
        ([noise()], 8.0, ValueError, "size=8.0 must be"),
        ([noise(), noise().long()], 8, TypeError, r"pictures\[1\] must be a tensor of uint8.*got torch.int64"),
        ([np.zeros((3, 4, 4))], 8, TypeError, r"pictures\[0\] must be .* got ndarray"),
        ([noise()[0]], 8, ValueError, r"pictures\[0\] must have shape .* got \(40, 50\)"),
        ([noise()[:1]], 8, ValueError, r"\(1, 40, 50\)"),
        ([noise().permute(1, 2, 0)], 8, ValueError, r"\(40, 50, 3\)"),
        ([noise()[None]], 8, ValueError, r"\(1, 3, 40, 50\)"),
        ([noise()[:, :0]], 8, ValueError, r"\(3, 0, 50\)"),
        ([noise(), noise().float()], 8, ValueError, r"pictures\[1\] have values in .* outside"),
        ([torch.full((3, 4, 4), float("nan"))], 8, ValueError, r"pictures\[0\] contain NaN"),
    ],
)
def test_bad_pictures(pictures, size, error, message):
    with pytest.raises(error, match=message):
        RandomResizedCrop()(pictures, size, 0)


# ---- whole pictures of a dataset


def whole(sizes=((5, 9), (20, 7), (8, 8)), mode="RGB", **settings):
    arrays = [noise(*size, seed=i).permute(1, 2, 0).numpy() for i, size in enumerate(sizes)]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    pictures = [Image.fromarray(array).convert(mode) for array in arrays]
    rows = Dataset.from_dict({"image": pictures, "label": [1, 0, 1]}, features=features)
    return arrays, ImageDataset(
        rows, make_processor(), ("a", "b"), "user/sizes", "local", "train", **{"augment": True, **settings}
    )


def test_whole_pictures_keep_their_size_and_values():
    arrays, data = whole(resize=4, attack_resolution=4)
    examples = data.__getitems__([2, 0, 1])
    assert [set(example) for example in examples] == [{"picture", "labels"}] * 3
    for example, i in zip(examples, [2, 0, 1], strict=True):
        assert example["picture"].dtype == torch.uint8 and example["picture"].is_contiguous()
        assert torch.equal(example["picture"], torch.from_numpy(arrays[i]).permute(2, 0, 1))
    assert [example["labels"] for example in examples] == [1, 1, 0]
    batch = collate_images(examples)
    assert set(batch) == {"pictures", "labels"}
    assert [tuple(picture.shape) for picture in batch["pictures"]] == [(3, 8, 8), (3, 5, 9), (3, 20, 7)]
    assert torch.equal(batch["labels"], torch.tensor([1, 1, 0]))
    assert RandomResizedCrop()(batch["pictures"], 8, 0).shape == (3, 3, 8, 8)
    assert set(collate_images([{"picture": noise()}])) == {"pictures"}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_whole_pictures_of_every_mode(mode):
    assert [tuple(example["picture"].shape) for example in whole(mode=mode)[1]] == [(3, 5, 9), (3, 20, 7), (3, 8, 8)]


def test_parts_keep_the_setting_and_the_default_prepares():
    _, data = whole()
    for part in (data.only(["b"]), data.first(2), data.shots(1)):
        assert set(part[0]) == {"picture", "labels"}
    assert set(whole(augment=False)[1][0]) == {"pixel_values", "labels"}


def test_kinds_do_not_mix_in_a_batch():
    both = [whole()[1][0], whole(augment=False)[1][0]]
    for examples in (both, both[::-1]):
        with pytest.raises(ValueError, match=r"1 of 2 examples of a batch hold a whole picture.*`augment`"):
            collate_images(examples)


def test_a_whole_picture_that_cannot_be_read():
    _, data = whole()
    rows = data.rows.cast_column("image", datasets.Image(decode=False)).to_list()
    for bad in ({"bytes": b"nothing", "path": None}, None):
        rows[1]["image"] = bad
        data.rows = Dataset.from_list(rows, features=data.rows.features)
        with pytest.raises(ValueError, match="row 1 of dataset 'user/sizes', split 'train': the picture in column"):
            data.__getitems__([0, 1])


def test_digits_through_a_loader():
    data = load_image_dataset("digits", "train", make_processor())
    data.augment = True
    loader = torch.utils.data.DataLoader(data.shots(2), batch_size=5, collate_fn=collate_images)
    batches = [RandomResizedCrop()(batch["pictures"], 8, 0) for batch in loader]
    assert [tuple(batch.shape) for batch in batches] == [(5, 3, 8, 8)] * 4
