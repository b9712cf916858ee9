import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from spice_ray.config import ImageRecipe
from spice_ray.recipe import load_recipe
from spice_ray.run_folder import RunFolder
from spice_ray.runtime.neighbors import WIDEST
from spice_ray.runtime.sweep_table import Reuse, reuse_of, row_of, write_trials
from spice_ray.runtime.trial import nested
from spice_ray.runtime.tune import most_neighbors
from spice_ray.sweep import Sweep

VALUES: dict[str, Any] = {"joint.lr": "1e-3", "reliable.neighbors": 10}


def digits() -> ImageRecipe:
    recipe = load_recipe("digits", [])
    assert isinstance(recipe, ImageRecipe)
    return recipe


def finished_row(**metrics: Any) -> dict[str, Any]:
    told = {"objective": 1.5, "num_reliable": 7, "trial_seconds": 2.0, "note": "", "used": "[]", **metrics}
    return row_of(told, None, VALUES, digits())


def test_a_row_holds_values_as_the_recipe_reads_them() -> None:
    row = finished_row(used='["heads-a", "joint-b"]')
    assert row["values"] == {"joint.lr": 0.001, "reliable.neighbors": 10}
    assert (row["objective"], row["reliable"], row["seconds"]) == (1.5, 7, 2.0)
    assert row["used"] == ["heads-a", "joint-b"]


def test_a_trial_that_was_refused_has_its_values_as_they_were_given() -> None:
    refused = {"joint.labelled_batch": 59}
    row = row_of({"objective": math.inf, "trial_seconds": 0.1, "note": "does not divide"}, None, refused, digits())
    assert (row["values"], row["objective"], row["note"]) == (refused, None, "does not divide")


@pytest.mark.parametrize("objective", [math.nan, math.inf])
def test_a_trial_that_diverged_has_nothing_to_be_ranked_by(objective: float) -> None:
    row = finished_row(objective=objective, note="the loss is not a number")
    assert (row["objective"], row["note"]) == (None, "the loss is not a number")


def test_a_trial_that_died_says_so() -> None:
    row = row_of(None, "a\nworker died", VALUES, digits())
    assert (row["objective"], row["note"], row["used"]) == (None, "worker died", [])


def test_a_trial_that_was_stopped_is_not_ranked_by_its_last_look() -> None:
    row = row_of({"objective": 1.2, "time_total_s": 3.0}, None, VALUES, digits())
    assert (row["objective"], row["last_look"], row["note"]) == (None, 1.2, "stopped early")


def test_a_trial_that_starts_processes_takes_no_more_of_the_cluster_than_it_is_given() -> None:
    scale = nested(load_recipe("digits", ["scale.workers=auto"])).scale
    assert (scale.workers, scale.head_actors, scale.bank_memory) == (1, 1, 0)
    scale = nested(load_recipe("digits", ["scale.workers=2", "scale.head_actors=1"])).scale
    assert (scale.workers, scale.head_actors) == (2, 1)
    assert nested(load_recipe("digits", ["scale.workers=2"])).scale.head_actors == 2


def test_what_was_there_is_reused_by_every_trial_and_what_was_made_by_all_but_one(
    tmp_path: Path,
) -> None:
    run = RunFolder(tmp_path, tmp_path / "artifacts")
    for kind, print_, seconds in (("encoder", "a", 30), ("heads", "b", 7), ("heads", "c", 5)):
        run.note_seconds(kind, print_, seconds)
    rows = [{"used": ["shards-s", "encoder-a", heads]} for heads in ("heads-b", "heads-b", "heads-c")]
    rows.append({"used": []})  # it failed
    assert reuse_of(rows, {"shards-s", "encoder-a"}, run) == [
        Reuse("shards", computed=0, reused=3, seconds=0, saved=0),  # how long it took is not known
        Reuse("encoder", computed=0, reused=3, seconds=0, saved=90),
        Reuse("heads", computed=2, reused=1, seconds=12, saved=7),
    ]


@pytest.mark.parametrize(
    ("base", "values", "expected"),
    [
        ("null", [10, 30], WIDEST),
        ("null", [50, 200, 120], 200),
        ("null", ["200", "adaptive", None], 200),
        ("150", [50, 100], 150),
        ("adaptive", [30], WIDEST),
        ("null", [None], WIDEST),
        ("adaptive", ["adaptive"], WIDEST),
    ],
)
def test_all_trials_share_as_many_neighbours_as_any_asks(base: str, values: list[Any], expected: int) -> None:
    recipe = load_recipe("digits", [f"reliable.neighbors={base}"])
    assert isinstance(recipe, ImageRecipe)
    assert most_neighbors(recipe, Sweep(recipe="digits", space={"reliable.neighbors": values})) == expected


def test_a_sweep_over_other_settings_asks_as_many_neighbours_as_any_run() -> None:
    recipe = load_recipe("digits", [])
    assert isinstance(recipe, ImageRecipe)
    assert most_neighbors(recipe, Sweep(recipe="digits", space={"joint.confidence": [0.9]})) == WIDEST


def test_numbers_beside_words_are_words_in_the_table_of_trials(tmp_path: Path) -> None:
    sweep = Sweep(recipe="digits", space={"reliable.neighbors": [10, "adaptive", None], "joint.lr": [0.1]})
    rows = [
        {**finished_row(), "values": {"reliable.neighbors": value, "joint.lr": 0.1}} for value in (10, "adaptive", None)
    ]
    write_trials(tmp_path / "trials.parquet", rows, sweep)
    table = pq.read_table(tmp_path / "trials.parquet")
    assert table["reliable.neighbors"].to_pylist() == ["10", "adaptive", None]
    assert table["joint.lr"].to_pylist() == [0.1] * 3


def test_what_waits_for_a_trial_needs_no_torch() -> None:
    program = """
import pickle, sys
from pathlib import Path
from spice_ray.recipe import load_recipe
from spice_ray.runtime.tune_trial import Waiting, run_tune_trial
from spice_ray.sweep import Sweep
sweep = Sweep(recipe="digits", space={"heads.lr": [0.01]})
waiting = Waiting(sweep, load_recipe("digits", []), Path("progress"), False, {}, None)
pickle.loads(pickle.dumps((run_tune_trial, waiting)))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
