"""The types that travel between stages, and the files that artifacts are made of.

    ImageShards -> EncoderCheckpoint -> EmbeddingStore -> HeadEnsemble -> ReliableLabels -> JointModel -> Assignments

Shapes: B rows of a batch, N images, S side of an image in pixels, D embedding width, V strong views, K clusters,
H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SHARDS, LABELS, ENCODER, EMBEDDING = "shards", "labels", "encoder", "embedding"
HEADS, RELIABLE, JOINT, ASSIGNMENTS = "heads", "reliable", "joint", "assignments"
VECTORS = "vectors"
"""Embeddings that were given: embedding.npy, unit rows, float32 (N, D), and plain.npy, float16, as heads take them."""
NEIGHBORS = "neighbors"
"""The nearest of each row that may be trained on: neighbors.npy, int32 (N, k), numbers among these rows."""
PREDICTIONS = "predictions"
"""What stage 3 has learned by the end of a round, for the next one: embedding.npy, unit rows, float32 (N, D);
assignments.npy, int64 (N,); confidences.npy, float32 (N,)."""
SCORE = "score"
"""What a trial of a sweep is worth: its manifest alone."""
PREDICTED = "predicted"
"""What a finished run says of other images: assignments.parquet."""
CLUSTER_COUNT, PRIOR = "cluster_count", "prior"
"""K where the recipe leaves it open, and the clusters' shares where they are estimated: between embedding and heads."""

# ImageShards: Parquet files part-00000.parquet ...; rows are contiguous and sample_id counts up through the files.
#   sample_id  int64, 0..N-1
#   source     string, where the image came from
#   split      string: train, test or unlabeled
#   image      stored=pixels: fixed-size binary, 3*S*S bytes: uint8 RGB, channels first
#              stored=encoded: binary, the file that was read, to be decoded
#   embedding  in the place of image, stored=vectors: fixed-size binary, 4*D bytes: float32, little-endian
# manifest: num_images, image_size (or embed_dim), stored, splits {name: count}, files [{name, rows,
# splits {name: count}, copies (of the row before), crc32}], num_rejects, num_copies, digest; rejects.parquet beside the
# parts: source, reason.


@dataclass(frozen=True)
class ShardFile:
    """One file of image shards: ``rows`` images of which ``num_counted`` are what a stage may train on."""

    name: str
    first_id: int
    """Sample id of its first row; the others count up from it."""
    rows: int
    num_counted: int
    crc32: int
    """Checksum of the file's bytes."""


class Batch(NamedTuple):
    """Rows of a global batch that one worker serves, interleaved: row i * L + l is the i-th of the worker's lane l."""

    images: "Tensor"
    """uint8, (B, 3, S, S)."""
    sample_ids: "Tensor"
    """int64, (B,)."""
    draws: "Tensor"
    """Positions in the stream, int64, (B,): what an augmentation's random numbers are counted by."""


class Bank(NamedTuple):
    """What the heads train on: one row per image, in sample_id order."""

    embedding: "NDArray[np.float32]"
    """Unit rows of the plain view, (N, D): similarity and prototypes."""
    plain: "NDArray[np.float16]"
    """Pooled feature of the plain view, (N, D)."""
    weak: "NDArray[np.float16]"
    """Pooled feature of one weak view, (N, D)."""
    strong: "NDArray[np.float16]"
    """Pooled features of the strong views, (V, N, D)."""


class Health(NamedTuple):
    """Label-free signs of what a batch's projections, of width P, are worth."""

    alignment: float
    """Mean squared distance of the two views of an image: 0 where they agree, 2 where they are unrelated."""
    uniformity: float
    """log mean exp(-2 d^2) over pairs of different images (Wang and Isola, 2020): 0 collapsed, about -4 well spread."""
    effective_rank: float
    """How many dimensions are in use: exp of the entropy of the singular values (Roy and Vetterli, 2007); 1 to P."""
    collapsed: float
    """Share of the dimensions that hardly vary."""


class Progress(Protocol):
    """What a training loop needs from whoever runs it: a place to go on from, and somebody to tell."""

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, on the CPU, or None at the beginning."""
        ...

    def advance(self, step: int, total: int, loss: "Tensor", snapshot: Callable[[], dict[str, Any]]) -> None:
        """Called by every worker after each step; saves ``snapshot()`` when a checkpoint is due."""
        ...

    def note_health(self, epoch: int, loss: "Tensor", health: Health) -> None:
        """Called by every worker of stage 1 at the end of each epoch, counted from 1, before ``advance``."""
        ...


Wrap = Callable[[Any], Any]
"""Makes a module train data-parallel (DDP), or returns it as it is."""
