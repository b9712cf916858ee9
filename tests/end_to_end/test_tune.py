import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml

from spice_ray import workflow
from spice_ray.contracts import ShardFile
from spice_ray.errors import StorageError
from spice_ray.evaluate import evaluate
from spice_ray.readers.parts import format_of, images_of, read_part
from spice_ray.recipe import check_recipe
from spice_ray.runtime.image_pipeline import ImagePipeline
from spice_ray.runtime.progress import SilentReporter
from spice_ray.runtime.weights import load_joint
from spice_ray.runtime.workers import augmentation_of
from spice_ray.stages.assign import predict
from spice_ray.storage import Artifact, open_artifact, read_json, write_json
from spice_ray.sweep import Sweep
from tests.end_to_end.small_runs import Corpus, small_recipe

SPACE = {"joint.confidence": [0.95, 0.6], "reliable.min_consistency": [0.5, 0.99999]}


def test_a_sweep_shares_stages_1_and_2_and_ranks_by_the_unsupervised_loss(copied: Path, corpus: Corpus) -> None:
    artifacts = copied / "artifacts"
    before = {folder.name: folder.stat().st_mtime_ns for folder in artifacts.iterdir()}
    prepared = workflow.prepare(small_recipe(), str(corpus.parquet), copied)
    rows = workflow.sweep(prepared, Sweep(recipe="digits", space=SPACE), "both", SilentReporter()).rows

    assert len(rows) == 4
    assert [row["objective"] for row in rows] == sorted(row["objective"] for row in rows)
    for kind, count in (("encoder", 1), ("embedding", 1), ("heads", 1), ("neighbors", 1), ("reliable", 2)):
        assert len(list(artifacts.glob(f"{kind}-*"))) == count
    after = {folder.name: folder.stat().st_mtime_ns for folder in artifacts.iterdir()}
    assert {name: after[name] for name in before} == before

    # The trial of the run's own settings is ranked by the loss that the run recorded.
    own = next(row for row in rows if row["values"] == {"joint.confidence": 0.95, "reliable.min_consistency": 0.5})
    recorded = read_json(next(artifacts.glob("assignments-*")) / "manifest.json")
    losses = [read_json(folder / "manifest.json")["unsupervised_loss"] for folder in artifacts.glob("assignments-*")]
    assert own["objective"] == pytest.approx(min(losses, key=lambda loss: abs(loss - own["objective"])), abs=1e-9)
    assert recorded["unsupervised_loss"] > 1.46

    folder = copied / "sweeps" / "both"
    table = pq.read_table(folder / "trials.parquet")
    assert table["objective"].to_pylist() == [row["objective"] for row in rows]
    winner = check_recipe(yaml.safe_load((folder / "winner.yaml").read_text()))
    assert winner.joint.confidence == rows[0]["values"]["joint.confidence"]
    assert pq.read_table(folder / "assignments.parquet").num_rows == 600
    assert evaluate(folder)["n"] == 600
    assert "600 images in 10 clusters" in (folder / "clusters.html").read_text()

    # One CPU is left for the tasks that read images; trials on all of them would wait for those for ever.
    spans = [span_of(file) for file in folder.glob("tune/*/result.json")]
    assert len(spans) == 4
    most = max(sum(other[0] <= start < other[1] for other in spans) for start, _ in spans)
    assert most <= ray.cluster_resources()["CPU"] - 1


def span_of(results: Path) -> tuple[float, float]:
    """When a trial began and ended, in seconds, by what Ray Tune wrote of it."""
    last = json.loads(results.read_text().splitlines()[-1])
    # The time stamp has whole seconds: no trial began later than this, and none ended sooner.
    return last["timestamp"] + 1 - last["trial_seconds"], last["timestamp"]


def kinds(artifacts: Path) -> Counter[str]:
    """How many artifacts there are of each kind."""
    return Counter(folder.name.partition("-")[0] for folder in artifacts.iterdir())


@pytest.mark.faults
def test_trials_over_two_stages_share_what_they_have_in_common(copied: Path, corpus: Corpus) -> None:
    before = kinds(copied / "artifacts")
    prepared = workflow.prepare(small_recipe(), str(corpus.parquet), copied)
    sweep = Sweep(
        recipe="digits",
        space={"heads.lr": [0.005, 0.01], "joint.confidence": [0.95, 0.6]},
        trial={"joint.steps": 40},
    )
    result = workflow.sweep(prepared, sweep, "two", SilentReporter())
    assert len(result.rows) == 4
    assert all(row["objective"] is not None for row in result.rows)
    made = kinds(copied / "artifacts") - before
    # One of the learning rates is the run's own. The winner is trained in full.
    assert (made["encoder"], made["embedding"], made["neighbors"]) == (0, 0, 0)
    assert (made["heads"], made["reliable"], made["joint"], made["score"]) == (1, 1, 5, 4)
    reuse = {row.stage: (row.computed, row.reused) for row in result.reuse}
    assert reuse["encoder"] == (0, 4)
    assert reuse["heads"] == (1, 3)
    assert reuse["joint"] == (4, 0)
    saved = {row.stage: row.saved for row in result.reuse}
    assert saved["encoder"] > saved["reliable"] >= 0 == saved["joint"]

    again = workflow.sweep(prepared, sweep, "two", SilentReporter())
    assert [row["objective"] for row in again.rows] == [row["objective"] for row in result.rows]
    assert kinds(copied / "artifacts") - before == made
    assert all(row.computed == 0 for row in again.reuse)


