"""Heads on embeddings that are given begin with clusters of k-means, whose best stay where no head has better ones.

From random weights heads merge clusters that overlap: their first pseudo-labels are as good as chance. Those of k-means
are not; and where clusters are round, or differ in size, it is k-means that is right.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spice_ray.config import Recipe
from spice_ray.contracts import Bank
from spice_ray.core.cluster_count import sample_ids
from spice_ray.core.kmeans import KMeansHead, kmeans_head
from spice_ray.core.modularity import fits_better, modularity
from spice_ray.core.neighbors import exact_neighbors
from spice_ray.core.order import permutation, stream_key
from spice_ray.image_counts import num_views
from spice_ray.stages.features import Features
from spice_ray.stages.train_heads import TrainedHead, evaluate_head

FEWEST_STARTS = 20
"""Of k-means. On generated mixtures the best of 20 is right a little more often than the best of 10."""
MOST_VALUES = 2e7
"""What k-means is fitted to; of more, to a part of the rows."""
_NEIGHBORS = 10

Ints = NDArray[np.int64]


class Choice(NamedTuple):
    """Which of the heads is chosen, and by what."""

    chosen: int
    modularities: list[float]
    """Of each head's clusters."""


def fit_starts(bank: Bank, train_ids: Ints, recipe: Recipe) -> list[KMeansHead]:
    """Runs of k-means on the embedding, one for each head that there may be, and at least ``FEWEST_STARTS``.

    Args:
        bank: Its features are the unit rows times the root of D, as those of given embeddings are.
        train_ids: Rows of the bank that may be looked at, int64, at least K.
        recipe: The run's, with K settled.
    """
    width, num_clusters = bank.embedding.shape[1], recipe.num_clusters
    order = permutation(stream_key(recipe.seed, "kmeans"), len(train_ids))
    rows = np.sort(order[: max(num_clusters, int(MOST_VALUES) // width)])
    embedding = bank.embedding[train_ids[rows]]
    count = max(FEWEST_STARTS, recipe.heads.count + recipe.heads.more)
    seeds = (stream_key(recipe.seed, "kmeans", index) % (1 << 32) for index in range(count))
    return [kmeans_head(embedding, num_clusters, seed, scale=math.sqrt(width)) for seed in seeds]


def best_start(starts: Sequence[KMeansHead], bank: Bank, train_ids: Ints, recipe: Recipe) -> TrainedHead:
    """The run of k-means with the least inertia as a member of the ensemble, with its unsupervised loss."""
    head = min(starts, key=lambda start: start.inertia).head
    features = Features(bank, torch.device("cpu"))
    loss = evaluate_head(head, features, train_ids, recipe.heads, recipe.num_clusters)
    return TrainedHead(head.state_dict(), loss, 0, [loss])


@torch.no_grad()
def choose_by_neighbors(heads: Sequence[TrainedHead], bank: Bank, train_ids: Ints, recipe: Recipe) -> Choice:
    """The head whose clusters fit the neighbours in the embedding best, by at most 5,000 rows of ``train_ids``.

    The last of the heads is k-means, which is chosen unless another is better by more than chance would have it.

    The nearest neighbours do not count, as many as were views: heads have learnt that these have one label, and would
    be judged by how well they learn by heart. It is the next ones that do.
    """
    rows = sample_ids(train_ids, recipe.seed)
    share = len(rows) / len(train_ids)
    taught = math.ceil(share * num_views(recipe.heads.views, len(train_ids), recipe.num_clusters))
    judging = max(1, num_views(_NEIGHBORS, len(rows), recipe.num_clusters))
    found = exact_neighbors(bank.embedding[rows], min(taught + judging, len(rows) - 1))[0].numpy()
    neighbors = found[:, min(taught, found.shape[1] - 1) :]
    plain = torch.from_numpy(bank.plain[rows].astype(np.float32))
    labels = [trained.head()(plain).argmax(dim=1).numpy() for trained in heads]
    fits = [modularity(of_head, neighbors) for of_head in labels]
    best = int(np.argmax(fits))
    return Choice(best if fits_better(labels[best], labels[-1], neighbors) else len(heads) - 1, fits)
