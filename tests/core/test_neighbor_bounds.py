import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spice_ray.core import neighbor_bounds, neighbor_candidates, neighbors
from spice_ray.core.neighbor_axes import Axes, choose_axes, margin_of, may_have_axes, sample_of
from spice_ray.core.neighbor_bounds import BoundBank, products
from spice_ray.core.neighbor_keys import row_numbers_of, similarities_of
from spice_ray.core.neighbor_rows import fetch
from spice_ray.core.neighbors import NeighborSearch, exact_neighbors


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Which rows are worth axes depends on the threads that share a product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_rows(num_rows: int, width: int, spread: float = 1.0) -> Tensor:
    """Unit rows; of little spread they are alike."""
    generator = torch.Generator().manual_seed(num_rows)
    return on_grid(
        normalize(torch.randn(width, generator=generator) + spread * torch.randn(num_rows, width, generator=generator))
    )


def flat_rows(num_rows: int, width: int, axes: int, noise: float = 0.05) -> Tensor:
    """Unit rows in ten clusters, most of whose length is on few axes."""
    generator = torch.Generator().manual_seed(width)
    basis = torch.linalg.qr(torch.randn(width, axes, generator=generator)).Q
    clusters = torch.randint(10, (num_rows,), generator=generator)
    inner = torch.randn(10, axes, generator=generator)[clusters] + 0.5 * torch.randn(
        num_rows, axes, generator=generator
    )
    return on_grid(normalize(inner @ basis.T + noise * torch.randn(num_rows, width, generator=generator)))


def on_grid(rows: Tensor) -> Tensor:
    return ((rows.double() * 2**26).round() / 2**26).float()


def principal(rows: Tensor) -> Tensor:
    return torch.linalg.eigh(rows.double().T @ rows.double()).eigenvectors.flip(1)


