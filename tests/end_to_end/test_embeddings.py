"""Runs that begin with embeddings: those of a finished run's encoder, as another program would hand them over."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import spice_ray
from spice_ray import intake, workflow
from spice_ray.config import Scale
from spice_ray.core.consensus import consensus
from spice_ray.errors import ConfigError, DamagedError
from spice_ray.evaluate import evaluate
from spice_ray.recipe import load_recipe
from spice_ray.runtime.bank import open_bank
from spice_ray.runtime.progress import Done, SilentReporter
from spice_ray.runtime.weights import load_weights
from spice_ray.storage import Artifact, open_artifact
from tests.end_to_end.small_runs import NUM_IMAGES, damage

SETTINGS = ["heads.count=3", "heads.epochs=4", "heads.repeats=2"]


@pytest.fixture(scope="session")
def vectors(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .npy file of 600 embeddings and one that is not finite, with labels."""
    (embedding,) = (finished / "artifacts").glob("embedding-*")
    (labels,) = (finished / "artifacts").glob("labels-*")
    file = tmp_path_factory.mktemp("vectors") / "model.npy"
    rows = np.load(embedding / "plain.npy")
    np.save(file, np.concatenate([rows, np.full_like(rows[:1], np.nan)]))
    np.save(file.with_name("model.labels.npy"), [*pq.read_table(labels / "labels.parquet")["label"].to_pylist(), 0])
    return file


def cluster(data: Path, out: Path, *more: str, reporter: SilentReporter | None = None) -> Path:
    recipe = load_recipe("embeddings", ["num_clusters=10", *SETTINGS, *more])
    workflow.run(workflow.prepare(recipe, str(data), out), reporter or SilentReporter())
    return out


