"""Reliable pseudo-labels as an artifact: written by one process, read by the workers of stage 3."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray import mirror
from spice_ray.config import Recipe
from spice_ray.contracts import RELIABLE
from spice_ray.core.order import stream_key
from spice_ray.errors import ConfigError
from spice_ray.image_counts import num_neighbors
from spice_ray.settings import ADAPTIVE
from spice_ray.stages.select_reliable import select_reliable
from spice_ray.storage import Artifact, publish

GIVEN = ("given labels", "give more")
"""What stage 3 may learn from in the place of reliable samples, and what to do where they are too few."""


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
    root: Path, print_: str, recipe: Recipe, labelled: Artifact, neighbors: Artifact, train_ids: NDArray[np.int64]
) -> Artifact:
    """Find the reliable samples among ``train_ids`` and publish them; ``labelled`` are heads, or predictions."""
    labels = np.load(labelled.file("assignments.npy"), mmap_mode="r")
    confidences = np.load(labelled.file("confidences.npy"), mmap_mode="r")
    # Copy on write: torch warns of what cannot be written.
    nearest = np.load(neighbors.file("neighbors.npy"), mmap_mode="c")
    asked = num_neighbors(recipe.reliable, len(train_ids), recipe.num_clusters)
    found = select_reliable(
        recipe.reliable,
        torch.from_numpy(nearest),
        torch.from_numpy(labels[train_ids]),
        torch.from_numpy(confidences[train_ids]),
        num_clusters=recipe.num_clusters,
        asked=asked,
        key=stream_key(recipe.seed, "balance"),
    )

    table = ReliableTable(
        torch.from_numpy(np.array(labels)),
        _by_id(found.consistency, train_ids, torch.full((len(labels),), torch.nan, dtype=torch.float64)),
        _by_id(found.weights, train_ids, torch.zeros(len(labels))),
        _disagreement(labelled),
    )

    def write(folder: Path) -> dict[str, Any]:
        write_reliable(folder, table)
        told = {"consistent": found.consistent, "kept": found.kept, "num_train": len(train_ids)}
        return {"neighbors": asked or ADAPTIVE, **told}

    return publish(root, RELIABLE, print_, write)


def _by_id(values: Tensor, ids: NDArray[np.int64], others: Tensor) -> Tensor:
    """``values`` at ``ids`` among ``others``."""
    return others.index_copy(0, torch.from_numpy(ids), values)


def describe_reliable(reliable: Artifact) -> str:
    """How many there are, and what balancing has cost."""
    manifest = reliable.manifest
    kept, consistent = manifest["kept"], sum(manifest["consistent"])
    sentence = f"{sum(kept)} of {manifest['num_train']} samples are reliable"
    if sum(kept) < consistent:
        sentence += (
            f": of {consistent} that pass the thresholds reliable.balance=smallest leaves each cluster the {max(kept)} "
            "of the smallest one"
        )
    empty = [cluster for cluster, count in enumerate(kept) if count == 0]
    return f"{sentence}; clusters {empty} have none (kept: {kept})" if empty else sentence


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


def write_reliable(folder: Path, table: ReliableTable) -> None:
    """Write what the artifact holds."""
    columns = {name: values.numpy() for name, values in table._asdict().items()}
    pq.write_table(pa.table({"sample_id": np.arange(len(table.labels)), **columns}), folder / "reliable.parquet")


def read_reliable(artifact: Artifact) -> ReliableTable:
    """Read what :func:`write_reliable` wrote."""
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
    # Of given labels there are two or more.
    if filled < 2:
        return f"{filled} of {recipe.num_clusters} clusters have reliable samples and 2 are needed; {advice(recipe)}"
    samples, remedy = GIVEN
    if "neighbors" in reliable.manifest:
        samples, remedy = "reliable samples", advice(recipe)
        if sum(reliable.manifest["kept"]) < sum(reliable.manifest["consistent"]):
            remedy = f"set reliable.balance=weights, {remedy}"
    return why_a_lane_is_bare(read_reliable(reliable).weights.numpy() > 0, files, num_lanes, samples, remedy)


def why_a_lane_is_bare(
    chosen: NDArray[np.bool_], files: list[int], num_lanes: int, samples: str, remedy: str
) -> str | None:
    """That a lane of stage 3 has none of the samples it learns from and what to do, or None where each has some.

    Args:
        chosen: Whether a sample is one of them, (N,).
        files: Rows of each shard file.
        num_lanes: G.
        samples: What they are.
        remedy: What brings more.
    """
    file_of = np.repeat(np.arange(len(files)), files)
    if np.bincount(file_of[chosen] % num_lanes, minlength=num_lanes).all():
        return None
    return (
        f"{int(chosen.sum())} {samples} leave one of joint.lanes={num_lanes} lanes without any; "
        f"{remedy}, or lower joint.lanes"
    )


def _disagreement(labelled: Artifact) -> Tensor:
    if mirror.exists(labelled.path / "disagreement.npy"):
        return torch.from_numpy(np.load(labelled.file("disagreement.npy")))
    return torch.full((len(np.load(labelled.file("assignments.npy"), mmap_mode="r")),), torch.nan)
