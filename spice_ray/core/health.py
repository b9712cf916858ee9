"""Whether a contrastive embedding is worth something, without a label.

B unit rows of width P.
"""

import math

import torch
from torch import Tensor

from spice_ray.contracts import Health

_ROWS = 1024
"""Rows that are compared with each other: enough for two digits, and a fraction of a step's time."""
_STILL = 0.1
"""A dimension is collapsed when it varies by less than this share of what it would on a sphere filled evenly."""
_LEAST_RANK = 1.5
_MOST_COLLAPSED = 0.95


@torch.no_grad()
def measure_health(queries: Tensor, keys: Tensor) -> Tensor:
    """The four signs as float32, (4,), on the device: fetching them is left to who can wait.

    Args:
        queries: Unit rows of one view, (B, P), B >= 2.
        keys: Unit rows of the other view of the same images, (B, P).
    """
    alignment = (queries - keys).square().sum(dim=1).mean()
    rows = keys[:_ROWS].float()
    distances = torch.pdist(rows).square()
    uniformity = torch.logsumexp(-2 * distances, dim=0) - math.log(len(distances))
    shares = torch.linalg.svdvals(rows.nan_to_num())  # which refuses what is no number
    shares = shares / shares.sum()
    rank = torch.exp(-torch.special.xlogy(shares, shares).sum())
    still = rows.std(dim=0) < _STILL / math.sqrt(rows.shape[1])
    return torch.stack([alignment, uniformity, rank, still.float().mean()])


def why_collapsed(health: Health) -> str | None:
    """The sign that all images became alike, as a clause, or None."""
    if not all(map(math.isfinite, health)):
        return "the projections are not numbers"
    if health.effective_rank < _LEAST_RANK:
        return f"the projections lie on a line (effective rank {health.effective_rank:.2f})"
    if health.collapsed > _MOST_COLLAPSED:
        return f"{health.collapsed:.0%} of the projection's dimensions hardly vary"
    return None
