"""The 14 operations of the strong view against torchvision's, and what is drawn of them."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from spice_ray.core import augment, operations, order
from tests.core.photos import photos

KEY = order.stream_key(0, "test", 0)
MANY = torch.arange(20_000)


def assert_within_one_level(result: Tensor, expected: Tensor, most_different: float) -> None:
    difference = (result.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= most_different


def apply_one(name: str, images: Tensor, strength: float) -> Tensor:
    index = torch.full((len(images),), operations.OPERATIONS.index(name))
    return operations.apply_operations(images.clone(), index, torch.full((len(images),), strength))


def hostile_photos() -> Tensor:
    """Gradients, and an image of one colour, a black one, one of two levels, one with a rare bright pixel."""
    images = photos(8, 24)
    images[0], images[1] = 77, 0
    images[2] = (images[2] > 100) * 255
    images[3], images[3, 1, 5, 5] = 10, 250
    return images


@pytest.mark.parametrize("strength", [0.0, 0.31, 0.5, 0.99])
@pytest.mark.parametrize("name", ["identity", "autocontrast", "equalize", "solarize", "posterize"])
def test_tone_operations_are_torchvisions(name, strength):
    images = hostile_photos()
    expected = {
        "identity": lambda: images,
        "autocontrast": lambda: reference.autocontrast(images),
        "equalize": lambda: reference.equalize(images),
        "solarize": lambda: reference.solarize(images, 256 * strength),
        "posterize": lambda: reference.posterize(images, 4 + int(4 * strength)),
    }[name]()
    result = apply_one(name, images, strength)
    if name == "autocontrast":  # a quotient on the edge of a level
        assert_within_one_level(result, expected, most_different=0.01)
    else:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("strength", [0.0, 0.31, 0.5, 0.99])
@pytest.mark.parametrize("name", ["brightness", "contrast", "color", "sharpness"])
def test_enhancers_are_torchvisions_with_factors_from_005_to_095(name, strength):
    images, factor = hostile_photos(), 0.05 + 0.9 * strength
    adjust = {
        "brightness": reference.adjust_brightness,
        "contrast": reference.adjust_contrast,
        "color": reference.adjust_saturation,
        "sharpness": reference.adjust_sharpness,
    }[name]
    assert_within_one_level(apply_one(name, images, strength), adjust(images, factor), most_different=0.02)


@pytest.mark.parametrize("strength", [0.03, 0.21, 0.5, 0.77, 0.97])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_geometry_is_torchvisions_at_the_nearest_pixel(name, strength):
    images, amount = photos(5, 31), strength * 2 - 1
    moves = {
        "rotate": ([30.0 * amount, 0, 0], [0, 0], None),
        "shear_x": ([0, math.degrees(math.atan(0.1 * amount)), 0], [0, 0], [0, 0]),
        "shear_y": ([0, 0, math.degrees(math.atan(0.1 * amount))], [0, 0], [0, 0]),
        "translate_x": ([0, 0, 0], [-3.1 * amount, 0], None),
        "translate_y": ([0, 0, 0], [0, -3.1 * amount], None),
    }
    (angle, shear_x, shear_y), shift, center = moves[name]
    # torchvision counts angles clockwise and shifts what is written, not where it is read.
    result = apply_one(name, images, strength)
    expected = reference.affine(
        images,
        angle=-angle,
        translate=shift,
        scale=1.0,
        shear=[shear_x, shear_y],
        center=center,
        interpolation=InterpolationMode.NEAREST,
        fill=0,
    )
    different = (result != expected).any(1).float().mean()
    assert different < 0.005


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_geometry_of_no_amount_is_the_image_and_of_much_brings_in_black(name):
    images = photos(4, 32).clamp(min=1)
    assert torch.equal(apply_one(name, images, 0.5), images)
    assert (apply_one(name, images, 0.0) == 0).any()


def test_operations_of_one_batch_do_not_touch_each_others_rows():
    images, index = photos(28, 20), torch.arange(28) % 14
    strength = order.uniform(KEY, torch.arange(28))[:, 0]
    together = operations.apply_operations(images.clone(), index, strength)
    for i in range(28):
        row = slice(i, i + 1)
        assert torch.equal(together[row], operations.apply_operations(images[row].clone(), index[row], strength[row]))
    assert torch.equal(together[::14], images[::14])


def test_operations_are_drawn_evenly_and_independently_of_their_strength():
    drawn, strengths = augment.drawn_operations(MANY, KEY)
    for slot in range(4):
        counts = torch.bincount(drawn[:, slot], minlength=14)
        assert len(counts) == 14
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
        assert stats.kstest(strengths[:, slot].numpy(), "uniform").pvalue > 1e-3
        assert stats.kstest(strengths[drawn[:, slot] == 9, slot].numpy(), "uniform").pvalue > 1e-3
    pairs = torch.bincount(drawn[:, 0] * 14 + drawn[:, 1], minlength=196)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("side", "most"), [(8, 4), (32, 16), (96, 32)])
def test_holes_have_every_side_up_to_half_the_image_about_every_pixel(side, most):
    boxes = augment.cutout_boxes(MANY, KEY, side)
    assert stats.chisquare(torch.bincount(boxes[:, 2], minlength=most + 1)[1:].numpy()).pvalue > 1e-3
    assert int(boxes[:, 2].max()) == most
    for k in (0, 1):
        centers = boxes[:, k] + boxes[:, 2] // 2
        assert stats.chisquare(torch.bincount(centers, minlength=side).numpy()).pvalue > 1e-3
