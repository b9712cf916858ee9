"""The report of a finished run: what its clusters are and how far to trust them, told without labels.

Shapes: N images, of which T may be trained on, K clusters, k neighbours.
"""

import csv
import json
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spice_ray import mirror
from spice_ray.contracts import ASSIGNMENTS, HEADS, NEIGHBORS, RELIABLE, SHARDS
from spice_ray.core.unsupervised_loss import merged_loss, perfect_loss
from spice_ray.errors import StorageError
from spice_ray.report.gallery import Examples, choose_examples, read_pictures, show_example
from spice_ray.report.page import table, write_page
from spice_ray.report.plots import Line, Mark, line_chart
from spice_ray.run_folder import open_made, read_finished
from spice_ray.shards import splits_of
from spice_ray.storage import Artifact, read_json

FILE = "clusters.html"
_NEIGHBORS = 20
"""Of each image, whose clusters are looked at."""
_BLOCK_ROWS = 1 << 16

Ints = NDArray[np.int64]


class Clusters(NamedTuple):
    """What is known of each cluster, K numbers each; NaN where it has no such image."""

    sizes: Ints
    reliable: Ints
    """Images that stage 3 learnt the labels of; of embeddings those that would be."""
    confidence: NDArray[np.float64]
    """Mean probability that the classifier gives the cluster."""
    agreement: NDArray[np.float64]
    """Mean share of an image's nearest neighbours, in the frozen embedding, that are in the cluster too."""


def write_run_report(run: Path) -> Path:
    """Write ``clusters.html`` into the folder of a finished run, or of the winner of a sweep; gives its path.

    Raises:
        StorageError: The run is missing, unfinished or damaged, or the disk refused.
    """
    record = read_finished(run)
    file = run / "assignments.parquet"
    try:
        assignments = pq.read_table(mirror.local(file))
    except (OSError, pa.ArrowException):
        raise StorageError(f"{file} is missing or damaged; delete it and run the same command again") from None
    shards, num_clusters = open_made(run, record, SHARDS), record["recipe"]["num_clusters"]
    examples = choose_examples(assignments, shards, num_clusters)
    body = [
        f"<h1>{assignments.num_rows} {_unit(record)} in {num_clusters} clusters</h1>",
        f"<p>{escape(mirror.shown(record['source']['path']))}; no label has any part in this.</p>",
        _trust(run, record, assignments),
        _table(_clusters_of(run, record, assignments)),
        _gallery(examples, shards, record),
        _heads(run, record),
        _counts(run),
        _training(run),
        _made(run, record, shards),
    ]
    write_page(run / FILE, f"{num_clusters} clusters", "\n".join(part for part in body if part))
    return run / FILE


def _clusters_of(run: Path, record: dict[str, Any], assignments: pa.Table) -> Clusters:
    count, clusters = record["recipe"]["num_clusters"], assignments["cluster"].to_numpy()
    sizes = np.bincount(clusters, minlength=count)
    reliable = np.bincount(clusters[assignments["reliable"].to_numpy()], minlength=count)
    agreement = np.full(count, np.nan)
    # Of a further round of stage 3 they are neighbours in its own features, which say nothing of it.
    if NEIGHBORS in record["artifacts"] and record["recipe"].get("joint", {}).get("rounds", 1) == 1:
        own = _trained_on(record, assignments)
        nearest = np.load(open_made(run, record, NEIGHBORS).file("neighbors.npy"), mmap_mode="r")
        agreement = _means(own, agreement_of(own, nearest[:, :_NEIGHBORS]), count)
    return Clusters(sizes, reliable, _means(clusters, assignments["confidence"].to_numpy(), count), agreement)


