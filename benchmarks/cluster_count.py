"""Which number of clusters is proposed for mixtures and for finished runs, and what else would have been.

    python benchmarks/cluster_count.py --mixtures --seeds 3 --out benchmarks/results/cluster_count.json
    python benchmarks/cluster_count.py runs/demo runs/other

The proposal is judged beside each of its two factors alone. Of runs the curve is printed, and the K that the recipe
names; of mixtures (benchmarks/mixtures.py) the share of those whose K was met, exactly and within a tenth.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_results
from mixtures import draw, suite

from spice_ray.config import MOST_CLUSTERS
from spice_ray.core.cluster_count import Candidate, sample_ids, score_counts
from spice_ray.run_folder import read_finished

RULES = ("score", "eigengap", "silhouette")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--mixtures", action="store_true", help="also the mixtures")
    parser.add_argument("--rows", type=int, default=3000, help="of each mixture")
    parser.add_argument("--seeds", type=int, default=1, help="of each mixture")
    parser.add_argument("--most", type=int, default=MOST_CLUSTERS, help="the last candidate")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    results: dict[str, Any] = {"runs": [judge_run(run, options.most) for run in options.runs]}
    if options.mixtures:
        rows = [judge_mixture(*drawn, options.most) for drawn in drawn_mixtures(options.rows, options.seeds)]
        results["mixtures"], results["met"] = rows, shares_met(rows)
        print_shares(results["met"])
    write_results(results, options.out)


def judge_run(run: Path, most: int) -> dict[str, Any]:
    """The curve of a run's embedding."""
    record = read_finished(run)
    store = run / record["artifacts_root"] / f"embedding-{record['artifacts']['embedding']}"
    embedding, start = np.load(store / "embedding.npy", mmap_mode="r"), time.perf_counter()
    rows = embedding[sample_ids(np.arange(len(embedding)), record["recipe"]["seed"])]
    candidates = score_counts(rows, 2, most)
    found = {rule: proposed(candidates, rule) for rule in RULES}
    seconds = round(time.perf_counter() - start, 1)
    print(f"{run}: {len(rows)} rows, K of the recipe {record['recipe']['num_clusters']}; {found}; {seconds} s")
    for candidate in candidates:
        print(
            f"  {candidate.num_clusters:3d} {candidate.score:.4f} {candidate.eigengap:.4f} {candidate.silhouette:.4f}"
        )
    return {
        "run": str(run),
        "rows": len(rows),
        "true": record["recipe"]["num_clusters"],
        "seconds": seconds,
        "proposed": found,
        "curve": [candidate._asdict() for candidate in candidates],
    }


def drawn_mixtures(num_rows: int, seeds: int) -> Any:
    for seed in range(seeds):
        for mixture in suite():
            yield mixture, draw(mixture, num_rows, seed), seed


def judge_mixture(mixture: Any, rows: Any, seed: int, most: int) -> dict[str, Any]:
    candidates = score_counts(rows, 2, most)
    found = {rule: proposed(candidates, rule) for rule in RULES}
    print(f"{mixture.name}, seed {seed}: K {mixture.num_clusters}; {found}", flush=True)
    return {"mixture": mixture.name, "seed": seed, "rows": len(rows), "true": mixture.num_clusters, "proposed": found}


def proposed(candidates: list[Candidate], rule: str) -> int:
    """K by the score, or by one of its factors alone."""
    return max(candidates, key=lambda candidate: (getattr(candidate, rule), -candidate.num_clusters)).num_clusters


def shares_met(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """For each kind of mixture and rule, the shares exactly met and met within a tenth of K."""
    kinds = defaultdict(list)
    for row in rows:
        kinds[row["mixture"]].append(row)
        kinds["all"].append(row)
    return {kind: {rule: _met(members, rule) for rule in RULES} for kind, members in kinds.items()}


def _met(rows: list[dict[str, Any]], rule: str) -> list[float]:
    errors = np.asarray([abs(row["proposed"][rule] - row["true"]) for row in rows])
    allowed = np.asarray([max(1, row["true"] / 10) for row in rows])
    return [round(float(share), 3) for share in ((errors == 0).mean(), (errors <= allowed).mean())]


def print_shares(met: dict[str, dict[str, list[float]]]) -> None:
    for kind, rules in met.items():
        print(f"{kind:28s}", *(f"{rule} {exact:.2f} {near:.2f}" for rule, (exact, near) in rules.items()), sep="  ")


if __name__ == "__main__":
    main()
