import math

import pytest
import torch

from spice_ray.core.objectives import negative_mutual_information, neighbor_disagreement

EVEN = torch.full((2,), 0.5)


def test_disagreement_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    nearest = torch.tensor([[1, 2], [0, 3], [3, 0], [2, 1]], dtype=torch.int32)
    # Each has one neighbour of its own cluster and one of the other; sizes are as they should be.
    assert neighbor_disagreement(labels, nearest, EVEN) == 0.5
    # Sizes of 3/4 and 1/4 are off by 1/4; rows 0 and 1 have one other neighbour, 3 has two, and 2 has one.
    assert neighbor_disagreement(torch.tensor([0, 0, 0, 1]), nearest, EVEN) == pytest.approx(4 / 8 + 0.25)
    # A known prior may be in any order, and then nothing is off.
    prior = torch.tensor([0.25, 0.75])
    assert neighbor_disagreement(torch.tensor([0, 0, 0, 1]), nearest, prior) == pytest.approx(4 / 8)


def test_one_cluster_for_all_is_worse_than_any_good_clustering() -> None:
    nearest = torch.tensor([[1], [0], [3], [2]])
    assert neighbor_disagreement(torch.zeros(4, dtype=torch.int64), nearest, EVEN) == 0.5
    assert neighbor_disagreement(torch.tensor([0, 0, 1, 1]), nearest, EVEN) == 0


def test_mutual_information_by_hand() -> None:
    certain = 1e4 * torch.eye(3).repeat(5, 1)
    assert negative_mutual_information(certain) == pytest.approx(-math.log(3))
    assert negative_mutual_information(torch.zeros(7, 3)) == pytest.approx(0, abs=1e-12)
    assert negative_mutual_information(certain[::3]) == pytest.approx(0, abs=1e-12)  # one cluster for all
    half = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]])  # 3/4 and 1/4, the other way round
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert negative_mutual_information(half) == pytest.approx(entropy - math.log(2))
