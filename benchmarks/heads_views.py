"""No benchmark of its own: ``heads.py views``, how many cached strong views the heads need."""

import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from heads_banks import Digits, Trained, open_digits, train
from heads_speed import SCALE
from tables import print_table

from spice_ray.core.heads import ClusterHead
from spice_ray.runtime.cluster import connected
from spice_ray.runtime.heads import assign_by_head
from spice_ray.runtime.weights import load_weights
from spice_ray.storage import Artifact

GOOD = 0.9
"""Accuracy of a digits head that has not merged two classes."""


def measure_views(runs: list[Path], views: list[int], reference: int) -> dict[str, Any]:
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in views}
    with connected(SCALE, verbose=False):
        for seed, run in enumerate(runs):
            with tempfile.TemporaryDirectory() as name:
                digits = open_digits(run, seed, Path(name))
                for number, measured in found.items():
                    measured.append(_train_one(digits, number, Path(name)))
                    print(f"seed {digits.recipe.seed}, {number} views: {measured[-1]}", flush=True)
    _print(found, reference)
    return {"heads": digits.recipe.heads.model_dump(mode="json", exclude={"views"}), "views": found}


def _train_one(digits: Digits, views: int, root: Path) -> dict[str, Any]:
    embedding = digits.embed(views, root)
    trained = train(digits.recipe, SCALE, embedding, root)
    by_head = _accuracies(trained, embedding, digits)
    chosen = digits.accuracy(trained.assignments)
    return {
        "seed": digits.recipe.seed,
        "acc": chosen,
        "best_acc": max(by_head),
        "good_heads": sum(acc > GOOD for acc in by_head),
        "seconds": trained.seconds,
    }


def _accuracies(trained: Trained, embedding: Artifact, digits: Digits) -> list[float]:
    plain = np.load(embedding.file("plain.npy"))
    manifest = trained.ensemble.manifest
    found = []
    for index in range(len(manifest["losses"])):
        head = ClusterHead(manifest["embed_dim"], manifest["num_clusters"], 0)
        head.load_state_dict(load_weights(trained.ensemble.file(f"head-{index:03d}.safetensors")))
        found.append(digits.accuracy(assign_by_head(head, plain)[0]))
    return found


def _print(found: dict[int, list[dict[str, Any]]], reference: int) -> None:
    base = [run["acc"] for run in found[reference]]
    rows = []
    for views, runs in found.items():
        accs = [run["acc"] for run in runs]
        gains = [acc - of_base for acc, of_base in zip(accs, base, strict=True)]
        rows.append(
            [
                f"{views}",
                mean_and_deviation(accs),
                mean_and_deviation(gains, "+"),
                f"{mean(run['best_acc'] for run in runs):.4f}",
                f"{mean(run['good_heads'] for run in runs):.1f}",
                f"{mean(run['seconds'] for run in runs):.1f}",
            ]
        )
    header = ["views", "ACC", f"minus that of {reference}", "best head", "good heads", "seconds"]
    print_table(f"views: SPICE_s over {len(base)} seeds, mean +- standard deviation", header, rows)


def mean_and_deviation(values: list[float], sign: str = "") -> str:
    deviation = f" +- {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.4f}{deviation}"
