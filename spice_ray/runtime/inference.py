"""Every image once through a frozen model: Ray Data's map_batches over an actor pool, one shard file per batch."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from spice_ray.config import ImageRecipe, Scale
from spice_ray.contracts import ASSIGNMENTS, EMBEDDING, PREDICTIONS, Bank, ShardFile
from spice_ray.core.unsupervised_loss import BLOCK_ROWS, new_table, unsupervised_loss
from spice_ray.errors import TrainingError
from spice_ray.readers.parts import images_of, read_column
from spice_ray.runtime.cluster import num_workers
from spice_ray.runtime.data import Shards
from spice_ray.runtime.memory import device_of
from spice_ray.runtime.partial_arrays import PartialArrays
from spice_ray.runtime.reading import read_parts
from spice_ray.runtime.reliable import ReliableTable, read_reliable
from spice_ray.runtime.weights import load_encoder, load_joint
from spice_ray.runtime.workers import augmentation_of
from spice_ray.stages.assign import predict
from spice_ray.stages.embed import embed
from spice_ray.stages.train_heads import shares_of
from spice_ray.storage import Artifact, publish

Report = Callable[[int, int], None]
LARGEST_FEATURE = float(np.finfo(np.float16).max)
_DTYPES: dict[str, type[np.floating]] = {
    "embedding": np.float32,
    "plain": np.float16,
    "weak": np.float16,
    "strong": np.float16,
}
IDENTITY = ["sample_id", "source", "split"]
"""The columns of shards that say who a row is."""


@dataclass(frozen=True)
class InferenceJob:
    """What an actor of the pool is given."""

    model: Artifact
    recipe: ImageRecipe
    image_size: int
    threads: int
    gpus: float

    @property
    def device(self) -> torch.device:
        """Where the actor computes."""
        return device_of(self.gpus)


class EmbedImages:
    """Embeds the images of a shard file with stage 1's encoder."""

    def __init__(self, job: InferenceJob) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._encoder = load_encoder(job.model).eval().to(job.device)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Images to rows of (embedding, plain, weak, strong 0, ...), float32."""
        recipe, device = self._job.recipe, self._job.device
        ids = torch.from_numpy(table["sample_id"].to_numpy().copy()).to(device)
        images = torch.from_numpy(images_of(table, self._job.image_size).copy()).to(device)
        found = embed(
            self._encoder,
            images,
            ids,
            augmentation_of(recipe.image),
            num_strong=recipe.heads.views,
            seed=recipe.seed,
        )
        return _rows(table, torch.cat([found.embedding, found.plain, found.weak, *found.strong], dim=1))


class PredictImages:
    """Classifies the images of a shard file with stage 3's model."""

    def __init__(self, job: InferenceJob) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._model = load_joint(job.model).eval().to(job.device)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Images to rows of (logits, pooled feature), float32."""
        images = torch.from_numpy(images_of(table, self._job.image_size).copy()).to(self._job.device)
        found = predict(self._model, images, augmentation_of(self._job.recipe.image))
        return _rows(table, torch.cat([found.logits, found.pooled], dim=1))


def _rows(table: pa.Table, values: torch.Tensor) -> pa.Table:
    """Who the rows are, and values as fixed-size binary: Arrow's tensors would be copied and widened on their way."""
    width = values.shape[1] * 4
    buffer = pa.py_buffer(values.contiguous().numpy().tobytes())
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), [None, buffer])
    return table.select(IDENTITY).append_column("values", column)


def map_images(
    actor: type[EmbedImages] | type[PredictImages],
    job: InferenceJob,
    shards: Shards,
    files: list[ShardFile],
    scale: Scale,
    take: Callable[[pa.Table, NDArray[np.float32]], None],
    report: Report,
) -> None:
    """Send shard files through a pool of ``scale.workers`` actors and hand identity and values of each to ``take``."""
    total = sum(file.rows for file in shards.readable)
    done = total - sum(file.rows for file in files)
    if not files:
        return
    # As map_batches, which takes no files for batches where there are GPUs.
    outputs = read_parts(shards.path, files, shards.format).map_batches_internal(
        actor,
        fn_constructor_args=(job,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(num_workers(scale), len(files))),
        num_cpus=scale.cpus_per_worker,
        num_gpus=scale.gpus_per_worker or None,
    )
    for table in outputs.iter_batches(batch_size=None, batch_format="pyarrow"):
        column = table["values"].combine_chunks()
        width = column.type.byte_width // 4
        values = np.frombuffer(column.buffers()[1], np.float32)[column.offset * width :][: len(column) * width]
        take(table.select(IDENTITY), values.reshape(len(column), width))
        done += len(column)
        report(done, total)


