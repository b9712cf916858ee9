import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from spice_ray.core.neighbors import NeighborSearch, exact_neighbors


def coarse_unit_rows(num_rows: int, width: int, seed: int) -> NDArray[np.float32]:
    """Four entries of +-0.5 per row: unit norm, similarities that are multiples of 0.25, so ties everywhere."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((num_rows, width), np.float32)
    for row in rows:
        row[rng.choice(width, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
    return rows


def slow_neighbors(rows: NDArray[np.float32], k: int) -> tuple[list[list[int]], list[list[float]]]:
    similarity = rows.astype(np.float64) @ rows.astype(np.float64).T
    ids = [
        sorted((j for j in range(len(rows)) if j != i), key=lambda j, i=i: (-similarity[i, j], j))[:k]
        for i in range(len(rows))
    ]
    return ids, [[float(similarity[i, j]) for j in row] for i, row in enumerate(ids)]


def random_unit_rows(num_rows: int, width: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("width", [4, 6, 12])
@pytest.mark.parametrize(("num_rows", "block"), [(2, 1), (9, 64), (50, 7), (64, 16), (65, 16), (65, 5)])
def test_neighbors_equal_a_float64_sort_where_ties_are_everywhere(num_rows: int, block: int, width: int) -> None:
    rows = coarse_unit_rows(num_rows, width, seed=num_rows)
    for k in {1, num_rows // 2, num_rows - 1}:
        ids, similarities = exact_neighbors(rows, k, block=block)
        slow_ids, slow_similarities = slow_neighbors(rows, k)
        assert ids.tolist() == slow_ids
        assert similarities.tolist() == slow_similarities


def test_equal_images_are_listed_by_rising_row_number_without_the_row_itself() -> None:
    ids, similarities = exact_neighbors(np.tile(np.float32([[0.6, 0.8]]), (6, 1)), 3, block=2)
    assert ids.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert similarities.unique().numel() == 1


def test_copies_of_a_row_tie_exactly_wherever_they_stand() -> None:
    originals = random_unit_rows(30, 129)
    ids, similarities = exact_neighbors(originals.repeat(5, 1), 4, block=11)
    assert ids.tolist() == [[j for j in range(row % 30, 150, 30) if j != row] for row in range(150)]
    assert (similarities == similarities[:, :1]).all()


def test_the_answer_does_not_depend_on_the_block_down_to_the_last_bit() -> None:
    rows = random_unit_rows(203, 77)
    ids, similarities = exact_neighbors(rows, 20, block=203)
    for block in (9, 50, 64, 1000):
        other_ids, other_similarities = exact_neighbors(rows, 20, block=block)
        assert torch.equal(ids, other_ids)
        assert torch.equal(similarities, other_similarities)


@pytest.mark.parametrize("num_workers", [1, 2, 4, 7])
def test_shares_of_the_rows_put_together_are_the_whole_answer(num_workers: int) -> None:
    rows = random_unit_rows(101, 33)
    cuts = [101 * worker // num_workers for worker in range(num_workers + 1)]
    shares = [NeighborSearch(rows, 9, block=16).find(a, b) for a, b in pairwise(cuts)]
    ids, similarities = exact_neighbors(rows, 9, block=40)
    assert torch.equal(torch.cat([share[0] for share in shares]), ids)
    assert torch.equal(torch.cat([share[1] for share in shares]), similarities)


def test_similarities_are_cosines_to_float32_precision() -> None:
    rows = random_unit_rows(100, 64)
    ids, similarities = exact_neighbors(rows, 10, block=32)
    cosines = (rows.double()[:, None] * rows.double()[ids]).sum(dim=2)
    assert (similarities - cosines).abs().max() < 2e-7
    assert (similarities[:, :-1] >= similarities[:, 1:]).all()


def test_opposite_rows_come_last_and_minus_zero_ties_with_zero() -> None:
    rows = np.float32([[1, 0], [-1, 0], [-0.0, 1], [0, -1], [1, 0]])
    ids, similarities = exact_neighbors(rows, 4)
    assert ids[0].tolist() == [4, 2, 3, 1]
    assert similarities[0].tolist() == [1, 0, 0, -1]


def test_a_memory_map_gives_the_same_answer_as_the_tensor_and_is_not_written(tmp_path: Path) -> None:
    rows = random_unit_rows(60, 16)
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert torch.equal(exact_neighbors(mapped, 5, block=13)[0], exact_neighbors(rows, 5, block=17)[0])
    assert np.array_equal(mapped, rows.numpy())


def test_half_precision_rows_are_compared_by_their_own_values() -> None:
    rows = random_unit_rows(40, 16).half()
    assert torch.equal(exact_neighbors(rows, 5)[0], exact_neighbors(rows.float(), 5)[0])


@pytest.mark.parametrize("k", [0, -1, 4, 5])
def test_as_many_neighbors_as_rows_are_refused_with_both_numbers(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} neighbours of 4 rows"):
        exact_neighbors(random_unit_rows(4, 3), k)


def test_a_block_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="block=0"):
        exact_neighbors(random_unit_rows(4, 3), 1, block=0)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 5)])
def test_rows_outside_the_store_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"rows {start} to {stop} of 4"):
        NeighborSearch(random_unit_rows(4, 3), 1).find(start, stop)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named(value: float) -> None:
    rows = random_unit_rows(10, 3)
    rows[7, 1] = value
    with pytest.raises(ValueError, match="row 7 of the embeddings is not finite"):
        exact_neighbors(rows, 2, block=3)


def test_no_array_of_all_pairs_is_ever_made() -> None:
    program = """
import resource, torch
from spice_ray.core.neighbors import exact_neighbors
exact_neighbors(torch.eye(4)[torch.arange(600) % 4], 5, block=512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
exact_neighbors(torch.eye(4)[torch.arange(11000) % 4], 5, block=512)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kib_of_all_pairs_in_one_byte_each = 11_000**2 / 1024
    assert int(done.stdout) < kib_of_all_pairs_in_one_byte_each / 2
