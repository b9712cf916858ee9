"""Scores of a finished run against ground truth, which nothing else reads.

Shapes: n scored images, K clusters, S side of an image in pixels, D embedding width.
SciPy and scikit-learn are imported where they are used: they take seconds, and a wrong path is refused faster.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spice_ray.contracts import EMBEDDING, HEADS, LABELS, RELIABLE, SHARDS, ShardFile
from spice_ray.core.metrics import clustering_accuracy, kmeans_labels, scores
from spice_ray.errors import DataError, StorageError
from spice_ray.mirror import local
from spice_ray.readers.parts import format_of, images_of, read_part
from spice_ray.run_folder import open_made, read_finished
from spice_ray.shards import splits_of
from spice_ray.storage import Artifact, read_json, write_json

_LARGEST_FEATURES = 2e9  # bytes
_UNLABELLED = -1

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def evaluate(run: Path, *, probe: bool = False) -> dict[str, Any]:
    """Score a finished run against the labels of its data, beside k-means, and write ``run/scores.json``.

    Protocol ``whole`` scores all labelled images, ``split`` those of the test split; images whose label stage 3 was
    given (``reliable.labels``) do not count. k-means is fitted on the scored images; its scores are null where these
    take more than 2e9 bytes as float32 or are fewer than the clusters. The
    reliable labels are scored on the labelled images that they could be chosen from: those that stage 3 sees.

    Args:
        run: Folder of a finished run, or of the winner of a sweep.
        probe: Also let classifiers learn from the labels, to see what the encoder knows of the classes.

    Returns:
        What is in ``scores.json``: the scores of the result (``acc``, ``nmi``, ``nmi_geometric``, ``ari``,
        ``many_to_one``, ``n``, ``k``), ``protocol``, ``rows`` (one per method), ``reliable`` (``count``, ``share``,
        ``acc``), ``seconds`` per stage and ``artifacts``; with ``probe``, and only then, also ``probe``: one row per
        classifier, as :func:`spice_ray.probe.knn_row` gives them.

    Raises:
        DataError: The data had no labels, or none for an image that counts.
        StorageError: The run is missing, unfinished or damaged.
    """
    record = read_finished(run)
    if record["artifacts"][LABELS] is None:
        raise DataError(
            f"the data of {run} had no labels, so there is nothing to score; what can be told without them is in its "
            "clusters.html, which the command report writes"
        )
    images = _read_images(run, record)
    recipe = record["recipe"]
    scored = _labelled(images) & _in_splits(images, recipe["protocol"], ("test",))
    if _were_given(record) and scored.any():
        scored &= ~images.reliable  # what it was told says nothing of what it learnt
        if not scored.any():
            raise DataError(
                f"every labelled image of {run} that protocol={recipe['protocol']} scores was given to stage 3, so "
                "there is nothing to score; hold some labels back, or use protocol=split"
            )
    if not scored.any():
        raise DataError(
            f"no image of {run} that protocol={recipe['protocol']} scores has a label, so there is nothing to score; "
            "whole scores all images and split those of the test split"
        )
    result = asdict(scores(images.labels_true[scored], images.clusters[scored])) | {
        "protocol": recipe["protocol"],
        "rows": _compare(run, record, images, np.flatnonzero(scored)),
        "reliable": _score_reliable(images, record),
        "seconds": read_json(run / "timing.json"),
        "artifacts": record["artifacts"],
    }
    if probe:
        result["probe"] = _probe(run, record, images)
    write_json(run / "scores.json", result)
    return result


@dataclass(frozen=True)
class _Images:
    """One entry per image, in sample_id order."""

    split: NDArray[np.str_]
    clusters: Ints  # -1: not read, its shard file is damaged
    head_clusters: Ints | None
    """None where there were no heads: stage 3 alone learnt from labels that were given."""
    reliable: NDArray[np.bool_]
    pseudo_labels: Ints
    """What stage 3 learns from, where they are reliable: the chosen head's, or its own of the round before."""
    labels_true: Ints  # -1: not labelled


def _labelled(images: _Images) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (images.labels_true != _UNLABELLED) & (images.clusters >= 0)
    return found


def _in_splits(images: _Images, protocol: str, splits: tuple[str, ...]) -> NDArray[np.bool_]:
    return np.isin(images.split, splits) if protocol == "split" else np.ones(len(images.split), np.bool_)


