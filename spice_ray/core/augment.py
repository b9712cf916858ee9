"""Views of images: batched on the device, and counted.

Three families: *natural* photographs (MoCo-v2's views for stage 1, SPICE's weak and strong views for stages 2 and 3),
*digits* (small affine and elastic warps, never mirrored or recoloured) and *none*. Every random parameter is hashed
from (key, operation, draw), so that row i of a view depends on its image, its draw and the key alone: never on batch
size, order, worker or history, and on the CPU to the bit.

B rows of a batch, S side of an image in pixels. draws are positions in a stream, int64, (B,); key is a ``stream_key``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spice_ray.core import image_ops, order
from spice_ray.core.image_ops import replace_rows
from spice_ray.core.operations import OPERATIONS, apply_operations

_DRAWN_OPERATIONS = 4
_CROP_TRIES = 10
_NORMAL_LEVELS = 4096
_CACHE_ELEMENTS = 3 * 128 * 32 * 32
"""Values of a batch that pass through all operations before the next: about what a core's cache holds."""


class WarpRange(NamedTuple):
    """The most that a digit is warped, either way."""

    degrees: float
    log_scale: float
    shear: float
    shift: float
    """As a fraction of the side."""


DIGITS_STRONG = WarpRange(degrees=12, log_scale=0.15, shear=0.25, shift=0.05)
DIGITS_WEAK = WarpRange(degrees=7, log_scale=0.06, shear=0.05, shift=0.06)


