"""No benchmark of its own: the progress of stage 1 as ``pretrain.py ray`` and ``pretrain.py memory`` look on."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from spice_ray.contracts import Health, Progress


class PassedOn:
    """Passes everything on; what else happens after a step is for those who look on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def restore(self) -> dict[str, Any] | None:
        return self._progress.restore()

    def note_health(self, epoch: int, loss: Tensor, health: Health) -> None:
        self._progress.note_health(epoch, loss, health)

    def advance(self, step: int, total: int, loss: Tensor, snapshot: Callable[[], dict[str, Any]]) -> None:
        self._progress.advance(step, total, loss, snapshot)
