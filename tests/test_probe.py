"""Classifiers that are shown the labels of a finished run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spice_ray import cli
from spice_ray.errors import DataError, StorageError
from spice_ray.evaluate import evaluate
from spice_ray.probe import Labelled, knn_row
from tests.made_runs import NUM_IMAGES, change_record, make_run

METHODS = ["k-NN on pixels", "k-NN on the embedding", "linear probe"]


def probe(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = evaluate(run, probe=True)["probe"]
    return rows


def accuracies(rows: list[dict[str, Any]]) -> list[float | None]:
    return [row["accuracy"] for row in rows]


def test_without_a_test_split_knn_leaves_one_out_and_the_linear_probe_a_fifth(tmp_path: Path) -> None:
    one_out = {"accuracy": 1.0, "protocol": "leave_one_out", "n_train": 39, "n_test": 40, "k": 39}
    fifth = {"accuracy": 1.0, "protocol": "hold_out", "n_train": 32, "n_test": 8, "k": None}
    rows = [dict(method=name, **values) for name, values in zip(METHODS, (one_out, one_out, fifth), strict=True)]
    # All others vote, so that the 20 of the other class outnumber 19 of one's own: nearness decides.
    assert probe(make_run(tmp_path)) == rows


def test_a_labelled_test_split_is_scored_by_the_labels_of_the_others(tmp_path: Path) -> None:
    splits = ["test"] * 10 + ["train"] * 25 + ["unlabeled"] * 5
    rows = probe(make_run(tmp_path, splits=splits))
    assert [(row["protocol"], row["n_train"], row["n_test"], row["k"]) for row in rows] == [
        ("split", 30, 10, 30),
        ("split", 30, 10, 30),
        ("split", 30, 10, None),
    ]
    assert accuracies(rows) == [1.0, 1.0, 1.0]


def test_at_most_200_neighbours_vote() -> None:
    # All are equally near: of the first 200 most are of class 1, of all of them most are of class 0.
    labels = np.repeat([1, 0, 0], [110, 90, 60])
    images = Labelled(np.arange(260), labels, np.zeros(260, np.bool_))
    row = knn_row("k-NN", images, lambda ids: np.ones((len(ids), 1), np.float32))
    assert (row["k"], row["accuracy"]) == (200, 110 / 260)


def test_each_classifier_reads_its_own_features(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    store = run / "artifacts" / "embedding-c"
    np.save(store / "embedding.npy", np.eye(2, dtype=np.float32)[np.arange(NUM_IMAGES) // 2 % 2])
    rows = probe(run)
    assert (rows[0]["accuracy"], rows[2]["accuracy"]) == (1.0, 1.0)
    # At each of two places ten of the wrong class outvote the nine others of the right one.
    assert rows[1]["accuracy"] == 0.0
    np.save(store / "plain.npy", np.ones((NUM_IMAGES, 2), np.float32))
    assert probe(run)[2]["accuracy"] == 0.5


def test_images_without_a_label_neither_vote_nor_count(tmp_path: Path) -> None:
    classes: list[int | None] = [i % 2 if i < 15 else None for i in range(NUM_IMAGES)]
    rows = probe(make_run(tmp_path, classes=classes))
    assert [(row["n_train"], row["n_test"]) for row in rows] == [(14, 15), (14, 15), (12, 3)]
    assert accuracies(rows) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("unlabelled", ["train", "test"])
def test_a_split_with_labels_on_one_side_alone_is_none(tmp_path: Path, unlabelled: str) -> None:
    splits = ["train", "train", "test", "test"] * (NUM_IMAGES // 4)
    classes = [None if split == unlabelled else i % 2 for i, split in enumerate(splits)]
    rows = probe(make_run(tmp_path, splits=splits, classes=classes))
    assert [(row["protocol"], row["n_test"]) for row in rows] == [("leave_one_out", 20)] * 2 + [("hold_out", 4)]


def test_a_class_of_the_test_split_alone_is_never_found(tmp_path: Path) -> None:
    splits = ["train"] * 30 + ["test"] * 10
    classes = [i % 2 if i < 35 else 7 for i in range(NUM_IMAGES)]
    assert accuracies(probe(make_run(tmp_path, splits=splits, classes=classes))) == [0.5, 0.5, 0.5]


def test_of_one_class_everything_is_right(tmp_path: Path) -> None:
    assert accuracies(probe(make_run(tmp_path, classes=[4] * NUM_IMAGES))) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("num_labelled", "expected"), [(1, None), (2, 0.0)])
def test_one_image_has_no_accuracy_and_two_of_different_classes_have_zero(
    tmp_path: Path, num_labelled: int, expected: float | None
) -> None:
    classes: list[int | None] = [i if i < num_labelled else None for i in range(NUM_IMAGES)]
    rows = probe(make_run(tmp_path, classes=classes))
    assert accuracies(rows) == [expected] * 3
    assert [row["n_train"] for row in rows] == [num_labelled - 1] * 3


def test_a_run_on_embeddings_has_no_pixels_to_compare_with(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    change_record(run, recipe={"num_clusters": 2, "seed": 3, "protocol": "whole", "reliable": {}})
    assert [(row["method"], row["accuracy"]) for row in probe(run)] == [(name, 1.0) for name in METHODS[1:]]


def test_features_that_are_too_large_have_no_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spice_ray.evaluate._LARGEST_FEATURES", 4 * NUM_IMAGES * 2)
    assert accuracies(probe(make_run(tmp_path))) == [None, 1.0, 1.0]
    monkeypatch.setattr("spice_ray.evaluate._LARGEST_FEATURES", 4 * NUM_IMAGES * 2 - 1)
    assert accuracies(evaluate(tmp_path / "run", probe=True)["probe"]) == [None, None, None]


def test_scores_are_the_same_with_and_without_the_probe_and_the_file_follows(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    plain = evaluate(run)
    before = (run / "scores.json").read_bytes()
    probed = evaluate(run, probe=True)
    assert json.loads((run / "scores.json").read_text()) == probed
    assert {key: value for key, value in probed.items() if key != "probe"} == plain
    evaluate(run)
    assert (run / "scores.json").read_bytes() == before


def test_a_run_without_labels_has_nothing_to_learn_from(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    artifacts = json.loads((run / "run.json").read_text())["artifacts"]
    change_record(run, artifacts={**artifacts, "labels": None})
    with pytest.raises(DataError, match=r"no labels, so there is nothing to score"):
        evaluate(run, probe=True)


@pytest.mark.parametrize("share_left", [None, 0, 0.6])
def test_features_that_are_missing_or_truncated_are_a_storage_error(tmp_path: Path, share_left: float | None) -> None:
    run = make_run(tmp_path)
    file = run / "artifacts" / "embedding-c" / "plain.npy"
    content = file.read_bytes()
    file.unlink()
    if share_left is not None:
        file.write_bytes(content[: int(share_left * len(content))])
    with pytest.raises(StorageError, match=r"plain\.npy"):
        evaluate(run, probe=True)
    assert not (run / "scores.json").exists()


def test_the_command_prints_the_probe_as_a_second_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.evaluate(make_run(tmp_path), probe=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "1.000" in line]
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines[-3:]] == [
        ["k-NN on pixels", "1.000", "leave one out", "39", "40"],
        ["k-NN on the embedding", "1.000", "leave one out", "39", "40"],
        ["linear probe", "1.000", "hold out", "32", "8"],
    ]
