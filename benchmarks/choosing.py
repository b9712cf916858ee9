"""How well the unsupervised loss chooses among the heads of stage 2, and whether their consensus is better than one.

    python benchmarks/choosing.py RUN ... --out benchmarks/results/choosing.json

reads the folders of finished runs whose data has labels, one per seed, all with as many clusters as classes; nothing is
trained. ACC is over all labelled images. JSON as usual, and beside it (.svg) the loss of every head against its ACC.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from figure import Figure
from machine import write_results
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from spice_ray.contracts import EMBEDDING, HEADS, LABELS
from spice_ray.core.consensus import align, consensus, voting_heads
from spice_ray.core.heads import ClusterHead
from spice_ray.core.metrics import clustering_accuracy
from spice_ray.core.unsupervised_loss import merged_loss, perfect_loss
from spice_ray.run_folder import read_finished
from spice_ray.runtime.weights import load_weights
from spice_ray.storage import Artifact, open_artifact

GOOD = 0.9  # ACC above which a head is called good
_ROWS_AT_ONCE = 8192

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ensemble:
    """The heads of one run on its labelled images."""

    seed: int
    num_clusters: int
    chosen: int
    losses: list[float]
    labels: list[Ints]
    labels_true: Ints

    def acc(self, labels: Ints) -> float:
        return clustering_accuracy(self.labels_true, labels)

    @property
    def accs(self) -> list[float]:
        return [self.acc(labels) for labels in self.labels]


def opened(run: Path, record: dict[str, Any], kind: str) -> Artifact:
    root = run / record["shards_root" if kind == LABELS else "artifacts_root"]
    artifact = open_artifact(root, kind, record["artifacts"][kind])
    assert artifact is not None, f"{root} lacks {kind}"
    return artifact


@torch.inference_mode()
def read_ensemble(run: Path) -> Ensemble:
    record = read_finished(run)
    heads, num_clusters = opened(run, record, HEADS), record["recipe"]["num_clusters"]
    table = pq.read_table(opened(run, record, LABELS).file("labels.parquet"), columns=["sample_id", "label"])
    features = np.load(opened(run, record, EMBEDDING).file("plain.npy"))[table["sample_id"].to_numpy()]
    labels = []
    for index in range(len(heads.manifest["losses"])):
        head = ClusterHead(features.shape[1], num_clusters, 0)
        head.load_state_dict(load_weights(heads.file(f"head-{index:03d}.safetensors")))
        blocks = torch.from_numpy(features).split(_ROWS_AT_ONCE)
        labels.append(torch.cat([head(block.float()).argmax(dim=1) for block in blocks]).numpy())
    return Ensemble(
        record["recipe"]["seed"],
        num_clusters,
        heads.manifest["chosen"],
        heads.manifest["losses"],
        labels,
        table["label"].to_numpy(),
    )


def measure(ensemble: Ensemble) -> dict[str, Any]:
    """One row of the table."""
    accs, num_clusters = ensemble.accs, ensemble.num_clusters
    voting = voting_heads(ensemble.losses, ensemble.chosen, num_clusters)
    found = consensus([ensemble.labels[head] for head in voting], num_clusters)
    wrong = align(ensemble.labels_true, found.labels, num_clusters)[found.labels] != ensemble.labels_true
    return {
        "seed": ensemble.seed,
        "chosen": accs[ensemble.chosen],
        "best_by_labels": max(accs),
        "consensus": ensemble.acc(found.labels),
        "consensus_of_all": ensemble.acc(consensus(reference_first(ensemble), num_clusters).labels),
        "mean": float(np.mean(accs)),
        "min": min(accs),
        "voting": len(voting),
        "good": sum(acc > GOOD for acc in accs),
        "merged": sum(loss > merged_loss(num_clusters) for loss in ensemble.losses),
        "loss_of_chosen": ensemble.losses[ensemble.chosen],
        "loss_spread": max(ensemble.losses) - min(ensemble.losses),
        "spearman": rank_correlation(ensemble.losses, accs),
        "spearman_of_good": rank_correlation(*of_good(ensemble.losses, accs)),
        "disagreement_auc_of_errors": auc(wrong.tolist(), found.disagreement.tolist()),
        "losses": ensemble.losses,
        "accs": accs,
    }


def reference_first(ensemble: Ensemble) -> list[Ints]:
    chosen = ensemble.chosen
    return [ensemble.labels[chosen], *(labels for h, labels in enumerate(ensemble.labels) if h != chosen)]


def of_good(losses: list[float], accs: list[float]) -> tuple[list[float], list[float]]:
    good = [head for head, acc in enumerate(accs) if acc > GOOD]
    return [losses[head] for head in good], [accs[head] for head in good]


def rank_correlation(losses: list[float], accs: list[float]) -> float | None:
    """Spearman's, of minus the loss with ACC; None where either has but one value."""
    if len(set(losses)) < 2 or len(set(accs)) < 2:
        return None
    return float(spearmanr(-np.array(losses), accs).statistic)


def auc(positive: list[bool], scores: list[float]) -> float | None:
    """Area under the ROC curve; None where all are positive, or none is."""
    return float(roc_auc_score(positive, scores)) if len(set(positive)) == 2 else None


def pool(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What all seeds say together."""
    losses = [loss for row in rows for loss in row["losses"]]
    accs = [acc for row in rows for acc in row["accs"]]
    gains = np.array([row["consensus"] - row["chosen"] for row in rows])
    return {
        "heads": len(accs),
        "auc_of_good": auc([acc > GOOD for acc in accs], [-loss for loss in losses]),
        "spearman": rank_correlation(losses, accs),
        "consensus_minus_chosen": float(gains.mean()),
        "consensus_wins": int((gains > 0).sum()),
        "chosen_wins": int((gains < 0).sum()),
        **{name: float(np.mean([row[name] for row in rows])) for name in ("chosen", "best_by_labels", "consensus")},
    }


def draw(rows: list[dict[str, Any]], num_clusters: int, file: Path) -> None:
    losses = [loss for row in rows for loss in row["losses"]]
    floor, bound = perfect_loss(num_clusters), perfect_loss(num_clusters) + 1 / num_clusters
    right, low = max(*losses, bound), min(acc for row in rows for acc in row["accs"])
    margin = 0.05 * (right - floor)
    figure = Figure(
        f"All heads of {len(rows)} seeds, the chosen ones ringed",
        "unsupervised loss",
        "ACC",
        (floor - margin, right + margin),
        (np.floor(20 * low - 0.5) / 20, 1),
    )
    for row in rows:
        points = list(zip(row["losses"], row["accs"], strict=True))
        figure.dots(points, f"seed {row['seed']}", ringed=[(row["loss_of_chosen"], row["chosen"])])
    for x, name in ((floor, "perfect clusters"), (bound, "1 / K more: two merged")):
        figure.line([(x, figure.y_range[0]), (x, 1)], name, dashed=True)
    figure.write(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file; the figure is put beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ensembles = [read_ensemble(run) for run in options.runs]
    rows, num_clusters = [measure(ensemble) for ensemble in ensembles], ensembles[0].num_clusters
    for row in rows:
        print(", ".join(f"{name} {shown(value)}" for name, value in row.items() if not isinstance(value, list)))
    pooled = pool(rows)
    print("all: " + ", ".join(f"{name} {shown(value)}" for name, value in pooled.items()))
    write_results({"num_clusters": num_clusters, "good": GOOD, "seeds": rows, "pooled": pooled}, options.out)
    if options.out:
        draw(rows, num_clusters, options.out.with_suffix(".svg"))


def shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
