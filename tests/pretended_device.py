"""A device of torch that is the processor in disguise, and refuses what a GPU would: tensors of two devices at once."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = "pretended"
_ATEN = torch.ops.aten
_LEAVING = (
    _ATEN._local_scalar_dense.default,
    _ATEN.nonzero.default,
    _ATEN.masked_select.default,
    _ATEN.equal.default,
    _ATEN._unique2.default,
)
"""What these give the host has to wait for."""
_MOVING = (_ATEN._to_copy.default, _ATEN.copy_.default)
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default)
"""These take indices of the processor too."""


class There(Tensor):
    """A tensor on that device; ``here`` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        """As large, and with the same numbers."""
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(DEVICE, 0),
        )
        made.here = here
        return made

    def __repr__(self, **_: Any) -> str:
        """Its numbers."""
        return f"There({self.here!r})"

    def tolist(self) -> Any:
        """Its numbers, as torch has them of its own devices only."""
        assert Recording.current is None, "a list waits for the device while it is recorded"
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is done to it outside of the mode."""
        return _computed(call, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Within it tensors can be made there."""

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is done to any tensor."""
        return _computed(call, args, kwargs or {})


class Recording:
    """What a graph of CUDA keeps: calls with the very tensors and numbers that they were made with.

    Within ``record`` nothing is changed that was there before, and a value must not leave the device.
    """

    current: "Recording | None" = None

    def __init__(self) -> None:
        self._calls: list[tuple[Any, list[Any], Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self.replays = 0

    def note(self, call: Any, flat: list[Any], tree: Any, result: Any) -> None:
        """Keep a call that was made, and what it gave; of the processor's numbers, as they are now."""
        kept = [one.clone() if isinstance(one, Tensor) and not isinstance(one, There) else one for one in flat]
        self._calls.append((call, kept, tree, result))

    def spare(self, call: Any, args: Any, kwargs: Any) -> None:
        """Remember what a call that is about to be made changes."""
        given = {argument.name: one for argument, one in zip(call._schema.arguments, args, strict=False)} | kwargs
        changed = [
            given[argument.name]
            for argument in call._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
        ]
        self._before += [(one.here, one.here.clone()) for one in tree_flatten(changed)[0] if isinstance(one, There)]

    def replay(self) -> None:
        """Make all calls again; what they give comes where it came when they were recorded."""
        self.replays += 1
        for call, flat, tree, result in self._calls:
            again = _called(call, flat, tree)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, There) and old.here.data_ptr() != new.data_ptr():
                    old.here.copy_(new)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep what is called within."""
        assert Recording.current is None, "a recording within another"
        Recording.current = self
        try:
            yield
        finally:
            Recording.current = None
            for here, before in reversed(self._before):
                here.copy_(before)


def _computed(call: Any, args: Any, kwargs: Any) -> Any:
    flat, tree = tree_flatten((args, kwargs))
    recording = Recording.current
    if recording is None:
        return _answered(call, flat, tree, args, kwargs)
    assert not _waits(call, args), f"{call} waits for the device while it is recorded"
    recording.spare(call, args, kwargs)
    result = _answered(call, flat, tree, args, kwargs)
    is_there = any(isinstance(one, There) for one in [*flat, *tree_flatten(result)[0]])
    if is_there:
        if call in _MOVING:
            source = args[1] if call is _ATEN.copy_.default else args[0]
            assert isinstance(source, There), f"{call} brings a value that would be the same at every replay"
            assert isinstance(result, There), f"{call} waits for the device while it is recorded"
        recording.note(call, flat, tree, result)
    return result


def _waits(call: Any, args: Any) -> bool:
    """Whether the host would have to know a value of the device, or the device get one of the host's."""
    if call in _INDEXING and isinstance(args[0], There):
        indices = [one for one in args[1] if one is not None]
        return any(one.dtype == torch.bool or not isinstance(one, There) for one in indices)
    if call is _ATEN.copy_.default:
        return isinstance(args[1], There) and not isinstance(args[0], There)
    return call in _LEAVING and any(isinstance(one, There) for one in args)


def _answered(call: Any, flat: list[Any], tree: Any, args: Any, kwargs: Any) -> Any:
    asked = kwargs.get("device")
    if call is _ATEN._to_copy.default:
        is_there = isinstance(args[0], There) if asked is None else torch.device(asked).type == DEVICE
        return _there(_called(call, flat, tree), is_there)
    tensors = [one for one in flat if isinstance(one, Tensor)]
    is_there = any(isinstance(one, There) for one in tensors)
    if call is _ATEN.copy_.default or call is _ATEN._local_scalar_dense.default:  # meant to cross over
        return _there(_called(call, flat, tree), is_there, flat)
    for number, one in enumerate(tensors):
        is_index = call in _INDEXING and number and one.dtype in (torch.int64, torch.bool)
        if is_there and not isinstance(one, There) and one.dim() and not (is_index and isinstance(tensors[0], There)):
            raise AssertionError(f"{call} was given tensors of two devices: {[type(one) for one in tensors]}")
    made_there = asked is not None and torch.device(asked).type == DEVICE
    return _there(_called(call, flat, tree), is_there or made_there, flat)


def _called(call: Any, flat: list[Any], tree: Any) -> Any:
    """The call, by the processor."""
    args, kwargs = tree_unflatten([one.here if isinstance(one, There) else one for one in flat], tree)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return call(*args, **kwargs)


def _there(result: Any, is_there: bool, given: list[Any] | None = None) -> Any:
    """What was computed, put where it belongs; what was changed in its place is what was given."""
    if not is_there:
        return result
    same = {id(one.here): one for one in given or [] if isinstance(one, There)}
    return tree_map_only(Tensor, lambda one: same.get(id(one)) if id(one) in same else There(one), result)


class _Module(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What a product may be computed in."""
        return [torch.bfloat16]


def make_known() -> None:
    """Make the device known to torch, for as long as the process lives, and replace what tensors of it do not do."""
    _setup_privateuseone_for_python_backend(DEVICE, _Module())
    numbers = torch.tensor
    changed: Any = torch
    changed.tensor = lambda data, device=None, **of: (
        numbers(data, **of) if device is None else numbers(data, **of).to(device)
    )
    changed.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()
