"""Stage 2 and reliable pseudo-labels on embeddings that were given: stages 1 and 3 need images."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spice_ray.contracts import ASSIGNMENTS, EMBEDDING
from spice_ray.readers.parts import vectors_of
from spice_ray.runtime.data import Shards
from spice_ray.runtime.inference import assignments_table, new_array
from spice_ray.runtime.pipeline import Pipeline, Show
from spice_ray.runtime.progress import Done
from spice_ray.runtime.reading import read_parts
from spice_ray.runtime.reliable import read_reliable
from spice_ray.storage import Artifact, publish


@dataclass(frozen=True)
class EmbeddingPipeline(Pipeline):
    """A run on embeddings: the chosen head's clusters (SPICE_s) are its result."""

    @cached_property
    def embedding(self) -> Artifact:
        """The given embeddings as the heads take them."""
        settings = {"damaged": sorted(self.damaged)} if self.damaged else {}

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_given(self._root, print_, self.all_shards, show)

        return self._artifact(EMBEDDING, "embedding", "rows", settings, [self.shards_artifact], make)

    @cached_property
    def assignments(self) -> Artifact:
        """Every row's cluster."""

        def make(print_: str, progress: Path, show: Show) -> None:
            publish_head_assignments(self._root, print_, self.heads, self.reliable, self.train_shards)

        return self._artifact(ASSIGNMENTS, "assignments", "rows", {}, [self.reliable], make)

    @property
    def made(self) -> list[Artifact]:
        """Shards, the store, the heads and the reliable labels."""
        return [self.shards_artifact, self.embedding, self.heads, self.reliable]


def publish_given(root: Path, print_: str, shards: Shards, show: Show) -> Artifact:
    """Publish given embeddings as an embedding store without views.

    Heads take unit rows times the root of D: models give vectors of any length, and a learning rate fits but one.
    """
    width = shards.format.size

    def write(folder: Path) -> dict[str, Any]:
        embedding, plain = (
            new_array(folder / f"{name}.npy", (shards.num_rows, width)) for name in ("embedding", "plain")
        )
        done = 0
        for ids, vectors in _vectors(shards):
            # In float64 the square of the largest float32 is a number.
            norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
            embedding[ids] = vectors / norms
            plain[ids] = vectors / norms * np.sqrt(width)
            done += len(ids)
            show(Done(done, shards.num_rows, None))
        for array in (embedding, plain):
            array.flush()  # type: ignore[attr-defined]
        return {"num_images": shards.num_rows, "embed_dim": width, "views": 0}

    return publish(root, EMBEDDING, print_, write)


def _vectors(shards: Shards) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    tables = read_parts(shards.path, shards.readable, shards.format)
    for table in tables.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield table["sample_id"].to_numpy(), vectors_of(table)


def publish_head_assignments(root: Path, print_: str, heads: Artifact, reliable: Artifact, shards: Shards) -> Artifact:
    """Publish the chosen head's cluster of every row."""
    clusters, confidences = (np.load(heads.file(f"{name}.npy")) for name in ("assignments", "confidences"))

    def write(folder: Path) -> dict[str, Any]:
        table = assignments_table(clusters, confidences, read_reliable(reliable), shards)
        pq.write_table(table, folder / "assignments.parquet")
        sizes = np.bincount(table["cluster"].to_numpy(), minlength=heads.manifest["num_clusters"])
        return {"unsupervised_loss": min(heads.manifest["losses"]), "cluster_sizes": sizes.tolist()}

    return publish(root, ASSIGNMENTS, print_, write)