def _compare(run: Path, record: dict[str, Any], images: _Images, ids: Ints) -> list[dict[str, Any]]:
    """The table of methods on the images ``ids``."""
    shards, recipe = open_made(run, record, SHARDS), record["recipe"]
    found: dict[str, Ints | None] = {}
    # Embeddings that were given have no pixels and no stage 3.
    if "image" in recipe:
        found["k-means on pixels"] = _baseline(lambda: _read_pixels(shards, ids), len(ids), _num_pixels(shards), recipe)
    if EMBEDDING in record["artifacts"]:
        embedding = _load(open_made(run, record, EMBEDDING), "embedding.npy", len(images.clusters))
        found["k-means on the embedding"] = _baseline(lambda: embedding[ids], len(ids), embedding.shape[1], recipe)
    if images.head_clusters is not None:
        found["SPICE_s"] = images.head_clusters[ids]
    if "image" in recipe:
        found["labels given" if _were_given(record) else "SPICE"] = images.clusters[ids]
    return [_row(method, images.labels_true[ids], labels) for method, labels in found.items()]


def _row(method: str, labels_true: Ints, labels_pred: Ints | None) -> dict[str, Any]:
    found = {} if labels_pred is None else asdict(scores(labels_true, labels_pred))
    return {"method": method, **{name: found.get(name) for name in ("acc", "nmi", "ari")}}


def _baseline(read: Callable[[], Floats], n: int, width: int, recipe: dict[str, Any]) -> Ints | None:
    """The clusters of k-means on what ``read`` gives, (n, width); None where that is too large or n is below K."""
    if not _fits(n, width) or n < recipe["num_clusters"]:
        return None
    return kmeans_labels(read(), recipe["num_clusters"], recipe["seed"])


def _fits(n: int, width: int) -> bool:
    return 4 * n * width <= _LARGEST_FEATURES


def _probe(run: Path, record: dict[str, Any], images: _Images) -> list[dict[str, Any]]:
    """The table of classifiers on all labelled images, whatever the protocol."""
    from sklearn.preprocessing import normalize

    from spice_ray.probe import Labelled, Read, knn_row, linear_row

    if EMBEDDING not in record["artifacts"]:
        raise DataError(f"{run} has no embedding to look into: it learnt from given labels alone; leave --probe out")
    shards, store, num_images = open_made(run, record, SHARDS), open_made(run, record, EMBEDDING), len(images.clusters)
    ids = np.flatnonzero(_labelled(images))
    labelled = Labelled(ids, images.labels_true[ids], images.split[ids] == "test")

    def stored(name: str) -> Read | None:
        rows = _load(store, name, num_images)
        return (lambda ids: rows[ids]) if _fits(len(ids), rows.shape[1]) else None

    found = []
    if "image" in record["recipe"]:
        fits = _fits(len(ids), _num_pixels(shards))
        pixels = (lambda ids: normalize(_read_pixels(shards, ids), copy=False)) if fits else None
        found.append(knn_row("k-NN on pixels", labelled, pixels))
    found.append(knn_row("k-NN on the embedding", labelled, stored("embedding.npy")))
    # What the heads see. The length of a row, which the embedding lacks, is theirs to use.
    return [*found, linear_row("linear probe", labelled, stored("plain.npy"))]


def _were_given(record: dict[str, Any]) -> bool:
    """Whether stage 3 learnt from given labels."""
    return record["recipe"]["reliable"].get("labels") is not None


def _score_reliable(images: _Images, record: dict[str, Any]) -> dict[str, Any]:
    splits = splits_of(record["recipe"]["protocol"], first_stage=False) or ()
    candidates = _labelled(images) & np.isin(images.split, splits)
    chosen = candidates & images.reliable
    count = int(chosen.sum())
    return {
        "count": count,
        "share": count / int(candidates.sum()) if candidates.any() else None,
        # Labels that were given are the user's affair.
        "acc": None
        if _were_given(record) or not count
        else clustering_accuracy(images.labels_true[chosen], images.pseudo_labels[chosen]),
    }


