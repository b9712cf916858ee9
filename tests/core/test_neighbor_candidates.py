from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spice_ray.core import neighbor_candidates
from spice_ray.core.neighbor_candidates import ON_GPU, ON_TILES, CandidateBank, Candidates, Cheap, Pairs, cheap_of
from spice_ray.core.neighbor_keys import row_numbers_of


def random_rows(num_rows: int, width: int, spread: float = 1.0) -> Tensor:
    """Unit rows; of little spread they are alike, and what rounding takes from them decides their order."""
    generator = torch.Generator().manual_seed(num_rows)
    return normalize(
        torch.randn(width, generator=generator) + spread * torch.randn(num_rows, width, generator=generator)
    )


def bank_of(rows: Tensor, k: int, cheap: Cheap = ON_TILES, most_kept: int = 1 << 30) -> CandidateBank:
    return CandidateBank(rows.__getitem__, (rows.shape[0], rows.shape[1]), k, cheap, most_kept)


def candidates(rows: Tensor, queries: slice, k: int, cheap: Cheap = ON_TILES, most_kept: int = 1 << 30) -> Candidates:
    own = torch.arange(queries.start, queries.stop)
    return bank_of(rows, k, cheap, most_kept).candidates(rows[queries], own)


def exactly(rows: Tensor, queries: Tensor, of_query: Tensor, chosen: Tensor) -> Tensor:
    return (queries.double()[of_query] * rows.double()[chosen]).sum(1).float() + 0.0


def nearest(rows: Tensor, queries: slice, k: int) -> Tensor:
    """Row numbers by a whole float64 product, (b, k)."""
    similarities = (rows[queries].double() @ rows.double().T).float()
    similarities[torch.arange(queries.stop - queries.start), torch.arange(queries.start, queries.stop)] = -torch.inf
    return similarities.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("tile", [1 << 16, 128])
