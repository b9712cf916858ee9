"""What a sweep costs beside one stage 3, and how well what it ranks its trials by, without labels, follows accuracy.

    python benchmarks/objective.py tune_configs/thresholds.yaml RUN ... --out benchmarks/results/objective.json

RUN are folders of finished runs of the recipe digits, one per seed, made by this version. For each of them stage 3 is
trained once more from finished stages 1 and 2 (a whole ``spice-ray run``), and then the whole sweep is run (``spice-ray
tune``), whose trials stay in the folder of the run: a sweep that is finished there is only read. Every trial is then
judged by each objective, and by its accuracy (ACC over all images), which no objective sees. "own" are features of the
trial's classifier, "frozen" those of stage 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from choosing import opened
from machine import write_results
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tables import print_table

from spice_ray.contracts import EMBEDDING, LABELS, SHARDS
from spice_ray.core.consensus import align
from spice_ray.core.metrics import clustering_accuracy
from spice_ray.core.neighbors import exact_neighbors
from spice_ray.core.objectives import negative_mutual_information, neighbor_disagreement
from spice_ray.core.prototypes import equal_shares
from spice_ray.core.unsupervised_loss import BLOCK_ROWS, unsupervised_loss
from spice_ray.readers.parts import images_of, read_part
from spice_ray.recipe import load_recipe
from spice_ray.run_folder import read_finished
from spice_ray.runtime.data import open_shards
from spice_ray.runtime.weights import load_head, load_joint
from spice_ray.runtime.workers import augmentation_of
from spice_ray.stages.assign import predict
from spice_ray.storage import Artifact, open_artifact, read_json
from spice_ray.sweep import load_sweep

COMMAND = Path(sys.executable).with_name("spice-ray")
STAGE_3 = "stage 3: joint training"
NEIGHBORS = 20


@dataclass(frozen=True)
class Trial:
    """What a trial's classifier says of all images, and its other heads where that is one of them."""

    logits: torch.Tensor
    own: torch.Tensor
    frozen: torch.Tensor
    others: list[torch.Tensor] = field(default_factory=list)

    @property
    def labels(self) -> torch.Tensor:
        return self.logits.argmax(dim=1)


def unsupervised(trial: Trial, features: torch.Tensor) -> float:
    shares = equal_shares(trial.logits.shape[1])
    return unsupervised_loss(
        lambda: features.split(BLOCK_ROWS), trial.logits.T.contiguous(), shares, confident_fraction=0.5
    )


def disagreement(trial: Trial, features: torch.Tensor) -> float:
    nearest, _ = exact_neighbors(features, NEIGHBORS)
    return neighbor_disagreement(trial.labels, nearest, equal_shares(trial.logits.shape[1]))


def unguarded(trial: Trial, features: torch.Tensor) -> float:
    nearest, _ = exact_neighbors(features, NEIGHBORS)
    return float((trial.labels[nearest] != trial.labels[:, None]).double().mean())


def instability(trial: Trial) -> float:
    """The share of images that another head puts elsewhere than the chosen one, on average over the others."""
    num_clusters, chosen = trial.logits.shape[1], trial.labels.numpy()
    found = [other.argmax(dim=1).numpy() for other in trial.others]
    return float(np.mean([(align(chosen, other, num_clusters)[other] != chosen).mean() for other in found]))


OBJECTIVES: dict[str, Callable[[Trial], float]] = {
    "unsupervised loss, own": lambda trial: unsupervised(trial, trial.own),
    "unsupervised loss, frozen": lambda trial: unsupervised(trial, trial.frozen),
    "neighbour disagreement, frozen": lambda trial: disagreement(trial, trial.frozen),
    "neighbour disagreement, own": lambda trial: disagreement(trial, trial.own),
    "the same without the sizes, frozen": lambda trial: unguarded(trial, trial.frozen),
    "- mutual information": lambda trial: negative_mutual_information(trial.logits),
}
OF_HEADS = {"disagreement of the heads": instability}
"""Of sweeps whose trials end with heads."""


def seconds_of(command: list[str]) -> float:
    start = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.monotonic() - start


