"""What clusterings are compared by without labels, beside the unsupervised loss: the less, the better.

N samples, K clusters, k neighbours.
"""

import torch
from torch import Tensor


def neighbor_disagreement(labels: Tensor, nearest: Tensor, shares: Tensor) -> float:
    """The share of neighbours with another label, and how far the clusters' sizes are from what they should be.

    Without the second part a single cluster would be the best of all.

    Args:
        labels: Clusters, int64, (N,).
        nearest: Row numbers of each sample's neighbours, integer, (N, k).
        shares: What part of the samples each cluster has, in any order, (K,).

    Returns:
        From 0 to below 2: 0 where all neighbours agree and the sizes are those; 1 - max(shares) is what a single
        cluster costs.
    """
    differ = sum((labels[near.long()] != labels).double().sum() for near in nearest.T)
    sizes = labels.bincount(minlength=len(shares)).double() / len(labels)
    distance = (sizes.sort().values - shares.double().sort().values).abs().sum() / 2
    return float(differ / nearest.numel() + distance)


def negative_mutual_information(logits: Tensor) -> float:
    """Minus the mutual information of samples and clusters: mean entropy less the entropy of the mean.

    Args:
        logits: float32, (N, K).

    Returns:
        From -log K, certain and equal clusters, to 0.
    """
    probs = logits.double().softmax(dim=1)
    mean = probs.mean(dim=0)
    value: Tensor = torch.special.entr(probs).sum(dim=1).mean() - torch.special.entr(mean).sum()
    return float(value)
