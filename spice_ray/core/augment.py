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

from spice_ray.core import color, image_ops, order
from spice_ray.core.image_ops import CropTaps, crop_taps, replace_rows
from spice_ray.core.operations import OPERATIONS, apply_operations

_DRAWN_OPERATIONS = 4
_CROP_TRIES = 10
_NORMAL_LEVELS = 4096
_ROW = 3 * 32 * 32
# How many values of a batch pass through all operations before the next ones, on each core. More rows share the cost of
# a call, fewer rows stay in the cache with everything that is made of them on the way.
_MANY_STEPS = 48 * _ROW
_FEW_STEPS = 128 * _ROW
_LEVELS = 512 * _ROW
"""For operations on uint8, each of which meets a few rows."""


class WarpRange(NamedTuple):
    """The most that a digit is warped, either way."""

    degrees: float
    log_scale: float
    shear: float
    shift: float
    """As a fraction of the side."""


DIGITS_STRONG = WarpRange(degrees=12, log_scale=0.15, shear=0.25, shift=0.05)
DIGITS_WEAK = WarpRange(degrees=7, log_scale=0.06, shear=0.05, shift=0.06)


MakeView = Callable[[Tensor, Tensor], Tensor]
"""From images, uint8, (B, 3, S, S), and their draws, int64, (B,), to views."""


def view_maker(make: Callable[[Tensor, Tensor, int], Tensor], key: int) -> MakeView:
    """What makes the views of one key."""
    return lambda images, draws: make(images, draws, key)


