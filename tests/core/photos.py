"""Images for the tests of augmentation."""

import torch
from torch import Tensor


def photos(count: int, side: int, seed: int = 0) -> Tensor:
    """Smooth colourful gradients with some noise, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 230
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    return (smooth + torch.rand(count, 3, side, side, generator=generator) * 25).to(torch.uint8)
