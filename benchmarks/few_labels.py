"""Stage 3 from few given labels, by a fixed threshold and by one that follows the model.

    .venv/bin/python benchmarks/few_labels.py --out benchmarks/results/few-labels.json

The recipe ``digits`` with ``joint.init=scratch``: the small encoder learns from ``--per-class`` labels of each digit,
drawn anew for each seed, and from all images without theirs. Scored are the other images. Two lanes, as each needs a
label.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from heads_banks import in_new_process
from machine import surroundings, write_results
from tables import print_table

from spice_ray.config import Scale
from spice_ray.evaluate import evaluate
from spice_ray.intake import ingest, open_source
from spice_ray.recipe import load_recipe
from spice_ray.runtime.progress import SilentReporter
from spice_ray.workflow import prepare, run

THRESHOLDS = ("fixed", "adaptive")
SETTINGS = ("joint.init=scratch", "joint.encoder=convnet", "joint.lanes=2")


def make_shards(root: Path) -> None:
    size = load_recipe("digits", []).image.size
    ingest(open_source("digits"), root, Scale(), image_size=size, seed=0, reporter=SilentReporter())


def draw_labels(shards: Path, file: Path, per_class: int, seed: int) -> None:
    """So many images of each class, as ``reliable.labels`` takes them."""
    (folder,) = shards.glob("labels-*")
    table = pq.read_table(folder / "labels.parquet")
    labels, rng = table["label"].to_numpy(), np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    chosen = np.sort(np.concatenate(drawn))
    pq.write_table(pa.table({"sample_id": table["sample_id"].to_numpy()[chosen], "label": labels[chosen]}), file)


def accuracy(shards: Path, labels: Path, out: Path, threshold: str, steps: int, seed: int) -> float:
    settings = [*SETTINGS, f"joint.steps={steps}", f"joint.threshold={threshold}", f"seed={seed}"]
    recipe = load_recipe("digits", [*settings, f"reliable.labels={labels}"])
    run(prepare(recipe, str(shards), out), SilentReporter())
    found: float = evaluate(out)["acc"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per-class", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    print(surroundings())
    found: dict[str, list[float]] = {threshold: [] for threshold in THRESHOLDS}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        in_new_process(make_shards, root / "shards")
        for seed in options.seeds:
            labels = root / f"labels-{seed}.parquet"
            draw_labels(root / "shards", labels, options.per_class, seed)
            for threshold in THRESHOLDS:
                out = root / f"{threshold}-{seed}"
                acc = in_new_process(accuracy, root / "shards", labels, out, threshold, options.steps, seed)
                print(f"seed {seed}, {threshold}: {acc:.4f}", flush=True)
                found[threshold].append(acc)
    rows = [[name, *(f"{acc:.3f}" for acc in accs), _spread(accs)] for name, accs in found.items()]
    header = ["joint.threshold", *(f"seed {seed}" for seed in options.seeds), "mean and deviation"]
    print_table(f"ACC, {options.per_class} label(s) of each digit", header, rows)
    settings: dict[str, Any] = {"per_class": options.per_class, "steps": options.steps, "seeds": options.seeds}
    write_results({**settings, "settings": SETTINGS, "acc": found}, options.out)


def _spread(accs: list[float]) -> str:
    return f"{mean(accs):.3f}" + (f" ({stdev(accs):.3f})" if len(accs) > 1 else "")


if __name__ == "__main__":
    main()
