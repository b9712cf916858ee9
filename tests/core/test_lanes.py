"""Lanes: every image once per pass, any step at any time, the same batch whoever serves it."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from spice_ray.contracts import Batch
from spice_ray.core.lanes import DrawnLanes, LaneImages, ShuffledLanes
from spice_ray.core.order import stream_key

KEY = stream_key(3, "test")
# Four lanes of 13, 8, 11 and 3 rows: lane g owns files g, g + 4 and so on.
FILES = [[6, 7], [8], [1, 9, 1], [3]]
SIZES = [sum(rows) for rows in FILES]
TOTAL = sum(SIZES)


def lane_images(lane_ids: list[int]) -> LaneImages:
    """Each sample is a 2 x 2 image of its own number; the ids are out of order, as shards of several lanes are."""
    all_ids = torch.arange(TOTAL).flip(0).split(SIZES)
    ids = torch.cat([all_ids[lane] for lane in lane_ids])
    images = ids.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    return LaneImages(images, ids, lane_ids, [FILES[lane] for lane in lane_ids], 4)


def shuffled(lane_ids: list[int], rows_per_lane: int = 2, window: int = 65_536) -> ShuffledLanes:
    return ShuffledLanes(lane_images(lane_ids), rows_per_lane=rows_per_lane, key=KEY, window=window)


def drawn(lane_ids: list[int], chosen: Tensor, rows_per_lane: int = 2) -> DrawnLanes:
    return DrawnLanes(lane_images(lane_ids), chosen, rows_per_lane=rows_per_lane, key=KEY)


def lane_ids_of(batches: list[Batch], lane: int) -> list[int]:
    return torch.cat([batch.sample_ids[lane::4] for batch in batches]).tolist()


def own_ids(lane: int) -> set[int]:
    return set(torch.arange(TOTAL).flip(0).split(SIZES)[lane].tolist())


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
    images = lane_images([0, 1, 2, 3])
    one = ShuffledLanes(images, rows_per_lane=8, key=KEY).batch(0).sample_ids
    other = ShuffledLanes(images, rows_per_lane=8, key=KEY + 1).batch(0).sample_ids
    assert not torch.equal(one, other)


# Drawn with replacement


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
    ids = lanes.batch(0).sample_ids
    first = min(own_ids(0))
    counts = torch.bincount(ids - first, minlength=13)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    pairs = torch.bincount((ids[:-1] - first) * 13 + ids[1:] - first, minlength=169)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-3


def test_lanes_draw_independently_of_one_another():
    ids = drawn([0, 1], torch.ones(TOTAL, dtype=torch.bool), rows_per_lane=4000).batch(0).sample_ids
    one, other = ids[0::2] - min(own_ids(0)), ids[1::2] - min(own_ids(1))
    pairs = torch.bincount(one * 8 + other, minlength=13 * 8)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-3
