import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from hf_robust_clip.checks import checked_images
from hf_robust_clip.threat_model import ThreatModel, parse_radius

SHAPE = (2, 3, 2, 2)
PIXELS = hnp.arrays(np.float64, SHAPE, elements=st.floats(0, 1))
ANYWHERE = hnp.arrays(np.float64, SHAPE, elements=st.floats(-100, 100))
RADII = st.floats(0, 0.99)


def lengths(change, norm):
    return change.abs().amax(dim=(1, 2, 3)) if norm == "linf" else change.square().sum(dim=(1, 2, 3)).sqrt()


# ---- radius, norm and bounds


@pytest.mark.parametrize(
    ("text", "radius"), [("4/255", 4 / 255), ("0.5", 0.5), (" 1 / 4 ", 0.25), (0.03, 0.03), (0, 0.0), ("1e-3", 1e-3)]
)
def test_radii_are_read(text, radius):
    assert parse_radius(text) == radius == ThreatModel(text).eps


@pytest.mark.parametrize("value", ["1/0", "abc", "", "1/2/3", "/255", None, "4 of 255"])
def test_unreadable_radii_are_refused(value):
    with pytest.raises(ValueError, match=r"eps=.*is not a number or a fraction; write it like '1/255'") as caught:
        ThreatModel(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, "-1/255", math.nan, "nan", math.inf, "inf"])
def test_radii_without_a_ball_are_refused(value):
    with pytest.raises(ValueError, match=r"eps=.*must be finite and at least 0"):
        ThreatModel(value)


def test_grey_levels_in_place_of_a_fraction_are_refused_with_the_mend():
    with pytest.raises(ValueError, match=r"eps=8 covers the whole pixel range.*'8/255'"):
        ThreatModel(8)
    assert ThreatModel(8, "l2").eps == 8  # an L2 ball may be that wide


@pytest.mark.parametrize("norm", ["L-inf", "l1", "linf ", None])
def test_unknown_norms_are_refused(norm):
    with pytest.raises(ValueError, match=r"norm=.*choose one of linf, l2"):
        ThreatModel(0.1, norm)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.5, 0.5)])
def test_empty_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds="):
        ThreatModel(0.1, bounds=bounds)


@pytest.mark.parametrize(
    ("threat_model", "text"),
    [
        (ThreatModel("4/255"), "L-inf eps=4/255"),
        (ThreatModel(0.01), "L-inf eps=0.01"),
        (ThreatModel(0.5, "l2"), "L2 eps=0.5"),
        (ThreatModel("255/510", "l2"), "L2 eps=0.5"),
    ],
)
def test_name_for_readers(threat_model, text):
    assert str(threat_model) == text


# ---- images


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (torch.full(SHAPE, torch.nan), ValueError, "contain NaN"),
        (torch.full(SHAPE, torch.inf), ValueError, "outside"),
        (torch.full(SHAPE, 1.001), ValueError, r"\[1.001, 1.001\], outside \[0.0, 1.0\].*Did you normalise"),
        (torch.full(SHAPE, -0.001), ValueError, "Normalisation is inside the model"),
        (torch.full(SHAPE, 255.0), ValueError, r"leave them in 0\.\.255"),
        (torch.zeros(SHAPE, dtype=torch.uint8), TypeError, "floating-point tensor.*got torch.uint8"),
        (np.zeros(SHAPE), TypeError, "got ndarray"),
        (torch.zeros(3, 2, 2), ValueError, r"\(batch, channels, height, width\), got \(3, 2, 2\)"),
    ],
)
def test_unfit_images_are_refused(images, error, text):
    with pytest.raises(error, match=text) as caught:
        checked_images(images, "pictures")
    assert str(caught.value).startswith("pictures")


def test_one_nan_among_good_values_is_found():
    images = torch.rand(SHAPE)
    images[1, 2, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        checked_images(images)


def test_whole_range_and_empty_batches_pass():
    checked_images(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
    checked_images(torch.zeros(0, 3, 2, 2))
    checked_images(torch.full(SHAPE, -1.0), bounds=(-1.0, 1.0))


# ---- projection and steps


@pytest.mark.parametrize("norm", ["linf", "l2"])
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_projection_lands_in_ball_and_bounds_and_stays(norm, data):
    images, adv = torch.from_numpy(data.draw(PIXELS)), torch.from_numpy(data.draw(ANYWHERE))
    threat_model = ThreatModel(data.draw(RADII), norm)
    projected = threat_model.project(adv, images)
    assert (lengths(projected - images, norm) <= threat_model.eps * (1 + 1e-12) + 1e-15).all()
    assert projected.min() >= 0
    assert projected.max() <= 1
    torch.testing.assert_close(threat_model.project(projected, images), projected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@settings(deadline=None, max_examples=100)
@given(images=PIXELS, share=st.floats(0, 1), other=PIXELS, radius=st.floats(1e-3, 0.99))
def test_projection_leaves_points_of_the_ball_alone(norm, images, share, other, radius):
    images, other = torch.from_numpy(images), torch.from_numpy(other)
    change = other - images
    change = change * (share * 0.999 * radius / lengths(change, norm).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)
    inside = images + change
    torch.testing.assert_close(ThreatModel(radius, norm).project(inside, images), inside, rtol=0, atol=1e-15)


def test_projection_is_the_nearest_point_in_the_open():
    """Away from the bounds: values are cut for L-inf, the whole change is shortened for L2."""
    images = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    adv = images + torch.tensor([0.3, -0.4], dtype=torch.float64)
    linf = ThreatModel(0.1).project(adv, images) - images
    assert linf.flatten().tolist() == pytest.approx([0.1, -0.1], abs=1e-15)
    l2 = ThreatModel(0.1, "l2").project(adv, images) - images
    assert l2.flatten().tolist() == pytest.approx([0.06, -0.08], abs=1e-15)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-25, 1e-37])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_step_length_does_not_depend_on_the_size_of_the_gradient(norm, scale):
    """A saturated softmax gives float32 gradients whose squares underflow; the step must be as long as ever."""
    images = torch.full((1, 3, 4, 4), 0.5)
    grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    threat_model = ThreatModel(0.4, norm)
    moved = threat_model.ascend(images, scale * grad, images, 0.01)
    torch.testing.assert_close(moved, threat_model.ascend(images, grad, images, 0.01), rtol=0, atol=1e-6)
    assert lengths(moved - images, norm).item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_gradient_moves_nothing(norm):
    images = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ThreatModel(0.1, norm).ascend(images, torch.zeros(SHAPE), images, 0.05), images)


