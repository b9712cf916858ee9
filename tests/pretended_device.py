"""A device of torch that is the processor in disguise, and refuses what a GPU would: tensors of two devices at once.

``python -m tests.pretended_device NAME`` runs one of the checks below; they have a process of their own, as a device
that was once made known to torch cannot be taken back.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "pretended"
_ATEN = torch.ops.aten
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


def _computed(call: Any, args: Any, kwargs: Any) -> Any:
    flat, tree = tree_flatten((args, kwargs))
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


def neighbors() -> None:
    """Searched for there as here, from wherever rows are, and however many of them are kept."""
    from spice_ray.core.neighbors import NeighborSearch, exact_neighbors

    generator, device = torch.Generator().manual_seed(0), torch.device(DEVICE)
    alike = torch.full((2100, 16), 0.25)
    for many in (normalize(torch.randn(4200, 32, generator=generator)), alike, alike[:300]):
        rows = torch.cat((many, many[:50]))
        expected = [of_all[-400:] for of_all in exact_neighbors(rows, 10)]
        for given, where in ((rows.to(device), None), (rows, device), (rows.numpy(), device)):
            for kept in (0, rows.numel() * 2, rows.numel() * 4):
                search = NeighborSearch(given, 10, device=where, most_kept=kept)
                assert search._rows.device.type == DEVICE
                found = search.find(max(0, len(rows) - 400), len(rows))
                assert torch.equal(found[0], expected[0])
                assert torch.equal(found[1], expected[1])


def strangers() -> None:
    """Two devices at once are refused, so that the other checks can fail."""
    here = torch.arange(3.0)
    there = here.to(DEVICE)
    assert there.device.type == DEVICE
    assert (there[there > 0] * 2).tolist() == [2, 4]
    there[torch.tensor([0])] = 5
    assert there.tolist() == [5, 1, 2]
    for wrong in (lambda: here + there, lambda: here[there > 0], lambda: torch.cat((here, there))):
        try:
            wrong()
        except AssertionError:
            continue
        raise SystemExit("tensors of two devices were not refused")


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    with Pretended():
        {one.__name__: one for one in (neighbors, strangers)}[sys.argv[1]]()
