"""Embeddings that are given: the clusters of the recipe ``embeddings`` beside k-means on the same unit rows.

    python benchmarks/embeddings.py RUN ... --seeds 3 --out benchmarks/results/embeddings.json

clusters generated mixtures whose clusters are known (benchmarks/mixtures.py), the pixels of the handwritten digits and
the embedding of each finished run RUN, whose data has labels; a folder that is named n times is clustered with n
seeds. Each is a whole run of ``spice_ray.cluster`` on a .npy file, scored by ``spice_ray.evaluate``, whose k-means is
the best of ten starts. The recipe's settings were chosen by other mixtures, with other seeds, and by no real data.
"""

import argparse
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from machine import write_results
from mixtures import Mixture, draw_labelled
from numpy.typing import NDArray
from tables import print_table

import spice_ray
from spice_ray.config import Scale
from spice_ray.contracts import EMBEDDING, HEADS, LABELS
from spice_ray.evaluate import evaluate
from spice_ray.run_folder import read_finished
from spice_ray.runtime.cluster import connected
from spice_ray.runtime.progress import SilentReporter
from spice_ray.storage import read_json

MIXTURES = {
    Mixture("round, apart", 10, 64, 64, 7): 3000,
    Mixture("round, overlapping", 10, 64, 64, 4.5): 3000,
    Mixture("stretched and uneven, overlapping", 10, 64, 8, 4, False): 3000,
    Mixture("round, apart", 100, 64, 64, 7): 6000,
    Mixture("round, overlapping", 100, 64, 64, 5): 6000,
    Mixture("stretched and uneven, overlapping", 100, 64, 16, 4, False): 6000,
}
"""And how many rows are drawn of each."""


class Given(NamedTuple):
    """Embeddings to be clustered, (n, D), and the class of each, (n,)."""

    name: str
    seed: int
    rows: NDArray[np.floating]
    labels: NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--seeds", type=int, default=3, help="of each mixture and of the pixels")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    results = []
    with connected(Scale(), verbose=False):
        for given in (*of_runs(options.runs), *of_pixels(options.seeds), *of_mixtures(options.seeds)):
            results.append(measure(given))
            print(results[-1], flush=True)
    show(results)
    write_results({"rows": results}, options.out)


def of_mixtures(seeds: int) -> Iterator[Given]:
    for mixture, num_rows in MIXTURES.items():
        for seed in range(seeds):
            yield Given(f"{mixture.name}, K={mixture.num_clusters}", seed, *draw_labelled(mixture, num_rows, seed))


def of_pixels(seeds: int) -> Iterator[Given]:
    from sklearn.datasets import load_digits

    found = load_digits()
    for seed in range(seeds):
        yield Given("digits, pixels", seed, found.data.astype(np.float32), found.target)


def of_runs(runs: list[Path]) -> Iterator[Given]:
    named: Counter[Path] = Counter()
    for run in runs:
        record = read_finished(run)
        store, labels = (artifact(run, record, kind) for kind in (EMBEDDING, LABELS))
        table = pq.read_table(labels / "labels.parquet", columns=["sample_id", "label"])
        rows = np.load(store / "plain.npy")[table["sample_id"].to_numpy()]
        name = f"{Path(record['source']['path']).stem}, embedding of a run"
        yield Given(name, record["recipe"]["seed"] + named[run], rows, table["label"].to_numpy())
        named[run] += 1


def artifact(run: Path, record: dict[str, Any], kind: str) -> Path:
    root = run / record["shards_root" if kind == LABELS else "artifacts_root"]
    return Path(root) / f"{kind}-{record['artifacts'][kind]}"


def measure(given: Given) -> dict[str, Any]:
    """ACC of a whole run and of k-means."""
    with tempfile.TemporaryDirectory() as name:
        file, run = Path(name) / "given.npy", Path(name) / "run"
        np.save(file, given.rows.astype(np.float32))
        np.save(file.with_name("given.labels.npy"), given.labels)
        start = time.perf_counter()
        spice_ray.cluster(
            str(file),
            num_clusters=len(np.unique(given.labels)),
            recipe="embeddings",
            out=str(run),
            overrides={"seed": given.seed},
            reporter=SilentReporter(),
        )
        seconds = time.perf_counter() - start
        kmeans, ours = evaluate(run)["rows"]
        heads = read_json(artifact(run, read_finished(run), HEADS) / "manifest.json")
    return {
        "data": given.name,
        "rows": len(given.rows),
        "seed": given.seed,
        "kmeans": kmeans["acc"],
        "ours": ours["acc"],
        "is_kmeans_kept": heads["chosen"] == len(heads["losses"]) - 1,
        "seconds": round(seconds, 1),
    }


def show(results: list[dict[str, Any]]) -> None:
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in results:
        grouped[row["data"]].append(row)
    lines = []
    for name, rows in grouped.items():
        gains = [row["ours"] - row["kmeans"] for row in rows]
        spread = f"{stdev(gains):.3f}" if len(gains) > 1 else ""
        accs = [f"{mean(row[method] for row in rows):.3f}" for method in ("kmeans", "ours")]
        kept = f"{sum(row['is_kmeans_kept'] for row in rows)} of {len(rows)}"
        lines.append([name, *accs, f"{mean(gains):+.3f}", spread, f"{min(gains):+.3f}", kept])
    print_table(
        "ACC, means over seeds", ["data", "k-means", "ours", "gain", "its deviation", "least", "k-means kept"], lines
    )


if __name__ == "__main__":
    main()
