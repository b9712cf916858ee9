import math
from types import SimpleNamespace
from typing import Any

import pytest

from spice_ray.config import Sweep
from spice_ray.recipe import load_recipe
from spice_ray.runtime.tune import row_of

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
