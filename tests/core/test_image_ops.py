"""Image operations on batches, each against torchvision, torch or an answer by hand."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from spice_ray.core import augment, image_ops, order

KEY = order.stream_key(0, "test", 0)


def photos(count: int, side: int, seed: int = 0) -> Tensor:
    """Smooth colourful gradients with some noise, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 230
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    return (smooth + torch.rand(count, 3, side, side, generator=generator) * 25).to(torch.uint8)


def test_the_whole_image_as_a_crop_is_the_image():
    images = photos(3, 32) / 255
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)
    kept = image_ops.resized_crop(images, whole, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(kept, images, rtol=0, atol=2e-5)
    mirrored = image_ops.resized_crop(images, whole, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(mirrored, images.flip(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 16, 16), (5, 8, 20, 24), (3, 1, 9, 30)])
def test_a_crop_on_pixel_borders_is_torchvisions_but_for_its_edge(top, left, height, width):
    images = photos(2, 32) / 255
    box = torch.tensor([[top, left, height, width]]).expand(2, 4) / 32
    result = image_ops.resized_crop(images, box, torch.zeros(2, dtype=torch.bool))
    expected = reference.resized_crop(images, top, left, height, width, [32, 32], antialias=False)
    torch.testing.assert_close(result[:, :, 3:-3, 3:-3], expected[:, :, 3:-3, 3:-3], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "factors",
    [
        (1, 1, 1, 0),
        (0.6, 1, 1, 0),
        (1.4, 1, 1, 0),
        (1, 0.6, 1, 0),
        (1, 1.4, 1, 0),
        (1, 1, 0.6, 0),
        (1, 1, 1.4, 0),
        (1, 1, 1, 0.1),
        (1, 1, 1, -0.1),
        (1.3, 0.7, 1.2, 0.07),
    ],
)
def test_color_jitter_does_what_torchvisions_functions_do_in_turn(factors):
    images = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    images[0], images[1, :2], images[2] = 0.5, 0.25, images[2, :1].clone()  # flat, two equal channels, grey
    brightness, contrast, saturation, hue = factors
    expected = reference.adjust_brightness(images, brightness)
    expected = reference.adjust_contrast(expected, contrast)
    expected = reference.adjust_saturation(expected, saturation)
    expected = reference.adjust_hue(expected, hue)
    result = image_ops.jitter_color(images.clone(), torch.tensor([factors]).expand(6, 4).float())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "color", [(1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (0, 0, 0), (1, 1, 1)]
)
@pytest.mark.parametrize("turns", [-1 / 6, -0.1, 0, 0.1, 1 / 6])
def test_hue_turns_at_the_corners_of_the_color_cube(color, turns):
    image = torch.tensor(color, dtype=torch.float32).view(1, 3, 1, 1)
    result = image_ops.shift_hue(image.clone(), torch.tensor([turns]))
    torch.testing.assert_close(result, reference.adjust_hue(image, turns), rtol=0, atol=2e-6)


@pytest.mark.parametrize("side", [40, 64, 96])
def test_blur_is_torchvisions_with_each_rows_width(side):
    images, sigmas = photos(4, side) / 255, torch.tensor([0.1, 0.5, 1.3, 2.0])
    width = 2 * (side // 20) + 1
    expected = torch.stack(
        [
            reference.gaussian_blur(image, [width, width], [sigma, sigma])
            for image, sigma in zip(images, sigmas.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(image_ops.gaussian_blur(images, sigmas), expected, rtol=0, atol=1e-5)


def test_a_quarter_turn_is_exact():
    angle = torch.full((2,), math.pi / 2, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    zero = torch.zeros(2, dtype=torch.float64)
    matrix = torch.stack((torch.stack((cos, -sin, zero), 1), torch.stack((sin, cos, zero), 1)), 1).float()
    images = photos(2, 10).float()
    assert torch.equal(image_ops.warp(images, matrix, mode="nearest"), images.rot90(1, (2, 3)))


def test_cutout_sets_one_square_to_zero_and_nothing_else():
    boxes = torch.tensor([[2, 3, 4], [-2, 7, 5], [9, 9, 1], [8, -1, 5]])
    expected = torch.ones(4, 3, 10, 10)
    for row, (top, left, side) in zip(expected, boxes.tolist(), strict=True):
        row[:, max(0, top) : top + side, max(0, left) : left + side] = 0
    assert torch.equal(image_ops.cut_out(torch.ones(4, 3, 10, 10), boxes), expected)


def test_warp_reads_where_the_matrix_and_the_field_say():
    images = photos(2, 16).float()
    one_right = torch.tensor([[[1.0, 0, 2 / 16], [0, 1, 0]]]).expand(2, -1, -1)
    expected = torch.zeros_like(images)
    expected[..., :-1] = images[..., 1:]
    torch.testing.assert_close(image_ops.warp(images, one_right), expected, rtol=0, atol=1e-3)
    back = torch.zeros(2, 2, 16, 16)
    back[:, 0] = -2 / 16
    torch.testing.assert_close(image_ops.warp(images, one_right, back), images, rtol=0, atol=1e-3)


def test_warp_is_the_affine_grid_of_torch():
    images, matrices = photos(8, 17).float(), augment.warp_matrices(torch.arange(8), KEY, augment.DIGITS_STRONG)
    grid = torch.nn.functional.affine_grid(matrices, [8, 3, 17, 17], align_corners=False)
    expected = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    torch.testing.assert_close(image_ops.warp(images, matrices), expected, rtol=0, atol=2e-2)


def test_elastic_field_is_a_bicubic_interpolation():
    points = augment.elastic_points(torch.arange(5), KEY)
    expected = torch.nn.functional.interpolate(points, size=(16, 16), mode="bicubic", align_corners=True)
    torch.testing.assert_close(image_ops.elastic_field(points, 16), expected, rtol=0, atol=1e-6)


def test_elastic_points_are_gaussian():
    points = augment.elastic_points(torch.arange(2000), KEY).double().flatten()
    assert stats.kstest(points[:20_000].numpy(), "norm", (0, 0.08)).pvalue > 1e-3
