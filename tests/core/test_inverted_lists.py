from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spice_ray.core.inverted_lists import RECALL, ListSearch, build_lists, choose_probes
from spice_ray.core.neighbors import exact_neighbors


def clustered_rows(num_rows: int, width: int, num_clusters: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_clusters, width, generator=generator)
    chosen = torch.randint(num_clusters, (num_rows,), generator=generator)
    return normalize(centres[chosen] + 0.5 * torch.randn(num_rows, width, generator=generator))


ROWS = clustered_rows(6000, 24)


def test_all_lists_find_the_exact_neighbours_in_their_order() -> None:
    rows = ROWS.clone()
    rows[100:160] = rows[:60]  # ties
    index = build_lists(rows, key=1)
    indices, similarities = ListSearch(index, rows, 9, index.nlist).find(0, 6000)
    expected = exact_neighbors(rows, 9)
    assert torch.equal(indices, expected[0])
    assert torch.equal(similarities, expected[1])


def test_the_least_number_of_lists_is_chosen_that_finds_enough() -> None:
    index = build_lists(ROWS, key=1)
    chosen = choose_probes(index, ROWS, 20, key=2)
    assert chosen.rows == 1000
    assert 1 < chosen.probes < index.nlist
    expected, _ = exact_neighbors(ROWS, 20)

    def share(probes: int) -> float:
        found, _ = ListSearch(index, ROWS, 20, probes).find(0, 6000)
        return float((found[:, :, None] == expected[:, None]).any(dim=2).double().mean())

    assert share(chosen.probes) == pytest.approx(chosen.share, abs=0.01)
    assert chosen.share >= RECALL > share(chosen.probes // 4)


def test_lists_with_too_few_rows_are_not_the_last_that_are_looked_into() -> None:
    index = build_lists(ROWS, key=1)
    indices, _ = ListSearch(index, ROWS, 900, 1).find(10, 30)
    assert (indices >= 0).all()
    assert all(len(set(row)) == 900 and 10 + place not in row for place, row in enumerate(indices.tolist()))


def test_the_same_key_gives_the_same_lists_wherever_the_rows_are(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    first, second = (ListSearch(build_lists(rows, key=1), rows, 7, 2).find(50, 300) for rows in (ROWS, mapped))
    assert torch.equal(first[0], second[0])
    other = ListSearch(build_lists(ROWS, key=2), ROWS, 7, 2).find(50, 300)
    assert not torch.equal(first[0], other[0])


def test_a_handful_of_rows_are_one_list() -> None:
    rows = ROWS[:12]
    index = build_lists(rows, key=0)
    assert index.nlist == 1
    assert choose_probes(index, rows, 3, key=0) == (1, 1.0, 12)
    assert torch.equal(ListSearch(index, rows, 11, 1).find(0, 12)[0], exact_neighbors(rows, 11)[0])
