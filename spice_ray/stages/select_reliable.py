"""Between stages 2 and 3: pseudo-labels are kept where the neighbours agree (SPICE III-C, eqs. 6-7)."""

from typing import NamedTuple

import torch
from torch import Tensor

from spice_ray.core.neighbors import exact_neighbors
from spice_ray.core.reliability import (
    cluster_weights,
    consistency_ratio,
    equal_weights,
    kept_per_cluster,
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
    kept: list[int]
    """Reliable samples of each cluster."""


def select_reliable(
    settings: Reliable,
    embeddings: Tensor,
    labels: Tensor,
    confidences: Tensor,
    *,
    num_clusters: int,
    neighbors: int,
    key: int,
    device: torch.device,
) -> ReliableSamples:
    """Keep the samples whose label most of their neighbours share.

    Args:
        settings: The recipe's thresholds and balancing.
        embeddings: Unit rows, float32, (N, D).
        labels: The chosen head's, int64, (N,).
        confidences: Its probability of them, float32, (N,).
        num_clusters: K.
        neighbors: Ns.
        key: Decides which samples a balancing cut leaves out.
        device: Where to look for neighbours.
    """
    nearest, _ = exact_neighbors(embeddings, neighbors, device=device)
    nearest = nearest.to(labels.device)
    consistency = consistency_ratio(labels, nearest)
    reliable = reliable_samples(
        labels,
        confidences,
        nearest,
        min_consistency=settings.min_consistency,
        min_confidence=settings.min_confidence,
    )
    match settings.balance:
        case "none":
            weights = equal_weights(reliable)
        case "weights":
            weights = cluster_weights(labels, reliable, num_clusters)
        case "smallest":
            weights = smallest_cluster_cut(labels, reliable, num_clusters, key)
    return ReliableSamples(consistency, weights, kept_per_cluster(labels, weights > 0, num_clusters).tolist())
