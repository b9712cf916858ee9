"""A uniform, a known and an estimated prior on digits whose classes are not equally large.

    python benchmarks/priors.py --out benchmarks/results/priors.json
    python benchmarks/priors.py --imbalance 1 --out benchmarks/results/priors-balanced.json

Of each class a share is kept that falls geometrically from 1 to 1 / imbalance; which class keeps which is drawn from
the seed. Each seed trains the recipe digits on what is left, all three stages; the runs with another prior take the
encoder of the first. Stage 1 has as many steps as on all digits. Prints a table of means and standard deviations over
the seeds; ``--out`` names a JSON file for every run, written anew after each seed.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from machine import surroundings, write_results
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from sklearn.metrics.cluster import contingency_matrix

import spice_ray
from spice_ray.console import ConsoleReporter
from spice_ray.contracts import HEADS
from spice_ray.core.metrics import scores
from spice_ray.recipe import load_recipe
from spice_ray.run_folder import read_finished
from spice_ray.storage import open_artifact, read_json

CLASSES = 10
METHODS = ("SPICE_s", "SPICE")
Ints = NDArray[np.int64]


def thinned(labels: Ints, imbalance: float, seed: int) -> Ints:
    """Rows to keep."""
    rng = np.random.default_rng(seed)
    kept = []
    for rank, label in enumerate(rng.permutation(CLASSES)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        kept.append(rows[: round(len(rows) * imbalance ** (-rank / (CLASSES - 1)))])
    return np.sort(np.concatenate(kept))


def write_digits(folder: Path, imbalance: float, seed: int) -> tuple[Path, Ints]:
    digits = load_digits()
    rows = thinned(digits.target, imbalance, seed)
    file, labels = folder / "digits.npy", digits.target[rows].astype(np.int64)
    np.save(file, np.round(digits.images[rows] * 255 / 16).astype(np.uint8))
    np.save(folder / "digits.labels.npy", labels)
    return file, labels


def stage_1(num_images: int) -> dict[str, Any]:
    """As many steps as the recipe has on all digits, and a queue of at most a quarter of the images."""
    recipe = load_recipe("digits", [])
    batch = recipe.pretrain.batch_size
    steps = recipe.pretrain.epochs * (len(load_digits().target) // batch)
    queue = min(recipe.pretrain.queue_size, num_images // 4 // batch * batch)
    return {"pretrain.epochs": round(steps / (num_images // batch)), "pretrain.queue_size": queue}


def balanced_accuracy(labels: Ints, clusters: Ints) -> float:
    """The mean over classes of the share that is found, one cluster per class, matched for the highest mean."""
    counts = contingency_matrix(labels, clusters)
    found = counts / counts.sum(axis=1, keepdims=True)
    rows, columns = linear_sum_assignment(found, maximize=True)
    return float(found[rows, columns].sum() / len(found))


def score(run: Path, table: pa.Table, labels: Ints) -> dict[str, dict[str, Any]]:
    true = np.empty(len(table), np.int64)
    of_row = [int(source.rpartition("#")[2]) for source in table["source"].to_pylist()]
    ids = table["sample_id"].to_numpy()
    true[ids] = labels[of_row]
    heads = open_artifact(run / "artifacts", HEADS, read_finished(run)["artifacts"][HEADS])
    joint = np.empty(len(table), np.int64)
    joint[ids] = table["cluster"].to_numpy()
    found = {}
    for method, clusters in zip(METHODS, (np.load(heads.file("assignments.npy")), joint), strict=True):
        all_scores = scores(true, clusters)
        found[method] = {name: getattr(all_scores, name) for name in ("acc", "nmi", "ari")} | {
            "balanced_acc": balanced_accuracy(true, clusters),
            "sizes": sorted(np.bincount(clusters, minlength=CLASSES).tolist(), reverse=True),
        }
    return found


def run_seed(folder: Path, imbalance: float, seed: int) -> dict[str, Any]:
    file, labels = write_digits(folder, imbalance, seed)
    sizes = np.bincount(labels)
    priors = {"uniform": None, "known": (sizes / sizes.sum()).tolist(), "estimated": "estimate"}
    settings: dict[str, Any] = {"seed": seed, **stage_1(len(labels))}
    found: dict[str, Any] = {"seed": seed, "sizes": sorted(sizes.tolist(), reverse=True)}
    for name, prior in priors.items():
        table = spice_ray.cluster(
            str(file),
            num_clusters=CLASSES,
            recipe="digits",
            out=str(folder / name),
            reporter=ConsoleReporter(),
            overrides={**settings, "heads.prior": prior},
        )
        found[name] = score(folder / name, table, labels)
        if prior == "estimate":
            found["estimate"] = read_json(folder / name / "prior.json")["sizes"]
        (encoder,) = (folder / "uniform" / "artifacts").glob("encoder-*")
        settings["pretrain.weights"] = str(encoder)
    return found


def table_of(runs: list[dict[str, Any]]) -> str:
    lines = ["| prior | method | ACC | balanced ACC | NMI | ARI |", "|---|---|---:|---:|---:|---:|"]
    for prior in ("uniform", "known", "estimated"):
        for method in METHODS:
            cells = []
            for name in ("acc", "balanced_acc", "nmi", "ari"):
                values = [run[prior][method][name] for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.3f} +- {spread:.3f}")
            lines.append(f"| {prior} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imbalance", type=float, default=10, help="the largest class in multiples of the smallest")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    print(surroundings())
    runs = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as name:
            runs.append(run_seed(Path(name), options.imbalance, seed))
        print(table_of(runs), flush=True)
        write_results({"imbalance": options.imbalance, "runs": runs}, options.out)


if __name__ == "__main__":
    main()
