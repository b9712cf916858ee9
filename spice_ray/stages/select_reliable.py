"""Between stages 2 and 3: pseudo-labels are kept where the neighbours agree (SPICE III-C, eqs. 6-7)."""

from typing import NamedTuple

import torch
from torch import Tensor

from spice_ray.core.reliability import (
    agreement,
    cluster_weights,
    consistency_ratio,
    equal_weights,
    kept_per_cluster,
    neighbors_by_cluster,
    reliable_samples,
    smallest_cluster_cut,
)
from spice_ray.settings import Reliable


class ReliableSamples(NamedTuple):
    """What is known of each sample's pseudo-label."""

    consistency: Tensor
    """Share of neighbours with the same label, float64, (N,)."""
    weights: Tensor
    """Weight in stage 3's supervised loss, float32, (N,); 0 where the label is not reliable."""
    consistent: list[int]
    """Samples of each cluster that pass the thresholds."""
    kept: list[int]
    """Those of them that balancing has left: the reliable ones."""


def select_reliable(
    settings: Reliable,
    nearest: Tensor,
    labels: Tensor,
    confidences: Tensor,
    *,
    num_clusters: int,
    asked: int | None,
    key: int,
) -> ReliableSamples:
    """Keep the samples whose label most of their neighbours share.

    Args:
        settings: The recipe's thresholds and balancing.
        nearest: Row numbers of each sample's neighbours, the nearest first, int64 or int32, (N, k).
        labels: The chosen head's, int64, (N,).
        confidences: Its probability of them, float32, (N,).
        num_clusters: K.
        asked: Ns, at most k; None: by the size of each sample's cluster.
        key: Decides which samples a balancing cut leaves out.
    """
    if asked is None:
        counts = neighbors_by_cluster(labels, num_clusters, nearest.shape[1])
    else:
        counts = torch.full_like(labels, asked)
    found = agreement(labels, nearest, counts)
    consistency = consistency_ratio(found)
    reliable = reliable_samples(
        found, confidences, min_consistency=settings.min_consistency, min_confidence=settings.min_confidence
    )
    match settings.balance:
        case "none":
            weights = equal_weights(reliable)
        case "weights":
            weights = cluster_weights(labels, reliable, num_clusters)
        case "smallest":
            weights = smallest_cluster_cut(labels, reliable, num_clusters, key)
    passed, left = (kept_per_cluster(labels, samples, num_clusters).tolist() for samples in (reliable, weights > 0))
    return ReliableSamples(consistency, weights, passed, left)