@pytest.fixture(scope="session")
def embedded(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the embeddings; not to be changed."""
    return cluster(vectors, tmp_path_factory.mktemp("embedded") / "run")


def one(run: Path, kind: str) -> Artifact:
    (path,) = (run / "artifacts").glob(f"{kind}-*")
    found = open_artifact(path.parent, kind, path.name.partition("-")[2])
    assert found is not None
    return found


def test_embeddings_get_the_clusters_of_the_chosen_head(embedded: Path) -> None:
    table, heads = pq.read_table(embedded / "assignments.parquet"), one(embedded, "heads")
    assert table["sample_id"].to_pylist() == list(range(NUM_IMAGES))
    assert table["cluster"].to_pylist() == np.load(heads.file("assignments.npy")).tolist()
    assert table["confidence"].to_pylist() == np.load(heads.file("confidences.npy")).tolist()
    consistency, reliable = table["consistency"].to_numpy(), np.asarray(table["reliable"].to_pylist())
    assert 0 < reliable.sum() < NUM_IMAGES
    assert (reliable == (consistency > 0.5)).all()
    kinds = {path.name.partition("-")[0] for path in (embedded / "artifacts").iterdir()}
    assert kinds == {"shards", "labels", "vectors", "embedding", "heads", "neighbors", "reliable", "assignments"}


def test_the_views_of_a_row_are_its_nearest_neighbours_which_are_found_once(embedded: Path) -> None:
    store, vectors = one(embedded, "embedding"), one(embedded, "vectors")
    rows = np.load(vectors.file("embedding.npy")).astype(np.float64)
    similarities = rows @ rows.T
    np.fill_diagonal(similarities, -np.inf)
    plain, strong = np.load(store.file("plain.npy")), np.load(store.file("strong.npy"))
    assert len(strong) == store.manifest["views"] == 10
    for view, nearest in enumerate(np.argsort(-similarities, axis=1, kind="stable")[:, :10].T):
        assert np.array_equal(strong[view], plain[nearest])
    for name in ("embedding.npy", "plain.npy"):
        assert store.file(name).read_bytes() == vectors.file(name).read_bytes()
    bank = open_bank(store)
    assert np.array_equal(bank.weak, bank.plain)


def test_more_views_than_neighbours_are_usually_looked_for(vectors: Path, tmp_path: Path) -> None:
    run = cluster(vectors, tmp_path / "run", "heads.views=130", "heads.start=random", "heads.epochs=1", "heads.count=1")
    assert np.load(one(run, "embedding").file("strong.npy"), mmap_mode="r").shape[0] == 130
    assert one(run, "neighbors").manifest["neighbors"] == 130


def test_the_page_names_examples_that_have_no_pictures(embedded: Path) -> None:
    html = (embedded / "clusters.html").read_text()
    assert f"{NUM_IMAGES} embeddings in 10 clusters" in html
    assert "<img" not in html
    assert "model.npy#" in html


def test_the_heads_beside_k_means_are_chosen_by_how_well_they_fit_the_neighbours(embedded: Path) -> None:
    told = one(embedded, "heads").manifest
    assert len(told["modularities"]) == len(told["losses"]) == 3 + 1
    assert told["chosen"] in (np.argmax(told["modularities"]), 3)
    assert one(embedded, "assignments").manifest["unsupervised_loss"] == told["losses"][told["chosen"]]


def test_an_embedding_that_cannot_be_used_is_listed_with_its_reason(embedded: Path) -> None:
    (reject,) = pq.read_table(embedded / "rejects.parquet").to_pylist()
    assert reject["source"].endswith("600")
    assert "not finite" in reject["reason"]


def test_scores_have_no_rows_of_pixels_or_stage_3(embedded: Path) -> None:
    result = evaluate(embedded)
    assert [row["method"] for row in result["rows"]] == ["k-means on the embedding", "SPICE_s"]
    assert result["n"] == NUM_IMAGES
    assert result["nmi"] == result["rows"][1]["nmi"] > 0.4


def test_a_finished_run_of_embeddings_is_not_done_again(vectors: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_clusters": 10,
        "recipe": "embeddings",
        "out": str(tmp_path / "run"),
        "overrides": {"heads.count": 2, "heads.epochs": 2},
        "reporter": SilentReporter(),
    }
    table = spice_ray.cluster(str(vectors), **options)
    shutil.rmtree(one(tmp_path / "run", "assignments").path)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "artifacts").glob("*/*")}
    assert spice_ray.cluster(str(vectors), **options).equals(table)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_heads_that_vote_leave_their_disagreement_and_the_clusters_of_the_vote(
    embedded: Path, vectors: Path, tmp_path: Path
) -> None:
    voted = cluster(vectors, tmp_path / "run", "heads.consensus=true")
    heads, plain = one(voted, "heads"), np.load(one(voted, "embedding").file("plain.npy")).astype(np.float32)
    labels = []
    for number in heads.manifest["voting"]:
        weights = load_weights(heads.file(f"head-{number:03d}.safetensors"))
        hidden = np.maximum(plain @ weights["0.weight"].numpy().T + weights["0.bias"].numpy(), 0)
        labels.append((hidden @ weights["2.weight"].numpy().T + weights["2.bias"].numpy()).argmax(axis=1))
    assert heads.manifest["voting"][0] == heads.manifest["chosen"]
    expected = consensus(labels, 10)
    table, alone = pq.read_table(voted / "assignments.parquet"), pq.read_table(embedded / "assignments.parquet")
    assert table.column_names == [*alone.column_names, "disagreement"]
    assert table["cluster"].to_pylist() == expected.labels.tolist()
    assert table["disagreement"].to_pylist() == expected.disagreement.tolist()


def test_heads_see_directions_alone(embedded: Path, vectors: Path) -> None:
    rows = pq.read_table(embedded / "assignments.parquet", columns=["source"])["source"].to_pylist()
    given = np.load(vectors)[[int(source.rpartition("#")[2]) for source in rows]].astype(np.float64)
    unit = given / np.sqrt((given**2).sum(axis=1, keepdims=True))
    store = one(embedded, "embedding")
    np.testing.assert_allclose(np.load(store.file("embedding.npy")), unit, rtol=1e-6, atol=1e-9)
    expected = unit * given.shape[1] ** 0.5
    np.testing.assert_allclose(np.load(store.file("plain.npy")), expected, rtol=2**-11, atol=1e-6)


def test_a_table_of_the_same_embeddings_gives_the_same_rows(embedded: Path, vectors: Path, tmp_path: Path) -> None:
    rows = np.load(vectors)[:NUM_IMAGES]
    order = np.random.default_rng(0).permutation(NUM_IMAGES)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows[order].ravel()), rows.shape[1])
    pq.write_table(pa.table({"embedding": column}), tmp_path / "a.parquet", row_group_size=100)
    tables = [
        pq.read_table(run / "assignments.parquet").drop_columns(["source"])
        for run in (cluster(tmp_path / "a.parquet", tmp_path / "run"), embedded)
    ]
    assert tables[0].equals(tables[1])


def on_the_command_line(data: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spice_ray", "run", "embeddings", "--data", str(data), "--out", str(out)]
    return subprocess.run([*command, "num_clusters=10"], capture_output=True, text=True, check=False)


class Damager(SilentReporter):
    """Flips a bit of a shard file when the stage begins that reads it: after it was looked at and found sound."""

    def __init__(self, shards: Path, title: str) -> None:
        self.shards, self.title, self.lost = shards, title, 0

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        if title == self.title and not self.lost:
            self.lost = damage(self.shards, "part-00005.parquet")
        with super().stage(title, unit) as show:
            yield show


def test_a_part_that_is_damaged_meanwhile_is_named_or_left_out_and_counted(vectors: Path, tmp_path: Path) -> None:
    source = intake.open_source(str(vectors))
    shards = intake.ingest(
        source, tmp_path / "shards", Scale(), image_size=None, seed=0, reporter=SilentReporter()
    ).path
    copy = Path(shutil.copytree(shards.parent, tmp_path / "copy"))
    with pytest.raises(DamagedError, match=r"part-00005\.parquet is damaged"):
        cluster(copy, tmp_path / "named", reporter=Damager(copy / shards.name, "assignments"))
    said = on_the_command_line(copy, tmp_path / "said")
    assert said.returncode == 2
    assert "Traceback" not in said.stderr
    assert "part-00005.parquet is damaged" in said.stderr.splitlines()[-1]
    reporter = Damager(shards, "embedding")
    run = cluster(shards, tmp_path / "run", "scale.skip_damaged=true", reporter=reporter)
    assert 0 < reporter.lost < NUM_IMAGES
    assert len(pq.read_table(run / "assignments.parquet")) == NUM_IMAGES - reporter.lost
    assert evaluate(run)["n"] == NUM_IMAGES - reporter.lost
    assert json.loads((run / "run.json").read_text())["damaged"] == ["part-00005.parquet"]


def test_shards_that_are_all_damaged_are_one_sentence(vectors: Path, tmp_path: Path) -> None:
    source = intake.open_source(str(vectors))
    shards = intake.ingest(
        source, tmp_path / "shards", Scale(), image_size=None, seed=0, reporter=SilentReporter()
    ).path
    parts = sorted(shards.glob("part-*.parquet"))
    for part in parts[1:]:
        part.unlink()
    # What is left is too little for a recipe that all would have fitted.
    left = pq.read_metadata(parts[0]).num_rows
    with pytest.raises(ConfigError, match=rf"num_clusters=100 is more than the {left} images"):
        cluster(shards, tmp_path / "run", "scale.skip_damaged=true", "num_clusters=100")
    damage(shards, parts[0].name)
    with pytest.raises(DamagedError, match=r"every shard file of .* is damaged"):
        cluster(shards, tmp_path / "other", "scale.skip_damaged=true")


def test_the_split_protocol_trains_on_train_and_scores_on_test(vectors: Path, tmp_path: Path) -> None:
    rows, labels = np.load(vectors)[:NUM_IMAGES], np.load(vectors.with_name("model.labels.npy"))[:NUM_IMAGES]
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    splits = np.where(np.arange(NUM_IMAGES) < 450, "train", "test")
    pq.write_table(pa.table({"embedding": column, "split": splits, "label": labels}), tmp_path / "a.parquet")
    run = cluster(tmp_path / "a.parquet", tmp_path / "run", "protocol=split")
    table = pq.read_table(run / "assignments.parquet")
    is_train = np.asarray(table["split"].to_pylist()) == "train"
    assert is_train.sum() == 450
    embedding, plain, strong = (
        np.load(one(run, "embedding").file(f"{n}.npy")) for n in ("embedding", "plain", "strong")
    )
    similarity = embedding[is_train].astype(np.float64) @ embedding[is_train].T
    np.fill_diagonal(similarity, -2)
    for view, number in zip(strong[:, is_train], np.argsort(-similarity, axis=1)[:, :10].T, strict=True):
        assert (view == plain[is_train][number]).all()
    consistency = np.asarray(table["consistency"].to_pylist(), float)
    assert np.isnan(consistency[~is_train]).all()
    assert not np.isnan(consistency[is_train]).any()
    assert not np.asarray(table["reliable"].to_pylist())[~is_train].any()
    assert evaluate(run)["n"] == 150
