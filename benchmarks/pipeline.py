"""All stages from generated images to assignments: what the processes hold in each, as the images become more.

    .venv/bin/python benchmarks/pipeline.py --out benchmarks/results/pipeline.json

Images of 32 pixels with patterns of ten classes in noise are clustered by the recipe ``cifar10_small``, one epoch of
stages 1 and 2, once for each of ``--images``, each in a driver of its own: no image is kept in memory
(``scale.resident_memory=0``), the bank is mapped (``scale.bank_memory=0``), and Ray's object store has 200 MB. Once a
second the memory that each process has allocated is looked at; tables show peaks of the driver, of the largest worker
and of the sum of all workers.
"""

import argparse
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from generated import SIDE, Generated
from heads_banks import in_new_process
from ingest import STORE_BYTES, StoreWatch, small_store
from machine import surroundings, write_results
from process_memory import Held, is_worker
from tables import print_table

from spice_ray.config import Scale
from spice_ray.evaluate import evaluate
from spice_ray.recipe import load_recipe
from spice_ray.runtime.cluster import connected
from spice_ray.runtime.ingest import ingest
from spice_ray.runtime.progress import Done, SilentReporter
from spice_ray.storage import read_json
from spice_ray.workflow import prepare, run

CLASSES = 10
SETTINGS = (
    "pretrain.epochs=1",
    "pretrain.warmup_epochs=0",
    "heads.epochs=1",
    "joint.steps=200",
    "scale.workers=2",
    "scale.resident_memory=0",
    "scale.bank_memory=0",
)
BEFORE = "between stages"


class StageWatch(StoreWatch, SilentReporter):
    """Shows no progress, and keeps the peaks of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, dict[str, float]] = {}
        self._stage = BEFORE
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        with self._lock:
            self._stage = title
        yield lambda done: None
        with self._lock:
            self._stage = BEFORE

    def look(self, now: dict[int, Held]) -> None:
        super().look(now)
        workers = [held.anonymous for pid, held in now.items() if is_worker(pid)]
        driver = now[os.getpid()].anonymous
        found = {"driver": driver, "largest_worker": max(workers, default=0.0), "workers": sum(workers)}
        with self._lock:
            peaks = self.stages.setdefault(self._stage, dict.fromkeys(found, 0.0))
        for name, megabytes in found.items():
            peaks[name] = max(peaks[name], megabytes)


def cluster(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        out, shards = Path(name) / "run", Path(name) / "shards"
        with small_store(), connected(Scale(), verbose=False), StageWatch() as watch:
            with watch.stage("ingest", "images"):
                ingest(Generated(count, CLASSES), shards, image_size=SIDE, seed=0, reporter=SilentReporter())
            run(prepare(load_recipe("cifar10_small", SETTINGS), str(shards), out), watch)
        scores = evaluate(out)
        return {
            "images": count,
            "bytes_of_images": count * 3 * SIDE**2,
            "peak_megabytes": watch.stages,
            "object_store_megabytes": watch.store,
            "seconds": read_json(out / "timing.json"),
            "acc": scores["acc"],
            "reliable": scores["reliable"],
        }


def show(found: list[dict[str, Any]]) -> None:
    stages = [stage for stage in found[0]["peak_megabytes"] if all(stage in one["peak_megabytes"] for one in found)]
    for who in ("driver", "largest_worker", "workers"):
        rows = []
        for stage in stages:
            peaks = [one["peak_megabytes"][stage][who] for one in found]
            rows.append([stage, *(f"{peak:,.0f}" for peak in peaks), f"{peaks[-1] / peaks[0]:.2f}" if peaks[0] else ""])
        print_table(f"{who}: peak, MB", ["stage", *(f"{one['images']:,}" for one in found), "ratio"], rows)
    for one in found:
        print(
            f"{one['images']:,} images: {sum(one['seconds'].values()):.0f} s, object store "
            f"{one['object_store_megabytes']:.0f} of {STORE_BYTES / 1e6:.0f} MB, ACC {one['acc']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    print(surroundings())
    found = []
    for count in options.images:
        found.append(in_new_process(cluster, count))
        show(found)
    write_results({"settings": SETTINGS, "runs": found}, options.out)


if __name__ == "__main__":
    main()
