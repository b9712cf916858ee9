"""Memory of trials of a sweep that train heads on one bank at the same time: is it shared?

    python benchmarks/trials_memory.py RUN --data DATA --out benchmarks/results/trials-memory.json

RUN is the folder of a run whose embedding is finished and which was not swept yet, DATA its images. Two sweeps over
the learning rate of the heads are run in it, one trial after the other and ``--trials`` of them at once, by a Ray
that takes the machine for a larger one. The processes of trials are looked at once a second while all of them train
their heads: what they hold in proportional shares (PSS), of which a page that n processes map counts 1 / n in each.
If a trial alone holds b + x, b being the bank, n trials that share it hold b + n x at most.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import ray
from machine import write_results
from process_memory import EverySecond, descendants, is_idle, is_worker, memory_of, title_of
from tables import print_table

from spice_ray.recipe import check_recipe
from spice_ray.run_folder import read_record
from spice_ray.runtime.bank import bank_bytes, open_bank
from spice_ray.runtime.progress import SilentReporter
from spice_ray.storage import Artifact, open_artifact
from spice_ray.sweep import Sweep
from spice_ray.workflow import prepare, sweep

EPOCHS = 4
"""So many that the first trial is not done before the last has begun."""
_PROCESSORS = 4
"""That Ray is told of for each trial."""


class Look(NamedTuple):
    """Megabytes of the processes of trials, of which the winner's run has none."""

    pss: float
    anonymous: float
    processes: int


class Onlooker(EverySecond):
    """Keeps what it saw while all trials were training their heads."""

    def __init__(self, trials: int) -> None:
        super().__init__()
        self._trials = trials
        self._looks: list[Look] = []

    @property
    def peak(self) -> Look:
        """The most that was held."""
        if not self._looks:
            raise SystemExit(f"{self._trials} trials never trained at the same time; give a run that was not swept yet")
        return max(self._looks)

    def look_now(self) -> None:
        """Add up what the processes hold, if all trials are at it."""
        workers = [pid for pid in descendants(os.getpid()) if is_worker(pid) and not is_idle(pid)]
        titles = [title_of(pid) for pid in workers]
        counts = [sum(name in title for title in titles) for name in (b"ImplicitFunc", b"HeadActor.train")]
        if counts == [self._trials, self._trials]:
            held = [found for pid in workers if (found := memory_of(pid))]
            self._looks.append(Look(sum(one.pss for one in held), sum(one.anonymous for one in held), len(held)))


def swept(run: Path, data: str, concurrent: int) -> Look:
    recipe = check_recipe(json.loads(json.dumps(read_record(run)["recipe"])))
    trials = Sweep(
        recipe="the run's",
        space={"heads.lr": [0.001 * (concurrent + 1 + number) for number in range(concurrent)]},
        trial={"heads.count": 1, "heads.more": 0, "heads.epochs": EPOCHS},
        concurrent=concurrent,
    )
    prepared = prepare(recipe, data, run, trials=trials)
    ray.init(address="local", num_cpus=_PROCESSORS * max(concurrent, 2), logging_level="error", include_dashboard=False)
    try:
        with Onlooker(concurrent) as onlooker:
            sweep(prepared, trials, f"memory-{concurrent}", SilentReporter())
    finally:
        ray.shutdown()
    return onlooker.peak


def bank_of(run: Path) -> Artifact:
    (folder,) = (run / "artifacts").glob("embedding-*")
    found = open_artifact(folder.parent, *folder.name.split("-"))
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    bank = bank_bytes(open_bank(bank_of(options.run))) / 1e6
    found = {count: swept(options.run, options.data, count) for count in (1, options.trials)}
    without = found[1].pss - bank
    bound = bank + options.trials * without
    rows = [
        [str(count), str(look.processes), f"{look.pss:,.0f}", f"{look.anonymous:,.0f}"] for count, look in found.items()
    ]
    print_table("megabytes of trials", ["at once", "processes", "PSS", "allocated"], rows)
    print(f"the bank takes {bank:,.0f}; asked: at most {bound:,.0f}, the bank and {options.trials} x {without:,.0f}")
    results: dict[str, Any] = {"bank_megabytes": bank, "bound_megabytes": bound}
    write_results({**results, "trials": {str(n): look._asdict() for n, look in found.items()}}, options.out)


if __name__ == "__main__":
    main()
