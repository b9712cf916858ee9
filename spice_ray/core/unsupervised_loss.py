"""Eq. 5 with one labelling round over all samples (M = N), out of core: what heads and trials are ranked by.

N samples, D embedding width, K clusters. Embeddings come in blocks and are never together in memory; one number for
each sample and cluster is kept, in a file where they are many.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from spice_ray.core.prototypes import match_shares, quotas_of

IN_MEMORY_BYTES = 64 << 20
"""Tables of scores up to this size are kept in memory."""
BLOCK_ROWS = 1 << 14
"""A constant, as the order of summation depends on it."""

Blocks = Callable[[], Iterable[Tensor]]
"""Begins anew the unit rows of all samples in order, float32, ``BLOCK_ROWS`` at a time."""


def perfect_loss(num_clusters: int) -> float:
    """The unsupervised loss of perfect, balanced, certain clusters: log(1 + (K - 1) / e)."""
    return math.log1p((num_clusters - 1) / math.e)


def merged_loss(num_clusters: int) -> float:
    """The least unsupervised loss of a head that is certain and merges two of K equal classes: 1 / K more.

    Each cluster claims N / K samples. Where one cluster has two classes, the others are N / K samples short between
    them, however they share the rest. For each of these a sample is claimed that is certain of another cluster, which
    costs 1 more than a right claim (eq. 5): over N claims, 1 / K more than :func:`perfect_loss`.

    Where the least loss of all heads is above it, every head has merged classes, or is unsure of as much. A head that
    is unsure which of two clusters samples belong to may merge classes below it.
    """
    return perfect_loss(num_clusters) + 1 / num_clusters


def unsupervised_loss(embeddings: Blocks, logits: Tensor, shares: Tensor, *, confident_fraction: float) -> float:
    """The mean double-softmax loss of the labels that the prototypes of all samples give them.

    Args:
        embeddings: Blocks of the plain views' embeddings, (N, D) in all.
        logits: Cluster logits of the plain views, float32, (K, N): a table as :func:`new_table` makes it.
        shares: What part of the samples each cluster has, in any order, (K,); matched to the clusters by their mass.
        confident_fraction: As in :func:`spice_ray.core.prototypes.quotas_of`.

    Returns:
        At least :func:`perfect_loss` where shares are equal; not a number where a logit or an embedding is none.
    """
    num_clusters, num_samples = logits.shape
    if not _finite(logits):
        return math.nan
    scores = new_table(num_clusters, num_samples, logits.device)
    for rows in _blocks(num_samples):
        scores[:, rows] = logits[:, rows].softmax(dim=0)
    mass = sum((scores[:, rows].double().sum(dim=1) for rows in _blocks(num_samples)), torch.zeros(()))
    quotas = quotas_of(match_shares(shares, mass), num_samples, confident_fraction=confident_fraction)
    centres = _mean_of_largest(embeddings, scores, quotas.confident)
    for rows, block in zip(_blocks(num_samples), embeddings(), strict=True):
        scores[:, rows] = centres @ block.T
    if not _finite(scores):
        return math.nan
    total = 0.0
    for rows, chosen in zip(_blocks(num_samples), _largest(scores, quotas.labelled), strict=True):
        total += float(_costs(logits[:, rows])[chosen].double().sum())
    return total / int(quotas.labelled.sum())


def new_table(num_clusters: int, num_samples: int, device: torch.device) -> Tensor:
    """An uninitialised float32 (K, N); in a nameless file where it is large, which the system may write out."""
    if device.type != "cpu" or 4 * num_clusters * num_samples <= IN_MEMORY_BYTES:
        return torch.empty(num_clusters, num_samples, device=device)
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(num_clusters, num_samples)))


def _blocks(num_samples: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK_ROWS, num_samples)) for start in range(0, num_samples, BLOCK_ROWS))


def _finite(table: Tensor) -> bool:
    return all(bool(table[:, rows].isfinite().all()) for rows in _blocks(table.shape[1]))


def _costs(logits: Tensor) -> Tensor:
    """The double-softmax loss of each label for each sample, (K, B)."""
    probs = logits.softmax(dim=0)
    return probs.logsumexp(dim=0) - probs


def _mean_of_largest(embeddings: Blocks, scores: Tensor, counts: Tensor) -> Tensor:
    """Mean embedding of the ``counts[k]`` samples with the largest scores of row k, float32, (K, D)."""
    sums: Tensor | None = None
    for chosen, block in zip(_largest(scores, counts), embeddings(), strict=True):
        part = (chosen.to(block.dtype) @ block).double()
        sums = part if sums is None else sums + part
    assert sums is not None
    return (sums / counts[:, None].to(sums.device)).float()


def _largest(scores: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """Which samples have the ``counts[k]`` largest scores of row k, of equals the first: blocks of bool, (K, B)."""
    num_samples = scores.shape[1]
    # One row at a time: kthvalue copies what it looks at.
    least = torch.stack(
        [row.kthvalue(num_samples - count + 1).values for row, count in zip(scores, counts.tolist(), strict=True)]
    )[:, None]
    above = torch.zeros_like(least, dtype=torch.int64)
    for rows in _blocks(num_samples):
        above += (scores[:, rows] > least).sum(dim=1, keepdim=True)
    free = counts[:, None].to(scores.device) - above
    for rows in _blocks(num_samples):
        equal = scores[:, rows] == least
        yield (scores[:, rows] > least) | (equal & (equal.cumsum(dim=1) <= free))
        free -= equal.sum(dim=1, keepdim=True)
