"""Parts are cut from sorted runs without a row lost or doubled, wherever the boundaries fall."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from spice_ray.readers.parts import PartFormat
from spice_ray.readers.rows import KEY_BYTES, Row
from spice_ray.readers.runs import NUM_BINS, Part, plan_parts, read_slices, write_run


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


FORMAT = PartFormat(1, "pixels")


def rows_in(bins: list[int]) -> list[Row]:
    """One row for each bin, named by its place."""
    keys = (bin_.to_bytes(2, "big") + number.to_bytes(KEY_BYTES - 2, "big") for number, bin_ in enumerate(bins))
    return [Row(key, str(number), "train", b"rgb", None) for number, key in enumerate(keys)]


@pytest.mark.parametrize("batch_bytes", [1, 9, 30, 1 << 20])
@pytest.mark.parametrize(
    "bins",
    [
        [0],
        [7] * 40,
        [0] * 5 + [9] * 6 + [NUM_BINS - 1] * 7,
        sorted(np.random.default_rng(3).integers(0, 20, 90).tolist()),
    ],
    ids=["one", "one-bin", "ends", "random"],
)
def test_a_slice_of_a_run_has_the_rows_of_its_bins_in_order(bins: list[int], batch_bytes: int, tmp_path: Path) -> None:
    write_run(tmp_path / "run.arrow", rows_in(bins), FORMAT, batch_bytes)
    edges = sorted({0, 1, 5, 7, 8, 10, 15, 20, NUM_BINS - 1, NUM_BINS})
    for first in edges:
        for stop in (edge for edge in edges if edge >= first):
            part = Part(0, 0, 0, first, stop, 0)
            found = [
                name for piece in read_slices(tmp_path / "run.arrow", part) for name in piece["source"].to_pylist()
            ]
            assert found == [str(number) for number, bin_ in enumerate(bins) if first <= bin_ < stop]


def test_a_slice_of_a_run_reads_few_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bins = list(range(100))
    write_run(tmp_path / "run.arrow", rows_in(bins), FORMAT, batch_bytes=15)
    with pa.ipc.open_file(tmp_path / "run.arrow") as run:
        assert run.num_record_batches == 20
    opened: list[int] = []
    whole = pa.RecordBatchFileReader.get_batch

    def counted(reader: pa.RecordBatchFileReader, number: int) -> pa.RecordBatch:
        opened.append(number)
        return whole(reader, number)

    monkeypatch.setattr(pa.RecordBatchFileReader, "get_batch", counted)
    assert sum(map(len, read_slices(tmp_path / "run.arrow", Part(0, 0, 0, 43, 51, 0)))) == 8
    assert opened == [8, 9, 10]
