import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spice_ray.core import neighbor_candidates, neighbors
from spice_ray.core.neighbor_candidates import CandidateBank, Pairs, cheap_dtype
from spice_ray.core.neighbors import NeighborSearch, exact_neighbors

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


def test_rows_that_bfloat16_puts_in_the_wrong_order_are_found_by_the_error_that_is_allowed_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, step = torch.full((32,), 0.125), 2**-8  # relative: half the gap between 0.125 and the next bfloat16
    query = torch.cat((half, -half))
    nearest = torch.cat((half * (1 + 0.98 * step), half))  # rounded down to similarity 0
    other = torch.cat((half[:8] * (1 + 1.02 * step), half[:24], half))  # rounded up, to the greater similarity
    rows = torch.stack([query, nearest, other, *[-query] * 297])
    assert query @ nearest > query @ other
    found = candidates(rows, slice(0, 1), 1, torch.bfloat16)
    assert found is not None
    assert set(found.rows.tolist()) == {1, 2}
    monkeypatch.setattr(CandidateBank, "error_of", lambda _, queries: torch.zeros(len(queries), 1))
    found = candidates(rows, slice(0, 1), 1, torch.bfloat16)
    assert found is not None
    assert found.rows.tolist() == [2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_cheap_product_is_farther_off_than_the_error_and_its_own_rounding(dtype: torch.dtype) -> None:
    for rows in (random_rows(2000, 512), random_rows(2000, 512, 0.05), torch.eye(64).repeat(8, 1)):
        bank = CandidateBank(rows.__getitem__, len(rows), dtype)
        exact = rows.double() @ rows.double().T
        off = ((rows.to(dtype) @ rows.to(dtype).T).double() - exact).abs()
        error = bank.error_of(rows).double()
        rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + error)
        assert bool((off <= error + rounding).all())
        assert float(error.max()) < {torch.bfloat16: 0.005, torch.float32: 1e-3}[dtype]


def test_products_in_float32_are_not_less_where_torch_may_round_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert cheap_dtype() == torch.float32
    torch.set_float32_matmul_precision("medium")
    try:
        rows = random_rows(17_000, 8)
        assert torch.equal(NeighborSearch(rows, 3).find(5, 9)[0], slow_neighbors(rows, 5, 9, 3)[0])
    finally:
        torch.set_float32_matmul_precision("highest")


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
    ids, similarities = NeighborSearch(rows, k).find(4_990, 5_090)
    expected, values = slow_neighbors(rows, 4_990, 5_090, k)
    assert torch.equal(ids, expected)
    assert torch.equal(similarities, values)
    tied, _ = NeighborSearch(rows, k).find(15_000, 15_100)
    assert tied[:, 0].tolist() == list(range(100))


@pytest.mark.parametrize("num_rows", [2047, 2048, 2049])
def test_neighbors_of_as_many_rows_as_are_just_many(num_rows: int) -> None:
    rows = random_rows(num_rows, 16)
    rows[-1] = rows[7]
    for k in (1, 31, 32, 33):
        ids, similarities = NeighborSearch(rows, k).find(num_rows - 30, num_rows)
        expected, values = slow_neighbors(rows, num_rows - 30, num_rows, k)
        assert torch.equal(ids, expected)
        assert torch.equal(similarities, values)


def test_many_rows_that_are_all_alike_are_compared_one_and_all() -> None:
    rows = normalize(torch.ones(1, 4)).repeat(17_000, 1)
    ids, _ = NeighborSearch(rows, 4).find(3, 5)
    assert ids.tolist() == [[0, 1, 2, 4], [0, 1, 2, 3]]


def test_shares_of_many_rows_put_together_are_the_whole_answer() -> None:
    rows = random_rows(17_000, 16)
    whole = exact_neighbors(rows, 6)
    cuts = [0, 1, 5_000, 17_000]
    shares = [NeighborSearch(rows.numpy(), 6).find(a, b) for a, b in itertools.pairwise(cuts)]
    for part in (0, 1):
        assert torch.equal(torch.cat([share[part] for share in shares]), whole[part])


@pytest.fixture
def only_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("all rows were compared exactly")

    monkeypatch.setattr(neighbors.NeighborSearch, "_best_of_all", refuse)


@pytest.mark.usefixtures("only_candidates")
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_mapped_rows_of_several_tiles_are_found_by_candidates_alone(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "_KEPT_BYTES", kept)
    rows = random_rows(40_001, 24)
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    ids, similarities = NeighborSearch(mapped, 20).find(39_951, 40_001)
    expected, values = slow_neighbors(rows, 39_951, 40_001, 20)
    assert torch.equal(ids, expected)
    assert torch.equal(similarities, values)


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("num_rows", [300, 17_000])
def test_float64_rows_are_taken_as_float32(num_rows: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_KEPT_BYTES", kept)
    rows = normalize(torch.randn(num_rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    found = NeighborSearch(rows.requires_grad_(), 5).find(0, 50)
    expected = slow_neighbors(rows.detach().float(), 0, 50, 5)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_memory_is_bounded_where_candidates_are_compared() -> None:
    program = """
import resource, torch
from spice_ray.core.neighbors import NeighborSearch
generator = torch.Generator().manual_seed(0)
rows = torch.nn.functional.normalize(torch.randn(200_000, 64, generator=generator))
NeighborSearch(rows[:20_000], 100).find(0, 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
NeighborSearch(rows, 100).find(0, 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grid_and_cheap_kib = 200_000 * 64 * (4 + 4) / 1024
    assert int(done.stdout) < grid_and_cheap_kib + 300 * 1024
