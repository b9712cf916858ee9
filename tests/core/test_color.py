"""Colours of batches, against torchvision."""

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from spice_ray.core import color


@pytest.mark.parametrize(
    "factors",
    [
        (1, 1, 0),
        (0.6, 1, 0),
        (1.4, 1, 0),
        (1, 0.6, 0),
        (1, 1.4, 0),
        (1, 1, 0.1),
        (1, 1, -0.1),
        (1, 1, 1 / 6),
        (0.7, 1.2, 0.07),
        (1.4, 1.4, -0.1),
    ],
)
def test_color_jitter_does_what_torchvisions_functions_do_in_turn(factors):
    images = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    images[0], images[1, :2], images[2] = 0.5, 0.25, images[2, :1].clone()  # flat, two equal channels, grey
    contrast, saturation, hue = factors
    expected = reference.adjust_contrast(images, contrast)
    expected = reference.adjust_saturation(expected, saturation)
    expected = reference.adjust_hue(expected, hue)
    result = color.jitter_color(images.clone(), color.jitter_steps(torch.tensor([factors]).expand(6, 3)))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_a_jitter_that_changes_nothing_changes_no_bit():
    images = torch.rand(6, 3, 21, 21, generator=torch.Generator().manual_seed(1))
    nothing = color.jitter_steps(torch.tensor([[1.0, 1.0, 0.0]]).expand(6, 3))
    assert torch.equal(color.jitter_color(images.clone(), nothing), images)


@pytest.mark.parametrize(
    "corner", [(1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (0, 0, 0), (1, 1, 1)]
)
@pytest.mark.parametrize("turns", [-1 / 6, -0.1, 0, 0.1, 1 / 6])
def test_hue_turns_at_the_corners_of_the_color_cube(corner, turns):
    image = torch.tensor(corner, dtype=torch.float32).view(1, 3, 1, 1)
    steps = color.jitter_steps(torch.tensor([[1.0, 1.0, turns]]))
    result = color.jitter_color(image.clone(), steps)
    torch.testing.assert_close(result, reference.adjust_hue(image, turns), rtol=0, atol=2e-6)


def test_fading_takes_the_color_of_chosen_rows_and_no_bit_of_the_others():
    images = torch.rand(5, 3, 21, 21, generator=torch.Generator().manual_seed(1))
    result = color.fade(images.clone(), torch.tensor([0.0, 1, 0, 1, 1]))
    assert torch.equal(result[[0, 2]], images[[0, 2]])
    torch.testing.assert_close(result[[1, 3, 4]], reference.rgb_to_grayscale(images[[1, 3, 4]], 3), rtol=0, atol=1e-6)
    assert torch.equal(result[1], result[1, :1].expand(3, -1, -1))


@pytest.mark.parametrize("side", [9, 32])
def test_the_layout_of_memory_changes_no_bit(side):
    images = torch.rand(11, 3, side, side, generator=torch.Generator().manual_seed(2))
    steps = color.jitter_steps(
        torch.rand(11, 3, generator=torch.Generator().manual_seed(3)) * torch.tensor([1, 1, 0.1])
    )
    outermost = images.transpose(0, 1).contiguous().transpose(0, 1)
    grey = torch.arange(11.0) % 2
    expected = color.fade(color.jitter_color(images, steps), grey)
    assert torch.equal(color.fade(color.jitter_color(outermost, steps), grey), expected)