def test_a_sweep_of_shards_elsewhere_into_a_new_folder_judged_by_neighbours(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (shards,) = (finished / "artifacts").glob("shards-*")
    prepared = workflow.prepare(small_recipe(), str(shards.parent), run)
    # Stages 1 and 2 are those of the finished run.
    shutil.copytree(finished / "artifacts", run / "artifacts", ignore=shutil.ignore_patterns("shards-*", "labels-*"))
    sweep = Sweep(
        recipe="digits",
        space={"joint.lr": [0.001, 0.1]},
        trial={"joint.steps": 20},
        objective="neighbor_disagreement",
    )
    result = workflow.sweep(prepared, sweep, "near", SilentReporter())
    folder = run / "sweeps" / "near"
    # Of the better trial, the 20 nearest in the frozen embedding by hand.
    names = result.rows[0]["used"]
    joint, embedding = (artifact_of(run, names, kind) for kind in ("joint", "embedding"))
    rows = np.load(embedding.file("embedding.npy"))
    similarity = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :20]
    tables = [read_part(shards, file, format_of(read_json(shards / "manifest.json"))) for file in parts_of(shards)]
    images = torch.from_numpy(np.concatenate([images_of(table, 16) for table in tables]))
    with torch.inference_mode():
        labels = (
            predict(load_joint(joint).eval(), images, augmentation_of(small_recipe().image)).logits.argmax(1).numpy()
        )
    sizes = np.sort(np.bincount(labels, minlength=10)) / len(labels)
    expected = (labels[nearest] != labels[:, None]).mean() + np.abs(sizes - 0.1).sum() / 2
    assert result.rows[0]["objective"] == pytest.approx(expected, abs=2e-3)  # neighbours equally near may differ
    assert result.rows[0]["objective"] < result.rows[1]["objective"]
    assert (folder / "report.html").is_file()
    assert pq.read_table(folder / "assignments.parquet").num_rows == 600


def artifact_of(run: Path, names: list[str], kind: str) -> Artifact:
    print_ = next(name.partition("-")[2] for name in names if name.startswith(f"{kind}-"))
    found = open_artifact(run / "artifacts", kind, print_)
    assert found is not None
    return found


def parts_of(shards: Path) -> list[ShardFile]:
    files = read_json(shards / "manifest.json")["files"]
    return [ShardFile(file["name"], 0, file["rows"], file["rows"], file["crc32"]) for file in files if file["rows"]]


@pytest.mark.faults
def test_trials_of_stage_1_train_under_ray_train_and_are_judged_by_their_heads(copied: Path, corpus: Corpus) -> None:
    before = kinds(copied / "artifacts")
    prepared = workflow.prepare(small_recipe(), str(corpus.parquet), copied)
    # The fraction is what prototypes are made of, and of the measure as well, which is to be the run's for all trials.
    sweep = Sweep(
        recipe="digits",
        space={"pretrain.temperature": [0.5], "heads.confident_fraction": [0.5, 0.1]},
    )
    result = workflow.sweep(prepared, sweep, "contrastive", SilentReporter())
    losses = {row["values"]["heads.confident_fraction"]: row["objective"] for row in result.rows}
    made = kinds(copied / "artifacts") - before
    # Both trials begin with the same encoder; the winner alone has a stage 3.
    assert (made["encoder"], made["embedding"], made["heads"]) == (1, 1, 2)
    assert (made["joint"], made["score"]) == (1, 2)
    manifests = [read_json(folder / "manifest.json") for folder in (copied / "artifacts").glob("heads-*")]
    own = [manifest["losses"][manifest["chosen"]] for manifest in manifests]
    assert min(abs(loss - losses[0.5]) for loss in own) < 1e-5
    assert min(abs(loss - losses[0.1]) for loss in own) > 1e-5
    assert evaluate(copied / "sweeps" / "contrastive")["n"] == 600