@pytest.mark.parametrize("cheap", [ON_TILES, ON_GPU], ids=["on tiles", "on a GPU"])
@pytest.mark.parametrize(
    ("num_rows", "width", "spread", "k"),
    [(300, 64, 1, 1), (300, 64, 1, 128), (5000, 64, 0.5, 10), (5000, 64, 1, 128), (1025, 5, 1, 10), (70_000, 8, 1, 10)],
)
def test_all_neighbors_are_among_few_candidates(
    num_rows: int, width: int, spread: float, k: int, cheap: Cheap, tile: int
) -> None:
    rows = random_rows(num_rows, width, spread)
    queries = slice(num_rows // 2, num_rows // 2 + 100)
    pairs, is_few, *_ = candidates(rows, queries, k, cheap._replace(tile=tile))
    assert bool(is_few.all())
    by_query = pairs.rows.split(pairs.queries.bincount(minlength=100).tolist())
    for found, expected in zip(by_query, nearest(rows, queries, k).tolist(), strict=True):
        assert set(expected) <= set(found.tolist())
        assert len(found) == len(set(found.tolist())) <= 16 * (k + 16)
    assert bool((pairs.queries.diff() >= 0).all())
    assert not bool((pairs.rows == pairs.queries + queries.start).any())


def test_rows_that_bfloat16_puts_in_the_wrong_order_are_found_by_the_error_that_is_allowed_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, step = torch.full((32,), 0.125), 2**-8  # relative: half the gap between 0.125 and the next bfloat16
    query = torch.cat((half, -half))
    nearest = torch.cat((half * (1 + 0.98 * step), half))  # rounded down to similarity 0
    other = torch.cat((half[:8] * (1 + 1.02 * step), half[:24], half))  # rounded up, to the greater similarity
    rows = torch.stack([query, nearest, other, *[-query] * 297])
    assert query @ nearest > query @ other
    found = candidates(rows, slice(0, 1), 1).pairs
    assert set(found.rows.tolist()) == {1, 2}
    monkeypatch.setattr(CandidateBank, "error_of", lambda _, queries: torch.zeros(len(queries), 1))
    assert candidates(rows, slice(0, 1), 1).pairs.rows.tolist() == [2]


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
    _, is_known = bank_of(rows, 10, ON_GPU).best(rows[own], own, partial(exactly, rows))
    assert not bool(is_known.any())


def test_products_are_summed_up_in_float32_and_others_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, multiply = torch.backends.cuda.matmul, torch.mm
    rows, seen = random_rows(3000, 16), []

    def allowed() -> tuple[bool, bool, bool]:
        split_k = matmul.allow_fp16_reduced_precision_reduction_split_k
        return matmul.allow_fp16_reduced_precision_reduction, split_k, matmul.allow_fp16_accumulation

    def listen(queries: Tensor, tile: Tensor, out: Tensor) -> Tensor:
        seen.append(allowed())
        return multiply(queries, tile, out=out)

    monkeypatch.setattr(torch, "mm", listen)
    usual = allowed()
    assert usual == (True, True, False)
    for split_k in (False, True):
        matmul.allow_fp16_reduced_precision_reduction = (split_k, split_k)
        matmul.allow_fp16_accumulation = True
        bank_of(rows, 10, ON_GPU).best(rows[:9], torch.arange(9), partial(exactly, rows))
        assert seen.pop() == (False, split_k, False)
        assert allowed() == (split_k, split_k, True)
        matmul.allow_fp16_accumulation = False
    assert allowed() == usual


def test_fewer_queries_at_once_where_each_has_many_neighbors() -> None:
    gpu = torch.device("cuda")
    at_once = [one.queries for one in (cheap_of(gpu, 1), cheap_of(gpu, 100), cheap_of(gpu, 512)) if one is not None]
    assert at_once == [4096, 4096, 512]


def test_rows_that_are_all_alike_have_too_many_candidates() -> None:
    rows = normalize(torch.ones(3000, 16))
    found = candidates(rows, slice(0, 50), 5)
    assert not bool(found.is_few.any())
    assert not len(found.pairs.rows)


@pytest.mark.parametrize("odd", ["of length 0", "apart", "many times"])
@pytest.mark.parametrize("tile", [1 << 16, 256])
@pytest.mark.parametrize("cheap", [ON_TILES, ON_GPU], ids=["on tiles", "on a GPU"])
def test_odd_queries_are_left_open_and_take_no_memory_from_the_others(
    cheap: Cheap, tile: int, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(6000, 64, 3)
    rows[:, 0] = 0
    rows = normalize(rows)
    places = torch.arange(7, 6000, 2) if odd == "many times" else torch.tensor([7])
    rows[places] = torch.eye(64)[0] * (odd != "of length 0")
    widths = []
    merge = neighbor_candidates.merge_pairs

    def listen(best: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        widths.append(int(queries.bincount().max()))
        return merge(best, queries, keys)

    monkeypatch.setattr(neighbor_candidates, "merge_pairs", listen)
    own = torch.arange(100)
    compare = partial(exactly, rows)
    keys, is_known = bank_of(rows, 10, cheap._replace(tile=tile)).best(rows[own], own, compare)
    assert is_known.nonzero()[:, 0].tolist() == [row for row in range(100) if row not in places.tolist()]
    assert max(widths) <= 16 * (10 + 16)
    assert torch.equal(row_numbers_of(keys)[is_known], nearest(rows, slice(0, 100), 10)[is_known])


def test_pairs_are_sifted_where_tiles_leave_more_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each tile is nearer than those before.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8000, 32, generator=generator) * torch.linspace(3, 0.5, 8000)[:, None]
    rows = normalize(rows + 4 * torch.eye(32)[0])
    sifted = []
    left = neighbor_candidates._left

    def listen(found: list[Pairs], threshold: Tensor, is_few: Tensor, most: int) -> Pairs:
        sifted.append(len(found))
        return left(found, threshold, is_few, most)

    monkeypatch.setattr(neighbor_candidates, "_left", listen)
    queries = slice(7900, 8000)
    bank = bank_of(rows, 60, ON_GPU._replace(tile=128))
    own = torch.arange(queries.start, queries.stop)
    keys, is_known = bank.best(rows[own], own, partial(exactly, rows))
    assert len(sifted) > 1
    assert bool(is_known.all())
    assert torch.equal(row_numbers_of(keys), nearest(rows, queries, 60))


def test_rows_that_are_rounded_anew_for_each_block_give_the_same() -> None:
    rows = random_rows(5000, 32)
    kept = candidates(rows, slice(100, 200), 7)
    anew = candidates(rows, slice(100, 200), 7, most_kept=0)
    assert all(torch.equal(a, b) for a, b in zip(kept.pairs, anew.pairs, strict=True))
