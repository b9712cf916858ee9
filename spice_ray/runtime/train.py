"""Stages 1 and 3 under Ray Train: one ``fit`` per stage, its workers fed by Ray Data, resumed from its checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.exceptions
import ray.train
import ray.train.torch
import torch
from torch import nn

from spice_ray import mirror
from spice_ray.config import Scale
from spice_ray.core import collectives
from spice_ray.errors import DamagedError, SpiceError, StorageError, TrainingError, UnreachableError
from spice_ray.runtime.cluster import find_spice_error, num_workers
from spice_ray.runtime.memory import device_of, image_budget
from spice_ray.runtime.train_progress import ERROR_FILE, TrainProgress, leave_error
from spice_ray.runtime.workers import Host, JointJob, PretrainJob, may_compile
from spice_ray.storage import open_artifact, read_json


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Train data-parallel; batch-norm statistics stay each lane's own until the end."""
    return ray.train.torch.prepare_model(module, parallel_strategy_kwargs={"broadcast_buffers": False})


def _work(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    job, scale, folder = config["job"], config["scale"], config["progress"]
    if _said(folder) is not None:
        return  # a retry would only meet the error again
    torch.set_num_threads(scale.cpus_per_worker)
    try:
        device_of(scale.gpus_per_worker)  # Ray Train would go on without one
        device = ray.train.torch.get_device()
        if not _is_seen(folder):
            raise StorageError(f"{folder} is not seen by every node; choose an --out that all nodes mount")
        sharing = ray.train.get_context().get_local_world_size()
        progress = TrainProgress(device, scale.checkpoint_seconds, folder)
        memory, compiled = image_budget(scale, device, sharing), may_compile(scale)
        host = Host(device, wrap_ddp, progress, memory, scale.accumulate, compiled)
        config["run"](job, host)
    except (SpiceError, ray.exceptions.RayError) as error:
        # What went wrong in a task that reads comes wrapped.
        ours = find_spice_error(error)
        # A server may answer the next try.
        if ours is None or isinstance(ours, UnreachableError) or not _is_seen(folder):
            raise
        leave_error(folder, ours, damaged=isinstance(ours, DamagedError))
        if collectives.world_size() > 1:
            raise  # the other workers wait for this one, and only its failure ends them


def _is_seen(folder: Path) -> bool:
    """Whether what is written into the folder is seen by the driver."""
    return mirror.is_mirrored(folder) or folder.is_dir()


def _said(folder: Path) -> SpiceError | None:
    """The error of ours that a worker met."""
    file = folder / ERROR_FILE
    if not mirror.exists(file):
        return None
    record = read_json(file)
    return (DamagedError if record["damaged"] else TrainingError)(record["sentence"])


def fit(
    run: Callable[[Any, Host], None],
    job: PretrainJob | JointJob,
    scale: Scale,
    counts: list[int],
    checkpoints: Path,
    progress: Path,
    note: Callable[[str], None],
) -> None:
    """Run a training stage on Ray Train until its artifact is published.

    The trainer's name carries the fingerprint, so that the same stage goes on from its last checkpoint and no other
    stage does.

    Args:
        run: The stage on one worker.
        job: What it is given.
        scale: How the work is spread.
        counts: How many workers there may be, ascending; the most that the cluster holds are started.
        checkpoints: Folder of Ray Train's.
        progress: Folder that the first worker writes its progress to.
        note: Tells the user that fewer workers go on.

    Raises:
        DamagedError: A shard file is damaged.
        TrainingError: Another error that a user can meet, or it failed more often than ``scale.max_failures``.
    """
    name = f"{run.__name__}-{job.fingerprint}"
    config = {"run": run, "job": job, "scale": scale, "progress": progress}
    failures = list[Exception]()
    while True:
        workers = most_of(counts, num_workers(scale))
        if failures:
            note(f"a training worker was lost; {workers} go on from the last checkpoint")
        try:
            _trainer(config, workers, name, checkpoints).fit()
            break
        except ray.train.TrainingFailedError as error:
            failures.append(error)
            said = _said(progress)
            # Ray Train by itself has started a fixed number of workers again.
            if said is not None or scale.workers != "auto" or len(failures) > scale.max_failures:
                raise said or _user_error(failures[0], name) from error
            if isinstance(error, ray.train.ControllerError):  # so many did not start
                counts = [count for count in counts if count < workers] or counts[:1]
    said = _said(progress)
    # A checkpoint may have been refused when the last step was done, and then nobody needs it.
    if said is not None and open_artifact(job.root, job.kind, job.fingerprint) is None:
        raise said
    mirror.remove(checkpoints / name)


def most_of(counts: list[int], held: int) -> int:
    """The largest count, ascending, that is at most ``held``; the least where none is."""
    return max((count for count in counts if count <= held), default=counts[0])


def _trainer(config: dict[str, Any], workers: int, name: str, checkpoints: Path) -> ray.train.torch.TorchTrainer:
    scale: Scale = config["scale"]
    resources: dict[str, float] = {"CPU": scale.cpus_per_worker}
    if scale.gpus_per_worker:
        resources["GPU"] = scale.gpus_per_worker
    return ray.train.torch.TorchTrainer(
        _work,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=scale.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=ray.train.torch.TorchConfig(backend=backend(scale)),
        run_config=ray.train.RunConfig(
            name=name,
            **mirror.storage_of(checkpoints),
            failure_config=_failures(scale),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


def _failures(scale: Scale) -> ray.train.FailureConfig:
    """What Ray Train does about lost workers: it waits for as many as before, which a smaller cluster never has."""
    if scale.workers == "auto":
        return ray.train.FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)
    return ray.train.FailureConfig(max_failures=scale.max_failures)


def backend(scale: Scale) -> str:
    """What workers talk through: nccl needs a GPU for each of them."""
    return "nccl" if scale.gpus_per_worker >= 1 else "gloo"


def _user_error(error: Exception, name: str) -> TrainingError:
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    first = str(causes[0]).strip().splitlines()[-1] if str(causes[0]).strip() else type(causes[0]).__name__
    return TrainingError(
        f"{name} failed ({first}); run the same command again to go on from the last checkpoint, "
        "with --verbose to see what the workers say"
    )
