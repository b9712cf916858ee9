"""Views of images: rows to the bit, views against slow twins, parameters against their distributions."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from spice_ray.core import augment, image_ops, operations, order
from spice_ray.core.augment import Augmentation
from tests.core.photos import photos

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
KEY = order.stream_key(0, "test", 0)
MANY = torch.arange(20_000)
VIEWS = [(family, view) for family in ("natural", "digits", "none") for view in ("contrastive", "weak", "strong")]


def augmentation(family: str = "natural", **settings: float) -> Augmentation:
    return Augmentation(family, MEAN, STD, **settings)


def undo(images: Tensor) -> Tensor:
    return images * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)


@pytest.mark.parametrize("view", ["contrastive", "weak", "strong"])
def test_family_none_gives_plain_views(view):
    images, plain = photos(5, 16), augmentation("none").plain(photos(5, 16))
    assert torch.equal(getattr(augmentation("none"), view)(images, torch.arange(5), KEY), plain)


def test_plain_views_are_normalised_per_channel():
    images = photos(4, 16)
    expected = reference.normalize(images / 255, list(MEAN), list(STD))
    torch.testing.assert_close(augmentation().plain(images), expected, rtol=0, atol=2e-6)


# Natural images: contrastive


@pytest.mark.parametrize("least", [0.08, 0.2])
def test_crop_boxes_are_distributed_as_torchvisions(least):
    boxes = augment.crop_boxes(MANY, KEY, least).double().numpy()
    torch.manual_seed(0)
    canvas = torch.empty(1, 4000, 4000)
    drawn = [RandomResizedCrop.get_params(canvas, [least, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    twin = np.array(drawn) / 4000
    for ours, theirs in zip(boxes.T, twin.T, strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
    assert stats.ks_2samp(boxes[:, 2] * boxes[:, 3], twin[:, 2] * twin[:, 3]).pvalue > 1e-3
    assert stats.ks_2samp(boxes[:, 3] / boxes[:, 2], twin[:, 3] / twin[:, 2]).pvalue > 1e-3
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + 1e-6


def test_jitter_leaves_a_fifth_alone_and_is_uniform_otherwise():
    factors = augment.jitter_factors(MANY, KEY).double()
    applied = (factors != torch.tensor([1.0, 1, 1, 0])).any(1)
    assert stats.binomtest(int(applied.sum()), len(MANY), 0.8).pvalue > 1e-3
    for column, (low, high) in zip(factors[applied].T, [(0.6, 1.4)] * 3 + [(-0.1, 0.1)], strict=True):
        assert stats.kstest(column.numpy(), "uniform", (low, high - low)).pvalue > 1e-3


def test_a_fifth_of_the_contrastive_views_is_grey():
    views = undo(augmentation().contrastive(photos(1, 8).expand(2000, -1, -1, -1), torch.arange(2000), KEY))
    spread = (views.amax(1) - views.amin(1)).flatten(1).amax(1)
    grey = augment.coin(torch.arange(2000), KEY, "grey", 0.2)
    assert stats.binomtest(int(grey.sum()), 2000, 0.2).pvalue > 1e-3
    assert spread[grey].max() < 1e-6
    assert spread[~grey].min() > 1e-2


@pytest.mark.parametrize("share", [0.5, 0.1, 1])
def test_a_share_of_the_rows_is_blurred_with_uniform_widths(share):
    sigmas = augment.blur_sigmas(MANY, KEY, share).double()
    assert stats.binomtest(int((sigmas > 0).sum()), len(MANY), share).pvalue > 1e-3
    assert stats.kstest(sigmas[sigmas > 0].numpy(), "uniform", (0.1, 1.9)).pvalue > 1e-3


def roughness(images: Tensor) -> Tensor:
    return images.diff(dim=-1).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize(("share", "is_blurred"), [(0.5, True), (0, False)])
def test_views_are_blurred_where_that_is_wanted(share, is_blurred):
    draws = torch.arange(300)
    blurred = augment.blur_sigmas(draws, KEY, 0.5) > 1
    clear = augment.blur_sigmas(draws, KEY, 0.5) == 0
    noise = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(300, -1, -1, -1)
    rough = roughness(augmentation(blur=share).contrastive(noise, draws, KEY))
    assert bool(rough[blurred].mean() < 0.6 * rough[clear].mean()) is is_blurred


def test_a_view_shows_no_less_than_the_least_crop():
    ramp = torch.arange(256, dtype=torch.uint8).repeat(256, 1).expand(200, 3, -1, -1)

    def least_shown(least: float) -> float:
        views = undo(augmentation(blur=0, min_crop=least).contrastive(ramp, torch.arange(200), KEY))
        # Of views whose colours are not changed the range of values is the width of the crop.
        plain = (augment.jitter_factors(torch.arange(200), KEY) == torch.tensor([1.0, 1, 1, 0])).all(1)
        return float((views.amax((1, 2, 3)) - views.amin((1, 2, 3)))[plain].min())

    assert least_shown(1) > 0.98
    assert least_shown(0.08) < least_shown(0.2) < 0.7


@pytest.mark.parametrize("side", [32, 45])
def test_contrastive_views_are_torchvisions_operations_one_after_another(side):
    images, draws = photos(60, side), torch.arange(60)
    boxes, factors = augment.crop_boxes(draws, KEY, 0.2), augment.jitter_factors(draws, KEY).tolist()
    flips, grey = augment.coin(draws, KEY, "flip", 0.5), augment.coin(draws, KEY, "grey", 0.2)
    crops = image_ops.resized_crop(images, image_ops.crop_taps(boxes, flips, side)) / 255
    width = 2 * (side // 20) + 1
    twin = []
    for image, (brightness, contrast, saturation, hue), is_grey, sigma in zip(
        crops, factors, grey, augment.blur_sigmas(draws, KEY, 0.5).tolist(), strict=True
    ):
        image = reference.adjust_contrast(reference.adjust_brightness(image, brightness), contrast)
        image = reference.adjust_hue(reference.adjust_saturation(image, saturation), hue)
        image = reference.rgb_to_grayscale(image, 3) if is_grey else image
        image = reference.gaussian_blur(image, [width, width], [sigma, sigma]) if sigma > 0 else image
        twin.append(reference.normalize(image, list(MEAN), list(STD)))
    result = augmentation().contrastive(images, draws, KEY)
    torch.testing.assert_close(result, torch.stack(twin), rtol=0, atol=1e-4)


# Natural images: weak


@pytest.mark.parametrize("side", [8, 32, 37])
def test_weak_views_are_torchvisions_padded_crop_and_mirror_exactly(side):
    images, draws, pad = photos(50, side), torch.arange(50), side // 8
    shifts, flips = augment.crop_shifts(draws, KEY, pad), augment.coin(draws, KEY, "flip", 0.5)
    twin = []
    for image, (down, right), flip in zip(images, shifts.tolist(), flips.tolist(), strict=True):
        crop = reference.crop(reference.pad(image, [pad] * 4), pad + down, pad + right, side, side)
        twin.append(reference.horizontal_flip(crop) if flip else crop)
    assert torch.equal(augmentation().weak(images, draws, KEY), augmentation().plain(torch.stack(twin)))


def test_weak_shifts_take_every_value_equally_often():
    shifts = augment.crop_shifts(MANY, KEY, 4)
    for column in shifts.T:
        assert stats.chisquare(torch.bincount(column + 4, minlength=9).numpy()).pvalue > 1e-3
    assert int(shifts.min()) == -4
    assert int(shifts.max()) == 4
    assert augment.crop_shifts(MANY, KEY, 0).abs().max() == 0


def test_half_of_the_views_are_mirrored():
    flips = augment.coin(MANY, KEY, "flip", 0.5)
    assert stats.binomtest(int(flips.sum()), len(MANY), 0.5).pvalue > 1e-3


# Natural images: strong


def test_strong_views_are_the_operations_one_after_another():
    images, draws = photos(40, 32), torch.arange(40)
    (drawn, strengths), boxes = augment.drawn_operations(draws, KEY), augment.cutout_boxes(draws, KEY, 32)
    flips = augment.coin(draws, KEY, "flip", 0.5)
    twin = []
    for i in range(40):
        image = images[i : i + 1].flip(-1) if flips[i] else images[i : i + 1]
        for name, strength in zip(drawn[i].tolist(), strengths[i].tolist(), strict=True):
            image = operations.apply_operations(image.clone(), torch.tensor([name]), torch.tensor([strength]))
        twin.append(image_ops.cut_out(augmentation().plain(image), boxes[i : i + 1]))
    assert torch.equal(augmentation().strong(images, draws, KEY), torch.cat(twin))


# Digits


@pytest.mark.parametrize("most", [augment.DIGITS_STRONG, augment.DIGITS_WEAK])
def test_digit_warps_are_uniform_in_every_parameter(most):
    matrices = augment.warp_matrices(MANY, KEY, most).double()
    angle = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])
    scale = torch.hypot(matrices[:, 1, 0], matrices[:, 0, 0])
    shear = (matrices[:, 0, 1] * angle.cos() + matrices[:, 1, 1] * angle.sin()) / scale
    across, down = matrices[:, 0, 2] / 2, matrices[:, 1, 2] / 2
    ranges = [math.radians(most.degrees), most.log_scale, most.shear, most.shift, most.shift]
    for values, end in zip([angle, scale.log(), shear, across, down], ranges, strict=True):
        assert stats.kstest(values.numpy(), "uniform", (-end, 2 * end)).pvalue > 1e-3


@pytest.mark.parametrize("columns", [1, 2, 7])
def test_normal_numbers_are_normal_and_uncorrelated_within_a_row(columns):
    numbers = augment.normal(MANY, KEY, columns).double().numpy()
    assert numbers.shape == (len(MANY), columns)
    for column in numbers.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
        assert abs(column.std() - 1) < 0.03
    for one, other in pairwise(numbers.T):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.035


def test_intensity_is_a_power_and_a_gain():
    tables = augment.intensity_tables(MANY[:5000], KEY).double()[:, 0]
    assert (tables[:, 0] == 0).all()
    assert tables.max() <= 1
    assert (tables.diff(dim=1) >= 0).all()
    dark = tables[:, [16, 32]]  # below the clamp whatever was drawn
    gamma = (dark[:, 1] / dark[:, 0]).log() / math.log(2)
    gain = dark[:, 1] / (32 / 255) ** gamma
    assert stats.kstest(gamma.log().numpy(), "uniform", (-0.7, 1.4)).pvalue > 1e-3
    assert stats.kstest(gain.numpy(), "uniform", (0.72, 0.56)).pvalue > 1e-3


def test_noise_of_a_digit_is_gaussian_and_the_same_in_all_channels():
    black = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    views = undo(augmentation("digits").strong(black, torch.arange(400), KEY)).double()
    assert (views - views[:, :1]).abs().max() < 1e-6
    assert stats.kstest(views[:80, 0].flatten().numpy(), "norm", (0, 0.05)).pvalue > 1e-3


def test_a_digits_contrastive_view_is_its_strong_view():
    images, draws = photos(5, 16), torch.arange(5)
    digits = augmentation("digits")
    assert torch.equal(digits.contrastive(images, draws, KEY), digits.strong(images, draws, KEY))


def test_weak_digits_are_never_mirrored():
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[..., :5] = 255
    views = undo(augmentation("digits").weak(image.expand(200, -1, -1, -1), torch.arange(200), KEY))
    assert (views[..., :8].mean((1, 2, 3)) > views[..., 8:].mean((1, 2, 3)) + 0.3).all()
