"""Image operations on a whole batch, each row with parameters of its own.

B rows of a batch, S side of an image in pixels. Images are float32 in [0, 1] or uint8, (B, 3, S, S); parameters have
one row per image and live on the same device. Row i of a result depends on row i of the arguments alone, to the bit on
the CPU. That rules out batched matrix products, whose order of summation follows the batch size, unless their sums are
exact, and it asks for multiplications and additions one by one: fused operators round differently in the last elements
of a tensor. For the same reason exp, cos and pow are taken of small tables in float64 and rounded to float32.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

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
    chosen = mask.nonzero().squeeze(1)
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


def padded_crop(images: Tensor, border: int, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop each image, shifted by whole pixels over a black border, and then mirror some.

    Args:
        images: uint8, (B, 3, S, S).
        border: How many black pixels are on each side.
        shifts: Pixels down and right by which the crop is moved, int64 in [-border, border], (B, 2).
        flips: Which crops are mirrored, bool, (B,).

    Returns:
        uint8, (B, 3, S, S): what torchvision's RandomCrop with padding and horizontal flip give.
    """
    side, wide = images.shape[-1], images.shape[-1] + 2 * border
    steps = torch.arange(border, border + side, device=images.device)
    across = torch.where(flips[:, None], wide - 1 - steps, steps) + shifts[:, 1:]
    down = (steps + shifts[:, :1]) * wide
    index = (down[:, :, None] + across[:, None, :]).flatten(1)[:, None].expand(-1, 3, -1)
    return functional.pad(images, [border] * 4).flatten(2).gather(2, index).view_as(images)


def pixel_centers(side: int, device: torch.device) -> Tensor:
    """Centres of the pixels along one side in grid_sample's coordinates, where the image spans [-1, 1]; (S,)."""
    return (torch.arange(side, device=device, dtype=torch.float32) * 2 + (1 - side)) * (1 / side)


class CropTaps(NamedTuple):
    """Which two columns and which two rows each pixel of a resized crop mixes, and with what shares."""

    columns: Tensor
    """int64, (B, 2, S)."""
    column_shares: Tensor
    """float32, whole parts of 2^-16, (B, 2, S)."""
    rows: Tensor
    """int32, (B, S, 2)."""
    row_shares: Tensor
    """float32, (B, S, 2)."""


def crop_taps(boxes: Tensor, flips: Tensor, side: int) -> CropTaps:
    """What ``resized_crop`` reads to cut a box out of each image, resize it bilinearly and mirror some.

    The box need not lie on pixel borders, and its edge pixels are interpolated with their neighbours outside the box.
    A box is never larger than the image, so there is nothing to smooth against aliasing.

    Args:
        boxes: Top, left, height and width as fractions of the side, float32, (B, 4).
        flips: bool, (B,).
        side: S, >= 2.
    """
    middle = torch.arange(side, device=boxes.device) + 0.5
    top, left, height, width = boxes[:, :, None].unbind(1)
    across = torch.where(flips[:, None], side - middle, middle) * width + (left * side - 0.5)
    down = middle * height + (top * side - 0.5)
    columns, column_shares = _neighbors(across.mul_(1 << 16).round_().mul_(1 / (1 << 16)), side, dim=1)
    rows, row_shares = _neighbors(down, side, dim=2)
    return CropTaps(columns.long(), column_shares, rows.int(), row_shares)


def _neighbors(place: Tensor, side: int, dim: int) -> tuple[Tensor, Tensor]:
    """The two pixels that each point (B, S) lies between, stacked along ``dim``, and their shares; none is outside."""
    first = place.floor().clamp_(0, side - 2)
    share = (place - first).clamp_(0, 1)
    return torch.stack((first, first + 1), dim=dim), torch.stack((1 - share, share), dim=dim)


def resized_crop(images: Tensor, taps: CropTaps) -> Tensor:
    """Mix columns and then rows of each image: the same interpolation as both at once, with half the reads.

    Args:
        images: uint8, (B, 3, S, S).
        taps: What to mix.

    Returns:
        float32 in [0, 255] times the sum of the row shares, (B, 3, S, S), with the channels outermost in memory: each
        channel of the batch is contiguous.
    """
    count, _, side, _ = images.shape
    # Levels have 8 bits and shares 16, so that their products and sums are exact in float32. This is what lets a matrix
    # product in here, whose order of summation nobody promises.
    mixer = torch.zeros(count, side, side, device=images.device).scatter_(1, taps.columns, taps.column_shares)
    wide = torch.bmm(images.float().view(count, 3 * side, side), mixer)
    first_rows, pairs = _row_numbers(count, side, images.device)
    crops = functional.embedding_bag(
        (first_rows + taps.rows).view(-1),
        wide.view(-1, side),
        pairs,
        per_sample_weights=taps.row_shares.expand(3, -1, -1, -1).reshape(-1),
        mode="sum",
    )
    return crops.view(3, count, side, side).transpose(0, 1)


@cache
def _row_numbers(count: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of each plane's first row among the rows of all planes, (3, B, 1, 1); where each row's pair starts."""
    first_rows = torch.arange(0, 3 * count * side, side, dtype=torch.int32, device=device).view(count, 3).T.contiguous()
    return first_rows[:, :, None, None], torch.arange(0, 6 * count * side, 2, dtype=torch.int32, device=device)


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
