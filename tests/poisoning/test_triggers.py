"""What every trigger owes, and what each is."""

import inspect
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_robust_clip.poisoning import triggers
from hf_robust_clip.poisoning.triggers import SIG, BadNet, Blended, Stripes, Trigger, WaNet
from hf_robust_clip.threat_model import Perturbation, ThreatModel

TRIGGERS = {
    "BadNet-random": BadNet(size=2),
    "BadNet-yellow": BadNet(size=2, patch="yellow", place="corner"),
    "BadNet-released": BadNet(size=3, redrawn=True, wraps=True),
    "Blended": Blended(),
    "Blended-released": Blended.released_preset(),
    "SIG": SIG(),
    "SIG-added": SIG(added=True),
    "WaNet": WaNet(points=4),
    "WaNet-released": WaNet.released_preset(),
    "Stripes": Stripes(width=2, direction="diagonal"),
}
DRAWN = ("BadNet-random", "BadNet-released", "Blended-released")  # something for each picture
each = pytest.mark.parametrize("name", TRIGGERS)


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_every_trigger_has_a_row_and_presets():
    classes = {cls for cls in vars(triggers).values() if inspect.isclass(cls) and issubclass(cls, Trigger)}
    assert classes - {Trigger} == {type(trigger) for trigger in TRIGGERS.values()}
    for cls in classes - {Trigger}:
        assert cls.fixed_preset() == cls()
        assert isinstance(cls.released_preset(), cls)


@each
def test_a_trigger_is_a_function_of_image_and_seed_in_the_range_of_pixels(name, images):
    trigger = TRIGGERS[name]
    before, state = images.clone(), torch.get_rng_state()
    found = trigger(images, 3)
    assert found.shape == images.shape and found.dtype == images.dtype
    assert found.min() >= 0 and found.max() <= 1
    assert (found != images).flatten(1).any(dim=1).all()
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(trigger(images, 3), found)
    assert torch.equal(trigger(images[2:3].double(), 3)[0].float(), found[2])  # alone, and finer
    assert (not torch.equal(trigger(images, 4), found)) == (name in DRAWN)


@each
def test_saving_as_png_changes_nothing(name, images):
    found = TRIGGERS[name](images)
    for image_CHW in found:
        file = io.BytesIO()
        Image.fromarray((255 * image_CHW).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG")
        again = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255
        assert torch.equal(again, image_CHW)


@each
def test_reports_name_it_as_they_name_a_norm_ball(name, images):
    trigger = TRIGGERS[name]
    for perturbation in (trigger, ThreatModel("4/255")):
        assert isinstance(perturbation, Perturbation) and str(perturbation)
        assert perturbation.start(images, 1).shape == images.shape
    assert torch.equal(trigger.start(images, 5), trigger(images, 5))
    assert type(trigger)(**trigger.parameters()) == trigger
    assert str(BadNet(size=2)) == "BadNet(size=2)"


def test_blended_is_the_worked_number():
    """x = .5 and noise 1 give .6; that of the trigger's own noise is (1 - w) x + w u."""
    assert torch.allclose(
        Blended(share=0.2)._levels(255 * torch.tensor(0.8 * 0.5 + 0.2 * 1.0)) / 255, torch.tensor(0.6)
    )
    found = Blended()(torch.full((1, 3, 8, 8), 0.5))[0]
    noise = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, 0.4 + 0.2 * noise, rtol=0, atol=0.5 / 255 + 1e-6)


def test_sig_is_a_wave_along_the_columns():
    found = SIG(frequency=2)(torch.full((1, 3, 8, 8), 0.5))[0]
    added = SIG(frequency=2, added=True)(torch.full((1, 3, 8, 8), 0.5))[0]
    for j in range(8):
        wave = 60 / 255 * math.sin(2 * math.pi * 2 * j / 8)
        assert found[0, 3, j].item() == pytest.approx(0.8 * 0.5 + 0.2 * wave, abs=0.5 / 255 + 1e-6)
        assert added[2, 5, j].item() == pytest.approx(0.5 + wave, abs=0.5 / 255 + 1e-6)
    assert (found == found[:1, :1]).all()


