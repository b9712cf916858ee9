"""The clusters' shares where the recipe has them estimated: an artifact before the heads, made by the driver."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_ray.config import Recipe
from spice_ray.contracts import PRIOR
from spice_ray.core.cluster_count import sample_ids
from spice_ray.core.cluster_shares import estimate_sizes
from spice_ray.storage import Artifact, publish, write_json

SHARES = "prior.json"


def publish_prior(
    root: Path, print_: str, recipe: Recipe, embedding: Artifact, train_ids: NDArray[np.int64]
) -> Artifact:
    """Estimate the shares of K clusters by rows of the embedding, and publish them, the largest first."""
    embeddings = np.load(embedding.file("embedding.npy"), mmap_mode="r")
    ids = sample_ids(train_ids, recipe.seed)
    sizes = estimate_sizes(embeddings[ids], recipe.num_clusters)
    record = {"shares": (sizes / sizes.sum()).tolist(), "sizes": sizes.tolist(), "num_rows": len(ids)}

    def write(folder: Path) -> dict[str, Any]:
        write_json(folder / SHARES, record)
        return record

    return publish(root, PRIOR, print_, write)


def describe_prior(prior: Artifact) -> str:
    """How unlike the shares are, and where all of them can be read."""
    shares, num_rows = prior.manifest["shares"], prior.manifest["num_rows"]
    return (
        f"the {len(shares)} clusters are estimated to have between {shares[-1]:.2%} and {shares[0]:.2%} of the images, "
        f"by {num_rows} of them; {SHARES} has all shares"
    )
