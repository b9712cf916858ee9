"""What feeding costs: our two ways against no feeding at all, and against a DataLoader and Ray Data's read_images.

    python benchmarks/feed.py --images 60000 --repeats 3

makes that many 32-pixel JPEG files and the shards of them in a temporary folder, then times, interleaved and in one
run on this machine:

1. An epoch of stage 1 (the small encoder on one thread) fed from memory, streamed from the shards, and fed with one
   batch that is in memory already.
2. An epoch of batches and nothing else: ours from memory and from the shards; torch's DataLoader with two workers over
   the same pixels in memory and over the JPEG files; ray.data.read_images with a map to channels first and
   iter_torch_batches. What is made once is made before, but for "from JPEG", where our ingest is counted.

Prints two tables; ``--out`` names a JSON file for the seconds of every round.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from machine import write_results
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from spice_ray.config import Scale
from spice_ray.contracts import Batch, Health
from spice_ray.core.augment import Augmentation
from spice_ray.core.lanes import Lanes, ResidentLanes, Stream, serve, shuffle_window
from spice_ray.core.order import stream_key
from spice_ray.core.streaming import StreamedLanes
from spice_ray.readers.source import open_source
from spice_ray.runtime.cluster import connected
from spice_ray.runtime.data import Shards, load_rows, open_shards, stream_rows
from spice_ray.runtime.ingest import ingest
from spice_ray.runtime.progress import SilentReporter
from spice_ray.settings import Pretrain
from spice_ray.stages.pretrain import pretrain

SIDE, BATCH, LANES = 32, 512, 8
CPU = torch.device("cpu")
Times = dict[str, list[float]]


class JpegFiles(Dataset[torch.Tensor]):
    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class Pixels(Dataset[torch.Tensor]):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


class OneBatch:
    """A batch that is in memory already."""

    num_lanes = LANES

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, step: int) -> Batch:
        return self._batch


class Silent:
    def restore(self) -> None:
        return None

    def note_health(self, epoch: int, loss: torch.Tensor, health: Health) -> None:
        pass

    def advance(self, step: int, total: int, loss: torch.Tensor, snapshot: Callable[[], dict[str, Any]]) -> None:
        return None


def write_images(folder: Path, count: int) -> list[str]:
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        file = folder / f"{number % 100:02d}" / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, quality=90)
        files.append(str(file))
    return files


@contextmanager
def streamed(shards: Shards, stream: Stream) -> Iterator[Lanes]:
    lanes = StreamedLanes(serve(shards.files, list(range(LANES)), LANES), stream, partial(stream_rows, shards), CPU)
    yield lanes
    lanes.close()


@contextmanager
def timed(times: Times, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times.setdefault(name, []).append(time.perf_counter() - start)


def train_epoch(lanes: Lanes, count: int) -> None:
    settings = Pretrain(
        lanes=LANES,
        encoder="convnet",
        epochs=1,
        batch_size=BATCH,
        queue_size=4096,
        temperature=0.2,
        momentum=0.99,
        lr=0.01,
        weight_decay=0,
    )
    views = Augmentation("natural", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    pretrain(
        settings, lanes, views, num_images=count, seed=0, device=CPU, wrap=lambda module: module, progress=Silent()
    )


def time_training(shards: Shards, resident: Lanes, stream: Stream, count: int, repeats: int) -> Times:
    times: Times = {}
    one = OneBatch(resident.batch(0))
    for _ in range(repeats):
        with timed(times, "one batch in memory"):
            train_epoch(one, count)
        with timed(times, "resident"):
            train_epoch(resident, count)
        with timed(times, "streamed"), streamed(shards, stream) as lanes:
            train_epoch(lanes, count)
    return times


def consume(batches: Iterator[torch.Tensor], count: int) -> None:
    seen = 0
    for batch in batches:
        assert batch.dtype == torch.uint8
        assert batch.shape[1:] == (3, SIDE, SIDE)
        seen += len(batch)
        if seen >= count - BATCH:
            return


def batches_of(lanes: Lanes, count: int) -> Iterator[torch.Tensor]:
    return (lanes.batch(step).images for step in range(count // BATCH))


def read_by_ray(folder: Path) -> Iterator[torch.Tensor]:
    dataset = ray.data.read_images(str(folder), mode="RGB").map_batches(
        lambda batch: {"image": np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2))}
    )
    return (batch["image"] for batch in dataset.iter_torch_batches(batch_size=BATCH))


_held: dict[str, Dataset[torch.Tensor]] = {}


def _hold(images: torch.Tensor, files: list[str]) -> None:
    torch.set_num_threads(1)
    _held.update(pixels=Pixels(images), jpeg=JpegFiles(files))


def time_loader(name: str) -> float:
    """Seconds of an epoch of a DataLoader with two workers; runs in the process that holds the data."""
    dataset = _held[name]
    start = time.perf_counter()
    # Forked workers, the default of a process that was not spawned itself.
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=2, multiprocessing_context="fork")
    consume(iter(loader), len(dataset))
    return time.perf_counter() - start


def time_feeding(
    folder: Path, files: list[str], shards: Shards, resident: ResidentLanes, stream: Stream, repeats: int
) -> Times:
    count, times = len(files), dict[str, list[float]]()
    images = torch.cat(list(batches_of(resident, count)))
    # A process of its own: a DataLoader forks, and Ray's connections do not survive that.
    with ProcessPoolExecutor(1, get_context("spawn"), _hold, (images, files)) as peer:
        for number in range(repeats):
            _one_round(folder, files, shards, resident, stream, peer, number, times)
    return times


def _one_round(
    folder: Path,
    files: list[str],
    shards: Shards,
    resident: ResidentLanes,
    stream: Stream,
    peer: ProcessPoolExecutor,
    number: int,
    times: Times,
) -> None:
    count = len(files)
    with timed(times, "ours, resident"):
        consume(batches_of(resident, count), count)
    with timed(times, "ours, streamed"), streamed(shards, stream) as lanes:
        consume(batches_of(lanes, count), count)
    times.setdefault("DataLoader, pixels in memory", []).append(peer.submit(time_loader, "pixels").result())
    times.setdefault("DataLoader, JPEG files", []).append(peer.submit(time_loader, "jpeg").result())
    with timed(times, "ours, ingest of JPEG files"):
        ingest(
            open_source(str(folder)),
            folder.parent / f"again-{number}",
            image_size=SIDE,
            seed=0,
            reporter=SilentReporter(),
        )
    with timed(times, "Ray Data, read_images"):
        consume(read_by_ray(folder), count)


def table(times: Times, count: int, base: str) -> str:
    lines = ["| | seconds | images/s | ratio of times |", "|---|---:|---:|---:|"]
    reference = statistics.median(times[base])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        lines.append(f"| {name} | {middle:.2f} | {count / middle:,.0f} | {middle / reference:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, connected(Scale(), verbose=False):
        folder = Path(name) / "images"
        files = write_images(folder, options.images)
        artifact, _ = ingest(
            open_source(str(folder)), Path(name) / "shards", image_size=SIDE, seed=0, reporter=SilentReporter()
        )
        shards = open_shards(artifact, None)
        stream = Stream(stream_key(0, "pretrain"), BATCH // LANES, shuffle_window(SIDE))
        lanes = serve(shards.files, list(range(LANES)), LANES)
        resident = ResidentLanes(lanes, load_rows(shards, lanes, CPU), stream, CPU)
        training = time_training(shards, resident, stream, options.images, options.repeats)
        feeding = time_feeding(folder, files, shards, resident, stream, options.repeats)
    print(table(training, options.images, "one batch in memory"))
    print(table(feeding, options.images, "ours, streamed"))
    write_results({"images": options.images, "training": training, "feeding": feeding}, options.out)


if __name__ == "__main__":
    main()
