"""Heads that begin with k-means: what a start depends on, what it is good for, and what the heads are judged by."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spice_ray.config import Recipe
from spice_ray.contracts import Bank
from spice_ray.core.heads import ClusterHead
from spice_ray.core.kmeans import KMeansHead, linear_head
from spice_ray.core.metrics import clustering_accuracy
from spice_ray.core.modularity import modularity
from spice_ray.core.neighbors import exact_neighbors
from spice_ray.core.unsupervised_loss import perfect_loss
from spice_ray.recipe import load_recipe
from spice_ray.stages import kmeans_start
from spice_ray.stages.features import Features
from spice_ray.stages.kmeans_start import FEWEST_STARTS, best_start, choose_by_neighbors, fit_starts
from spice_ray.stages.train_heads import TrainedHead, train_heads

CPU = torch.device("cpu")


def recipe(num_clusters: int, *settings: str) -> Recipe:
    return load_recipe("embeddings", [f"num_clusters={num_clusters}", *settings])


def bank_of(rows: NDArray[Any]) -> Bank:
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    plain = (unit * rows.shape[1] ** 0.5).astype(np.float16)
    return Bank(unit, plain, plain, plain[None])


def mixture(num_clusters: int, count: int, spread: float, width: int = 32) -> tuple[Bank, NDArray[np.int64]]:
    generator = np.random.default_rng(3)
    labels = np.arange(count) % num_clusters
    centres = spread * generator.normal(size=(num_clusters, width))
    return bank_of(centres[labels] + generator.normal(size=(count, width))), labels


@torch.no_grad()
def clusters_of(head: ClusterHead, bank: Bank) -> NDArray[np.int64]:
    return head(torch.from_numpy(bank.plain.astype(np.float32))).argmax(dim=1).numpy()


class Once:
    """Progress of heads that are trained in one go, or from a state."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state, self.states = state, list[dict[str, Any]]()

    def restore(self) -> dict[str, Any] | None:
        return self.state

    def advance(self, num_epochs: int, snapshot: Any) -> None:
        self.states.append(copy.deepcopy(snapshot()))


def train(bank: Bank, made: Recipe, start: ClusterHead | None, progress: Once | None = None) -> TrainedHead:
    (head,) = train_heads(
        Features(bank, CPU),
        [0],
        made.heads,
        num_clusters=made.num_clusters,
        seed=0,
        train_ids=np.arange(len(bank.plain)),
        progress=progress or Once(),
        starts=None if start is None else [start],
    )
    return head


def test_heads_from_k_means_keep_apart_clusters_that_heads_from_random_weights_merge() -> None:
    bank, labels = mixture(10, 600, spread=1)
    made = recipe(10)
    starts = fit_starts(bank, np.arange(600), made)
    best = min(starts, key=lambda start: start.inertia).head
    random, taught = (clusters_of(train(bank, made, first).head(), bank) for first in (None, best))
    assert clustering_accuracy(labels, random) < 0.8
    assert clustering_accuracy(labels, taught) > 0.98


def test_a_start_depends_on_the_seed_and_its_number_alone() -> None:
    bank, _ = mixture(8, 200, spread=0.4)
    few, many, other = (
        fit_starts(bank, np.arange(200), recipe(8, *settings))
        for settings in (["heads.count=2"], ["heads.count=21", "heads.more=1"], ["seed=1"])
    )
    assert (len(few), len(many)) == (FEWEST_STARTS, 22)
    for first, second in zip(few, many[:FEWEST_STARTS], strict=True):
        assert first.inertia == second.inertia
        assert all(torch.equal(a, b) for a, b in zip(first.head.parameters(), second.head.parameters(), strict=True))
    assert len({start.inertia for start in few}) > 1
    assert [start.inertia for start in few] != [start.inertia for start in other]


def test_rows_outside_the_training_split_have_no_influence_on_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, _ = mixture(4, 200, spread=1)
    ids = np.arange(0, 200, 2)
    poisoned = Bank(*(array.copy() for array in bank))
    poisoned.embedding[1::2] = np.nan
    (expected, *_), (found, *_) = (fit_starts(given, ids, recipe(4)) for given in (bank, poisoned))
    assert found.inertia == expected.inertia
    # Of many rows a part is looked at: here 60, of which the inertia is a sum.
    monkeypatch.setattr(kmeans_start, "MOST_VALUES", 60 * 32)
    part = fit_starts(poisoned, ids, recipe(4))[0]
    assert 0.4 * expected.inertia < part.inertia < 0.8 * expected.inertia


