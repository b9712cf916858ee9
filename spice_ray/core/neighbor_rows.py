"""Rows whose similarities are exact in float64: rounded to multiples of 2^-26, and kept where they are compared.

In float64 every product and every partial sum of such unit rows is exact (a multiple of 2^-52, below 2), so that no
order of summation can matter. Rounded so, float32 rows still are float32: those of at least 1/4 are such multiples
anyway.

Shapes: N rows, D embedding width, b queries, n chosen rows, P pairs.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
TakeRows = Callable[[slice | Tensor], Tensor]
"""Rows by number, float32, (n, D)."""
Compare = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Exact similarities of pairs, float32, none of them -0.0, (P,): of queries, float32, (b, D); which of them a pair
belongs to, rising, int64, (P,); and row numbers, int64, (P,)."""

MOST_KEPT = 512 << 20
"""Bytes of rows that are kept, unless told otherwise."""
_ROUNDER = 1.5 * (1 << 26)
"""What is added to it in float64 is rounded to a multiple of 2^-26."""
_NUMBERS_AT_ONCE = 1 << 22
"""Of pairs that a GPU compares, which bounds the memory for that."""


class ChosenRows(Protocol):
    """Rows that are fetched when they are asked for."""

    shape: tuple[int, int]

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, chosen: slice | Ints) -> NDArray[Any]:
        """The chosen rows, float, (n, D)."""
        ...


Rows = Tensor | NDArray[Any] | ChosenRows


class GridRows:
    """Rows, rounded, on the device where they are compared."""

    def __init__(self, rows: Rows, device: torch.device | None, most_kept: int, step: int) -> None:
        """Keep them there, if they are few enough.

        Args:
            rows: Unit rows, taken as float32, (N, D).
            device: Where to compare; none: where the rows are.
            most_kept: Bytes of rows that may be kept; of more, those that are asked for are taken and rounded anew.
            step: Rows that are taken at once.
        """
        self._source = rows
        self.shape = rows.shape[0], rows.shape[1]
        at_home = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
        self.device = at_home if device is None else device
        self._kept = self._rounded_rows(step) if self.shape[0] * self.shape[1] * 4 <= most_kept else None
        if self.device.type == "cpu":
            self._space, self._space64 = space_for_rows(np.float32), space_for_rows(np.float64)

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    def __getitem__(self, chosen: slice | Tensor) -> Tensor:
        """The chosen rows, float32, (n, D)."""
        return self.exact(chosen).float() if self._kept is None else self._kept[chosen]

    def exact(self, chosen: slice | Tensor) -> Tensor:
        """The same in float64."""
        if self._kept is not None:
            return self._kept[chosen].double()
        return self._rounded(chosen)

    def similarities(self, queries: Tensor, of_query: Tensor, rows: Tensor) -> Tensor:
        """The exact similarities of pairs, float32, none of them -0.0, (P,).

        Args:
            queries: On the grid, float32, (b, D).
            of_query: Which query a pair belongs to, rising, int64, (P,).
            rows: The row number of each, int64, (P,).
        """
        compare = self._one_by_one if self.device.type == "cpu" else self._side_by_side
        # Adding zero gives -0.0 the bits of 0.0.
        return compare(queries, of_query, rows).float().add_(0.0)

    def _one_by_one(self, queries: Tensor, of_query: Tensor, rows: Tensor) -> Tensor:
        """One query at a time, as a processor's cache likes it, float64."""
        counts = of_query.bincount(minlength=len(queries)).tolist()
        pairs = zip(queries.double().numpy(), rows.split(counts), strict=True)
        return torch.from_numpy(np.concatenate([self._products(query, some.numpy()) for query, some in pairs]))

    def _products(self, query: NDArray[np.float64], rows: Ints) -> NDArray[np.float64]:
        """Of a query with rows, some at a time, (n,)."""
        most = max(1, self._space.size // len(query))
        parts = [self._fetched(rows[start : start + most]) @ query for start in range(0, len(rows), most)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _fetched(self, rows: Ints) -> NDArray[np.float64]:
        if self._kept is None:
            return self.exact(torch.from_numpy(rows)).numpy()
        found = fetch(self._kept.numpy(), rows, self._space)
        # Into memory that is there already, as they were fetched.
        exact = self._space64[: found.size].reshape(found.shape)
        np.copyto(exact, found)
        return exact

    def _side_by_side(self, queries: Tensor, of_query: Tensor, rows: Tensor) -> Tensor:
        """Many pairs at a time, as a GPU likes it, float64."""
        most = max(1, _NUMBERS_AT_ONCE // self.shape[1])
        pairs = zip(of_query.split(most), rows.split(most), strict=True)
        return torch.cat([self.exact(some).mul_(queries[query]).sum(1) for query, some in pairs])

    def _rounded_rows(self, step: int) -> Tensor:
        rounded = torch.empty(self.shape, device=self.device)
        for first in range(0, len(self), step):
            chosen = slice(first, first + step)
            rounded[chosen] = self._rounded(chosen)
        return rounded

    def _rounded(self, chosen: slice | Tensor) -> Tensor:
        """The chosen rows as they are given, rounded, float64, (n, D)."""
        return on_grid(take_rows(self._source, chosen).to(self.device))


def on_grid(rows: Tensor) -> Tensor:
    """Rows rounded to multiples of 2^-26, float64."""
    return rows.float().double().add_(_ROUNDER).sub_(_ROUNDER)


def take_rows(rows: Rows, chosen: slice | Tensor) -> Tensor:
    """The chosen rows as a tensor, of the type that they have, (n, D)."""
    if isinstance(rows, Tensor):
        return rows.detach()[chosen if isinstance(chosen, slice) else chosen.to(rows.device)]
    # The copy is for memory maps that cannot be written, which torch does not take.
    return torch.from_numpy(np.array(rows[chosen if isinstance(chosen, slice) else chosen.cpu().numpy()]))


def space_for_rows(dtype: type[Any]) -> NDArray[Any]:
    """Memory for ``fetch``."""
    return np.empty(1 << 20, dtype)


def fetch(bank: Floats, rows: Ints, space: Floats) -> Floats:
    """The chosen rows, in memory that is there already: new memory the system would have to give page by page.

    Args:
        bank: (N, D).
        rows: At most as many as fit the space, (n,).
        space: What ``space_for_rows`` gave.
    """
    shape = len(rows), bank.shape[1]
    # Clipped, as numpy would else take them into new memory first to see whether all are there.
    return bank.take(rows, 0, out=space[: shape[0] * shape[1]].reshape(shape), mode="clip")
