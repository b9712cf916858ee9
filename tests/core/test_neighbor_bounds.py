import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spice_ray.core import neighbor_bounds, neighbors
from spice_ray.core.neighbor_axes import Axes, choose_axes, sample_of
from spice_ray.core.neighbor_bounds import BoundBank, Ints, fetch, space_for_rows
from spice_ray.core.neighbor_keys import keys_of, merge_pairs, row_numbers_of, similarities_of
from spice_ray.core.neighbors import NeighborSearch, exact_neighbors


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

    def __call__(self, best: Tensor, queries: Tensor, chosen: Sequence[Ints]) -> Tensor:
        self.asked += len(queries)
        self.compared += sum(map(len, chosen))
        for query, (one, some) in enumerate(zip(queries.double(), chosen, strict=True)):
            assert len(set(some.tolist())) == len(some)
            numbers = torch.from_numpy(some)
            keys = keys_of((self.rows[numbers] @ one).float() + 0.0, numbers)
            best[query : query + 1] = merge_pairs(
                best[query : query + 1], torch.zeros(len(some), dtype=torch.long), keys
            )
        return best


def found_by(bank: BoundBank, rows: Tensor, first: int, last: int) -> tuple[Tensor, Tensor] | None:
    keys = bank.best(rows[first:last], first, Exactly(rows))
    return None if keys is None else (row_numbers_of(keys), similarities_of(keys))


def assert_right(found: tuple[Tensor, Tensor] | None, rows: Tensor, first: int, last: int, k: int) -> None:
    assert found is not None
    expected, values = slow_neighbors(rows, first, last, k)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], values)


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
    for axes in (None, Axes(principal(rows), 5, 8), Axes(principal(rows), 1, 40), Axes(unfit, 20, 39)):
        bank = BoundBank(rows.__getitem__, (2000, 40), k, axes)
        assert_right(found_by(bank, rows, 0, 130), rows, 0, 130, k)
        assert_right(found_by(bank, rows, 1990, 2000), rows, 1990, 2000, k)


@pytest.mark.parametrize("off", [0.2, 0.05])
def test_bets_that_are_lost_are_made_again_and_change_nothing(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = flat_rows(3000, 32, 6, noise=0.2)
    bank = BoundBank(rows.__getitem__, (3000, 32), 10, Axes(principal(rows), 6, 12))
    choose = BoundBank._choose_margin
    monkeypatch.setattr(BoundBank, "_choose_margin", lambda bank: choose(bank) - off)
    eager = BoundBank(rows.__getitem__, (3000, 32), 10, Axes(principal(rows), 6, 12))
    usual, often = Exactly(rows), Exactly(rows)
    keys = bank.best(rows[:200], 0, usual)
    again = eager.best(rows[:200], 0, often)
    assert keys is not None
    assert again is not None
    assert torch.equal(keys, again)
    assert often.asked > usual.asked + 20
    assert_right((row_numbers_of(keys), similarities_of(keys)), rows, 0, 200, 10)


def test_few_rows_are_compared_on_axes_that_fit() -> None:
    rows = flat_rows(3000, 64, 4, noise=0.01)
    compare = Exactly(rows)
    BoundBank(rows.__getitem__, (3000, 64), 10, Axes(principal(rows), 4, 8)).best(rows[:300], 0, compare)
    assert compare.compared < 3 * 10 * 300


@pytest.mark.parametrize("axes", [None, (2, 3)])
def test_rows_that_are_all_alike_leave_too_many(axes: tuple[int, int] | None) -> None:
    rows = on_grid(normalize(torch.ones(3000, 16)))
    chosen = None if axes is None else Axes(principal(rows), *axes)
    assert found_by(BoundBank(rows.__getitem__, (3000, 16), 5, chosen), rows, 0, 50) is None


def test_axes_are_chosen_where_they_pay() -> None:
    def chosen(rows: Tensor, k: int = 10) -> Axes | None:
        return choose_axes(rows[sample_of(len(rows))], len(rows), k, 1.0)

    axes = chosen(flat_rows(40_000, 256, 12, noise=0.01))
    assert axes is not None
    assert 12 <= axes.width <= 128
    assert chosen(random_rows(20_000, 64)) is None
    assert chosen(flat_rows(10_000, 256, 12, noise=0.01)) is None  # too few rows
    assert choose_axes(flat_rows(8_192, 256, 12, noise=0.01), 40_000, 10, 0.01) is None  # whole rows cost nothing


def test_rows_are_fetched_where_the_space_is_too_small_for_them() -> None:
    bank = np.arange(24, dtype=np.float32).reshape(8, 3)
    space = np.empty(6, np.float32)
    assert np.shares_memory(fetch(bank, np.array([7, 0]), space), space)
    assert fetch(bank, np.array([7, 0]), space).tolist() == [[21, 22, 23], [0, 1, 2]]
    assert fetch(bank, np.array([1, 1, 2]), space).tolist() == [[3, 4, 5], [3, 4, 5], [6, 7, 8]]
    assert fetch(bank, np.array([], dtype=np.int64), space_for_rows(np.float32)).shape == (0, 3)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_neighbors_of_rows_on_few_axes_are_those_of_a_whole_float64_product(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "_KEPT_BYTES", kept)
    rows = flat_rows(20_000, 512, 8, noise=0.02)
    rows[15_000:15_200] = rows[:200]
    asked = list[BoundBank]()
    best = BoundBank.best

    def listen(bank: BoundBank, *given: object) -> Tensor | None:
        asked.append(bank)
        return best(bank, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(BoundBank, "best", listen)
    search = NeighborSearch(rows, 20)
    assert_right(search.find(4_990, 5_090), rows, 4_990, 5_090, 20)
    assert_right(search.find(15_000, 15_100), rows, 15_000, 15_100, 20)
    assert [bank is search._on_axes for bank in asked] == [True, True]
    monkeypatch.setattr(neighbor_bounds, "MOST_BOUNDED", 30)  # as if the sample had not shown what other rows are like
    assert_right(search.find(15_000, 15_050), rows, 15_000, 15_050, 20)
    assert [bank is search._on_axes for bank in asked[2:]] == [True, False]


@pytest.fixture(params=[False, True], ids=["without tiles", "with tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is taken for one with tiles for products in bfloat16."""
    monkeypatch.setattr(neighbors, "has_matrix_tiles", lambda: request.param)
    return bool(request.param)


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
    monkeypatch.setattr(neighbors, "_KEPT_BYTES", kept)
    rows = random_rows(40_001, 24)
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    ids, similarities = NeighborSearch(mapped, 20).find(39_951, 40_001)
    expected, values = slow_neighbors(rows, 39_951, 40_001, 20)
    assert torch.equal(ids, expected)
    assert torch.equal(similarities, values)


@pytest.mark.usefixtures("tiles")
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
