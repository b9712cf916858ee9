"""Rows of the shared bank of features as tensors: gathered from shared memory or a mapped file, or on the device."""

import copy
from collections.abc import Callable
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.contracts import Bank

View = Literal["plain", "weak", "strong"]
_Gather = Callable[[NDArray[np.int64]], Tensor]


class Features:
    """A bank as a head sees it: float32 rows on ``device``."""

    def __init__(self, bank: Bank, device: torch.device, *, resident: bool = False) -> None:
        """Keep the bank where it is or, where ``resident``, copy it to the device, 2 to 4 bytes for each number."""
        self.device = device
        self.width = bank.plain.shape[1]
        """D."""
        self.num_strong = len(bank.strong)
        """V."""
        self._kept: dict[int, Tensor] = {}
        gather = self._on_device if resident else self._on_host
        self._embedding, self._plain, self._weak = gather(bank.embedding), gather(bank.plain), gather(bank.weak)
        self._strong = [gather(view) for view in bank.strong]

    def with_strong(self, most: int) -> Self:
        """The same with at most so many strong views, at least one."""
        found = copy.copy(self)
        found.num_strong = max(1, min(most, self.num_strong))
        return found

    def embedding(self, rows: NDArray[np.int64]) -> Tensor:
        """Unit rows of the plain view, (B, D)."""
        return self._embedding(rows)

    def view(self, name: View, rows: NDArray[np.int64], number: int = 0) -> Tensor:
        """Pooled features of the plain, the weak or strong view ``number``, (B, D)."""
        match name:
            case "plain":
                return self._plain(rows)
            case "weak":
                return self._weak(rows)
            case "strong":
                return self._strong[number](rows)

    def _on_host(self, array: NDArray[np.floating]) -> _Gather:
        # Fancy indexing copies: the bank is shared memory and must never be written through a tensor.
        return lambda rows: torch.from_numpy(array[rows]).to(self.device, non_blocking=True).float()

    def _on_device(self, array: NDArray[np.floating]) -> _Gather:
        place = array.__array_interface__["data"][0]
        if place not in self._kept:  # without views one array stands for several
            self._kept[place] = torch.from_numpy(np.array(array)).to(self.device)
        kept = self._kept[place]
        return lambda rows: kept[torch.from_numpy(rows).to(self.device, non_blocking=True)].float()
