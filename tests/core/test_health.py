import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.contracts import Health
from spice_ray.core.health import measure_health, why_collapsed


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def health(queries: Tensor, keys: Tensor) -> Health:
    return Health(*measure_health(queries, keys).tolist())


def test_two_rows_by_hand() -> None:
    # Distances of the views: 0 and 2; the one pair of keys lies at sqrt(2); both directions are used alike.
    keys = torch.eye(2)
    found = health(torch.tensor([[1.0, 0], [0, -1]]), keys)
    assert found.alignment == pytest.approx(2.0)
    assert found.uniformity == pytest.approx(-4.0)
    assert found.effective_rank == pytest.approx(2.0)
    assert found.collapsed == 0


def test_rows_spread_over_a_sphere_use_all_of_it_and_are_as_uniform_as_theory_says() -> None:
    found = health(rows(1000, 32), rows(1000, 32, seed=1))
    # Of independent rows the squared distance is 2 on average with variance 4 / 32, nearly Gaussian.
    assert found.alignment == pytest.approx(2, abs=0.05)
    assert found.uniformity == pytest.approx(-4 + 2 * 4 / 32, abs=0.05)
    assert found.effective_rank > 31
    assert found.collapsed == 0
    assert why_collapsed(found) is None


def test_the_effective_rank_counts_the_directions_in_use() -> None:
    few = torch.cat([rows(600, 5), torch.zeros(600, 27)], dim=1)
    found = health(few, few)
    assert found.alignment == 0
    assert found.effective_rank == pytest.approx(5, abs=0.1)
    assert found.collapsed == pytest.approx(27 / 32)


@pytest.mark.parametrize(
    ("keys", "sign"),
    [
        (F.normalize(torch.ones(64, 16) + 1e-4 * rows(64, 16), dim=1), "lie on a line (effective rank 1.0"),
        (torch.cat([rows(64, 2), torch.zeros(64, 62)], dim=1), "97% of the projection's dimensions hardly vary"),
        (torch.full((64, 16), math.nan), "are not numbers"),
    ],
)
def test_a_collapse_is_told_by_its_sign(keys: Tensor, sign: str) -> None:
    assert sign in (why_collapsed(health(keys, keys)) or "")


def test_many_rows_are_judged_by_the_first_ones() -> None:
    keys = rows(3000, 8)
    found, first = measure_health(keys, keys), measure_health(keys[:1024], keys[:1024])
    assert torch.equal(found, first)
