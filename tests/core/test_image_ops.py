"""Image operations on batches, each against torchvision, torch or an answer by hand."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from spice_ray.core import augment, image_ops, order
from tests.core.photos import photos

KEY = order.stream_key(0, "test", 0)


def crop(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    return image_ops.resized_crop(images, image_ops.crop_taps(boxes, flips, images.shape[-1]))


@pytest.mark.parametrize("side", [2, 9, 32, 37])
def test_the_whole_image_as_a_crop_is_the_image(side):
    images = photos(3, side)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)
    assert torch.equal(crop(images, whole, torch.zeros(3, dtype=torch.bool)), images.float())
    assert torch.equal(crop(images, whole, torch.ones(3, dtype=torch.bool)), images.flip(-1).float())


@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 16, 16), (5, 8, 20, 24), (3, 1, 9, 30)])
def test_a_crop_on_pixel_borders_is_torchvisions_but_for_its_edge(top, left, height, width):
    images = photos(2, 32)
    box = torch.tensor([[top, left, height, width]]).expand(2, 4) / 32
    result = crop(images, box, torch.zeros(2, dtype=torch.bool)) / 255
    expected = reference.resized_crop(images / 255, top, left, height, width, [32, 32], antialias=False)
    torch.testing.assert_close(result[:, :, 3:-3, 3:-3], expected[:, :, 3:-3, 3:-3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [9, 32, 96])
def test_any_crop_is_the_bilinear_sampling_of_torch(side):
    images = torch.randint(0, 256, (40, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    boxes, flips = augment.crop_boxes(torch.arange(40), KEY, 0.2), augment.coin(torch.arange(40), KEY, "flip", 0.5)
    boxes[0], boxes[1], boxes[2] = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.0, 0, 1, 1]])
    centers = ((torch.arange(side, dtype=torch.float64) + 0.5) * 2 / side - 1)[None]
    top, left, height, width = boxes.double()[:, :, None].unbind(1)
    across = torch.where(flips[:, None], -centers, centers) * width + (left * 2 + width - 1)
    down = centers * height + (top * 2 + height - 1)
    grid = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), dim=3)
    expected = torch.nn.functional.grid_sample(images.double(), grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(crop(images, boxes, flips).double(), expected, rtol=0, atol=6e-3)  # of 255


def test_columns_of_a_crop_are_mixed_without_rounding():
    images = torch.randint(0, 256, (30, 3, 37, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    boxes = augment.crop_boxes(torch.arange(30), KEY, 0.2)
    boxes[:, 0], boxes[:, 2] = 0, 1  # all rows, each as it is
    taps = image_ops.crop_taps(boxes, torch.zeros(30, dtype=torch.bool), 37)
    left, right = (
        images.double().gather(3, taps.columns[:, k, None, None].expand_as(images))
        * taps.column_shares[:, k, None, None]
        for k in (0, 1)
    )
    assert torch.equal(image_ops.resized_crop(images, taps).double(), left + right)
    assert torch.equal((taps.column_shares * (1 << 16)).frac(), torch.zeros(30, 2, 37))


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