@dataclass(frozen=True)
class Augmentation:
    """The views of one recipe; ``mean`` and ``std`` are per channel, of values in [0, 1].

    Each method takes uint8 images (B, 3, S, S), S >= 8, on any device, leaves them as they are, and returns float32
    (B, 3, S, S), contiguous and normalised: (x / 255 - mean) / std.
    """

    family: Literal["natural", "digits", "none"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def plain(self, images: Tensor) -> Tensor:
        """The images themselves, normalised."""
        return self._normalise(images.float(), peak=255)

    def contrastive(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        """A query or a key of stage 1 (SPICE III-A; natural: the views of MoCo-v2)."""
        match self.family:
            case "natural":
                return self._natural_contrastive(images, draws, key)
            case "digits":
                return self._digits_strong(images, draws, key)
            case "none":
                return self.plain(images)

    def weak(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        """A weak view (SPICE III-B and III-C; natural: crop from a border of S // 8 black pixels, and mirror)."""
        match self.family:
            case "natural":
                return self._natural_weak(images, draws, key)
            case "digits":
                return self._digits_weak(images, draws, key)
            case "none":
                return self.plain(images)

    def strong(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        """A strong view (SPICE III-B and III-C; natural: mirror, four operations out of 14, and Cutout)."""
        match self.family:
            case "natural":
                return self._natural_strong(images, draws, key)
            case "digits":
                return self._digits_strong(images, draws, key)
            case "none":
                return self.plain(images)

    def _natural_contrastive(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        def view(rows: Tensor, boxes: Tensor, flips: Tensor, factors: Tensor, grey: Tensor, sigmas: Tensor) -> Tensor:
            rows = image_ops.resized_crop(rows.float().mul_(1 / 255), boxes, flips)
            rows = replace_rows(rows, factors[:, 0] > 0, image_ops.jitter_color, rows, factors)
            rows = replace_rows(rows, grey, lambda colored: image_ops.luma(colored).expand_as(colored), rows)
            if images.shape[-1] > 32:
                rows = replace_rows(rows, sigmas > 0, image_ops.gaussian_blur, rows, sigmas)
            return self._normalise(rows, peak=1)

        flips = coin(draws, key, "flip", 0.5)
        grey = coin(draws, key, "grey", 0.2)
        sigmas = blur_sigmas(draws, key)
        return _by_cache(view, images, crop_boxes(draws, key), flips, jitter_factors(draws, key), grey, sigmas)

    def _natural_weak(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        def view(rows: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
            return self.plain(image_ops.padded_crop(rows, shifts, flips))

        shifts = crop_shifts(draws, key, images.shape[-1] // 8)
        return _by_cache(view, images, shifts, coin(draws, key, "flip", 0.5))

    def _natural_strong(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        def view(rows: Tensor, flips: Tensor, operations: Tensor, strengths: Tensor, boxes: Tensor) -> Tensor:
            rows = image_ops.flip_rows(rows, flips)
            for slot in range(_DRAWN_OPERATIONS):
                rows = apply_operations(rows, operations[:, slot], strengths[:, slot])
            return image_ops.cut_out(self.plain(rows), boxes)

        operations, strengths = drawn_operations(draws, key)
        boxes = cutout_boxes(draws, key, images.shape[-1])
        return _by_cache(view, images, coin(draws, key, "flip", 0.5), operations, strengths, boxes)

    def _digits_weak(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        def view(rows: Tensor, matrices: Tensor) -> Tensor:
            return self._normalise(image_ops.warp(rows.float(), matrices), peak=255)

        return _by_cache(view, images, warp_matrices(draws, key, DIGITS_WEAK))

    def _digits_strong(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        side = images.shape[-1]

        def view(rows: Tensor, matrices: Tensor, points: Tensor, tables: Tensor, draws: Tensor) -> Tensor:
            warped = image_ops.warp(rows.float(), matrices, image_ops.elastic_field(points, side))
            # Back to 256 levels: a power of each pixel would round differently in the last elements of a tensor.
            inked = image_ops.look_up(warped.add_(0.5).long(), tables)
            noise = normal(draws, order.stream_key(key, "noise"), side * side).view(len(draws), 1, side, side)
            return self._normalise(inked.add_(noise.mul_(0.05)), peak=1)

        matrices = warp_matrices(draws, key, DIGITS_STRONG)
        points = elastic_points(draws, key)
        return _by_cache(view, images, matrices, points, intensity_tables(draws, key), draws)

    def _normalise(self, images: Tensor, peak: float) -> Tensor:
        """Normalise values in [0, peak]; writes over ``images``."""
        scale = tuple(1 / (peak * std) for std in self.std)
        offset = tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        return images.mul_(_per_channel(scale, images.device)).add_(_per_channel(offset, images.device))


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached because copying numbers to an accelerator waits for it.
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _by_cache(view: Callable[..., Tensor], images: Tensor, *params: Tensor) -> Tensor:
    """``view(images, *params)``; on the CPU in as many rows at a time as fit the caches, since rows are independent."""
    rows = len(images)
    if images.device.type == "cpu":
        rows = max(1, _CACHE_ELEMENTS * torch.get_num_threads() // images[:1].numel()) if rows else 1
    parts = zip(*(torch.split(values, rows) for values in (images, *params)), strict=True)
    return torch.cat([view(*part) for part in parts])


def _symmetric(draws: Tensor, key: int, name: str, columns: int) -> Tensor:
    """Uniform in [-1, 1), float64, (B, columns)."""
    return order.uniform(order.stream_key(key, name), draws, columns).double() * 2 - 1


def coin(draws: Tensor, key: int, name: str, probability: float) -> Tensor:
    """Which rows the operation ``name`` applies to, bool, (B,)."""
    return order.uniform(order.stream_key(key, name), draws)[:, 0] < probability


def crop_boxes(draws: Tensor, key: int) -> Tensor:
    """Random resized crops: area in (0.2, 1), log aspect ratio uniform in (log 3/4, log 4/3), anywhere inside.

    As in torchvision the first of ten tries that fits counts, and the whole image where none does; unlike there boxes
    are not rounded to pixels.

    Returns:
        Top, left, height and width as fractions of the side, float32, (B, 4).
    """
    numbers = order.uniform(order.stream_key(key, "crop"), draws, 2 * _CROP_TRIES + 2).double()
    area = 0.2 + 0.8 * numbers[:, :_CROP_TRIES]
    ratio = torch.exp(math.log(4 / 3) * (numbers[:, _CROP_TRIES:-2] * 2 - 1))
    size = torch.stack((torch.sqrt(area / ratio), torch.sqrt(area * ratio)), dim=2)  # (B, tries, 2)
    fits = (size <= 1).all(dim=2)
    first = fits.to(torch.uint8).argmax(dim=1)[:, None, None].expand(-1, 1, 2)
    size = torch.where(fits.any(dim=1)[:, None], size.gather(1, first)[:, 0], 1.0)
    return torch.cat((numbers[:, -2:] * (1 - size), size), dim=1).float()


def jitter_factors(draws: Tensor, key: int) -> Tensor:
    """Factors of brightness, contrast and saturation in 1 +- 0.4 and hue's shift in +-0.1 turns, float32, (B, 4).

    A fifth of the rows is left alone: all four are 0.
    """
    numbers = order.uniform(order.stream_key(key, "jitter"), draws, 5).double()
    shifts = numbers[:, :4] * 2 - 1
    factors = torch.cat((1 + 0.4 * shifts[:, :3], 0.1 * shifts[:, 3:]), dim=1)
    return torch.where(numbers[:, 4:] < 0.8, factors, 0.0).float()


def blur_sigmas(draws: Tensor, key: int) -> Tensor:
    """Width of the blur in pixels, uniform in (0.1, 2) for half the rows and 0 (no blur) for the others, (B,)."""
    numbers = order.uniform(order.stream_key(key, "blur"), draws, 2)
    return torch.where(numbers[:, 0] < 0.5, 0.1 + 1.9 * numbers[:, 1].double(), 0.0).float()


def crop_shifts(draws: Tensor, key: int, most: int) -> Tensor:
    """Whole pixels down and right, uniform in -most..most, int64, (B, 2)."""
    return (order.uniform(order.stream_key(key, "shift"), draws, 2) * (2 * most + 1)).long() - most


def drawn_operations(draws: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Four of OPERATIONS with replacement (int64, (B, 4)) and their strengths in [0, 1) (float32, (B, 4))."""
    numbers = order.uniform(order.stream_key(key, "operations"), draws, 2 * _DRAWN_OPERATIONS)
    return (numbers[:, :_DRAWN_OPERATIONS] * len(OPERATIONS)).long(), numbers[:, _DRAWN_OPERATIONS:]


def cutout_boxes(draws: Tensor, key: int, side: int) -> Tensor:
    """Top, left and side of a hole of 1..min(S // 2, 32) pixels about a uniformly drawn pixel, int64, (B, 3)."""
    numbers = order.uniform(order.stream_key(key, "cutout"), draws, 3)
    hole = (numbers[:, 2:] * min(side // 2, 32)).long() + 1
    return torch.cat(((numbers[:, :2] * side).long() - hole // 2, hole), dim=1)


def warp_matrices(draws: Tensor, key: int, most: WarpRange) -> Tensor:
    """Random rotation, scale, horizontal shear and shift for ``image_ops.warp``, float32, (B, 2, 3)."""
    angle, scale, shear, right, down = _symmetric(draws, key, "warp", 5).unbind(1)
    angle, scale, shear = angle * math.radians(most.degrees), torch.exp(scale * most.log_scale), shear * most.shear
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    # The image spans [-1, 1]: a fraction of its side is twice that in coordinates.
    across = torch.stack((cos, cos * shear - sin, right * (2 * most.shift)), dim=1)
    return torch.stack((across, torch.stack((sin, sin * shear + cos, down * (2 * most.shift)), dim=1)), dim=1).float()


def elastic_points(draws: Tensor, key: int) -> Tensor:
    """Displacements in x and y of the control points of an elastic field, Gaussian, float32, (B, 2, 4, 4)."""
    shape = (len(draws), 2, image_ops.CONTROL_POINTS, image_ops.CONTROL_POINTS)
    return normal(draws, order.stream_key(key, "elastic"), math.prod(shape[1:])).view(shape) * 0.08


def intensity_tables(draws: Tensor, key: int) -> Tensor:
    """Value in [0, 1] of each level v: gain (v / 255)^gamma, gain in 1 +- 0.28, log gamma in +-0.7; (B, 1, 256)."""
    gamma, gain = _symmetric(draws, key, "intensity", 2)[:, :, None, None].unbind(1)  # each (B, 1, 1)
    levels = torch.arange(256, device=draws.device, dtype=torch.float64) / 255
    return torch.pow(levels, torch.exp(gamma * 0.7)).mul_(1 + 0.28 * gain).clamp_(0, 1).float()


def normal(draws: Tensor, key: int, columns: int) -> Tensor:
    """Standard normal numbers, from 4,096 equally likely quantiles, float32, (B, columns)."""
    bits = (order.uniform(key, draws, (columns + 1) // 2) * (1 << 24)).to(torch.int32)  # two numbers of 12 bits
    levels = torch.cat((bits & (_NORMAL_LEVELS - 1), bits >> 12), dim=1)[:, :columns]
    middle = torch.arange(_NORMAL_LEVELS, device=draws.device, dtype=torch.float64) + 0.5
    quantiles = torch.special.ndtri(middle / _NORMAL_LEVELS).float()
    return torch.index_select(quantiles, 0, levels.flatten()).view(levels.shape)
