"""Reliable pseudo-labels on a toy whose neighbours are known."""

import math

import pytest
import torch
from torch import Tensor

from spice_ray.core.neighbors import exact_neighbors
from spice_ray.settings import Reliable
from spice_ray.stages.select_reliable import ReliableSamples, select_reliable

# Three far groups on the circle, a degree between members: two neighbours are always of the own group.
DEGREES = torch.tensor([0.0, 1, 2, 3, 120, 121, 122, 240, 241, 242])
EMBEDDINGS = torch.stack([torch.deg2rad(DEGREES).cos(), torch.deg2rad(DEGREES).sin()], dim=1)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 0, 2, 2, 2])
SURE = torch.full((10,), 0.9)
# With two neighbours: row 6 disagrees with both of its own, rows 4 and 5 with one of theirs.
CONSISTENCY = [1, 1, 1, 1, 0.5, 0.5, 0, 1, 1, 1]


def select(confidences: Tensor = SURE, key: int = 0, **changes) -> ReliableSamples:
    settings = Reliable(**({"min_consistency": 0.5} | changes))
    nearest = exact_neighbors(EMBEDDINGS, 2)[0]
    return select_reliable(settings, nearest, LABELS, confidences, num_clusters=3, asked=2, key=key)


def test_consistency_is_the_share_of_neighbours_with_the_same_label_the_sample_left_out():
    assert select().consistency.tolist() == CONSISTENCY
    assert select().consistency.dtype == torch.float64


def test_an_adaptive_number_is_that_of_the_own_cluster():
    labels = torch.tensor([0] * 90 + [1] * 12)
    # The nearest 15 of the small cluster's samples are its 11 others and then the large one's.
    nearest = torch.stack([torch.arange(15)] * 90 + [torch.tensor([*range(90, 101), 0, 1, 2, 3])] * 12)
    settings, sure = Reliable(min_consistency=0.9, neighbors="adaptive"), torch.ones(102)
    assert select_reliable(settings, nearest, labels, sure, num_clusters=2, asked=None, key=0).kept == [90, 12]
    assert select_reliable(settings, nearest, labels, sure, num_clusters=2, asked=15, key=0).kept == [90, 0]


def test_a_ratio_at_the_threshold_is_not_reliable():
    at, below = select(min_consistency=0.5), select(min_consistency=0.49)
    assert at.weights.tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert at.kept == [4, 0, 3]
    assert below.weights.tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 1, 1]
    assert below.kept == [4, 2, 3]


def test_a_threshold_of_zero_still_leaves_out_who_agrees_with_nobody():
    assert select(min_consistency=0).kept == [4, 2, 3]


def test_the_confidence_gate_leaves_out_who_is_not_surer():
    confidences = SURE.clone()
    confidences[0], confidences[7] = 0.5, 0.25
    assert select(confidences, min_confidence=0.5).weights.tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert select(confidences).weights.tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_weights_make_clusters_count_equally_and_drop_nobody():
    result = select(min_consistency=0.4, balance="weights")
    assert result.kept == [4, 2, 3]
    sums = torch.zeros(3).index_add_(0, LABELS, result.weights)
    torch.testing.assert_close(sums, sums[:1].expand(3))
    assert result.weights[result.weights > 0].mean().item() == pytest.approx(1)


def test_smallest_cuts_every_cluster_to_the_smallest_and_the_key_chooses_whom():
    chosen = set()
    for key in range(10):
        result = select(min_consistency=0.4, balance="smallest", key=key)
        assert result.kept == [2, 2, 2]
        assert result.consistent == [4, 2, 3]
        assert set(result.weights.tolist()) == {0, 1}
        chosen.add(tuple(result.weights.tolist()))
        assert torch.equal(result.weights, select(min_consistency=0.4, balance="smallest", key=key).weights)
    assert len(chosen) > 3


@pytest.mark.parametrize("balance", ["none", "weights", "smallest"])
def test_a_threshold_that_nobody_passes_gives_weights_of_zero_and_no_nan(balance):
    result = select(torch.zeros(10), min_confidence=math.nextafter(1, 0), balance=balance)
    assert result.weights.tolist() == [0] * 10
    assert result.kept == [0, 0, 0]
