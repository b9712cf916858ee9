"""A batch computed in parts, so that it may be larger than memory allows: parts are whole lanes, so nothing changes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spice_ray.core import collectives
from spice_ray.core.encoders import set_lanes


@dataclass(frozen=True)
class Parts:
    """How a worker computes its rows of a batch."""

    lanes: int
    """L: those that it serves."""
    count: int
    """Groups of lanes that are computed one after the other."""

    @property
    def lanes_each(self) -> int:
        """Lanes of each part."""
        return self.lanes // self.count

    def split(self, rows: Tensor) -> list[Tensor]:
        """The rows of each part, of interleaved rows, (b * L, ...)."""
        return [collectives.pick_lanes(rows, part, self.count, self.lanes_each) for part in range(self.count)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        return collectives.join_lanes(parts, self.lanes_each)

    def turns(self, bare: nn.Module) -> Iterator[int]:
        """Each part's number in turn, with the batch norms of ``bare`` told of it."""
        for part in range(self.count):
            set_lanes(bare, self.lanes_each, part, self.count)
            yield part


def exchange(model: Any, bare: nn.Module, *, now: bool) -> AbstractContextManager[None]:
    """Whether backward passes meanwhile wait for the gradients of other workers, which is once per step.

    Args:
        model: What trains data-parallel.
        bare: The same without DDP, or ``model`` itself where there is one worker.
        now: Whether to.
    """
    alone: AbstractContextManager[None] = nullcontext() if now or model is bare else model.no_sync()
    return alone
