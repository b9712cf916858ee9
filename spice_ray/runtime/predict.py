"""New images classified by a finished run: what stage 3 has learned, or the chosen head of a run on embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from spice_ray.config import ImageRecipe, Recipe
from spice_ray.contracts import HEADS, JOINT, PREDICTED
from spice_ray.readers.parts import read_part, vectors_of
from spice_ray.runtime.data import Shards
from spice_ray.runtime.embedding_pipeline import unit_rows
from spice_ray.runtime.inference import IDENTITY, Report, decide, predict_all
from spice_ray.runtime.weights import load_head
from spice_ray.storage import Artifact, fingerprint, open_artifact, publish


def publish_predicted(root: Path, recipe: Recipe, model: Artifact, shards: Shards, report: Report) -> Artifact:
    """One row for each image: who it is, its cluster and how sure the model is of it.

    Args:
        root: Where the artifact goes.
        recipe: That of the run which made the model.
        model: Its classifier, or the heads of a run on embeddings.
        shards: The new images, or embeddings of the same model.
        report: Hears how many rows of how many are done.
    """
    settings: dict[str, Any] = {"shards": shards.path.name}
    if shards.damaged:
        settings["damaged"] = sorted(shards.damaged)
    print_ = fingerprint(PREDICTED, settings, [model.fingerprint])
    found = open_artifact(root, PREDICTED, print_)
    if found is not None:
        return found

    def write(folder: Path) -> dict[str, Any]:
        if isinstance(recipe, ImageRecipe):
            assert model.kind == JOINT
            predicted = predict_all(folder / "pooled.npy", recipe, recipe.scale, model, shards, report)
            (folder / "pooled.npy").unlink()
            identity = pa.concat_tables(predicted.identity)
            clusters, confidences = (found[identity["sample_id"].to_numpy()] for found in decide(predicted.logits))
        else:
            assert model.kind == HEADS
            clusters, confidences, identity = _by_head(model, shards, report)
        columns = {"cluster": clusters, "confidence": confidences}
        table = pa.table({**{name: identity[name] for name in IDENTITY}, **columns})
        pq.write_table(table, folder / "assignments.parquet")
        sizes = np.bincount(columns["cluster"], minlength=recipe.num_clusters)
        return {"cluster_sizes": sizes.tolist()}

    return publish(root, PREDICTED, print_, write)


@torch.inference_mode()
def _by_head(
    heads: Artifact, shards: Shards, report: Report
) -> tuple[NDArray[np.int64], NDArray[np.float32], pa.Table]:
    head, total = load_head(heads), shards.num_rows
    found, identity = list[tuple[NDArray[np.int64], NDArray[np.float32]]](), list[pa.Table]()
    for file in shards.readable:
        table = read_part(shards.path, file, shards.format)
        # In half precision, as the heads learnt them.
        rows = (unit_rows(vectors_of(table)) * np.sqrt(shards.format.size)).astype(np.float16)
        found.append(decide(head(torch.from_numpy(rows).float()).numpy()))
        identity.append(table.select(IDENTITY))
        report(sum(map(len, identity)), total)
    clusters, confidences = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return clusters, confidences, pa.concat_tables(identity)
