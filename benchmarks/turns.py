"""No benchmark: training loops that take turns, each in a process of its own.

So every loop has its own threads and its own memory, as it has where it runs alone, and only one of them works at a
time: while the others wait, the processes that load data for them are stopped. A loader that worked on meanwhile would
slow down the loop whose turn it is, and would have batches ready that its own loop did not pay for.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

_MODULES = ["torch", "torchvision.transforms.v2", "torchvision.models", "spice_ray.stages.pretrain"]
_SECONDS_TO_END = 10


class Turn:
    """What a loop tells of its steps; its calls come back when it is the loop's turn."""

    def __init__(self, connection: Connection, steps: int, device: torch.device) -> None:
        self._connection = connection
        self._steps = steps
        self._device = device
        self._start = 0.0

    def begin(self) -> None:
        """Called before the first step, when everything is in place."""
        self._give_away(0.0)

    def after(self, step: int) -> None:
        """Called after each step, counted from 1."""
        if step % self._steps == 0:
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            self._give_away((time.perf_counter() - self._start) / self._steps)

    def _give_away(self, seconds: float) -> None:
        _send_to_children(signal.SIGSTOP)
        try:
            self._connection.send(seconds)
            goes_on = self._connection.recv()
        except (EOFError, BrokenPipeError):
            goes_on = False  # whoever measures has ended
        finally:
            _send_to_children(signal.SIGCONT)
        if not goes_on:
            raise SystemExit
        self._start = time.perf_counter()


Side = Callable[[Turn], None]
"""A training loop without end."""


def _send_to_children(number: signal.Signals) -> None:
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, number)


class _Seat(NamedTuple):
    name: str
    process: multiprocessing.process.BaseProcess
    connection: Connection

    def answer(self) -> float:
        try:
            seconds: float = self.connection.recv()
        except EOFError:
            raise SystemExit(f"{self.name} has ended; what happened stands above") from None
        return seconds

    def turn(self) -> float:
        self.connection.send(True)
        return self.answer()

    def leave(self) -> None:
        self.connection.close()
        self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()


def _sit(side: Side, connection: Connection, steps: int, device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    side(Turn(connection, steps, device))


def take_turns(
    sides: dict[str, Side], *, steps: int, rounds: int, device: torch.device, threads: int
) -> dict[str, list[float]]:
    """Seconds per step of each side in each round, after one round that does not count."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    seats = list[_Seat]()
    try:
        for name, side in sides.items():
            here, there = context.Pipe()
            process = context.Process(target=_sit, args=(side, there, steps, device, threads))
            process.start()
            there.close()
            seats.append(_Seat(name, process, here))
            seats[-1].answer()
        times = [[seat.turn() for seat in seats] for _ in range(rounds + 1)]
    finally:
        for seat in seats:
            seat.leave()
    return {seat.name: list(column) for seat, column in zip(seats, zip(*times[1:], strict=True), strict=True)}
