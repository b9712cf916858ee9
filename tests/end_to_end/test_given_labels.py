"""Stage 3 on labels that are given for some images: alone, and behind stages 1 and 2."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from spice_ray import workflow
from spice_ray.contracts import ShardFile
from spice_ray.errors import ConfigError, DataError, StorageError
from spice_ray.evaluate import evaluate
from spice_ray.readers.given_labels import GivenLabels, read_given_labels
from spice_ray.readers.parts import PartFormat, write_part
from spice_ray.runtime.data import Shards
from spice_ray.runtime.given_labels import labels_by_id
from spice_ray.runtime.progress import SilentReporter
from spice_ray.runtime.weights import load_joint
from spice_ray.storage import Artifact, open_artifact
from tests.end_to_end.small_runs import NUM_IMAGES, Corpus, cluster, small_recipe

CLASSES = load_digits().target[:NUM_IMAGES]
GIVEN = np.arange(0, NUM_IMAGES, 5)


def write_labels(file: Path, rows: np.ndarray = GIVEN, labels: np.ndarray = CLASSES) -> Path:
    """Labels of rows of the corpus, named as the run names them."""
    pq.write_table(pa.table({"source": [f"train.parquet#{row}" for row in rows], "label": labels[rows]}), file)
    return file


def artifact(run: Path, kind: str) -> Artifact:
    prints = json.loads((run / "run.json").read_text())["artifacts"]
    found = open_artifact(run / "artifacts", kind, prints[kind])
    assert found is not None
    return found


def accuracy(run: Path) -> float:
    """The share of the images without a given label whose cluster is their class, by its very number."""
    table = pq.read_table(run / "assignments.parquet")
    rows = np.array([int(source.rpartition("#")[2]) for source in table["source"].to_pylist()])
    others = ~np.isin(rows, GIVEN)
    right = table["cluster"].to_numpy() == CLASSES[rows]
    assert table["reliable"].to_numpy().tolist() == (~others).tolist()
    return float(right[others].mean())


@pytest.mark.usefixtures("local_ray")
def test_stage_3_alone_learns_the_classes_that_are_given(corpus: Corpus, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.parquet")
    run = cluster(
        corpus.parquet, tmp_path / "run", f"reliable.labels={labels}", "joint.init=scratch", "joint.steps=200"
    )
    assert {folder.name.partition("-")[0] for folder in (run / "artifacts").iterdir()} == {
        *("shards", "labels", "reliable", "joint", "assignments")
    }
    assert artifact(run, "reliable").manifest["given"] == len(GIVEN)
    assert accuracy(run) > 0.6
    found = evaluate(run)
    assert [row["method"] for row in found["rows"]] == ["k-means on pixels", "labels given"]
    assert found["n"] == NUM_IMAGES - len(GIVEN)
    assert found["reliable"] == {"count": len(GIVEN), "share": len(GIVEN) / NUM_IMAGES, "acc": None}
    with pytest.raises(DataError, match="no embedding to look into"):
        evaluate(run, probe=True)

    # The same labels in another file, in another order, are the same run; others are not.
    times = {file: file.stat().st_mtime_ns for file in (run / "artifacts").rglob("*")}
    settings = ("joint.init=scratch", "joint.steps=200")
    same = write_labels(tmp_path / "same.parquet", GIVEN[::-1])
    cluster(corpus.parquet, run, f"reliable.labels={same}", *settings)
    assert {file: file.stat().st_mtime_ns for file in (run / "artifacts").rglob("*")} == times
    others = write_labels(tmp_path / "others.parquet", GIVEN[1:])
    with pytest.raises(StorageError, match=r"reliable\.labels_digest is"):
        cluster(corpus.parquet, run, f"reliable.labels={others}", *settings)


def test_behind_stages_1_and_2_heads_are_called_by_the_labels(finished: Path, corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(finished / "artifacts", tmp_path / "run" / "artifacts")
    run, artifacts = tmp_path / "run", tmp_path / "run" / "artifacts"
    for folder in artifacts.glob("assignments-*"):
        shutil.rmtree(folder)
    record = json.loads((finished / "run.json").read_text())
    labels = write_labels(tmp_path / "labels.parquet")
    digest = read_given_labels(str(labels), 10).digest()
    record["recipe"]["reliable"] |= {"labels": str(labels), "labels_digest": digest}
    record["recipe"]["joint"]["lr"] = 1e-9
    (run / "run.json").write_text(json.dumps(record))
    cluster(corpus.parquet, run, f"reliable.labels={labels}", "joint.lr=1e-9")
    assert len(list(artifacts.glob("heads-*"))) == 1

    columns = artifact(run, "reliable").manifest["columns"]
    assert sorted(columns) == list(range(10))
    clusters = np.load(artifact(run, "heads").file("assignments.npy"))
    table = pq.read_table(run / "assignments.parquet")
    classes = np.empty(NUM_IMAGES, np.int64)
    classes[table["sample_id"].to_numpy()] = [CLASSES[int(s.rpartition("#")[2])] for s in table["source"].to_pylist()]
    named = np.argsort(columns)[clusters]
    assert (named == classes).mean() > max(0.3, 2 * (clusters == classes).mean())
    # Hardly anything was learnt at that rate: the result is the chosen head, called by the labels.
    assert (named[table["sample_id"].to_numpy()] == table["cluster"].to_numpy()).mean() > 0.9
    assert load_joint(artifact(run, "joint")).head(torch.zeros(1, 128)).shape == (1, 10)
    assert [row["method"] for row in evaluate(run)["rows"]][-2:] == ["SPICE_s", "labels given"]


@pytest.mark.usefixtures("local_ray")
def test_labels_of_other_images_and_lanes_without_any_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    settings = ["joint.init=scratch", "joint.steps=1"]
    none = tmp_path / "none.parquet"
    pq.write_table(pa.table({"source": ["train.parquet#0", "train.parquet#600"], "label": [0, 1]}), none)
    with pytest.raises(DataError, match=r"1 of the 2 images that .* labels are none of this run, such as .*#600; name"):
        cluster(corpus.parquet, tmp_path / "run", f"reliable.labels={none}", *settings)
    few = write_labels(tmp_path / "few.parquet", np.array([0, 1]))
    with pytest.raises(ConfigError, match=r"2 given labels leave one of joint.lanes=4 lanes without any; give more"):
        cluster(corpus.parquet, tmp_path / "few", f"reliable.labels={few}", *settings)


@pytest.mark.parametrize("files", [1, 2])
def test_labels_of_images_that_share_a_name_are_refused(files: int, tmp_path: Path) -> None:
    names = [["a", "b", "b"]] if files == 1 else [["a", "b"], ["b", "c"]]
    shards, first = [], 0
    for number, sources in enumerate(names):
        crc32 = write_part(tmp_path / f"part-{number}", pa.table({"source": sources}))
        shards.append(ShardFile(f"part-{number}", first, len(sources), len(sources), crc32))
        first += len(sources)
    found = Shards(tmp_path, PartFormat(16, "pixels"), shards, None)
    given = GivenLabels(pa.chunked_array([["a", "b"]]), np.array([0, 1]), "given.parquet")
    with pytest.raises(DataError, match="several images are called b, and a label cannot tell them apart"):
        labels_by_id(given, found)
    alone = GivenLabels(pa.chunked_array([["a"]]), np.array([1]), "given.parquet")
    assert labels_by_id(alone, found).tolist() == [1] + [-1] * (first - 1)


def test_a_file_that_cannot_be_used_is_refused_before_anything_is_made(corpus: Corpus, tmp_path: Path) -> None:
    recipe = small_recipe(f"reliable.labels={tmp_path / 'none.parquet'}")
    with pytest.raises(DataError, match="does not exist"):
        workflow.prepare(recipe, str(corpus.parquet), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_other_than_the_recipe_was_made_with_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.parquet")
    with pytest.raises(ConfigError, match="holds other labels than those that the recipe was made with"):
        workflow.prepare(
            small_recipe(f"reliable.labels={labels}", "reliable.labels_digest=0a"),
            str(corpus.parquet),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("local_ray")
def test_labels_that_stage_3_cannot_use_are_refused_before_stage_1(corpus: Corpus, tmp_path: Path) -> None:
    labels = tmp_path / "others.parquet"
    pq.write_table(pa.table({"source": ["train.parquet#0", "elsewhere.png"], "label": [0, 1]}), labels)
    with pytest.raises(DataError, match=r"labels are none of this run, such as elsewhere.png"):
        cluster(corpus.parquet, tmp_path / "run", f"reliable.labels={labels}")
    few = write_labels(tmp_path / "few.parquet", np.array([0, 1]))
    with pytest.raises(ConfigError, match=r"2 given labels leave one of joint.lanes=4 lanes without any"):
        cluster(corpus.parquet, tmp_path / "few", f"reliable.labels={few}")
    for run in ("run", "few"):
        assert not list((tmp_path / run / "artifacts").glob("encoder-*"))
        assert not (tmp_path / run / "progress" / "encoder").exists()


@pytest.mark.usefixtures("local_ray")
def test_labels_that_change_while_a_run_is_under_way_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.parquet")
    recipe = small_recipe(f"reliable.labels={labels}", "joint.init=scratch")
    prepared = workflow.prepare(recipe, str(corpus.parquet), tmp_path / "run")
    write_labels(labels, GIVEN[1:])
    with pytest.raises(DataError, match=r"labels.parquet has changed since the run began"):
        workflow.run(prepared, SilentReporter())
    assert not list((tmp_path / "run" / "artifacts").glob("reliable-*"))


def test_settings_that_given_labels_leave_no_room_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_clusters=2-9 leaves their number open"):
        small_recipe("reliable.labels=a.parquet", "num_clusters=2-9")
    with pytest.raises(ConfigError, match=r"heads.prior=estimate needs an embedding"):
        small_recipe("reliable.labels=a.parquet", "joint.init=scratch", "heads.prior=estimate")
