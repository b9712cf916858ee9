import io
import re
from typing import Any

import pytest
from rich.console import Console

from spice_ray.console import ConsoleReporter, probe_table, reuse_table, scores_table, seconds_table, trials_table
from spice_ray.runtime.progress import Done
from spice_ray.runtime.sweep_table import Reuse


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def reporter(clock: Clock, *, is_terminal: bool) -> tuple[ConsoleReporter, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=120, highlight=False, _environ={})
    return ConsoleReporter(console, clock), file


def printed(table: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=120, _environ={}).print(table)
    return file.getvalue()


def test_without_a_terminal_a_stage_is_a_line_every_ten_seconds() -> None:
    clock = Clock()
    shown, file = reporter(clock, is_terminal=False)
    with shown.stage("stage 1", "steps") as update:
        for second in range(26):
            clock.now = 100.0 + second
            update(Done(4 * second, 200, 0.5))
    assert file.getvalue().splitlines() == [
        "stage 1: starting",
        "stage 1: 40/200 steps, 4.0 steps/s, 40 s left, loss 0.5000",
        "stage 1: 80/200 steps, 4.0 steps/s, 30 s left, loss 0.5000",
        "stage 1: done in 25.0 s",
    ]


def test_the_rate_of_a_stage_that_goes_on_leaves_out_what_was_done_before() -> None:
    clock = Clock()
    shown, file = reporter(clock, is_terminal=False)
    with shown.stage("stage 1", "steps") as update:
        update(Done(1000, 1200, None))
        clock.now += 10
        update(Done(1100, 1200, None))
    assert "stage 1: 1100/1200 steps, 10.0 steps/s, 10 s left" in file.getvalue().splitlines()


def test_a_stage_that_stands_still_or_knows_no_total_promises_no_end() -> None:
    clock = Clock()
    shown, file = reporter(clock, is_terminal=False)
    with shown.stage("ingest", "images") as update:
        for done in (Done(5, 10, None), Done(5, 10, None), Done(9, None, None)):
            update(done)
            clock.now += 10
    lines = file.getvalue().splitlines()[1:-1]
    assert lines == ["ingest: 5/10 images", "ingest: 9 images, 0.2 images/s"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_stage_that_fails_is_not_called_done(is_terminal: bool) -> None:
    shown, file = reporter(Clock(), is_terminal=is_terminal)
    with pytest.raises(KeyError), shown.stage("stage 1", "steps"):
        raise KeyError("lost")
    assert "done" not in file.getvalue()


def test_a_terminal_shows_a_bar_with_count_rate_and_loss() -> None:
    clock = Clock()
    shown, file = reporter(clock, is_terminal=True)
    with shown.stage("stage 1", "steps") as update:
        update(Done(0, 200, 0.75))
        clock.now += 5
        update(Done(100, 200, 0.5))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "\x1b[" in file.getvalue()
    assert re.search(r"stage 1 ━+.* 100/200 steps, 20\.0 steps/s, loss 0\.5000", plain)
    assert plain.rstrip().endswith("stage 1: done in 5.0 s")


def test_a_terminal_shows_no_count_before_there_is_one() -> None:
    shown, file = reporter(Clock(), is_terminal=True)
    with shown.stage("stage 1", "steps"):
        pass
    assert "starting" in file.getvalue()
    assert "None" not in file.getvalue()


def test_a_note_is_printed_as_it_is() -> None:
    shown, file = reporter(Clock(), is_terminal=False)
    sentence = "see [bold]/data/run [1, 2][/bold], " + "x" * 200
    shown.note(sentence)
    assert file.getvalue() == sentence + "\n"


def test_scores_show_three_places_and_a_dash_where_there_is_none() -> None:
    rows = [
        {"method": "k-means on pixels", "acc": None, "nmi": None, "ari": None},
        {"method": "SPICE", "acc": 0.98765, "nmi": 0.5, "ari": 1.0},
    ]
    text = printed(scores_table({"n": 40, "k": 2, "rows": rows}))
    assert "40 images, 2 clusters" in text
    assert re.search(r"k-means on pixels │ +- │ +- │ +- ", text)
    assert re.search(r"SPICE +│ 0\.988 │ 0\.500 │ 1\.000", text)


def test_probes_show_what_they_learned_from_and_a_dash_where_there_is_no_accuracy() -> None:
    leave_one_out = {"protocol": "leave_one_out", "n_train": 39, "n_test": 40, "k": 39}
    hold_out = {"protocol": "hold_out", "n_train": 32, "n_test": 8, "k": None}
    rows = [
        {"method": "k-NN on pixels", "accuracy": None, **leave_one_out},
        {"method": "linear probe", "accuracy": 0.98765, **hold_out},
    ]
    text = printed(probe_table(rows))
    assert "k = 39" in text
    assert re.search(r"k-NN on pixels │ +- │ leave one out │ +39 │ +40 ", text)
    assert re.search(r"linear probe +│ +0\.988 │ hold out +│ +32 │ +8 ", text)


def test_seconds_show_one_place_per_stage() -> None:
    assert re.search(r"ingest +│ +1\.2 ", printed(seconds_table({"ingest": 1.249, "heads": 100})))


def test_trials_are_ranked_and_their_notes_are_printed_as_they_are() -> None:
    note = "clusters [a] and [/b] have no reliable sample"
    rows = [
        {"values": {"joint.confidence": 0.9}, "objective": 1.5, "reliable": 10, "seconds": 2.0, "note": ""},
        {"values": {"joint.confidence": None}, "objective": None, "reliable": 0, "seconds": 0.5, "note": note},
    ]
    text = printed(trials_table(rows, ["joint.confidence"], "unsupervised_loss"))
    assert "trials by unsupervised loss, best first" in text
    assert re.search(r"1 │ +0\.9 │ +1\.50000 │ +10 │ +2\.0 │", text)
    assert re.search(r"2 │ +None │ +- │ +0 │ +0\.5 │ " + re.escape(note), text)


def test_what_trials_needed_is_counted() -> None:
    text = printed(reuse_table([Reuse("encoder", 0, 24, 0.0, 804.0), Reuse("joint", 24, 0, 149.7, 0.0)]))
    assert re.search(r"encoder │ +0 │ +0\.0 │ +24 │ +804\.0 ", text)
    assert re.search(r"joint +│ +24 │ +149\.7 │ +0 │ +0\.0 ", text)
