"""When stage 3 may stop early, without a label to validate on."""

from typing import Any

import torch
from torch import Tensor

WINDOW = 100
"""Steps whose mean is looked at: one step's share is a matter of luck."""
_GROWTH = 1e-3
"""What counts as growth of the share."""


class Plateau:
    """Watches a share that grows while training goes well, and says when it has stopped growing.

    Before it has begun to, it is waited for: a network that starts anew is sure of nothing for long.
    """

    def __init__(self, patience: int, device: torch.device) -> None:
        """Wait ``patience`` steps for growth."""
        self._patience = patience
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._best, self._best_step = 0.0, 0
        self.is_over = False
        """Whether it has."""

    def add(self, step: int, share: Tensor) -> None:
        """Take in the share of ``step``, counted from 1; the device is waited for once in each window.

        Args:
            step: The steps come one by one.
            share: A scalar in [0, 1], the same on all workers.
        """
        self._sum += share
        if step % WINDOW:
            return
        mean = float(self._sum) / WINDOW
        self._sum.zero_()
        if mean >= self._best + _GROWTH:
            self._best, self._best_step = mean, step
        self.is_over = self._best > 0 and step - self._best_step >= self._patience

    def state(self) -> dict[str, Any]:
        """What the steps to come depend on."""
        figures = (self._best, self._best_step, self.is_over)
        return {"sum": self._sum, "figures": torch.tensor(figures, dtype=torch.float64)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._sum.copy_(state["sum"])
        best, step, is_over = state["figures"].tolist()
        self._best, self._best_step, self.is_over = best, int(step), bool(is_over)
