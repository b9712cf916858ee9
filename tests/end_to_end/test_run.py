import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from spice_ray import workflow
from spice_ray.contracts import EMBEDDING, SHARDS, Bank
from spice_ray.core.lanes import serve
from spice_ray.errors import DamagedError
from spice_ray.evaluate import evaluate
from spice_ray.readers.source import open_source
from spice_ray.run_folder import RunFolder, open_made, read_finished
from spice_ray.runtime.data import load_rows, open_shards
from spice_ray.runtime.image_pipeline import ImagePipeline
from spice_ray.runtime.inference import training_ids
from spice_ray.runtime.ingest import ingest
from spice_ray.runtime.partial_arrays import PartialArrays
from spice_ray.runtime.progress import SilentReporter
from spice_ray.storage import read_json
from tests.end_to_end.small_runs import NUM_IMAGES, Corpus, Notes, cluster, damage, small_recipe

COLUMNS = ["sample_id", "source", "split", "cluster", "confidence", "consistency", "reliable"]
KINDS = ["shards", "encoder", "embedding", "heads", "neighbors", "reliable", "joint", "assignments"]


def digests(run: Path) -> dict[str, str]:
    """Every file of a run's artifacts but the labels, by content."""
    files = sorted(file for file in (run / "artifacts").rglob("*") if file.is_file())
    return {
        str(file.relative_to(run)): hashlib.blake2b(file.read_bytes()).hexdigest()
        for file in files
        if not file.relative_to(run / "artifacts").parts[0].startswith("labels-")
    }


