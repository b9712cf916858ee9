"""Finished runs without a pipeline: files as the stages would have left them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spice_ray.readers.parts import write_part
from spice_ray.storage import publish, write_json

NUM_IMAGES, SIZE = 40, 8
HEADS = {"chosen": 1, "num_merged": 1, "losses": [1.9, 1.5], "losses_over_time": [[2.0, 1.9], [1.75, 1.5]]}


def make_run(
    folder: Path,
    *,
    classes: list[int | None] | None = None,
    clusters: list[int] | None = None,
    head_clusters: list[int] | None = None,
    splits: list[str] | None = None,
    reliable: list[bool | None] | None = None,
    protocol: str = "whole",
    num_clusters: int = 2,
) -> Path:
    """A finished run of 40 images in two classes, the even and the odd ones; perfect unless told otherwise."""
    truth = np.arange(NUM_IMAGES) % 2
    classes = truth.tolist() if classes is None else classes
    clusters = (1 - truth).tolist() if clusters is None else clusters
    head_clusters = clusters if head_clusters is None else head_clusters
    splits = ["train"] * NUM_IMAGES if splits is None else splits
    reliable = [True] * NUM_IMAGES if reliable is None else reliable
    data, artifacts = folder / "data", folder / "run" / "artifacts"
    publish(data, "shards", "a", lambda to: write_shards(to, splits))
    publish(data, "labels", "b", lambda to: write_labels(to, classes))
    publish(artifacts, "embedding", "c", write_embedding)
    publish(artifacts, "heads", "d", lambda to: save(to / "assignments.npy", np.asarray(head_clusters)) | HEADS)
    publish(artifacts, "neighbors", "g", lambda to: save(to / "neighbors.npy", nearest_by_number(splits, protocol)))
    publish(artifacts, "assignments", "e", lambda to: {"unsupervised_loss": 1.75})
    pseudo_labels = pa.table({"labels": head_clusters})
    publish(artifacts, "reliable", "f", lambda to: write_table(to / "reliable.parquet", pseudo_labels))
    table = {
        "sample_id": np.arange(NUM_IMAGES)[::-1],
        "source": [f"{i}.png" for i in range(NUM_IMAGES)][::-1],
        "split": splits[::-1],
        "cluster": pa.array(clusters[::-1], pa.int32()),
        "confidence": np.ones(NUM_IMAGES, np.float32),
        "consistency": np.ones(NUM_IMAGES),
        "reliable": reliable[::-1],
    }
    pq.write_table(pa.table(table), folder / "run" / "assignments.parquet")
    prints = {"shards": "a", "labels": "b", "embedding": "c", "heads": "d", "reliable": "f"}
    prints |= {"joint": None, "assignments": "e", "neighbors": "g"}
    recipe = {"num_clusters": num_clusters, "seed": 3, "protocol": protocol, "image": {"size": SIZE}, "reliable": {}}
    record = {"artifacts": prints, "shards_root": "../data", "recipe": recipe, "source": {"path": "<photos>"}}
    write_json(folder / "run" / "run.json", record)
    write_json(folder / "run" / "timing.json", {"pretrain": 1.5, "heads": 0.5})
    return folder / "run"


def save(file: Path, array: Any) -> dict[str, Any]:
    np.save(file, array)
    return {}


def write_table(file: Path, table: pa.Table) -> dict[str, Any]:
    pq.write_table(table, file)
    return {}


def write_shards(to: Path, splits: list[str]) -> dict[str, Any]:
    """Two files of unequal length and an empty one; odd images have a bright lower half, even ones an upper."""
    rng = np.random.default_rng(0)
    is_lower = np.arange(3 * SIZE**2) // (SIZE**2 // 2) % 2
    is_bright = is_lower == np.arange(NUM_IMAGES)[:, None] % 2
    images = rng.integers(0, 40, (NUM_IMAGES, 3 * SIZE**2), np.uint8) + 200 * is_bright
    column = pa.array([row.astype(np.uint8).tobytes() for row in images], pa.binary(3 * SIZE**2))
    table = pa.table({"sample_id": np.arange(NUM_IMAGES), "split": splits, "image": column})
    bounds = {"part-00000.parquet": (0, 27), "part-00001.parquet": (27, 27), "part-00002.parquet": (27, NUM_IMAGES)}
    files = [
        {
            "name": name,
            "rows": last - first,
            "splits": {},
            "crc32": write_part(to / name, table.slice(first, last - first)),
        }
        for name, (first, last) in bounds.items()
    ]
    return {
        "num_images": NUM_IMAGES,
        "image_size": SIZE,
        "stored": "pixels",
        "files": files,
        "num_rejects": 3,
        "num_copies": 4,
    }


def write_labels(to: Path, classes: list[int | None]) -> dict[str, Any]:
    known = [(i, label) for i, label in enumerate(classes) if label is not None]
    ids, labels = [i for i, _ in known], [label for _, label in known]
    columns = {"sample_id": pa.array(ids, pa.int64()), "label": pa.array(labels, pa.int64())}
    pq.write_table(pa.table({**columns, "name": [str(label) for label in labels]}), to / "labels.parquet")
    return {"shards": "a", "num_labels": len(known)}


def write_embedding(to: Path) -> dict[str, Any]:
    """Unit rows that k-means splits into the two classes, and the longer ones that they come from."""
    angle = np.arange(NUM_IMAGES) % 2 * 1.5 + np.linspace(0, 0.1, NUM_IMAGES)
    embedding = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    np.save(to / "plain.npy", 3 * embedding)
    return save(to / "embedding.npy", embedding)


def nearest_by_number(splits: list[str], protocol: str) -> np.ndarray:
    """The two that follow each image that is trained on, around in a circle: one of another class, one of its own."""
    counted = sum(protocol == "whole" or split == "train" for split in splits)
    return (np.arange(counted, dtype=np.int32)[:, None] + [1, 2]) % counted


def change_record(run: Path, **values: Any) -> None:
    record = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**record, **values})
