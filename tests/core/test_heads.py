"""The clustering head."""

import torch
from torch import nn

from spice_ray.core.heads import ClusterHead, HeadStack


def test_a_head_is_linear_relu_linear_of_the_features_own_width():
    head = ClusterHead(6, 4, 0)
    first, middle, second = head
    assert (first.in_features, first.out_features) == (6, 6)
    assert isinstance(middle, nn.ReLU)
    assert (second.in_features, second.out_features) == (6, 4)
    assert head(torch.randn(3, 6)).shape == (3, 4)
    assert sum(p.numel() for p in head.parameters()) == 6 * 6 + 6 + 6 * 4 + 4


def test_a_head_is_drawn_from_its_key_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = ClusterHead(6, 4, 11).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    second, other = ClusterHead(6, 4, 11).state_dict(), ClusterHead(6, 4, 12).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert not torch.equal(weight, other[name])


def test_each_head_of_a_stack_is_the_head_that_it_was_made_of():
    heads = [ClusterHead(6, 4, key) for key in (3, 1, 2)]
    stack, pooled = HeadStack(heads), torch.randn(3, 5, 6)
    for place, head in enumerate(heads):
        torch.testing.assert_close(stack.logits_of(place, pooled[place]), head(pooled[place]))
        weights = stack.weights_of(place)
        assert list(weights) == list(head.state_dict())
        assert all(torch.equal(weights[name], weight) for name, weight in head.state_dict().items())


def test_weights_taken_from_a_stack_stay_when_it_is_trained():
    stack = HeadStack([ClusterHead(2, 2, 0)])
    kept = stack.weights_of(0)
    with torch.no_grad():
        stack.weight1.zero_()
    assert kept["0.weight"].abs().sum() > 0
