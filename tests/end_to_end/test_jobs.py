import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.end_to_end.small_runs import NUM_IMAGES, Corpus

REPOSITORY = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # What a job calls python is the head's.
    "PATH": f"{RAY.parent}:{os.environ['PATH']}",
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


@pytest.fixture
def job_server() -> Iterator[str]:
    """A Ray head with its job server on loopback, ended by its process id."""
    gcs, dashboard, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            *(str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=3"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--include-dashboard=true"),
        ]
        nowhere = subprocess.DEVNULL
        head = subprocess.Popen(command, env=ENVIRONMENT, stdout=nowhere, stderr=nowhere, start_new_session=True)
        try:
            wait_for_server(dashboard, head)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            end(head)


def end(head: subprocess.Popen[bytes]) -> None:
    """End the head with its processes: left to itself it waits half a minute for them."""
    os.killpg(head.pid, signal.SIGTERM)
    try:
        head.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(10)


def wait_for_server(port: int, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, "the Ray head ended early"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the job server did not come up in 120 s")


def submit(server: str, *entry: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(RAY), "job", "submit", "--address", server, "--working-dir", ".", "--", "python", *entry],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


@pytest.mark.timeout(900)
def test_a_submitted_job_clusters_images(job_server: str, corpus: Corpus, recipe_file: Path, tmp_path: Path) -> None:
    data, out = ["--data", str(corpus.parquet), "--out", str(tmp_path / "run")], tmp_path / "run"
    for job, name, setting in (
        ("run", str(recipe_file), "heads.cuont=3"),
        ("tune", "tune_configs/smoke.yaml", "seed=x"),
    ):
        refused = submit(job_server, f"jobs/{job}.py", name, *data, setting)
        assert refused.returncode != 0
        assert f"spice-ray: {'unknown setting' if job == 'run' else 'seed='}" in refused.stdout
        assert "using the Ray cluster" not in refused.stdout
        assert not out.exists()

    # Stage 3 is Ray Train again, as stage 1, and is skipped.
    done = submit(job_server, "jobs/run.py", str(recipe_file), *data, "reliable.min_confidence=0.999999")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "using the Ray cluster" in done.stdout
    table = pq.read_table(out / "assignments.parquet")
    assert table["sample_id"].to_pylist() == list(range(NUM_IMAGES))
    assert len(json.loads((out / "run.json").read_text())["artifacts"]) == 9