@dataclass(frozen=True)
class Augmentation:
    """The views of one recipe; ``mean`` and ``std`` are per channel, of values in [0, 1].

    Each method takes uint8 images (B, 3, S, S), S >= 8, on any device, leaves them as they are, and returns float32
    (B, 3, S, S), contiguous and normalised: (x / 255 - mean) / std.
    """

    family: Literal["natural", "digits", "none"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_crop: float = 0.2
    """The least part of a photograph's area that a contrastive view shows."""
    blur: float = 0.5
    """Share of the contrastive views of photographs that are blurred."""

    def plain(self, images: Tensor) -> Tensor:
        """The images themselves, normalised."""
        result = _trainable(images)
        self._normalise(images.float(), 255, result)
        return result

    @torch.inference_mode()
    def contrastive(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        """A query or a key of stage 1 (SPICE III-A; natural: the views of MoCo-v2)."""
        match self.family:
            case "natural":
                return self._natural_contrastive(images, draws, key)
            case "digits":
                return self._digits_strong(images, draws, key)
            case "none":
                return self.plain(images)

    @torch.inference_mode()
    def weak(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        """A weak view (SPICE III-B and III-C; natural: crop from a border of S // 8 black pixels, and mirror)."""
        match self.family:
            case "natural":
                return self._natural_weak(images, draws, key)
            case "digits":
                return self._digits_weak(images, draws, key)
            case "none":
                return self.plain(images)

    @torch.inference_mode()
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
        side = images.shape[-1]

        def view(out: Tensor, rows: Tensor, steps: Tensor, grey: Tensor, *params: Tensor) -> None:
            rows = image_ops.resized_crop(rows, CropTaps(*params[:4])).clamp_max_(1)
            rows = color.fade(color.jitter_color(rows, steps), grey)
            for sigmas in params[4:]:
                rows = replace_rows(rows, sigmas > 0, image_ops.gaussian_blur, rows, sigmas)
            self._normalise(rows, 1, out)

        flips, grey = coin(draws, key, "flip", 0.5), coin(draws, key, "grey", 0.2).float()
        taps = crop_taps(crop_boxes(draws, key, self.min_crop), flips, side)
        factors = jitter_factors(draws, key)
        # The first step of the colour jitter, brightness, and the scale of the levels are one gain of the crop.
        taps = taps._replace(row_shares=taps.row_shares * (factors[:, :1] * (1 / 255))[:, None])
        blur = [blur_sigmas(draws, key, self.blur)] if self.blur > 0 else []
        return _by_cache(view, _MANY_STEPS, images, color.jitter_steps(factors[:, 1:]), grey, *taps, *blur)

    def _natural_weak(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        border = images.shape[-1] // 8

        def view(out: Tensor, rows: Tensor, shifts: Tensor, flips: Tensor) -> None:
            self._normalise(image_ops.padded_crop(rows, border, shifts, flips).float(), 255, out)

        return _by_cache(view, _FEW_STEPS, images, crop_shifts(draws, key, border), coin(draws, key, "flip", 0.5))

    def _natural_strong(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        def view(
            out: Tensor, rows: Tensor, flips: Tensor, operations: Tensor, strengths: Tensor, boxes: Tensor
        ) -> None:
            rows = image_ops.flip_rows(rows, flips)
            for slot in range(_DRAWN_OPERATIONS):
                rows = apply_operations(rows, operations[:, slot], strengths[:, slot])
            self._normalise(rows.float(), 255, out)
            image_ops.cut_out(out, boxes)

        operations, strengths = drawn_operations(draws, key)
        boxes = cutout_boxes(draws, key, images.shape[-1])
        return _by_cache(view, _LEVELS, images, coin(draws, key, "flip", 0.5), operations, strengths, boxes)

    def _digits_weak(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        def view(out: Tensor, rows: Tensor, matrices: Tensor) -> None:
            self._normalise(image_ops.warp(rows.float(), matrices), 255, out)

        return _by_cache(view, _FEW_STEPS, images, warp_matrices(draws, key, DIGITS_WEAK))

    def _digits_strong(self, images: Tensor, draws: Tensor, key: int) -> Tensor:
        side = images.shape[-1]

        def view(out: Tensor, rows: Tensor, matrices: Tensor, points: Tensor, tables: Tensor, draws: Tensor) -> None:
            warped = image_ops.warp(rows.float(), matrices, image_ops.elastic_field(points, side))
            # Back to 256 levels: a power of each pixel would round differently in the last elements of a tensor.
            inked = image_ops.look_up(warped.add_(0.5).long(), tables)
            noise = normal(draws, order.stream_key(key, "noise"), side * side).view(len(draws), 1, side, side)
            self._normalise(inked.add_(noise.mul_(0.05)), 1, out)

        matrices = warp_matrices(draws, key, DIGITS_STRONG)
        points = elastic_points(draws, key)
        return _by_cache(view, _FEW_STEPS, images, matrices, points, intensity_tables(draws, key), draws)

    def _normalise(self, images: Tensor, peak: float, out: Tensor) -> None:
        """Normalise float32 values in [0, peak] into ``out``; writes over ``images`` too."""
        scale, offset = _normalisation(self.mean, self.std, peak, images.device)
        torch.add(images.mul_(scale), offset, out=out)


@cache
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], peak: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    # Cached because copying numbers to an accelerator waits for it.
    scale = torch.tensor([1 / (peak * deviation) for deviation in std], device=device)
    offset = torch.tensor([-average / deviation for average, deviation in zip(mean, std, strict=True)], device=device)
    return scale.view(-1, 1, 1), offset.view(-1, 1, 1)


def _trainable(images: Tensor) -> Tensor:
    """An empty tensor for the views of ``images`` that a model can be trained on.

    Augmentation runs in inference mode, which spares each of its many small operations a look at autograd, but what is
    made there is of no use to autograd.
    """
    with torch.inference_mode(False):
        return torch.empty(images.shape, device=images.device)


def _by_cache(view: Callable[..., None], values: int, images: Tensor, *params: Tensor) -> Tensor:
    """The tensor that ``view(out, images, *params)`` fills, each row for itself.

    On the CPU the rows come in parts of about ``values`` values for each thread, because the operations are limited by
    memory and not by arithmetic.
    """
    result = _trainable(images)
    rows = max(1, len(images))
    if images.device.type == "cpu":
        rows = max(1, values * torch.get_num_threads() // max(1, images[:1].numel()))
    for part in zip(*(torch.split(tensor, rows) for tensor in (result, images, *params)), strict=True):
        view(*part)
    return result


def _symmetric(draws: Tensor, key: int, name: str, columns: int) -> Tensor:
    """Uniform in [-1, 1), float64, (B, columns)."""
    return order.uniform(order.stream_key(key, name), draws, columns).double() * 2 - 1


def coin(draws: Tensor, key: int, name: str, probability: float) -> Tensor:
    """Which rows the operation ``name`` applies to, bool, (B,)."""
    return order.uniform(order.stream_key(key, name), draws)[:, 0] < probability


def crop_boxes(draws: Tensor, key: int, least: float) -> Tensor:
    """Random resized crops: area in (``least``, 1), log aspect ratio uniform in (log 3/4, log 4/3), anywhere inside.

    As in torchvision the first of ten tries that fits counts, and the whole image where none does; unlike there boxes
    are not rounded to pixels.

    Returns:
        Top, left, height and width as fractions of the side, float32, (B, 4).
    """
    numbers = order.uniform(order.stream_key(key, "crop"), draws, 2 * _CROP_TRIES + 2).double()
    area = least + (1 - least) * numbers[:, :_CROP_TRIES]
    log_ratio = math.log(4 / 3) * (numbers[:, _CROP_TRIES:-2] * 2 - 1)
    fits = area <= torch.exp(-log_ratio.abs())
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    area, ratio = area.gather(1, first), torch.exp(log_ratio.gather(1, first))
    size = torch.cat((torch.sqrt(area / ratio), torch.sqrt(area * ratio)), dim=1)  # (B, 2)
    size = torch.where(fits.any(dim=1)[:, None], size.clamp_(max=1), 1.0)
    return torch.cat((numbers[:, -2:] * (1 - size), size), dim=1).float()


def jitter_factors(draws: Tensor, key: int) -> Tensor:
    """Factors of brightness, contrast and saturation in 1 +- 0.4 and hue's shift in +-0.1 turns, float32, (B, 4).

    A fifth of the rows is left alone: the factors are 1 and the shift is 0.
    """
    numbers = order.uniform(order.stream_key(key, "jitter"), draws, 5).double()
    shifts = torch.where(numbers[:, 4:] < 0.8, numbers[:, :4] * 2 - 1, 0.0)
    return torch.cat((1 + 0.4 * shifts[:, :3], 0.1 * shifts[:, 3:]), dim=1).float()


def blur_sigmas(draws: Tensor, key: int, share: float) -> Tensor:
    """Width of the blur in pixels, uniform in (0.1, 2) for a share of the rows and 0 (no blur) for the others, (B,)."""
    numbers = order.uniform(order.stream_key(key, "blur"), draws, 2)
    return torch.where(numbers[:, 0] < share, 0.1 + 1.9 * numbers[:, 1].double(), 0.0).float()


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
