"""Colours of a whole batch, each row with factors of its own: grey values, and the colour jitter.

B rows of a batch, S side of an image in pixels. Images are float32, (B, 3, S, S), in any layout of memory; fastest with
the channels outermost. Row i of a result depends on row i of the arguments alone, to the bit on the CPU (image_ops.py
says what that rules out).
"""

from functools import cache

import torch
from torch import Tensor


def luma(images: Tensor) -> Tensor:
    """Grey value of each pixel with the weights of ITU-R 601, float32, (B, 1, S, S)."""
    red, green, blue = torch.split(images * _luma_weights(images.device), 1, dim=1)
    return red.add_(green).add_(blue)


@cache
def _luma_weights(device: torch.device) -> Tensor:
    return torch.tensor((0.2989, 0.587, 0.114), device=device).view(3, 1, 1)


def fade(images: Tensor, grey: Tensor) -> Tensor:
    """Replace each channel by ``luma`` where ``grey`` is 1, and change no bit where it is 0; writes over ``images``.

    Args:
        images: float32, (B, 3, S, S).
        grey: float32, (B,).

    Returns:
        float32, (B, 3, S, S).
    """
    # Products with 0 and 1 are exact, so that this fused operator rounds alike everywhere.
    return images.lerp_(luma(images), grey.view(-1, 1, 1, 1))


def blend(images: Tensor, other: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
    """``factor * images + rest * other``, not clamped; writes over both (float32); rest is 1 - factor."""
    return images.mul_(factor).add_(other.mul_(rest))


def jitter_steps(factors: Tensor) -> Tensor:
    """What ``jitter_color`` multiplies by.

    Args:
        factors: Of contrast and saturation (1 changes nothing) and the hue's shift in turns, in [-1/6, 1/6], (B, 3).

    Returns:
        float32, (B, 6): contrast, saturation, what is left of 1 for each, how long a channel waits while the hue turns
        (see ``_shift_hue``), and the sign of the turn.
    """
    turns = factors[:, 2:]
    return torch.cat((factors[:, :2], 1 - factors[:, :2], 1 - 6 * turns.abs(), turns.sign()), dim=1)


def jitter_color(images: Tensor, steps: Tensor) -> Tensor:
    """Contrast, saturation and hue, in this order and clamped after each; writes over ``images``.

    torchvision's ColorJitter draws the order anew for each image; a fixed order lets the batch move together. Its
    first step, brightness, is left to who scales the images anyway.

    Args:
        images: float32 in [0, 1], (B, 3, S, S); fastest with the channels outermost in memory.
        steps: See ``jitter_steps``, (B, 6).

    Returns:
        float32 in [0, 1], (B, 3, S, S).
    """
    contrast, saturation, contrast_rest, saturation_rest, wait, sign = steps.view(-1, 6, 1, 1, 1).unbind(1)
    images = blend(images, luma(images.mean(dim=(2, 3), keepdim=True)), contrast, contrast_rest).clamp_(0, 1)
    images = blend(images, luma(images), saturation, saturation_rest).clamp_(0, 1)
    return _shift_hue(images, wait, sign)


def _shift_hue(images: Tensor, wait: Tensor, sign: Tensor) -> Tensor:
    """Turn the hue of HSV and keep saturation and value, as torchvision's adjust_hue; writes over ``images``.

    A channel is at its maximum within one sextant of its primary colour, at its minimum beyond two, and linear
    between. So the difference d of the two others says how long it stays where it is: while the hue turns by t <= 1
    sextants towards the channel before it, it moves by d - clamp(d, -w, w) with w = (1 - t) chroma, up to its end.

    Args:
        images: float32 in [0, 1], (B, 3, S, S).
        wait: 1 - t, (B, 1, 1, 1).
        sign: Of the turn, (B, 1, 1, 1).

    Returns:
        float32 in [0, 1], (B, 3, S, S).
    """
    low, high = images.amin(1, keepdim=True), images.amax(1, keepdim=True)
    left = (high - low).mul_(wait)
    red, green, blue = images.unbind(1)
    moves = torch.empty_like(images)
    for move, after, before in zip(moves.unbind(1), (blue, red, green), (green, blue, red), strict=True):
        torch.sub(after, before, out=move)
    moves.sub_(moves.clamp(-left, left))
    # As above: the product with a sign is exact.
    return images.addcmul_(moves, sign).clamp_(low, high)
