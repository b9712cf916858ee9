import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from spice_ray.config import ImageRecipe, Sweep
from spice_ray.recipe import load_recipe
from spice_ray.runtime.neighbors import WIDEST
from spice_ray.runtime.tune import most_neighbors, row_of, write_trials

SWEEP = Sweep(recipe="digits", space={"joint.lr": ["1e-3", 0.01], "reliable.neighbors": [10]})


def result(**metrics: Any) -> SimpleNamespace:
    config = {"joint.lr": "1e-3", "reliable.neighbors": 10}
    return SimpleNamespace(metrics=metrics, config=config, error=None)


def test_a_row_holds_values_as_the_recipe_reads_them() -> None:
    row = row_of(result(loss=1.5, num_reliable=7, trial_seconds=2.0, note=""), SWEEP, load_recipe("digits", []))
    assert row["values"] == {"joint.lr": 0.001, "reliable.neighbors": 10}
    assert (row["loss"], row["reliable"]) == (1.5, 7)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_trial_that_diverged_has_no_loss_to_be_ranked_by(loss: float) -> None:
    row = row_of(result(loss=loss, num_reliable=0, note="the loss is not a number"), SWEEP, load_recipe("digits", []))
    assert row["loss"] is None
    assert row["note"] == "the loss is not a number"


def test_a_trial_that_died_says_so() -> None:
    died = SimpleNamespace(metrics=None, config={"joint.lr": 0.01, "reliable.neighbors": 10}, error="a\nworker died")
    row = row_of(died, SWEEP, load_recipe("digits", []))
    assert (row["loss"], row["note"]) == (None, "worker died")


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
        {
            "values": {"reliable.neighbors": value, "joint.lr": 0.1},
            "loss": 1.5,
            "reliable": 7,
            "seconds": 2.0,
            "note": "",
        }
        for value in (10, "adaptive", None)
    ]
    write_trials(tmp_path / "trials.parquet", rows, sweep)
    table = pq.read_table(tmp_path / "trials.parquet")
    assert table["reliable.neighbors"].to_pylist() == ["10", "adaptive", None]
    assert table["joint.lr"].to_pylist() == [0.1] * 3