def test_a_start_chooses_the_prototypes_of_the_first_round_alone() -> None:
    bank, _ = mixture(5, 150, spread=0.8)
    made = recipe(5, "heads.epochs=3", "heads.repeats=2", "heads.round_size=50")
    first, second = fit_starts(bank, np.arange(150), made)[0].head, ClusterHead(32, 5, 7)
    progress = Once()
    whole = train(bank, made, first, progress)
    assert train(bank, made, second, Once(progress.states[0])).losses == whole.losses
    assert train(bank, made, second).losses[0] != whole.losses[0]


def test_the_run_of_k_means_with_the_least_inertia_is_the_member_of_the_ensemble() -> None:
    bank, labels = mixture(3, 90, spread=3)
    good, bad = fit_starts(bank, np.arange(90), recipe(3))[0].head, ClusterHead(32, 3, 0)
    starts = [KMeansHead(bad, 2.0), KMeansHead(good, 1.0), KMeansHead(bad, 1.5)]
    found = best_start(starts, bank, np.arange(90), recipe(3))
    assert clustering_accuracy(labels, clusters_of(found.head(), bank)) == 1
    assert found.loss == pytest.approx(perfect_loss(3), abs=1e-3)
    assert found.losses == [found.loss]


def paired() -> tuple[Bank, list[TrainedHead]]:
    """Two groups of ten pairs of rows, a head that finds the groups, and one that knows half of the pairs by heart."""
    pairs = np.arange(40) // 2
    groups = pairs % 2
    rows = np.concatenate([3 * np.eye(2)[groups], 2 * np.eye(20)[pairs]], axis=1)
    rows += 0.01 * np.random.default_rng(0).normal(size=rows.shape)
    by_group, by_pair = torch.zeros(2, 22), torch.zeros(2, 22)
    by_group[[0, 1], [0, 1]] = 1
    by_pair[pairs // 10, 2 + pairs] = 1
    heads = [linear_head(weight, torch.zeros(2), bound=5) for weight in (by_group, by_pair)]
    return bank_of(rows), [TrainedHead(head.state_dict(), 0, 0, [0]) for head in heads]


@pytest.mark.parametrize(("views", "first", "last"), [(0, 0, 5), (1, 1, 6), (3, 3, 8), (10, 5, 10)])
def test_heads_are_judged_by_the_neighbours_that_they_have_not_learnt_from(views: int, first: int, last: int) -> None:
    bank, heads = paired()
    labels = [clusters_of(trained.head(), bank) for trained in heads]
    neighbors = exact_neighbors(bank.embedding, last)[0].numpy()
    found = choose_by_neighbors(heads, bank, np.arange(40), recipe(2, f"heads.views={views}"))
    # 40 / (4 * 2) = 5 neighbours at most, to learn from and to be judged by.
    assert found.modularities == [modularity(each, neighbors[:, first:]) for each in labels]


def test_what_heads_know_by_heart_does_not_count() -> None:
    bank, heads = paired()
    by_pair = clusters_of(heads[1].head(), bank)
    assert modularity(by_pair, exact_neighbors(bank.embedding, 1)[0].numpy()) == 0.5
    found = choose_by_neighbors(heads, bank, np.arange(40), recipe(2, "heads.views=1"))
    assert found.chosen == 0
    assert found.modularities[0] == 0.5
    assert found.modularities[1] < 0.1
    # The last is k-means, which stays where no other is better.
    assert choose_by_neighbors(heads[::-1], bank, np.arange(40), recipe(2, "heads.views=1")).chosen == 1
    assert choose_by_neighbors([heads[0], heads[0]], bank, np.arange(40), recipe(2)).chosen == 1


def test_where_rows_are_few_the_last_neighbour_is_left_to_judge_by() -> None:
    bank, heads = paired()
    found = choose_by_neighbors(heads, bank, np.arange(2), recipe(2))
    assert found.modularities == [modularity(clusters_of(h.head(), bank)[:2], np.array([[1], [0]])) for h in heads]
