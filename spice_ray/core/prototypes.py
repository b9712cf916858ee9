"""Prototype pseudo-labelling (SPICE III-B, eqs. 2-5).

M samples in a labelling round, D embedding width, K clusters.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

_ROUNDING = 1e-6


class PseudoLabels(NamedTuple):
    """Labelled positions of a round; a position may occur more than once."""

    indices: Tensor
    """int64, (sum of the quotas,)."""
    labels: Tensor
    """int64, (sum of the quotas,)."""


class Quotas(NamedTuple):
    """How many of M samples a cluster gets; int64, (K,), on the CPU."""

    confident: Tensor
    """Of its most confident samples, whose mean is its prototype; at least 1."""
    labelled: Tensor
    """Of the samples nearest its prototype, which take its label; at least 1."""


def quotas_of(shares: Tensor, num_samples: int, *, confident_fraction: float) -> Quotas:
    """The whole part of each cluster's share of ``num_samples``.

    Args:
        shares: Of each cluster, float64, (K,), on the CPU; their sum is 1.
        num_samples: M, at least K.
        confident_fraction: Part of a cluster's share that makes its prototype, in (0, 1].

    Returns:
        Quotas; the sum of those that are labelled is at most M.
    """
    # In the arithmetic of floats 49 * (1 / 49) lies below 1.
    sizes = shares * num_samples + _ROUNDING
    labelled = sizes.long().clamp_min(1)
    while labelled.sum() > num_samples:  # shares below 1 / M were raised to a whole sample
        largest = max(range(len(shares)), key=lambda k: (int(labelled[k]), -float(shares[k]), k))
        labelled[largest] -= 1
    return Quotas((sizes * confident_fraction).long().clamp_min(1), labelled)


def equal_shares(num_clusters: int) -> Tensor:
    """1 / K for each cluster, float64, (K,)."""
    return torch.full((num_clusters,), 1 / num_clusters, dtype=torch.float64)


def match_shares(shares: Tensor, mass: Tensor) -> Tensor:
    """Which cluster has which share: the largest goes to the column with most mass, and so on.

    Clusters have no identity before they are trained, so a prior is a multiset, and it is matched in each round anew.

    Args:
        shares: What part of the samples each cluster has, above 0, in any order, (K,); relative to their sum.
        mass: Column sums of the probabilities, (K,); of equal ones the lower column comes first.

    Returns:
        float64, (K,), on the CPU; the sum is 1.
    """
    shares = shares.double() / shares.double().sum()
    matched = torch.empty_like(shares)
    matched[mass.cpu().argsort(descending=True, stable=True)] = shares.sort(descending=True).values
    return matched


def prototypes(embeddings: Tensor, probs: Tensor, counts: Tensor) -> Tensor:
    """The mean embedding of each cluster's most confident samples (eq. 2), (K, D).

    Args:
        embeddings: Unit rows of the plain view, (M, D).
        probs: Cluster probabilities, (M, K).
        counts: How many samples of each cluster are averaged, int64, (K,), on the CPU.
    """
    most_confident = probs.topk(int(counts.max()), dim=0).indices  # (largest count, K)
    return torch.stack([embeddings[most_confident[:count, k]].mean(dim=0) for k, count in enumerate(counts.tolist())])


def overlapping_labels(embeddings: Tensor, centres: Tensor, quotas: Tensor) -> PseudoLabels:
    """Give each cluster as many samples nearest its prototype as its quota (eqs. 3-4); a sample may be claimed twice.

    Args:
        embeddings: Unit rows, (M, D).
        centres: Prototypes, (K, D).
        quotas: int64, (K,), on the CPU.
    """
    # Prototypes need no normalising: each row is ranked only against itself.
    nearest = (centres @ embeddings.T).topk(int(quotas.max()), dim=1).indices  # (K, largest quota)
    return PseudoLabels(
        torch.cat([nearest[k, :quota] for k, quota in enumerate(quotas.tolist())]), _repeated_labels(centres, quotas)
    )


def exclusive_labels(embeddings: Tensor, centres: Tensor, quotas: Tensor) -> PseudoLabels:
    """Give each cluster as many samples as its quota, none to two clusters: the paper's non-overlap ablation.

    Pairs of sample and unit prototype are served by falling similarity, as long as the sample is free and the cluster
    is not full.

    Args:
        embeddings: Unit rows, (M, D).
        centres: Prototypes, (K, D).
        quotas: int64, (K,), on the CPU; their sum is at most M.
    """
    similarity = (embeddings @ F.normalize(centres, dim=1).T).cpu().numpy()
    owners = _greedy_owners(similarity, quotas.numpy())
    order = np.argsort(owners, kind="stable")
    indices = torch.from_numpy(order[owners[order] >= 0]).to(embeddings.device)
    return PseudoLabels(indices, _repeated_labels(centres, quotas))


def _greedy_owners(similarity: NDArray[np.float32], quotas: NDArray[np.int64]) -> NDArray[np.int64]:
    """The cluster that owns each sample, or -1."""
    num_samples, num_clusters = similarity.shape
    owners = np.full(num_samples, -1)
    free = quotas.copy()
    for pair in np.argsort(-similarity, axis=None, kind="stable"):
        sample, cluster = divmod(int(pair), num_clusters)
        if owners[sample] < 0 and free[cluster]:
            owners[sample] = cluster
            free[cluster] -= 1
            if not free.any():
                break
    return owners


def _repeated_labels(centres: Tensor, quotas: Tensor) -> Tensor:
    return torch.arange(len(centres)).repeat_interleave(quotas).to(centres.device)
