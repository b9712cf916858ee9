"""Reliable pseudo-labels as an artifact: written by one process, read by the workers of stage 3."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.config import Recipe
from spice_ray.contracts import RELIABLE
from spice_ray.core.order import stream_key
from spice_ray.errors import ConfigError
from spice_ray.image_counts import num_neighbors
from spice_ray.stages.select_reliable import ReliableSamples, select_reliable
from spice_ray.storage import Artifact, publish


class ReliableTable(NamedTuple):
    """The content of the artifact, by sample id."""

    labels: Tensor
    """int64, (N,)."""
    consistency: Tensor
    """float64, (N,); nan for images that training does not see."""
    weights: Tensor
    """float32, (N,); 0 where a sample is not reliable."""
    disagreement: Tensor
    """float32, (N,): share of the voting heads that chose another cluster; nan where heads did not vote."""


def publish_reliable(
    root: Path,
    print_: str,
    recipe: Recipe,
    heads: Artifact,
    embedding: Artifact,
    train_ids: NDArray[np.int64],
    device: torch.device,
) -> Artifact:
    """Find the reliable samples among ``train_ids`` and publish them."""
    labels = np.load(heads.file("assignments.npy"), mmap_mode="r")
    confidences = np.load(heads.file("confidences.npy"), mmap_mode="r")
    embeddings = np.load(embedding.file("embedding.npy"), mmap_mode="r")
    neighbors = num_neighbors(recipe.reliable, len(train_ids), recipe.num_clusters)
    found = select_reliable(
        recipe.reliable,
        torch.from_numpy(embeddings[train_ids]),
        torch.from_numpy(labels[train_ids]),
        torch.from_numpy(confidences[train_ids]),
        num_clusters=recipe.num_clusters,
        neighbors=neighbors,
        key=stream_key(recipe.seed, "balance"),
        device=device,
    )

    def write(folder: Path) -> dict[str, Any]:
        table = _table(np.asarray(labels), train_ids, found, _disagreement(heads))
        pq.write_table(table, folder / "reliable.parquet")
        return {"neighbors": neighbors, "kept": found.kept, "num_train": len(train_ids)}

    return publish(root, RELIABLE, print_, write)


def check_clusters(reliable: Artifact, recipe: Recipe) -> None:
    """Hold the reliable labels to ``reliable.strict``.

    Raises:
        ConfigError: It is set and a cluster has no reliable sample.
    """
    empty = [cluster for cluster, kept in enumerate(reliable.manifest["kept"]) if kept == 0]
    if empty and recipe.reliable.strict:
        raise ConfigError(
            f"clusters {empty} of {recipe.num_clusters} have no reliable sample; {advice(recipe)}, "
            "or set reliable.strict=false"
        )


def read_reliable(artifact: Artifact) -> ReliableTable:
    """Read what :func:`publish_reliable` wrote."""
    table = pq.read_table(artifact.file("reliable.parquet"))
    return ReliableTable(*(torch.from_numpy(table[name].to_numpy().copy()) for name in ReliableTable._fields))


def advice(recipe: Recipe) -> str:
    """Which threshold to lower."""
    if recipe.reliable.min_confidence > 0:
        return (
            f"lower reliable.min_consistency={recipe.reliable.min_consistency:g} or "
            f"reliable.min_confidence={recipe.reliable.min_confidence:g}"
        )
    return f"lower reliable.min_consistency={recipe.reliable.min_consistency:g}"


def why_skip(reliable: Artifact, recipe: Recipe, files: list[int], num_lanes: int) -> str | None:
    """Why stage 3 cannot be trained on these reliable samples, or None.

    Args:
        reliable: The reliable labels.
        recipe: The run's.
        files: Rows of each shard file.
        num_lanes: G of stage 3.
    """
    filled = sum(kept > 0 for kept in reliable.manifest["kept"])
    if filled < 2:
        return f"{filled} of {recipe.num_clusters} clusters have reliable samples and 2 are needed; {advice(recipe)}"
    file_of = np.repeat(np.arange(len(files)), files)
    weights = read_reliable(reliable).weights.numpy()
    lanes = np.bincount(file_of[weights > 0] % num_lanes, minlength=num_lanes)
    if (lanes == 0).any():
        return (
            f"{int((weights > 0).sum())} reliable samples leave one of joint.lanes={num_lanes} lanes without any; "
            f"{advice(recipe)}, or lower joint.lanes"
        )
    return None


def _disagreement(heads: Artifact) -> NDArray[np.float32]:
    if "disagreement.npy" in {file.name for file in heads.path.iterdir()}:
        return np.load(heads.file("disagreement.npy"))
    return np.full(len(np.load(heads.file("assignments.npy"), mmap_mode="r")), np.nan, np.float32)


def _table(
    labels: NDArray[np.int64],
    train_ids: NDArray[np.int64],
    found: ReliableSamples,
    disagreement: NDArray[np.float32],
) -> pa.Table:
    consistency = np.full(len(labels), np.nan)
    consistency[train_ids] = found.consistency.cpu().numpy()
    weights = np.zeros(len(labels), np.float32)
    weights[train_ids] = found.weights.cpu().numpy()
    ids = np.arange(len(labels))
    columns = {"labels": labels, "consistency": consistency, "weights": weights, "disagreement": disagreement}
    return pa.table({"sample_id": ids, **columns})
