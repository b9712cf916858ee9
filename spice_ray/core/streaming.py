"""The counted order of lanes, fed from files as they are read: memory holds a shuffle window per lane, never the data.

Each lane needs its files in the order of its passes; the needs of all lanes are merged by the turn at which a file's
first window begins, so one reader serves them all and reads no file before it is wanted.
"""

import heapq
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from spice_ray.contracts import Batch, ShardFile
from spice_ray.core.lanes import Rows, ServedLanes, Stream
from spice_ray.core.order import file_order, window_order

_BATCHES_AHEAD = 3

Item = TypeVar("Item")

Read = Callable[[Iterator[ShardFile]], Iterator[Rows]]
"""Reads the rows that count of each file, in the order given."""


class _Need(NamedTuple):
    turn: int
    """Of the lane: where the window begins that holds the file's first row."""
    lane: int
    file: ShardFile
    skip: int
    """Rows at the file's beginning that belong to a window before the first."""


class StreamedLanes:
    """Batches put together while files are read, in a thread of their own; steps are asked for in turn.

    Another step than the next one may be asked for and costs the reading of one shuffle window per lane.
    """

    def __init__(self, lanes: ServedLanes, stream: Stream, read: Read, device: torch.device) -> None:
        """Nothing is read before the first batch is asked for."""
        self.num_lanes = len(lanes.lane_ids)
        self._lanes = lanes
        self._stream = stream
        self._read = read
        self._device = device
        self._rows_per_file = [[_num_rows(file, stream) for file in files] for files in lanes.files]
        self._ahead: Ahead[Batch] | None = None
        self._next = -1

    def batch(self, step: int) -> Batch:
        """This worker's rows of global batch ``step``, (b * L) of them.

        Raises:
            Exception: What the reader raised.
        """
        if self._ahead is None or step != self._next:
            self.close()
            self._ahead = Ahead(self._batches(step), _BATCHES_AHEAD)
        batch = self._ahead.get()
        self._next = step + 1
        return Batch(*(values.to(self._device, non_blocking=True) for values in batch))

    def close(self) -> None:
        """Stop reading."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _batches(self, step: int) -> Generator[Batch]:
        stream, lanes = self._stream, self._lanes
        first_turn = step * stream.rows_per_lane
        starts = [_window_start(first_turn, sum(rows), stream.window) for rows in self._rows_per_file]
        needs = heapq.merge(*(self._needs(lane, start) for lane, start in enumerate(starts)))
        arriving = _arriving(needs, self._read, stream)
        windows = [_Windows(stream, lanes.lane_ids[lane], sum(rows)) for lane, rows in enumerate(self._rows_per_file)]

        def fetch() -> None:
            lane, rows = next(arriving)
            windows[lane].raw.append(rows)

        while True:
            turns = np.arange(first_turn, first_turn + stream.rows_per_lane)
            batch = _interleaved([window.take(turns, fetch) for window in windows], lanes.draws(turns))
            # What is copied to a GPU while it computes lies in pinned memory.
            yield Batch(*(values.pin_memory() for values in batch)) if self._device.type == "cuda" else batch
            first_turn += stream.rows_per_lane

    def _needs(self, lane: int, start: int) -> Iterator[_Need]:
        """The files of one lane in the order in which it needs them, from turn ``start`` on, for ever."""
        rows_per_file, files = self._rows_per_file[lane], self._lanes.files[lane]
        key, window, size = self._stream.lane_key(self._lanes.lane_ids[lane]), self._stream.window, sum(rows_per_file)
        pass_index, start = divmod(start, size)
        while True:
            row = 0
            for index in file_order(key, pass_index, len(files)):
                first, row = row, row + rows_per_file[index]
                if row > max(first, start):
                    begins = max(first - first % window, start)
                    yield _Need(pass_index * size + begins, lane, files[index], max(0, start - first))
            pass_index, start = pass_index + 1, 0


class _Windows:
    """One lane's rows, window by window."""

    def __init__(self, stream: Stream, lane_id: int, size: int) -> None:
        self.raw: deque[Rows] = deque()
        """Rows that were read and belong to windows to come, in file order."""
        self._stream = stream
        self._key = stream.lane_key(lane_id)
        self._size = size
        self._window: Rows | None = None
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._begins = -1

    def take(self, turns: NDArray[np.int64], fetch: Callable[[], None]) -> Rows:
        """The rows of consecutive ``turns``; ``fetch`` reads another file of some lane."""
        images, ids, turn = [], [], int(turns[0])
        while turn <= turns[-1]:
            begins = _window_start(turn, self._size, self._stream.window)
            if begins != self._begins:
                self._open(begins, fetch)
            assert self._window is not None
            picks = torch.from_numpy(self._order[turn - begins : int(turns[-1]) + 1 - begins])
            images.append(self._window.images[picks])
            ids.append(self._window.sample_ids[picks])
            turn += len(picks)
        return Rows(torch.cat(images), torch.cat(ids))

    def _open(self, begins: int, fetch: Callable[[], None]) -> None:
        """Make the window that begins at turn ``begins`` the current one."""
        pass_index, start = divmod(begins, self._size)
        rows = min(self._stream.window, self._size - start)
        self._window = None  # two windows at once would take twice the memory
        while sum(len(part.sample_ids) for part in self.raw) < rows:
            fetch()
        self._window = _take_first(self.raw, rows)
        self._order = window_order(self._key, pass_index, start, rows, self._stream.pick)
        self._begins = begins


