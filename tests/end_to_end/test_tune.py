import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import yaml

from spice_ray import workflow
from spice_ray.config import Sweep
from spice_ray.evaluate import evaluate
from spice_ray.recipe import check_recipe
from spice_ray.runtime.tune import SilentReporter
from spice_ray.storage import read_json
from tests.end_to_end.small_runs import Corpus, small_recipe

SPACE = {"joint.confidence": [0.95, 0.6], "reliable.min_consistency": [0.5, 0.99999]}


def test_a_sweep_shares_stages_1_and_2_and_ranks_by_the_unsupervised_loss(copied: Path, corpus: Corpus) -> None:
    artifacts = copied / "artifacts"
    before = {folder.name: folder.stat().st_mtime_ns for folder in artifacts.iterdir()}
    prepared = workflow.prepare(small_recipe(), str(corpus.parquet), copied)
    rows = workflow.sweep(prepared, Sweep(recipe="digits", space=SPACE), "both", SilentReporter())

    assert len(rows) == 4
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    for kind, count in (("encoder", 1), ("embedding", 1), ("heads", 1), ("neighbors", 1), ("reliable", 2)):
        assert len(list(artifacts.glob(f"{kind}-*"))) == count
    after = {folder.name: folder.stat().st_mtime_ns for folder in artifacts.iterdir()}
    assert {name: after[name] for name in before} == before

    # The trial of the run's own settings is ranked by the loss that the run recorded.
    own = next(row for row in rows if row["values"] == {"joint.confidence": 0.95, "reliable.min_consistency": 0.5})
    recorded = read_json(next(artifacts.glob("assignments-*")) / "manifest.json")
    losses = [read_json(folder / "manifest.json")["unsupervised_loss"] for folder in artifacts.glob("assignments-*")]
    assert own["loss"] == pytest.approx(min(losses, key=lambda loss: abs(loss - own["loss"])), abs=1e-9)
    assert recorded["unsupervised_loss"] > 1.46

    folder = copied / "sweeps" / "both"
    table = pq.read_table(folder / "trials.parquet")
    assert table["loss"].to_pylist() == [row["loss"] for row in rows]
    winner = check_recipe(yaml.safe_load((folder / "winner.yaml").read_text()))
    assert winner.joint.confidence == rows[0]["values"]["joint.confidence"]
    assert pq.read_table(folder / "assignments.parquet").num_rows == 600
    assert evaluate(folder)["n"] == 600

    # One CPU is left for the tasks that read images; trials on all of them would wait for those for ever.
    spans = [span_of(file) for file in folder.glob("tune/*/result.json")]
    assert len(spans) == 4
    most = max(sum(other[0] <= start < other[1] for other in spans) for start, _ in spans)
    assert most <= ray.cluster_resources()["CPU"] - 1


def span_of(results: Path) -> tuple[float, float]:
    """When a trial began and ended, in seconds, by what Ray Tune wrote of it."""
    last = json.loads(results.read_text().splitlines()[-1])
    return last["timestamp"] - last["trial_seconds"], last["timestamp"]
