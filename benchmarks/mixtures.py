"""No benchmark: mixtures whose number of clusters is known, as unit rows.

Clusters live in a few dimensions of a wider space, with faint noise in all of them. ``distance`` is that of
neighbouring centres in standard deviations of a cluster: two round clusters of equal size have two modes from 2 on.

Shapes: K clusters, n rows, d dimensions that clusters live in, D width of the rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_FAINT = 0.3
_SMALLEST = 15
_SIZES = {5: (16, 4), 10: (64, 8), 20: (64, 8), 40: (128, 12)}
"""For each K, D and d."""


class Mixture(NamedTuple):
    """A mixture to be drawn."""

    name: str
    num_clusters: int
    width: int
    dims: int
    distance: float
    is_even: bool = True
    """Clusters of one size and of one round shape, spread evenly; else none of these, and heavy tails."""
    styles: int = 1
    """Modes of each cluster, 2.5 standard deviations apart."""
    groups: int | None = None
    """Groups that the clusters come in, all of one size."""


def suite() -> list[Mixture]:
    """All mixtures that K is sought in."""
    found: list[Mixture] = []
    for count, (width, dims) in _SIZES.items():
        found += [Mixture(f"even, {d:g}", count, width, dims, d) for d in (7, 5, 4)]
        found += [Mixture(f"uneven, {d:g}", count, width, dims, d, False) for d in (6, 5, 4, 3.2)]
        found += [Mixture(f"uneven with styles, {d:g}", count, width, dims, d, False, 3) for d in (5, 4)]
    for groups, count in ((3, 9), (4, 20), (5, 10), (8, 40)):
        found.append(Mixture(f"in {groups} groups, 5", count, 64, 8, 5, groups=groups))
    return found


def draw(mixture: Mixture, num_rows: int, seed: int) -> NDArray[np.float32]:
    """Unit rows of the mixture in random order, (n, D)."""
    return draw_labelled(mixture, num_rows, seed)[0]


def draw_labelled(mixture: Mixture, num_rows: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit rows of the mixture in random order, (n, D), and the cluster of each, (n,)."""
    rng = np.random.default_rng([seed, *mixture.name.encode(), mixture.num_clusters])
    centres = _centres(mixture, rng)
    deviation = np.quantile(_nearest(centres), 0.2) / mixture.distance
    sizes = _sizes(mixture, num_rows, rng)
    drawn = [centre + deviation * _cluster(mixture, size, rng) for centre, size in zip(centres, sizes, strict=True)]
    order = rng.permutation(sum(len(rows) for rows in drawn))
    low = np.concatenate(drawn)[order]
    turn = np.linalg.qr(rng.normal(size=(mixture.width, mixture.dims)))[0].T
    noise = rng.normal(size=(len(low), mixture.width)) * np.sqrt(mixture.dims / mixture.width)
    labels = np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn])[order]
    return _unit(low @ turn + _FAINT * deviation * noise).astype(np.float32), labels


def _centres(mixture: Mixture, rng: np.random.Generator) -> Floats:
    if mixture.groups is not None:
        return _grouped(mixture, rng)
    return _spread(mixture.num_clusters, mixture.dims, rng, tries=10 if mixture.is_even else 2)


def _grouped(mixture: Mixture, rng: np.random.Generator) -> Floats:
    assert mixture.groups is not None
    groups = _spread(mixture.groups, mixture.dims, rng, tries=10)
    each = mixture.num_clusters // mixture.groups
    radius = np.quantile(_nearest(groups), 0.2) / 4
    members = [centre + radius * _apart(_spread(each, mixture.dims, rng, tries=10)) for centre in groups]
    return np.concatenate(members)


def _spread(count: int, dims: int, rng: np.random.Generator, tries: int) -> Floats:
    """Points of the unit sphere, each the farthest from the others of so many ``tries``."""
    found = _unit(rng.normal(size=(1, dims)))
    while len(found) < count:
        new = _unit(rng.normal(size=(tries, dims)))
        distances = np.linalg.norm(new[:, None] - found, axis=2).min(axis=1)
        found = np.concatenate([found, new[distances.argmax()][None]])
    return found


def _cluster(mixture: Mixture, size: int, rng: np.random.Generator) -> Floats:
    """Rows around zero whose standard deviation is about 1 in each dimension."""
    dims = mixture.dims
    rows = rng.normal(size=(size, dims))
    if not mixture.is_even:
        rows /= np.sqrt(rng.chisquare(8, size=(size, 1)) / 8)
        axes = np.linalg.qr(rng.normal(size=(dims, dims)))[0]
        rows = rows * np.exp(rng.uniform(-0.8, 0.3, dims)) @ axes * np.exp(rng.uniform(-0.25, 0.15))
    if mixture.styles > 1:
        modes = 2.5 * _apart(_spread(mixture.styles, dims, rng, tries=10))
        rows = rows + modes[rng.integers(mixture.styles, size=size)]
        rows /= np.sqrt(1 + (modes**2).sum(axis=1).mean() / dims)
    return rows


def _sizes(mixture: Mixture, num_rows: int, rng: np.random.Generator) -> Iterator[int]:
    """Rows of each cluster; uneven ones differ up to eightfold."""
    shares = (
        np.ones(mixture.num_clusters) if mixture.is_even else np.exp(rng.uniform(0, np.log(8), mixture.num_clusters))
    )
    return (max(_SMALLEST, int(share * num_rows)) for share in shares / shares.sum())


def _apart(points: Floats) -> Floats:
    """The points, scaled so that neighbours are 1 apart."""
    return points / np.median(_nearest(points))


def _nearest(points: Floats) -> Floats:
    """The distance of each point from its neighbour."""
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(distances, np.inf)
    found: Floats = distances.min(axis=1)
    return found


def _unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
