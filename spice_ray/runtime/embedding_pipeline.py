"""Stage 2 and reliable pseudo-labels on embeddings that were given: stages 1 and 3 need images."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spice_ray import mirror
from spice_ray.contracts import ASSIGNMENTS, EMBEDDING, VECTORS
from spice_ray.image_counts import check_count
from spice_ray.readers.parts import vectors_of
from spice_ray.runtime.data import Shards
from spice_ray.runtime.inference import IDENTITY, assignments_table, new_array, training_ids
from spice_ray.runtime.pipeline import Pipeline, Show
from spice_ray.runtime.progress import Done
from spice_ray.runtime.reading import read_parts
from spice_ray.runtime.reliable import read_reliable
from spice_ray.storage import Artifact, publish

Ints = NDArray[np.int64]
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class EmbeddingPipeline(Pipeline):
    """A run on embeddings: the chosen head's clusters (SPICE_s) are its result."""

    def __post_init__(self) -> None:
        """Refuse embeddings that the recipe does not fit.

        Raises:
            ConfigError: They are too few.
        """
        super().__post_init__()
        check_count(self.recipe, self.train_shards.num_counted, self.train_shards.num_counted)

    @cached_property
    def frozen(self) -> Artifact:
        """The given embeddings as unit rows."""
        damaged = sorted(self.damaged)
        settings: dict[str, Any] = {"damaged": damaged} if damaged else {}

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_vectors(self._root, print_, self.all_shards, show)

        return self._artifact(VECTORS, "embedding", "rows", settings, [self.shards_artifact], make)

    @property
    def neighbors_as_views(self) -> int:
        """Those that heads learn from."""
        return self.recipe.heads.views

    @cached_property
    def embedding(self) -> Artifact:
        """The given embeddings as the heads take them, with their views."""
        frozen, views = self.frozen, self.recipe.heads.views
        neighbors = self.neighbors if views else None
        settings = {"views": views, "protocol": self.recipe.protocol}
        parents = [frozen] if neighbors is None or self.recipe.reliable.index == "exact" else [frozen, neighbors]

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_views(self._root, print_, frozen, neighbors, training_ids(self.train_shards), views)

        return self._artifact(EMBEDDING, "views of the heads", "views", settings, parents, make)

    @cached_property
    def assignments(self) -> Artifact:
        """Every row's cluster."""

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_head_assignments(self._root, print_, self.heads, self.reliable, self.all_shards)

        return self._artifact(ASSIGNMENTS, "assignments", "rows", {}, [self.reliable], make)

    @property
    def made(self) -> list[Artifact]:
        """Shards, the vectors and their views, the heads and the reliable labels."""
        return [self.shards_artifact, self.frozen, self.embedding, self.heads, self.neighbors, self.reliable]


def publish_vectors(root: Path, print_: str, shards: Shards, show: Show) -> Artifact:
    """Publish given embeddings as unit rows, and as the heads take them.

    Heads take unit rows times the root of D: models give vectors of any length, and a learning rate fits but one.
    """
    width = shards.format.size

    def write(folder: Path) -> dict[str, Any]:
        shape = (shards.num_rows, width)
        embedding = new_array(folder / "embedding.npy", shape)
        plain = new_array(folder / "plain.npy", shape, np.float16)
        done = 0
        for table in _tables(shards):
            ids, rows = table["sample_id"].to_numpy(), unit_rows(vectors_of(table))
            embedding[ids], plain[ids] = rows, rows * np.sqrt(width)
            done += len(ids)
            show(Done(done, shards.num_counted, None))
        for array in (embedding, plain):
            array.flush()
        return {"num_images": shards.num_rows, "embed_dim": width}

    return publish(root, VECTORS, print_, write)


def publish_views(
    root: Path, print_: str, vectors: Artifact, neighbors: Artifact | None, train_ids: Ints, views: int
) -> Artifact:
    """Publish vectors as an embedding store.

    Strong views of a row that may be trained on are its nearest neighbours among these, as in NNCLR (Dwibedi et al.,
    2021): the label of a row is learnt by what is most like it. Where there are fewer rows, there are fewer views.
    """

    def write(folder: Path) -> dict[str, Any]:
        for name in ("embedding.npy", "plain.npy"):
            _link(vectors.file(name), folder / name)
        nearest = np.empty((0, 0), np.int32)
        if neighbors is not None:
            nearest = np.load(neighbors.file("neighbors.npy"), mmap_mode="r")[:, :views]
            _write_strong(folder, train_ids, nearest)
        told = {name: vectors.manifest[name] for name in ("num_images", "embed_dim")}
        return {**told, "views": nearest.shape[1], "weak": "plain"}

    return publish(root, EMBEDDING, print_, write)


def _write_strong(folder: Path, train_ids: Ints, nearest: NDArray[np.int32]) -> None:
    """The neighbours' rows in the place of views; of rows that are not trained on zeros, which nobody looks at."""
    plain = np.load(folder / "plain.npy", mmap_mode="r")
    strong = new_array(folder / "strong.npy", (nearest.shape[1], *plain.shape), np.float16)
    for view in range(nearest.shape[1]):
        for first in range(0, len(train_ids), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            strong[view, train_ids[rows]] = plain[train_ids[nearest[rows, view]]]
    strong.flush()


def _link(file: Path, name: Path) -> None:
    """Another name for a file that nobody writes to; a copy where that is not to be had."""
    if not mirror.is_mirrored(file):  # by the time of which its copy here is known for one
        with suppress(OSError):  # there are disks without such names
            os.link(file, name)
            return
    shutil.copyfile(file, name)


def unit_rows(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    """Vectors of length 1, (n, D)."""
    # In float64 the square of the largest float32 is a number.
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return vectors / norms


def _tables(shards: Shards) -> Iterator[pa.Table]:
    parts = read_parts(shards.path, shards.readable, shards.format)
    yield from parts.iter_batches(batch_size=None, batch_format="pyarrow")


def publish_head_assignments(root: Path, print_: str, heads: Artifact, reliable: Artifact, shards: Shards) -> Artifact:
    """Publish the chosen head's cluster of every row."""
    clusters, confidences = (np.load(heads.file(f"{name}.npy")) for name in ("assignments", "confidences"))

    def write(folder: Path) -> dict[str, Any]:
        identity = pa.concat_tables(table.select(IDENTITY) for table in _tables(shards))
        table = assignments_table(identity, clusters, confidences, read_reliable(reliable))
        pq.write_table(table, folder / "assignments.parquet")
        sizes = np.bincount(table["cluster"].to_numpy(), minlength=heads.manifest["num_clusters"])
        return {
            "unsupervised_loss": heads.manifest["losses"][heads.manifest["chosen"]],
            "cluster_sizes": sizes.tolist(),
        }

    return publish(root, ASSIGNMENTS, print_, write)
