"""Momentum contrast: InfoNCE, queue, momentum encoder, schedule."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core.encoders import build_encoder
from spice_ray.core.moco import KeyQueue, ProjectedEncoder, cosine, info_nce, momentum_copy, update_momentum

CPU = torch.device("cpu")


def unit_rows(count: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def slow_info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> float:
    """Eq. 1 written out for one query after the other."""
    total = 0.0
    for query, key in zip(queries.tolist(), keys.tolist(), strict=True):
        positive = math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / temperature)
        negatives = [
            math.exp(sum(a * b for a, b in zip(query, row, strict=True)) / temperature) for row in queue.tolist()
        ]
        total -= math.log(positive / (positive + sum(negatives)))
    return total / len(queries)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_is_eq_1_written_out(temperature):
    queries, keys, queue = unit_rows(6, 8, 0), unit_rows(6, 8, 1), unit_rows(20, 8, 2)
    expected = slow_info_nce(queries, keys, queue, temperature)
    assert info_nce(queries, keys, queue, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_by_hand():
    # The key is the query, one negative is opposite and one at a right angle.
    query = torch.tensor([[1.0, 0.0]])
    queue = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    expected = math.log(1 + math.exp(-4) + math.exp(-2))
    assert info_nce(query, query, queue, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_a_batchs_other_keys_are_no_negatives():
    queries, keys, queue = unit_rows(4, 8, 0), unit_rows(4, 8, 1), unit_rows(8, 8, 2)
    single = [info_nce(queries[i : i + 1], keys[i : i + 1], queue, 0.2) for i in range(4)]
    torch.testing.assert_close(info_nce(queries, keys, queue, 0.2), torch.stack(single).mean())


@pytest.mark.parametrize("share", [0.1, torch.tensor(0.1)])
def test_momentum_moves_every_weight_by_hand(share):
    query = ProjectedEncoder(build_encoder("convnet", 1), 8, 2)
    momentum = momentum_copy(query)
    before = [p.clone() for p in momentum.parameters()]
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(1.0)
    update_momentum(momentum, query, share)
    for old, new, target in zip(before, momentum.parameters(), query.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * target.detach())


def test_momentum_0_copies_the_weights_and_never_the_statistics():
    query = ProjectedEncoder(build_encoder("convnet", 1), 8, 2)
    momentum = momentum_copy(query)
    query(torch.randn(4, 3, 16, 16))
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.mul_(1.5)
    update_momentum(momentum, query, 1.0)
    for copied, parameter in zip(momentum.parameters(), query.parameters(), strict=True):
        torch.testing.assert_close(copied, parameter)
    fresh = build_encoder("convnet", 1)
    for copied, buffer in zip(momentum.encoder.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(copied, buffer)


def test_the_momentum_model_shares_no_memory_and_takes_no_gradient():
    query = ProjectedEncoder(build_encoder("convnet", 1), 8, 2)
    momentum = momentum_copy(query)
    assert not any(p.requires_grad for p in momentum.parameters())
    assert all(p.requires_grad for p in query.parameters())
    pointers = {t.data_ptr() for t in query.state_dict().values()}
    assert pointers.isdisjoint(t.data_ptr() for t in momentum.state_dict().values())


def test_projections_are_unit_rows_that_depend_on_the_key_alone():
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, second, third = (ProjectedEncoder(build_encoder("convnet", 1), 8, key)(images) for key in (2, 2, 3))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4))
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)


def test_the_queue_is_a_ring_that_drops_the_oldest():
    queue = KeyQueue(6, 2, 0, CPU)
    batches = [torch.full((2, 2), float(number)) for number in range(1, 6)]
    seen = []
    for batch in batches:
        queue.push(batch)
        seen.append(([row[0] for row in queue.keys.tolist()], int(queue.position)))
    assert seen[2] == ([1, 1, 2, 2, 3, 3], 0)
    assert seen[3] == ([4, 4, 2, 2, 3, 3], 2)
    assert seen[4] == ([4, 4, 5, 5, 3, 3], 4)


def test_a_batch_as_large_as_the_queue_replaces_it_all():
    queue, keys = KeyQueue(4, 3, 0, CPU), unit_rows(4, 3, 5)
    for _ in range(2):
        queue.push(keys)
        assert torch.equal(queue.keys, keys)
        assert queue.position == 0


def test_the_queue_keeps_copies_and_starts_with_unit_rows_drawn_from_its_key():
    queue, twin, other = KeyQueue(4, 3, 7, CPU), KeyQueue(4, 3, 7, CPU), KeyQueue(4, 3, 8, CPU)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(4))
    assert torch.equal(queue.keys, twin.keys)
    assert not torch.equal(queue.keys, other.keys)
    keys = unit_rows(2, 3, 0)
    queue.push(keys)
    kept = queue.keys.clone()
    keys.zero_()
    assert torch.equal(queue.keys, kept)


def test_the_learning_rate_warms_up_evenly_and_falls_along_half_a_cosine():
    shares = [cosine(step, 104, 4) for step in range(105)]
    assert shares[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert shares[4] == 1
    assert shares[54] == pytest.approx(0.5)
    assert shares[104] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in pairwise(shares[4:]))


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert cosine(0, 10, 0) == 1


def test_a_run_that_is_all_warm_up_never_divides_by_zero():
    assert cosine(3, 4, 4) == pytest.approx(0.8)
    assert cosine(4, 4, 4) == 1
