"""Alignment and votes of heads by hand and against slow twins; what merging classes costs, on hand-made heads."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spice_ray.config import merged, perfect_loss
from spice_ray.core.consensus import align, consensus, voting_heads
from spice_ray.core.prototypes import unsupervised_loss

Ints = NDArray[np.int64]


def noisy(truth: Ints, clusters: int, share: float, rng: np.random.Generator) -> Ints:
    """The labels of a head that is right but for a share of the samples, under names of its own."""
    wrong = rng.random(len(truth)) < share
    labels = np.where(wrong, rng.integers(0, clusters, len(truth)), truth)
    return rng.permutation(clusters)[labels]


def slow_consensus(labels: list[Ints], clusters: int, rows: list[int]) -> tuple[list[int], list[float]]:
    renamed = [labels[0], *(align(labels[0], head, clusters)[head] for head in labels[1:])]
    winners, disagreement = [], []
    for votes in zip(*(head[rows].tolist() for head in renamed), strict=True):
        counts = Counter(votes)  # counts up in the order of the heads, and most_common keeps it among equals
        winner, count = counts.most_common(1)[0]
        winners.append(winner)
        disagreement.append(1 - count / len(votes))
    return winners, disagreement


# Alignment


def test_align_names_the_clusters_of_one_head_as_another_does():
    reference, other = np.array([0, 0, 1, 1, 2, 2]), np.array([2, 2, 0, 0, 1, 1])
    assert align(reference, other, 3).tolist() == [1, 2, 0]


def test_align_lets_no_two_clusters_have_one_name():
    # Both clusters of the other head lie in cluster 0; the larger one gets the name.
    reference, other = np.array([0, 0, 0, 0, 0, 1]), np.array([1, 1, 1, 0, 0, 0])
    assert align(reference, other, 2).tolist() == [1, 0]


def test_align_finds_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    for _ in range(10):
        reference, other = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
        best = max((np.array(p)[other] == reference).sum() for p in itertools.permutations(range(4)))
        found = align(reference, other, 4)
        assert sorted(found.tolist()) == [0, 1, 2, 3]
        assert (found[other] == reference).sum() == best


def test_align_is_a_permutation_where_clusters_are_empty():
    assert sorted(align(np.array([0, 0, 5]), np.array([3, 3, 3]), 6).tolist()) == [0, 1, 2, 3, 4, 5]


# Votes


def test_votes_and_disagreement_by_hand():
    heads = [
        np.array([0, 0, 0, 1, 1, 1, 2, 2, 2]),
        np.array([1, 1, 1, 2, 2, 0, 0, 0, 0]),  # as above but for sample 5, under names turned by one
        np.array([0, 0, 2, 1, 1, 2, 2, 2, 2]),  # 2 and 5 are called 2
    ]
    found = consensus(heads, 3)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert found.disagreement.tolist() == pytest.approx([0, 0, 1 / 3, 0, 0, 1 / 3, 0, 0, 0])
    assert (found.labels.dtype, found.disagreement.dtype) == (np.int64, np.float32)


def test_equal_votes_go_to_the_reference_and_without_it_to_the_head_that_comes_first():
    base = np.repeat([0, 1, 2], 4)
    other, third, fourth = base.copy(), base.copy(), base.copy()
    other[0] = 1  # one vote each for 0 and 1
    assert consensus([base, other], 3).labels.tolist() == base.tolist()
    third[0], fourth[0] = 2, 2
    assert consensus([base, other, other, third, fourth], 3).labels[0] == 1  # 0 has one vote, 1 and 2 have two
    assert consensus([base, third, fourth, other, other], 3).labels[0] == 2


def test_one_head_is_its_own_consensus():
    found = consensus([np.array([2, 0, 1, 0])], 3)
    assert found.labels.tolist() == [2, 0, 1, 0]
    assert found.disagreement.tolist() == [0, 0, 0, 0]


def test_names_of_the_other_heads_do_not_matter():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 400)
    heads = [noisy(truth, 5, 0.2, rng) for _ in range(4)]
    expected = consensus(heads, 5)
    for _ in range(5):
        found = consensus([heads[0], *(rng.permutation(5)[head] for head in heads[1:])], 5)
        assert np.array_equal(found.labels, expected.labels)
        assert np.array_equal(found.disagreement, expected.disagreement)


def test_the_result_has_the_names_of_the_reference():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 5, 400)
    heads = [noisy(truth, 5, 0.2, rng) for _ in range(4)]
    names = rng.permutation(5)
    before, after = consensus(heads, 5), consensus([names[heads[0]], *heads[1:]], 5)
    assert np.array_equal(after.labels, names[before.labels])
    assert np.array_equal(after.disagreement, before.disagreement)


def test_votes_equal_a_loop_over_samples_on_both_sides_of_a_block_border():
    rng = np.random.default_rng(2)
    border, count = 1 << 16, (1 << 16) + 500
    heads = [noisy(rng.permutation(count) % 3, 3, 0.5, rng) for _ in range(4)]
    rows = [*range(500), *range(border - 500, count)]
    found = consensus(heads, 3)
    labels, disagreement = slow_consensus(heads, 3, rows)
    assert found.labels[rows].tolist() == labels
    assert found.disagreement[rows].tolist() == pytest.approx(disagreement)


def test_the_samples_of_every_block_count_in_the_alignment():
    # In the first block most samples say that 0 is 0; in the second more say that 0 is 1.
    border = 1 << 16
    reference = np.arange(3 * border) % 2
    other = np.concatenate([reference[:border], 1 - reference[border:]])
    assert align(reference, other, 2).tolist() == [1, 0]


def test_heads_that_err_apart_from_each_other_are_better_together():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 10, 2000)
    heads = [noisy(truth, 10, 0.3, rng) for _ in range(5)]
    found = consensus(heads, 10)
    names = align(truth, heads[0], 10)
    errors = names[found.labels] != truth
    assert errors.mean() < 0.5 * (names[heads[0]] != truth).mean()
    assert found.disagreement[errors].mean() > 2 * found.disagreement[~errors].mean()


def test_random_heads_in_the_minority_change_no_label():
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 4, 500)
    heads = [rng.permutation(4)[truth] for _ in range(3)] + [rng.integers(0, 4, 500) for _ in range(2)]
    found = consensus(heads, 4)
    assert np.array_equal(found.labels, heads[0])
    assert np.unique(found.disagreement).tolist() == pytest.approx([0, 0.2, 0.4])


def test_inputs_are_left_as_they_were():
    heads = [np.array([0, 1, 2, 2]), np.array([1, 2, 0, 1])]
    copies = [head.copy() for head in heads]
    consensus(heads, 3)
    assert all(np.array_equal(head, copy) for head, copy in zip(heads, copies, strict=True))


@pytest.mark.parametrize(
    ("heads", "complaint"),
    [
        ([], "at least one head"),
        ([[0, 1], [0, 1, 1]], r"\[2, 3\] samples"),
        ([[0, 3]], r"0\.\.3; with 3 clusters"),
        ([[0, 1], [-1, 1]], r"-1\.\.1"),
    ],
)
def test_heads_that_do_not_fit_are_refused(heads, complaint):
    with pytest.raises(ValueError, match=complaint):
        consensus([np.array(head) for head in heads], 3)


# What merging costs


def claimed_loss(found: Ints, classes: Ints, clusters: int) -> float:
    """The unsupervised loss of a head that is certain of ``found``, where the embedding is one point per class.

    Next to its own cluster a sample is likeliest in the others that have some of its class: too unlikely to change the
    loss, but a cluster short of samples takes these into its prototype.
    """
    one_hot, is_of = torch.eye(clusters, dtype=torch.float64), torch.zeros(clusters, clusters, dtype=torch.float64)
    is_of[classes, found] = 1
    logits = 100 * one_hot[found] + is_of[classes]
    return unsupervised_loss(one_hot[classes], logits, confident_fraction=0.5).item()


def merging(classes: Ints, first: int, second: int, split: int, share: float) -> Ints:
    """Labels with class ``second`` in cluster ``first``, and a share of class ``split`` in cluster ``second``."""
    found = np.where(classes == second, first, classes)
    rows = np.flatnonzero(classes == split)
    found[rows[: round(share * len(rows))]] = second
    return found


@pytest.mark.parametrize(("clusters", "each"), [(3, 20), (10, 20), (50, 10)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_merging_two_classes_costs_a_certain_head_one_kth_however_it_splits_a_third(clusters, each, share):
    classes = np.repeat(np.arange(clusters), each)
    loss = claimed_loss(merging(classes, 0, 1, 2, share), classes, clusters)
    assert loss == pytest.approx(perfect_loss(clusters) + 1 / clusters, rel=1e-12)


def test_every_further_merger_costs_as_much_again():
    classes = np.repeat(np.arange(10), 20)
    twice = merging(merging(classes, 0, 1, 2, 0.5), 3, 4, 5, 0.5)
    assert claimed_loss(twice, classes, 10) == pytest.approx(perfect_loss(10) + 2 / 10, rel=1e-12)


def test_no_certain_head_is_cheaper_than_the_samples_that_its_small_clusters_lack():
    rng = np.random.default_rng(5)
    classes = np.repeat(np.arange(5), 12)
    for _ in range(50):
        found = rng.choice(5, len(classes), p=rng.dirichlet(np.ones(5)))
        lacking = np.maximum(0, 12 - np.bincount(found, minlength=5)).sum() / len(classes)
        assert claimed_loss(found, classes, 5) >= perfect_loss(5) + lacking - 1e-12


def test_a_head_that_splits_a_class_by_halves_and_knows_it_is_cheaper_than_one_that_is_certain():
    # So a loss below the bound of `merged` proves nothing: with p = (1/2, 1/2) both claims cost less than 1 together.
    classes, one_hot = np.repeat(np.arange(10), 20), torch.eye(10, dtype=torch.float64)
    logits = 100 * one_hot[merging(classes, 0, 1, 2, 0.0)]
    logits[classes == 2, 1] = 100
    loss = unsupervised_loss(one_hot[classes], logits, confident_fraction=0.5).item()
    each = math.log(2 * math.exp(0.5) + 8) - 0.5
    assert loss == pytest.approx(perfect_loss(10) + 2 * (each - perfect_loss(10)) / 10)
    assert not merged(loss, 10)


@pytest.mark.parametrize("clusters", [2, 10, 200])
def test_merged_begins_above_one_kth_more_than_the_perfect_loss(clusters):
    bound = perfect_loss(clusters) + 1 / clusters
    assert not merged(perfect_loss(clusters), clusters)
    assert not merged(bound - 1e-9, clusters)
    assert merged(bound + 1e-9, clusters)


# Who votes


def test_heads_within_half_a_merger_of_the_chosen_one_vote_by_rising_loss():
    assert voting_heads([1.54, 1.50, 1.549, 1.551, 1.60, math.nan], 1, 10) == [1, 0, 2]


def test_the_chosen_head_votes_whatever_its_loss_and_comes_first():
    assert voting_heads([1.50, 1.52], 1, 10) == [1, 0]
    assert voting_heads([2.9, 2.5, 2.8], 1, 10) == [1]
    assert voting_heads([1.5], 0, 10) == [0]


def test_equal_losses_vote_in_the_order_of_the_heads():
    assert voting_heads([1.5, 1.5, 1.5, 1.5], 2, 10) == [2, 0, 1, 3]


def test_heads_that_merged_the_same_classes_would_win_the_vote_and_have_none():
    rng = np.random.default_rng(6)
    classes = np.repeat(np.arange(10), 20)
    heads = [classes] + [rng.permutation(10)[classes]] + [merging(classes, 0, 1, 2, 0.5)] * 3
    losses = [claimed_loss(head, classes, 10) for head in heads]
    voting = voting_heads(losses, 0, 10)
    assert voting == [0, 1]
    assert np.array_equal(consensus([heads[h] for h in voting], 10).labels, classes)
    assert not np.array_equal(consensus(heads, 10).labels, classes)
