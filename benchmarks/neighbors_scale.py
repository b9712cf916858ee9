"""Exact nearest neighbours of many rows as a run finds them: actors, parts on disk, memory while it lasts.

    .venv/bin/python benchmarks/neighbors_scale.py --out benchmarks/results/neighbors-scale.json

Rows are unit vectors in ten broad clusters, stored as an embedding is and mapped by the actors. Memory is what each
process has allocated: its peak while the first tenth of the rows was looked for, and its peak in all, which are alike
if nothing grows. The lists of some rows, taken evenly from all, are compared with a product in float64.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads_banks import in_new_process
from ingest import small_store
from machine import surroundings, write_results
from neighbors import differ, make_rows
from process_memory import Watch
from tables import print_table

from spice_ray.config import Scale
from spice_ray.runtime.cluster import connected
from spice_ray.runtime.neighbors import NeighborJob, publish_neighbors, rows_of_part

_STORE_BYTES = 200 << 20
_SCALE = Scale()


class Progress:
    """Hears how far the search is, and looks at the memory when a tenth is done."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._start = time.perf_counter()
        self.early = 0.0

    def tell(self, done: int, total: int) -> None:
        """``done`` rows of ``total`` have their neighbours."""
        if not self.early and done >= total / 10:
            self._watch.look_now()
            self.early = self._watch.largest_actor.anonymous
        print(f"  {done:,} of {total:,} rows, {time.perf_counter() - self._start:,.0f} s", flush=True)


def write_rows(file: Path, num_rows: int, width: int) -> None:
    np.save(file, make_rows(num_rows, width).numpy())


def find(file: Path, num_rows: int, width: int, k: int) -> dict[str, Any]:
    """All neighbours, in a Ray of their own."""
    root = file.parent
    job = NeighborJob(file, width, np.arange(num_rows), k, rows_of_part(num_rows, width), root / "parts")
    with small_store(_STORE_BYTES), connected(_SCALE, verbose=False), Watch() as watch:
        progress = Progress(watch)
        start = time.perf_counter()
        found = publish_neighbors(root, f"neighbors-{num_rows}", job, _SCALE, progress.tell)
        seconds = time.perf_counter() - start
        watch.look_now()
    return {
        "rows": num_rows,
        "seconds": seconds,
        "picoseconds_per_pair": seconds / num_rows**2 * 1e12,
        "actor_megabytes": {"first_tenth": progress.early, "peak": watch.largest_actor.anonymous},
        "actors": len(watch.actors),
        "driver_megabytes": watch.driver.anonymous,
        "lists": str(found.file("neighbors.npy")),
    }


def count_unlike(file: Path, lists: Path, checked: int) -> int:
    """How many of some lists differ from those of a product in float64 otherwise than by a near tie."""
    rows, found = torch.from_numpy(np.load(file)), np.load(lists, mmap_mode="r")
    wrong = 0
    for query in np.linspace(0, len(rows) - 1, checked, dtype=np.int64).tolist():
        # Twice as many as are needed: what float32 gets wrong is far less than lies between those and the last needed.
        near = (rows @ rows[query]).topk(2 * found.shape[1] + 1).indices
        near = near[near != query]
        exact = (rows[near].double() @ rows[query].double()).topk(found.shape[1]).indices
        wrong += differ(rows, query, found[query].tolist(), near[exact].tolist())
    return wrong


def measure(num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "embedding.npy"
        in_new_process(write_rows, file, num_rows, options.width)
        point = in_new_process(find, file, num_rows, options.width, options.neighbors)
        wrong = in_new_process(count_unlike, file, Path(point.pop("lists")), options.checked)
    return point | {"unlike_float64": wrong, "checked": options.checked}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--neighbors", type=int, default=100)
    parser.add_argument("--checked", type=int, default=500, help="rows whose lists are compared with float64")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    print(surroundings())
    points = [measure(num_rows, options) for num_rows in options.rows]
    print_table(
        f"k = {options.neighbors}, width {options.width}",
        [
            "rows",
            "actors",
            "seconds",
            "ps per pair",
            "actor MB after a tenth",
            "actor MB",
            "driver MB",
            "unlike float64",
        ],
        [
            [
                f"{point['rows']:,}",
                f"{point['actors']}",
                f"{point['seconds']:,.0f}",
                f"{point['picoseconds_per_pair']:.0f}",
                *(f"{held:,.0f}" for held in point["actor_megabytes"].values()),
                f"{point['driver_megabytes']:,.0f}",
                f"{point['unlike_float64']} of {point['checked']}",
            ]
            for point in points
        ],
    )
    settings = {"width": options.width, "neighbors": options.neighbors}
    write_results({**settings, "object_store_bytes": _STORE_BYTES, "points": points}, options.out)


if __name__ == "__main__":
    main()
