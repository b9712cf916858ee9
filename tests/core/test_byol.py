"""BYOL's loss by hand, and its model."""

import copy

import pytest
import torch
from torch.nn import functional as F

from spice_ray.core.byol import PredictingEncoder, prediction_loss
from spice_ray.core.encoders import build_encoder, set_lanes


def model(key: int = 0) -> PredictingEncoder:
    return PredictingEncoder(build_encoder("convnet", 1), 16, key)


def images(rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_two_minus_twice_the_cosine():
    predictions = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    projections = torch.tensor([[1.0, 0.0], [0.8, -0.6], [0.0, 1.0]])
    # cosines 1, 0 and -1
    assert prediction_loss(predictions, projections).item() == pytest.approx((0 + 2 + 4) / 3, rel=1e-6)


def test_predictions_and_projections_are_unit_rows_and_differ():
    found = model()
    predicted, projected = found(images()), found.project(images())
    for rows in (predicted, projected):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(8))
    assert not torch.allclose(predicted, projected, atol=0.1)


def test_predictions_are_the_predictor_of_what_is_projected_before_its_length_is_lost():
    found = model().eval()
    _, pooled = found.encoder(images())
    expected = F.normalize(found.predictor(found.projector(pooled)), dim=1)
    torch.testing.assert_close(found(images()), expected)


def test_lanes_are_normalised_apart_in_projector_and_predictor_too():
    together = model()
    alone = copy.deepcopy(together)
    set_lanes(together, 2)
    rows = together(images())
    for lane in range(2):
        torch.testing.assert_close(rows[lane::2], copy.deepcopy(alone)(images()[lane::2]), rtol=1e-4, atol=1e-4)


def test_weights_follow_from_the_key():
    first, second, third = (model(key).predictor.first.weight for key in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
