"""Stage 2 and reliable pseudo-labels on embeddings that were given: stages 1 and 3 need images."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spice_ray.contracts import ASSIGNMENTS, EMBEDDING
from spice_ray.core.neighbors import exact_neighbors
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
Rows = NDArray[np.floating]


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
    def embedding(self) -> Artifact:
        """The given embeddings as the heads take them."""
        views, damaged = self.recipe.heads.views, sorted(self.damaged)
        settings: dict[str, Any] = {"damaged": damaged} if damaged else {}
        if views:
            settings |= {"views": views, "protocol": self.recipe.protocol}

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_given(self._root, print_, self.all_shards, training_ids(self.train_shards), views, show)

        return self._artifact(EMBEDDING, "embedding", "rows", settings, [self.shards_artifact], make)

    @cached_property
    def assignments(self) -> Artifact:
        """Every row's cluster."""

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_head_assignments(self._root, print_, self.heads, self.reliable, self.all_shards)

        return self._artifact(ASSIGNMENTS, "assignments", "rows", {}, [self.reliable], make)

    @property
    def made(self) -> list[Artifact]:
        """Shards, the store, the heads and the reliable labels."""
        return [self.shards_artifact, self.embedding, self.heads, self.neighbors, self.reliable]


def publish_given(root: Path, print_: str, shards: Shards, train_ids: Ints, views: int, show: Show) -> Artifact:
    """Publish given embeddings as an embedding store.

    Heads take unit rows times the root of D: models give vectors of any length, and a learning rate fits but one.
    Strong views of a row that may be trained on are its nearest neighbours among these, as in NNCLR (Dwibedi et al.,
    2021): the label of a row is learnt by what is most like it. Where there are fewer rows, there are fewer views.
    """
    width = shards.format.size

    def write(folder: Path) -> dict[str, Any]:
        shape = (shards.num_rows, width)
        embedding, plain = (
            new_array(folder / "embedding.npy", shape),
            new_array(folder / "plain.npy", shape, np.float16),
        )
        done = 0
        for table in _tables(shards):
            ids, vectors = table["sample_id"].to_numpy(), vectors_of(table)
            embedding[ids] = unit_rows(vectors)
            plain[ids] = unit_rows(vectors) * np.sqrt(width)
            done += len(ids)
            show(Done(done, shards.num_counted, None))
        for array in (embedding, plain):
            array.flush()
        found = _write_neighbors(folder, embedding, plain, train_ids, min(views, len(train_ids) - 1))
        return {"num_images": shards.num_rows, "embed_dim": width, "views": found}

    return publish(root, EMBEDDING, print_, write)


def unit_rows(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    """Vectors of length 1, (n, D)."""
    # In float64 the square of the largest float32 is a number.
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return vectors / norms


def _write_neighbors(folder: Path, embedding: Rows, plain: Rows, train_ids: Ints, views: int) -> int:
    """The files of views, unless there are none; gives how many there are."""
    if views:
        neighbors = train_ids[exact_neighbors(embedding[train_ids], views)[0].numpy()]
        weak, strong = (
            new_array(folder / "weak.npy", plain.shape, np.float16),
            new_array(folder / "strong.npy", (views, *plain.shape), np.float16),
        )
        weak[:] = plain
        for view in range(views):
            strong[view, train_ids] = plain[neighbors[:, view]]
        for array in (weak, strong):
            array.flush()
    return views


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
