import math
import warnings

import numpy as np
import pytest

from spice_ray.core.probes import knn_labels, knn_labels_left_out, linear_labels


def unit_rows(count: int, width: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def sign_rows(count: int, seed: int) -> np.ndarray:
    """Unit rows of +-1/2: their cosines are -1, -1/2, 0, 1/2 or 1, exactly, and most are shared by many."""
    return (np.random.default_rng(seed).choice([-0.5, 0.5], size=(count, 4))).astype(np.float32)


def slow_label(features: np.ndarray, labels: np.ndarray, query: np.ndarray, k: int) -> int:
    cosines = [float(np.dot(row.astype(np.float64), query.astype(np.float64))) for row in features]
    nearest = sorted(range(len(features)), key=lambda row: (-cosines[row], row))[:k]
    votes = {
        label: math.fsum(math.exp(cosines[row] / 0.1) for row in nearest if labels[row] == label)
        for label in sorted({int(labels[row]) for row in nearest})
    }
    return max(votes, key=lambda label: (votes[label], -label))


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("has_ties", [False, True])
def test_knn_equals_a_loop_over_all_pairs(k: int, has_ties: bool) -> None:
    make = (lambda count, seed: sign_rows(count, seed)) if has_ties else (lambda count, seed: unit_rows(count, 5, seed))
    features, queries = make(60, 1), make(25, 2)
    labels = np.random.default_rng(3).choice([2, 5, 900], 60)
    expected = [slow_label(features, labels, query, k) for query in queries]
    assert knn_labels(features, labels, queries, k=k).tolist() == expected


@pytest.mark.parametrize("k", [1, 7, 59])
@pytest.mark.parametrize("features", [unit_rows(60, 5, 1), sign_rows(60, 1)], ids=["distinct", "ties"])
def test_leave_one_out_equals_knn_without_the_row_itself(k: int, features: np.ndarray) -> None:
    labels = np.random.default_rng(3).choice([2, 5, 900], 60)
    expected = [
        slow_label(np.delete(features, row, axis=0), np.delete(labels, row), features[row], k) for row in range(60)
    ]
    assert knn_labels_left_out(features, labels, k=k).tolist() == expected


def test_leave_one_out_leaves_out_the_row_and_keeps_its_duplicate() -> None:
    features = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    assert knn_labels_left_out(features, np.array([0, 1, 2, 3]), k=1).tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize(("num_far", "winner"), [(7, 0), (8, 1)])
def test_a_vote_weighs_the_exponential_of_ten_times_the_cosine(num_far: int, winner: int) -> None:
    # exp(8) / exp(6) = 7.39: that many votes at a cosine of 0.6 are worth one at 0.8.
    features = np.array([[0.8, 0.6], *[[0.6, 0.8]] * num_far], np.float32)
    labels = np.array([0, *[1] * num_far])
    assert knn_labels(features, labels, np.array([[1, 0]], np.float32), k=len(labels)).tolist() == [winner]


def test_equal_votes_go_to_the_least_class_and_equally_near_rows_vote_by_rising_number() -> None:
    features = np.array([[1, 0]] * 4, np.float32)
    query = features[:1]
    labels = np.array([9, 4, 4, 9])
    assert [int(knn_labels(features, labels, query, k=k)[0]) for k in (1, 2, 3, 4)] == [9, 4, 4, 4]


def test_an_image_of_zeros_is_equally_near_to_all() -> None:
    features = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
    assert knn_labels(features, np.array([3, 1, 2]), np.zeros((1, 2), np.float32), k=1).tolist() == [3]


@pytest.mark.parametrize("at_once", [1, 61, 500])
def test_the_size_of_a_block_does_not_matter(at_once: int) -> None:
    features, queries, labels = unit_rows(60, 5, 1), unit_rows(25, 5, 2), np.random.default_rng(3).integers(0, 4, 60)
    whole, others = knn_labels(features, labels, queries, k=7), knn_labels_left_out(features, labels, k=7)
    assert knn_labels(features, labels, queries, k=7, at_once=at_once).tolist() == whole.tolist()
    assert knn_labels_left_out(features, labels, k=7, at_once=at_once).tolist() == others.tolist()


@pytest.mark.parametrize("k", [0, 6])
def test_more_neighbours_than_there_are_are_refused(k: int) -> None:
    features, labels = unit_rows(5, 3, 1), np.zeros(5, np.int64)
    with pytest.raises(ValueError, match=f"k={k} of 5"):
        knn_labels(features, labels, features, k=k)
    with pytest.raises(ValueError, match=f"k={max(k - 1, 0)} of 4 |k=5 of 4 "):
        knn_labels_left_out(features, labels, k=max(k - 1, 0))


def test_a_linear_classifier_separates_what_a_plane_separates() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 6)).astype(np.float32)
    labels = np.where(features @ np.array([1, -2, 0, 0.5, 0, 0]) > 0, 70, 3)
    # Far from the plane: next to it a classifier with a penalty may err.
    queries = rng.normal(size=(300, 6)).astype(np.float32)
    distances = queries @ np.array([1, -2, 0, 0.5, 0, 0])
    is_far = abs(distances) > 0.5
    found = linear_labels(features, labels, queries[is_far])
    assert found.dtype == np.int64
    assert found.tolist() == np.where(distances[is_far] > 0, 70, 3).tolist()


def test_the_units_of_a_column_do_not_matter_to_a_linear_classifier() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    features = (rng.normal(size=(200, 4)) + labels[:, None] * [1, 0, -1, 0]).astype(np.float32)
    scaled = (features * [1e-3, 1, 1e3, 1]).astype(np.float32)
    before, after = (linear_labels(rows[:150], labels[:150], rows[150:]) for rows in (features, scaled))
    assert before.tolist() == after.tolist()
    assert (before == labels[150:]).mean() > 0.7


def test_a_linear_classifier_that_was_shown_one_class_knows_no_other() -> None:
    rows = unit_rows(4, 3, 1)
    assert linear_labels(rows, np.full(4, 6), rows[:2]).tolist() == [6, 6]


def test_a_linear_classifier_that_stops_early_does_not_warn() -> None:
    # Random walks whose class is in their steps take more than 100 iterations.
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(400, 60))
    labels = np.digitize(steps @ rng.normal(size=60), [-3, 3])
    walks = steps.cumsum(axis=1).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_labels(walks, labels, walks)
