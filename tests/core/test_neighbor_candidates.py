import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spice_ray.core import neighbor_candidates
from spice_ray.core.neighbor_candidates import CandidateBank, Pairs, cheap_dtype
from spice_ray.core.neighbors import exact_neighbors, neighbors_of_rows

DTYPES = [torch.bfloat16, torch.float32]


def random_rows(num_rows: int, width: int, spread: float = 1.0) -> Tensor:
    """Unit rows; of little spread they are alike, and what rounding takes from them decides their order."""
    generator = torch.Generator().manual_seed(num_rows)
    return normalize(
        torch.randn(width, generator=generator) + spread * torch.randn(num_rows, width, generator=generator)
    )


def candidates(rows: Tensor, queries: slice, k: int, dtype: torch.dtype) -> Pairs | None:
    found = CandidateBank(rows.__getitem__, len(rows), dtype).candidates(rows[queries], queries.start, k)
    return None if found is None else found.pairs


def nearest(rows: Tensor, queries: slice, k: int) -> Tensor:
    """Row numbers by a whole float64 product, (b, k)."""
    similarities = (rows[queries].double() @ rows.double().T).float()
    similarities[torch.arange(queries.stop - queries.start), torch.arange(queries.start, queries.stop)] = -torch.inf
    return similarities.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 10, 128])
@pytest.mark.parametrize(("num_rows", "width", "spread"), [(300, 64, 1), (5000, 64, 0.1), (1025, 3, 1), (70_000, 8, 1)])
def test_all_neighbors_are_among_few_candidates(
    num_rows: int, width: int, spread: float, k: int, dtype: torch.dtype
) -> None:
    rows = random_rows(num_rows, width, spread)
    queries = slice(num_rows // 2, num_rows // 2 + 100)
    pairs = candidates(rows, queries, k, dtype)
    if pairs is None:  # too many of them are nearly as near
        assert num_rows < 64 * k or (dtype == torch.bfloat16 and (spread < 1 or width < 8))
        return
    by_query = pairs.rows.split(pairs.queries.bincount(minlength=100).tolist())
    for found, expected in zip(by_query, nearest(rows, queries, k).tolist(), strict=True):
        assert set(expected) <= set(found.tolist())
    assert bool((pairs.queries.diff() >= 0).all())
    assert not bool((pairs.rows == pairs.queries + queries.start).any())
    assert len(pairs.rows) <= 16 * (k + 16) * 100


def test_what_bfloat16_takes_from_the_rows_is_made_good() -> None:
    """With no allowance for it neighbours would be missed."""
    rows = random_rows(2000, 64)
    queries = slice(0, 100)
    cheap = (rows[queries].bfloat16() @ rows.bfloat16().T).float()
    cheap[torch.arange(100), torch.arange(100)] = -torch.inf
    by_bfloat16 = cheap.topk(10, dim=1).indices
    missed = sum(
        set(a) != set(b) for a, b in zip(by_bfloat16.tolist(), nearest(rows, queries, 10).tolist(), strict=True)
    )
    assert missed > 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_cheap_similarity_is_farther_off_than_the_error_that_is_allowed_for(dtype: torch.dtype) -> None:
    for rows in (random_rows(2000, 512), random_rows(2000, 512, 0.05), torch.eye(64).repeat(8, 1)):
        bank = CandidateBank(rows.__getitem__, len(rows), dtype)
        off = (rows.to(dtype).double() @ rows.to(dtype).double().T - rows.double() @ rows.double().T).abs()
        error = bank.error_of(rows).double()
        assert bool((off <= error).all())
        assert float(error.max()) < {torch.bfloat16: 0.01, torch.float32: 1e-3}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_all_alike_have_no_candidates(dtype: torch.dtype) -> None:
    rows = normalize(torch.ones(3000, 16))
    assert candidates(rows, slice(0, 50), 5, dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_rounded_anew_for_each_block_give_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(5000, 32)
    kept = candidates(rows, slice(100, 200), 7, dtype)
    monkeypatch.setattr(neighbor_candidates, "_KEPT_BYTES", 0)
    anew = candidates(rows, slice(100, 200), 7, dtype)
    assert kept is not None
    assert anew is not None
    assert all(torch.equal(a, b) for a, b in zip(kept, anew, strict=True))


def slow_neighbors(rows: Tensor, start: int, stop: int, k: int) -> tuple[Tensor, Tensor]:
    on_grid = (rows.double() * 2**26).round() / 2**26
    similarities = (on_grid[start:stop] @ on_grid.T).float()
    similarities[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
    ordered = similarities.sort(dim=1, descending=True, stable=True)
    return ordered.indices[:, :k], ordered.values[:, :k]


@pytest.mark.parametrize("k", [1, 100, 312, 313])
def test_neighbors_of_many_rows_are_those_of_a_whole_float64_product(k: int) -> None:
    rows = random_rows(20_000, 48)
    rows[15_000:15_200] = rows[:200]  # exact ties
    ids, similarities = neighbors_of_rows(rows, 4_990, 5_090, k)
    expected, values = slow_neighbors(rows, 4_990, 5_090, k)
    assert torch.equal(ids, expected)
    assert torch.equal(similarities, values)
    tied, _ = neighbors_of_rows(rows, 15_000, 15_100, k)
    assert tied[:, 0].tolist() == list(range(100))


def test_many_rows_that_are_all_alike_are_compared_one_and_all() -> None:
    rows = normalize(torch.ones(1, 4)).repeat(17_000, 1)
    ids, _ = neighbors_of_rows(rows, 3, 5, 4)
    assert ids.tolist() == [[0, 1, 2, 4], [0, 1, 2, 3]]


def test_shares_of_many_rows_put_together_are_the_whole_answer() -> None:
    rows = random_rows(17_000, 16)
    whole = exact_neighbors(rows, 6)
    cuts = [0, 1, 5_000, 17_000]
    shares = [neighbors_of_rows(rows.numpy(), a, b, 6) for a, b in itertools.pairwise(cuts)]
    for part in (0, 1):
        assert torch.equal(torch.cat([share[part] for share in shares]), whole[part])


def test_products_are_cheap_in_one_of_two_types() -> None:
    assert cheap_dtype() in DTYPES
