"""SimCLR's loss against a slow twin, and by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from spice_ray.core.simclr import nt_xent


def unit_rows(rows: int, key: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(key)), dim=1)


def twin(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    views = [*first.tolist(), *second.tolist()]
    losses = []
    for i, view in enumerate(views):
        similar = [math.exp(sum(a * b for a, b in zip(view, other, strict=True)) / temperature) for other in views]
        losses.append(-math.log(similar[(i + len(first)) % len(views)] / (sum(similar) - similar[i])))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_that_of_a_slow_twin(temperature):
    first, second = unit_rows(5, 0), unit_rows(5, 1)
    assert nt_xent(first, second, temperature).item() == pytest.approx(twin(first, second, temperature), rel=1e-5)


def test_two_images_at_right_angles_by_hand():
    views = torch.eye(2)
    # Each view meets its other view, similarity 1, and two views of the other image, similarity 0.
    expected = -math.log(math.e / (math.e + 2))
    assert nt_xent(views, views, 1.0).item() == pytest.approx(expected, rel=1e-6)


def test_which_view_comes_first_does_not_matter():
    first, second = unit_rows(7, 0), unit_rows(7, 1)
    torch.testing.assert_close(nt_xent(first, second, 0.2), nt_xent(second, first, 0.2))


def test_both_views_take_a_finite_gradient():
    first, second = unit_rows(4, 0).requires_grad_(), unit_rows(4, 1).requires_grad_()
    nt_xent(first, second, 0.05).backward()
    for view in (first, second):
        assert torch.isfinite(view.grad).all()
        assert (view.grad.norm(dim=1) > 0).all()