def _read_images(run: Path, record: dict[str, Any]) -> _Images:
    file, shards = run / "assignments.parquet", open_made(run, record, SHARDS)
    num_images = int(shards.manifest["num_images"])
    with _reading(file, file):
        table = pq.read_table(local(file), columns=["sample_id", "split", "cluster", "reliable"])
    ids = table["sample_id"].to_numpy()
    if not np.array_equal(np.sort(ids), _readable_ids(shards, record.get("damaged", []))):
        raise StorageError(f"{file} does not list every image once; {_again(file)}")
    images = _Images(
        split=np.full(num_images, "", "<U16"),
        clusters=np.full(num_images, -1),
        head_clusters=_head_clusters(run, record, num_images),
        reliable=np.zeros(num_images, np.bool_),
        pseudo_labels=_read_pseudo_labels(open_made(run, record, RELIABLE), num_images),
        labels_true=_read_labels(open_made(run, record, LABELS), num_images),
    )
    images.split[ids] = table["split"].to_pylist()
    images.clusters[ids] = table["cluster"].to_numpy()
    images.reliable[ids] = [value is True for value in table["reliable"].to_pylist()]
    return images


def _head_clusters(run: Path, record: dict[str, Any], num_images: int) -> Ints | None:
    if HEADS not in record["artifacts"]:
        return None
    return _load(open_made(run, record, HEADS), "assignments.npy", num_images).astype(np.int64)


def _readable_ids(shards: Artifact, damaged: list[str]) -> Ints:
    """Sample ids of all files but the damaged ones, which the run left out."""
    left_out = [[part["name"] in damaged] * part["rows"] for part in shards.manifest["files"]]
    return np.flatnonzero(~np.concatenate([np.asarray(part, np.bool_) for part in left_out]))


def _read_labels(artifact: Artifact, num_images: int) -> Ints:
    """Class of each image, -1 where it has none, (num_images,)."""
    file = artifact.file("labels.parquet")
    with _reading(file, artifact.path):
        table = pq.read_table(file, columns=["sample_id", "label"])
    ids = table["sample_id"].to_numpy()
    if not np.isin(ids, np.arange(num_images)).all():
        raise StorageError(f"{file} labels images beyond the {num_images} of the run; {_again(artifact.path)}")
    labels = np.full(num_images, _UNLABELLED, np.int64)
    labels[ids] = table["label"].to_numpy()
    return labels


def _read_pseudo_labels(artifact: Artifact, num_images: int) -> Ints:
    """What the reliable samples were chosen among, (num_images,)."""
    file = artifact.file("reliable.parquet")
    with _reading(file, artifact.path):
        labels: Ints = pq.read_table(file, columns=["labels"])["labels"].to_numpy()
    if len(labels) != num_images:
        raise StorageError(f"{file} has {len(labels)} rows for {num_images} images; {_again(artifact.path)}")
    return labels


def _num_pixels(shards: Artifact) -> int:
    return 3 * int(shards.manifest["image_size"]) ** 2


def _read_pixels(shards: Artifact, ids: Ints) -> Floats:
    """Pixels of the images ``ids``, which rise, in [0, 1], float32, (n, 3*S*S)."""
    pixels = np.empty((len(ids), _num_pixels(shards)), np.float32)
    format_, first = format_of(shards.manifest), 0
    for part in shards.manifest["files"]:
        file = ShardFile(part["name"], first, part["rows"], part["rows"], part["crc32"])
        rows = slice(*np.searchsorted(ids, [first, first + file.rows]))
        if rows.stop > rows.start:
            images = images_of(read_part(shards.path, file, format_), format_.size)
            np.divide(images.reshape(len(images), -1)[ids[rows] - first], 255, out=pixels[rows])
        first += file.rows
    return pixels


def _load(artifact: Artifact, name: str, num_images: int) -> NDArray[Any]:
    """A memory-mapped array of one row per image."""
    file = artifact.file(name)
    with _reading(file, artifact.path):
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    if len(array) != num_images:
        raise StorageError(f"{file} has {len(array)} rows for {num_images} images; {_again(artifact.path)}")
    return array


@contextmanager
def _reading(file: Path, made: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, pa.ArrowException):
        raise StorageError(f"{file} is missing or damaged; {_again(made)}") from None


def _again(made: Path) -> str:
    return f"delete {made} and run the same command again"
