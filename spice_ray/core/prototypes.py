"""Prototype pseudo-labelling (SPICE III-B, eqs. 2-5).

M samples in a labelling round, D embedding width, K clusters.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


class PseudoLabels(NamedTuple):
    """Labelled positions of a round; a position may occur more than once."""

    indices: Tensor
    """int64, (K * (M // K),)."""
    labels: Tensor
    """int64, (K * (M // K),)."""


def prototypes(embeddings: Tensor, probs: Tensor, *, confident_fraction: float) -> Tensor:
    """The mean embedding of each cluster's most confident samples (eq. 2), (K, D).

    Args:
        embeddings: Unit rows of the plain view, (M, D).
        probs: Cluster probabilities of the weak view, (M, K).
        confident_fraction: Share of M / K samples that are averaged, in (0, 1].
    """
    num_samples, num_clusters = probs.shape
    num_confident = max(1, int(confident_fraction * num_samples / num_clusters))
    most_confident = probs.topk(num_confident, dim=0).indices  # (num_confident, K)
    return embeddings[most_confident].mean(dim=0)


def overlapping_labels(embeddings: Tensor, centres: Tensor) -> PseudoLabels:
    """Give each cluster the M // K samples nearest its prototype (eqs. 3-4); a sample may be claimed twice.

    Args:
        embeddings: Unit rows, (M, D).
        centres: Prototypes, (K, D).
    """
    per_cluster = len(embeddings) // len(centres)
    # Prototypes need no normalising: each row is ranked only against itself.
    nearest = (centres @ embeddings.T).topk(per_cluster, dim=1).indices  # (K, M // K)
    return PseudoLabels(nearest.flatten(), _repeated_labels(centres, per_cluster))


def exclusive_labels(embeddings: Tensor, centres: Tensor) -> PseudoLabels:
    """Give each cluster M // K samples, none to two clusters: the paper's non-overlap ablation.

    Pairs of sample and unit prototype are served by falling similarity, as long as the sample is free and the cluster
    is not full.

    Args:
        embeddings: Unit rows, (M, D).
        centres: Prototypes, (K, D).
    """
    per_cluster = len(embeddings) // len(centres)
    similarity = (embeddings @ F.normalize(centres, dim=1).T).cpu().numpy()
    owners = _greedy_owners(similarity, per_cluster)
    order = np.argsort(owners, kind="stable")
    indices = torch.from_numpy(order[owners[order] >= 0]).to(embeddings.device)
    return PseudoLabels(indices, _repeated_labels(centres, per_cluster))


def _greedy_owners(similarity: NDArray[np.float32], per_cluster: int) -> NDArray[np.int64]:
    """The cluster that owns each sample, or -1."""
    num_samples, num_clusters = similarity.shape
    owners = np.full(num_samples, -1)
    free = np.full(num_clusters, per_cluster)
    for pair in np.argsort(-similarity, axis=None, kind="stable"):
        sample, cluster = divmod(int(pair), num_clusters)
        if owners[sample] < 0 and free[cluster]:
            owners[sample] = cluster
            free[cluster] -= 1
            if not free.any():
                break
    return owners


def _repeated_labels(centres: Tensor, per_cluster: int) -> Tensor:
    return torch.arange(len(centres), device=centres.device).repeat_interleave(per_cluster)


def double_softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy on the softmax of the softmax output (eq. 5): each sample's loss, (B,).

    The second softmax bounds the gradient of samples that are already sure, so wrong pseudo-labels weigh less.
    """
    return F.cross_entropy(logits.softmax(dim=1), labels, reduction="none")


def negative_entropy(probs: Tensor) -> Tensor:
    """Minus the entropy of the mean prediction, a scalar: least when clusters are equally large."""
    mean = probs.mean(dim=0)
    return (mean * mean.clamp_min(1e-12).log()).sum()


def unsupervised_loss(embeddings: Tensor, logits: Tensor, *, confident_fraction: float) -> Tensor:
    """Eq. 5 with one labelling round over all samples (M = N), on plain views: what heads and trials are ranked by.

    Args:
        embeddings: Unit rows, (N, D).
        logits: Cluster logits, (N, K).
        confident_fraction: As in :func:`prototypes`.

    Returns:
        A scalar; log(1 + (K - 1) / e) for perfect, balanced and certain clusters.
    """
    centres = prototypes(embeddings, logits.softmax(dim=1), confident_fraction=confident_fraction)
    pseudo = overlapping_labels(embeddings, centres)
    return double_softmax_loss(logits[pseudo.indices], pseudo.labels).mean()
