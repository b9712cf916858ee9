import networkx as nx
import numpy as np
import pytest

from spice_ray.core.modularity import fits_better, modularity


def test_pairs_in_clusters_of_their_own_have_half_of_their_ends_by_chance() -> None:
    assert modularity(np.array([0, 0, 1, 1]), np.array([[1], [0], [3], [2]])) == 1 - 2 * 0.5**2
    assert modularity(np.array([0, 1, 0, 1]), np.array([[1], [0], [3], [2]])) == 0 - 2 * 0.5**2


def test_one_cluster_of_all_rows_gains_nothing() -> None:
    neighbors = np.random.default_rng(0).integers(50, size=(50, 4))
    assert modularity(np.full(50, 3), neighbors) == 0


def test_it_is_the_modularity_of_the_graph_with_an_edge_for_each_neighbour() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(4, size=60)
    neighbors = (np.arange(60)[:, None] + generator.integers(1, 60, size=(60, 5))) % 60
    graph = nx.MultiGraph((row, other) for row in range(60) for other in neighbors[row].tolist())
    clusters = [set(np.flatnonzero(labels == cluster).tolist()) for cluster in range(4)]
    assert modularity(labels, neighbors) == pytest.approx(nx.community.modularity(graph, clusters), abs=1e-12)


@pytest.mark.parametrize(("parted", "expected"), [(0, False), (1, False), (2, True), (8, True)])
def test_clusters_fit_better_when_the_gain_is_more_than_two_standard_errors(parted: int, expected: bool) -> None:
    # Ten pairs, each row the other's neighbour. A share q of parted pairs is q worse, with a deviation of the root of
    # q (1 - q) over the 20 rows: q must be above 1 / 6.
    neighbors, labels = np.arange(20)[:, None] ^ 1, np.arange(20) // 2 % 2
    rival = labels.copy()
    rival[: 2 * parted : 2] ^= 1
    assert fits_better(labels, rival, neighbors) is expected
    assert not fits_better(rival, labels, neighbors)