def stage_3_alone(run: Path, recipe: str, settings: list[str]) -> dict[str, float]:
    """Seconds of the stage with the start of its workers, and of the command."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(run, Path(folder) / "run", ignore=shutil.ignore_patterns("sweeps")))
        for kind in ("joint", "assignments", "score"):
            for artifact in (copy / "artifacts").glob(f"{kind}-*"):
                shutil.rmtree(artifact)
        before = read_json(copy / "timing.json").get(STAGE_3, 0.0)
        command = seconds_of([str(COMMAND), "run", recipe, "--data", "digits", "--out", str(copy), *settings])
        return {"stage": read_json(copy / "timing.json")[STAGE_3] - before, "command": command}


def artifact_of(run: Path, names: list[str], kind: str) -> Artifact | None:
    found = [name.partition("-")[2] for name in names if name.startswith(f"{kind}-")]
    return open_artifact(run / "artifacts", kind, found[0]) if found else None


@torch.inference_mode()
def trial_of(run: Path, names: list[str], images: torch.Tensor, recipe: Any) -> Trial:
    embedding = artifact_of(run, names, EMBEDDING)
    assert embedding is not None
    frozen = torch.from_numpy(np.load(embedding.file("embedding.npy")))
    joint = artifact_of(run, names, "joint")
    if joint is None:
        heads = artifact_of(run, names, "heads")
        assert heads is not None
        plain = torch.from_numpy(np.load(embedding.file("plain.npy"))).float()
        manifest = heads.manifest
        others = [load_head(heads, n)(plain) for n in range(len(manifest["losses"])) if n != manifest["chosen"]]
        return Trial(load_head(heads)(plain), frozen, frozen, others)
    found = predict(load_joint(joint).eval(), images, augmentation_of(recipe.image))
    return Trial(found.logits, torch.nn.functional.normalize(found.pooled, dim=1), frozen)


def judge(run: Path, sweep_file: Path, recipe: Any) -> list[dict[str, Any]]:
    record = read_finished(run)
    shards = open_shards(opened(run, record, SHARDS), None)
    tables = [read_part(shards.path, file, shards.format) for file in shards.readable]
    images = torch.from_numpy(np.concatenate([images_of(table, shards.image_size) for table in tables]))
    labelled = pq.read_table(opened(run, record, LABELS).file("labels.parquet"))
    truth: NDArray[np.int64] = np.empty(shards.num_rows, np.int64)
    truth[labelled["sample_id"].to_numpy()] = labelled["label"].to_numpy()
    found = []
    for row in pq.read_table(run / "sweeps" / sweep_file.stem / "trials.parquet").to_pylist():
        if row["objective"] is None:
            continue
        trial = trial_of(run, row["artifacts"], images, recipe)
        objectives = OBJECTIVES | OF_HEADS if trial.others else OBJECTIVES
        values = {name: objective(trial) for name, objective in objectives.items()}
        found.append({"acc": clustering_accuracy(truth, trial.labels.numpy()), "asked": row["objective"], **values})
    return found


def compare(trials: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each objective: its rank correlation with accuracy, and the accuracy of the trial that it would choose."""
    accs = np.array([trial["acc"] for trial in trials])
    found = {}
    for name in (name for name in OBJECTIVES | OF_HEADS if name in trials[0]):
        values = np.array([trial[name] for trial in trials])
        found[name] = {
            "correlation": float(spearmanr(-values, accs).statistic),
            "chosen": float(accs[values.argmin()]),
            "lost": float(accs.max() - accs[values.argmin()]),
        }
    return found


def measure(run: Path, sweep_file: Path) -> dict[str, Any]:
    sweep, seed = load_sweep(str(sweep_file)), read_finished(run)["recipe"]["seed"]
    recipe = load_recipe(sweep.recipe, [f"seed={seed}"])
    result: dict[str, Any] = {"seed": seed}
    if not (run / "sweeps" / sweep_file.stem / "trials.parquet").exists():
        result["stage_3"] = stage_3_alone(run, sweep.recipe, [f"seed={seed}"])
        command = [str(COMMAND), "tune", str(sweep_file), "--data", "digits", "--out", str(run), f"seed={seed}"]
        result["sweep_seconds"] = seconds_of(command)
        result["ratio"] = result["sweep_seconds"] / result["stage_3"]["stage"]
    trials = judge(run, sweep_file, recipe)
    accs = [trial["acc"] for trial in trials]
    result |= {
        "trials": trials,
        "acc": {"best": max(accs), "median": float(np.median(accs)), "worst": min(accs)},
        "objectives": compare(trials),
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="What a sweep costs, and how well it chooses.")
    parser.add_argument("sweep", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(run, arguments.sweep) for run in arguments.runs]
    write_results({"sweep": arguments.sweep.name, "runs": results}, arguments.out)
    rows = []
    for name in results[0]["objectives"]:
        of_runs = [result["objectives"][name] for result in results]
        rows.append([name, *(f"{found['correlation']:.2f} / {100 * found['lost']:.1f}" for found in of_runs)])
    print_table(
        "rank correlation with ACC, and points of ACC lost by trusting it",
        ["objective", *(f"seed {result['seed']}" for result in results)],
        rows,
    )
    for result in results:
        told = {key: result[key] for key in ("seed", "stage_3", "sweep_seconds", "ratio", "acc") if key in result}
        print(told)


if __name__ == "__main__":
    main()
