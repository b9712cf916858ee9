"""What a frozen feature knows of the classes: classifiers that are shown labels, which no clustering ever is.

They tell whether the encoder or the heads are to blame for a poor clustering.

Shapes: n images whose class is shown, m images to be classified, D feature width, C classes, b rows of a block.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

_TEMPERATURE = 0.1
_SIMILARITIES_AT_ONCE = 1 << 24


def knn_labels(
    features: Floats, labels: Ints, queries: Floats, *, k: int, at_once: int = _SIMILARITIES_AT_ONCE
) -> Ints:
    """The class that the k nearest rows vote for, with the weights exp(cosine / 0.1).

    The classifier of Wu et al. (CVPR 2018, section 3.4) with the temperature of MoCo's CIFAR demo. Of rows that are
    equally near as float32, those with the least row numbers vote; of classes with equally many votes the least wins.

    Args:
        features: Unit rows of the images that vote, (n, D). Rows of zeros have the cosine 0 to any other.
        labels: Their classes, (n,).
        queries: Unit rows of the images to be classified, (m, D), m >= 1.
        k: Rows that vote, in 1..n.
        at_once: Cosines that are held at a time, but never less than those of one query.

    Returns:
        A class for each query, (m,).

    Raises:
        ValueError: ``k`` is not in 1..n.
    """
    _check_k(k, len(features))
    return _winners(_similarities(queries, features, at_once), labels, k)


def knn_labels_left_out(features: Floats, labels: Ints, *, k: int, at_once: int = _SIMILARITIES_AT_ONCE) -> Ints:
    """The class that the k nearest other rows of each row vote for (leave-one-out).

    Args:
        features: As in ``knn_labels``.
        labels: As in ``knn_labels``.
        k: Rows that vote, in 1..n-1.
        at_once: As in ``knn_labels``.

    Returns:
        A class for each row, (n,).

    Raises:
        ValueError: ``k`` is not in 1..n-1.
    """
    _check_k(k, len(features) - 1)
    return _winners(_similarities_to_others(features, at_once), labels, k)


def linear_labels(features: Floats, labels: Ints, queries: Floats) -> Ints:
    """What a linear classifier that was trained on all features makes of the queries.

    Multinomial logistic regression as scikit-learn has it, with a weak L2 penalty, on columns of mean 0 and variance 1.
    It stops after 100 iterations of L-BFGS whether it has converged or not, which bounds its time.

    Args:
        features: Rows of the images to learn from, of any length, (n, D), n >= 1.
        labels: Their classes, (n,); where all are of one class, so is the answer.
        queries: Rows of the images to be classified, (m, D), m >= 1.

    Returns:
        A class for each query, (m,).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if (labels == labels[0]).all():
        return np.full(len(queries), labels[0])
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features, labels)
    return np.asarray(classifier.predict(queries), np.int64)


def _check_k(k: int, num_voters: int) -> None:
    if not 1 <= k <= num_voters:
        raise ValueError(f"k={k} of {num_voters} rows that may vote; k must be at least 1 and at most their number")


def _similarities(queries: Floats, features: Floats, at_once: int) -> Iterator[Tensor]:
    """Cosines of the queries with all features, block by block, (b, n)."""
    step, bank = max(1, at_once // len(features)), torch.from_numpy(features).T
    for first in range(0, len(queries), step):
        yield torch.from_numpy(queries[first : first + step]) @ bank


def _similarities_to_others(features: Floats, at_once: int) -> Iterator[Tensor]:
    first = 0
    for block in _similarities(features, features, at_once):
        block.diagonal(first).fill_(-torch.inf)
        yield block
        first += len(block)


def _winners(blocks: Iterator[Tensor], labels: Ints, k: int) -> Ints:
    classes = np.unique(labels)
    positions = torch.from_numpy(np.searchsorted(classes, labels))
    winners = torch.cat([_vote(block, positions, len(classes), k) for block in blocks])
    found: Ints = classes[winners.numpy()]
    return found


def _vote(similarities: Tensor, positions: Tensor, num_classes: int, k: int) -> Tensor:
    """The place of each query's winner among the classes, (b,)."""
    nearest, rows = _nearest(similarities, k)
    votes = torch.zeros(len(rows), num_classes)
    # Votes are added by falling weight, so that equal votes have equal sums.
    votes.scatter_add_(1, positions[rows], (nearest / _TEMPERATURE).exp())
    return votes.argmax(1)


def _nearest(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest cosines of each query, falling, and the numbers of their rows, both (b, k)."""
    values, rows = similarities.topk(min(k + 1, similarities.shape[1]))
    is_tied = values[:, k - 1] == values[:, -1]
    values, rows = values[:, :k], rows[:, :k]
    # Of more rows than there is room for topk takes any.
    if is_tied.any():
        values[is_tied], rows[is_tied] = _first_nearest(similarities[is_tied], values[is_tied, -1:], k)
    return values, rows


def _first_nearest(similarities: Tensor, kth: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same, given the k-th greatest cosines, (b, 1): of the rows that equal it the first."""
    nearer, tied = similarities > kth, similarities == kth
    is_first = tied.cumsum(1, dtype=torch.int32) <= k - nearer.sum(1, keepdim=True)
    rows = (nearer | (tied & is_first)).nonzero()[:, 1].view(-1, k)
    values, order = similarities.gather(1, rows).sort(1, descending=True)
    return values, rows.gather(1, order)
