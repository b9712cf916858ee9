"""Neighbours by inverted lists, and as many of them as each cluster's size allows."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from spice_ray import workflow
from spice_ray.recipe import load_recipe
from spice_ray.storage import read_json
from tests.end_to_end.small_runs import Notes

SETTINGS = ["num_clusters=3", "heads.count=1", "heads.epochs=2", "heads.repeats=2", "heads.more=0"]


@pytest.mark.usefixtures("local_ray")
def test_lists_and_adaptive_neighbours_go_into_the_reliable_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(3), [300, 150, 12]))
    np.save(tmp_path / "x.npy", (np.eye(8)[labels] + 0.2 * rng.normal(size=(len(labels), 8))).astype(np.float32))
    recipe = load_recipe("embeddings", [*SETTINGS, "reliable.index=ivf", "reliable.neighbors=adaptive"])
    reporter = Notes()
    workflow.run(workflow.prepare(recipe, str(tmp_path / "x.npy"), tmp_path / "run"), reporter)
    (note,) = (note for note in reporter.notes if note.startswith("neighbours are looked for in "))

    (found,) = (tmp_path / "run" / "artifacts").glob("neighbors-*")
    recall = read_json(found / "manifest.json")["recall"]
    assert note == (
        f"neighbours are looked for in {recall['probes']} of 11 lists, which have {recall['share']:.2%} of those of "
        "462 sampled rows"
    )
    nearest = np.load(found / "neighbors.npy")
    assert nearest.shape == (462, 100)

    (reliable,) = (tmp_path / "run" / "artifacts").glob("reliable-*")
    assert read_json(reliable / "manifest.json")["neighbors"] == "adaptive"
    table = pq.read_table(tmp_path / "run" / "assignments.parquet").sort_by("sample_id")
    clusters = table["cluster"].to_numpy()
    asked = [round(min(100, max(10, np.sum(clusters == cluster) / 6))) for cluster in clusters]
    expected = [
        float((clusters[row[:count]] == cluster).mean())
        for row, count, cluster in zip(nearest, asked, clusters, strict=True)
    ]
    assert table["consistency"].to_pylist() == pytest.approx(expected)
    assert len(set(asked)) > 1
