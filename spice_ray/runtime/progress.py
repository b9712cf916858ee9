"""How the processes of a stage tell the driver how far they are: small files in a folder that all of them see."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from spice_ray import mirror
from spice_ray.errors import UnreachableError
from spice_ray.storage import write_json

Result = TypeVar("Result")
_SECONDS_BETWEEN_WRITES = 0.5
_SECONDS_BETWEEN_LOOKS = 0.25
_SLOWER = 20
"""So many times as long where a server is asked, which takes money for it."""


class Done(NamedTuple):
    """How far a stage is."""

    done: int
    total: int | None
    loss: float | None


class Reporter(Protocol):
    """Whoever shows progress to the user."""

    def stage(self, title: str, unit: str) -> AbstractContextManager[Callable[[Done], None]]:
        """Show a stage that counts in ``unit`` for as long as the context lasts."""
        ...

    def note(self, sentence: str) -> None:
        """Tell the user something that stays on the screen."""
        ...


class SilentReporter:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        """Run a stage unseen."""
        yield lambda done: None

    def note(self, sentence: str) -> None:
        """Keep a note to oneself."""


class ProgressWriter:
    """Writes how far one process is, at most twice a second, and every ten seconds on a server."""

    def __init__(self, folder: Path, writer: str) -> None:
        self._file = folder / f"{writer}.json"
        self._seconds = _SECONDS_BETWEEN_WRITES * (_SLOWER if mirror.is_mirrored(folder) else 1)
        self._next = 0.0

    def write(self, done: int, total: int, loss: float | None = None) -> None:
        """Say that ``done`` of ``total`` is done."""
        now = time.monotonic()
        if now < self._next and done < total:
            return
        self._next = now + self._seconds
        with suppress(UnreachableError):  # the next one may be seen
            write_json(self._file, {"done": done, "total": total, "loss": loss})


def read_progress(folder: Path) -> Done | None:
    """The sum over the processes that wrote into ``folder``, or None where none has yet."""
    states = []
    with suppress(UnreachableError):
        for name in mirror.names(folder):
            if not name.endswith(".json") or name.startswith("."):
                continue
            try:
                states.append(json.loads(mirror.read_bytes(folder / name)))
            except (OSError, ValueError):
                continue  # replaced while it was read: the next look finds it
    if not states:
        return None
    return Done(sum(s["done"] for s in states), sum(s["total"] for s in states), states[0]["loss"])


def watched(work: Callable[[], Result], folder: Path, show: Callable[[Done], None]) -> Result:
    """Do ``work`` in a thread while this one shows the progress that other processes write into ``folder``.

    Ray's own waiting would keep Ctrl-C from the main thread; so the waiting is done elsewhere.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed over to the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    seconds = _SECONDS_BETWEEN_LOOKS * (_SLOWER if mirror.is_mirrored(folder) else 1)
    while thread.is_alive():
        thread.join(seconds)
        state = read_progress(folder)
        if state is not None:
            show(state)
    if errors:
        raise errors[0]
    return results[0]
