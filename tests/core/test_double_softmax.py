"""The closed form of double softmax's gradient against automatic differentiation and answers by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core.double_softmax import double_softmax_gradient, even_ratio, gradient_ratio
from spice_ray.core.prototypes import double_softmax_loss

CLUSTERS = [2, 3, 10, 100]


def random_samples(clusters: int, scale: float, count: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(clusters)
    logits = scale * torch.randn(count, clusters, generator=generator, dtype=torch.float64)
    return logits, torch.randint(clusters, (count,), generator=generator)


def differentiated(logits: Tensor, labels: Tensor) -> Tensor:
    variable = logits.clone().requires_grad_()
    return torch.autograd.grad(double_softmax_loss(variable, labels).sum(), variable)[0]


def differentiated_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    variable = logits.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(variable, labels, reduction="sum"), variable)[0]


def certain_logits(clusters: int) -> Tensor:
    """A sample of probability exactly 1 for cluster 0."""
    return 1000.0 * F.one_hot(torch.zeros(1, dtype=torch.int64), clusters).double()


@pytest.mark.parametrize("clusters", CLUSTERS)
@pytest.mark.parametrize("scale", [0.1, 1, 5, 30])
def test_the_gradient_is_that_of_automatic_differentiation(clusters, scale):
    logits, labels = random_samples(clusters, scale)
    found = double_softmax_gradient(logits, labels)
    torch.testing.assert_close(found, differentiated(logits, labels), rtol=1e-9, atol=1e-15)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("clusters", CLUSTERS)
@pytest.mark.parametrize("scale", [0.1, 1, 3])
def test_the_ratio_is_that_of_two_automatic_gradients_for_every_class(clusters, scale):
    logits, labels = random_samples(clusters, scale)
    expected = differentiated(logits, labels) / differentiated_cross_entropy(logits, labels)
    torch.testing.assert_close(gradient_ratio(logits, labels), expected, rtol=1e-7, atol=1e-9)


def test_the_ratio_of_two_clusters_by_hand():
    # p = (3/4, 1/4), q_0 = e^(1/2) / (1 + e^(1/2)); the ratio is 2 p_y (1 - q_y).
    logits = torch.tensor([[math.log(3.0), 0.0]] * 2, dtype=torch.float64)
    surely, hardly = gradient_ratio(logits, torch.tensor([0, 1])).tolist()
    assert surely == pytest.approx([1.5 / (1 + math.exp(0.5))] * 2, rel=1e-12)
    assert hardly == pytest.approx([0.5 / (1 + math.exp(-0.5))] * 2, rel=1e-12)


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_a_certain_sample_has_no_gradient_whether_its_label_is_right_or_wrong(clusters):
    for label in (0, 1):
        labels = torch.tensor([label])
        assert double_softmax_gradient(certain_logits(clusters), labels).abs().max() == 0
        assert differentiated(certain_logits(clusters), labels).abs().max() == 0


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_a_certain_sample_has_the_limit_as_its_ratio(clusters):
    right = gradient_ratio(certain_logits(clusters), torch.tensor([0]))[0]
    wrong = gradient_ratio(certain_logits(clusters), torch.tensor([1]))[0]
    assert right.tolist() == pytest.approx([clusters / (clusters - 1 + math.e)] * clusters, rel=1e-12)
    assert wrong[1] == 0


def test_a_wrong_label_on_a_sure_sample_has_full_gradient_under_cross_entropy_and_hardly_any_under_double_softmax():
    logits, wrong = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([1])
    assert differentiated_cross_entropy(logits, wrong)[0, 1] < -0.999
    assert -1e-3 < double_softmax_gradient(logits, wrong)[0, 1] < 0


@pytest.mark.parametrize("clusters", CLUSTERS)
@pytest.mark.parametrize("scale", [0.1, 1, 5, 30])
def test_the_labelled_class_never_has_more_gradient_than_under_cross_entropy_nor_another_sign(clusters, scale):
    logits, labels = random_samples(clusters, scale)
    labelled = logits.softmax(dim=1).gather(1, labels[:, None])
    ratio = gradient_ratio(logits, labels).gather(1, labels[:, None])
    assert (ratio >= 0).all()
    assert (ratio < 1).all()
    assert (ratio <= 2 * labelled).all()


def test_a_class_that_is_neither_label_nor_rival_is_raised():
    logits = torch.tensor([[0.05, 0.949999, 1e-6]], dtype=torch.float64).log()
    assert gradient_ratio(logits, torch.tensor([0]))[0, 2] < 0
    assert differentiated(logits, torch.tensor([0]))[0, 2] < 0
    assert differentiated_cross_entropy(logits, torch.tensor([0]))[0, 2] > 0


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_the_even_ratio_is_the_ratio_of_every_class_where_the_others_are_alike(clusters):
    for labelled in (1e-6, 0.1, 1 / clusters, 0.5, 0.9, 1 - 1e-9):
        probs = torch.full((1, clusters), (1 - labelled) / (clusters - 1), dtype=torch.float64)
        probs[0, 0] = labelled
        expected = [even_ratio(labelled, clusters)] * clusters
        assert gradient_ratio(probs.log(), torch.tensor([0]))[0].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_the_even_ratio_at_its_ends_and_at_chance(clusters):
    assert even_ratio(0, clusters) == 0
    assert even_ratio(1 / clusters, clusters) == pytest.approx(1 / clusters, rel=1e-12)
    assert even_ratio(1, clusters) == pytest.approx(clusters / (clusters - 1 + math.e), rel=1e-12)
