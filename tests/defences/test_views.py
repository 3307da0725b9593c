import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_robust_clip.crops import RandomResizedCrop
from hf_robust_clip.defences.views import Views, draw_boxes

CROP = RandomResizedCrop()


def noise(count=3, height=20, width=24, seed=0, dtype=torch.float64):
    """Images of whole grey levels, as float16 and bfloat16 images nearly are."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255).to(dtype)


def same(views, other):
    return torch.equal(views.boxes, other.boxes) and torch.equal(views.mirrored, other.mirrored)


def crops(images, views, size):
    """Every view by itself, cut out and resized by torch."""
    rendered = []
    for image, boxes, mirrored in zip(images, views.boxes.tolist(), views.mirrored.tolist(), strict=True):
        for (top, left, height, width), mirror in zip(boxes, mirrored, strict=True):
            part = image[None, :, top : top + height, left : left + width]
            view = F.interpolate(part, (size, size), mode="bilinear", align_corners=False)[0]
            rendered.append(view.flip(2) if mirror else view)
    return torch.stack(rendered).unflatten(0, views.mirrored.shape)


# ---- where they lie


def test_view_0_is_the_image_and_the_others_follow_the_crop():
    views = draw_boxes(noise(4, 60, 90), 200, RandomResizedCrop((0.2, 0.4), (0.5, 2), flip=0.25), seed=3)
    assert views.boxes.dtype == torch.int64 and views.mirrored.dtype == torch.bool
    assert views.boxes[:, 0].tolist() == [[0, 0, 60, 90]] * 4 and not views.mirrored[:, 0].any()
    top, left, height, width = views.boxes[:, 1:].unbind(2)
    assert min(top.min(), left.min()) >= 0 and (top + height).max() <= 60 and (left + width).max() <= 90
    area, ratio = height * width / (60 * 90), width / height
    assert 0.19 < area.min() < 0.22 and 0.38 < area.max() < 0.41
    assert 0.48 < ratio.min() < 0.6 and 1.8 < ratio.max() < 2.1
    assert abs(views.mirrored[:, 1:].double().mean() - 0.25) < 0.06
    assert len(set(map(tuple, views.boxes.flatten(0, 1).tolist()))) > 700


def test_draws_depend_on_the_image_and_the_seed_alone():
    images = noise(5)
    torch.manual_seed(0)
    views = draw_boxes(images, 8, CROP, seed=5)
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert same(draw_boxes(images[order], 8, CROP, seed=5), Views(views.boxes[order], views.mirrored[order]))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    for i in range(5):
        alone = draw_boxes(images[i : i + 1], 8, CROP, seed=5)
        assert same(alone, Views(views.boxes[i : i + 1], views.mirrored[i : i + 1]))
        assert torch.equal(alone.render(images[i : i + 1], 16)[0], views.render(images, 16)[i])
    other = draw_boxes(images, 8, CROP, seed=6)
    assert (other.boxes[:, 1:] != views.boxes[:, 1:]).any(dim=2).all()
    near = images.clone()
    near[:, 0, 0, 0] = (near[:, 0, 0, 0] + 1 / 255).remainder(1)  # one grey level of one value
    assert (draw_boxes(near, 8, CROP, seed=5).boxes[:, 1:] != views.boxes[:, 1:]).any(dim=2).sum() > 30


def test_images_with_a_graph_and_of_other_dtypes_draw_alike():
    images = noise()
    views = draw_boxes(images, 6, CROP, seed=0)
    for other in (images.requires_grad_(), images.float(), (255 * images).round().byte(), images.half()):
        assert same(draw_boxes(other, 6, CROP, seed=0), views)


def test_more_views_keep_the_first_and_the_first_draw_is_the_crops_own():
    images = noise(2)
    few, many = (draw_boxes(images, count, CROP, seed=2) for count in (2, 30))
    assert same(few, Views(many.boxes[:, :2], many.mirrored[:, :2]))
    for image, (top, left, height, width), mirror in zip(images, few.boxes[:, 1], few.mirrored[:, 1], strict=True):
        part = image[None, :, top : top + height, left : left + width].float()
        expected = F.interpolate(part, (8, 8), mode="bicubic", antialias=True)[0].clamp(0, 1)
        torch.testing.assert_close(CROP([image], 8, 2)[0], expected.flip(2) if mirror else expected)


def test_no_images():
    views = draw_boxes(noise(0), 4, CROP, seed=0)
    assert views.take(torch.zeros(0, 2, dtype=torch.long)).render(noise(0), 8).shape == (0, 2, 3, 8, 8)


@pytest.mark.parametrize("num_views", [1, 0, -3, 2.5])
def test_less_than_two_views_are_refused(num_views):
    with pytest.raises(ValueError, match=f"num_views={num_views} must be a whole number of at least 2"):
        draw_boxes(noise(), num_views, CROP, seed=0)


# ---- how they look


@pytest.mark.parametrize(("shape", "size"), [((20, 24), 16), ((20, 24), 20), ((7, 5), 30), ((1, 3), 4)])
def test_views_are_the_resized_crops(shape, size):
    """Nothing from outside a crop shows at its borders, though the image goes on there."""
    images = noise(3, *shape)
    views = draw_boxes(images, 30, CROP, seed=1)
    assert views.mirrored.any() and not views.mirrored[:, 1:].all()
    bilinear = views.take(torch.arange(1, 30).expand(3, -1))
    own = (bilinear.boxes == torch.tensor([0, 0, *shape])).all(dim=2) & ~bilinear.mirrored
    found, expected = bilinear.render(images, size), crops(images, bilinear, size)
    assert found.shape == (3, 29, 3, size, size) and (~own).sum() > 40
    torch.testing.assert_close(found[~own], expected[~own], rtol=0, atol=1e-10)


def test_a_mirrored_view_is_the_view_turned_round():
    images = noise()
    views = draw_boxes(images, 9, CROP, seed=0)
    pairs = [
        Views(views.boxes, torch.full_like(views.mirrored, mirror)).render(images, 12) for mirror in (False, True)
    ]
    torch.testing.assert_close(pairs[0][:, 1:], pairs[1][:, 1:].flip(4), rtol=0, atol=1e-12)
    assert (pairs[0] - pairs[1]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_view_0_is_the_image_itself(dtype):
    """Bit by bit at its own size; as the classifier enlarges it at another."""
    images = noise(2, 16, 16, dtype=dtype)
    views = draw_boxes(images, 4, CROP, seed=0)
    index = torch.tensor([[2, 0], [0, 3]])
    same_size, larger = (views.take(index).render(images, size) for size in (16, 24))
    assert same_size.dtype == larger.dtype == dtype
    assert torch.equal(same_size[0, 1], images[0]) and torch.equal(same_size[1, 0], images[1])
    expected = F.interpolate(images, size=(24, 24), mode="bicubic", align_corners=False)
    assert torch.equal(larger[0, 1], expected[0]) and torch.equal(larger[1, 0], expected[1])
    assert torch.equal(same_size, views.render(images, 16)[torch.arange(2)[:, None], index])


def test_bfloat16_images_are_sampled_in_float32():
    images = noise(2, 64, 64, dtype=torch.bfloat16)
    views = draw_boxes(images, 16, CROP, seed=0)
    expected = views.render(images.double(), 64)
    assert (views.render(images, 64).double() - expected).abs().max() <= 2**-8  # one rounding of the result, below 1


@pytest.mark.parametrize("size", [5, 7])
def test_gradients_by_the_images(size):
    images = noise(2, 5, 5).requires_grad_()
    views = draw_boxes(images, 3, CROP, seed=4)
    assert torch.autograd.gradcheck(lambda x: views.render(x, size), images)


def test_a_gradient_goes_through_an_inner_step():
    """What an attack through a defence needs: views, a gradient with its graph by a parameter, then by the images."""
    images = noise(1, 4, 4).requires_grad_()
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    views = draw_boxes(images, 4, CROP, seed=0)

    def tuned(x):
        loss = (views.render(x, 6) * weight[:, None, None]).square().sum()
        return torch.autograd.grad(loss, weight, create_graph=True)[0].sum()

    assert torch.autograd.gradcheck(tuned, images)
