"""A step of many small operations, the same again and again: a GPU can keep its launches and make them all at once."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_TIMES = 2
"""As often a step is made as it stands before it is recorded: what is made lazily is there then."""

Shapes = tuple[torch.Size, ...]


class _Recording(NamedTuple):
    inputs: list[Tensor]
    """Where it reads."""
    graph: torch.cuda.CUDAGraph


class RecordedStep:
    """A step that is recorded on a GPU for each shape of its inputs (a CUDA graph), and made as it stands on a CPU."""

    def __init__(self, step: Callable[..., None], device: torch.device) -> None:
        """Take a step that gives nothing back.

        Args:
            step: Takes tensors on ``device``. It may change nothing but tensors there that live as long as this, must
                not ask for a value of theirs on the host, and must do the same each time for inputs of the same shapes.
            device: Where it computes.
        """
        self._step, self._device = step, device
        self._times = Counter[Shapes]()
        self._recordings: dict[Shapes, _Recording] = {}

    def __call__(self, *inputs: Tensor) -> None:
        """Make the step."""
        if self._device.type != "cuda":
            self._step(*inputs)
            return
        shapes = tuple(given.shape for given in inputs)
        if self._times[shapes] < _TIMES:
            self._times[shapes] += 1
            self._step(*inputs)
            return
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(inputs)
        recording = self._recordings[shapes]
        for kept, given in zip(recording.inputs, inputs, strict=True):
            kept.copy_(given)
        recording.graph.replay()

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recording:
        """Nothing is computed yet."""
        recording = _Recording([given.clone() for given in inputs], torch.cuda.CUDAGraph())
        with torch.cuda.graph(recording.graph):
            self._step(*recording.inputs)
        return recording
