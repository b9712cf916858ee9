"""How far a group of heads is: shown to the user, and kept in a file from which a restarted actor goes on."""

import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from spice_ray import mirror
from spice_ray.core.order import stream_key
from spice_ray.errors import StorageError, UnreachableError


class HeadProgress:
    """A checkpoint file for the heads of these numbers, written every so many seconds."""

    def __init__(
        self, folder: Path, indices: Sequence[int], checkpoint_seconds: float, tell: Callable[[int], None]
    ) -> None:
        """Keep the state in ``folder``; ``tell`` hears after each epoch how many epochs of these heads are done."""
        self._file = state_file(folder, indices)
        self._num_heads, self._seconds, self._tell = len(indices), checkpoint_seconds, tell
        self._due = time.monotonic() + checkpoint_seconds

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint of these heads; None where there is none, or none that can be read."""
        try:
            state: dict[str, Any] = torch.load(mirror.local(self._file), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            # Nothing is lost but time: from the beginning the heads become the same.
            return None
        self._tell(self._num_heads * len(state["losses"][0]))
        return state

    def advance(self, num_epochs: int, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Show progress; save a checkpoint when one is due."""
        self._tell(self._num_heads * num_epochs)
        if time.monotonic() >= self._due:
            with suppress(UnreachableError):  # a server may take the next one
                _write(snapshot(), self._file)
            self._due = time.monotonic() + self._seconds


def state_file(folder: Path, indices: Sequence[int]) -> Path:
    """Where the state of a group is kept; another grouping has other files."""
    return folder / f"state-{indices[0]:03d}-{stream_key(*indices):016x}.pt"


def _write(state: dict[str, Any], file: Path) -> None:
    """Write so that a reader finds the old state or the new one."""
    temporary = mirror.temporary_of(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        mirror.deliver(temporary, file)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # what could not be written may not be there to remove
            temporary.unlink()
        raise StorageError(
            f"the checkpoint {file} was not written ({' '.join(str(error).split())}); make room there and run the same "
            "command again"
        ) from error
