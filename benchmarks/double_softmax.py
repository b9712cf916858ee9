"""How much double softmax weakens the gradient of cross-entropy, as a function of the labelled class's probability.

    python benchmarks/double_softmax.py --out benchmarks/results/double_softmax.json

writes the ratio of the two gradients in the labelled class's logit as JSON, and as a figure beside it (.svg): for
several K where the other classes are equally likely (the ratio is then that of every class), and for K = 10 where one
rival has all the rest. Nothing is timed: these are values of a formula.
"""

import argparse
from pathlib import Path

import torch
from figure import Figure
from machine import write_results

from spice_ray.core.double_softmax import even_ratio, gradient_ratio

CLUSTERS = (2, 10, 20, 200)
PROBABILITIES = [n / 100 for n in range(101)]
_LEAST = 1e-300  # of a probability whose logarithm must be finite


def rival_ratio(labelled: float, num_clusters: int) -> float:
    """The ratio where one other class has all the rest."""
    probs = torch.full((1, num_clusters), _LEAST, dtype=torch.float64)
    probs[0, :2] = torch.tensor([labelled, 1 - labelled]).clamp_min(_LEAST)
    return float(gradient_ratio(probs.log(), torch.tensor([0]))[0, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the figure is put beside it")
    options = parser.parse_args()
    curves = {f"K = {k}, others alike": [even_ratio(p, k) for p in PROBABILITIES] for k in CLUSTERS}
    curves["K = 10, one rival"] = [rival_ratio(p, 10) for p in PROBABILITIES]
    figure = Figure(
        "Gradient of double softmax by that of cross-entropy",
        "probability of the labelled class",
        "ratio in the labelled class's logit",
        (0, 1),
        (0, 1),
    )
    for name, values in curves.items():
        figure.line(zip(PROBABILITIES, values, strict=True), name)
        print(f"{name}: " + ", ".join(f"{values[n]:.3f} at {n / 100:g}" for n in (1, 10, 50, 90, 100)))
    write_results({"probability": PROBABILITIES, "ratio": curves}, options.out)
    figure.write(options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
