"""The loss that ranks heads: against eq. 5 in one piece, and by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core import unsupervised_loss as module
from spice_ray.core.prototypes import (
    equal_shares,
    match_shares,
    overlapping_labels,
    prototypes,
    quotas_of,
)
from spice_ray.core.unsupervised_loss import new_table, perfect_loss, unsupervised_loss
from tests.core.plain_losses import double_softmax_loss


def loss_of(embeddings: Tensor, logits: Tensor, shares: Tensor | None = None, fraction: float = 0.5) -> float:
    if shares is None:
        shares = equal_shares(logits.shape[1])
    blocks = embeddings.split(module.BLOCK_ROWS)
    return unsupervised_loss(lambda: blocks, logits.T.contiguous(), shares, confident_fraction=fraction)


def in_one_piece(embeddings: Tensor, logits: Tensor, shares: Tensor, fraction: float) -> float:
    """Eq. 5 as a labelling round computes it."""
    probs = logits.softmax(dim=1)
    quotas = quotas_of(match_shares(shares, probs.sum(dim=0)), len(logits), confident_fraction=fraction)
    pseudo = overlapping_labels(embeddings, prototypes(embeddings, probs, quotas.confident), quotas.labelled)
    return double_softmax_loss(logits[pseudo.indices], pseudo.labels).mean().item()


def random_rows(samples: int, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(samples, 6, generator=generator), dim=1)
    return embeddings, 3 * torch.randn(samples, clusters, generator=generator)


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.01, 0.4, 0.09, 0.5], [0.97, 0.01, 0.01, 0.01]])
@pytest.mark.parametrize("block_rows", [7, 50, 101, 1000])
def test_blocks_of_any_size_give_the_loss_of_one_labelling_round(monkeypatch, block_rows, shares):
    monkeypatch.setattr(module, "BLOCK_ROWS", block_rows)
    given = torch.tensor(shares, dtype=torch.float64)
    for seed in range(3):
        rows = random_rows(101, 4, seed)
        for fraction in (0.1, 0.5, 1.0):
            assert loss_of(*rows, given, fraction) == pytest.approx(in_one_piece(*rows, given, fraction), rel=1e-5)


def test_a_table_in_a_file_gives_the_same_loss(monkeypatch):
    rows = random_rows(300, 5, 0)
    expected = loss_of(*rows)
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 0)
    assert loss_of(*rows) == expected
    table = new_table(2, 3, torch.device("cpu"))
    table[1, 2] = 7
    assert table.tolist() == [[0, 0, 0], [0, 0, 7]]


def test_of_equal_scores_the_first_count_and_no_quota_is_exceeded():
    embeddings = torch.ones(9, 1)
    logits = torch.zeros(9, 3)
    logits[:, 0] = torch.tensor([5.0, 4, 3, 2, 1, 0, -1, -2, -3])
    # All are equally near to every prototype: each cluster labels the first three.
    labels = torch.arange(3).repeat_interleave(3)
    expected = double_softmax_loss(logits[[0, 1, 2] * 3], labels).mean().item()
    assert loss_of(embeddings, logits) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_perfect_clusters_is_that_of_a_double_softmax():
    for num_clusters in (2, 10):
        certain = [math.e] + [1.0] * (num_clusters - 1)  # exp of a one-hot row
        assert perfect_loss(num_clusters) == pytest.approx(-math.log(certain[0] / sum(certain)))


@pytest.mark.parametrize(("clusters", "each"), [(2, 5), (3, 4), (10, 3)])
def test_perfect_clusters_reach_the_least_loss(clusters, each):
    labels = torch.arange(clusters).repeat(each)
    assert loss_of(torch.eye(clusters)[labels], 100 * torch.eye(clusters)[labels]) == pytest.approx(
        perfect_loss(clusters), rel=1e-6
    )


def test_the_loss_rises_with_every_wrong_or_unsure_row():
    labels = torch.arange(3).repeat(6)
    embeddings, sure = torch.eye(3)[labels], 100 * torch.eye(3)[labels]
    unsure, wrong = sure.clone(), sure.clone()
    unsure[17] = 0
    wrong[17] = wrong[16]
    assert loss_of(embeddings, sure) < min(loss_of(embeddings, unsure), loss_of(embeddings, wrong))


def test_the_loss_is_high_where_all_lie_in_one_cluster():
    embeddings, _ = random_rows(30, 3, 0)
    logits = torch.zeros(30, 3)
    logits[:, 0] = 100
    # Each third of the pseudo-labels is right only in cluster 0.
    assert loss_of(embeddings, logits) == pytest.approx(perfect_loss(3) + 2 / 3)


@pytest.mark.parametrize("which", ["embeddings", "logits"])
@pytest.mark.parametrize("row", [0, 60])
def test_a_row_that_is_no_number_makes_the_loss_none(which, row):
    embeddings, logits = random_rows(61, 3, 0)
    {"embeddings": embeddings, "logits": logits}[which][row] = math.nan
    assert math.isnan(loss_of(embeddings, logits))


def test_clusters_of_known_shares_reach_the_least_loss_and_equal_shares_do_not():
    labels = torch.tensor([2] * 2 + [0] * 10 + [1] * 4)
    rows = torch.eye(3)[labels], 100 * torch.eye(3)[labels]
    shares = torch.tensor([2 / 16, 4 / 16, 10 / 16], dtype=torch.float64)
    assert loss_of(*rows, shares) == pytest.approx(perfect_loss(3), rel=1e-6)
    assert loss_of(*rows) > perfect_loss(3) + 0.05
