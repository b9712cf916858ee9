"""Parts are cut from sorted runs without a row lost or doubled, wherever the boundaries fall."""

import numpy as np
import pytest

from spice_ray.readers.runs import NUM_BINS, plan_parts


def counts_of(bins: list[int]) -> np.ndarray:
    return np.bincount(np.asarray(bins, np.int64), minlength=NUM_BINS)


@pytest.mark.parametrize("num_parts", [1, 3, 16, 40])
@pytest.mark.parametrize(
    "bins",
    [
        [],
        [0],
        [NUM_BINS - 1],
        [5] * 37,
        [0] * 20 + [1] * 3 + [NUM_BINS - 1] * 20,
        sorted(np.random.default_rng(0).integers(0, NUM_BINS, 1000).tolist()),
        sorted(np.random.default_rng(1).integers(0, 7, 1000).tolist()),
    ],
    ids=["none", "first", "last", "one-bin", "ends", "many-bins", "few-bins"],
)
def test_parts_take_every_row_once_in_the_order_of_the_keys(bins: list[int], num_parts: int) -> None:
    parts = plan_parts(counts_of(bins), num_parts)
    assert [part.rows for part in parts] == [len(rows) for rows in np.array_split(np.arange(len(bins)), num_parts)]
    for part in parts:
        # What a merge does: the rows of the part's bins, without those of the part before.
        in_bins = [rank for rank, bin_ in enumerate(bins) if part.first_bin <= bin_ < part.stop_bin]
        taken = in_bins[part.skip : part.skip + part.rows]
        assert taken == list(range(part.first_id, part.first_id + part.rows))


def test_a_part_reads_no_more_than_a_bin_beyond_its_rows() -> None:
    bins = sorted(np.random.default_rng(2).integers(0, NUM_BINS, 5000).tolist())
    counts = counts_of(bins)
    for part in plan_parts(counts, 16):
        read = int(counts[part.first_bin : part.stop_bin].sum())
        assert read <= part.rows + 2 * counts.max()
