import networkx as nx
import numpy as np
import pytest

from spice_ray.core.modularity import modularity


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
