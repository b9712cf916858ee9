import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spice_ray.core.kmeans import kmeans_head, linear_head

SCALE = 5.0


def unit_rows(count: int = 300, width: int = 12) -> NDArray[np.float32]:
    generator = np.random.default_rng(0)
    rows = 2 * np.eye(width)[generator.integers(4, size=count)] + 0.5 * generator.normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def distances(rows: NDArray[np.float32], labels: NDArray[np.int64], num_clusters: int) -> NDArray[np.float64]:
    """Squared, from each row to the mean of each cluster, (n, K)."""
    exact = rows.astype(np.float64)
    centres = np.stack([exact[labels == cluster].mean(axis=0) for cluster in range(num_clusters)])
    found: NDArray[np.float64] = ((exact[:, None] - centres) ** 2).sum(axis=2)
    return found


@torch.no_grad()
def logits_of(rows: NDArray[np.float32], num_clusters: int, seed: int = 0) -> NDArray[np.float64]:
    found = kmeans_head(rows, num_clusters, seed, scale=SCALE)
    return found.head(torch.from_numpy(rows) * SCALE).double().numpy()


def test_the_heads_cluster_is_that_of_the_nearest_mean_and_inertia_the_sum_of_distances() -> None:
    rows = unit_rows()
    labels = logits_of(rows, 4).argmax(axis=1)
    expected = distances(rows, labels, 4)
    assert labels.tolist() == expected.argmin(axis=1).tolist()
    assert kmeans_head(rows, 4, 0, scale=SCALE).inertia == pytest.approx(expected.min(axis=1).sum(), rel=1e-5)


def test_probabilities_are_those_of_round_gaussians_of_the_clusters_own_variance() -> None:
    rows = unit_rows()
    logits = logits_of(rows, 4)
    squares = distances(rows, logits.argmax(axis=1), 4)
    variance = squares.min(axis=1).mean() / rows.shape[1]
    densities = np.exp(-squares / (2 * variance))
    expected = densities / densities.sum(axis=1, keepdims=True)
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found / found.sum(axis=1, keepdims=True), expected, atol=1e-3)
    assert 0.3 < expected.max(axis=1).min() < 0.9  # neither all certain nor all equal


def test_the_same_seed_gives_the_same_weights_and_seeds_give_different_clusters() -> None:
    rows = np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.array_equal(logits_of(rows, 6), logits_of(rows, 6))
    assert len({kmeans_head(rows, 6, seed, scale=SCALE).inertia for seed in range(4)}) > 1


def test_rows_that_do_not_differ_within_a_cluster_give_certain_numbers() -> None:
    rows = np.eye(3, dtype=np.float32)[np.arange(30) % 2]
    logits = logits_of(rows, 2)
    assert np.isfinite(logits).all()
    assert len(set(logits.argmax(axis=1)[::2])) == len(set(logits.argmax(axis=1)[1::2])) == 1
    assert np.abs(logits[:, 0] - logits[:, 1]).min() > 100


@torch.no_grad()
def test_a_linear_head_is_linear_down_to_its_bound() -> None:
    weight, bias = torch.tensor([[1.0, -2.0], [0.5, 4.0], [0.0, 1.0]]), torch.tensor([0.25, -1.0, 3.0])
    rows = torch.tensor([[-3.0, -3.0], [3.0, -3.0], [0.0, 0.0], [1.5, 2.0]])
    torch.testing.assert_close(linear_head(weight, bias, bound=3)(rows), rows @ weight.T + bias)
    assert not torch.allclose(linear_head(weight, bias, bound=2)(rows), rows @ weight.T + bias)
