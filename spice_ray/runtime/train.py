"""Stages 1 and 3 under Ray Train: one ``fit`` per stage, its workers fed by Ray Data, resumed from its checkpoints."""

import math
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray.exceptions
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from spice_ray.config import Scale
from spice_ray.contracts import Health
from spice_ray.core import collectives
from spice_ray.errors import DamagedError, SpiceError, StorageError, TrainingError
from spice_ray.runtime.cluster import find_spice_error
from spice_ray.runtime.memory import image_budget
from spice_ray.runtime.progress import ProgressWriter
from spice_ray.runtime.workers import Host, JointJob, PretrainJob
from spice_ray.storage import read_json, write_json

_STEPS_BETWEEN_LOOKS = 10
"""How often workers agree whether a checkpoint is due."""
_ERROR = "error"
"""In the folder of the progress: what a worker met that another try would only meet again."""


class TrainProgress:
    """Ray Train's side of a training loop: checkpoints every so many seconds, and a progress file."""

    def __init__(self, device: torch.device, checkpoint_seconds: float, folder: Path) -> None:
        self._device = device
        self._checkpoint_seconds = checkpoint_seconds
        self._due = time.monotonic() + checkpoint_seconds
        self._writer = ProgressWriter(folder, "train") if collectives.rank() == 0 else None
        self._folder = folder
        self._losses: list[float] = []
        self._health: list[list[float]] = []
        self._pending: list[Tensor] = []

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint that Ray Train knows of."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            state = _read_state(Path(folder) / "state.pt")
        self._losses = state.pop("losses").tolist()
        self._health = state.pop("health").tolist()
        return state

    def advance(self, step: int, total: int, loss: Tensor, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Show progress; save a checkpoint when one is due, on all workers at the same step."""
        self._pending.append(loss)
        if step % _STEPS_BETWEEN_LOOKS and step != total:
            return
        self._settle(step)
        if self._writer is not None:
            self._writer.write(step, total, self._losses[-1])
        if step == total:
            self._write_losses()
        elif collectives.first_worker_decides(time.monotonic() >= self._due, self._device):
            self._save(step, snapshot())

    def note_health(self, epoch: int, loss: Tensor, health: Health) -> None:
        """Leave the signs of each epoch beside the progress, for whoever looks into a run."""
        self._health.append([epoch, float(loss), *health])
        if self._writer is not None:
            lines = (f"{int(epoch)}," + ",".join(f"{value:.6g}" for value in signs) for epoch, *signs in self._health)
            _write_table(self._folder / "health.csv", ["epoch", "loss", *Health._fields], lines)

    def _settle(self, step: int) -> None:
        """Fetch the losses since the last look from the device; all workers hold the same, so all stop together."""
        self._losses += torch.stack(self._pending).tolist()
        self._pending.clear()
        if not math.isfinite(self._losses[-1]):
            raise TrainingError(
                f"the loss of step {step} is not a number; lower the stage's lr, or use precision=fp32, in a new --out"
            )

    def _save(self, step: int, state: dict[str, Any]) -> None:
        if collectives.rank() != 0:
            ray.train.report({"step": step})
        else:
            folder = tempfile.mkdtemp(prefix="spice-checkpoint-")
            told = {"losses": torch.tensor(self._losses), "health": torch.tensor(self._health)}
            torch.save({**state, **told}, Path(folder) / "state.pt")
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
            shutil.rmtree(folder, ignore_errors=True)
        self._due = time.monotonic() + self._checkpoint_seconds

    def _write_losses(self) -> None:
        """Leave the loss of every step beside the progress, for whoever looks into a run."""
        if self._writer is not None:
            lines = (f"{number},{value:.9g}" for number, value in enumerate(self._losses, 1))
            _write_table(self._folder / "losses.csv", ["step", "loss"], lines)


def _write_table(file: Path, columns: list[str], lines: Iterable[str]) -> None:
    file.write_text("\n".join([",".join(columns), *lines, ""]), encoding="utf-8")


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise StorageError(
            f"the checkpoint {file} is damaged; delete the run's folder checkpoints and run the same command again"
        ) from None
    return state


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Train data-parallel; batch-norm statistics stay each lane's own until the end."""
    return ray.train.torch.prepare_model(module, parallel_strategy_kwargs={"broadcast_buffers": False})


def _work(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    job, scale, folder = config["job"], config["scale"], config["progress"]
    if _said(folder) is not None:
        return  # a retry would only meet the error again
    torch.set_num_threads(scale.cpus_per_worker)
    device = ray.train.torch.get_device()
    try:
        if not folder.is_dir():
            raise StorageError(f"{folder} is not seen by every node; choose an --out that all nodes mount")
        sharing = ray.train.get_context().get_local_world_size()
        progress = TrainProgress(device, scale.checkpoint_seconds, folder)
        host = Host(device, wrap_ddp, progress, image_budget(scale, device, sharing))
        config["run"](job, host)
    except (SpiceError, ray.exceptions.RayError) as error:
        # What went wrong in a task that reads comes wrapped.
        ours = find_spice_error(error)
        if ours is None or not folder.is_dir():
            raise
        write_json(folder / _ERROR, {"sentence": str(ours), "damaged": isinstance(ours, DamagedError)})
        if collectives.world_size() > 1:
            raise  # the other workers wait for this one, and only its failure ends them


def _said(folder: Path) -> SpiceError | None:
    """The error of ours that a worker met."""
    file = folder / _ERROR
    if not file.is_file():
        return None
    record = read_json(file)
    return (DamagedError if record["damaged"] else TrainingError)(record["sentence"])


def fit(
    run: Callable[[Any, Host], None], job: PretrainJob | JointJob, scale: Scale, checkpoints: Path, progress: Path
) -> None:
    """Run a training stage on Ray Train until its artifact is published.

    The trainer's name carries the fingerprint, so that the same stage goes on from its last checkpoint and no other
    stage does.

    Raises:
        DamagedError: A shard file is damaged.
        TrainingError: Another error that a user can meet, or it failed more often than ``scale.max_failures``.
    """
    name = f"{run.__name__}-{job.fingerprint}"
    resources: dict[str, float] = {"CPU": scale.cpus_per_worker}
    if scale.gpus_per_worker:
        resources["GPU"] = scale.gpus_per_worker
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"run": run, "job": job, "scale": scale, "progress": progress},
        scaling_config=ray.train.ScalingConfig(
            num_workers=scale.workers, use_gpu=scale.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=ray.train.torch.TorchConfig(backend=backend(scale)),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(checkpoints.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _said(progress) or _user_error(error, name) from error
    said = _said(progress)
    shutil.rmtree(checkpoints / name, ignore_errors=True)
    if said is not None:
        raise said


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
