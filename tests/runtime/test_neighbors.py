"""Neighbours on Ray: whoever looks for them, and however often it is interrupted, they are the same."""

import itertools
import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import ray
import torch
from torch.nn.functional import normalize

from spice_ray.config import Scale
from spice_ray.core.neighbors import exact_neighbors
from spice_ray.errors import StorageError
from spice_ray.runtime import neighbors
from spice_ray.runtime.neighbors import NeighborJob, find_neighbors, publish_neighbors, rows_of_part
from spice_ray.storage import read_json
from tests.processes import own_actors

NUM_ROWS, WIDTH, K = 400, 6, 7
IDS = np.setdiff1d(np.arange(NUM_ROWS), [0, 5, 6, 7, 100, 399])


@pytest.fixture
def embedding(tmp_path: Path) -> Path:
    rows = normalize(torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0)))
    rows[200:220] = rows[20:40]  # ties
    np.save(tmp_path / "embedding.npy", rows.numpy())
    return tmp_path / "embedding.npy"


def job_of(embedding: Path, parts: Path, part_rows: int = 90) -> NeighborJob:
    return NeighborJob(embedding, WIDTH, IDS, K, part_rows, parts)


def found(job: NeighborJob, scale: Scale = Scale()) -> np.ndarray:  # noqa: B008
    return np.concatenate(list(find_neighbors(job, scale, lambda done, total: None)))


def expected(embedding: Path) -> np.ndarray:
    return exact_neighbors(np.load(embedding)[IDS], K)[0].numpy()


@pytest.mark.usefixtures("local_ray")
def test_neighbors_are_the_same_from_the_driver_and_from_actors_and_a_lost_part_alone_is_found_again(
    embedding: Path, tmp_path: Path
) -> None:
    whole = found(job_of(embedding, tmp_path / "whole", NUM_ROWS))
    assert np.array_equal(whole, expected(embedding))
    assert whole.dtype == np.int32
    job = job_of(embedding, tmp_path / "parts")
    assert np.array_equal(found(job, Scale()), whole)

    times = {file: file.stat().st_mtime_ns for file in job.parts.iterdir()}
    assert len(times) == 5
    lost, cut = job.part(90), job.part(180)
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-40])  # after a loss of power
    (job.parts / "half.unfinished").write_bytes(b"half")
    one_actor = Scale(cpus_per_worker=2)
    assert np.array_equal(found(job, one_actor), whole)
    kept = {file: at for file, at in times.items() if file not in (lost, cut)}
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


@pytest.mark.faults
def test_four_actors_find_the_same_although_one_is_killed(embedding: Path, tmp_path: Path) -> None:
    process = get_context("spawn").Process(target=find_by_four, args=(embedding, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected(embedding))


def find_by_four(embedding: Path, folder: Path) -> None:
    with TemporaryDirectory(prefix="spice-", ignore_cleanup_errors=True) as sockets:
        ray.init(address="local", num_cpus=5, include_dashboard=False, _temp_dir=sockets)
        killed = threading.Event()
        job = job_of(embedding, folder / "parts", part_rows=1)
        killer = threading.Thread(target=kill_an_actor, args=(folder / "parts", killed), daemon=True)
        killer.start()
        np.save(folder / "found.npy", found(job))
        ray.shutdown()
    assert killed.is_set()


def kill_an_actor(parts: Path, killed: threading.Event) -> None:
    while len(list(parts.glob("*.npy"))) < 4:
        time.sleep(0.01)
    os.kill(own_actors("NeighborActor")[0], signal.SIGKILL)
    killed.set()


def test_what_was_found_before_an_interruption_is_not_looked_for_again(embedding: Path, tmp_path: Path) -> None:
    job = job_of(embedding, tmp_path / "parts", NUM_ROWS)
    told: list[tuple[int, int]] = []
    list(find_neighbors(job, Scale(), lambda *counts: told.append(counts)))
    assert told == [(0, len(IDS)), (len(IDS), len(IDS))]
    embedding.unlink()
    told.clear()
    (again,) = find_neighbors(job, Scale(), lambda *counts: told.append(counts))
    assert told == [(len(IDS), len(IDS))]
    assert again.shape == (len(IDS), K)


def test_lists_are_made_once_and_their_recall_is_noted(embedding: Path, tmp_path: Path) -> None:
    job = replace(job_of(embedding, tmp_path / "parts", NUM_ROWS), lists_key=5)
    by_lists = found(job)
    recall = read_json(job.recall)
    assert recall["share"] >= 0.99
    assert recall["lists"] == len(IDS) // 39
    hits = [len(np.intersect1d(a, b)) for a, b in zip(by_lists, expected(embedding), strict=True)]
    assert sum(hits) / by_lists.size == pytest.approx(recall["share"], abs=1e-9)
    made = job.lists.stat().st_mtime_ns
    job.part(0).unlink()
    assert np.array_equal(found(job), by_lists)
    assert job.lists.stat().st_mtime_ns == made
    artifact = publish_neighbors(tmp_path / "artifacts", "a", job, Scale(), lambda done, total: None)
    assert artifact.manifest["recall"] == recall


def test_lists_that_are_damaged_are_made_anew_by_the_next_run(embedding: Path, tmp_path: Path) -> None:
    job = replace(job_of(embedding, tmp_path / "parts", NUM_ROWS), lists_key=5)
    by_lists = found(job)
    job.part(0).unlink()
    job.lists.write_bytes(job.lists.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"lists.faiss is damaged; run the same command again"):
        found(job)
    assert np.array_equal(found(job), by_lists)


@pytest.mark.faults
@pytest.mark.usefixtures("local_ray")
def test_actors_share_the_lists_that_one_process_has_made(embedding: Path, tmp_path: Path) -> None:
    whole = replace(job_of(embedding, tmp_path / "whole", NUM_ROWS), lists_key=5)
    parts = replace(job_of(embedding, tmp_path / "parts"), lists_key=5)
    assert np.array_equal(found(parts), found(whole))
    assert read_json(parts.recall) == read_json(whole.recall)


def test_the_artifact_holds_all_parts_and_leaves_none_behind(embedding: Path, tmp_path: Path) -> None:
    job = job_of(embedding, tmp_path / "parts", NUM_ROWS)
    artifact = publish_neighbors(tmp_path / "artifacts", "a", job, Scale(), lambda done, total: None)
    assert np.array_equal(np.load(artifact.file("neighbors.npy")), expected(embedding))
    assert artifact.manifest["neighbors"] == K
    assert artifact.manifest["recall"] is None
    assert not job.parts.exists()


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(embedding: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        found(job_of(embedding, tmp_path / "file" / "parts", NUM_ROWS))


def test_parts_of_many_and_wide_rows_are_small() -> None:
    assert rows_of_part(1797, 128) > 1797
    sizes = [rows_of_part(rows, 512) for rows in (60_000, 200_000, 1_300_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1024
    for rows, size in zip((60_000, 200_000), sizes, strict=False):
        assert rows * 512 * size <= neighbors._PRODUCTS_OF_PART
    assert all(first % 1024 == 0 for first in itertools.chain(sizes))
    assert rows_of_part(1_300_000, 512, gpus=0.5) == 7 * 4096
    assert rows_of_part(100_000_000, 512, gpus=0.5) == 4096