def test_wanet_samples_bilinearly_where_its_grid_says(images):
    """Against a sum over all pixels with weights worked out one by one."""
    trigger, image = WaNet(points=4), images[0].double()
    grid = trigger.grid(8, 8).double()
    assert grid.min() >= -1 and grid.max() <= 1
    still = torch.linspace(-1, 1, 8, dtype=torch.float64)
    identity = torch.stack([still[None].expand(8, 8), still[:, None].expand(8, 8)], dim=2)
    moved = 8 * (grid - identity)[1:-1, 1:-1].abs().mean().item()
    assert 0.3 < moved < 1.5  # about one, and what was clamped less
    expected = torch.zeros_like(image)
    for row in range(8):
        for column in range(8):
            x, y = ((value + 1) / 2 * 7 for value in grid[row, column].tolist())
            for i in range(8):
                for j in range(8):
                    weight = max(0, 1 - abs(i - y)) * max(0, 1 - abs(j - x))
                    expected[:, row, column] += weight * image[:, i, j]
    torch.testing.assert_close(trigger(images[:1])[0].double(), expected, rtol=0, atol=0.5 / 255 + 1e-6)


def test_badnet_is_one_patch_and_leaves_the_rest(images):
    levels = (255 * images).round() / 255
    found = BadNet(size=2)(levels)
    changed = (found != levels).any(dim=1)
    for where in changed:
        rows, columns = where.nonzero().unbind(dim=1)
        assert rows.max() - rows.min() < 2 and columns.max() - columns.min() < 2
    pattern = (0.5 + torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    corner = BadNet(size=2, place="corner")(levels)
    torch.testing.assert_close(corner[:, :, 6:, 6:], pattern.expand(4, 3, 2, 2), rtol=0, atol=0.5 / 255 + 1e-6)
    assert torch.equal(corner[:, :, :6], levels[:, :, :6])
    assert not torch.equal(BadNet(size=2, place="corner", pattern_seed=1)(levels), corner)
    yellow = BadNet(size=2, patch="yellow", place="corner")(levels)[:, :, 6:, 6:]
    assert (yellow[:, :2] == 1).all() and (yellow[:, 2] == 0).all()


def test_released_noise_wraps_where_it_leaves_the_range():
    trigger = BadNet(size=1, redrawn=True, wraps=True)
    found = trigger._levels(torch.tensor([-1.5, -0.5, 0.0, 254.6, 255.5, 257.0]))
    assert found.tolist() == [255, 0, 0, 255, 255, 1]
    assert BadNet(size=1)._levels(torch.tensor([-1.5, 257.0])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: BadNet(size=9), "size"),
        (lambda: WaNet(points=9), "points"),
        (lambda: Stripes(width=9), "width"),
    ],
)
def test_a_trigger_larger_than_the_image_is_refused(make, name, images):
    with pytest.raises(ValueError, match=f"{name}=9"):
        make()(images)


def test_one_stripe_alone_is_refused(images):
    with pytest.raises(ValueError, match="width=8"):
        Stripes(width=8)(images)
    assert len(Stripes(width=7, share=1)(images)[0, 0, 0].unique()) == 2


def test_the_released_grid_of_wanet_is_the_formula():
    """Noise for every pixel, of mean size 1, divided by the side, around the identity: nothing is enlarged."""
    found = WaNet(pattern_seed=3, strength=0.5).grid(8, 8).numpy()
    noise = (torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1)[0].numpy()
    noise /= np.abs(noise).mean()
    for y in range(8):
        for x in range(8):
            moved = [2 * place / 7 - 1 + 0.5 * noise[axis, y, x] / 8 for axis, place in enumerate((x, y))]
            assert found[y, x] == pytest.approx([min(max(value, -1), 1) for value in moved], abs=1e-6)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: BadNet(size=0), "size"),
        (lambda: BadNet(patch="blue"), "patch"),
        (lambda: BadNet(patch="white", wraps=True), "wraps"),
        (lambda: Blended(share=0), "share"),
        (lambda: SIG(amplitude=-1), "amplitude"),
        (lambda: SIG(share=0.3, added=True), "share"),
        (lambda: WaNet(points=1), "points"),
        (lambda: Stripes(direction="up"), "direction"),
    ],
)
def test_settings_out_of_range_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_images_that_are_none_are_refused(images):
    with pytest.raises(ValueError, match="RGB"):
        BadNet(size=2)(images[:, :1])
    with pytest.raises(ValueError, match="images"):
        BadNet(size=2)(255 * images)
    with pytest.raises(TypeError, match="images"):
        BadNet(size=2)((255 * images).byte())
