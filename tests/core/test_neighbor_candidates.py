import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spice_ray.core import neighbor_candidates
from spice_ray.core.neighbor_candidates import CandidateBank, Pairs


def random_rows(num_rows: int, width: int, spread: float = 1.0) -> Tensor:
    """Unit rows; of little spread they are alike, and what rounding takes from them decides their order."""
    generator = torch.Generator().manual_seed(num_rows)
    return normalize(
        torch.randn(width, generator=generator) + spread * torch.randn(num_rows, width, generator=generator)
    )


def candidates(rows: Tensor, queries: slice, k: int) -> Pairs | None:
    found = CandidateBank(rows.__getitem__, len(rows), k).candidates(
        rows[queries], torch.arange(queries.start, queries.stop)
    )
    return None if found is None else found.pairs


def nearest(rows: Tensor, queries: slice, k: int) -> Tensor:
    """Row numbers by a whole float64 product, (b, k)."""
    similarities = (rows[queries].double() @ rows.double().T).float()
    similarities[torch.arange(queries.stop - queries.start), torch.arange(queries.start, queries.stop)] = -torch.inf
    return similarities.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("k", [1, 10, 128])
@pytest.mark.parametrize(("num_rows", "width", "spread"), [(300, 64, 1), (5000, 64, 0.1), (1025, 3, 1), (70_000, 8, 1)])
def test_all_neighbors_are_among_few_candidates(num_rows: int, width: int, spread: float, k: int) -> None:
    rows = random_rows(num_rows, width, spread)
    queries = slice(num_rows // 2, num_rows // 2 + 100)
    pairs = candidates(rows, queries, k)
    if pairs is None:  # too many of them are nearly as near
        assert num_rows < 64 * k or spread < 1 or width < 8
        return
    by_query = pairs.rows.split(pairs.queries.bincount(minlength=100).tolist())
    for found, expected in zip(by_query, nearest(rows, queries, k).tolist(), strict=True):
        assert set(expected) <= set(found.tolist())
    assert bool((pairs.queries.diff() >= 0).all())
    assert not bool((pairs.rows == pairs.queries + queries.start).any())
    assert len(pairs.rows) <= 16 * (k + 16) * 100


def test_rows_that_bfloat16_puts_in_the_wrong_order_are_found_by_the_error_that_is_allowed_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, step = torch.full((32,), 0.125), 2**-8  # relative: half the gap between 0.125 and the next bfloat16
    query = torch.cat((half, -half))
    nearest = torch.cat((half * (1 + 0.98 * step), half))  # rounded down to similarity 0
    other = torch.cat((half[:8] * (1 + 1.02 * step), half[:24], half))  # rounded up, to the greater similarity
    rows = torch.stack([query, nearest, other, *[-query] * 297])
    assert query @ nearest > query @ other
    found = candidates(rows, slice(0, 1), 1)
    assert found is not None
    assert set(found.rows.tolist()) == {1, 2}
    monkeypatch.setattr(CandidateBank, "error_of", lambda _, queries: torch.zeros(len(queries), 1))
    found = candidates(rows, slice(0, 1), 1)
    assert found is not None
    assert found.rows.tolist() == [2]


def test_no_cheap_product_is_farther_off_than_the_error_and_its_own_rounding() -> None:
    for rows in (random_rows(2000, 512), random_rows(2000, 512, 0.05), torch.eye(64).repeat(8, 1)):
        bank = CandidateBank(rows.__getitem__, len(rows), 1)
        exact = rows.double() @ rows.double().T
        off = ((rows.bfloat16() @ rows.bfloat16().T).double() - exact).abs()
        error = bank.error_of(rows).double()
        rounding = torch.finfo(torch.bfloat16).eps / 2 * (exact.abs() + error)
        assert bool((off <= error + rounding).all())
        assert float(error.max()) < 0.005


def test_rows_that_are_all_alike_have_no_candidates() -> None:
    rows = normalize(torch.ones(3000, 16))
    assert candidates(rows, slice(0, 50), 5) is None


def test_rows_that_are_rounded_anew_for_each_block_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(5000, 32)
    kept = candidates(rows, slice(100, 200), 7)
    monkeypatch.setattr(neighbor_candidates, "_KEPT_BYTES", 0)
    anew = candidates(rows, slice(100, 200), 7)
    assert kept is not None
    assert anew is not None
    assert all(torch.equal(a, b) for a, b in zip(kept, anew, strict=True))
