"""Counted randomness and counted order."""

import numpy as np
import pytest
import torch
from scipy import stats

from spice_ray.core import order

MASK = (1 << 64) - 1


def reference_splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def unsigned(values: torch.Tensor) -> list[int]:
    return [value & MASK for value in values.tolist()]


def test_splitmix64_gives_the_published_first_outputs_of_seed_1234567():
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + k * gamma) & MASK for k in range(5)]
    signed = torch.tensor([state - (1 << 64) if state >> 63 else state for state in states])
    assert unsigned(order.splitmix64(signed)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_splitmix64_agrees_with_plain_integers_at_the_edges_of_int64():
    values = [0, 1, -1, 2**63 - 1, -(2**63), 2**31, -(2**31), 123456789123456789, -987654321987654321]
    assert unsigned(order.splitmix64(torch.tensor(values))) == [reference_splitmix64(value & MASK) for value in values]


def test_uniform_numbers_are_uniform_in_every_column_and_along_a_row():
    numbers = order.uniform(order.stream_key(3, "a", 0), torch.arange(20_000), 4).numpy()
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    wide = order.uniform(order.stream_key(3, "a", 0), torch.tensor([7]), 20_000).numpy()[0]
    assert stats.kstest(wide, "uniform").pvalue > 1e-3


def test_columns_neighbouring_draws_and_streams_are_uncorrelated():
    draws = torch.arange(20_000)
    numbers = order.uniform(order.stream_key(0, "a"), draws, 3).numpy()
    other = order.uniform(order.stream_key(0, "b"), draws, 1).numpy()
    series = np.stack([*numbers.T, np.roll(numbers[:, 0], 1), other[:, 0]])
    correlation = np.corrcoef(series) - np.eye(len(series))
    assert np.abs(correlation).max() < 0.035  # five standard errors


@pytest.mark.parametrize("draw", [0, -1, 2**40, 2**63 - 1, -(2**63)])
def test_a_row_of_uniform_numbers_depends_on_its_draw_alone(draw):
    key = order.stream_key(1, "x")
    alone = order.uniform(key, torch.tensor([draw]), 5)
    among = order.uniform(key, torch.tensor([5, 9, draw, 4, draw]), 5)
    assert torch.equal(among[2:3], alone)
    assert torch.equal(among[4:5], alone)
    assert not torch.equal(among[0], alone[0])


def test_fewer_columns_are_the_first_of_more():
    key, draws = order.stream_key(1, "x"), torch.arange(10)
    assert torch.equal(order.uniform(key, draws, 9)[:, :4], order.uniform(key, draws, 4))


def test_no_draws_give_no_numbers():
    nothing = torch.empty(0, dtype=torch.int64)
    assert order.uniform(1, nothing, 3).shape == (0, 3)
    assert order.integers(1, nothing, 3).shape == (0,)


def test_uniform_does_not_change_its_draws():
    draws = torch.arange(100)
    order.uniform(order.stream_key(0), draws, 2)
    assert torch.equal(draws, torch.arange(100))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_accelerator_draws_the_same_numbers():
    key, draws = order.stream_key(1, "x"), torch.arange(-500, 500) * 12345678912345
    assert torch.equal(order.uniform(key, draws.cuda(), 7).cpu(), order.uniform(key, draws, 7))


def test_integers_fill_their_range_evenly():
    drawn = order.integers(order.stream_key(2, "i"), torch.arange(30_000), 10)
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert order.integers(1, torch.arange(50), 1).tolist() == [0] * 50


def test_every_part_of_a_stream_key_matters():
    names = [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0), (0, "a0"), ("0", "a", 0)]
    keys = {order.stream_key(*parts) for parts in names}
    assert len(keys) == 6
    assert all(0 <= key < 2**63 for key in keys)
    assert order.stream_key(0, "a", 0) == order.stream_key(0, "a", 0)


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_permutation_holds_every_number_once(size):
    assert sorted(order.permutation(5, size).tolist()) == list(range(size))


def test_permutation_puts_every_number_everywhere_equally_often():
    places = np.array([order.permutation(order.stream_key("p", k), 6) for k in range(3000)])
    for column in places.T:
        assert stats.chisquare(np.bincount(column, minlength=6)).pvalue > 1e-4


@pytest.mark.parametrize("window", [1, 3, 7, 1000])
@pytest.mark.parametrize("rows_per_file", [[], [0], [5], [4, 0, 6, 1], [10, 10, 10]])
def test_lane_order_reads_every_row_once(rows_per_file, window):
    rows = order.lane_order(order.stream_key(0), 2, rows_per_file, window)
    assert rows.dtype == np.int64
    assert sorted(rows.tolist()) == list(range(sum(rows_per_file)))


def test_a_window_that_divides_the_files_never_mixes_two_of_them():
    rows = order.lane_order(order.stream_key(4), 0, [6, 6, 6, 6], window=3)
    files = (rows // 6).reshape(4, 6)
    assert (files == files[:, :1]).all()
    assert sorted(files[:, 0].tolist()) == [0, 1, 2, 3]
    halves = (rows % 6 // 3).reshape(8, 3)
    assert (halves == halves[:, :1]).all()


def test_a_window_of_one_row_reads_whole_files_in_order():
    rows = order.lane_order(order.stream_key(4), 0, [3, 2, 4], window=1).tolist()
    runs = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    first = sorted(runs, key=lambda run: rows.index(run[0]))
    assert rows == [row for run in first for row in run]


def test_windows_hold_the_rows_that_the_file_order_gives_them():
    rows_per_file, key = [5, 4, 6], order.stream_key(9)
    in_file_order = order.lane_order(key, 1, rows_per_file, window=1)
    shuffled = order.lane_order(key, 1, rows_per_file, window=4)
    for start in range(0, 15, 4):
        assert sorted(shuffled[start : start + 4]) == sorted(in_file_order[start : start + 4])
    assert shuffled.tolist() != in_file_order.tolist()


def test_passes_and_lanes_have_orders_of_their_own_that_can_be_repeated():
    orders = [
        order.lane_order(order.stream_key(0, "lane", lane), pass_index, [20, 20], 40).tolist()
        for lane in range(2)
        for pass_index in range(3)
    ]
    assert len({tuple(rows) for rows in orders}) == 6
    assert orders[4] == order.lane_order(order.stream_key(0, "lane", 1), 1, [20, 20], 40).tolist()
