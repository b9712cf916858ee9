"""The 14 operations of SPICE's strong view, on uint8 images as PIL and torchvision define them.

The published list is SCAN's variant of RandAugment (Cubuk et al. 2020): operations are drawn with replacement and the
strength is uniform in a range of each operation. Here a batch needs three passes, whatever its rows drew: operations on
single levels are one table of 256 entries, geometry is one matrix, and the two others mix in a softened image.

B rows of a batch, S side of an image in pixels. Images are uint8, (B, 3, S, S); operation holds indices into
OPERATIONS, int64, (B,); strength is in [0, 1), float32, (B,).
"""

import math

import torch
from torch import Tensor

from spice_ray.core.color import blend, luma
from spice_ray.core.image_ops import look_up, replace_rows, warp

OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "solarize",  # threshold 0 to 256
    "posterize",  # 4 to 7 bits: the published 4 to 8 are cut to an integer
    "brightness",  # factors 0.05 to 0.95, as for the three others of PIL's enhancers
    "contrast",
    "color",
    "sharpness",
    "rotate",  # +-30 degrees
    "shear_x",  # +-0.1, as the other two pairs
    "shear_y",
    "translate_x",
    "translate_y",
)
"""What a strong view draws from."""
_COLOR, _SHARPNESS, _ROTATE = (OPERATIONS.index(name) for name in ("color", "sharpness", "rotate"))


def apply_operations(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Apply to each image its own operation; writes over ``images`` on the CPU."""
    images = replace_rows(images, (operation > 0) & (operation < _COLOR), _change_tones, images, operation, strength)
    images = replace_rows(images, operation == _COLOR, _fade_color, images, strength)
    images = replace_rows(images, operation == _SHARPNESS, _soften, images, strength)
    return replace_rows(images, operation >= _ROTATE, _move, images, operation, strength)


def _change_tones(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    levels = torch.arange(256, device=images.device).to(torch.uint8)
    tables = levels.expand(len(images), 3, 256).contiguous()
    makers = (_autocontrast, _equalize, _solarize, _posterize, _darken, _flatten_contrast)
    for index, maker in enumerate(makers, start=1):
        tables = replace_rows(tables, operation == index, maker, images, strength)
    return look_up(images, tables)


def _levels(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device, dtype=torch.float32)


def _enhancement(strength: Tensor) -> Tensor:
    return (0.05 + 0.9 * strength.double()).float()[:, None, None]


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    low = images.flatten(2).amin(2, keepdim=True).float()
    high = images.flatten(2).amax(2, keepdim=True).float()
    flat = high == low
    low, scale = torch.where(flat, 0.0, low), torch.where(flat, 1.0, (high - low) * (1 / 255))
    return ((_levels(images) - low) / scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    pixels = images.flatten(2).long()
    counts = pixels.new_zeros(*pixels.shape[:2], 256).scatter_add_(2, pixels, torch.ones_like(pixels))
    below = counts.cumsum(2) - counts
    # PIL: the step leaves out the pixels of the highest level, and a step of 0 leaves the channel alone.
    highest = pixels.amax(2, keepdim=True)
    step = (pixels.shape[2] - counts.gather(2, highest)) // 255
    tables = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    return torch.where(step > 0, tables, torch.arange(256, device=images.device)).to(torch.uint8)


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    levels = _levels(images)
    table = torch.where(levels >= strength[:, None, None] * 256, 255 - levels, levels)
    return table.to(torch.uint8).expand(-1, 3, -1)


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    dropped = 4 - (strength[:, None, None] * 4).long()
    levels = torch.arange(256, device=images.device)
    return ((levels >> dropped) << dropped).to(torch.uint8).expand(-1, 3, -1)


def _darken(images: Tensor, strength: Tensor) -> Tensor:
    return (_levels(images) * _enhancement(strength)).to(torch.uint8).expand(-1, 3, -1)


def _flatten_contrast(images: Tensor, strength: Tensor) -> Tensor:
    grey = luma(images.float()).floor_().long().flatten(1).sum(1)
    mean = (grey.double() / images[0, 0].numel()).float()[:, None, None]
    factor = _enhancement(strength)
    return (_levels(images) * factor + mean * (1 - factor)).clamp_(0, 255).to(torch.uint8).expand(-1, 3, -1)


def _fade_color(images: Tensor, strength: Tensor) -> Tensor:
    colored, factor = images.float(), _enhancement(strength)[:, None]
    return blend(colored, luma(colored).floor_(), factor, 1 - factor).clamp_(0, 255).to(torch.uint8)


def _soften(images: Tensor, strength: Tensor) -> Tensor:
    sharp = images.float()
    rows = sharp[:, :, :-2] + sharp[:, :, 1:-1] + sharp[:, :, 2:]
    inner = sharp[:, :, 1:-1, 1:-1]
    # PIL's SMOOTH kernel, ones around a 5; the border is left as it is.
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + inner * 4).div_(13).round_()
    factor = _enhancement(strength)[:, None]
    inner.copy_(blend(inner.clone(), smooth, factor, 1 - factor))
    return sharp.clamp_(0, 255).to(torch.uint8)


def _move(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    # At the nearest pixel, as PIL does unless told otherwise.
    return warp(images.float(), move_matrices(operation, strength), mode="nearest").to(torch.uint8)


def move_matrices(operation: Tensor, strength: Tensor) -> Tensor:
    """Matrices for ``warp``: rotation about the centre, shears from the upper left corner as in PIL, shifts.

    Args:
        operation: Index of one of the last five operations, int64, (B,).
        strength: 0 is the lower end of the operation's range, 1 the upper, (B,).

    Returns:
        float32, (B, 2, 3).
    """
    amount = strength.double() * 2 - 1
    # The image spans [-1, 1]: a tenth of its side is 0.2.
    angle, shear_x, shear_y, right, down = (
        torch.where(operation == _ROTATE + k, amount * most, 0.0)
        for k, most in enumerate((math.radians(30), 0.1, 0.1, 0.2, 0.2))
    )
    cos, sin = torch.cos(angle), torch.sin(angle)
    across = torch.stack((cos, shear_x - sin, right + shear_x), dim=1)
    below = torch.stack((shear_y + sin, cos, down + shear_y), dim=1)
    return torch.stack((across, below), dim=1).float()
