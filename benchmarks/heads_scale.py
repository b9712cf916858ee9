"""No benchmark of its own: ``heads.py scale``, time and memory while the data grows, out of mapped files."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from heads_banks import Mixture, in_new_process, megabytes_of, train
from heads_speed import CORES, SCALE
from ingest import small_store
from process_memory import Held
from tables import print_table

from spice_ray.core.metrics import clustering_accuracy
from spice_ray.runtime.cluster import connected
from spice_ray.storage import Artifact

STORE_BYTES = 500 << 20


def measure_scale(mixtures: list[Mixture], settings: list[str]) -> dict[str, Any]:
    points = []
    for mixture in mixtures:
        with tempfile.TemporaryDirectory() as name:
            embedding = in_new_process(mixture.write, Path(name))
            points.append(in_new_process(_train_one, mixture, settings, embedding, Path(name)))
            shutil.rmtree(embedding.path)
    _print(points)
    growth = [point["microseconds_per_row"] / points[0]["microseconds_per_row"] for point in points]
    print("time per row: " + ", ".join(f"{ratio:.2f}x" for ratio in growth[1:]) + " (asked: 1.3)")
    return {
        "width": mixtures[0].width,
        "heads": mixtures[0].recipe(*settings).heads.model_dump(mode="json"),
        "actors": CORES,
        "object_store_bytes": STORE_BYTES,
        "points": points,
    }


def _train_one(mixture: Mixture, settings: list[str], embedding: Artifact, root: Path) -> dict[str, Any]:
    with small_store(STORE_BYTES), connected(SCALE, verbose=False):
        trained = train(mixture.recipe(*settings), SCALE, embedding, root)
    classes = np.load(embedding.file("labels.npy"))
    return {
        "rows": mixture.num_rows,
        "bank_megabytes": megabytes_of(embedding),
        "seconds": trained.seconds,
        "processor_seconds_of_busiest_actor": trained.watch.busiest_actor,
        "start_seconds": trained.start_seconds,
        "microseconds_per_row": trained.seconds / mixture.num_rows * 1e6,
        "acc": clustering_accuracy(classes, trained.assignments),
        "peak_megabytes": {
            "driver": trained.watch.driver._asdict(),
            "largest_actor": trained.watch.largest_actor._asdict(),
        },
    }


def _print(points: list[dict[str, Any]]) -> None:
    rows = []
    for point in points:
        peaks = {who: Held(**held) for who, held in point["peak_megabytes"].items()}
        rows.append(
            [
                f"{point['rows']:,}",
                f"{point['bank_megabytes']:,.0f}",
                f"{point['seconds']:.1f}",
                f"{point['microseconds_per_row']:.1f}",
                f"{point['acc']:.4f}",
                *(f"{held.private:,.0f} / {held.anonymous:,.0f}" for held in peaks.values()),
            ]
        )
    header = ["rows", "bank MB", "seconds", "us per row", "ACC", "driver MB", "largest actor MB"]
    print_table("scale: peaks are private / of that allocated", header, rows)
