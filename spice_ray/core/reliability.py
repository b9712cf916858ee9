"""Reliable pseudo-labels: samples whose neighbours agree with them (paper III-C, eqs. 6-7), and how to balance them.

Shapes: N samples, Ns neighbours of each, K clusters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spice_ray.core.order import permutation

FEWEST_NEIGHBORS, MOST_NEIGHBORS = 10, 100
"""Bounds on Ns where it is counted by the size of the clusters."""
_ROWS_PER_BLOCK = 1 << 16


class Agreement(NamedTuple):
    """What the neighbours say of each sample's label."""

    agreeing: Tensor
    """How many of those asked have the label, int64, (N,)."""
    asked: Tensor
    """How many are asked, int64, (N,)."""


def agreement(labels: Tensor, neighbors: Tensor, asked: Tensor) -> Agreement:
    """Ask the nearest neighbours of each sample for their labels.

    Rows are taken in blocks, so that working memory does not grow with N.

    Args:
        labels: Cluster of each sample, int64, (N,).
        neighbors: Row numbers of its nearest neighbours, the nearest first, int64 or int32, (N, k); may be mapped.
        asked: Ns: how many of them count, int64 in 1..k, (N,).

    Raises:
        ValueError: The three do not fit each other.
    """
    if neighbors.ndim != 2 or neighbors.shape[0] != len(labels) or asked.shape != labels.shape:
        raise ValueError(
            f"neighbours of shape {tuple(neighbors.shape)} and {tuple(asked.shape)} of them asked for {len(labels)} "
            "labels; give each label a row of neighbours and a count"
        )
    if len(labels) and not 1 <= int(asked.min()) <= int(asked.max()) <= neighbors.shape[1]:
        raise ValueError(f"{int(asked.min())} to {int(asked.max())} of {neighbors.shape[1]} neighbours cannot be asked")
    agreeing = torch.empty_like(asked)
    places = torch.arange(neighbors.shape[1], device=labels.device)
    for first in range(0, len(labels), _ROWS_PER_BLOCK):
        rows = slice(first, first + _ROWS_PER_BLOCK)
        agrees = labels[neighbors[rows].to(labels.device).long()] == labels[rows, None]
        agreeing[rows] = (agrees & (places < asked[rows, None])).sum(dim=1)
    return Agreement(agreeing, asked)


def neighbors_by_cluster(labels: Tensor, num_clusters: int, most: int) -> Tensor:
    """Ns for each sample by the size of its own cluster: a sixth of it, between 10 and 100.

    One number for all asks more of a small cluster than it has members, and its samples could never be reliable. A
    sixth is what the paper takes of CIFAR-10's classes in the default, N / (6 K).

    Args:
        labels: Cluster of each sample, int64 in 0..K-1, (N,).
        num_clusters: K.
        most: How many there are to ask, at least 1.

    Returns:
        int64, (N,).
    """
    sizes = torch.bincount(labels, minlength=num_clusters)
    each = (sizes / 6).round().long().clamp(FEWEST_NEIGHBORS, MOST_NEIGHBORS).clamp_max(most)
    return each[labels]


def consistency_ratio(found: Agreement) -> Tensor:
    """Share of each sample's neighbours that have its label (eq. 6): r in [0, 1], float64, (N,)."""
    return found.agreeing.double() / found.asked


def reliable_samples(found: Agreement, confidences: Tensor, *, min_consistency: float, min_confidence: float) -> Tensor:
    """The samples whose label is reliable (eq. 7): more than tau_c of the neighbours agree, and the head is sure.

    Args:
        found: What the neighbours say.
        confidences: The head's probability of each sample's cluster, float, (N,).
        min_consistency: tau_c in [0, 1), exclusive.
        min_confidence: In [0, 1), exclusive and compared in the dtype of ``confidences``; 0 gates nothing.

    Returns:
        bool, (N,).
    """
    # Counts and not ratios: in float32 the ratio 99/100 is greater than 0.99.
    consistent = found.agreeing.double() > min_consistency * found.asked.double() + 1e-9
    return consistent if min_confidence == 0 else consistent & (confidences > min_confidence)


def kept_per_cluster(labels: Tensor, reliable: Tensor, num_clusters: int) -> Tensor:
    """Number of reliable samples in each cluster.

    Args:
        labels: Cluster of each sample, int64 in 0..K-1, (N,).
        reliable: bool, (N,).
        num_clusters: K.

    Returns:
        int64, (K,).
    """
    return torch.bincount(labels[reliable], minlength=num_clusters)


def equal_weights(reliable: Tensor) -> Tensor:
    """Weight 1 for each reliable sample and 0 for the others, float32, (N,)."""
    return reliable.float()


def cluster_weights(labels: Tensor, reliable: Tensor, num_clusters: int) -> Tensor:
    """Weights under which every cluster with reliable samples counts as much as any other.

    Args:
        labels: Cluster of each sample, int64 in 0..K-1, (N,).
        reliable: bool, (N,).
        num_clusters: K.

    Returns:
        float32, (N,): num_reliable / (K' n_k) for the n_k reliable samples of cluster k, where K' clusters have any,
        and 0 for samples that are not reliable. The mean over the reliable ones is 1.
    """
    kept = kept_per_cluster(labels, reliable, num_clusters).double()
    num_filled = int((kept > 0).sum())
    # The clamps meet only clusters without reliable samples, whose weight no sample takes.
    per_cluster = kept.sum() / (max(1, num_filled) * kept.clamp(min=1))
    return torch.where(reliable, per_cluster[labels], 0.0).float()


def smallest_cluster_cut(labels: Tensor, reliable: Tensor, num_clusters: int, key: int) -> Tensor:
    """Weights that cut every cluster to as many reliable samples as the smallest one has.

    The smallest cluster that has any: the published code lets an empty cluster empty all the others.

    Args:
        labels: Cluster of each sample, int64 in 0..K-1, (N,).
        reliable: bool, (N,).
        num_clusters: K.
        key: A ``stream_key``; which samples stay depends on it alone.

    Returns:
        float32, (N,): 1 for the samples that stay and 0 for the others.
    """
    weights = torch.zeros(len(labels), device=labels.device)
    kept = kept_per_cluster(labels, reliable, num_clusters)
    if not kept.any():
        return weights
    smallest = int(kept[kept > 0].min())
    shuffled = torch.from_numpy(permutation(key, len(labels))).to(labels.device)
    shuffled = shuffled[reliable[shuffled]]
    for cluster in range(num_clusters):
        weights[shuffled[labels[shuffled] == cluster][:smallest]] = 1.0
    return weights
