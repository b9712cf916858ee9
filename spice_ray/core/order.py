"""Counted randomness and counted order: everything random is a pure function of where it is used.

A sample drawn at position ``draw`` of a stream gets its augmentation from (seed, stream, draw, view, operation), and a
lane is read in an order that follows from (seed, stream, pass, lane). Nothing depends on batch size, worker count or
history, so 1, 2 and 4 workers, accumulated steps and a resumed run compute one function. The integers are splitmix64's
(Steele, Lea and Flood, OOPSLA 2014), in wrapping int64 arithmetic that is the same on CPU and GPU.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_UINT64 = (1 << 64) - 1

Pick = Callable[[int, int], NDArray[np.int64]]
"""From a key and a size n to n positions in range(n)."""


def _signed(value: int) -> int:
    value &= _UINT64
    return value - (1 << 64) if value >> 63 else value


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    # Torch shifts int64 arithmetically; the mask clears the copies of the sign bit.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """One splitmix64 output per int64 element of ``x``, same shape and device."""
    x = x + _signed(_GAMMA)
    x = (x ^ _logical_shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _logical_shift(x, 27)) * _signed(_MIX_2)
    return x ^ _logical_shift(x, 31)


def stream_key(*parts: int | str) -> int:
    """A 63-bit key for one stream of random numbers, from its name, such as ``(seed, "pretrain", 0)``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Draw initial weights from ``key`` alone: torch's CPU generator starts from it and is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        yield


def uniform(key: int, draws: Tensor, columns: int = 1) -> Tensor:
    """Uniform numbers in [0, 1) for each drawn sample.

    Args:
        key: A ``stream_key`` that names seed, stream, view and operation.
        draws: Positions in the stream, int64, (B,).
        columns: How many independent numbers each sample needs.

    Returns:
        float32, (B, columns), on the device of ``draws``; row i depends on ``key`` and ``draws[i]`` alone.
    """
    base = splitmix64(splitmix64(draws ^ _signed(key)))
    column = torch.arange(columns, device=draws.device, dtype=torch.int64)
    bits = splitmix64(base[:, None] + column[None, :] * _signed(_MIX_1))
    return _logical_shift(bits, 40).to(torch.float32) * (1.0 / (1 << 24))


def integers(key: int, draws: Tensor, high: int) -> Tensor:
    """One integer in [0, high) for each drawn sample, int64, (B,)."""
    bits = splitmix64(splitmix64(draws ^ _signed(key)))
    # 2^62 / high is so large that the bias of the remainder is below 1e-10 for any real data set.
    return _logical_shift(bits, 2) % high


def permutation(key: int, size: int) -> NDArray[np.int64]:
    """A permutation of ``range(size)`` that depends on ``key`` alone."""
    bits = splitmix64(splitmix64(torch.arange(size, dtype=torch.int64) ^ _signed(key)))
    return np.argsort(bits.numpy(), kind="stable").astype(np.int64)


def with_replacement(key: int, size: int) -> NDArray[np.int64]:
    """``size`` independent draws from ``range(size)`` that depend on ``key`` alone."""
    return integers(key, torch.arange(size), size).numpy()


def file_order(key: int, pass_index: int, num_files: int) -> NDArray[np.int64]:
    """The order in which one pass of a lane reads its files; ``key`` names seed, stream and lane."""
    return permutation(stream_key(key, "files", pass_index), num_files)


def window_order(key: int, pass_index: int, start: int, size: int, pick: Pick) -> NDArray[np.int64]:
    """Which rows of the window that begins at row ``start`` of a pass come at its turns, positions in the window."""
    return pick(stream_key(key, "rows", pass_index, start), size)


def lane_order(
    key: int, pass_index: int, rows_per_file: list[int], window: int, pick: Pick = permutation
) -> NDArray[np.int64]:
    """The order in which one pass reads the rows of a lane.

    Files come in a permuted order and rows are shuffled inside windows of ``window`` consecutive rows of that order, so
    a reader that streams needs to hold one window; a window as large as the lane is a full shuffle.

    Args:
        key: A ``stream_key`` that names seed, stream and lane.
        pass_index: How often the lane was read before.
        rows_per_file: Rows of each of the lane's files.
        window: Rows per shuffle window, > 0.
        pick: ``permutation`` reads every row once, ``with_replacement`` draws as many from each window.

    Returns:
        Positions in the concatenation of the lane's files, int64, (sum of rows_per_file,).
    """
    starts = np.concatenate([[0], np.cumsum(rows_per_file)])
    files = file_order(key, pass_index, len(rows_per_file))
    rows = np.concatenate([np.arange(starts[f], starts[f + 1]) for f in files] + [np.empty(0, np.int64)])
    windows = [
        rows[start : start + window][window_order(key, pass_index, start, min(window, len(rows) - start), pick)]
        for start in range(0, len(rows), window)
    ]
    return np.concatenate([*windows, np.empty(0, np.int64)]).astype(np.int64)
