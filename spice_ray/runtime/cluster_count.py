"""K where the recipe leaves it open: an artifact between the embedding and the heads, made by the driver."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_ray.config import Recipe
from spice_ray.contracts import CLUSTER_COUNT
from spice_ray.core.cluster_count import ranked, sample_ids, score_counts
from spice_ray.storage import Artifact, publish, write_json

TABLE = "cluster_count.json"
_DIGITS = 6


def publish_cluster_count(
    root: Path, print_: str, recipe: Recipe, embedding: Artifact, train_ids: NDArray[np.int64]
) -> Artifact:
    """Choose K by rows of the embedding, and publish it with the scores of all candidates."""
    assert recipe.min_clusters is not None
    embeddings = np.load(embedding.file("embedding.npy"), mmap_mode="r")
    ids = sample_ids(train_ids, recipe.seed)
    candidates = score_counts(embeddings[ids], recipe.min_clusters, recipe.num_clusters)
    best, *others = ranked(candidates)
    record = {
        "num_clusters": best.num_clusters,
        "runner_up": others[0].num_clusters if others else None,
        "num_rows": len(ids),
        "candidates": [_rounded(candidate._asdict()) for candidate in candidates],
    }

    def write(folder: Path) -> dict[str, Any]:
        write_json(folder / TABLE, record)
        return record

    return publish(root, CLUSTER_COUNT, print_, write)


def describe(count: Artifact, asked: str) -> str:
    """Which K was chosen out of ``asked``, and what came second."""
    scores = {row["num_clusters"]: row["score"] for row in count.manifest["candidates"]}
    chosen, second = count.manifest["num_clusters"], count.manifest["runner_up"]
    sentence = (
        f"{chosen} clusters are chosen out of {asked}, by the eigengap times the silhouette: {scores[chosen]:.4f}"
    )
    if second is not None:
        sentence += f", then {second} with {scores[second]:.4f}"
    return f"{sentence}; {TABLE} has all candidates"


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, _DIGITS) if isinstance(value, float) else value for name, value in values.items()}
