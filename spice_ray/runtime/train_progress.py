"""What a training worker tells Ray Train and the user: losses, health and checkpoints, off the loop's critical path."""

import math
import pickle
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch
from torch import Tensor

from spice_ray import mirror
from spice_ray.contracts import Health
from spice_ray.core import collectives
from spice_ray.errors import StorageError, TrainingError, UnreachableError
from spice_ray.runtime.progress import ProgressWriter
from spice_ray.storage import write_json

_STEPS_BETWEEN_LOOKS = 10
"""How often workers agree whether a checkpoint is due."""
ERROR_FILE = "error"
"""In the folder of the progress: what a worker met that another try would only meet again."""


def leave_error(folder: Path, error: Exception, *, damaged: bool = False) -> None:
    """Tell the driver what it should tell the user."""
    write_json(folder / ERROR_FILE, {"sentence": str(error), "damaged": damaged})


class Fetched:
    """Losses on their way from the device: asked for at one look and read at the next, so that no step waits."""

    def __init__(self, losses: list[Tensor]) -> None:
        """Begin to fetch scalars."""
        stacked = torch.stack(losses)
        self._host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=stacked.is_cuda)
        self._host.copy_(stacked, non_blocking=True)
        self._arrived = torch.cuda.Event() if stacked.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[float]:
        """The losses; waits where they are still on their way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class TrainProgress:
    """Ray Train's side of a training loop: checkpoints every so many seconds, and a progress file."""

    def __init__(self, device: torch.device, checkpoint_seconds: float, folder: Path) -> None:
        self._device = device
        self._checkpoint_seconds = checkpoint_seconds
        self._due = time.monotonic() + checkpoint_seconds
        self._written = threading.Event()
        self._written.set()
        self._writer = ProgressWriter(folder, "train") if collectives.rank() == 0 else None
        self._folder = folder
        self._losses: list[float] = []
        self._num_written = 0
        self._health: list[list[float]] = []
        self._pending: list[Tensor] = []
        self._fetched: Fetched | None = None

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
        self._settle()
        self._fetched = Fetched(self._pending)
        self._pending.clear()
        if self._writer is not None and self._losses:
            self._writer.write(step, total, self._losses[-1])
        if step == total:
            self._settle()
            self._write_losses(is_over=True)
        elif collectives.first_worker_decides(self._is_due(), self._device):
            self._settle()
            self._save(step, snapshot())
            self._write_losses(is_over=False)

    def note_health(self, epoch: int, loss: Tensor, health: Health) -> None:
        """Leave the signs of each epoch beside the progress, for whoever looks into a run."""
        self._health.append([epoch, float(loss), *health])
        if self._writer is not None:
            lines = (f"{int(epoch)}," + ",".join(f"{value:.6g}" for value in signs) for epoch, *signs in self._health)
            _write_table(self._folder / "health.csv", ["epoch", "loss", *Health._fields], lines)

    def _settle(self) -> None:
        """Take in the losses that were asked for; all workers hold the same, so all stop together."""
        if self._fetched is None:
            return
        self._losses += self._fetched.read()
        self._fetched = None
        check_loss(len(self._losses), self._losses[-1])

    def _is_due(self) -> bool:
        """Storage that is slower than ``checkpoint_seconds`` gets fewer checkpoints, not a queue of them."""
        return time.monotonic() >= self._due and self._written.is_set()

    def _save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state, and let it be written while training goes on."""
        mode = ray.train.CheckpointUploadMode.ASYNC
        if collectives.rank() != 0:
            ray.train.report({"step": step}, checkpoint_upload_mode=mode)
        else:
            told = {"losses": torch.tensor(self._losses), "health": torch.tensor(self._health)}
            copied = on_cpu({**state, **told})
            storage = ray.train.get_context().get_storage()
            system, root = storage.storage_filesystem, storage.experiment_fs_path
            self._written.clear()
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint(root, system),
                checkpoint_upload_mode=mode,
                delete_local_checkpoint_after_upload=False,
                checkpoint_upload_fn=lambda _, name: self._write_state(copied, f"{root}/{name}", system),
            )
        self._due = time.monotonic() + self._checkpoint_seconds

    def _write_state(self, state: dict[str, Any], folder: str, system: pyarrow.fs.FileSystem) -> ray.train.Checkpoint:
        """Write a checkpoint; Ray Train knows of it only afterwards."""
        try:
            system.create_dir(folder)
            with system.open_output_stream(f"{folder}/state.pt", compression=None) as stream:
                torch.save(state, stream)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                system.delete_dir(folder)  # which makes room for the sentence, and nobody else would
            refused = StorageError(
                f"the checkpoint {folder} was not written ({' '.join(str(error).split())}); make room there and run "
                "the same command again"
            )
            if not mirror.is_mirrored(self._folder):  # a server may take the next one
                leave_error(self._folder, refused)
            raise refused from error
        self._written.set()
        return ray.train.Checkpoint(folder, system)

    def _write_losses(self, *, is_over: bool) -> None:
        """Leave the loss of every step beside the progress, for whoever looks into a run; on a server in the end."""
        if self._writer is None:
            return
        if is_over:
            self._writer.write(len(self._losses), len(self._losses), self._losses[-1])
        file, first = self._folder / "losses.csv", self._num_written
        if mirror.is_mirrored(file) and not is_over:
            return
        lines = [f"{number},{value:.9g}" for number, value in enumerate(self._losses[first:], first + 1)]
        with suppress(OSError):  # a full disk is told of by checkpoints
            if first == 0:  # also where another process that was lost has written some
                _write_table(file, ["step", "loss"], lines)
            else:
                with file.open("a", encoding="ascii") as table:
                    table.writelines(f"{line}\n" for line in lines)
        self._num_written = len(self._losses)


def check_loss(step: int, loss: float) -> None:
    """Refuse to train on.

    Raises:
        TrainingError: The loss is not a number.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of step {step} is not a number; lower the stage's lr, or use precision=fp32, in a new --out"
        )


def on_cpu(state: Any) -> Any:
    """A copy of nested dicts, lists and tensors in main memory, which training does not change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, list) else state


def _write_table(file: Path, columns: list[str], lines: Iterable[str]) -> None:
    with suppress(UnreachableError):
        mirror.write_bytes(file, "\n".join([",".join(columns), *lines, ""]).encode())


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise StorageError(
            f"the checkpoint {file} is damaged; delete the run's folder checkpoints and run the same command again"
        ) from None
    return state
