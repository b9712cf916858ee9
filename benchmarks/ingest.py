"""Ingest against Pillow alone, its memory at two sizes, and how soon it begins.

    python benchmarks/ingest.py speed --images 20000
    python benchmarks/ingest.py memory --images 60000 --more 1000000
    python benchmarks/ingest.py listing --images 1000000

``speed`` writes JPEG files of 200 x 150 pixels and takes, interleaved, the CPU time that decoding, cutting and scaling
them with Pillow alone takes and that of our chunk task (reading, checks, decoding, hashing, sorting, writing runs), on
one core, and prints the ratio; then it times the whole ingest on Ray. ``memory`` ingests generated images (a source of
its own, so that no million files are needed) with an object store of 200 MB, watches what the driver and the
workers allocate and the object store, and prints the peaks at both sizes. ``listing`` makes a tree of that many files
(links to some small images) and times how long it takes until the tree is listed and the first images are decoded,
sorted and on disk.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from generated import SIDE, Generated
from machine import write_results
from PIL import Image
from process_memory import Held, Watch, is_worker

from spice_ray.config import Scale
from spice_ray.readers.parts import PartFormat
from spice_ray.readers.runs import Task, write_runs
from spice_ray.readers.source import open_source
from spice_ray.runtime.cluster import connected
from spice_ray.runtime.ingest import ingest
from spice_ray.runtime.progress import Done, SilentReporter

STORE_BYTES = 200 << 20


def write_images(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        file = folder / f"{number % 20:02d}" / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC).save(file, quality=85)
        files.append(file)
    return files


def by_pillow(file: Path, side: int) -> bytes:
    """What anybody would write: the centre square, scaled."""
    image = Image.open(io.BytesIO(file.read_bytes()))
    image.draft(None, (2 * side, 2 * side))
    image.load()
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).convert("RGB")
    return square.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0).tobytes()


def speed(count: int, side: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        files = write_images(folder, count)
        source = open_source(str(folder))
        alone, ours = [], []
        for number, chunk in enumerate(source.chunks(1000)):
            start = time.process_time()
            for file in files[number * 1000 : (number + 1) * 1000]:
                by_pillow(file, side)
            alone.append(time.process_time() - start)
            start = time.process_time()
            write_runs(chunk, number, Task(Path(name), PartFormat(side, "pixels"), 0, 8 << 20))
            ours.append(time.process_time() - start)
        middle = statistics.median(alone), statistics.median(ours)
        print(f"Pillow alone: {1000 / middle[0]:,.0f} images/s of CPU time; chunk task: {1000 / middle[1]:,.0f}")
        print(f"ratio {middle[0] / middle[1]:.3f} at {side} pixels")
        with connected(Scale(), verbose=False):
            start = time.perf_counter()
            ingest(source, Path(name) / "shards", image_size=side, seed=0, reporter=SilentReporter())
            took = time.perf_counter() - start
        print(f"whole ingest on Ray: {count / took:,.0f} images/s, {took:.1f} s")
    return {"side": side, "pillow_cpu_seconds": alone, "chunk_task_cpu_seconds": ours, "whole_seconds": took}


class StoreWatch(Watch):
    """Watches the object store too, and the sum of what the workers have allocated; MB."""

    def __init__(self) -> None:
        super().__init__()
        self.workers = self.store = 0.0

    def look(self, now: dict[int, Held]) -> None:
        super().look(now)
        self.workers = max(self.workers, sum(held.anonymous for pid, held in now.items() if is_worker(pid)))
        total, free = ray.cluster_resources(), ray.available_resources()
        used = total.get("object_store_memory", 0) - free.get("object_store_memory", 0)
        self.store = max(self.store, used / 1e6)


def memory(counts: list[int]) -> dict[str, Any]:
    found = {}
    for count in counts:
        with (
            tempfile.TemporaryDirectory() as name,
            small_store(),
            connected(Scale(), verbose=False),
            StoreWatch() as watch,
        ):
            start = time.perf_counter()
            shards, _ = ingest(Generated(count), Path(name), image_size=SIDE, seed=0, reporter=SilentReporter())
            took = time.perf_counter() - start
            assert shards.manifest["num_images"] == count
        peaks = {"driver": watch.driver.anonymous, "workers": watch.workers, "object_store": watch.store}
        shown = ", ".join(f"{who} {megabytes:.1f} MB" for who, megabytes in peaks.items())
        print(f"{count} images ({count * 3 * SIDE**2 / 1e9:.2f} GB): {took:.0f} s, {shown}")
        found[str(count)] = {"seconds": took, "peak_megabytes": peaks}
    return found


@contextmanager
def small_store(num_bytes: int = STORE_BYTES) -> Iterator[None]:
    """Ray on this machine with a small object store."""
    with tempfile.TemporaryDirectory(prefix="spice-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=(os.cpu_count() or 1) + 1,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=num_bytes,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


class UntilFirst(SilentReporter):
    """Stops an ingest at its first progress, which comes when the images of a chunk are on disk."""

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        def stop(_done: Done) -> None:
            raise KeyboardInterrupt

        yield stop


def listing(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, connected(Scale(), verbose=False):
        folder = Path(name) / "images"
        link_images(folder, write_images(Path(name) / "some", 100), count)
        start = time.perf_counter()
        try:
            source = open_source(str(folder))
            listed = len(source.chunks(count)) > 0 and time.perf_counter() - start
            ingest(source, Path(name) / "shards", image_size=SIDE, seed=0, reporter=UntilFirst())
        except KeyboardInterrupt:
            first = time.perf_counter() - start
    print(f"{count} files: listed in {listed:.1f} s, first images on disk after {first:.1f} s")
    return {"files": count, "listed_seconds": listed, "first_seconds": first}


def link_images(folder: Path, images: list[Path], count: int) -> None:
    """A tree of ``count`` links, 1000 in each folder."""
    for number in range(count):
        file = folder / f"{number // 100_000:03d}" / f"{number // 1000:05d}" / f"{number:07d}.jpg"
        if number % 1000 == 0:
            file.parent.mkdir(parents=True)
        os.link(images[number % len(images)], file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "listing"])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--more", type=int, default=1_000_000)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    match options.what:
        case "speed":
            found = speed(options.images, options.side)
        case "memory":
            found = memory([options.images, options.more])
        case _:
            found = listing(options.images)
    write_results({options.what: found}, options.out)


if __name__ == "__main__":
    main()
