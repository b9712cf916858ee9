import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.small_runs import Corpus

STAGES = ["shards", "encoder", "embedding", "heads", "neighbors", "reliable", "joint", "assignments"]
SNAPSHOT = "checkpoint_manager_snapshot.json"
SLOW_ENOUGH = ["scale.checkpoint_seconds=0.2"]


def under_way(run: Path, kind: str) -> bool:
    """Whether the stage that makes ``kind`` has done some of its work; for training: has a checkpoint to go on from."""
    if list((run / "artifacts").glob(f"{kind}-*/manifest.json")):
        pytest.fail(f"{kind} was finished before it could be killed")
    if kind in ("encoder", "joint"):
        name = {"encoder": "run_pretrain", "joint": "run_joint"}[kind]
        # Which Ray Train writes once it knows of a checkpoint; the checkpoint's own file is there before it is whole.
        return any(has_checkpoint(file) for file in (run / "checkpoints").glob(f"{name}-*/{SNAPSHOT}"))
    if kind == "shards":
        return any((run / "artifacts").glob(".ingest-*"))
    return (run / "progress" / kind).is_dir()


def has_checkpoint(snapshot: Path) -> bool:
    try:
        return bool(json.loads(snapshot.read_text())["checkpoint_results"])
    except ValueError:  # as it is being written
        return False


def start(recipe: Path, data: Path, run: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "spice_ray", "run", str(recipe), "--data", str(data), "--out", str(run)]
    return subprocess.Popen(
        [*command, *SLOW_ENOUGH],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A test run in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)  # some stages take no longer than tenths of a second


def content(run: Path) -> dict[str, str]:
    files = [run / "assignments.parquet", *(f for f in (run / "artifacts").rglob("*") if f.is_file())]
    return {str(file.relative_to(run)): hashlib.blake2b(file.read_bytes()).hexdigest() for file in files}


def kill_and_go_on(kind: str, corpus: Corpus, recipe: Path, finished: Path, run: Path) -> None:
    first = start(recipe, corpus.parquet, run)
    wait_until(lambda: under_way(run, kind), first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = {folder: folder.stat().st_mtime_ns for folder in (run / "artifacts").glob("[a-z]*-*")}
    assert {folder.name.partition("-")[0] for folder in done} - {"labels"} == set(STAGES[: STAGES.index(kind)])

    second = start(recipe, corpus.parquet, run)
    _, errors = second.communicate(timeout=400)
    assert second.returncode == 0, errors[-2000:]
    assert {folder: folder.stat().st_mtime_ns for folder in done} == done
    assert content(run) == content(finished)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.faults] if kind != "joint" else []) for kind in STAGES]
)
def test_a_driver_killed_in_any_stage_goes_on_to_the_same_result(
    kind: str, corpus: Corpus, recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if kind not in ("shards", "encoder"):
        keep_stages_before(kind, finished, run)
    kill_and_go_on(kind, corpus, recipe_file, finished, run)


def keep_stages_before(kind: str, finished: Path, run: Path) -> None:
    """Begin where the stage begins: a copy of the finished run without it and what follows."""
    shutil.copytree(finished, run)
    (run / "assignments.parquet").unlink()
    shutil.rmtree(run / "progress")
    for later in STAGES[STAGES.index(kind) :]:
        for folder in (run / "artifacts").glob(f"{later}-*"):
            shutil.rmtree(folder)


@pytest.mark.timeout(900)
def test_ctrl_c_says_how_to_go_on_and_keeps_what_is_finished(corpus: Corpus, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, corpus.parquet, run)
    wait_until(lambda: (run / "progress" / "encoder").is_dir(), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"the same command again goes on from here" in errors
    assert b"Traceback" not in errors
    assert list((run / "artifacts").glob("shards-*/manifest.json"))
