"""SimCLR's loss (Chen et al. 2020): each view is told from all other views of the batch; neither queue nor momentum."""

import torch
from torch import Tensor
from torch.nn import functional as F


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each view's other view among the 2 B - 1 other views (SimCLR's eq. 1).

    Args:
        first: Unit rows, one view of each image of the global batch, (B, P).
        second: Unit rows, the other view of the same images, (B, P).
        temperature: tau.

    Returns:
        The mean over all 2 B views, a scalar.
    """
    views = torch.cat([first, second])
    logits = (views @ views.T / temperature).fill_diagonal_(-torch.inf)
    others = torch.arange(len(views), device=views.device).roll(len(first))
    return F.cross_entropy(logits, others)
