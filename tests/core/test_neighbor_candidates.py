from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spice_ray.core.neighbor_candidates import ON_GPU, ON_TILES, CandidateBank, Cheap, Pairs, cheap_of
from spice_ray.core.neighbor_keys import row_numbers_of


def random_rows(num_rows: int, width: int, spread: float = 1.0) -> Tensor:
    """Unit rows; of little spread they are alike, and what rounding takes from them decides their order."""
    generator = torch.Generator().manual_seed(num_rows)
    return normalize(
        torch.randn(width, generator=generator) + spread * torch.randn(num_rows, width, generator=generator)
    )


def bank_of(rows: Tensor, k: int, cheap: Cheap = ON_TILES, most_kept: int = 1 << 30) -> CandidateBank:
    return CandidateBank(rows.__getitem__, (rows.shape[0], rows.shape[1]), k, cheap, most_kept)


def candidates(rows: Tensor, queries: slice, k: int, cheap: Cheap = ON_TILES, most_kept: int = 1 << 30) -> Pairs | None:
    own = torch.arange(queries.start, queries.stop)
    found = bank_of(rows, k, cheap, most_kept).candidates(rows[queries], own)
    return None if found is None else found.pairs


def exactly(rows: Tensor, queries: Tensor, of_query: Tensor, chosen: Tensor) -> Tensor:
    return (queries.double()[of_query] * rows.double()[chosen]).sum(1).float() + 0.0


def nearest(rows: Tensor, queries: slice, k: int) -> Tensor:
    """Row numbers by a whole float64 product, (b, k)."""
    similarities = (rows[queries].double() @ rows.double().T).float()
    similarities[torch.arange(queries.stop - queries.start), torch.arange(queries.start, queries.stop)] = -torch.inf
    return similarities.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("cheap", [ON_TILES, ON_GPU], ids=["on tiles", "on a GPU"])
@pytest.mark.parametrize("k", [1, 10, 128])
@pytest.mark.parametrize(("num_rows", "width", "spread"), [(300, 64, 1), (5000, 64, 0.1), (1025, 3, 1), (70_000, 8, 1)])
def test_all_neighbors_are_among_few_candidates(num_rows: int, width: int, spread: float, k: int, cheap: Cheap) -> None:
    rows = random_rows(num_rows, width, spread)
    queries = slice(num_rows // 2, num_rows // 2 + 100)
    pairs = candidates(rows, queries, k, cheap)
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


@pytest.mark.parametrize(("cheap", "most"), [(ON_TILES, 0.005), (ON_GPU, 0.001)], ids=["on tiles", "on a GPU"])
def test_no_cheap_product_is_farther_off_than_the_error_and_its_own_rounding(cheap: Cheap, most: float) -> None:
    tiny = normalize(random_rows(500, 64)) * torch.logspace(-5, 0, 64)  # float16 has fewer digits of such numbers
    for rows in (random_rows(2000, 512), random_rows(2000, 512, 0.05), torch.eye(64).repeat(8, 1), tiny):
        bank = bank_of(rows, 1, cheap)
        exact = rows.double() @ rows.double().T
        half = rows.to(cheap.dtype)
        off = ((half @ half.T).double() - exact).abs()
        error = bank.error_of(rows).double()
        kind = torch.finfo(cheap.dtype)
        rounding = kind.eps / 2 * (exact.abs() + error).clamp_min(kind.tiny)
        assert bool((off <= error + rounding).all())
        assert float(error.max()) < most


@pytest.mark.parametrize("cheap", [ON_TILES, ON_GPU], ids=["on tiles", "on a GPU"])
def test_the_best_are_known_and_those_of_a_whole_float64_product(cheap: Cheap) -> None:
    rows = random_rows(5000, 64)
    own = torch.arange(1000, 1400)
    keys, is_known = bank_of(rows, 10, cheap).best(rows[own], own, partial(exactly, rows))
    assert bool(is_known.all())
    assert torch.equal(row_numbers_of(keys), nearest(rows, slice(1000, 1400), 10))


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_queries_of_a_device_that_errs_more_than_it_may_are_not_known(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(5000, 64)
    own = torch.arange(1000, 1400)
    multiply = torch.mm

    def careless(queries: Tensor, tile: Tensor, out: Tensor) -> Tensor:
        multiply(queries, tile, out=out)
        out[::2] *= factor
        return out

    monkeypatch.setattr(torch, "mm", careless)
    _, is_known = bank_of(rows, 10, ON_GPU).best(rows[own], own, partial(exactly, rows))
    assert is_known.nonzero()[:, 0].tolist() == list(range(1, 400, 2))


@pytest.mark.parametrize("length", [1e3, 1e30])
def test_rows_too_long_for_float16_are_not_known_to_be_the_best(length: float) -> None:
    rows = random_rows(3000, 16) * length
    rows[7] = 0
    own = torch.arange(100)
    keys, is_known = bank_of(rows, 10, ON_GPU).best(rows[own], own, partial(exactly, rows))
    assert is_known.nonzero()[:, 0].tolist() == ([7] if length < 65504 else [])
    if is_known[7]:
        assert row_numbers_of(keys)[7].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]


def test_products_are_summed_up_in_float32_and_others_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, multiply = torch.backends.cuda.matmul, torch.mm
    seen = []

    def listen(queries: Tensor, tile: Tensor, out: Tensor) -> Tensor:
        seen.append((matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation))
        return multiply(queries, tile, out=out)

    monkeypatch.setattr(torch, "mm", listen)
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation
    rows = random_rows(3000, 16)
    bank_of(rows, 10, ON_GPU).best(rows[:9], torch.arange(9), partial(exactly, rows))
    assert seen == [(False, False)]
    assert before == (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation) == (True, False)


def test_fewer_queries_at_once_where_each_has_many_neighbors() -> None:
    gpu = torch.device("cuda")
    at_once = [one.queries for one in (cheap_of(gpu, 1), cheap_of(gpu, 100), cheap_of(gpu, 512)) if one is not None]
    assert at_once == [4096, 4096, (1 << 23) // (16 * 528)]


def test_rows_that_are_all_alike_have_no_candidates() -> None:
    rows = normalize(torch.ones(3000, 16))
    assert candidates(rows, slice(0, 50), 5) is None


def test_rows_that_are_rounded_anew_for_each_block_give_the_same() -> None:
    rows = random_rows(5000, 32)
    kept = candidates(rows, slice(100, 200), 7)
    anew = candidates(rows, slice(100, 200), 7, most_kept=0)
    assert kept is not None
    assert anew is not None
    assert all(torch.equal(a, b) for a, b in zip(kept, anew, strict=True))
