"""FixMatch's losses, averages and schedule."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from spice_ray.core.encoders import build_encoder
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import (
    AdaptiveThreshold,
    JointModel,
    agreeing_share,
    consistency_loss,
    prediction_means,
    seven_sixteenths_cosine,
    supervised_loss,
    update_ema,
)


def joint_model(key: int) -> JointModel:
    return JointModel(build_encoder("convnet", key), ClusterHead(128, 3, key + 1))


def test_supervised_loss_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1])
    plain = supervised_loss(logits, labels, torch.ones(2)).item()
    assert plain == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)
    weighted = supervised_loss(logits, labels, torch.tensor([3.0, 0.5])).item()
    assert weighted == pytest.approx((3 * math.log(4 / 3) + 0.5 * math.log(2)) / 2, rel=1e-6)


def test_consistency_divides_by_all_rows_the_unsure_ones_counting_zero():
    # Weak probabilities 0.9, 0.5, 0.75 and 0.9; above 0.8 are two of four.
    weak = torch.tensor([[math.log(9.0), 0.0], [0.0, 0.0], [math.log(3.0), 0.0], [0.0, math.log(9.0)]])
    strong = torch.tensor([[0.0, 0.0], [50.0, -50.0], [-50.0, 50.0], [math.log(4.0), 0.0]])
    expected = (math.log(2) + math.log(5)) / 4
    assert consistency_loss(weak, strong, 0.8).item() == pytest.approx(expected, rel=1e-5)


def test_a_row_exactly_at_the_threshold_does_not_count():
    weak, strong = torch.zeros(1, 2), torch.zeros(1, 2)  # sureness 0.5, exact in float32
    assert consistency_loss(weak, strong, 0.5).item() == 0
    assert consistency_loss(weak, strong, 0.4999).item() == pytest.approx(math.log(2))


def test_nothing_sure_gives_zero_loss_and_zero_gradient():
    strong = torch.randn(5, 3, requires_grad=True)
    loss = consistency_loss(torch.zeros(5, 3), strong, 0.95)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(strong.grad, torch.zeros(5, 3))


def test_no_gradient_reaches_the_weak_views():
    weak = (10 * torch.eye(3)).requires_grad_()
    strong = torch.zeros(3, 3, requires_grad=True)
    consistency_loss(weak, strong, 0.5).backward()
    assert weak.grad is None
    expected = (torch.full((3, 3), 1 / 3) - torch.eye(3)) / 3
    torch.testing.assert_close(strong.grad, expected)


def test_the_agreeing_share_counts_rows_that_are_confident_and_have_one_cluster_in_both_views():
    # Weak probabilities 0.9, 0.9, 0.5 and 0.75; the second row's strong view is of another cluster.
    weak = torch.tensor([[math.log(9.0), 0.0], [0.0, math.log(9.0)], [0.0, 0.0], [math.log(3.0), 0.0]])
    strong = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert agreeing_share(weak, strong, 0.8).item() == 0.25
    assert agreeing_share(weak, strong, 0.7).item() == 0.5
    assert agreeing_share(weak, strong, 0.95).item() == 0


def test_adaptive_thresholds_by_hand():
    adaptive = AdaptiveThreshold(2, decay=0.75, device=torch.device("cpu"))
    assert adaptive.levels().tolist() == [0.5, 0.5]
    # Probabilities (0.9, 0.1) and (0.5, 0.5): means 0.7 and 0.3, the greatest 0.7.
    means = prediction_means(torch.tensor([[math.log(9.0), 0.0], [0.0, 0.0]]))
    assert means.tolist() == pytest.approx([0.7, 0.3, 0.7])
    adaptive.update(means)
    # 0.75 * 0.5 + 0.25 * 0.7 = 0.55 for all; clusters 0.55 and 0.45.
    assert adaptive.levels().tolist() == pytest.approx([0.55, 0.55 * 0.45 / 0.55])


def test_each_cluster_has_a_threshold_of_its_own():
    # Weak probabilities 0.75 of the first cluster, 0.75 of the second.
    weak = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]])
    strong, levels = torch.zeros(2, 2), torch.tensor([0.8, 0.7])
    assert consistency_loss(weak, strong, levels).item() == pytest.approx(math.log(2) / 2)


def test_consistency_is_the_slow_loop_on_random_logits():
    generator = torch.Generator().manual_seed(0)
    weak, strong = (3 * torch.randn(50, 4, generator=generator) for _ in range(2))
    total = 0.0
    for w, s in zip(weak.softmax(1).tolist(), strong.log_softmax(1).tolist(), strict=True):
        if max(w) > 0.8:
            total -= s[w.index(max(w))]
    assert total > 0
    assert consistency_loss(weak, strong, 0.8).item() == pytest.approx(total / 50, rel=1e-5)


def test_ema_averages_weights_and_statistics_by_hand_and_copies_counts():
    ema, model = joint_model(0), joint_model(5)
    model(torch.randn(4, 3, 16, 16))
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    update_ema(ema, model, 0.75)
    after, target = ema.state_dict(), model.state_dict()
    counts = [name for name in after if name.endswith("num_batches_tracked")]
    assert counts
    for name, value in after.items():
        expected = target[name] if name in counts else 0.75 * before[name] + 0.25 * target[name]
        torch.testing.assert_close(value, expected)
        assert value.data_ptr() != target[name].data_ptr()


def test_ema_follows_the_closed_form_of_constant_weights():
    ema, model = joint_model(0), joint_model(5)
    first = next(ema.parameters()).detach().clone()
    for _ in range(10):
        update_ema(ema, model, 0.9)
    target = next(model.parameters())
    torch.testing.assert_close(next(ema.parameters()), target + 0.9**10 * (first - target), rtol=1e-4, atol=1e-6)


def test_seven_sixteenths_of_a_cosine_falls_from_1_to_0195():
    shares = [seven_sixteenths_cosine(step, 100) for step in range(101)]
    assert shares[0] == 1
    assert shares[100] == pytest.approx(0.19509032, abs=1e-8)  # sin(pi / 16)
    assert all(a > b for a, b in pairwise(shares))


def test_the_joint_model_is_its_encoder_and_its_head():
    model = joint_model(1).eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.dtype == torch.float32
    pooled = model.encoder(images)[1]
    first, _, second = model.head
    torch.testing.assert_close(logits, F.linear(F.relu(first(pooled)), second.weight, second.bias))
