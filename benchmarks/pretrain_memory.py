"""No benchmark of its own: ``pretrain.py memory``, what a worker of stage 1 holds while the data grows."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import linear_regression
from typing import Any

from augment import MEAN, STD
from generated import SIDE, Generated
from pretrain_progress import PassedOn
from torch import Tensor

from spice_ray.config import Scale
from spice_ray.contracts import Progress
from spice_ray.runtime.cluster import connected
from spice_ray.runtime.data import Shards, check_lanes, open_shards
from spice_ray.runtime.ingest import ingest
from spice_ray.runtime.progress import SilentReporter
from spice_ray.runtime.train import fit
from spice_ray.runtime.workers import Host, PretrainJob, run_pretrain
from spice_ray.settings import Image, Pretrain

IMAGE = Image(size=SIDE, mean=MEAN, std=STD)
FEEDS = {"resident": Scale(checkpoint_seconds=3600), "streamed": Scale(checkpoint_seconds=3600, resident_memory=0)}


def status() -> dict[str, int]:
    """Bytes in use by this process, by the kernel's names of them.

    VmHWM is the peak of this program alone; getrusage's begins with that of the program that started it.
    """
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[-1] == "kB"}


class Watched(PassedOn):
    """Keeps the most private memory that was in use after a step, and passes everything on."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress)
        self.private = 0

    def advance(self, step: int, total: int, loss: Tensor, snapshot: Callable[[], dict[str, Any]]) -> None:
        super().advance(step, total, loss, snapshot)
        self.private = max(self.private, status()["RssAnon"])


def peak_file(job: PretrainJob) -> Path:
    return job.root / f"{job.fingerprint}.json"


def watched_pretrain(job: PretrainJob, host: Host) -> None:
    progress = Watched(host.progress)
    run_pretrain(job, replace(host, progress=progress))
    peaks = {"resident_set": status()["VmHWM"], "private": progress.private}
    peak_file(job).write_text(json.dumps(peaks))


def first_files(shards: Shards, count: int) -> Shards:
    """The first files with at least ``count`` images."""
    files, rows = [], 0
    for file in shards.files:
        if rows < count:
            files.append(file)
            rows += file.rows
    return replace(shards, files=files)


def train(settings: Pretrain, shards: Shards, feed: str, root: Path) -> dict[str, int]:
    """Peaks of a worker that is a new process, bytes."""
    job = PretrainJob(settings, IMAGE, shards, 0, root, f"{feed}-{shards.num_counted}")
    progress = root / f"progress-{job.fingerprint}"
    progress.mkdir()
    with connected(FEEDS[feed], verbose=False):
        fit(watched_pretrain, job, FEEDS[feed], [1], root / "checkpoints", progress, print)
    peaks: dict[str, int] = json.loads(peak_file(job).read_text())
    return peaks


def measure_memory(settings: Pretrain, counts: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {feed: [] for feed in FEEDS}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with connected(Scale(), verbose=False):
            artifact, _ = ingest(Generated(max(counts)), root, image_size=SIDE, seed=0, reporter=SilentReporter())
        everything = open_shards(artifact, None)
        for count in counts:
            shards = first_files(everything, count)
            check_lanes(shards, settings.lanes, "--lanes")
            for feed, points in found.items():
                points.append({"images": shards.num_counted, **train(settings, shards, feed, root)})
                print(f"{feed}: " + line(points[-1]))
    growth = {feed: slopes(points) for feed, points in found.items()}
    for feed, by_kind in growth.items():
        print(
            f"{feed} grows by " + ", ".join(f"{kind} {slope:,.0f}" for kind, slope in by_kind.items()) + " bytes/image"
        )
    return {"lanes": settings.lanes, "batch_size": settings.batch_size, "peaks": found, "bytes_per_image": growth}


def line(point: dict[str, int]) -> str:
    megabytes = ", ".join(f"{kind} {point[kind] / 1e6:,.0f} MB" for kind in ("resident_set", "private"))
    return f"{point['images']:,} images, {megabytes}"


def slopes(points: list[dict[str, int]]) -> dict[str, float]:
    images = [point["images"] for point in points]
    kinds = ("resident_set", "private")
    return {kind: linear_regression(images, [point[kind] for point in points]).slope for kind in kinds}
