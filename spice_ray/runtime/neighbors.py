"""Nearest neighbours as an artifact: rows are shared among Ray actors, each of which looks for theirs among all."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.util
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from spice_ray import mirror
from spice_ray.config import Scale
from spice_ray.contracts import NEIGHBORS
from spice_ray.core.inverted_lists import ListSearch, build_lists, choose_probes
from spice_ray.core.neighbor_rows import MOST_KEPT
from spice_ray.core.neighbors import NeighborSearch
from spice_ray.errors import StorageError
from spice_ray.runtime.cluster import room
from spice_ray.runtime.memory import device_of, free_on_device
from spice_ray.storage import Artifact, publish, read_json, reporting_disk_errors, write_json

WIDEST = 100
"""Neighbours that are looked for at least, where there are so many other rows: as many as a recipe takes unless it says
otherwise, so that sweeps over fewer of them share what was found."""
_PRODUCTS_OF_PART = 2e11
"""Of two numbers each: some seconds of a processor. What takes no more in all is done by the driver, sooner than an
actor would have been started."""
_PRODUCTS_ON_GPU = 2e13
"""The same of a part on a GPU; not measured."""
_BYTES_OF_ACTOR = 2e9
"""At most: rows that it keeps, what it compares at once, and torch."""
_STEP = 1024
_GPU_BLOCK = 4096
"""A GPU has little to do in a block of so few rows as a processor takes; working memory is up to 2 GB then."""
_KEPT_SHARE = 2 / 3
"""Of what a process may hold on a GPU: half of it again is for what stands for the rows."""
_RETRIES = 3

Ints = NDArray[np.int64]


class TrainRows:
    """The rows of an embedding store that may be trained on, fetched when they are asked for."""

    def __init__(self, file: Path, ids: Ints) -> None:
        """Map the file; ``ids`` are the numbers of its rows that count."""
        self._array, self._ids = np.load(mirror.local(file), mmap_mode="r"), ids
        self.shape: tuple[int, int] = (len(ids), self._array.shape[1])

    def __len__(self) -> int:
        """How many count."""
        return len(self._ids)

    def __getitem__(self, chosen: slice | Ints) -> NDArray[Any]:
        """The chosen ones of those that count, float32, (n, D)."""
        rows: NDArray[Any] = self._array[self._ids[chosen]]
        return rows


@dataclass(frozen=True)
class NeighborJob:
    """Which neighbours are looked for, and where what was found is kept until all are there."""

    file: Path
    """Unit rows, float32, (N, D)."""
    width: int
    """D."""
    train_ids: Ints
    """Those among which and of which neighbours are looked for, ascending."""
    k: int
    part_rows: int
    """Rows of a part; the last may have fewer."""
    parts: Path
    lists_key: int | None = None
    """Look into inverted lists that depend on this key; none: compare all rows."""

    @property
    def starts(self) -> range:
        """The first row of each part."""
        return range(0, len(self.train_ids), self.part_rows)

    def part(self, start: int) -> Path:
        """The file of the part that begins there."""
        return self.parts / f"{start:012d}.npy"

    @property
    def lists(self) -> Path:
        """The file of the inverted lists."""
        return self.parts / "lists.faiss"

    @property
    def recall(self) -> Path:
        """What they find."""
        return self.parts / "recall.json"

    def is_found(self, start: int) -> bool:
        """Whether that file is there and whole."""
        rows = min(self.part_rows, len(self.train_ids) - start)
        try:
            return bool(np.load(mirror.local(self.part(start)), mmap_mode="r").shape == (rows, self.k))
        except (OSError, ValueError):  # there is none, or it lost its end with the power
            return False


class NeighborActor:
    """Finds the neighbours of one part after the other."""

    def __init__(self, job: NeighborJob, cpus: int, gpus: float) -> None:
        torch.set_num_threads(cpus)
        threadpool_limits(cpus, "blas")  # numpy's, which multiplies too
        self._parts = PartFinder(job, gpus)

    def find(self, start: int) -> int:
        """Write the part that begins at ``start`` and give the number of its rows."""
        return self._parts.find(start)


class PartFinder:
    """Looks for neighbours in this process, on its GPU where it has one or a part of one."""

    def __init__(self, job: NeighborJob, gpus: float) -> None:
        self._job = job
        self._search = open_search(job, gpus) if job.lists_key is None else open_lists(job)

    def find(self, start: int) -> int:
        """Write the part that begins at ``start`` and give the number of its rows."""
        job = self._job
        found, _ = self._search.find(start, min(start + job.part_rows, len(job.train_ids)))
        with reporting_disk_errors(job.parts):
            mirror.make_here(job.parts)
            file = job.part(start)
            unfinished = file.with_suffix(".unfinished")
            with unfinished.open("wb") as stream:
                np.save(stream, found.numpy().astype(np.int32))
            mirror.deliver(unfinished, file)
        return len(found)


def open_search(job: NeighborJob, gpus: float) -> NeighborSearch:
    """The exact search, on the GPU of this process where it has one.

    Raises:
        ResourceError: It was given one, and torch finds none.
    """
    rows, device = TrainRows(job.file, job.train_ids), device_of(gpus)
    kept = MOST_KEPT if device.type == "cpu" else int(free_on_device(device, gpus) * _KEPT_SHARE)
    return NeighborSearch(rows, job.k, block=_block(gpus), device=device, most_kept=kept)


def open_lists(job: NeighborJob) -> ListSearch:
    """The lists that :func:`make_lists` made; their rows are mapped, so that a node holds them once."""
    import faiss

    try:
        index: Any = faiss.read_index(str(mirror.local(job.lists)), faiss.IO_FLAG_MMAP)
    except RuntimeError:
        mirror.remove(job.recall)
        raise StorageError(f"{job.lists} is damaged; run the same command again to make it anew") from None
    # Else 32 threads of each actor would read lists ahead.
    invlists: Any = faiss.downcast_InvertedLists(index.invlists)
    invlists.prefetch_nthread = 0
    return ListSearch(index, TrainRows(job.file, job.train_ids), job.k, read_json(job.recall)["probes"])


def make_lists(job: NeighborJob) -> None:
    """Make the lists in this process, which holds all rows meanwhile, and choose how many are looked into."""
    import faiss

    assert job.lists_key is not None
    rows = TrainRows(job.file, job.train_ids)
    with reporting_disk_errors(job.parts):
        mirror.make_here(job.parts)
        index = build_lists(rows, job.lists_key)
        unfinished = job.lists.with_suffix(".unfinished")
        try:
            faiss.write_index(index, str(unfinished))
        except RuntimeError as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(f"faiss could not write {unfinished.name}") from error
        mirror.deliver(unfinished, job.lists)
        recall = choose_probes(index, rows, job.k, job.lists_key)
        write_json(job.recall, {"lists": index.nlist, **recall._asdict()})  # last: its presence means complete


def rows_of_part(num_rows: int, width: int, gpus: float = 0) -> int:
    """How many rows make a part: where there are many to be compared with few, for the sake of progress."""
    products, block = _PRODUCTS_ON_GPU if gpus else _PRODUCTS_OF_PART, _block(gpus)
    return max(1, int(products / (num_rows * width)) // block) * block


def _block(gpus: float) -> int:
    return _GPU_BLOCK if gpus else _STEP


def find_neighbors(job: NeighborJob, scale: Scale, tell: Callable[[int, int], None]) -> Iterator[NDArray[np.int32]]:
    """Find all parts, go on from those that are there, and give them in order.

    Args:
        job: What is looked for.
        scale: The size of the actors that share the parts, as many as there is room for.
        tell: Hears how many rows of how many are done.

    Yields:
        Row numbers of the nearest others among ``train_ids``, by falling similarity, int32, (n, k).

    Raises:
        StorageError: The disk refused.
    """
    with reporting_disk_errors(job.parts):
        job.parts.mkdir(parents=True, exist_ok=True)
    total = len(job.train_ids)
    missing = [start for start in job.starts if not job.is_found(start)]
    done = total - sum(min(job.part_rows, total - start) for start in missing)
    tell(done, total)
    for num_rows in _found(job, scale, missing):
        done += num_rows
        tell(done, total)
    return (np.load(mirror.local(job.part(start))) for start in job.starts)


def _found(job: NeighborJob, scale: Scale, missing: list[int]) -> Iterator[int]:
    """Find the missing parts, and give the number of rows of each."""
    if not missing:
        return
    gpus = 0 if job.lists_key is not None else scale.gpus_per_worker  # lists are looked into by processors
    # A part of a GPU's may be too much for the driver's processor.
    is_small = len(job.starts) == 1 and not (gpus and len(job.train_ids) ** 2 * job.width > _PRODUCTS_OF_PART)
    if job.lists_key is not None and not mirror.exists(job.recall):
        if is_small:
            make_lists(job)
        else:
            ray.get(ray.remote(make_lists).options(num_cpus=scale.cpus_per_worker).remote(job))
    if is_small:
        yield from map(PartFinder(job, gpus=0).find, missing)
        return
    remote = ray.remote(NeighborActor).options(
        num_cpus=scale.cpus_per_worker,
        num_gpus=gpus,
        max_restarts=_RETRIES,
        max_task_retries=_RETRIES,
    )
    shared = ray.put(job)
    fit = ray.cluster_resources().get("memory", math.inf) // _BYTES_OF_ACTOR
    most = math.inf if scale.head_actors is None else scale.head_actors
    count = int(max(1, min(room(scale.cpus_per_worker, gpus), fit, most, len(missing))))
    actors = [remote.remote(shared, scale.cpus_per_worker, gpus) for _ in range(count)]
    yield from ray.util.ActorPool(actors).map_unordered(lambda actor, start: actor.find.remote(start), missing)


def publish_neighbors(
    root: Path, print_: str, job: NeighborJob, scale: Scale, tell: Callable[[int, int], None]
) -> Artifact:
    """Publish the neighbours of every row that may be trained on; what was found before an interruption is kept."""
    parts = find_neighbors(job, scale, tell)

    def write(folder: Path) -> dict[str, Any]:
        shape, done = (len(job.train_ids), job.k), 0
        array = np.lib.format.open_memmap(folder / "neighbors.npy", mode="w+", dtype=np.int32, shape=shape)
        for part in parts:
            array[done : done + len(part)] = part
            done += len(part)
        array.flush()
        recall = None if job.lists_key is None else read_json(job.recall)
        return {"num_rows": shape[0], "neighbors": job.k, "recall": recall}

    found = publish(root, NEIGHBORS, print_, write)
    mirror.remove(job.parts)
    return found
