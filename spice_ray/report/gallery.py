"""Example images of every cluster, from the first files of the shards: their order is shuffled, so these are a sample.

Shapes: n images in the sample, S side of an image in pixels.
"""

import base64
import io
from html import escape
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from spice_ray.contracts import ShardFile
from spice_ray.errors import DamagedError
from spice_ray.mirror import shown
from spice_ray.readers.parts import format_of, images_of, read_part
from spice_ray.storage import Artifact

_SAMPLE_ROWS = 20_000
_SAMPLE_BYTES = 512 << 20
"""Of decoded images; at least one file is looked at."""
_MOST_PICTURES = 2_000
_MOST_OF_CLUSTER = 8
_SIDE = 96
"""Pixels of a picture, at most; those of at most 64 are stored without loss."""

Ints = NDArray[np.int64]


class Example(NamedTuple):
    """An image of a cluster."""

    sample_id: int
    source: str
    confidence: float


class Examples(NamedTuple):
    """Those of a cluster in which the classifier trusts most, the surest first, and least, the most doubtful first."""

    sure: list[Example]
    unsure: list[Example]


def choose_examples(assignments: pa.Table, shards: Artifact, num_clusters: int) -> list[Examples]:
    """The examples of each cluster, of images in the first files of the shards.

    Args:
        assignments: Of a run: ``sample_id``, ``source``, ``cluster`` and ``confidence``.
        shards: Where its images are.
        num_clusters: K.
    """
    ids = assignments["sample_id"].to_numpy()
    position = np.flatnonzero(ids < _sample_rows(shards))
    clusters, confidences = (assignments[name].to_numpy()[position] for name in ("cluster", "confidence"))
    # Equally sure ones in the shuffled order.
    order = np.lexsort((ids[position], -confidences))
    most = max(1, min(_MOST_OF_CLUSTER, _MOST_PICTURES // (2 * num_clusters)))
    found = []
    for cluster in range(num_clusters):
        own = position[order[clusters[order] == cluster]]
        count = min(most, (len(own) + 1) // 2)
        unsure = own[len(own) - min(most, len(own) // 2) :][::-1]
        found.append(Examples(_examples(assignments, own[:count]), _examples(assignments, unsure)))
    return found


def read_pictures(shards: Artifact, ids: Ints) -> dict[int, str]:
    """Small pictures of images as URLs that hold them; those of damaged files are left out.

    Args:
        shards: Of images.
        ids: Their sample ids.
    """
    format_, pictures, first = format_of(shards.manifest), dict[int, str](), 0
    for part in shards.manifest["files"]:
        file = ShardFile(part["name"], first, part["rows"], part["rows"], part["crc32"])
        own = np.sort(ids[(ids >= first) & (ids < first + file.rows)])
        first += file.rows
        if len(own):
            try:
                images = images_of(read_part(shards.path, file, format_, own - file.first_id), format_.size)
            except DamagedError:
                continue
            pictures |= {int(id_): _url_of(image) for id_, image in zip(own, images, strict=True)}
    return pictures


def show_example(example: Example, pictures: dict[int, str]) -> str:
    """An example as HTML: its picture, where there is one, with its source and confidence; else these as text."""
    told = f"{shown(example.source)} ({example.confidence:.3f})"
    picture = pictures.get(example.sample_id)
    return f"<div>{escape(told)}</div>" if picture is None else f'<img src="{picture}" alt="" title="{escape(told)}">'


def _sample_rows(shards: Artifact) -> int:
    """Rows of the first files that are looked at."""
    wanted = min(_SAMPLE_ROWS, _SAMPLE_BYTES // format_of(shards.manifest).row_bytes)
    total = 0
    for part in shards.manifest["files"]:
        if total and total + part["rows"] > wanted:
            break
        total += part["rows"]
    return total


def _examples(assignments: pa.Table, positions: Ints) -> list[Example]:
    rows = assignments.select(["sample_id", "source", "confidence"]).take(positions).to_pylist()
    return [Example(**row) for row in rows]


def _url_of(image: NDArray[np.uint8]) -> str:
    """A picture of an image, uint8 RGB, (3, S, S)."""
    picture, file = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), io.BytesIO()
    picture.thumbnail((_SIDE, _SIDE))
    kind = "png" if max(image.shape) <= 64 else "jpeg"
    picture.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
