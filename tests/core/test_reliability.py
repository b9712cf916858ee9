from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spice_ray.core.reliability import (
    Agreement,
    agreement,
    cluster_weights,
    consistency_ratio,
    equal_weights,
    kept_per_cluster,
    neighbors_by_cluster,
    reliable_samples,
    smallest_cluster_cut,
)

LABELS = torch.tensor([0, 0, 0, 1, 1, 3, 0])
RELIABLE = torch.tensor([True, True, True, True, True, True, False])


def ask_all(labels: Tensor, neighbors: Tensor) -> Agreement:
    return agreement(labels, neighbors, torch.full_like(labels, neighbors.shape[1]))


def agreeing_labels(num_agreeing: int, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """Labels and neighbours such that ``num_agreeing`` of sample 0's neighbours share its label."""
    labels = torch.tensor([0] + [0] * num_agreeing + [1] * (num_neighbors - num_agreeing))
    neighbors = torch.arange(1, num_neighbors + 1).repeat(len(labels), 1)
    return labels, neighbors


def is_reliable(num_agreeing: int, num_neighbors: int, min_consistency: float) -> bool:
    labels, neighbors = agreeing_labels(num_agreeing, num_neighbors)
    sure = torch.ones(len(labels))
    found = ask_all(labels, neighbors)
    return bool(reliable_samples(found, sure, min_consistency=min_consistency, min_confidence=0)[0])


def test_consistency_ratio_is_the_share_of_neighbors_with_the_same_label() -> None:
    labels, neighbors = torch.tensor([0, 0, 1, 1]), torch.tensor([[1, 2], [0, 2], [3, 0], [0, 1]])
    ratio = consistency_ratio(ask_all(labels, neighbors))
    assert ratio.tolist() == [0.5, 0.5, 0.5, 0.0]
    assert ratio.dtype == torch.float64


def test_consistency_ratio_equals_a_loop_over_samples_across_block_borders() -> None:
    generator = torch.Generator().manual_seed(0)
    num_samples = 2 * (1 << 16) + 5
    labels = torch.randint(3, (num_samples,), generator=generator)
    neighbors = torch.randint(num_samples, (num_samples, 3), generator=generator)
    label_list, neighbor_lists = labels.tolist(), neighbors.tolist()
    slow = [sum(label_list[j] == label for j in row) / 3 for label, row in zip(label_list, neighbor_lists, strict=True)]
    assert consistency_ratio(ask_all(labels, neighbors)).tolist() == slow


@pytest.mark.parametrize(
    ("num_agreeing", "num_neighbors", "min_consistency", "expected"),
    [
        (99, 100, 0.99, False),
        (100, 100, 0.99, True),
        (29, 30, 0.95, True),
        (28, 30, 0.95, False),
        (9, 10, 0.9, False),
        (10, 10, 0.9, True),
        (7, 10, 0.7, False),
        (57, 100, 0.57, False),
        (0, 10, 0.0, False),
        (1, 10, 0.0, True),
    ],
)
def test_the_threshold_is_exclusive_in_counts(
    num_agreeing: int, num_neighbors: int, min_consistency: float, expected: bool
) -> None:
    assert is_reliable(num_agreeing, num_neighbors, min_consistency) is expected


@pytest.mark.parametrize("num_neighbors", [1, 3, 7, 10, 30, 99, 100])
def test_a_threshold_written_as_a_share_never_lets_that_very_share_pass(num_neighbors: int) -> None:
    for count in range(num_neighbors):
        assert not is_reliable(count, num_neighbors, count / num_neighbors)
        assert is_reliable(count + 1, num_neighbors, count / num_neighbors)


def test_the_confidence_gate_is_exclusive_and_off_at_zero() -> None:
    labels, neighbors = torch.zeros(3, dtype=torch.int64), torch.tensor([[1], [0], [0]])
    confidences = torch.tensor([0.98, 0.99, 1.0])
    found = ask_all(labels, neighbors)
    gated = reliable_samples(found, confidences, min_consistency=0.5, min_confidence=0.99)
    assert gated.tolist() == [False, False, True]
    ungated = reliable_samples(found, torch.zeros(3), min_consistency=0.5, min_confidence=0)
    assert ungated.tolist() == [True, True, True]


def test_a_higher_threshold_never_adds_a_sample() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (80,), generator=generator)
    neighbors, sure = torch.randint(80, (80, 10), generator=generator), torch.ones(80)
    found = ask_all(labels, neighbors)
    sets = [reliable_samples(found, sure, min_consistency=tau / 20, min_confidence=0) for tau in range(20)]
    assert sets[0].any()
    assert not sets[-1].all()
    assert all(not (higher & ~lower).any() for lower, higher in pairwise(sets))


