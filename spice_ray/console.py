"""What the user sees: a bar or a line for every stage, and one table at the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from spice_ray.mirror import shown
from spice_ray.runtime.progress import Done

if TYPE_CHECKING:
    from spice_ray.runtime.sweep_table import Reuse

_SECONDS_BETWEEN_LINES = 10


class ConsoleReporter:
    """Shows stages as bars on a terminal, and as a line every ten seconds elsewhere.

    Args:
        console: Where to; standard error unless given.
        clock: Seconds that only rise.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock

    def note(self, sentence: str) -> None:
        """Print a sentence that stays."""
        self._console.print(shown(sentence), markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        """Show one stage."""
        start = self._clock()
        show = self._bar if self._console.is_terminal else self._lines
        with show(title, unit) as update:
            yield update
        self.note(f"{title}: done in {self._clock() - start:.1f} s")

    @contextmanager
    def _bar(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(title, total=None, state="starting")
            meter = _Meter(self._clock)
            yield lambda done: _update(progress, task, done, meter, unit)

    @contextmanager
    def _lines(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        self.note(f"{title}: starting")
        meter, last = _Meter(self._clock), self._clock()

        def show(done: Done) -> None:
            nonlocal last
            rate = meter.rate(done.done)
            if self._clock() - last < _SECONDS_BETWEEN_LINES:
                return
            last = self._clock()
            left = f", {(done.total - done.done) / rate:.0f} s left" if rate and done.total else ""
            self.note(f"{title}: {_count(done, unit)}{_rate(rate, unit)}{left}{_loss(done)}")

        yield show


class _Meter:
    """The rate since the first look: a stage that goes on does not count what an earlier attempt did."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: tuple[float, int] | None = None

    def rate(self, done: int) -> float:
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
        seconds, since = now - self._first[0], done - self._first[1]
        return since / seconds if seconds > 0 else 0.0


def _update(progress: Progress, task: TaskID, done: Done, meter: _Meter, unit: str) -> None:
    state = f"{_count(done, unit)}{_rate(meter.rate(done.done), unit)}{_loss(done)}"
    progress.update(task, completed=done.done, total=done.total, state=state)


def _count(done: Done, unit: str) -> str:
    of = f"/{done.total}" if done.total else ""
    return f"{done.done}{of} {unit}"


def _rate(rate: float, unit: str) -> str:
    return f", {rate:.1f} {unit}/s" if rate else ""  # not known at the first look


def _loss(done: Done) -> str:
    return "" if done.loss is None else f", loss {done.loss:.4f}"


def scores_table(result: dict[str, Any]) -> Table:
    """The methods with their scores."""
    table = Table(title=f"{result['n']} images, {result['k']} clusters")
    for name in ("method", "ACC", "NMI", "ARI"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in result["rows"]:
        cells = ("-" if row[name] is None else f"{row[name]:.3f}" for name in ("acc", "nmi", "ari"))
        table.add_row(row["method"], *cells)
    return table


def probe_table(rows: list[dict[str, Any]]) -> Table:
    """The classifiers that were shown labels, with their accuracy, which is not to be compared with ACC."""
    table = Table(title=f"classifiers that learn from labels (k-NN: k = {rows[0]['k']})")
    for name in ("method", "accuracy", "protocol", "learns from", "scored on"):
        table.add_column(name, justify="left" if name in ("method", "protocol") else "right")
    for row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        protocol = row["protocol"].replace("_", " ")
        table.add_row(row["method"], accuracy, protocol, str(row["n_train"]), str(row["n_test"]))
    return table


def seconds_table(seconds: dict[str, float]) -> Table:
    """The stages with the time they took."""
    table = Table()
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, value in seconds.items():
        table.add_row(stage, f"{value:.1f}")
    return table


def trials_table(rows: list[dict[str, Any]], keys: list[str], objective: str) -> Table:
    """The trials of a sweep, best first."""
    title = objective.replace("_", " ")
    table = Table(title=f"trials by {title}, best first")
    for name in ("rank", *keys, "objective", "reliable", "seconds", "note"):
        table.add_column(name, justify="left" if name == "note" else "right")
    for rank, row in enumerate(rows, 1):
        value = "-" if row["objective"] is None else f"{row['objective']:.5f}"
        values = (str(row["values"][key]) for key in keys)
        # A note may hold what rich would take for markup.
        note = Text(row["note"] or "")
        table.add_row(str(rank), *values, value, str(row["reliable"]), f"{row['seconds']:.1f}", note)
    return table


def reuse_table(reuse: "list[Reuse]") -> Table:
    """What the trials of a sweep computed, and what they found finished."""
    table = Table(title="what trials needed")
    for name in ("", "computed", "seconds", "reused", "seconds saved"):
        table.add_column(name, justify="right" if name else "left")
    for row in reuse:
        table.add_row(row.stage, str(row.computed), f"{row.seconds:.1f}", str(row.reused), f"{row.saved:.1f}")
    return table
