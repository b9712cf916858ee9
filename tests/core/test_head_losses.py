"""Gradients in closed form against autograd on the losses as the paper writes them."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core.head_losses import cross_entropy_gradient, double_softmax_gradient, negative_entropy_gradient
from spice_ray.core.heads import ClusterHead, HeadStack
from tests.core.plain_losses import double_softmax_loss, negative_entropy


def random_logits(heads: int, samples: int, clusters: int, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads + samples + clusters)
    logits = scale * torch.randn(heads, samples, clusters, generator=generator, dtype=torch.float64)
    return logits, torch.randint(clusters, (heads, samples), generator=generator)


LOSSES = {
    "double softmax": (double_softmax_gradient, lambda z, y: double_softmax_loss(z, y).mean()),
    "cross-entropy": (cross_entropy_gradient, F.cross_entropy),
    "tempered": (
        lambda z, y: cross_entropy_gradient(z, y, temperature=0.2),
        lambda z, y: F.cross_entropy(z / 0.2, y),
    ),
    "entropy": (lambda z, _: negative_entropy_gradient(z), lambda z, _: negative_entropy(z.softmax(dim=1))),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("heads", "samples", "clusters"), [(1, 1, 2), (1, 128, 10), (3, 7, 100)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 50.0])
def test_each_gradient_is_autograds_for_every_head(name, heads, samples, clusters, scale):
    closed, plain = LOSSES[name]
    logits, labels = random_logits(heads, samples, clusters, scale)
    before = logits.clone()
    found = closed(logits, labels)
    assert torch.equal(logits, before)
    for head in range(heads):
        leaf = logits[head].clone().requires_grad_()
        (expected,) = torch.autograd.grad(plain(leaf, labels[head]), leaf)
        torch.testing.assert_close(found[head], expected, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("heads", [1, 3])
def test_a_stacks_gradients_are_autograds(name, heads):
    closed, plain = LOSSES[name]
    modules = [ClusterHead(6, 4, key).double() for key in range(heads)]
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(heads, 9, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (heads, 9), generator=generator)
    stack = HeadStack(modules)
    stack.differentiate(pooled, lambda logits: closed(logits, labels))
    for place, module in enumerate(modules):
        plain(module(pooled[place]), labels[place]).backward()
        for weight, alone in zip(stack.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(weight.grad[place], alone.grad, rtol=1e-9, atol=1e-15)
