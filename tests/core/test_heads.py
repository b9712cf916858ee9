"""The clustering head."""

import torch
from torch import nn

from spice_ray.core.heads import ClusterHead


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
