import json
from pathlib import Path

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from spice_ray.errors import StorageError
from spice_ray.runtime.looks import Looks, Stopping


def test_looks_are_kept_by_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "looks.json"
    looks = Looks.read(file)
    assert (looks.values, looks.stopped) == ({}, False)
    looks.keep(2, 1.5)  # few steps have no first one
    looks.keep(10, -0.25)
    assert (Looks.read(file).values, Looks.read(file).stopped) == ({2: 1.5, 10: -0.25}, False)
    Looks.read(file).stop()
    assert (Looks.read(file).values, Looks.read(file).stopped) == ({2: 1.5, 10: -0.25}, True)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"values": [1.0], "stopped": false}',
        '{"values": {"1": null}, "stopped": false}',
        '{"values": {"first": 1.0}, "stopped": false}',
        '{"values": {"1": NaN}, "stopped": false}',
        '{"values": {"1": 1.0}}',
        '{"values": {"1":',
    ],
)
def test_a_file_that_holds_something_else_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "looks.json"
    file.write_text(text)
    with pytest.raises(StorageError, match=r"looks\.json .*; delete it and run again"):
        Looks.read(file)


def stopping() -> Stopping:
    found = Stopping(time_attr="look", max_t=4, grace_period=1, reduction_factor=2)
    found.set_search_properties("objective", "min")
    return found


def heard(scheduler: Stopping, file: Path, objective: float, *, is_over: bool = False) -> str:
    trial = Trial("trial", stub=True)
    scheduler.on_trial_add(None, trial)
    told = {"look": 1, "objective": objective, "looks_file": str(file), "is_over": is_over}
    return scheduler.on_trial_result(None, trial, told)


def test_a_trial_that_is_stopped_is_noted(tmp_path: Path) -> None:
    scheduler, file = stopping(), tmp_path / "looks.json"
    assert heard(scheduler, file, 1.0) == TrialScheduler.CONTINUE
    assert not file.exists()
    Looks.read(file).keep(1, 2.0)
    assert heard(scheduler, file, 2.0) == TrialScheduler.STOP
    assert json.loads(file.read_text()) == {"values": {"1": 2.0}, "stopped": True}


def test_trials_that_are_over_count_for_the_others_and_are_never_stopped(tmp_path: Path) -> None:
    scheduler, file = stopping(), tmp_path / "looks.json"
    for objective in (1.0, 1.1, 9.0):
        assert heard(scheduler, file, objective, is_over=True) == TrialScheduler.CONTINUE
    assert not file.exists()
    assert heard(scheduler, file, 5.0) == TrialScheduler.STOP
    assert Looks.read(file).stopped
    assert heard(scheduler, file, 0.5) == TrialScheduler.CONTINUE
