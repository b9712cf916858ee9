"""A cluster of two hosts: two network namespaces with a cable between them, and object storage that both reach."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spice_ray.evaluate import evaluate
from spice_ray.storage import read_json
from tests.end_to_end.small_runs import NUM_IMAGES, Corpus
from tests.end_to_end.test_jobs import ENVIRONMENT, RAY, end

REPOSITORY = Path(__file__).parents[2]
HEAD, WORKER = "10.77.77.1", "10.77.77.2"
PORT, DASHBOARD, S3 = 6379, 8265, 9000
HOSTED = {
    **ENVIRONMENT,
    # Gloo would take the address that the name of the machine has, which is loopback.
    "GLOO_SOCKET_IFNAME": "eth0",
    "AWS_ENDPOINT_URL": f"http://{HEAD}:{S3}",
    **{"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"},
}
PUT = """
import os, sys
from pyarrow import fs
system = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
system.create_dir("images")
with open(sys.argv[1], "rb") as file, system.open_output_stream("images/train.parquet") as stream:
    stream.write(file.read())
"""
GET = """
import os, sys
from pyarrow import fs
system = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
fs.copy_files(sys.argv[1], sys.argv[2], source_filesystem=system, destination_filesystem=fs.LocalFileSystem())
"""


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str

    def command(self, *words: str, private: Sequence[str] = ()) -> list[str]:
        """What runs a program there, with disks of its own in the place of the folders ``private``."""
        # Not ip netns exec, which mounts another /sys as well: MKL does not start under a job there.
        inside = ["nsenter", f"--net=/run/netns/{self.name}"]
        if not private:
            return [*inside, *words]
        script = " && ".join([*(f"mount -t tmpfs tmpfs {shlex.quote(folder)}" for folder in private), 'exec "$@"'])
        return [*inside, "unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *words]

    def run(self, *words: str, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        command = self.command(*words)
        return subprocess.run(
            command, cwd=REPOSITORY, env=HOSTED, capture_output=True, text=True, timeout=timeout, check=False
        )

    @contextmanager
    def running(self, *words: str, private: Sequence[str] = ()) -> Iterator["subprocess.Popen[bytes]"]:
        """A program there, ended by the group of its processes."""
        nowhere = subprocess.DEVNULL
        found = subprocess.Popen(
            self.command(*words, private=private), env=HOSTED, stdout=nowhere, stderr=nowhere, start_new_session=True
        )
        try:
            yield found
        finally:
            if found.poll() is None:
                end(found)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(found.pid, signal.SIGKILL)

    def wait_for(self, address: str, port: int, seconds: float = 90) -> None:
        """Until something answers there."""
        look = f"import socket; socket.create_connection(('{address}', {port}), timeout=1)"
        deadline = time.monotonic() + seconds
        while self.run(sys.executable, "-c", look).returncode:
            assert time.monotonic() < deadline, f"nothing answers at {address}:{port}"
            time.sleep(0.5)


def ip(*words: str) -> None:
    found = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts and a cable; both see the same disk, but for what each has in the place of its folders."""
    names = [f"spice-{os.getpid()}-{side}" for side in "ab"]
    with ExitStack() as stack:
        for name in names:
            try:
                made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("the program ip is not there (package iproute2)")
            if made.returncode:
                pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
            stack.callback(ip, "netns", "del", name)
        cable = ("eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        laid = subprocess.run(["ip", "link", "add", *cable], capture_output=True, text=True, check=False)
        if laid.returncode:
            pytest.skip(f"network cables are not permitted here: {laid.stderr.strip()}")
        for name, address in zip(names, (HEAD, WORKER), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield Host(names[0], HEAD), Host(names[1], WORKER)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("storage", ["a shared disk", "a bucket"])
def test_a_job_runs_on_two_hosts_and_reads_its_images_from_object_storage(
    hosts: tuple[Host, Host], corpus: Corpus, recipe_file: Path, tmp_path: Path, storage: str
) -> None:
    head, worker = hosts
    with ExitStack() as stack:
        stack.enter_context(head.running(sys.executable, "-m", "moto.server", "-H", HEAD, "-p", str(S3)))
        worker.wait_for(HEAD, S3)
        put = head.run(sys.executable, "-c", PUT, str(corpus.parquet))
        assert put.returncode == 0, put.stderr
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True))
        # A worker takes two CPUs: each host has room for one, and the head for reading.
        start = (str(RAY), "start", "--block")
        shown = (f"--port={PORT}", f"--dashboard-port={DASHBOARD}", f"--dashboard-host={HEAD}", f"--temp-dir={folder}")
        stack.enter_context(head.running(*start, "--head", f"--node-ip-address={HEAD}", "--num-cpus=3", *shown))
        worker.wait_for(HEAD, PORT)
        joining = (f"--address={HEAD}:{PORT}", f"--node-ip-address={WORKER}", "--num-cpus=2")
        # Both would unpack the job's files into the same folder.
        private = [folder] if storage == "a shared disk" else [folder, str(tmp_path)]
        stack.enter_context(worker.running(*start, *joining, private=private))
        head.wait_for(HEAD, DASHBOARD)

        out = tmp_path / "run"
        named = str(out) if storage == "a shared disk" else "s3://images/run"
        settings = ("scale.workers=2", "scale.cpus_per_worker=2", "scale.wait_seconds=60")
        data = "s3://images/train.parquet"
        entry = ("python", "jobs/run.py", str(recipe_file), "--data", data, "--out", named, *settings)
        submit = (str(RAY), "job", "submit", "--address", f"http://{HEAD}:{DASHBOARD}", "--working-dir", ".")
        # Where both keep what they fetch; each sees a disk of its own there.
        kept = json.dumps({"env_vars": {"SPICE_RAY_CACHE": str(tmp_path / "cache")}})
        job = head.run(*submit, "--runtime-env-json", kept, "--", *entry, timeout=800)
        assert job.returncode == 0, job.stderr[-1000:] + job.stdout[-3000:]
        if storage == "a bucket":
            assert not out.exists()
            got = head.run(sys.executable, "-c", GET, "images/run", str(out))
            assert got.returncode == 0, got.stderr

    assert pq.read_table(out / "assignments.parquet").num_rows == NUM_IMAGES
    assert read_json(out / "run.json")["source"]["path"] == data
    scores = evaluate(out)
    assert scores["acc"] > 0.5
