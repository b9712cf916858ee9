import itertools

import numpy as np
import pytest

from spice_ray.core.metrics import clustering_accuracy, kmeans_labels, many_to_one_accuracy, scores


def slow_accuracy(labels_true: list[int], labels_pred: list[int]) -> float:
    classes, clusters = sorted(set(labels_true)), sorted(set(labels_pred))
    # Padding with classes that nobody has makes every injection a permutation.
    classes += [-1 - i for i in range(len(clusters))]
    best = 0
    for chosen in itertools.permutations(classes, len(clusters)):
        match = dict(zip(clusters, chosen, strict=True))
        best = max(best, sum(match[p] == t for t, p in zip(labels_true, labels_pred, strict=True)))
    return best / len(labels_true)


def test_accuracy_is_one_under_any_renaming_of_the_clusters() -> None:
    truth = np.array([0, 0, 1, 1, 2, 2])
    for names in itertools.permutations([7, 3, 100]):
        assert clustering_accuracy(truth, np.array(names)[truth]) == 1.0


@pytest.mark.parametrize(("num_classes", "num_clusters"), [(3, 3), (2, 4), (4, 2), (1, 3), (3, 1)])
def test_accuracy_equals_the_best_of_all_matchings(num_classes: int, num_clusters: int) -> None:
    rng = np.random.default_rng(num_classes * 10 + num_clusters)
    for _ in range(5):
        truth, found = rng.integers(0, num_classes, 25), rng.integers(0, num_clusters, 25)
        assert clustering_accuracy(truth, found) == pytest.approx(slow_accuracy(truth.tolist(), found.tolist()))


def test_many_to_one_lets_clusters_share_a_class_and_accuracy_does_not() -> None:
    truth, found = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 1])
    assert clustering_accuracy(truth, found) == pytest.approx(3 / 6)
    assert many_to_one_accuracy(truth, found) == pytest.approx(5 / 6)


def test_scores_name_both_averages_and_count_images_and_filled_clusters() -> None:
    # Entropies log 2 and 1.5 log 2, mutual information log 2: 2 / 2.5 and 1 / sqrt(1.5).
    found = scores(np.array([0, 0, 1, 1]), np.array([5, 5, 6, 9]))
    assert found.nmi == pytest.approx(0.8)
    assert found.nmi_geometric == pytest.approx(1.5**-0.5)
    assert found.acc == pytest.approx(0.75)
    # Pairs: 1 together in both, 2 in the classes, 1 in the clusters, 6 in all.
    assert found.ari == pytest.approx((1 - 2 / 6) / (1.5 - 2 / 6))
    assert (found.n, found.k, found.many_to_one) == (4, 3, 1.0)


def test_one_cluster_for_everything_scores_the_largest_class_and_no_information() -> None:
    found = scores(np.array([0, 0, 0, 1]), np.zeros(4, np.int64))
    assert (found.acc, found.nmi, found.ari) == (0.75, 0.0, 0.0)


@pytest.mark.parametrize(("num_true", "num_pred"), [(3, 4), (0, 0)])
def test_classes_and_clusters_of_different_images_are_refused(num_true: int, num_pred: int) -> None:
    with pytest.raises(ValueError, match=rf"shapes \({num_true},\) and \({num_pred},\)"):
        scores(np.zeros(num_true, np.int64), np.zeros(num_pred, np.int64))


def test_kmeans_finds_separated_groups_and_repeats_itself_under_one_seed() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 20)
    features = (np.eye(3)[truth] * 10 + rng.normal(size=(60, 3))).astype(np.float32)
    found = kmeans_labels(features, 3, seed=1)
    assert clustering_accuracy(truth, found) == 1.0
    assert np.array_equal(found, kmeans_labels(features, 3, seed=1))


def test_kmeans_of_more_than_twenty_million_values_still_finds_the_groups() -> None:
    truth = np.arange(11_000) % 2
    features = np.random.default_rng(0).random((11_000, 2_000), np.float32)
    features += truth[:, None].astype(np.float32)
    assert features.size > 2e7
    assert clustering_accuracy(truth, kmeans_labels(features, 2, seed=0)) == 1.0