class Exactly:
    """Compares rows by a plain product, and counts for how many queries and rows."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.asked, self.compared = rows.double(), 0, 0

    def __call__(self, queries: Tensor, of_query: Tensor, rows: Tensor) -> Tensor:
        assert len(set(zip(of_query.tolist(), rows.tolist(), strict=True))) == len(rows)
        self.asked += len(queries)
        self.compared += len(rows)
        return (queries.double()[of_query] * self.rows[rows]).sum(1).float() + 0.0


def assert_bank_right(bank: BoundBank, rows: Tensor, queries: slice, k: int, least: float = 1.0) -> None:
    """What is known is right, and at least that share of the queries is known."""
    own = torch.arange(queries.start, queries.stop)
    keys, is_known = bank.best(rows[queries], own, Exactly(rows))
    expected, values = slow_neighbors(rows, queries.start, queries.stop, k)
    assert torch.equal(row_numbers_of(keys)[is_known], expected[is_known])
    assert torch.equal(similarities_of(keys)[is_known], values[is_known])
    assert is_known.double().mean() >= least


def assert_right(found: tuple[Tensor, Tensor], rows: Tensor, first: int, last: int, k: int) -> None:
    expected, values = slow_neighbors(rows, first, last, k)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], values)


@pytest.fixture(params=[False, True], ids=["without tiles", "with tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is taken for one with tiles for products in bfloat16."""
    monkeypatch.setattr(neighbor_candidates, "has_matrix_tiles", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("axes", [(1, 2), (2, 3), (8, 20), (63, 64)])
@pytest.mark.parametrize("rows", [random_rows(2000, 64), flat_rows(2000, 64, 6), torch.eye(64).repeat(8, 1)])
def test_no_similarity_is_above_its_bound(rows: Tensor, axes: tuple[int, int]) -> None:
    exact = rows.double() @ rows.double().T
    for vectors in (principal(rows), torch.eye(64, dtype=torch.float64)):
        projected = Axes(vectors, *axes).project(rows)
        first, further = (torch.from_numpy(numbers).double() for numbers in projected)
        bounds = first @ first.T
        tighter = bounds - first[:, -1:] * first[:, -1] + further @ further.T
        assert first.shape[1] - 1 + further.shape[1] - 1 == axes[1]
        assert float((exact - bounds).max()) < 1e-6
        assert float((exact - tighter).max()) < 1e-6
        assert float((tighter - bounds).max()) < 1e-6  # by Cauchy and Schwarz too


@pytest.mark.parametrize("tile", [300, 1999, 1 << 16])
@pytest.mark.parametrize("k", [1, 7, 31])
@pytest.mark.parametrize("order", ["mixed", "by cluster"])
def test_neighbors_are_right_on_any_axes_and_in_any_tiles(
    order: str, k: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_bounds, "_TILE", tile)
    rows = flat_rows(2000, 40, 5)
    rows[1900:] = rows[:100]  # exact ties
    if order == "by cluster":
        rows = rows[rows[:, 0].argsort()]
    unfit = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    fit = [Axes(principal(rows), 5, 8), Axes(principal(rows), 1, 40)]
    for axes, least in zip([None, *fit, Axes(unfit, 20, 39)], [1.0, 0.9, 0.9, 0.0], strict=True):
        bank = BoundBank(rows.__getitem__, (2000, 40), k, axes)
        assert_bank_right(bank, rows, slice(0, 130), k, least)
        assert_bank_right(bank, rows, slice(1990, 2000), k, least)


@pytest.mark.parametrize("off", [0.2, 0.05])
def test_bets_that_are_lost_are_made_again_and_change_nothing(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = flat_rows(3000, 32, 6, noise=0.2)
    bank = BoundBank(rows.__getitem__, (3000, 32), 10, Axes(principal(rows), 6, 12))
    choose = BoundBank._choose_margin
    monkeypatch.setattr(BoundBank, "_choose_margin", lambda bank: choose(bank) - off)
    eager = BoundBank(rows.__getitem__, (3000, 32), 10, Axes(principal(rows), 6, 12))
    usual, often = Exactly(rows), Exactly(rows)
    keys, is_known = bank.best(rows[:200], torch.arange(200), usual)
    again, are_known = eager.best(rows[:200], torch.arange(200), often)
    assert is_known.double().mean() > 0.9
    are_known &= is_known  # of the others fewer than k rows were found
    assert are_known.sum() > (100 if off < 0.1 else 0)
    assert torch.equal(keys[are_known], again[are_known])
    assert often.asked > usual.asked + 20
    assert_bank_right(eager, rows, slice(0, 200), 10, 0)


def test_few_rows_are_compared_on_axes_that_fit() -> None:
    rows = flat_rows(3000, 64, 4, noise=0.01)
    compare = Exactly(rows)
    bank = BoundBank(rows.__getitem__, (3000, 64), 10, Axes(principal(rows), 4, 8))
    bank.best(rows[:300], torch.arange(300), compare)
    assert compare.compared < 3 * 10 * 300


@pytest.mark.parametrize("axes", [None, (2, 3)])
def test_rows_that_are_all_alike_leave_too_many(axes: tuple[int, int] | None) -> None:
    rows = on_grid(normalize(torch.ones(3000, 16)))
    bank = BoundBank(rows.__getitem__, (3000, 16), 5, None if axes is None else Axes(principal(rows), *axes))
    _, is_known = bank.best(rows[:50], torch.arange(50), Exactly(rows))
    assert not is_known.any()


def test_axes_are_chosen_where_they_pay() -> None:
    def chosen(rows: Tensor, k: int = 10) -> Axes | None:
        return choose_axes(rows[sample_of(len(rows))], len(rows), k, 1.0)

    axes = chosen(flat_rows(40_000, 256, 12, noise=0.01))
    assert axes is not None
    assert 12 <= axes.width <= 128
    assert chosen(random_rows(20_000, 64)) is None
    assert may_have_axes(32_768, 1024)
    assert not may_have_axes(32_767, 1024)
    assert not may_have_axes(10_000, 16)
    assert choose_axes(flat_rows(8_192, 256, 12, noise=0.01), 40_000, 10, 0.01) is None  # whole rows cost nothing


def test_rows_of_length_0_tell_nothing_of_the_margin() -> None:
    over = torch.arange(64.0)
    rests = torch.ones(64)
    assert margin_of(over, rests) == 62
    rests[60:] = 0
    assert margin_of(over, rests) == 58
    assert margin_of(torch.zeros(64), torch.zeros(64)) == 0  # nan, if they were divided
    assert margin_of(-over, torch.full((64,), 1e-6)) == 0


@pytest.mark.parametrize("zeros", [[3 * 265, 9 * 265], slice(0, None, 2)])  # two of those by which is bet
def test_neighbors_are_right_among_rows_of_length_0(zeros: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "CHEAP_PRODUCT", 1.0)
    rows = flat_rows(17_000, 512, 8, noise=0.02)
    rows[zeros] = 0
    search = NeighborSearch(rows, 10)
    assert search._on_axes is not None or zeros == slice(0, None, 2)
    assert_right(search.find(780, 820), rows, 780, 820, 10)


def test_rows_that_do_not_fit_the_space_are_compared_some_at_a_time() -> None:
    rows = flat_rows(5_000, 64, 6)
    search = NeighborSearch(rows, 10)
    search._rows._space, search._rows._space64 = np.empty(64 * 3 + 1, np.float32), np.empty(64 * 3 + 1)
    assert_right(search.find(3, 40), rows, 3, 40, 10)


def test_axes_that_tell_too_little_are_looked_at_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "CHEAP_PRODUCT", 1.0)
    rows = flat_rows(17_000, 512, 8, noise=0.02)
    search = NeighborSearch(rows, 10)
    monkeypatch.setattr(neighbor_bounds, "MOST_BOUNDED", 5)
    search.find(0, 100)
    assert search._on_axes is not None  # so few queries may be odd ones
    search.find(100, 600)
    assert search._on_axes is None
    assert_right(search.find(600, 610), rows, 600, 610, 10)


def test_a_query_that_leaves_too_many_does_not_hold_up_the_others() -> None:
    rows = flat_rows(20_000, 64, 6, noise=0.01)
    vectors = principal(rows)
    rows[7] = on_grid(vectors[:, -1])  # where the others have nothing
    bank = BoundBank(rows.__getitem__, (20_000, 64), 10, Axes(vectors, 6, 8))
    keys, is_known = bank.best(rows[:200], torch.arange(200), Exactly(rows))
    assert not is_known[7]
    assert is_known.double().mean() > 0.95
    expected, _ = slow_neighbors(rows, 0, 200, 10)
    assert torch.equal(row_numbers_of(keys)[is_known], expected[is_known])


def test_rows_that_are_nearly_alike_are_told_apart_by_the_error_that_is_allowed_for() -> None:
    apart = random_rows(3000, 16, 100)
    rows = on_grid(normalize(apart[:1] + 1e-2 * apart))
    for axes in (None, Axes(principal(rows), 10, 15), Axes(principal(rows), 15, 16)):
        bank = BoundBank(rows.__getitem__, (3000, 16), 40, axes)
        assert_bank_right(bank, rows, slice(0, 200), 40, 0.9)
    whole = BoundBank(rows.__getitem__, (3000, 16), 40, None)
    whole._error = np.float32(0)
    with pytest.raises(AssertionError):
        assert_bank_right(whole, rows, slice(0, 500), 40, 0)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_views_that_follow_each_other_are_compared_among_few(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbor_bounds, "_TILE_NUMBERS", 48 * 5000)
    monkeypatch.setattr(neighbor_bounds, "MOST_BOUNDED", 1000)
    images = random_rows(256, 48)
    rows = on_grid(normalize(images.repeat(64, 1) + 1e-3 * random_rows(256 * 64, 48)))  # their columns fold into one
    bank = BoundBank(rows.__getitem__, (256 * 64, 48), 20, None, kept)
    assert_bank_right(bank, rows, slice(500, 600), 20)


def test_rows_are_fetched_as_many_as_fit_at_a_time() -> None:
    bank = np.arange(24, dtype=np.float32).reshape(8, 3)
    space = np.empty(6, np.float32)
    assert np.shares_memory(fetch(bank, np.array([7, 0]), space), space)
    assert fetch(bank, np.array([7, 0]), space).tolist() == [[21, 22, 23], [0, 1, 2]]
    query = np.array([1, 10, 100], np.float32)
    for rows in ([], [7], [7, 0], [1, 1, 2], [0, 1, 2, 3, 4]):
        expected = [float(bank[row] @ query) for row in rows]
        assert products(bank, np.array(rows, dtype=np.int64), query, space).tolist() == expected


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_neighbors_of_rows_on_few_axes_are_those_of_a_whole_float64_product(
    kept: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "CHEAP_PRODUCT", 1.0)
    rows = flat_rows(20_000, 512, 8, noise=0.02)
    rows[15_000:15_200] = rows[:200]
    asked = list[BoundBank]()
    best = BoundBank.best

    def listen(bank: BoundBank, *given: object) -> tuple[Tensor, Tensor]:
        asked.append(bank)
        return best(bank, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(BoundBank, "best", listen)
    search = NeighborSearch(rows, 20, most_kept=kept)
    assert_right(search.find(4_990, 5_090), rows, 4_990, 5_090, 20)
    assert_right(search.find(15_000, 15_100), rows, 15_000, 15_100, 20)
    assert [bank is search._on_axes for bank in asked] == [True, True]
    on_axes = search._on_axes
    monkeypatch.setattr(neighbor_bounds, "MOST_BOUNDED", 30)  # as if the sample had not shown what other rows are like
    assert_right(search.find(15_000, 15_050), rows, 15_000, 15_050, 20)
    assert [bank is on_axes for bank in asked[2:]] == ([True] if tiles else [True, False])


def test_products_in_float32_are_not_less_where_torch_may_round_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    torch.set_float32_matmul_precision("medium")
    try:
        for rows in (random_rows(17_000, 8), flat_rows(17_000, 128, 8, 0.02)):
            assert torch.equal(NeighborSearch(rows, 3).find(5, 9)[0], slow_neighbors(rows, 5, 9, 3)[0])
    finally:
        torch.set_float32_matmul_precision("highest")


def slow_neighbors(rows: Tensor, start: int, stop: int, k: int) -> tuple[Tensor, Tensor]:
    on_grid = (rows.double() * 2**26).round() / 2**26
    similarities = (on_grid[start:stop] @ on_grid.T).float()
    similarities[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
    ordered = similarities.sort(dim=1, descending=True, stable=True)
    return ordered.indices[:, :k], ordered.values[:, :k]


@pytest.mark.usefixtures("tiles")
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


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("num_rows", [2047, 2048, 2049])
def test_neighbors_of_as_many_rows_as_are_just_many(num_rows: int) -> None:
    rows = random_rows(num_rows, 16)
    rows[-1] = rows[7]
    for k in (1, 31, 32, 33):
        ids, similarities = NeighborSearch(rows, k).find(num_rows - 30, num_rows)
        expected, values = slow_neighbors(rows, num_rows - 30, num_rows, k)
        assert torch.equal(ids, expected)
        assert torch.equal(similarities, values)


@pytest.mark.usefixtures("tiles")
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
def only_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("all rows were compared exactly")

    monkeypatch.setattr(neighbors.NeighborSearch, "_best_of_all", refuse)


@pytest.mark.usefixtures("only_few", "tiles")
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_mapped_rows_of_several_tiles_are_found_among_few_alone(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_bounds, "_TILE", 16_384)
    monkeypatch.setattr(neighbor_bounds, "_TILE_NUMBERS", 24 * 9_000)
    rows = random_rows(40_001, 24)
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    ids, similarities = NeighborSearch(mapped, 20, most_kept=kept).find(39_951, 40_001)
    expected, values = slow_neighbors(rows, 39_951, 40_001, 20)
    assert torch.equal(ids, expected)
    assert torch.equal(similarities, values)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("num_rows", [300, 17_000])
def test_float64_rows_are_taken_as_float32(num_rows: int, kept: int) -> None:
    rows = normalize(torch.randn(num_rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    found = NeighborSearch(rows.requires_grad_(), 5, most_kept=kept).find(0, 50)
    expected = slow_neighbors(rows.detach().float(), 0, 50, 5)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("axes", [64, 4])
def test_memory_is_bounded_where_few_rows_are_compared(axes: int) -> None:
    program = f"""
import resource, torch
from spice_ray.core import neighbors
from spice_ray.core.neighbors import NeighborSearch
neighbors.CHEAP_PRODUCT = 1.0
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
rows = torch.randn(200_000, 64, generator=generator)
rows[:, {axes}:] *= 0.01
rows = torch.nn.functional.normalize(rows)
NeighborSearch(rows[:20_000], 100).find(0, 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
search = NeighborSearch(rows, 100)
search.find(0, 1024)
assert (search._on_axes is not None) == ({axes} == 4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grid_and_cheap_kib = 200_000 * 64 * (4 + 4) / 1024
    assert int(done.stdout) < grid_and_cheap_kib + 300 * 1024
