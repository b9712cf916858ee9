"""Where head actors find the frozen bank: in Ray's object store where it fits, else in the files of the run."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import ray
from numpy.typing import NDArray

from spice_ray.config import Scale
from spice_ray.contracts import Bank
from spice_ray.storage import Artifact

_SHARE = 0.5
"""Of the object store: Ray Data and other runs need the rest."""
Shared = tuple["ray.ObjectRef[NDArray[np.floating]]", tuple[int, ...]]
"""An array in the object store, and the shape in which it is used."""


@dataclass(frozen=True)
class BankPlace:
    """Says where the bank is, and travels to the actors; every process of a node maps the same memory."""

    store: Artifact
    shared: tuple[Shared, ...] | None
    """None: the files are mapped."""

    @classmethod
    def choose(cls, store: Artifact, scale: Scale) -> Self:
        """Put the bank of an embedding store into the object store, if ``scale.bank_memory`` allows for it."""
        bank = open_bank(store)
        fits = bank_bytes(bank) <= _room_for_bank(scale)
        return cls(store, _put(bank) if fits else None)

    def open(self) -> Bank:
        """The bank, read-only."""
        if self.shared is None:
            return open_bank(self.store)
        return Bank(*(ray.get(ref).reshape(shape) for ref, shape in self.shared))


def open_bank(store: Artifact) -> Bank:
    """The bank of an embedding store, mapped; the plain feature stands for views that it has not."""

    def mapped(name: str) -> NDArray[np.floating]:
        array: NDArray[np.floating] = np.load(store.file(f"{name}.npy"), mmap_mode="r")
        return array

    plain = mapped("plain")
    has_views = store.manifest["views"] > 0
    weak = mapped("weak") if has_views and store.manifest.get("weak") != "plain" else plain
    return Bank(mapped("embedding"), plain, weak, mapped("strong") if has_views else plain[None])


def bank_bytes(bank: Bank) -> int:
    """The size of a bank; arrays that are views of the same memory count once."""
    return sum(array.nbytes for array in _distinct(bank).values())


def _room_for_bank(scale: Scale) -> float:
    if scale.bank_memory is not None:
        return scale.bank_memory * (1 << 30)
    # Of one node: each of them keeps a copy of its own for the actors that it runs.
    smallest = min(node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"])
    return _SHARE * min(smallest, ray.available_resources().get("object_store_memory", 0.0))


def _put(bank: Bank) -> tuple[Shared, ...]:
    refs = {address: ray.put(np.asarray(array)) for address, array in _distinct(bank).items()}
    return tuple((refs[_address(array)], array.shape) for array in bank)


def _distinct(bank: Bank) -> dict[int, NDArray[np.floating]]:
    return {_address(array): array for array in bank}


def _address(array: NDArray[np.floating]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
