"""No benchmark of its own: what a run takes of memory and of the processor, by process."""

import os
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple, Self

_SECONDS_BETWEEN_LOOKS = 1.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Held(NamedTuple):
    """Megabytes of a process."""

    pss: float = 0.0
    """Its proportional share: a page that n processes have mapped counts 1 / n in each."""
    private: float = 0.0
    """Pages that it alone has mapped: also those of a file, which the kernel can take back at any time."""
    anonymous: float = 0.0
    """Pages without a file behind them: what it has allocated."""

    def peak_with(self, other: "Held") -> "Held":
        return Held(*(max(pair) for pair in zip(self, other, strict=True)))


class EverySecond(ABC):
    """Looks once a second for as long as the context lasts."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @abstractmethod
    def look_now(self) -> None:
        """Look at what is there."""

    def _run(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_LOOKS):
            self.look_now()


class Watch(EverySecond):
    """Peaks of this process and of each worker of its Ray that is not idle, and of the sum over all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Held()
        self.actors: dict[int, Held] = {}
        self.total_pss = 0.0
        self._processor: dict[int, float] = {}
        self._before: dict[int, float] = {}

    @property
    def largest_actor(self) -> Held:
        """The peak of each kind over all actors."""
        largest = Held()
        for held in self.actors.values():
            largest = largest.peak_with(held)
        return largest

    @property
    def busiest_actor(self) -> float:
        """Seconds of processor time that the busiest actor took since :meth:`begin`, or since it was there."""
        return max(seconds - self._before.get(pid, 0.0) for pid, seconds in self._processor.items())

    def begin(self) -> None:
        """The actors have started: what they took of the processor until now was for that."""
        self._before = {
            pid: processor_seconds(pid) for pid in descendants(os.getpid()) if is_worker(pid) and not is_idle(pid)
        }

    def look(self, now: dict[int, Held]) -> None:
        """Take in what each process holds."""
        self.driver = self.driver.peak_with(now[os.getpid()])
        self.total_pss = max(self.total_pss, sum(held.pss for held in now.values()))
        for pid, held in now.items():
            if is_worker(pid) and not is_idle(pid):
                self.actors[pid] = self.actors.get(pid, Held()).peak_with(held)
                self._processor[pid] = max(self._processor.get(pid, 0.0), processor_seconds(pid))

    def look_now(self) -> None:
        """Take in what each process holds by now."""
        self.look({pid: held for pid in [os.getpid(), *descendants(os.getpid())] if (held := memory_of(pid))})


def memory_of(pid: int) -> Held | None:
    """What the kernel says of a process; None where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    values = {words[0].rstrip(":"): int(words[1]) * 1024 / 1e6 for words in map(str.split, lines[1:])}
    return Held(values["Pss"], values["Private_Clean"] + values["Private_Dirty"], values["Anonymous"])


def processor_seconds(pid: int) -> float:
    """What a process took of the processor so far; 0 where it has ended."""
    return sum(map(int, _status(pid)[11:13])) / _TICKS


def descendants(ancestor: int) -> list[int]:
    """What it started, and what that started; not the processes of others, whose Ray may be on this machine too."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            parent = int(_status(int(entry.name))[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, new = list[int](), [ancestor]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def _status(pid: int) -> list[str]:
    """State, parent, ..., user and system time, ...: all that the kernel tells after a process's name."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["0"] * 13  # it has ended


def is_worker(pid: int) -> bool:
    """Whether it is one of Ray's workers."""
    return title_of(pid).startswith(b"ray::")


def is_idle(pid: int) -> bool:
    """Whether it is a worker without a task or an actor."""
    return title_of(pid).startswith(b"ray::IDLE")


def title_of(pid: int) -> bytes:
    """Its name as Ray sets it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it has ended
