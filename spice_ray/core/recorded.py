"""Many small operations, the same again and again: a GPU can keep their launches and make them all at once."""

import gc
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

_TIMES = 2
"""As often work is done as it stands before it is recorded: what is made lazily is there then."""

Shapes = tuple[torch.Size, ...]
Result = TypeVar("Result")


def can_record(device: torch.device) -> bool:
    """Whether work there is recorded."""
    return device.type == "cuda"


class _Recording(NamedTuple, Generic[Result]):
    inputs: list[Tensor]
    """Where it reads."""
    graph: torch.cuda.CUDAGraph
    result: Result


class Recorded(Generic[Result]):
    """Work that is recorded on a GPU for each shape of its inputs (a CUDA graph), and done as it stands on a CPU."""

    def __init__(self, work: Callable[..., Result], device: torch.device) -> None:
        """Take work that gives a tensor, or nothing.

        Args:
            work: Takes tensors on ``device``. It may change tensors there that live as long as this, and bind names to
                new ones that each replay writes anew, but nothing else; must not ask for a value of theirs on the host;
                must do the same each time for inputs of the same shapes; and should not refer to what refers to this:
                graphs have to go when they are not needed any more.
            device: Where it computes.
        """
        self._work, self._device = work, device
        self._times = Counter[Shapes]()
        self._recordings: dict[Shapes, _Recording[Result]] = {}

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Where work is recorded, and done before: autograd remembers streams, and they share no freed memory."""
        return torch.cuda.Stream(self._device)

    def __call__(self, *inputs: Tensor) -> Result:
        """Do the work; what it gives may be overwritten when it is done again."""
        if not can_record(self._device):
            return self._work(*inputs)
        shapes = tuple(given.shape for given in inputs)
        if self._times[shapes] < _TIMES:
            self._times[shapes] += 1
            return self._aside(inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(inputs)
        recording = self._recordings[shapes]
        for kept, given in zip(recording.inputs, inputs, strict=True):
            kept.copy_(given)
        recording.graph.replay()
        return recording.result

    def _aside(self, inputs: tuple[Tensor, ...]) -> Result:
        """As it stands, on the stream where it will be recorded."""
        usual = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            result = self._work(*inputs)
        usual.wait_stream(self._stream)
        return result

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recording[Result]:
        """Nothing is computed yet."""
        kept, graph = [given.clone() for given in inputs], torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        # A graph of others that went meanwhile would break this one.
        gc.collect()
        gc.disable()
        try:
            # Threads that read ahead may pin memory meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = self._work(*kept)
        finally:
            if collects:
                gc.enable()
        return _Recording(kept, graph, result)
