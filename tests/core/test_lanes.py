"""Lanes: every image once per pass, any step at any time, the same batch whoever serves it and however it is fed."""

import threading
from collections.abc import Iterator

import pytest
import torch
from scipy import stats
from torch import Tensor

from spice_ray.contracts import Batch, ShardFile
from spice_ray.core.lanes import ResidentLanes, Rows, Stream, serve, shuffle_window
from spice_ray.core.order import stream_key, with_replacement
from spice_ray.core.streaming import StreamedLanes
from tests.small_lanes import resident, rows_of, shard_files

KEY = stream_key(3, "test")
# Four lanes of 13, 8, 11 and 3 rows: lane g owns files g, g + 4 and so on.
FILES = [6, 8, 1, 3, 7, 0, 9, 0, 0, 0, 1]
SIZES = [13, 8, 11, 3]
TOTAL = sum(SIZES)
CPU = torch.device("cpu")


def images() -> Tensor:
    """Each sample is a 2 x 2 image of its own number."""
    return torch.arange(TOTAL, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()


def shuffled(lane_ids: list[int], rows_per_lane: int = 2, window: int = 65_536, key: int = KEY) -> ResidentLanes:
    return resident(images(), FILES, lane_ids, 4, Stream(key, rows_per_lane, window))


def drawn(lane_ids: list[int], chosen: Tensor, rows_per_lane: int = 2) -> ResidentLanes:
    return resident(images(), FILES, lane_ids, 4, Stream(KEY, rows_per_lane, 65_536, with_replacement, chosen))


class Files:
    """Reads files and remembers which."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, files: Iterator[ShardFile]) -> Iterator[Rows]:
        for file in files:
            self.read.append(file.name)
            yield rows_of(images(), file)


def streamed(lane_ids: list[int], stream: Stream, files: Files | None = None) -> StreamedLanes:
    return StreamedLanes(serve(shard_files(FILES), lane_ids, 4), stream, files or Files(), CPU)


def lane_ids_of(batches: list[Batch], lane: int) -> list[int]:
    return torch.cat([batch.sample_ids[lane::4] for batch in batches]).tolist()


def own_ids(lane: int) -> set[int]:
    ids = torch.arange(TOTAL).split(FILES)
    return set(torch.cat(ids[lane::4]).tolist())


@pytest.mark.parametrize("window", [65_536, 4, 1])
@pytest.mark.parametrize("rows_per_lane", [1, 2, 5])
def test_every_lane_gives_each_of_its_images_once_per_pass(rows_per_lane, window):
    lanes = shuffled([0, 1, 2, 3], rows_per_lane, window)
    batches = [lanes.batch(step) for step in range(60 // rows_per_lane)]
    for lane, size in enumerate(SIZES):
        ids = lane_ids_of(batches, lane)
        for start in range(0, len(ids) - size + 1, size):
            assert set(ids[start : start + size]) == own_ids(lane)


def test_a_batch_that_spans_several_passes_of_a_small_lane_holds_each_of_its_images_as_often():
    batch = shuffled([0, 1, 2, 3], rows_per_lane=9).batch(0)
    ids = batch.sample_ids[3::4]
    assert set(ids.tolist()) == own_ids(3)
    assert torch.bincount(ids)[list(own_ids(3))].tolist() == [3, 3, 3]


def test_passes_come_in_different_orders():
    lanes = shuffled([0, 1, 2, 3], rows_per_lane=13)
    first, second = (lanes.batch(step).sample_ids[0::4].tolist() for step in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_any_step_can_be_asked_for_at_any_time():
    steps = [37, 0, 12, 12, 3, 200, 11]
    one = shuffled([0, 1, 2, 3], rows_per_lane=3)
    sequence = shuffled([0, 1, 2, 3], rows_per_lane=3)
    in_turn = [sequence.batch(step) for step in range(201)]
    for step in steps:
        for asked, expected in zip(one.batch(step), in_turn[step], strict=True):
            assert torch.equal(asked, expected)
        for asked, expected in zip(shuffled([0, 1, 2, 3], rows_per_lane=3).batch(step), in_turn[step], strict=True):
            assert torch.equal(asked, expected)


def test_images_and_sample_ids_belong_together():
    for batch in (shuffled([1, 2]).batch(4), drawn([1, 2], torch.ones(TOTAL, dtype=torch.bool)).batch(4)):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (4, 3, 2, 2)
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.sample_ids)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("stream", ["shuffled", "drawn"])
def test_workers_together_serve_the_rows_and_draws_of_one_in_the_same_order(stream, workers):
    def serve(lane_ids: list[int], step: int) -> Batch:
        if stream == "shuffled":
            return shuffled(lane_ids, rows_per_lane=3).batch(step)
        return drawn(lane_ids, torch.arange(TOTAL) % 3 > 0, rows_per_lane=3).batch(step)

    share = 4 // workers
    for step in (0, 1, 5, 40):
        alone = serve([0, 1, 2, 3], step)
        parts = [serve(list(range(w * share, (w + 1) * share)), step) for w in range(workers)]
        for field in ("images", "sample_ids", "draws"):
            rows = [getattr(part, field).unflatten(0, (3, share)) for part in parts]
            assert torch.equal(torch.cat(rows, dim=1).flatten(0, 1), getattr(alone, field))


@pytest.mark.parametrize("stream", ["shuffled", "drawn"])
def test_draws_count_the_global_positions_of_the_stream(stream):
    everything = torch.ones(TOTAL, dtype=torch.bool)
    lanes = shuffled([0, 1, 2, 3], 3) if stream == "shuffled" else drawn([0, 1, 2, 3], everything, 3)
    draws = torch.cat([lanes.batch(step).draws for step in range(7)])
    assert torch.equal(draws, torch.arange(7 * 12))


def test_the_sequence_of_a_lane_does_not_depend_on_the_batch_size():
    small, large = shuffled([0, 1, 2, 3], rows_per_lane=2), shuffled([0, 1, 2, 3], rows_per_lane=8)
    for field in ("sample_ids", "draws"):
        fine = torch.cat([getattr(small.batch(step), field) for step in range(8)])
        coarse = torch.cat([getattr(large.batch(step), field) for step in range(2)])
        assert torch.equal(fine, coarse)


def test_another_key_gives_another_sequence():
    one = shuffled([0, 1, 2, 3], 8).batch(0).sample_ids
    other = shuffled([0, 1, 2, 3], 8, key=KEY + 1).batch(0).sample_ids
    assert not torch.equal(one, other)


# Drawn with replacement


def places(ids: Tensor, lane: int) -> Tensor:
    """Where the samples stand among those of their lane."""
    return torch.searchsorted(torch.tensor(sorted(own_ids(lane))), ids)


def test_only_chosen_images_are_drawn_each_in_its_lane():
    chosen = torch.arange(TOTAL) % 4 == 1
    lanes = drawn([0, 1, 2, 3], chosen)
    batches = [lanes.batch(step) for step in range(200)]
    wanted = set(torch.nonzero(chosen).flatten().tolist())
    for lane in range(4):
        assert set(lane_ids_of(batches, lane)) == own_ids(lane) & wanted


def test_the_only_chosen_image_of_a_lane_is_drawn_every_time():
    chosen = torch.zeros(TOTAL, dtype=torch.bool)
    singles = [min(own_ids(lane)) for lane in range(4)]
    chosen[singles] = True
    for step in (0, 9):
        assert drawn([0, 1, 2, 3], chosen).batch(step).sample_ids.tolist() == singles * 2


def test_each_chosen_image_of_a_lane_is_drawn_equally_often_and_independently():
    lanes = drawn([0], torch.ones(TOTAL, dtype=torch.bool), rows_per_lane=2000)
    ids = places(lanes.batch(0).sample_ids, 0)
    counts = torch.bincount(ids, minlength=13)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    pairs = torch.bincount(ids[:-1] * 13 + ids[1:], minlength=169)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-3


def test_lanes_draw_independently_of_one_another():
    ids = drawn([0, 1], torch.ones(TOTAL, dtype=torch.bool), rows_per_lane=4000).batch(0).sample_ids
    one, other = places(ids[0::2], 0), places(ids[1::2], 1)
    pairs = torch.bincount(one * 8 + other, minlength=13 * 8)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-3


# Streamed

CHOSEN = torch.arange(TOTAL) % 3 > 0


def every_stream(rows_per_lane: int, window: int) -> list[Stream]:
    return [
        Stream(KEY, rows_per_lane, window),
        Stream(KEY, rows_per_lane, window, chosen=CHOSEN),
        Stream(KEY, rows_per_lane, window, with_replacement, CHOSEN),
    ]


@pytest.mark.parametrize("window", [1, 3, 4, 8, 100])
@pytest.mark.parametrize("rows_per_lane", [1, 2, 5, 16])
def test_streamed_lanes_give_the_batches_of_resident_ones(rows_per_lane: int, window: int) -> None:
    for stream in every_stream(rows_per_lane, window):
        for lane_ids in ([0, 1, 2, 3], [2, 3], [1]):
            there = resident(images(), FILES, lane_ids, 4, stream)
            here = streamed(lane_ids, stream)
            for step in range(40 // rows_per_lane + 2):
                for ours, theirs in zip(here.batch(step), there.batch(step), strict=True):
                    assert torch.equal(ours, theirs)
            here.close()


@pytest.mark.parametrize("step", [0, 1, 7, 30])
def test_a_stream_goes_on_from_any_step_as_if_it_had_read_all_before(step: int) -> None:
    for stream in every_stream(rows_per_lane=2, window=3):
        there, here = resident(images(), FILES, [0, 1, 2, 3], 4, stream), streamed([0, 1, 2, 3], stream)
        for asked in (step, step + 1, 3, 4, step):
            for ours, theirs in zip(here.batch(asked), there.batch(asked), strict=True):
                assert torch.equal(ours, theirs)
        here.close()


def test_a_resumed_stream_reads_the_files_of_one_window_and_no_others() -> None:
    rows_per_file, window = [10] * 50, 10
    lanes = serve(shard_files(rows_per_file), [0], 1)
    pictures = torch.zeros(500, 3, 2, 2, dtype=torch.uint8)
    read: list[str] = []

    def files(wanted: Iterator[ShardFile]) -> Iterator[Rows]:
        for file in wanted:
            read.append(file.name)
            yield rows_of(pictures, file)

    stream = StreamedLanes(lanes, Stream(KEY, 5, window), files, CPU)
    stream.batch(60)  # row 300 of the only lane: the 31st file
    stream.close()
    # One file for the batch; others may have been read for the batches ahead of it.
    assert 1 <= len(read) <= 4


def test_memory_holds_a_window_and_a_file_of_each_lane() -> None:
    held, most = [0], [0]
    lock = threading.Lock()

    def files(wanted: Iterator[ShardFile]) -> Iterator[Rows]:
        for file in wanted:
            with lock:
                held[0] += file.rows
            yield rows_of(pictures, file)

    rows_per_file, window, rows_per_lane = [7] * 400, 20, 4
    pictures = torch.zeros(2800, 3, 2, 2, dtype=torch.uint8)
    lanes = StreamedLanes(serve(shard_files(rows_per_file), [0, 1], 2), Stream(KEY, rows_per_lane, window), files, CPU)
    for step in range(250):
        lanes.batch(step)
        with lock:
            held[0] -= 2 * rows_per_lane
            most[0] = max(most[0], held[0])
    lanes.close()
    # Per lane a window, less than a file more, and the batches ahead.
    assert most[0] <= 2 * (window + 7 + 5 * rows_per_lane)


def test_what_the_reader_raises_is_raised_by_the_batch_that_needs_it() -> None:
    def files(wanted: Iterator[ShardFile]) -> Iterator[Rows]:
        for count, file in enumerate(wanted):
            if count == 20:
                raise OSError(f"{file.name} is damaged")
            yield rows_of(images(), file)

    lanes = StreamedLanes(serve(shard_files(FILES), [0, 1, 2, 3], 4), Stream(KEY, 2, 4), files, CPU)
    steps = iter(range(100))
    with pytest.raises(OSError, match="is damaged"):
        all(lanes.batch(step).images.any() or True for step in steps)
    assert next(steps) > 1  # batches that were whole came before
    lanes.close()


def test_a_closed_stream_leaves_no_thread() -> None:
    before = threading.active_count()
    lanes = streamed([0, 1], Stream(KEY, 2, 4))
    lanes.batch(0)
    assert threading.active_count() == before + 1
    lanes.close()
    lanes.close()
    assert threading.active_count() == before


def test_windows_are_8192_rows_and_at_most_128_megabytes() -> None:
    assert shuffle_window(32) == 8192
    assert shuffle_window(224) == 128 * 1024**2 // (3 * 224 * 224)
    assert shuffle_window(1024) == 42
