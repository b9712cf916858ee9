"""No benchmark of its own: ``pretrain.py ray``, one job of stage 1 hosted by Ray Train and by torch.multiprocessing."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from augment import MEAN, STD
from generated import SIDE, Generated
from pretrain_progress import PassedOn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from spice_ray.config import Scale
from spice_ray.contracts import Progress
from spice_ray.core import collectives
from spice_ray.core.lanes import ResidentLanes, Rows, ServedLanes, Stream, serve, shuffle_window
from spice_ray.core.order import stream_key
from spice_ray.readers.parts import images_of, read_part
from spice_ray.runtime.cluster import connected
from spice_ray.runtime.data import Shards, open_shards
from spice_ray.runtime.ingest import ingest
from spice_ray.runtime.progress import SilentReporter
from spice_ray.runtime.train import fit
from spice_ray.runtime.trial import TrialProgress
from spice_ray.runtime.workers import Host, PretrainJob, augmentation_of, run_pretrain
from spice_ray.settings import Image, Pretrain
from spice_ray.stages.pretrain import pretrain

WORKERS, SKIPPED = 2, 5
CPU = torch.device("cpu")
IMAGE = Image(size=SIDE, mean=MEAN, std=STD)
# No run is so long that a checkpoint falls into it.
SCALE = Scale(workers=WORKERS, checkpoint_seconds=3600)
Run = dict[str, list[float]]


class Noted(PassedOn):
    """Notes when each step is over and what its loss was, and passes everything on."""

    def __init__(self, progress: Progress, file: Path) -> None:
        super().__init__(progress)
        self._file = file
        self._times, self._losses = list[float](), list[Tensor]()

    def advance(self, step: int, total: int, loss: Tensor, snapshot: Callable[[], dict[str, Any]]) -> None:
        super().advance(step, total, loss, snapshot)
        self._times.append(time.monotonic())
        self._losses.append(loss)
        if step == total and collectives.rank() == 0:
            # An epoch ends with the last step, which takes longer.
            seconds = [after - before for before, after in pairwise(self._times)][SKIPPED:-1]
            losses = torch.stack(self._losses).tolist()
            self._file.write_text(json.dumps({"seconds": seconds, "losses": losses}))


def noted_file(job: PretrainJob) -> Path:
    return job.root / f"{job.fingerprint}.json"


# Hosted by Ray Train


def noted_pretrain(job: PretrainJob, host: Host) -> None:
    run_pretrain(job, replace(host, progress=Noted(host.progress, noted_file(job))))


def by_ray(job: PretrainJob) -> None:
    progress = job.root / f"progress-{job.fingerprint}"
    progress.mkdir()
    with connected(SCALE, verbose=False):
        fit(noted_pretrain, job, SCALE, [WORKERS], job.root / "checkpoints", progress, print)


# Hosted by torch


def by_torch(job: PretrainJob) -> None:
    torch.multiprocessing.spawn(_work, (job,), nprocs=WORKERS)


def _work(rank: int, job: PretrainJob) -> None:
    torch.set_num_threads(SCALE.cpus_per_worker)
    meeting = job.root / f"meeting-{job.fingerprint}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS)
    settings, share = job.settings, job.settings.lanes // WORKERS
    lanes = serve(job.shards.files, list(range(rank * share, (rank + 1) * share)), settings.lanes)
    stream = Stream(stream_key(job.seed, "pretrain"), settings.batch_size // settings.lanes, shuffle_window(SIDE))
    pretrain(
        settings,
        ResidentLanes(lanes, _read(job.shards, lanes), stream, CPU),
        augmentation_of(job.image),
        num_images=job.shards.num_counted,
        seed=job.seed,
        device=CPU,
        wrap=lambda module: DistributedDataParallel(module, broadcast_buffers=False),
        progress=Noted(TrialProgress(), noted_file(job)),
    )
    dist.destroy_process_group()


def _read(shards: Shards, lanes: ServedLanes) -> Rows:
    tables = [read_part(shards.path, file, shards.format) for files in lanes.files for file in files]
    images = np.concatenate([images_of(table, SIDE) for table in tables])
    sample_ids = np.concatenate([table["sample_id"].to_numpy() for table in tables])
    return Rows(torch.from_numpy(images), torch.from_numpy(sample_ids))


# Both


def measure_ray(settings: Pretrain, steps: int, rounds: int) -> dict[str, Any]:
    found: dict[str, list[Run]] = {"ray": [], "torch": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with connected(SCALE, verbose=False):
            images = Generated(settings.batch_size * (steps + SKIPPED + 2))
            artifact, _ = ingest(images, root, image_size=SIDE, seed=0, reporter=SilentReporter())
        shards = open_shards(artifact, None)
        for number in range(rounds):
            for host, run in (("ray", by_ray), ("torch", by_torch)):
                job = PretrainJob(settings, IMAGE, shards, 0, root, f"{host}-{number}")
                run(job)
                found[host].append(json.loads(noted_file(job).read_text()))
    for ray, torch_ in zip(found["ray"], found["torch"], strict=True):
        np.testing.assert_allclose(ray["losses"], torch_["losses"], rtol=1e-3)
    return report(found, settings)


def report(found: dict[str, list[Run]], settings: Pretrain) -> dict[str, Any]:
    seconds = {host: [run["seconds"] for run in runs] for host, runs in found.items()}
    for host, runs in seconds.items():
        print(f"{host:6s} " + ", ".join(f"{1000 * median(run):,.0f} ms" for run in runs) + " per step")
    result: dict[str, Any] = {"encoder": settings.encoder, "batch_size": settings.batch_size, "seconds": seconds}
    for name, middle in (("median", median), ("mean", mean)):
        pairs = zip(seconds["ray"], seconds["torch"], strict=True)
        ratios = [middle(ray) / middle(torch_) for ray, torch_ in pairs]
        result[f"ratios_of_{name}s"] = ratios
        print(f"ray / torch, {name} step: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return result
