import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.end_to_end.small_runs import Corpus
from tests.end_to_end.test_jobs import ENVIRONMENT, RAY, end, free_ports, wait_for_server
from tests.faults.test_kill import SNAPSHOT, wait_until

SETTINGS = [
    *("scale.workers=auto", "scale.cpus_per_worker=2", "scale.checkpoint_seconds=0.2"),
    *("heads.epochs=2", "reliable.min_confidence=0.999999"),
]

JOINED = "import ray, time; ray.init(logging_level='error')\nwhile len(ray.nodes()) < 2: time.sleep(0.5)"


@contextmanager
def ray_node(*arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A node of a cluster on loopback, ended by the group of its processes."""
    nowhere = subprocess.DEVNULL
    command = [str(RAY), "start", "--block", "--node-ip-address=127.0.0.1", *arguments]
    node = subprocess.Popen(command, env=ENVIRONMENT, stdout=nowhere, stderr=nowhere, start_new_session=True)
    try:
        yield node
    finally:
        if node.poll() is None:
            end(node)


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A head with room for a worker of two processors and for reading, and a node with room for another worker."""
    gcs, client, agent = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ports = (f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}")
        head = ("--head", "--num-cpus=3", f"--temp-dir={folder}", "--include-dashboard=false", *ports)
        with ray_node(*head) as first:
            wait_for_server(gcs, first)
            with ray_node(f"--address=127.0.0.1:{gcs}", "--num-cpus=2") as second:
                address = f"127.0.0.1:{gcs}"
                subprocess.run(
                    [sys.executable, "-c", JOINED], env={**ENVIRONMENT, "RAY_ADDRESS": address}, check=True, timeout=120
                )
                yield address, second


def last_checkpoint(run: Path) -> tuple[int, int] | None:
    """The step of the last checkpoint of stage 1 that Ray Train knows of, and how many workers wrote it."""
    for snapshot in (run / "checkpoints").glob(f"run_pretrain-*/{SNAPSHOT}"):
        try:
            name = json.loads(snapshot.read_text())["checkpoint_results"][-1]["checkpoint_dir_name"]
            state = torch.load(snapshot.parent / name / "state.pt", weights_only=True)
        except (ValueError, IndexError, OSError):  # being written, or just replaced by a later one
            return None
        return state["step"], len(state["query_buffers"])  # each worker's batch-norm statistics are kept
    return None


def losses(run: Path) -> np.ndarray:
    return np.loadtxt(run / "progress" / "encoder" / "losses.csv", delimiter=",", skiprows=1)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_training_goes_on_with_fewer_workers_when_a_node_is_lost(
    two_nodes: tuple[str, "subprocess.Popen[bytes]"], corpus: Corpus, recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    address, second = two_nodes
    run = tmp_path / "run"
    seen: list[tuple[int, int]] = []

    def look(num_workers: int) -> bool:
        found = last_checkpoint(run)
        if found is not None:
            seen.append(found)
        return found is not None and found[1] == num_workers

    command = ["run", str(recipe_file), "--data", str(corpus.parquet), "--out", str(run), *SETTINGS]
    driver = subprocess.Popen(
        [sys.executable, "-m", "spice_ray", *command],
        env={**ENVIRONMENT, "RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        wait_until(lambda: look(2), driver)
        os.killpg(second.pid, signal.SIGKILL)
        wait_until(lambda: look(1), driver)
        _, errors = driver.communicate(timeout=600)
    finally:
        driver.kill()
    assert driver.returncode == 0, errors[-3000:]
    assert b"a training worker was lost; 1 go on from the last checkpoint" in errors
    steps = [step for step, _ in seen]
    assert steps == sorted(steps)
    # The same images in the same order: only sums differ.
    expected = losses(finished)
    np.testing.assert_array_equal(losses(run)[:, 0], expected[:, 0])
    np.testing.assert_allclose(losses(run)[:20, 1], expected[:20, 1], rtol=1e-3)
    np.testing.assert_allclose(losses(run)[:, 1], expected[:, 1], rtol=0.05)


GROWN = """
import sys
from spice_ray.config import Scale
from spice_ray.errors import ResourceError
from spice_ray.runtime.cluster import connected, room
try:
    with connected(Scale(workers=3, cpus_per_worker=2, wait_seconds=0), verbose=False):
        sys.exit("there was room before the cluster grew")
except ResourceError:
    print("too small", flush=True)
with connected(Scale(workers=3, cpus_per_worker=2, wait_seconds=120), verbose=False):
    print(room(2, 0), flush=True)
"""


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_run_waits_for_a_cluster_that_grows(two_nodes: tuple[str, "subprocess.Popen[bytes]"]) -> None:
    address, _ = two_nodes
    environment = {**ENVIRONMENT, "RAY_ADDRESS": address}
    with subprocess.Popen(
        [sys.executable, "-c", GROWN], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "too small\n"
        with ray_node(f"--address={address}", "--num-cpus=2"):
            assert driver.communicate(timeout=200)[0] == "3\n"
    assert driver.returncode == 0
