import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import silhouette_score
from sklearn.neighbors import kneighbors_graph

from spice_ray.core.cluster_count import (
    MOST_ROWS,
    Candidate,
    laplacian_spectrum,
    mean_silhouette,
    ranked,
    sample_ids,
    score_counts,
)


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clusters(sizes: list[int], width: int, noise: float, seed: int = 0) -> NDArray[np.float32]:
    """Unit rows around axes of the space, ``noise`` standard deviations in each dimension."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return unit(np.eye(width)[labels] + noise * rng.normal(size=(len(labels), width)))


def proposed(rows: NDArray[np.float32], least: int = 2, most: int = 30) -> int:
    return ranked(score_counts(rows, least, most))[0].num_clusters


@pytest.mark.parametrize("noise", [0.02, 0.2])
@pytest.mark.parametrize("sizes", [[60, 60], [50] * 5, [40] * 12, [200, 100, 50, 40, 30, 30, 20], [25] * 25])
def test_as_many_clusters_are_proposed_as_there_are(sizes: list[int], noise: float) -> None:
    assert proposed(clusters(sizes, 32, noise)) == len(sizes)


def test_clusters_that_come_in_groups_are_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    groups, members = np.repeat(np.eye(24)[:3], 3, axis=0), 0.4 * np.eye(24)[3:12]
    centres = np.repeat(groups + members, 60, axis=0)
    rows = unit(centres + 0.05 * rng.normal(size=centres.shape))
    by_silhouette = max(score_counts(rows, 2, 20), key=lambda candidate: candidate.silhouette)
    assert (proposed(rows, most=20), by_silhouette.num_clusters) == (9, 3)


def test_the_product_of_the_two_signs_ranks_and_a_tie_goes_to_the_fewer() -> None:
    candidates = score_counts(clusters([40] * 4, 8, 0.3), 2, 9)
    assert [c.num_clusters for c in candidates] == list(range(2, 10))
    assert all(c.score == c.eigengap * max(0, c.silhouette) for c in candidates)
    tied = [Candidate(3, 0.5, 1, 0.5), Candidate(2, 0.5, 1, 0.5), Candidate(4, 0.6, 1, 0.6)]
    assert [c.num_clusters for c in ranked(tied)] == [4, 2, 3]


def test_the_same_rows_give_the_same_scores_on_any_number_of_threads() -> None:
    rows, threads = clusters([300] * 3, 16, 0.3), torch.get_num_threads()
    expected = score_counts(rows, 2, 12)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert score_counts(rows, 2, 12) == expected
    finally:
        torch.set_num_threads(threads)


def test_the_silhouette_is_that_of_scikit_learn() -> None:
    rows = clusters([30, 20, 10], 6, 0.4).astype(np.float64)
    tree = linkage(rows, "ward")
    for count in (2, 3, 7, 59):  # of 59 clusters nearly all have one row
        labels = fcluster(tree, count, "maxclust").astype(np.int64) - 1
        expected = silhouette_score(rows, labels, metric="cosine")
        assert mean_silhouette(rows, labels) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_rows", [40, 700])  # 700 in one part are beyond what is solved as a dense matrix
def test_the_spectrum_is_that_of_the_dense_laplacian(num_rows: int) -> None:
    rows = clusters([num_rows], 4, 0.5)
    graph = kneighbors_graph(rows, 15).toarray()
    graph = graph + graph.T
    scale = 1 / np.sqrt(graph.sum(axis=1))
    laplacian = np.eye(num_rows) - scale[:, None] * graph * scale
    expected = np.linalg.eigvalsh(laplacian)[:20]
    np.testing.assert_allclose(laplacian_spectrum(rows, 20), expected, atol=1e-5)
    assert expected[1] > 1e-3  # one part


def test_parts_that_do_not_touch_have_an_eigenvalue_of_zero_each() -> None:
    spectrum = laplacian_spectrum(clusters([600, 20, 20, 20, 20, 600], 8, 0.01), 10)
    assert np.abs(spectrum[:6]).max() < 1e-6
    assert spectrum[6] > 0.01


def test_nothing_speaks_for_any_number_of_clusters_among_equal_rows() -> None:
    candidates = score_counts(np.repeat(unit(np.ones((1, 5))), 50, axis=0), 2, 8)
    assert len(candidates) == 7
    assert all(c.score == c.silhouette == 0 for c in candidates)
    assert ranked(candidates)[0].num_clusters == 2


def test_one_cluster_scores_far_below_two() -> None:
    one, two = clusters([200], 16, 0.3), clusters([100, 100], 16, 0.1)
    assert 10 * ranked(score_counts(one, 2, 20))[0].score < ranked(score_counts(two, 2, 20))[0].score


@pytest.mark.parametrize(("num_rows", "least", "most", "expected"), [(2, 2, 9, [2]), (5, 3, 9, [3, 4]), (5, 5, 9, [5])])
def test_no_more_candidates_than_rows_allow(num_rows: int, least: int, most: int, expected: list[int]) -> None:
    candidates = score_counts(clusters([num_rows], 4, 0.5), least, most)
    assert [c.num_clusters for c in candidates] == expected
    assert all(np.isfinite(c).all() for c in candidates)


def test_a_bounded_sample_of_the_rows_is_drawn_by_the_seed() -> None:
    ids = np.arange(0, 30_000, 3)
    found = sample_ids(ids, 0)
    assert len(found) == len(set(found.tolist())) == MOST_ROWS
    assert set(found.tolist()) <= set(ids.tolist())
    assert (np.diff(found) > 0).all()
    assert found.tolist() == sample_ids(ids, 0).tolist() != sample_ids(ids, 1).tolist()
    assert sample_ids(ids[:7], 0).tolist() == ids[:7].tolist()
