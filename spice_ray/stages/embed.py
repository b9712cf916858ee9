"""Between stages 1 and 2: every image is embedded once by the frozen encoder, and so are the heads' views."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import Encoder
from spice_ray.core.order import stream_key

ROWS_AT_ONCE = 256
"""A constant, so that a row's features do not depend on how rows are spread over actors."""


class Embedded(NamedTuple):
    """Features of some images, float32, on the CPU; :class:`spice_ray.contracts.Bank` says what each is."""

    embedding: Tensor
    plain: Tensor
    weak: Tensor
    strong: Tensor
    """(V, B, D)."""


@torch.inference_mode()
def embed(
    encoder: Encoder, images: Tensor, sample_ids: Tensor, augmentation: Augmentation, *, num_strong: int, seed: int
) -> Embedded:
    """Embed images, uint8, (B, 3, S, S), with the encoder in eval mode.

    Views are counted by sample id: a view belongs to its image, whoever encodes it.
    """
    parts = [
        _embed_rows(encoder, images[rows], sample_ids[rows], augmentation, num_strong, seed)
        for rows in torch.arange(len(images)).split(ROWS_AT_ONCE)
    ]
    plain, weak, strong = (torch.cat(part, dim=-2).float().cpu() for part in zip(*parts, strict=True))
    return Embedded(F.normalize(plain, dim=1), plain, weak, strong)


def _embed_rows(
    encoder: Encoder, images: Tensor, sample_ids: Tensor, augmentation: Augmentation, num_strong: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    plain = encoder(augmentation.plain(images))[1]
    weak = encoder(augmentation.weak(images, sample_ids, stream_key(seed, "heads", "weak")))[1]
    strong = [
        encoder(augmentation.strong(images, sample_ids, stream_key(seed, "heads", "strong", view)))[1]
        for view in range(num_strong)
    ]
    return plain, weak, torch.stack(strong)
