"""Looks at trials that may be stopped early: kept, so that a sweep that goes on hears them without any training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from spice_ray import mirror
from spice_ray.errors import StorageError
from spice_ray.storage import read_json, write_json


class Look(NamedTuple):
    """What the scheduler hears of a trial that is not over."""

    number: int
    """Counted from 1."""
    objective: float
    file: Path
    """Where the looks at this trial are kept."""
    is_over: bool = False
    """Whether the trial was finished or stopped by an earlier command, and only tells what it told then."""


@dataclass
class Looks:
    """The objective at each look at a trial so far."""

    file: Path
    values: dict[int, float]
    """By the number of the look."""
    stopped: bool
    """Whether the scheduler has ended the trial."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Those that are kept in a file, which need not be there.

        Raises:
            StorageError: It holds something else.
        """
        if not mirror.exists(file):
            return cls(file, {}, False)
        remedy = "delete it and run again"
        held = read_json(file, remedy)
        try:
            values = {int(number): float(value) for number, value in held["values"].items()}
            if not all(map(math.isfinite, values.values())):
                raise ValueError
            return cls(file, dict(sorted(values.items())), bool(held["stopped"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise StorageError(f"{file} does not hold the looks at a trial; {remedy}") from None

    def keep(self, number: int, value: float) -> None:
        """Note the objective at a look."""
        self.values[number] = value
        self._write()

    def stop(self) -> None:
        """Note that the trial was ended."""
        self.stopped = True
        self._write()

    def _write(self) -> None:
        write_json(self.file, {"values": self.values, "stopped": self.stopped})


class Stopping(ASHAScheduler):
    """ASHA, which notes whom it stops, and lets trials that are over tell what they told before."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether a trial goes on."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if result.get("is_over"):
            return str(TrialScheduler.CONTINUE)
        if decision == TrialScheduler.STOP and "looks_file" in result:
            Looks.read(Path(result["looks_file"])).stop()
        return str(decision)
