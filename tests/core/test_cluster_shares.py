"""Sizes of clusters by the embedding alone: known answers, scikit-learn's, and rows that leave little to find."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score

from spice_ray.core.cluster_count import neighbor_graph
from spice_ray.core.cluster_shares import estimate_sizes, spectral_labels

EVEN, UNEVEN = [60] * 10, [200, 155, 120, 93, 72, 56, 43, 33, 26, 20]


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clusters(sizes: list[int], noise: float, width: int = 32, seed: int = 0) -> NDArray[np.float32]:
    """Unit rows around axes of the space, ``noise`` standard deviations in each dimension."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return unit(np.eye(width)[labels] + noise * rng.normal(size=(len(labels), width)))


def wrong_part(found: NDArray[np.int64], sizes: list[int]) -> float:
    """Total variation between the shares."""
    return float(np.abs(found / found.sum() - np.asarray(sizes) / sum(sizes)).sum() / 2)


@pytest.mark.parametrize("noise", [0.02, 0.15])  # the parts of the graph do not touch, or do
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN, [600, 60], [40] * 25])
def test_clusters_that_stand_apart_are_counted(sizes: list[int], noise: float) -> None:
    assert estimate_sizes(clusters(sizes, noise), len(sizes)).tolist() == sizes


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN])
def test_clusters_that_overlap_are_counted_nearly(sizes: list[int]) -> None:
    assert wrong_part(estimate_sizes(clusters(sizes, 0.3), 10), sizes) < 0.08


def test_a_stretched_cluster_stays_whole_where_k_means_cuts_it() -> None:
    rng = np.random.default_rng(0)
    angles = np.concatenate([rng.uniform(0, 2.4, 900), rng.uniform(2.8, 3.0, 90)])
    rows = unit(np.stack([np.cos(angles), np.sin(angles)], axis=1) + 0.01 * rng.normal(size=(990, 2)))
    cut = np.bincount(KMeans(2, n_init=4, random_state=0).fit_predict(rows))
    assert estimate_sizes(rows, 2).tolist() == [900, 90]
    assert cut.max() < 700


@pytest.mark.parametrize("num_rows", [400, 900])  # solved as a dense matrix, and by Lanczos
def test_labels_are_those_of_scikit_learn_where_the_graph_is_in_one_part(num_rows: int) -> None:
    graph = neighbor_graph(clusters([num_rows // 4] * 4, 0.3), 10)
    theirs = SpectralClustering(4, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    assert adjusted_rand_score(theirs.fit_predict(graph.toarray()), spectral_labels(graph, 4)) > 0.97


def test_a_row_that_comes_many_times_is_no_cluster_by_that() -> None:
    rows = clusters([300, 200, 100], 0.15)
    found = estimate_sizes(np.concatenate([rows, np.repeat(rows[:1], 400, axis=0)]), 3).tolist()
    assert found in ([700, 200, 100], [600, 300, 100], [500, 300, 200])
    assert estimate_sizes(np.concatenate([rows, rows]), 3).tolist() == [600, 400, 200]


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = clusters(UNEVEN, 0.35)
    found = [estimate_sizes(rows[order], 10).tolist() for order in (slice(None), slice(None, None, -1))]
    assert found[0] == found[1]


def test_threads_do_not_matter() -> None:
    rows, threads = clusters(UNEVEN, 0.35), torch.get_num_threads()
    expected = estimate_sizes(rows, 10).tolist()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert estimate_sizes(rows, 10).tolist() == expected
    finally:
        torch.set_num_threads(threads)


def test_equal_rows_are_in_one_cluster_and_a_cluster_without_rows_counts_one() -> None:
    three = np.repeat(clusters([1, 1, 1], 0.1), [50, 30, 20], axis=0)
    assert estimate_sizes(three, 3).tolist() == [50, 30, 20]
    assert estimate_sizes(three, 5).tolist() == [50, 30, 20, 1, 1]
    assert estimate_sizes(three, 2).sum() == 100
    assert estimate_sizes(three[:50], 4).tolist() == [50, 1, 1, 1]


@pytest.mark.parametrize("num_clusters", [2, 19, 20, 21, 300])
def test_no_cluster_is_without_a_share_however_many_there_are(num_clusters: int) -> None:
    sizes = estimate_sizes(clusters([20], 0.5), num_clusters)
    assert sizes.shape == (num_clusters,)
    assert sizes.min() >= 1
    assert (np.diff(sizes) <= 0).all()
    if num_clusters >= 20:
        assert set(sizes.tolist()) == {1}


def test_few_rows_for_many_clusters_are_counted() -> None:
    assert wrong_part(estimate_sizes(clusters([5] * 150, 0.001, width=150), 150), [5] * 150) < 0.02


def test_the_rows_are_left_as_they_were() -> None:
    rows = clusters(UNEVEN, 0.3)
    before = rows.copy()
    estimate_sizes(rows, 10)
    assert np.array_equal(rows, before)