@pytest.mark.parametrize(("shape", "asked"), [((4,), [1] * 4), ((4, 0), [1] * 4), ((3, 2), [1] * 4), ((4, 2), [1] * 3)])
def test_neighbors_that_do_not_fit_the_labels_are_refused(shape: tuple[int, ...], asked: list[int]) -> None:
    with pytest.raises(ValueError, match=r"4 labels|cannot be asked"):
        agreement(torch.zeros(4, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64), torch.tensor(asked))


@pytest.mark.parametrize("asked", [0, 3])
def test_none_or_more_neighbors_than_there_are_cannot_be_asked(asked: int) -> None:
    labels, neighbors = torch.zeros(2, dtype=torch.int64), torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="of 2 neighbours cannot be asked"):
        agreement(labels, neighbors, torch.tensor([1, asked]))


def test_each_sample_asks_its_own_number_of_the_nearest() -> None:
    labels = torch.tensor([0, 0, 1, 0])
    neighbors = torch.tensor([[1, 2, 3], [2, 0, 3], [0, 1, 3], [0, 2, 1]], dtype=torch.int32)
    found = agreement(labels, neighbors, torch.tensor([1, 1, 3, 2]))
    assert found.agreeing.tolist() == [1, 0, 0, 1]
    assert consistency_ratio(found).tolist() == [1, 0, 0, 0.5]
    reliable = reliable_samples(found, torch.ones(4), min_consistency=0.49, min_confidence=0)
    assert reliable.tolist() == [True, False, False, True]


def test_the_number_asked_is_a_sixth_of_the_own_cluster_between_10_and_100() -> None:
    labels = torch.tensor([0] * 900 + [1] * 150 + [2] * 20)
    asked = neighbors_by_cluster(labels, 4, most=1000)
    assert asked[[0, 900, 1050]].tolist() == [100, 25, 10]
    assert neighbors_by_cluster(labels, 4, most=17)[[0, 900, 1050]].tolist() == [17, 17, 10]


def test_kept_per_cluster_counts_reliable_samples_and_shows_empty_clusters() -> None:
    assert kept_per_cluster(LABELS, RELIABLE, 5).tolist() == [3, 2, 0, 1, 0]
    assert kept_per_cluster(LABELS, torch.zeros(7, dtype=torch.bool), 4).tolist() == [0, 0, 0, 0]


def test_equal_weights_are_one_exactly_where_reliable() -> None:
    assert equal_weights(RELIABLE).tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_cluster_weights_give_each_filled_cluster_the_same_sum_and_a_mean_of_one() -> None:
    # 6 reliable samples in 3 clusters: 6 / (3 * 3), 6 / (3 * 2), 6 / (3 * 1).
    weights = cluster_weights(LABELS, RELIABLE, 5)
    expected = torch.tensor([2 / 3, 2 / 3, 2 / 3, 1, 1, 2, 0])
    assert torch.allclose(weights, expected)
    assert weights.dtype == torch.float32
    assert weights[RELIABLE].mean() == pytest.approx(1)


def test_weights_of_no_reliable_samples_are_zero() -> None:
    nothing = torch.zeros(7, dtype=torch.bool)
    assert cluster_weights(LABELS, nothing, 4).tolist() == [0] * 7
    assert smallest_cluster_cut(LABELS, nothing, 4, key=1).tolist() == [0] * 7


def test_the_cut_keeps_the_smallest_filled_clusters_count_of_each_filled_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 40 + [1] * 7 + [3] * 12)[torch.randperm(59, generator=generator)]
    reliable = torch.rand(59, generator=generator) < 0.8
    smallest = int(kept_per_cluster(labels, reliable, 5)[[0, 1, 3]].min())
    kept = smallest_cluster_cut(labels, reliable, 5, key=3) > 0
    assert smallest > 0
    assert kept_per_cluster(labels, kept, 5).tolist() == [smallest, smallest, 0, smallest, 0]
    assert not (kept & ~reliable).any()


def test_which_samples_the_cut_keeps_depends_on_the_key_alone() -> None:
    labels, reliable = torch.tensor([0] * 100 + [1] * 10), torch.ones(110, dtype=torch.bool)
    assert torch.equal(smallest_cluster_cut(labels, reliable, 2, 5), smallest_cluster_cut(labels, reliable, 2, 5))
    assert not torch.equal(smallest_cluster_cut(labels, reliable, 2, 5), smallest_cluster_cut(labels, reliable, 2, 6))
