"""Consensus of clustering heads: their clusters are called by the same names and each sample's is voted on.

Not in the paper, which keeps one head. How far the heads disagree about a sample says how unsure its cluster is.

Shapes: H heads, V of them vote, N samples, K clusters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROWS_PER_BLOCK = 1 << 16

Ints = NDArray[np.int64]


class Consensus(NamedTuple):
    """What the voting heads make of each sample."""

    labels: Ints
    """The cluster with most votes, int64, (N,)."""
    disagreement: NDArray[np.float32]
    """Share of the voting heads that chose another cluster, float32 in [0, 1), (N,)."""


def voting_heads(losses: Sequence[float], chosen: int, num_clusters: int) -> list[int]:
    """The heads that may vote: the chosen one and those with nearly its loss, which merge no more classes than it does.

    Merging two more classes adds 1 / K to the unsupervised loss (see ``heads.more`` in ``settings.py``); a head may be
    worse than the chosen one by less than half of that. It is the difference that counts, because samples that are hard
    to tell apart raise the loss of every head. A head that mixes parts of classes may pass.

    Args:
        losses: The unsupervised loss of each head, (H,); of one that is no number the head does not vote.
        chosen: Number of the chosen head.
        num_clusters: K.

    Returns:
        Numbers of heads: the chosen one, then the others by rising loss.
    """
    bound = losses[chosen] + 0.5 / num_clusters
    others = [head for head, loss in enumerate(losses) if head != chosen and loss < bound]
    return [chosen, *sorted(others, key=lambda head: losses[head])]


def align(reference: Ints, other: Ints, num_clusters: int) -> Ints:
    """What each cluster of one head is called by another: the matching under which most samples agree (Hungarian).

    Args:
        reference: Cluster of each sample by the head whose names are kept, int64 in 0..K-1, (N,).
        other: Cluster of the same samples by the other head, int64 in 0..K-1, (N,).
        num_clusters: K.

    Returns:
        A permutation, int64, (K,): ``align(reference, other, K)[other]`` is in the reference's names.

    Raises:
        ValueError: The two disagree about N, or a cluster is not in 0..K-1.
    """
    from scipy.optimize import linear_sum_assignment

    _check([reference, other], num_clusters)
    counts = np.zeros(num_clusters * num_clusters, np.int64)
    for rows in _blocks(len(reference)):
        pairs = other[rows].astype(np.int64) * num_clusters + reference[rows]
        counts += np.bincount(pairs, minlength=len(counts))
    _, names = linear_sum_assignment(counts.reshape(num_clusters, num_clusters), maximize=True)
    return np.asarray(names, np.int64)


def consensus(labels: Sequence[Ints], num_clusters: int) -> Consensus:
    """Vote on the cluster of each sample, one head one vote.

    Clusters are counted, and not probabilities averaged: a trained head is nearly certain of most samples, so that the
    two seldom differ, and votes need V labels for each sample where probabilities would need V K numbers, or all heads
    applied again. Samples are taken in blocks, so that working memory does not grow with N.

    Args:
        labels: For each voting head the cluster of each sample, V arrays, int64 in 0..K-1, (N,). The first head is the
            reference: the result has its names, and where votes are equal its cluster, or else that of the head which
            comes first.
        num_clusters: K.

    Returns:
        Labels and disagreement. A cluster in which the reference is outvoted everywhere has no sample.

    Raises:
        ValueError: No head votes, the heads disagree about N, or a cluster is not in 0..K-1.
    """
    _check(labels, num_clusters)
    names = [np.arange(num_clusters), *(align(labels[0], other, num_clusters) for other in labels[1:])]
    winners = np.empty(len(labels[0]), np.int64)
    disagreement = np.empty(len(labels[0]), np.float32)
    for rows in _blocks(len(winners)):
        votes = np.stack([name[head[rows]] for name, head in zip(names, labels, strict=True)])  # (V, block)
        agreeing = np.stack([(votes == vote).sum(axis=0) for vote in votes])
        # argmax takes the first of equals. Counting by head and not by cluster needs no (block, K) table.
        first = agreeing.argmax(axis=0)[None]
        winners[rows] = np.take_along_axis(votes, first, axis=0)[0]
        disagreement[rows] = 1 - np.take_along_axis(agreeing, first, axis=0)[0] / len(labels)
    return Consensus(winners, disagreement)


def _blocks(count: int) -> list[slice]:
    return [slice(first, first + _ROWS_PER_BLOCK) for first in range(0, count, _ROWS_PER_BLOCK)]


def _check(labels: Sequence[Ints], num_clusters: int) -> None:
    lengths = [len(head) for head in labels]
    if len(set(lengths)) != 1:
        raise ValueError(f"heads label {lengths} samples; give at least one head, and all of them the same samples")
    for head in labels:
        if len(head) and not (head.min() >= 0 and head.max() < num_clusters):
            raise ValueError(
                f"clusters are {head.min()}..{head.max()}; with {num_clusters} clusters they must be 0..K-1"
            )
