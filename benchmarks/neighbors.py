"""Exact nearest neighbours beside faiss's flat index, each on one thread.

    .venv/bin/python benchmarks/neighbors.py --out benchmarks/results/neighbors.json
    .venv/bin/python benchmarks/neighbors.py --embedding RUN/artifacts/embedding-*/embedding.npy

Rows are those of an embedding, or unit vectors in ten broad clusters of which few axes tell nothing, so that whole rows
are compared. On the CPU both look for the neighbours of the same query rows among all
rows, in turn; seconds include what each prepares of the rows. The peer's lists are compared with ours, and ours with a
product of all pairs in float64 where ``--checked`` queries are concerned: lists may differ only where two similarities
lie within 1e-6.
"""

import argparse
import resource
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import surroundings, write_results
from tables import print_table
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core.neighbor_rows import MOST_KEPT
from spice_ray.core.neighbors import NeighborSearch

CLUSTERS = 10
NEAR_TIE = 1e-6
KEPT_ON_GPU = 16 << 30
"""Bytes: a run keeps as many on a GPU that has 48 GB free."""


def make_rows(num_rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, width, generator=generator)
    chosen = torch.randint(CLUSTERS, (num_rows,), generator=generator)
    return F.normalize(centres[chosen] + torch.randn(num_rows, width, generator=generator))


def rows_of(options: argparse.Namespace) -> Tensor:
    """Unit rows, float32, (N, D)."""
    if options.embedding is None:
        return make_rows(options.rows, options.width)
    return F.normalize(torch.from_numpy(np.load(options.embedding)).float())


def timed(work: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def by_ours(rows: Tensor, queries: int, k: int, device: str) -> tuple[Tensor, int]:
    """Row numbers, and how many queries no bound was of use for."""
    kept = MOST_KEPT if device == "cpu" else KEPT_ON_GPU
    search = NeighborSearch(rows, k, device=torch.device(device), most_kept=kept)
    return search.find(0, queries)[0], search.num_compared_with_all


def by_faiss(rows: Tensor, queries: int, k: int) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows.numpy())
    # One more, as it finds the query itself.
    return torch.from_numpy(index.search(rows[:queries].numpy(), k + 1)[1])


def unlike(rows: Tensor, found: Tensor, expected: Tensor) -> int:
    """Queries whose lists differ."""
    pairs = zip(found.tolist(), expected.tolist(), strict=True)
    return sum(differ(rows, query, ours, theirs) for query, (ours, theirs) in enumerate(pairs))


def differ(rows: Tensor, query: int, ours: list[int], theirs: list[int]) -> bool:
    """Whether two lists of a query differ otherwise than by a near tie with the last of them."""
    others = torch.tensor(sorted(set(ours) ^ set(theirs)), dtype=torch.int64)
    if not len(others):
        return False
    similarities = rows[others].double() @ rows[query].double()
    return bool(similarities.max() - similarities.min() > NEAR_TIE)


def by_float64(rows: Tensor, queries: int, k: int) -> Tensor:
    similarities = rows[:queries].double() @ rows.double().T
    similarities.fill_diagonal_(-torch.inf)
    return similarities.topk(k, dim=1).indices


def without_own(found: Tensor) -> Tensor:
    """The k others of the k + 1 nearest."""
    own = torch.arange(len(found))[:, None]
    is_own = found == own
    is_own[:, -1] |= ~is_own.any(dim=1)
    return found[~is_own].view(len(found), -1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows, k = rows_of(options), options.neighbors
    queries = min(options.queries, len(rows))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: dict[str, list[float]] = {"spice_ray": [], "faiss": []}
    for number in range(options.rounds + 1):
        (ours, left_open), own = timed(lambda: by_ours(rows, queries, k, options.device))
        if number == 0:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if number:  # the first round warms up
            seconds["spice_ray"].append(own)
        if options.device == "cpu":
            theirs, peer = timed(lambda: by_faiss(rows, queries, k))
            seconds["faiss"] += [peer] if number else []
    checked = min(options.checked, queries)
    return {
        "embedding": options.embedding is not None,
        "rows": len(rows),
        "width": rows.shape[1],
        "neighbors": k,
        "queries": queries,
        "seconds": seconds,
        "ratio": median(np.divide(seconds["faiss"], seconds["spice_ray"]).tolist()) if seconds["faiss"] else None,
        "memory_mb": memory / 1024,
        "compared_with_all": left_open,
        "unlike_faiss": unlike(rows, ours, without_own(theirs)) if seconds["faiss"] else None,
        "unlike_float64": unlike(rows, ours[:checked], by_float64(rows, checked, k)),
        "checked": checked,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--embedding", type=Path, help="a .npy file of rows, in the place of generated ones")
    parser.add_argument("--neighbors", type=int, default=100)
    parser.add_argument("--queries", type=int, default=60_000, help="rows whose neighbours are looked for")
    parser.add_argument("--checked", type=int, default=2_000, help="queries compared with float64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="where ours computes; the peer is on the CPU")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    print(surroundings())
    found = measure(options)
    print_table(
        f"{found['queries']:,} queries of {found['rows']:,} x {found['width']}, k = {found['neighbors']}",
        ["", "seconds"],
        [[name, " ".join(f"{one:.1f}" for one in times)] for name, times in found["seconds"].items()],
    )
    print(
        f"memory {found['memory_mb']:,.0f} MB; lists unlike float64's {found['unlike_float64']} of {found['checked']}"
    )
    if found["ratio"] is not None:
        print(f"faiss / spice_ray {found['ratio']:.2f} (asked: 2.5); lists unlike faiss's {found['unlike_faiss']}")
    write_results(found, options.out)


if __name__ == "__main__":
    main()
