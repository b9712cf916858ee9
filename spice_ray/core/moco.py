"""Momentum contrast: the loss, the queue and the momentum encoder (SPICE III-A, eq. 1; MoCo, He et al. 2020).

B rows of a global batch, P projection width, Q keys in the queue.
"""

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_ray.core.encoders import Encoder
from spice_ray.core.order import seeded

Model = TypeVar("Model", bound=nn.Module)


class ProjectedEncoder(nn.Module):
    """An encoder with MoCo-v2's two-layer projector; gives unit rows."""

    def __init__(self, encoder: Encoder, projection_dim: int, key: int) -> None:
        super().__init__()
        self.encoder = encoder
        with seeded(key):
            self.projector = nn.Sequential(
                nn.Linear(encoder.embed_dim, encoder.embed_dim), nn.ReLU(), nn.Linear(encoder.embed_dim, projection_dim)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Project normalised images, (B, 3, S, S), to unit rows, float32, (B, P)."""
        _, pooled = self.encoder(images)
        return F.normalize(self.projector(pooled).float(), dim=1)


def momentum_copy(model: Model) -> Model:
    """A copy of ``model`` that is moved by :func:`update_momentum` and not by gradients."""
    copied = copy.deepcopy(model)
    copied.requires_grad_(False)
    return copied


@torch.no_grad()
def update_momentum(momentum_model: nn.Module, model: nn.Module, share: float | Tensor) -> None:
    """Move every weight of the momentum model by 1 - m of the way to the model's: a number, or float32, ()."""
    old: list[Tensor] = list(momentum_model.parameters())
    new: list[Tensor] = list(model.parameters())
    if isinstance(share, Tensor):  # of which torch has no lerp of many tensors at once
        steps = torch._foreach_sub(new, old)
        torch._foreach_mul_(steps, share)
        torch._foreach_add_(old, steps)
    else:
        torch._foreach_lerp_(old, new, share)


class KeyQueue:
    """The Q most recent keys, a ring on the device."""

    def __init__(self, size: int, width: int, key: int, device: torch.device) -> None:
        """Start with random unit rows drawn from ``key``."""
        generator = torch.Generator().manual_seed(key)
        self.keys = F.normalize(torch.randn(size, width, generator=generator), dim=1).to(device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        """Of the oldest key, int64, (1,); on the device too, so that a GPU may record a step."""

    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by ``keys``, (B, P); B divides Q."""
        places = self.position + torch.arange(len(keys), device=keys.device)
        self.keys.index_copy_(0, places, keys)
        self.position.add_(len(keys)).remainder_(len(self.keys))


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each query's own key among the queue's (eq. 1).

    Args:
        queries: Unit rows, (B, P).
        keys: The queries' positives, unit rows, (B, P).
        queue: Negatives, unit rows, (Q, P).
        temperature: tau.

    Returns:
        The mean over the batch, a scalar.
    """
    positives = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([positives, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def cosine(step: float, total: float, warmup: float) -> float:
    """The share of the learning rate at ``step``: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
