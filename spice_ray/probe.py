"""Accuracy of classifiers that are shown labels, on the frozen features of a run; evaluate alone asks for it.

Shapes: n labelled images, D feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_ray.core.probes import knn_labels, knn_labels_left_out, linear_labels

NUM_NEIGHBORS = 200
"""k of k-NN, as in MoCo's CIFAR demo; fewer where there are not as many."""
_PARTS = 5
"""One of so many is held out where there is no test split."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Read = Callable[[Ints], Floats]
"""Gives the features of the images with these sample ids, which rise, (n, D)."""


@dataclass(frozen=True)
class Labelled:
    """The images of a run that have a label, in sample_id order, which is the shuffled one."""

    ids: Ints
    """Sample ids, (n,)."""
    classes: Ints
    """(n,)."""
    is_test: NDArray[np.bool_]
    """Whether they are of the test split, (n,)."""

    @property
    def is_split(self) -> bool:
        """Whether there are some to learn from in other splits, and some of the test split to score."""
        return bool(self.is_test.any() and not self.is_test.all())


def knn_row(method: str, images: Labelled, read: Read | None) -> dict[str, Any]:
    """Accuracy of k-NN: of the test split by the others; without one, of every image by all others.

    Args:
        method: What the row is called.
        images: Those that have a label.
        read: Gives their unit features; none where these are too large.

    Returns:
        ``method``; ``accuracy``, null where there are no features or fewer than two images; ``protocol``, ``split`` or
        ``leave_one_out``; ``n_train`` images to learn from and ``n_test`` to score; ``k`` of them vote.
    """
    if not images.is_split:
        others = len(images.ids) - 1
        k = min(NUM_NEIGHBORS, others)
        found = knn_labels_left_out(read(images.ids), images.classes, k=k) if read and k else None
        return _row(method, "leave_one_out", others, images.classes, found) | {"k": k}
    train, test = np.flatnonzero(~images.is_test), np.flatnonzero(images.is_test)
    k, found = min(NUM_NEIGHBORS, len(train)), None
    if read:
        found = knn_labels(read(images.ids[train]), images.classes[train], read(images.ids[test]), k=k)
    return _row(method, "split", len(train), images.classes[test], found) | {"k": k}


def linear_row(method: str, images: Labelled, read: Read | None) -> dict[str, Any]:
    """Accuracy of a linear classifier on the test split; without one, on the last fifth of the images.

    Args:
        method: What the row is called.
        images: Those that have a label.
        read: Gives their features, of any length; none where these are too large.

    Returns:
        As ``knn_row``, but with the protocol ``hold_out`` where there is no test split; ``k`` is null.
    """
    protocol, is_test = "split", images.is_test
    if not images.is_split:
        # Any part of a shuffled order is a random one, and this one is the same for all runs on the same shards.
        protocol, num_train = "hold_out", len(is_test) * (_PARTS - 1) // _PARTS
        is_test = np.arange(len(is_test)) >= num_train
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    found = None
    if read and len(train):
        found = linear_labels(read(images.ids[train]), images.classes[train], read(images.ids[test]))
    return _row(method, protocol, len(train), images.classes[test], found) | {"k": None}


def _row(method: str, protocol: str, n_train: int, labels_true: Ints, labels_pred: Ints | None) -> dict[str, Any]:
    accuracy = None if labels_pred is None else float(np.mean(labels_pred == labels_true))
    return {
        "method": method,
        "accuracy": accuracy,
        "protocol": protocol,
        "n_train": n_train,
        "n_test": len(labels_true),
    }