def losses(run: Path, stage: str) -> list[float]:
    with (run / "progress" / stage / "losses.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def clusters(run: Path) -> list[int]:
    return pq.read_table(run / "assignments.parquet")["cluster"].to_pylist()


def test_every_image_gets_one_row(finished: Path) -> None:
    table = pq.read_table(finished / "assignments.parquet")
    assert table.column_names == COLUMNS
    assert table["sample_id"].to_pylist() == list(range(NUM_IMAGES))
    assert len(set(table["source"].to_pylist())) == NUM_IMAGES
    assert set(table["cluster"].to_pylist()) <= set(range(10))
    confidence = table["confidence"].to_numpy()
    assert ((confidence > 0.1) & (confidence <= 1)).all()
    assert pq.read_table(finished / "rejects.parquet").num_rows == 0


def test_reliable_means_that_more_neighbours_agree_than_the_threshold(finished: Path) -> None:
    table = pq.read_table(finished / "assignments.parquet")
    consistency, reliable = table["consistency"].to_numpy(), np.asarray(table["reliable"].to_pylist())
    assert 0 < reliable.sum() < NUM_IMAGES
    assert (reliable == (consistency > 0.5)).all()


def test_the_result_beats_chance_by_far(finished: Path, tmp_path: Path) -> None:
    result = evaluate(Path(shutil.copytree(finished, tmp_path / "run")))
    assert result["n"] == NUM_IMAGES
    assert result["nmi"] > 0.4
    assert [row["method"] for row in result["rows"]] == [
        "k-means on pixels",
        "k-means on the embedding",
        "SPICE_s",
        "SPICE",
    ]


def test_a_finished_run_is_not_done_again(copied: Path, corpus: Corpus) -> None:
    before = {file: file.stat().st_mtime_ns for file in (copied / "artifacts").rglob("*")}
    cluster(corpus.parquet, copied)
    assert {file: file.stat().st_mtime_ns for file in (copied / "artifacts").rglob("*")} == before


def test_another_number_of_clusters_goes_on_from_the_same_embedding(
    copied: Path, corpus: Corpus, tmp_path: Path
) -> None:
    before = {folder.name for folder in (copied / "artifacts").iterdir()}
    prepared = workflow.prepare(small_recipe("num_clusters=7"), str(corpus.parquet), tmp_path / "seven", base=copied)
    workflow.run(prepared, SilentReporter())
    made = {folder.name.partition("-")[0] for folder in (copied / "artifacts").iterdir() if folder.name not in before}
    assert made == {"heads", "reliable", "joint", "assignments"}
    assert max(clusters(tmp_path / "seven")) < 7
    assert read_json(copied / "run.json")["recipe"]["num_clusters"] == 10
    assert evaluate(tmp_path / "seven")["k"] == 7
    assert (tmp_path / "seven" / "clusters.html").is_file()
    # One that changes nothing has nothing to make.
    prepared = workflow.prepare(small_recipe(), str(corpus.parquet), tmp_path / "same", base=copied)
    workflow.run(prepared, SilentReporter())
    assert read_json(tmp_path / "same" / "timing.json") == {}
    assert clusters(tmp_path / "same") == clusters(copied)
    assert evaluate(tmp_path / "same")["seconds"] == {}
    assert (tmp_path / "same" / "clusters.html").is_file()


def test_labels_reach_nothing_but_their_artifact(finished: Path, corpus: Corpus, tmp_path: Path) -> None:
    # The poisoned file keeps its neighbour's name, and so its source names.
    poisoned = cluster(corpus.poisoned, tmp_path / "poisoned")
    assert digests(poisoned) == digests(finished)
    assert (poisoned / "assignments.parquet").read_bytes() == (finished / "assignments.parquet").read_bytes()
    labels = [next((run / "artifacts").glob("labels-*")).name for run in (poisoned, finished)]
    assert labels[0] != labels[1]


@pytest.mark.faults
def test_a_folder_of_the_same_bytes_gives_the_same_rows(finished: Path, corpus: Corpus, tmp_path: Path) -> None:
    folder = cluster(corpus.folder, tmp_path / "folder")
    tables = [pq.read_table(run / "assignments.parquet").drop_columns(["source"]) for run in (folder, finished)]
    assert tables[0].equals(tables[1])
    assert not list((folder / "artifacts").glob("labels-*"))
    # Labels can be asked for when the run is finished.
    before = digests(folder)
    with_labels = workflow.prepare(small_recipe(), str(corpus.folder), folder, labels_from_folders=True)
    workflow.run(with_labels, SilentReporter())
    assert digests(folder) == before
    assert evaluate(folder)["n"] == NUM_IMAGES


def forget(run: Path, *kinds: str) -> None:
    for kind in kinds:
        shutil.rmtree(next((run / "artifacts").glob(f"{kind}-*")))


def test_an_interrupted_embedding_goes_on_with_the_files_that_it_lacks(copied: Path, corpus: Corpus) -> None:
    record = read_finished(copied)
    store, shards = open_made(copied, record, EMBEDDING), open_shards(open_made(copied, record, SHARDS), None)
    whole = {name: np.load(store.file(f"{name}.npy")) for name in Bank._fields}
    parts = copied / "checkpoints" / store.path.name
    partial = PartialArrays(
        parts, {name: array.shape for name, array in whole.items()}, {n: a.dtype.type for n, a in whole.items()}, 0
    )
    *done, first, second = shards.files
    rows = np.concatenate([np.arange(file.first_id, file.first_id + file.rows) for file in done])
    for file in done:
        partial.note(file.name)
    partial.arrays["plain"][rows] = -7  # by which these are known again
    partial.save()
    abandoned = parts.with_name(f"{EMBEDDING}-00")
    abandoned.mkdir()
    forget(copied, EMBEDDING)
    cluster(corpus.parquet, copied)
    found = np.load(store.file("plain.npy"))
    assert (found[rows] == -7).all()
    for file in (first, second):
        anew = slice(file.first_id, file.first_id + file.rows)
        assert np.array_equal(found[anew], whole["plain"][anew])
        assert np.array_equal(np.load(store.file("strong.npy"))[:, anew], whole["strong"][:, anew])
    assert not parts.exists()
    assert not abandoned.exists()


@pytest.mark.faults
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_two_workers_compute_in_parts_what_one_does_at_once(copied: Path, corpus: Corpus, compiled: str) -> None:
    expected, alone = {stage: losses(copied, stage) for stage in ("encoder", "joint")}, clusters(copied)
    # Stage 3 from the same stages 1 and 2, and then stage 1.
    for stage, *kinds in (("joint", "joint", "assignments"), ("encoder", "encoder")):
        forget(copied, *kinds)
        cluster(corpus.parquet, copied, "scale.workers=2", "scale.accumulate=2", f"scale.compile={compiled}")
        assert losses(copied, stage)[:20] == pytest.approx(expected[stage][:20], rel=1e-4)
    assert adjusted_rand_score(clusters(copied), alone) > 0.9


def test_thresholds_that_keep_nothing_skip_stage_3(copied: Path, corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "strict"
    shutil.copytree(copied, run)
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["reliable"]["min_confidence"] = 0.999999
    (run / "run.json").write_text(json.dumps(record))
    cluster(corpus.parquet, run, "reliable.min_confidence=0.999999")
    table = pq.read_table(run / "assignments.parquet")
    assert not any(table["reliable"].to_pylist())
    heads = next((run / "artifacts").glob("heads-*"))
    assert table["cluster"].to_pylist() == np.load(heads / "assignments.npy").tolist()


def test_without_steps_stage_3_is_left_out(copied: Path, corpus: Corpus, tmp_path: Path) -> None:
    notes = Notes()
    prepared = workflow.prepare(small_recipe("joint.steps=0"), str(corpus.parquet), tmp_path / "heads", base=copied)
    workflow.run(prepared, notes)
    assert "stage 3 is skipped: joint.steps=0 leaves it out" in notes.notes
    (heads,) = (copied / "artifacts").glob("heads-*")
    table = pq.read_table(tmp_path / "heads" / "assignments.parquet")
    assert table["cluster"].to_pylist() == np.load(heads / "assignments.npy").tolist()
    assert not any(table["reliable"].to_pylist())


def test_the_unlabeled_part_of_a_collection_is_seen_by_stage_1_alone(
    corpus: Corpus, tmp_path: Path, local_ray: None
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    table = pq.read_table(corpus.parquet)
    for name, start in (("train", 0), ("test", 300), ("unlabeled", 400)):
        pq.write_table(table.slice(start, 300 if name == "train" else 100), source / f"{name}.parquet")
    for protocol, first, others in (("whole", 500, 400), ("split", 400, 300)):
        recipe = small_recipe(f"protocol={protocol}", "pretrain.queue_size=64")
        shards, _ = ingest(
            open_source(str(source)), tmp_path / "shards", image_size=16, seed=0, reporter=SilentReporter()
        )
        pipeline = ImagePipeline(RunFolder(tmp_path, tmp_path), recipe, shards, None, SilentReporter())
        assert (pipeline.pretrain_shards.num_counted, pipeline.train_shards.num_counted) == (first, others)
        assert len(training_ids(pipeline.pretrain_shards)) == first
        lanes = serve(pipeline.train_shards.files, [0], 1)
        assert (
            load_rows(pipeline.train_shards, lanes, torch.device("cpu")).sample_ids.tolist()
            == training_ids(pipeline.train_shards).tolist()
        )


@pytest.mark.faults
def test_the_split_protocol_trains_on_train_and_scores_on_test(corpus: Corpus, tmp_path: Path, local_ray: None) -> None:
    source = tmp_path / "source"
    source.mkdir()
    table = pq.read_table(corpus.parquet)
    pq.write_table(table.slice(0, 450), source / "train.parquet")
    pq.write_table(table.slice(450), source / "test.parquet")
    run = cluster(source, tmp_path / "run", "protocol=split", "pretrain.queue_size=64")
    rows = pq.read_table(run / "assignments.parquet")
    is_train = np.asarray(rows["split"].to_pylist()) == "train"
    assert is_train.sum() == 450
    consistency = np.asarray(rows["consistency"].to_pylist(), float)
    assert np.isnan(consistency[~is_train]).all()
    assert not np.isnan(consistency[is_train]).any()
    assert not np.asarray(rows["reliable"].to_pylist())[~is_train].any()
    assert evaluate(run)["n"] == 150


# Stage 3 is the sample: its labelled stream draws with replacement and leaves rows out.
@pytest.mark.parametrize("kind", ["joint", pytest.param("encoder", marks=pytest.mark.faults)])
def test_streamed_images_give_the_same_models_as_resident_ones(kind: str, copied: Path, corpus: Corpus) -> None:
    resident = digests(copied)
    forget(copied, kind)
    cluster(corpus.parquet, copied, "scale.resident_memory=0")
    assert digests(copied) == resident


@pytest.mark.faults
def test_a_damaged_part_stops_training_with_its_name_or_is_left_out_where_that_is_allowed(
    copied: Path, corpus: Corpus, tmp_path: Path
) -> None:
    lost = damage(next((copied / "artifacts").glob("shards-*")), "part-00005.parquet")
    forget(copied, *KINDS[1:])
    # Of two workers one meets it, and the other waits for that one.
    with pytest.raises(DamagedError, match=r"part-00005\.parquet is damaged .* scale\.skip_damaged=true"):
        cluster(corpus.parquet, copied, "scale.resident_memory=0", "scale.workers=2")
    # Few samples pass for reliable, so that stage 3, which is not what this is about, is skipped.
    (shards,) = (copied / "artifacts").glob("shards-*")
    run = cluster(shards, tmp_path / "without", "scale.skip_damaged=true", "reliable.min_confidence=0.999999")
    table = pq.read_table(run / "assignments.parquet")
    assert len(table) == NUM_IMAGES - lost
    assert len(set(table["sample_id"].to_pylist())) == NUM_IMAGES - lost
    assert evaluate(run)["n"] == NUM_IMAGES - lost
    # Nothing of a run without the images is taken for one with them.
    assert json.loads((run / "run.json").read_text())["damaged"] == ["part-00005.parquet"]
