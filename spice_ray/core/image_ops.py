"""Image operations on a whole batch, each row with parameters of its own.

B rows of a batch, S side of an image in pixels. Images are float32 in [0, 1] or uint8, (B, 3, S, S); parameters have
one row per image and live on the same device. Row i of a result depends on row i of the arguments alone, to the bit on
the CPU. That rules out batched matrix products, whose order of summation follows the batch size, and it asks for
multiplications and additions one by one: fused operators round differently in the last elements of a tensor. For the
same reason exp, cos and pow are taken of small tables in float64 and rounded to float32.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

CONTROL_POINTS = 4
"""Control points of an elastic field along each side."""


def replace_rows(target: Tensor, mask: Tensor, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Give the rows of ``target`` where ``mask`` (bool, (B,)) holds the value of ``function(*rows)``.

    Writes over ``target`` on the CPU, where ``function`` sees the chosen rows alone; elsewhere it sees all.
    """
    replace = _replace_chosen if target.device.type == "cpu" else _replace_all
    return replace(target, mask, function, *rows)


def _replace_chosen(target: Tensor, mask: Tensor, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    chosen = mask.nonzero()[:, 0]
    if len(chosen):
        target.index_copy_(0, chosen, function(*(values.index_select(0, chosen) for values in rows)))
    return target


def _replace_all(target: Tensor, mask: Tensor, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    # Counting the rows would stall an accelerator until the host has read the number. The function may write over what
    # it is given, and here that would be all of the target.
    rows = tuple(values.clone() if values is target else values for values in rows)
    return torch.where(mask.view(-1, *[1] * (target.dim() - 1)), function(*rows), target)


def flip_rows(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror left to right the images where ``flips`` (bool, (B,)) holds; a new tensor."""
    return replace_rows(images.clone(), flips, lambda rows: rows.flip(-1), images)


def padded_crop(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop each image, shifted by whole pixels over a black border, and then mirror some.

    Args:
        images: uint8, (B, 3, S, S).
        shifts: Pixels down and right by which the crop is moved, int64 in [-S, S], (B, 2).
        flips: Which crops are mirrored, bool, (B,).

    Returns:
        uint8, (B, 3, S, S): what torchvision's RandomCrop with padding and horizontal flip give.
    """
    side = images.shape[-1]
    steps = torch.arange(side, device=images.device)
    across = torch.where(flips[:, None], side - 1 - steps, steps) + shifts[:, 1:]
    down = steps + shifts[:, :1]
    return _gather_pixels(images, down[:, :, None], across[:, None, :])


def _gather_pixels(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Pixels at rows ``down`` and columns ``across`` (int64, broadcast to (B, S, S)), black outside the image."""
    side = images.shape[-1]
    inside = (down >= 0) & (down < side) & (across >= 0) & (across < side)
    index = down.clamp(0, side - 1) * side + across.clamp(0, side - 1)
    index = index.flatten(1)[:, None].expand(-1, 3, -1)
    return images.flatten(2).gather(2, index).view_as(images).mul_(inside[:, None].to(images.dtype))


def pixel_centers(side: int, device: torch.device) -> Tensor:
    """Centres of the pixels along one side in grid_sample's coordinates, where the image spans [-1, 1]; (S,)."""
    return (torch.arange(side, device=device, dtype=torch.float32) * 2 + (1 - side)) * (1 / side)


def resized_crop(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Cut a box out of each image, resize it bilinearly to the full size and mirror some.

    The box need not lie on pixel borders, and its edge pixels are interpolated with their neighbours outside the box.
    A box is never larger than the image, so there is nothing to smooth against aliasing.

    Args:
        images: float32, (B, 3, S, S).
        boxes: Top, left, height and width as fractions of the side, float32, (B, 4).
        flips: bool, (B,).

    Returns:
        float32, (B, 3, S, S).
    """
    centers = pixel_centers(images.shape[-1], images.device)
    top, left, height, width = boxes[:, :, None].unbind(1)
    across = centers * torch.where(flips[:, None], -width, width) + (left * 2 + width - 1)
    down = centers * height + (top * 2 + height - 1)
    grid = images.new_empty(len(images), 2, len(centers), len(centers))
    grid[:, 0] = across[:, None, :]
    grid[:, 1] = down[:, :, None]
    return functional.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def elastic_field(points: Tensor, side: int) -> Tensor:
    """Bicubic interpolation of control points, the outer ones in the corners of the image.

    Args:
        points: float32, (B, 2, 4, 4).
        side: S.

    Returns:
        float32, (B, 2, S, S).
    """
    weights = _bicubic_weights(side, points.device)
    wide = points[:, :, :, :1] * weights[0]
    for k in range(1, CONTROL_POINTS):
        wide = wide + points[:, :, :, k : k + 1] * weights[k]  # (B, 2, 4, S)
    field = wide[:, :, :1] * weights[0][:, None]
    for k in range(1, CONTROL_POINTS):
        field += wide[:, :, k : k + 1] * weights[k][:, None]
    return field


@cache
def _bicubic_weights(side: int, device: torch.device) -> Tensor:
    """Share of each control point in each pixel along one side, (4, S)."""
    eye = torch.eye(CONTROL_POINTS, device=device)[None, :, :, None]
    return functional.interpolate(eye, size=(side, 1), mode="bicubic", align_corners=True)[0, :, :, 0]


def warp(images: Tensor, matrices: Tensor, field: Tensor | None = None, mode: str = "bilinear") -> Tensor:
    """Resample each image at ``matrix @ (x, y, 1) + field(x, y)``, black outside.

    Args:
        images: float32, (B, 3, S, S).
        matrices: Where to read for what is written, in coordinates where the image spans [-1, 1], (B, 2, 3).
        field: Displacements in x and y in the same coordinates, (B, 2, S, S), or None.
        mode: ``bilinear`` or ``nearest``.

    Returns:
        float32, (B, 3, S, S).
    """
    centers = pixel_centers(images.shape[-1], images.device)
    by_x, by_y, shift = matrices[:, :, None, None].unbind(-1)  # each (B, 2, 1, 1)
    grid = by_x * centers + (by_y * centers[:, None] + shift)
    if field is not None:
        grid += field
    return functional.grid_sample(images, grid.permute(0, 2, 3, 1), mode=mode, align_corners=False)


def luma(images: Tensor) -> Tensor:
    """Grey value of each pixel with the weights of ITU-R 601, float32, (B, 1, S, S)."""
    red, green, blue = torch.split(images, 1, dim=1)
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """``factor * images + (1 - factor) * other``, not clamped; writes over ``images`` (float32)."""
    factor = factor.view(-1, 1, 1, 1)
    return images.mul_(factor).add_(other * (1 - factor))


def jitter_color(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order and clamped after each; writes over ``images``.

    torchvision's ColorJitter draws the order anew for each image; a fixed order lets the batch move together.

    Args:
        images: float32 in [0, 1], (B, 3, S, S).
        factors: Of brightness, contrast and saturation (1 changes nothing) and the hue's shift in turns, in
            [-1/6, 1/6], (B, 4).

    Returns:
        float32 in [0, 1], (B, 3, S, S).
    """
    brightness, contrast, saturation, hue = factors.unbind(1)
    images = images.mul_(brightness.view(-1, 1, 1, 1)).clamp_(0, 1)
    # Summed in two steps: a single image's pixels at once would be split among threads, which changes the rounding.
    mean_luma = luma(images.mean(dim=-1, keepdim=True).mean(dim=-2, keepdim=True))
    images = blend(images, mean_luma, contrast).clamp_(0, 1)
    images = blend(images, luma(images), saturation).clamp_(0, 1)
    return shift_hue(images, hue)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV and keep saturation and value, as torchvision's adjust_hue; writes over ``images``.

    A channel is at its maximum within one sextant of its primary colour, at its minimum beyond two, and linear between.

    Args:
        images: float32 in [0, 1], (B, 3, S, S).
        turns: In [-1/6, 1/6], (B,).

    Returns:
        float32 in [0, 1], (B, 3, S, S).
    """
    red, green, blue = images.unbind(1)
    chroma, low = torch.maximum(red, green), torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    torch.maximum(chroma, blue, out=chroma).sub_(low)
    per_chroma = chroma.clamp(min=1e-12).reciprocal_()
    # Sextants from red, without a choice of cases: with w = (red - low) / chroma and a = |green - blue| / chroma it is
    # a where red is the maximum (w = 1), 2 - w where it is in the middle (a = 1) and 3 - a at the minimum (w = 0).
    slope = (green - blue).mul_(per_chroma)
    steep = slope.abs().mul_(2).sub_(3)
    hue = (red - low).mul_(per_chroma).sub_(0.5).mul_(steep).add_(1.5)
    hue = hue.copysign_(slope).add_(turns.view(-1, 1, 1) * 6)  # [-4, 4]
    low.sub_(chroma)
    # Distance d on the circle of 6: |hue - primary| <= 6, so 3 - d = ||hue - primary| - 3|; clamp(2 - d, 0, 1) is left.
    for channel, primary in zip((red, green, blue), (0, 2, -2), strict=True):
        torch.sub(hue, primary, out=channel).abs_().sub_(3).abs_().clamp_(1, 2).mul_(chroma).add_(low)
    return images


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each image with a Gaussian of its own width, reflected at the borders.

    Args:
        images: float32, (B, 3, S, S).
        sigmas: Standard deviations in pixels, > 0, (B,).

    Returns:
        float32, (B, 3, S, S); the kernel has the odd width nearest below S/10 + 1.
    """
    reach = images.shape[-1] // 20
    distance = torch.arange(reach + 1, device=images.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (distance / sigmas.double()[:, None]) ** 2)  # one half of the kernel
    weights = (weights / (weights.sum(1, keepdim=True) * 2 - 1)).float()
    for axis in (-1, -2):
        pad = (reach, reach, 0, 0) if axis == -1 else (0, 0, reach, reach)
        images = _blur_axis(functional.pad(images, pad, mode="reflect"), weights, axis)
    return images


def _blur_axis(padded: Tensor, weights: Tensor, axis: int) -> Tensor:
    reach = weights.shape[1] - 1
    side = padded.shape[axis] - 2 * reach
    result = padded.narrow(axis, reach, side) * weights[:, 0].view(-1, 1, 1, 1)
    for k in range(1, reach + 1):
        pair = padded.narrow(axis, reach - k, side) + padded.narrow(axis, reach + k, side)
        result += pair.mul_(weights[:, k].view(-1, 1, 1, 1))
    return result


def look_up(levels: Tensor, tables: Tensor) -> Tensor:
    """Replace each level 0..255 by its entry in a table of the row.

    Args:
        levels: uint8 or int64, (B, 3, S, S).
        tables: One table per row, or one per channel, (B, 1, 256) or (B, 3, 256).

    Returns:
        (B, 3, S, S) in the dtype of ``tables``.
    """
    rows, groups, _ = tables.shape
    return tables.gather(2, levels.long().view(rows, groups, levels.shape[1:].numel() // groups)).view(levels.shape)


def cut_out(images: Tensor, boxes: Tensor) -> Tensor:
    """Set a square of each image to zero (Cutout, DeVries and Taylor 2017); writes over ``images``.

    Args:
        images: float32, normalised, (B, 3, S, S).
        boxes: Top, left and side in pixels; what lies outside the image is cut off; int64, (B, 3).

    Returns:
        float32, (B, 3, S, S).
    """
    steps = torch.arange(images.shape[-1], device=images.device)
    start, side = boxes[:, :2, None], boxes[:, 2:, None]
    hit = (steps >= start) & (steps < start + side)  # (B, 2, S): rows, columns
    return images.masked_fill_((hit[:, 0, :, None] & hit[:, 1, None, :])[:, None], 0.0)
