"""The last step: predictions on plain views."""

import torch

from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import build_encoder
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.stages.assign import predict
from spice_ray.stages.embed import ROWS_AT_ONCE

AUGMENTATION = Augmentation("natural", (0.4, 0.5, 0.6), (0.25, 0.2, 0.3))


def classifier() -> JointModel:
    return JointModel(build_encoder("convnet", 1), ClusterHead(128, 3, 2)).eval()


def photos(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_predictions_are_the_classifiers_logits_and_features_of_plain_views():
    model, images = classifier(), photos(20)
    views = (images / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.25, 0.2, 0.3]).view(3, 1, 1)
    predicted = predict(model, images, AUGMENTATION)
    with torch.no_grad():
        torch.testing.assert_close(predicted.logits, model(views), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(predicted.pooled, model.encoder(views)[1], rtol=1e-4, atol=1e-5)
    assert predicted.logits.dtype == predicted.pooled.dtype == torch.float32


def test_rows_stay_in_order_past_the_rows_at_once_and_cuts_there_change_no_bit():
    model, images = classifier(), photos(ROWS_AT_ONCE + 30)
    whole = predict(model, images, AUGMENTATION)
    parts = [predict(model, part, AUGMENTATION) for part in (images[:ROWS_AT_ONCE], images[ROWS_AT_ONCE:])]
    assert torch.equal(whole.logits, torch.cat([part.logits for part in parts]))
    assert torch.equal(whole.pooled, torch.cat([part.pooled for part in parts]))
    last = predict(model, images[-1:], AUGMENTATION)
    torch.testing.assert_close(last.logits[0], whole.logits[-1], rtol=1e-4, atol=1e-5)


def test_predicting_changes_neither_classifier_nor_images():
    model, images = classifier(), photos(10)
    state, before = {name: value.clone() for name, value in model.state_dict().items()}, images.clone()
    predict(model, images, AUGMENTATION)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(images, before)