def publish_embedding(
    root: Path,
    print_: str,
    recipe: ImageRecipe,
    scale: Scale,
    encoder: Artifact,
    shards: Shards,
    parts: Path,
    report: Report,
) -> Artifact:
    """Embed all images and the heads' views of them, and publish the store.

    What was embedded before an interruption is kept in the folder ``parts``.
    """
    width, views = encoder.manifest["embed_dim"], recipe.heads.views
    job = _job(encoder, recipe, shards, scale)

    def write(folder: Path) -> dict[str, Any]:
        # Rows of damaged files stay zero; no stage looks at them.
        shapes: dict[str, tuple[int, ...]] = {name: (shards.num_rows, width) for name in Bank._fields}
        shapes["strong"] = (views, shards.num_rows, width)
        partial = PartialArrays(parts, shapes, _DTYPES, scale.checkpoint_seconds)
        bank = Bank(**partial.arrays)
        whole = {(file.first_id, file.rows): file.name for file in shards.readable}

        def take(rows: pa.Table, values: NDArray[np.float32]) -> None:
            _check_range(values)
            ids, columns = rows["sample_id"].to_numpy(), np.split(values, 3 + views, axis=1)
            bank.embedding[ids], bank.plain[ids], bank.weak[ids] = columns[:3]
            for view, column in enumerate(columns[3:]):
                bank.strong[view][ids] = column
            name = whole.get((int(ids[0]), len(ids)))
            if name is not None:
                partial.note(name)

        files = [file for file in shards.readable if file.name not in partial.done]
        map_images(EmbedImages, job, shards, files, scale, take, report)
        partial.hand_over(folder)
        return {"num_images": shards.num_rows, "embed_dim": width, "views": views}

    found = publish(root, EMBEDDING, print_, write)
    shutil.rmtree(parts, ignore_errors=True)
    return found


def publish_assignments(
    root: Path,
    print_: str,
    recipe: ImageRecipe,
    scale: Scale,
    joint: Artifact,
    reliable: Artifact,
    shards: Shards,
    report: Report,
) -> Artifact:
    """Classify all images and publish one row for each."""

    def write(folder: Path) -> dict[str, Any]:
        found = predict_all(folder / "pooled.npy", recipe, scale, joint, shards, report)
        loss = final_loss(found.logits, found.pooled, training_ids(shards), recipe)
        (folder / "pooled.npy").unlink()
        clusters, confidences = decide(found.logits)
        kept = read_reliable(reliable)
        if joint.manifest["skipped"] is not None:
            kept = kept._replace(weights=torch.zeros_like(kept.weights))
        table = assignments_table(pa.concat_tables(found.identity), clusters, confidences, kept)
        pq.write_table(table, folder / "assignments.parquet")
        sizes = np.bincount(table["cluster"].to_numpy(), minlength=recipe.num_clusters)
        return {"unsupervised_loss": loss, "cluster_sizes": sizes.tolist()}

    return publish(root, ASSIGNMENTS, print_, write)


def publish_predictions(
    root: Path, print_: str, recipe: ImageRecipe, scale: Scale, joint: Artifact, shards: Shards, report: Report
) -> Artifact:
    """Classify all images for the next round of stage 3, and publish clusters, confidences and its embedding."""

    def write(folder: Path) -> dict[str, Any]:
        found = predict_all(folder / "embedding.npy", recipe, scale, joint, shards, report)
        for start in range(0, shards.num_rows, BLOCK_ROWS):
            rows = found.pooled[start : start + BLOCK_ROWS]
            rows[:] = F.normalize(torch.from_numpy(rows), dim=1).numpy()
        found.pooled.flush()
        clusters, confidences = decide(found.logits)
        np.save(folder / "assignments.npy", clusters)
        np.save(folder / "confidences.npy", confidences)
        return {"num_images": shards.num_rows, "embed_dim": found.pooled.shape[1]}

    return publish(root, PREDICTIONS, print_, write)


@dataclass(frozen=True)
class Predicted:
    """What a classifier says of all images; rows of damaged files stay zero."""

    logits: np.memmap[Any, Any]
    """In a file without a name, float32, (N, K)."""
    pooled: np.memmap[Any, Any]
    """Its features, mapped, float32, (N, D)."""
    identity: list[pa.Table]
    """Who the readable rows are."""