def agreement_of(clusters: Ints, nearest: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """The share of each image's neighbours that are in its cluster, (T,).

    Args:
        clusters: Of each image, int64, (T,).
        nearest: Numbers of its neighbours among these, (T, k).
    """
    found = np.empty(len(clusters))
    for first in range(0, len(clusters), _BLOCK_ROWS):
        rows = slice(first, first + _BLOCK_ROWS)
        found[rows] = (clusters[nearest[rows]] == clusters[rows, None]).mean(axis=1)
    return found


def _trained_on(record: dict[str, Any], assignments: pa.Table) -> Ints:
    """The clusters of the images that neighbours were looked for among, by rising sample id."""
    splits = splits_of(record["recipe"]["protocol"], first_stage=False) or ()
    ids, clusters = assignments["sample_id"].to_numpy(), assignments["cluster"].to_numpy()
    counted = np.isin(assignments["split"].to_numpy(zero_copy_only=False), splits)
    return np.asarray(clusters[counted][ids[counted].argsort()])


def _means(clusters: Ints, values: NDArray[np.floating[Any]], count: int) -> NDArray[np.float64]:
    sizes = np.bincount(clusters, minlength=count)
    sums = np.bincount(clusters, weights=values, minlength=count)
    found: NDArray[np.float64] = np.divide(sums, sizes, out=np.full(count, np.nan), where=sizes > 0)
    return found


def _trust(run: Path, record: dict[str, Any], assignments: pa.Table) -> str:
    """The few numbers of the whole."""
    count = record["recipe"]["num_clusters"]
    loss = open_made(run, record, ASSIGNMENTS).manifest["unsupervised_loss"]
    kept = int(np.count_nonzero(assignments["reliable"].to_numpy()))
    asked = open_made(run, record, RELIABLE).manifest.get("num_train", assignments.num_rows)
    told = [
        f"Unsupervised loss of the result: {loss:.4f}. Perfect, equally large clusters have {perfect_loss(count):.4f}; "
        f"a classifier that is certain, but has merged two of them, {merged_loss(count):.4f}.",
        f"Reliable samples: {kept} of {asked} ({kept / asked:.1%}).",
    ]
    if HEADS in record["artifacts"]:
        heads = open_made(run, record, HEADS).manifest
        told.append(
            f"Heads: {len(heads['losses'])}, of which {heads['num_merged']} have merged clusters or are unsure of as "
            f"much; the least of their losses is {min(heads['losses']):.4f}."
        )
    return "<ul>" + "".join(f"<li>{sentence}</li>" for sentence in told) + "</ul>"


def _table(clusters: Clusters) -> str:
    total = max(1, int(clusters.sizes.sum()))
    rows = (
        [cluster, size, f"{size / total:.1%}", reliable, _number(confidence), _number(agreement)]
        for cluster, (size, reliable, confidence, agreement) in enumerate(zip(*clusters, strict=True))
    )
    header = ["cluster", "images", "share", "reliable", "confidence", "neighbours"]
    return f"""<h2>Clusters</h2>
{table(header, rows, noted=False)}
<p>confidence: the mean probability that the classifier gives the cluster of an image. neighbours: the mean share of its
{_NEIGHBORS} nearest neighbours in the frozen embedding that are in the cluster too: where it is low, the cluster does
not stand apart.</p>"""


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def _gallery(examples: list[Examples], shards: Artifact, record: dict[str, Any]) -> str:
    chosen = [example.sample_id for found in examples for example in (*found.sure, *found.unsure)]
    has_images = "image" in record["recipe"]
    pictures = read_pictures(shards, np.array(chosen, np.int64)) if has_images else {}
    parts = []
    for cluster, found in enumerate(examples):
        sure, unsure = ("".join(show_example(example, pictures) for example in side) for side in found)
        parts.append(
            f'<h3>Cluster {cluster}</h3><div class="pair"><div><p>surest</p>{sure}</div>'
            f"<div><p>most doubtful</p>{unsure}</div></div>"
        )
    return f"""<h2>Examples</h2>
<p>Those in which the classifier trusts most and least, among the first images of the shuffled order, a random sample;
point at one to see where it came from.</p>
{"".join(parts)}"""


def _heads(run: Path, record: dict[str, Any]) -> str:
    """The losses of all heads over the epochs of stage 2, as in the paper's Fig. 6."""
    if HEADS not in record["artifacts"]:
        return ""
    heads, count = open_made(run, record, HEADS).manifest, record["recipe"]["num_clusters"]
    lines = [
        Line([(epoch, loss) for epoch, loss in enumerate(losses, 1) if loss is not None], number == heads["chosen"])
        for number, losses in enumerate(heads["losses_over_time"])
    ]
    marks = [Mark(perfect_loss(count), "perfect clusters"), Mark(merged_loss(count), "two clusters merged")]
    chart = line_chart("epoch of stage 2", "unsupervised loss", lines, marks)
    return f"""<h2>Heads</h2>
<figure>{chart}<figcaption>The unsupervised loss of each head; of the chosen one in red.</figcaption></figure>"""


def _counts(run: Path) -> str:
    """The candidates for K, where it was chosen."""
    file = run / "cluster_count.json"
    if not mirror.exists(file):
        return ""
    found = read_json(file)
    points = [(row["num_clusters"], row["score"]) for row in found["candidates"]]
    chart = line_chart("clusters", "eigengap times silhouette", [Line(points, True)], [])
    return f"""<h2>Number of clusters</h2>
<figure>{chart}<figcaption>{found["num_clusters"]} were chosen; groups of groups have more than one good answer.
</figcaption></figure>"""


def _training(run: Path) -> str:
    """The signs of stage 1 at the end of each epoch, where its progress is still there."""
    file = run / "progress" / "encoder" / "health.csv"
    if not mirror.exists(file):
        return ""
    rows = list(csv.DictReader(mirror.read_bytes(file).decode().splitlines()))
    if not rows:
        return ""
    chart = line_chart(
        "epoch of stage 1", "loss", [Line([(int(row["epoch"]), float(row["loss"])) for row in rows])], []
    )
    signs = ", ".join(f"{name.replace('_', ' ')} {rows[-1][name]}" for name in list(rows[-1])[2:])
    return f"<h2>Stage 1</h2><figure>{chart}<figcaption>In the end: {escape(signs)}.</figcaption></figure>"


def _made(run: Path, record: dict[str, Any], shards: Artifact) -> str:
    seconds = [[f"{value:.1f}", stage] for stage, value in read_json(run / "timing.json").items()]
    rejects, copies = shards.manifest["num_rejects"], shards.manifest.get("num_copies")
    copied = "" if copies is None else f"; {copies} are copies of others"  # shards of before do not say
    settings = escape(json.dumps(record["recipe"], indent=1))
    return f"""<h2>How it was made</h2>
<p>{rejects} {_unit(record)} could not be read (rejects.parquet){copied}.</p>
{table(["seconds", "stage"], seconds)}
<details><summary>Settings</summary><pre>{settings}</pre></details>"""


def _unit(record: dict[str, Any]) -> str:
    return "images" if "image" in record["recipe"] else "embeddings"