# ---- random start


def grey_images(count, seed=0):
    """Distinct images far enough from the bounds that no draw is clamped."""
    return 0.4 + 0.2 * torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def neighbours(count):
    """Images that differ from one another by one grey level of one value: the hardest inputs for a hash of pixels."""
    images = torch.full((count, 3, 4, 4), 0.5, dtype=torch.float64)
    for i in range(1, count):
        images[i].view(-1)[i % 48] += (1 + i // 48) / 2550
    return images


def noise(threat_model, images, seed=0):
    return ((threat_model.random_start(images, seed) - images) / threat_model.eps).flatten(1)


@pytest.mark.parametrize("make_images", [grey_images, neighbours])
def test_linf_noise_is_uniform(make_images):
    draws = noise(ThreatModel(0.25), make_images(4000))
    count, values = draws.shape
    assert draws.abs().max() <= 1 + 1e-12
    assert stats.kstest(draws.flatten().numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3
    per_value_z = draws.mean(0) * math.sqrt(3 * count)  # variance of one draw: 1/3
    assert per_value_z.abs().max() < 4.5
    per_image_z = draws.mean(1) * math.sqrt(3 * values)
    assert per_image_z.std().item() == pytest.approx(1, abs=0.05)
    assert ((draws.square().mean(0) - 1 / 3) * math.sqrt(count * 45 / 4)).abs().max() < 4.5  # var of u^2: 4/45


@pytest.mark.parametrize("make_images", [grey_images, neighbours])
def test_draws_of_images_pixels_and_seeds_are_uncorrelated(make_images):
    images = make_images(4000)
    threat_model = ThreatModel(0.25)
    draws = noise(threat_model, images) * math.sqrt(3)

    def z(first, second):
        product = first * second
        return abs(product.mean().item()) * math.sqrt(product.numel())

    assert z(draws[1:], draws[:-1]) < 4
    assert z(draws[48:], draws[:-48]) < 4
    assert z(draws[:, 1:], draws[:, :-1]) < 4
    matrix = torch.corrcoef(draws.T) - torch.eye(draws.shape[1], dtype=draws.dtype)
    assert matrix.abs().max() * math.sqrt(len(draws)) < 5  # every pair of the 48 values
    for other in (1, 2, 2**32, -1):
        assert z(draws, noise(threat_model, images, other) * math.sqrt(3)) < 4


def test_l2_noise_is_uniform_in_the_ball():
    """||delta / eps||^d is uniform on [0, 1], the direction has no favourite, and the two are independent."""
    draws = noise(ThreatModel(0.3, "l2"), grey_images(4000))
    count, d = draws.shape
    radii = draws.norm(dim=1)
    assert stats.kstest((radii**d).numpy(), "uniform").pvalue > 1e-3
    directions = draws / radii[:, None]
    assert (directions.mean(0) * math.sqrt(d * count)).abs().max() < 4.5
    # one coordinate of a uniform direction: its square is Beta(1/2, (d - 1)/2)
    assert stats.kstest(directions[:, 7].square().numpy(), "beta", args=(0.5, (d - 1) / 2)).pvalue > 1e-3
    matrix = torch.corrcoef(torch.cat([directions, (radii**d)[:, None]], dim=1).T)
    assert (matrix - torch.eye(d + 1, dtype=matrix.dtype)).abs().max() * math.sqrt(count) < 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_draw_ignores_batch_place_layout_and_global_seed(norm):
    threat_model, images = ThreatModel(0.2, norm), grey_images(9)
    torch.manual_seed(0)
    together = threat_model.random_start(images, 5)
    torch.manual_seed(1)
    backwards = threat_model.random_start(images.flip(0), 5).flip(0)
    strided = threat_model.random_start(images.contiguous(memory_format=torch.channels_last), 5)
    alone = torch.cat([threat_model.random_start(image[None], 5) for image in images])
    assert torch.equal(together, backwards)
    assert torch.equal(together, strided)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_draws_are_clamped_to_the_bounds(norm):
    images = torch.zeros(50, 3, 4, 4, dtype=torch.float64)
    images[:, 0] = 1
    start = ThreatModel(0.3, norm).random_start(images, 0)
    assert start.min() >= 0
    assert start.max() <= 1
    assert (start != images).any()


def test_equal_images_draw_alike_and_others_differ():
    images = grey_images(2)[[0, 0, 1]]
    draws = noise(ThreatModel(0.2), images)
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])