def _num_rows(file: ShardFile, stream: Stream) -> int:
    """Rows of a file that come in the stream."""
    if stream.chosen is None:
        return file.num_counted
    return int(stream.chosen[file.first_id : file.first_id + file.rows].sum()) if file.num_counted else 0


def _window_start(turn: int, size: int, window: int) -> int:
    """The turn at which the window of ``turn`` begins."""
    within = turn % size
    return turn - within % window


def _arriving(needs: Iterable[_Need], read: Read, stream: Stream) -> Iterator[tuple[int, Rows]]:
    """(lane, rows) of each need, read in the order of the needs."""
    expected: deque[_Need] = deque()

    def files() -> Iterator[ShardFile]:
        for need in needs:
            expected.append(need)
            yield need.file

    for rows in read(files()):
        need = expected.popleft()
        if stream.chosen is not None:
            taken = stream.chosen[rows.sample_ids]
            rows = Rows(rows.images[taken], rows.sample_ids[taken])
        assert len(rows.sample_ids) == _num_rows(need.file, stream), need.file.name
        yield need.lane, Rows(rows.images[need.skip :], rows.sample_ids[need.skip :])


def _take_first(raw: deque[Rows], count: int) -> Rows:
    """Take ``count`` rows off the front."""
    parts: list[Rows] = []
    while count:
        rows = raw.popleft()
        if len(rows.sample_ids) > count:
            raw.appendleft(Rows(rows.images[count:], rows.sample_ids[count:]))
            rows = Rows(rows.images[:count], rows.sample_ids[:count])
        parts.append(rows)
        count -= len(rows.sample_ids)
    return Rows(torch.cat([part.images for part in parts]), torch.cat([part.sample_ids for part in parts]))


def _interleaved(lanes: list[Rows], draws: torch.Tensor) -> Batch:
    """Row i * L + l is the i-th of lane l."""
    images = torch.stack([rows.images for rows in lanes], dim=1).flatten(0, 1)
    ids = torch.stack([rows.sample_ids for rows in lanes], dim=1).flatten()
    return Batch(images, ids, draws.flatten())


class Ahead(Generic[Item]):
    """Runs a generator in a thread, a few items ahead of whoever asks for them."""

    def __init__(self, items: Generator[Item], depth: int) -> None:
        """Begin at once, and stay at most ``depth`` items ahead."""
        self._queue: queue.Queue[Item | Exception] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def get(self) -> Item:
        """The next item.

        Raises:
            Exception: What the generator raised; it must not end otherwise.
        """
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and close the generator."""
        self._stopped.set()
        with suppress(queue.Empty):
            self._queue.get_nowait()  # wakes a thread that waits for room
        self._thread.join()

    def _run(self, items: Generator[Item]) -> None:
        try:
            for item in items:
                self._put(item)
                if self._stopped.is_set():
                    break
        except Exception as error:  # raised where the item is asked for
            self._put(error)
        items.close()

    def _put(self, item: "Item | Exception") -> None:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.5)
                return
