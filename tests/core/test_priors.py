"""Quotas from shares by hand and against a slow twin."""

import math

import pytest
import torch
from torch import Tensor

from spice_ray.core.prototypes import match_shares, quotas_of


def matched(shares: Tensor, mass: Tensor, num_samples: int) -> list[int]:
    return quotas_of(match_shares(shares, mass), num_samples, confident_fraction=1).labelled.tolist()


def quotas(shares: list[float], mass: list[float], num_samples: int) -> list[int]:
    return matched(torch.tensor(shares, dtype=torch.float64), torch.tensor(mass), num_samples)


def slow_quotas(shares: list[float], mass: list[float], num_samples: int) -> list[int]:
    order = sorted(range(len(mass)), key=lambda k: (-mass[k], k))
    found = [0] * len(mass)
    for k, share in zip(order, sorted(shares, reverse=True), strict=True):
        found[k] = max(1, math.floor(share * num_samples))
    return found


def test_the_largest_share_goes_to_the_cluster_with_most_mass():
    assert quotas([0.5, 0.3, 0.2], [1.0, 7.0, 2.0], 10) == [2, 5, 3]


def test_shares_are_a_multiset_in_any_order():
    assert quotas([0.2, 0.5, 0.3], [1.0, 7.0, 2.0], 10) == [2, 5, 3]


def test_of_clusters_with_equal_mass_the_lower_comes_first():
    assert quotas([0.5, 0.3, 0.2], [4.0, 4.0, 4.0], 10) == [5, 3, 2]
    assert quotas([0.5, 0.3, 0.2], [1.0, 4.0, 4.0], 10) == [2, 5, 3]


@pytest.mark.parametrize("clusters", [2, 3, 7, 10, 49, 103, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_shares_give_every_cluster_the_whole_part_of_its_share(clusters, dtype):
    shares = torch.full((clusters,), 1 / clusters, dtype=dtype)
    mass = torch.rand(clusters, generator=torch.Generator().manual_seed(0))
    for samples in [*range(clusters, 3 * clusters), 50_000, 10**6, 1_281_167]:
        assert matched(shares, mass, samples) == [samples // clusters] * clusters


def test_a_share_that_is_a_whole_number_of_samples_loses_none_to_rounding():
    for samples in range(10, 1000, 7):
        for part in range(1, samples, 97):
            assert quotas([part / samples, 1 - part / samples], [0.0, 1.0], samples) == sorted([part, samples - part])


@pytest.mark.parametrize("seed", range(20))
def test_quotas_are_the_slow_twin(seed):
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(6, generator=generator, dtype=torch.float64) + 0.1
    shares = shares / shares.sum()
    mass = torch.randint(4, (6,), generator=generator).float()
    assert quotas(shares.tolist(), mass.tolist(), 1000) == slow_quotas(shares.tolist(), mass.tolist(), 1000)


def test_shares_are_relative_to_their_sum():
    assert quotas([0.333, 0.333, 0.333], [1.0, 2.0, 3.0], 9) == [3, 3, 3]


def test_every_cluster_keeps_a_sample_however_small_its_share():
    assert quotas([0.9998, 0.0001, 0.0001], [5.0, 1.0, 1.0], 100) == [98, 1, 1]


@pytest.mark.parametrize("samples", [10, 11, 14, 20])
def test_quotas_never_exceed_the_samples_of_the_round(samples):
    shares = [0.45, 0.45] + [0.0125] * 8
    found = quotas(shares, [float(-k) for k in range(10)], samples)
    assert sum(found) <= samples
    assert min(found) == 1
    assert found == sorted(found, reverse=True)


def test_inputs_are_left_as_they_were():
    shares, mass = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([3.0, 1.0, 2.0])
    before = shares.clone(), mass.clone()
    matched(shares, mass, 10)
    assert torch.equal(shares, before[0])
    assert torch.equal(mass, before[1])
