"""Prototype pseudo-labelling against the paper's toy, answers by hand and a slow twin."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core.prototypes import (
    equal_shares,
    exclusive_labels,
    overlapping_labels,
    prototypes,
    quotas_of,
)
from tests.core.plain_losses import double_softmax_loss, negative_entropy


def random_round(samples: int, clusters: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(samples, width, generator=generator, dtype=torch.float64), dim=1)
    return embeddings, torch.randn(samples, clusters, generator=generator, dtype=torch.float64).softmax(dim=1)


def by_cluster(indices: Tensor, labels: Tensor, clusters: int) -> list[set[int]]:
    return [set(indices[labels == k].tolist()) for k in range(clusters)]


def equal(embeddings: Tensor, clusters: int) -> Tensor:
    return quotas_of(equal_shares(clusters), len(embeddings), confident_fraction=1).labelled


def centres_of(embeddings: Tensor, probs: Tensor, fraction: float) -> Tensor:
    quotas = quotas_of(equal_shares(probs.shape[1]), len(embeddings), confident_fraction=fraction)
    return prototypes(embeddings, probs, quotas.confident)


def slow_prototypes(embeddings: Tensor, probs: Tensor, count: int) -> list[list[float]]:
    rows, centres = embeddings.tolist(), []
    for k in range(probs.shape[1]):
        best = sorted(range(len(rows)), key=lambda i: -probs[i, k].item())[:count]
        centres.append([sum(rows[i][d] for i in best) / count for d in range(len(rows[0]))])
    return centres


def slow_nearest(embeddings: Tensor, centre: list[float], count: int) -> set[int]:
    similarity = [sum(a * b for a, b in zip(row, centre, strict=True)) for row in embeddings.tolist()]
    return set(sorted(range(len(similarity)), key=lambda i: -similarity[i])[:count])


# The setting of the paper's Fig. 4: of 10 samples and 3 clusters, the 3 most confident of each make its prototype. The
# numbers are ours.

TOY_DEGREES = (0, 10, 20, 120, 130, 140, 240, 250, 260, 185)
TOY_PROBS = (
    (0.8, 0.1, 0.1),
    (0.7, 0.2, 0.1),
    (0.3, 0.4, 0.3),  # lies with cluster 0, though its probabilities say 1
    (0.1, 0.8, 0.1),
    (0.2, 0.7, 0.1),
    (0.2, 0.6, 0.2),
    (0.1, 0.1, 0.8),
    (0.1, 0.2, 0.7),
    (0.6, 0.1, 0.3),  # lies with cluster 2, though its probabilities say 0
    (0.1, 0.3, 0.6),
)


def toy() -> tuple[Tensor, Tensor]:
    angles = torch.deg2rad(torch.tensor(TOY_DEGREES, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor(TOY_PROBS, dtype=torch.float64)


def test_prototypes_of_the_papers_toy_are_the_means_of_the_three_most_confident():
    embeddings, probs = toy()
    centres = centres_of(embeddings, probs, 1.0)
    expected = torch.stack([embeddings[[0, 1, 8]], embeddings[[3, 4, 5]], embeddings[[6, 7, 9]]]).mean(dim=1)
    torch.testing.assert_close(centres, expected)


def test_pseudo_labels_of_the_papers_toy_follow_the_prototypes_and_not_the_probabilities():
    embeddings, probs = toy()
    pseudo = overlapping_labels(embeddings, centres_of(embeddings, probs, 1.0), equal(embeddings, 3))
    # Cluster 0's centre points to -24.1 degrees, cluster 1's to 130, cluster 2's to 225.8.
    assert by_cluster(*pseudo, 3) == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}]
    assert pseudo.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert 9 not in pseudo.indices


@pytest.mark.parametrize(
    ("samples", "clusters", "fraction", "count"),
    [(40, 4, 0.5, 5), (40, 4, 1.0, 10), (43, 4, 0.5, 5), (47, 5, 0.33, 3), (6, 6, 0.5, 1), (7, 2, 0.01, 1)],
)
def test_the_e_step_is_the_slow_twin(samples, clusters, fraction, count):
    for seed in range(3):
        embeddings, probs = random_round(samples, clusters, 8, seed)
        centres = centres_of(embeddings, probs, fraction)
        expected = slow_prototypes(embeddings, probs, count)
        torch.testing.assert_close(centres, torch.tensor(expected, dtype=torch.float64))
        pseudo = overlapping_labels(embeddings, centres, equal(embeddings, probs.shape[1]))
        nearest = [slow_nearest(embeddings, centre, samples // clusters) for centre in expected]
        assert by_cluster(*pseudo, clusters) == nearest


@pytest.mark.parametrize("assign", [overlapping_labels, exclusive_labels])
@pytest.mark.parametrize(("samples", "clusters"), [(12, 3), (14, 3), (13, 12), (5, 5), (9, 2)])
def test_every_cluster_gets_the_whole_part_of_its_share(assign, samples, clusters):
    embeddings, probs = random_round(samples, clusters, 4, 0)
    pseudo = assign(embeddings, centres_of(embeddings, probs, 0.5), equal(embeddings, clusters))
    assert pseudo.indices.dtype == pseudo.labels.dtype == torch.int64
    assert torch.bincount(pseudo.labels, minlength=clusters).tolist() == [samples // clusters] * clusters
    assert [len(members) for members in by_cluster(*pseudo, clusters)] == [samples // clusters] * clusters


def test_two_clusters_with_one_prototype_claim_the_same_samples():
    embeddings, _ = random_round(10, 2, 4, 0)
    pseudo = overlapping_labels(embeddings, embeddings[:1].expand(2, -1), equal(embeddings, 2))
    first, second = by_cluster(*pseudo, 2)
    assert first == second


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("samples", "clusters"), [(12, 3), (14, 3), (9, 9), (30, 4)])
def test_exclusive_labels_give_no_sample_twice(samples, clusters, seed):
    embeddings, probs = random_round(samples, clusters, 4, seed)
    pseudo = exclusive_labels(embeddings, centres_of(embeddings, probs, 1.0), equal(embeddings, clusters))
    assert len(set(pseudo.indices.tolist())) == len(pseudo.indices) == clusters * (samples // clusters)


@pytest.mark.parametrize("seed", range(5))
def test_exclusive_labels_are_the_greedy_slow_twin(seed):
    embeddings, probs = random_round(17, 4, 5, seed)
    centres = centres_of(embeddings, probs, 1.0)
    cosines = embeddings @ F.normalize(centres, dim=1).T
    members: list[set[int]] = [set() for _ in range(4)]
    for _, i, k in sorted((-cosines[i, k].item(), i, k) for i in range(17) for k in range(4)):
        if len(members[k]) < 4 and not any(i in other for other in members):
            members[k].add(i)
    assert by_cluster(*exclusive_labels(embeddings, centres, equal(embeddings, 4)), 4) == members


def test_exclusive_labels_prefer_no_prototype_for_its_length():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    centres = torch.tensor([[0.1, 0.0], [30.0, 40.0]])  # the second is longer, but the first is nearer to row 0
    assert by_cluster(*exclusive_labels(embeddings, centres, equal(embeddings, 2)), 2) == [{0}, {1}]


@pytest.mark.parametrize("assign", [overlapping_labels, exclusive_labels])
def test_samples_that_are_all_alike_still_fill_every_cluster(assign):
    embeddings = F.normalize(torch.ones(11, 4), dim=1)
    pseudo = assign(embeddings, centres_of(embeddings, torch.full((11, 3), 1 / 3), 0.5), equal(embeddings, 3))
    assert [len(members) for members in by_cluster(*pseudo, 3)] == [3, 3, 3]


def test_quotas_are_the_whole_parts_of_the_shares_and_never_none():
    shares = torch.tensor([0.5, 0.3, 0.19, 0.01], dtype=torch.float64)
    assert [q.tolist() for q in quotas_of(shares, 30, confident_fraction=0.5)] == [[7, 4, 2, 1], [15, 9, 5, 1]]
    # 0.1 * 30 is a little more than 3 and 0.1 * 3 a little less than it seems; ten equal shares of 30 are 3 each.
    for clusters in range(2, 60):
        for each in (1, 2, 3, 7, 100):
            quotas = quotas_of(equal_shares(clusters), clusters * each, confident_fraction=1)
            assert quotas.labelled.tolist() == quotas.confident.tolist() == [each] * clusters


QUOTAS = torch.tensor([1, 7, 4])


@pytest.mark.parametrize("seed", range(3))
def test_quotas_of_unequal_size_are_the_slow_twins(seed):
    embeddings, probs = random_round(14, 3, 4, seed)
    centres = prototypes(embeddings, probs, torch.tensor([1, 3, 2]))
    for k, count in enumerate((1, 3, 2)):
        assert centres[k].tolist() == pytest.approx(slow_prototypes(embeddings, probs, count)[k])
    claimed = by_cluster(*overlapping_labels(embeddings, centres, QUOTAS), 3)
    assert claimed == [slow_nearest(embeddings, centres[k].tolist(), int(QUOTAS[k])) for k in range(3)]


def test_exclusive_labels_keep_to_unequal_quotas():
    embeddings, probs = random_round(14, 3, 4, 0)
    pseudo = exclusive_labels(embeddings, prototypes(embeddings, probs, QUOTAS), QUOTAS)
    assert torch.bincount(pseudo.labels).tolist() == QUOTAS.tolist()
    assert len(set(pseudo.indices.tolist())) == len(pseudo.indices) == 12


def test_inputs_are_left_as_they_were():
    embeddings, probs = random_round(20, 4, 5, 0)
    before = embeddings.clone(), probs.clone()
    centres = centres_of(embeddings, probs, 0.5)
    kept = centres.clone()
    overlapping_labels(embeddings, centres, equal(embeddings, 4))
    exclusive_labels(embeddings, centres, equal(embeddings, 4))
    assert torch.equal(embeddings, before[0])
    assert torch.equal(probs, before[1])
    assert torch.equal(centres, kept)


def test_double_softmax_loss_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    loss = double_softmax_loss(logits, torch.tensor([0, 1]))
    # The first softmax gives (3/4, 1/4); the second exp(3/4) / (exp(3/4) + exp(1/4)).
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.5)), math.log(2)], rel=1e-6)


def test_double_softmax_loss_and_gradient_are_bounded_however_wrong_the_label():
    for clusters in (2, 10, 200):
        logits = torch.zeros(2, clusters, dtype=torch.float64)
        logits[:, 0] = 1000.0
        logits.requires_grad_()
        right, wrong = double_softmax_loss(logits, torch.tensor([0, 1]))
        assert right.item() == pytest.approx(math.log(1 + (clusters - 1) / math.e))
        assert wrong.item() == pytest.approx(1 + right.item())
        (gradient,) = torch.autograd.grad(wrong, logits)
        assert gradient.abs().max() < 1e-6


def test_the_gradient_of_double_softmax_is_at_most_half():
    # |dL/dp|_1 <= 2 and the softmax's own derivative is at most 1/4 in each entry.
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(4000, 7, generator=generator)).requires_grad_()
    labels = torch.randint(7, (4000,), generator=generator)
    double_softmax_loss(logits, labels).sum().backward()
    assert logits.grad.abs().max() <= 0.5
    assert logits.grad.abs().max() > 0.1


def test_negative_entropy_is_least_for_clusters_of_equal_size_and_0_for_one():
    assert negative_entropy(torch.eye(4)).item() == pytest.approx(-math.log(4))
    assert negative_entropy(torch.eye(4)[[0, 0, 0]]).item() == pytest.approx(0, abs=1e-6)
    uneven = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert negative_entropy(uneven).item() == pytest.approx(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
