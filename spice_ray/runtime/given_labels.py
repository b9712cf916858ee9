"""Labels that a user gives, as an artifact in the place of reliable pseudo-labels."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from spice_ray.contracts import RELIABLE
from spice_ray.core.consensus import align
from spice_ray.errors import DataError
from spice_ray.readers.given_labels import GivenLabels
from spice_ray.readers.parts import read_column
from spice_ray.runtime.data import Shards
from spice_ray.runtime.reliable import ReliableTable, write_reliable
from spice_ray.storage import Artifact, publish

Ints = NDArray[np.int64]
UNKNOWN = -1


class MatchedLabels(NamedTuple):
    """Given labels by image of the run."""

    labels: Ints
    """(N,); -1 where none is given."""
    known: NDArray[np.bool_]
    """Which of them stage 3 may learn from, (N,)."""
    left_out: int
    """How many it may not."""
    num_train: int
    """Images that it may train on."""


def match_given_labels(given: GivenLabels, shards: Shards, train_ids: Ints) -> MatchedLabels:
    """Find the images of given labels.

    Args:
        given: The labels.
        shards: The run's.
        train_ids: Rows that may be trained on; labels of others are left out.

    Raises:
        DataError: A label is of no image of the run, or fewer than two labels are left.
    """
    labels = labels_by_id(given, shards)
    known = np.zeros(shards.num_rows, np.bool_)
    known[train_ids] = True
    known &= labels != UNKNOWN
    different = len(np.unique(labels[known]))
    if different < 2:
        raise DataError(
            f"{given.file} labels {known.sum()} of the images that stage 3 may train on, with "
            f"{different} different labels, and 2 are needed; label images of the train split"
        )
    return MatchedLabels(labels, known, len(given.labels) - int(known.sum()), len(train_ids))


def publish_given_labels(
    root: Path, print_: str, matched: MatchedLabels, num_clusters: int, heads: Artifact | None
) -> Artifact:
    """Publish given labels with weight 1 each.

    Args:
        root: The run's folder of artifacts.
        print_: The artifact's fingerprint.
        matched: The labels.
        num_clusters: K.
        heads: The heads that stage 3 goes on from; None: it starts anew.
    """
    labels, known = matched.labels, matched.known

    def write(folder: Path) -> dict[str, Any]:
        unknown = torch.full((len(labels),), torch.nan)
        weights = torch.from_numpy(known).float()
        write_reliable(folder, ReliableTable(torch.from_numpy(labels), unknown.double(), weights, unknown))
        return {
            "given": int(known.sum()),
            "left_out": matched.left_out,
            "kept": np.bincount(labels[known], minlength=num_clusters).tolist(),
            "num_train": matched.num_train,
            "columns": None if heads is None else _columns(heads, labels, known, num_clusters).tolist(),
        }

    return publish(root, RELIABLE, print_, write)


def labels_by_id(given: GivenLabels, shards: Shards) -> Ints:
    """The label of each row of the shards, int64, (N,); -1 where none is given.

    Raises:
        DataError: A label is of no image of the run. Which images damaged files hold is not known: with these left out,
            none is asked for.
    """
    labels = np.full(shards.num_rows, UNKNOWN)
    if given.by_source:
        found = _rows_of(given.images.combine_chunks(), shards)
    else:
        ids = given.images.to_numpy()
        found = np.where((ids >= 0) & (ids < shards.num_rows), ids, UNKNOWN)
    missing = np.flatnonzero(found == UNKNOWN)
    if len(missing) and not shards.damaged:
        raise DataError(
            f"{len(missing)} of the {len(found)} images that {given.file} labels are none of this run, such as "
            f"{given.images[int(missing[0])].as_py()}; name them as assignments.parquet does"
        )
    labels[found[found != UNKNOWN]] = given.labels[found != UNKNOWN]
    return labels


def _rows_of(sources: pa.Array, shards: Shards) -> Ints:
    """The row of each source, -1 where there is none; one file's sources are in memory at a time."""
    found = np.full(len(sources), UNKNOWN)
    for file in shards.readable:
        places = pc.index_in(read_column(shards.path, file, "source"), value_set=sources)
        rows, places = np.flatnonzero(places.is_valid().to_numpy()), places.drop_null().to_numpy()
        twice = places[(np.bincount(places, minlength=len(found))[places] > 1) | (found[places] != UNKNOWN)]
        if len(twice):
            raise DataError(
                f"several images are called {sources[int(twice[0])].as_py()}, and a label cannot tell them apart; name "
                "the images by their sample_id"
            )
        found[places] = file.first_id + rows
    return found


def _columns(heads: Artifact, labels: Ints, known: NDArray[np.bool_], num_clusters: int) -> Ints:
    """Which column of the heads has each label: the matching under which most given labels are right."""
    clusters = np.load(heads.file("assignments.npy"), mmap_mode="r")
    return np.argsort(align(labels[known], np.asarray(clusters[known]), num_clusters))