def predict_all(
    file: Path, recipe: ImageRecipe, scale: Scale, joint: Artifact, shards: Shards, report: Report
) -> Predicted:
    """Classify all images; their features go to ``file``."""
    with tempfile.TemporaryFile(dir=file.parent) as nameless:
        logits = np.memmap(nameless, np.float32, "w+", shape=(shards.num_rows, recipe.num_clusters))
    pooled: np.memmap[Any, Any] | None = None
    identity: list[pa.Table] = []

    def take(rows: pa.Table, values: NDArray[np.float32]) -> None:
        nonlocal pooled
        ids = rows["sample_id"].to_numpy()
        identity.append(rows)
        if pooled is None:
            pooled = new_array(file, (shards.num_rows, values.shape[1] - recipe.num_clusters))
        logits[ids], pooled[ids] = values[:, : recipe.num_clusters], values[:, recipe.num_clusters :]

    map_images(PredictImages, _job(joint, recipe, shards, scale), shards, shards.readable, scale, take, report)
    assert pooled is not None
    return Predicted(logits, pooled, identity)


def decide(logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The most probable cluster of each image and its probability, int64 and float32, (N,)."""
    clusters, confidences = np.empty(len(logits), np.int64), np.empty(len(logits), np.float32)
    for start in range(0, len(logits), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        confidence, cluster = torch.from_numpy(logits[rows]).softmax(dim=1).max(dim=1)
        clusters[rows], confidences[rows] = cluster.numpy(), confidence.numpy()
    return clusters, confidences


def final_loss(
    logits: NDArray[np.float32], pooled: NDArray[np.floating], train_ids: NDArray[np.int64], recipe: ImageRecipe
) -> float:
    """The unsupervised loss of a trained classifier on its own embedding: what trials of a sweep are ranked by.

    Args:
        logits: Of all images, (N, K).
        pooled: Its features of all images, (N, D).
        train_ids: Rows that count, int64.
        recipe: The run's.
    """
    blocks = [train_ids[start : start + BLOCK_ROWS] for start in range(0, len(train_ids), BLOCK_ROWS)]
    table = new_table(logits.shape[1], len(train_ids), torch.device("cpu"))
    for number, rows in enumerate(blocks):
        table[:, number * BLOCK_ROWS : number * BLOCK_ROWS + len(rows)] = torch.from_numpy(logits[rows].T)
    return unsupervised_loss(
        lambda: (F.normalize(torch.from_numpy(pooled[rows]), dim=1) for rows in blocks),
        table,
        shares_of(recipe.heads, recipe.num_clusters),
        confident_fraction=recipe.heads.confident_fraction,
    )


def training_ids(shards: Shards) -> NDArray[np.int64]:
    """Sample ids that count for training, int64, ascending."""
    return np.concatenate([np.empty(0, np.int64), *(_counted_ids(shards, file) for file in shards.readable)])


def _counted_ids(shards: Shards, file: ShardFile) -> NDArray[np.int64]:
    ids = np.arange(file.first_id, file.first_id + file.rows)
    if file.num_counted == file.rows:
        return ids
    return ids[pc.is_in(read_column(shards.path, file, "split"), pa.array(shards.splits)).to_numpy()]


def readable_ids(shards: Shards) -> NDArray[np.int64]:
    """Sample ids of the files that are not damaged, int64, ascending."""
    runs = [np.arange(file.first_id, file.first_id + file.rows) for file in shards.readable]
    return np.concatenate(runs)


def assignments_table(
    identity: pa.Table, clusters: NDArray[np.int64], confidences: NDArray[np.float32], reliable: ReliableTable
) -> pa.Table:
    """One row for each of ``identity``; ``clusters`` and ``confidences`` are of all rows of the shards, (N,).

    The heads' disagreement is a column where they voted.
    """
    ids = identity["sample_id"].to_numpy()
    disagreement = reliable.disagreement.numpy()[ids]
    voted = {} if np.isnan(disagreement).all() else {"disagreement": disagreement}
    columns = {
        "cluster": clusters[ids],
        "confidence": confidences[ids],
        "consistency": pa.array(reliable.consistency.numpy()[ids], from_pandas=True),
        "reliable": reliable.weights.numpy()[ids] > 0,
        **voted,
    }
    return pa.table({**{name: identity[name] for name in IDENTITY}, **columns})


def _job(model: Artifact, recipe: ImageRecipe, shards: Shards, scale: Scale) -> InferenceJob:
    return InferenceJob(model, recipe, shards.image_size, scale.cpus_per_worker, scale.gpus_per_worker)


def new_array(file: Path, shape: tuple[int, ...], dtype: type[np.floating] = np.float32) -> np.memmap[Any, Any]:
    """A mapped .npy file of zeros."""
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


def _check_range(pooled: NDArray[np.float32]) -> None:
    largest = float(np.abs(pooled).max(initial=0))
    if largest > LARGEST_FEATURE:
        raise TrainingError(
            f"the encoder gives features up to {largest:g}, and the heads take numbers up to {LARGEST_FEATURE:g}; "
            "lower pretrain.lr, or scale the given weights of the encoder"
        )