@pytest.mark.faults
def test_a_trial_of_stages_2_and_3_that_is_known_to_nobody_before_starts_both(copied: Path, corpus: Corpus) -> None:
    before = kinds(copied / "artifacts")
    prepared = workflow.prepare(small_recipe(), str(corpus.parquet), copied)
    sweep = Sweep(
        recipe="digits",
        space={"heads.lr": {"log_uniform": [0.004, 0.006]}, "joint.confidence": [0.6]},
        search="tpe",
        samples=1,
    )
    (row,) = workflow.sweep(prepared, sweep, "tpe", SilentReporter()).rows
    made = kinds(copied / "artifacts") - before
    assert (made["heads"], made["reliable"], made["joint"], made["score"]) == (1, 1, 1, 1)
    # The winner is the trial itself, whose assignments say the same of it.
    record = read_json(copied / "sweeps" / "tpe" / "run.json")
    found = read_json(copied / "artifacts" / f"assignments-{record['artifacts']['assignments']}" / "manifest.json")
    assert row["objective"] == pytest.approx(found["unsupervised_loss"], abs=1e-6)


@pytest.mark.faults
def test_a_winner_that_was_not_finished_is_no_finished_run(
    copied: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = workflow.prepare(small_recipe(), str(corpus.parquet), copied)
    sweep = Sweep(recipe="digits", space={"joint.confidence": [0.6]}, trial={"joint.steps": 20})

    def interrupted(pipeline: ImagePipeline) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImagePipeline, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workflow.sweep(prepared, sweep, "cut", SilentReporter())
    with pytest.raises(StorageError, match="is not of a finished run"):
        evaluate(copied / "sweeps" / "cut")
    monkeypatch.undo()
    workflow.sweep(prepared, sweep, "cut", SilentReporter())
    assert evaluate(copied / "sweeps" / "cut")["n"] == 600


@pytest.mark.faults
def test_a_search_that_learns_draws_from_ranges_and_stops_bad_trials(copied: Path, corpus: Corpus) -> None:
    prepared = workflow.prepare(small_recipe(), str(corpus.parquet), copied)
    sweep = Sweep(
        recipe="digits",
        space={"joint.confidence": {"uniform": [0.5, 0.95], "step": 0.05}, "joint.lr": {"log_uniform": [1e-3, 1e-2]}},
        search="tpe",
        samples=2,
        trial={"joint.steps": 20},
    )
    rows = workflow.sweep(prepared, sweep, "tpe", SilentReporter()).rows
    assert len(rows) == 2
    for row in rows:
        confidence = row["values"]["joint.confidence"]
        assert confidence in [round(0.5 + 0.05 * step, 2) for step in range(10)]
        assert 1e-3 <= row["values"]["joint.lr"] <= 1e-2
        assert row["objective"] is not None

    stopping = Sweep(
        recipe="digits",
        space={"joint.lr": [0.003, 0.3, 0.4]},
        trial={"joint.steps": 60},
        early_stopping={"looks": 2},
        concurrent=1,  # the first to be looked at is never stopped
    )
    rows = workflow.sweep(prepared, stopping, "stopping", SilentReporter()).rows
    stopped = {row["values"]["joint.lr"] for row in rows if row["note"] == "stopped early"}
    assert {0.3, 0.4} <= stopped
    assert rows[0]["values"]["joint.lr"] == 0.003
    table = pq.read_table(copied / "sweeps" / "stopping" / "trials.parquet").to_pylist()
    assert all((row["objective"] is None) == (row["joint.lr"] in stopped) for row in table)
    assert all((row["last_look"] is None) == (row["joint.lr"] not in stopped) for row in table)

    # The same sweep hears what it has heard before, and no trial is trained for it, whoever is heard first.
    looks, joints = sorted(copied.glob("sweeps/.trials/looks-*.json")), sorted(copied.glob("artifacts/joint-*"))
    assert len(looks) == 3
    written = [path.stat().st_mtime_ns for path in looks]
    reordered = stopping.model_copy(update={"space": {"joint.lr": [0.4, 0.3, 0.003]}})
    again = workflow.sweep(prepared, reordered, "stopping", SilentReporter()).rows
    assert {row["values"]["joint.lr"] for row in again if row["note"] == "stopped early"} == stopped
    assert [row["objective"] for row in again if row["objective"]] == [rows[0]["objective"]]
    assert sorted(copied.glob("artifacts/joint-*")) == joints
    assert [path.stat().st_mtime_ns for path in looks] == written

    # Trials that had looked better and were not stopped, but killed, are trained to their end.
    for path in looks:
        write_json(path, {"values": {"1": -1.0}, "stopped": False})
    rows = workflow.sweep(prepared, stopping, "stopping", SilentReporter()).rows
    assert all(np.isfinite(row["objective"]) for row in rows)
    assert len(sorted(copied.glob("artifacts/joint-*"))) == len(joints) + 2
    assert all(read_json(path)["values"] == {"1": -1.0} for path in looks)
