"""How much double softmax (SPICE eq. 5) weakens the gradient of cross-entropy; derived here, by the chain rule.

With p = softmax(z), q = softmax(p), s = sum_j p_j q_j and the label y, the loss L = -log q_y has

    dL/dz_i = p_i (q_i - [i = y] - (s - p_y)),

and cross-entropy on p has p_i - [i = y]. Where r is the mean of q over the other classes, weighted by p, their ratio is

    p_y (1 - q_y + r)   for the labelled class: at most 2 p_y, and always below 1,
    p_y + q_i - s       for another class i: negative where s - q_i > p_y, as for one that is neither label nor rival.

So the gradient of a sample is about that of cross-entropy times its probability of the label: a wrong pseudo-label on a
sample that is sure of something else has next to no gradient, and under cross-entropy it has the most.

Shapes: B samples, K >= 2 clusters.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def gradient_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of double softmax by that of cross-entropy, both in the logits.

    Args:
        logits: z, float, finite, (B, K).
        labels: y, int64 in 0..K-1, (B,).

    Returns:
        The ratio for each class, of the dtype of ``logits``, (B, K); its limit where both gradients are 0.
    """
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    probs = logits.softmax(dim=1)
    twice = probs.softmax(dim=1)
    # A softmax of their own, because p_i / (1 - p_y) is 0 / 0 for a sample that is certain.
    others = logits.masked_fill(is_label, -torch.inf).softmax(dim=1)
    labelled = probs[is_label][:, None]
    of_label = labelled * (1 - twice[is_label][:, None] + (others * twice).sum(dim=1, keepdim=True))
    of_others = labelled + twice - (probs * twice).sum(dim=1, keepdim=True)
    return torch.where(is_label, of_label, of_others)


def double_softmax_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Each sample's gradient of ``double_softmax_loss`` in its logits, (B, K); arguments as in ``gradient_ratio``."""
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    others = logits.softmax(dim=1).masked_fill(is_label, 0)
    # The sum of the others and not 1 - p_y, whose digits cancel where p_y is near 1.
    of_cross_entropy = torch.where(is_label, -others.sum(dim=1, keepdim=True), others)
    return gradient_ratio(logits, labels) * of_cross_entropy


def even_ratio(labelled: float, num_clusters: int) -> float:
    """The ratio where the other classes are equally likely; it is then the same for every class.

    Args:
        labelled: p_y in [0, 1].
        num_clusters: K.

    Returns:
        p_y (1 - q_y) K / (K - 1): 0 at p_y = 0, 1 / K at 1 / K and K / (K - 1 + e) at 1.
    """
    rest = (num_clusters - 1) * math.exp((1 - labelled) / (num_clusters - 1) - labelled)  # (1 - q_y) / q_y
    return labelled * rest / (1 + rest) * num_clusters / (num_clusters - 1)
