"""The last step: the trained classifier gives every image its cluster."""

from typing import NamedTuple

import torch
from torch import Tensor

from spice_ray.core.augment import Augmentation
from spice_ray.core.joint import JointModel
from spice_ray.stages.embed import ROWS_AT_ONCE


class Predicted(NamedTuple):
    """Predictions for some images, on the CPU."""

    logits: Tensor
    """float32, (B, K)."""
    pooled: Tensor
    """The classifier's own feature, float32, (B, D)."""


@torch.inference_mode()
def predict(model: JointModel, images: Tensor, augmentation: Augmentation) -> Predicted:
    """Classify images, uint8, (B, 3, S, S), on plain views with the model in eval mode."""
    logits, pooled = [], []
    for rows in images.split(ROWS_AT_ONCE):
        features = model.encoder(augmentation.plain(rows))[1]
        pooled.append(features.float().cpu())
        logits.append(model.head(features).float().cpu())
    return Predicted(torch.cat(logits), torch.cat(pooled))
