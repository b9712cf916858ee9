import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spice_ray.errors import DataError, StorageError
from spice_ray.evaluate import evaluate
from spice_ray.storage import write_json
from tests.made_runs import NUM_IMAGES, change_record, make_run, write_labels


def method(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["method"] == name)


def test_a_perfect_run_scores_one_everywhere_and_the_file_holds_what_is_returned(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    result = evaluate(run)
    assert (result["acc"], result["nmi"], result["ari"], result["n"], result["k"]) == (1.0, 1.0, 1.0, 40, 2)
    assert [(row["method"], row["acc"]) for row in result["rows"]] == [
        ("k-means on pixels", 1.0),
        ("k-means on the embedding", 1.0),
        ("SPICE_s", 1.0),
        ("SPICE", 1.0),
    ]
    assert result["seconds"] == {"pretrain": 1.5, "heads": 0.5}
    assert result["reliable"] == {"count": 40, "share": 1.0, "acc": 1.0}
    assert json.loads((run / "scores.json").read_text()) == result


def test_each_method_is_scored_on_its_own_labels(tmp_path: Path) -> None:
    truth = np.arange(NUM_IMAGES) % 2
    clusters, head_clusters = truth.copy(), truth.copy()
    clusters[:4] = 1 - clusters[:4]
    head_clusters[:10] = 1 - head_clusters[:10]
    result = evaluate(make_run(tmp_path, clusters=clusters.tolist(), head_clusters=head_clusters.tolist()))
    assert result["acc"] == method(result, "SPICE")["acc"] == pytest.approx(0.9)
    assert method(result, "SPICE_s")["acc"] == pytest.approx(0.75)
    assert method(result, "k-means on pixels")["acc"] == 1.0


def test_protocol_split_scores_the_test_images_and_the_reliable_ones_of_training(tmp_path: Path) -> None:
    truth = np.arange(NUM_IMAGES) % 2
    clusters = truth.copy()
    clusters[:30] = 0  # wrong for half of the 30 training images, right for the 10 test images
    splits = ["train"] * 20 + ["unlabeled"] * 10 + ["test"] * 10
    reliable = [i in (0, 2, 1) or (None if i >= 30 else False) for i in range(NUM_IMAGES)]
    run = make_run(tmp_path, clusters=clusters.tolist(), splits=splits, reliable=reliable, protocol="split")
    result = evaluate(run)
    assert (result["acc"], result["n"], result["protocol"]) == (1.0, 10, "split")
    assert result["reliable"] == {"count": 3, "share": 0.15, "acc": pytest.approx(2 / 3)}


def test_images_without_a_label_count_for_nothing(tmp_path: Path) -> None:
    classes: list[int | None] = [i % 2 if i < 15 else None for i in range(NUM_IMAGES)]
    clusters = [i % 2 if i < 15 else 0 for i in range(NUM_IMAGES)]
    result = evaluate(make_run(tmp_path, classes=classes, clusters=clusters))
    assert (result["acc"], result["n"], method(result, "k-means on pixels")["acc"]) == (1.0, 15, 1.0)


def test_fewer_scored_images_than_clusters_leave_kmeans_null(tmp_path: Path) -> None:
    classes: list[int | None] = [i % 2 if i < 3 else None for i in range(NUM_IMAGES)]
    result = evaluate(make_run(tmp_path, classes=classes, num_clusters=4))
    assert method(result, "k-means on pixels") == {"method": "k-means on pixels", "acc": None, "nmi": None, "ari": None}
    assert method(result, "SPICE")["acc"] == 1.0


def test_images_whose_label_was_given_do_not_count(tmp_path: Path) -> None:
    given = [number < 30 for number in range(NUM_IMAGES)]
    clusters = [number % 2 if number < 30 else 0 for number in range(NUM_IMAGES)]
    run = make_run(tmp_path / "some", reliable=given, clusters=clusters)
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    change_record(run, recipe={**recipe, "reliable": {"labels": "known.parquet"}})
    result = evaluate(run)
    assert (result["n"], result["acc"]) == (10, 0.5)
    assert result["reliable"] == {"count": 30, "share": 0.75, "acc": None}
    assert [row["method"] for row in result["rows"]][-1] == "labels given"
    run = make_run(tmp_path / "all")
    change_record(run, recipe={**recipe, "reliable": {"labels": "known.parquet"}})
    with pytest.raises(DataError, match=r"every labelled image .* was given to stage 3"):
        evaluate(run)


def test_a_run_without_reliable_labels_has_a_share_of_zero_and_no_accuracy(tmp_path: Path) -> None:
    result = evaluate(make_run(tmp_path, reliable=[False] * NUM_IMAGES))
    assert result["reliable"] == {"count": 0, "share": 0.0, "acc": None}


def test_a_run_whose_data_had_no_labels_says_where_the_clusters_are(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    artifacts = json.loads((run / "run.json").read_text())["artifacts"]
    change_record(run, artifacts={**artifacts, "labels": None})
    with pytest.raises(DataError, match=r"no labels, so there is nothing to score.*clusters\.html"):
        evaluate(run)
    assert not (run / "scores.json").exists()


def test_labels_on_no_image_that_is_scored_are_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="protocol=split"):
        evaluate(make_run(tmp_path, protocol="split"))


@pytest.mark.parametrize(
    "missing",
    [
        "run/run.json",
        "run/timing.json",
        "run/assignments.parquet",
        "run/artifacts/heads-d",
        "run/artifacts/heads-d/assignments.npy",
        "run/artifacts/embedding-c/manifest.json",
        "data/labels-b/labels.parquet",
        "data/shards-a/part-00002.parquet",
    ],
)
def test_whatever_is_missing_is_a_storage_error_that_names_it(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path)
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    name = path.parent.name if path.name == "manifest.json" else path.name
    with pytest.raises(StorageError, match=name):
        evaluate(run)


@pytest.mark.parametrize(
    "damaged",
    [
        "run/run.json",
        "run/assignments.parquet",
        "run/artifacts/heads-d/assignments.npy",
        "run/artifacts/embedding-c/embedding.npy",
        "data/labels-b/labels.parquet",
        "data/shards-a/part-00000.parquet",
    ],
)
@pytest.mark.parametrize("share_left", [0, 0.6])
def test_a_truncated_file_is_a_storage_error_that_names_it(tmp_path: Path, damaged: str, share_left: float) -> None:
    run = make_run(tmp_path)
    content = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(content[: int(share_left * len(content))])
    with pytest.raises(StorageError, match=Path(damaged).name):
        evaluate(run)


def test_heads_of_another_number_of_images_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    np.save(run / "artifacts" / "heads-d" / "assignments.npy", np.zeros(NUM_IMAGES - 1, np.int64))
    with pytest.raises(StorageError, match="39 rows for 40 images"):
        evaluate(run)


def test_labels_beyond_the_images_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_labels(tmp_path / "data" / "labels-b", [0] * (NUM_IMAGES + 1))
    with pytest.raises(StorageError, match="beyond the 40"):
        evaluate(run)


def test_assignments_that_list_an_image_twice_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    table = pq.read_table(run / "assignments.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), run / "assignments.parquet")
    with pytest.raises(StorageError, match="every image once"):
        evaluate(run)


@pytest.mark.parametrize(
    "record",
    [
        ["not", "a", "run"],
        {"recipe": {"num_clusters": 2}, "source": {}},
        {"artifacts": {"shards": "a"}, "recipe": {}, "shards_root": "../data"},
    ],
)
def test_the_record_of_an_unfinished_run_or_of_something_else_is_refused(tmp_path: Path, record: Any) -> None:
    run = make_run(tmp_path)
    write_json(run / "run.json", record)
    with pytest.raises(StorageError, match="not of a finished run"):
        evaluate(run)


@pytest.mark.parametrize(
    "record",
    [
        {"artifacts": 3, "recipe": {}, "shards_root": "../data"},
        {"artifacts": {}, "recipe": 3, "shards_root": "../data"},
        {"artifacts": {}, "recipe": {}, "shards_root": None},
    ],
)
def test_a_record_of_other_types_is_refused(tmp_path: Path, record: Any) -> None:
    write_json(tmp_path / "run.json", record)
    with pytest.raises(StorageError, match="not of a finished run"):
        evaluate(tmp_path)


def test_the_winner_of_a_sweep_is_scored_with_the_artifacts_that_it_shares(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    winner = run / "sweeps" / "thresholds"
    winner.mkdir(parents=True)
    for name in ("run.json", "timing.json", "assignments.parquet"):
        shutil.copy(run / name, winner / name)
    change_record(winner, shards_root="../../../data", artifacts_root="../../artifacts")
    assert evaluate(winner) == evaluate(run)
    assert (winner / "scores.json").read_bytes() == (run / "scores.json").read_bytes()
    change_record(winner, artifacts_root="artifacts")
    with pytest.raises(StorageError, match=r"artifacts lacks heads-d"):
        evaluate(winner)


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "spice_ray", *args], capture_output=True, text=True, timeout=120)


def test_on_the_command_line_json_is_one_object_on_standard_output(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    done = command("evaluate", str(run), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads((run / "scores.json").read_text())
    assert len(done.stdout.splitlines()) == 1


def test_on_the_command_line_every_method_is_a_row_of_a_table(tmp_path: Path) -> None:
    done = command("evaluate", str(make_run(tmp_path)))
    assert done.returncode == 0
    assert "40 images, 2 clusters" in done.stdout
    rows = [line for line in done.stdout.splitlines() if "1.000" in line]
    assert [line.split("│")[1].strip() for line in rows] == [
        "k-means on pixels",
        "k-means on the embedding",
        "SPICE_s",
        "SPICE",
    ]


def test_on_the_command_line_a_run_without_labels_is_one_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    artifacts = json.loads((run / "run.json").read_text())["artifacts"]
    change_record(run, artifacts={**artifacts, "labels": None})
    done = command("evaluate", str(run), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"spice-ray: the data of .* had no labels, .*\n", done.stderr)


def test_a_full_disk_is_a_storage_error_and_keeps_the_old_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "scores.json").write_text("old")
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
        "from spice_ray.cli import main\n"
        "main()"
    )  # fmt: skip
    called = [sys.executable, "-c", program, "evaluate", str(run)]
    done = subprocess.run(called, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"spice-ray: .*scores\.json cannot be written \(File too large\); .*\n", done.stderr)
    assert (run / "scores.json").read_text() == "old"
    assert not list(run.glob(".scores*"))
