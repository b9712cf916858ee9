"""Encoders and lane-wise batch norm."""

import copy

import pytest
import torch
from torch import nn

from spice_ray.core import encoders
from spice_ray.core.encoders import LaneBatchNorm2d, build_encoder, set_lanes

LANES, ROWS, CHANNELS = 3, 4, 5


def interleaved(scale_lanes: bool = True) -> torch.Tensor:
    """(b * L, C, 6, 6) rows whose lanes have different means and spreads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, LANES, CHANNELS, 6, 6, generator=generator)
    if scale_lanes:
        x = x * torch.tensor([1.0, 3.0, 0.2]).view(1, 3, 1, 1, 1) + torch.tensor([0.0, 5.0, -2.0]).view(1, 3, 1, 1, 1)
    return x.flatten(0, 1)


def lane_norm(lanes: int) -> LaneBatchNorm2d:
    """A layer whose weights, biases and running statistics are all different."""
    norm = LaneBatchNorm2d(CHANNELS)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
        norm.running_mean.copy_(torch.linspace(-0.3, 0.4, CHANNELS))
        norm.running_var.copy_(torch.linspace(0.7, 1.9, CHANNELS))
    set_lanes(norm, lanes)
    return norm


def normalise(norm: LaneBatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Interleaved rows through a layer that wants them lane after lane, as an encoder does it."""
    lanes = norm.lanes if norm.training else 1
    return encoders.interleaved(norm(encoders.lane_after_lane(x, lanes)), lanes)


def plain_twin(norm: LaneBatchNorm2d) -> nn.BatchNorm2d:
    twin = nn.BatchNorm2d(CHANNELS)
    twin.load_state_dict(norm.state_dict())
    return twin


def test_each_lane_is_normalised_like_a_batch_norm_of_its_own():
    x, norm = interleaved(), lane_norm(LANES)
    twins = [plain_twin(norm) for _ in range(LANES)]
    result = normalise(norm, x)
    for lane, twin in enumerate(twins):
        torch.testing.assert_close(result[lane::LANES], twin(x[lane::LANES]), rtol=1e-5, atol=1e-5)


def test_running_statistics_are_the_mean_over_lanes_at_every_step():
    norm = lane_norm(LANES)
    twins = [plain_twin(norm) for _ in range(LANES)]
    for step in range(3):
        x = interleaved() * (1 + step) - step
        normalise(norm, x)
        for lane, twin in enumerate(twins):
            twin(x[lane::LANES])
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(twin, name) for twin in twins]).mean(dim=0)
            torch.testing.assert_close(getattr(norm, name), mean, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_separate_batch_norms():
    x, norm = interleaved().requires_grad_(), lane_norm(LANES)
    twin, x_twin = plain_twin(norm), interleaved().requires_grad_()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (normalise(norm, x) * target).sum().backward()
    sum((twin(x_twin[lane::LANES]) * target[lane::LANES]).sum() for lane in range(LANES)).backward()
    torch.testing.assert_close(x.grad, x_twin.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.weight.grad, twin.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-4)


def test_a_lane_does_not_notice_the_rows_of_another():
    x, other = interleaved(), interleaved()
    other[1::LANES] = 100 * torch.randn(ROWS, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(2))
    first, second = normalise(lane_norm(LANES), x), normalise(lane_norm(LANES), other)
    assert torch.equal(first[0::LANES], second[0::LANES])
    assert torch.equal(first[2::LANES], second[2::LANES])
    assert not torch.allclose(first[1::LANES], second[1::LANES])


def test_eval_mode_uses_the_running_statistics_whatever_the_lanes():
    x, norm = interleaved(), lane_norm(LANES).eval()
    before = copy.deepcopy(norm.state_dict())
    assert torch.equal(normalise(norm, x), plain_twin(norm).eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_one_lane_is_plain_batch_norm():
    x, norm = interleaved(), lane_norm(1)
    twin = plain_twin(norm)
    assert torch.equal(normalise(norm, x), twin(x))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in norm.state_dict().items())


def test_every_entry_of_the_state_is_that_of_plain_batch_norm_where_lanes_are_equal():
    x = interleaved(scale_lanes=False)[::LANES].repeat_interleave(LANES, dim=0)
    norm = lane_norm(LANES)
    twin = plain_twin(norm)
    normalise(norm, x)
    twin(x[::LANES])
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_channels_last_rows_are_told_apart_too():
    x, norm, twin = interleaved(), lane_norm(LANES), lane_norm(LANES)
    result = normalise(norm, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, normalise(twin, x), rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_fill_the_lanes_are_refused():
    with pytest.raises(RuntimeError):
        normalise(lane_norm(LANES), interleaved()[:-1])


# Architectures; parameters are counted without the classifier


@pytest.mark.parametrize(
    ("name", "side", "embed_dim", "map_side", "parameters"),
    [
        ("convnet", 16, 128, 2, 27 * 32 + 288 * 64 + 576 * 128 + 2 * (32 + 64 + 128)),
        ("resnet18_small", 32, 512, 4, 11_173_962 - 5_130),  # the published CIFAR ResNet-18 with 10 classes
        ("resnet34_small", 32, 512, 4, 21_282_122 - 5_130),
        ("resnet18", 64, 512, 2, 11_689_512 - 513_000),  # torchvision's with 1000 classes
        ("resnet34", 64, 512, 2, 21_797_672 - 513_000),
        ("wrn28_2", 32, 128, 8, 1_467_610 - 1_290),  # FixMatch's with 10 classes
        ("resnet34_pooled", 96, 512, 7, 21_282_122 - 5_130),
        ("resnet18_pooled", 64, 512, 5, 11_173_962 - 5_130),
        ("wrn28_8", 32, 512, 8, 23_354_842 - 5_130),
        ("wrn37_2", 96, 256, 6, 5_926_864),
    ],
)
def test_encoders_have_their_published_sizes(name, side, embed_dim, map_side, parameters):
    encoder = build_encoder(name, 0).eval()
    with torch.no_grad():
        feature_map, pooled = encoder(torch.randn(1, 3, side, side))
    assert encoder.embed_dim == embed_dim
    assert feature_map.shape == (1, embed_dim, map_side, map_side)
    assert pooled.shape == (1, embed_dim)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
    torch.testing.assert_close(pooled, feature_map.mean(dim=(2, 3)))


@pytest.mark.parametrize("name", ["convnet", "resnet18_small", "wrn28_2"])
def test_every_batch_norm_of_an_encoder_is_told_its_lanes(name):
    encoder = build_encoder(name, 0)
    set_lanes(encoder, 4)
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, LaneBatchNorm2d) and norm.lanes == 4 for norm in norms)


@pytest.mark.parametrize("name", ["convnet", "wrn28_2"])
def test_lanes_of_a_whole_encoder_are_encoders_of_their_own(name):
    encoder = build_encoder(name, 1)
    alone = copy.deepcopy(encoder)
    set_lanes(encoder, 2)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    _, pooled = encoder(images)
    for lane in range(2):
        torch.testing.assert_close(pooled[lane::2], copy.deepcopy(alone)(images[lane::2])[1], rtol=1e-4, atol=1e-5)


def test_weights_depend_on_the_key_alone_and_leave_the_generator_as_it_was():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_encoder("convnet", 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second, third = build_encoder("convnet", 7), build_encoder("convnet", 8)
    assert torch.equal(first.trunk[0].weight, second.trunk[0].weight)
    assert not torch.equal(first.trunk[0].weight, third.trunk[0].weight)


@pytest.mark.parametrize("parts", [2, 3])
def test_running_statistics_of_a_batch_in_parts_are_those_of_the_whole(parts):
    x = torch.randn(4 * 6, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(0))  # 4 rows of each of 6 lanes
    x = x * torch.linspace(0.2, 3, 6).repeat(4).view(-1, 1, 1, 1)
    whole, in_parts = lane_norm(6), lane_norm(6)
    for step in range(3):
        normalise(whole, x + step)
        rows = (x + step).unflatten(0, (4, parts, 6 // parts))
        for part in range(parts):
            set_lanes(in_parts, 6 // parts, part, parts)
            normalise(in_parts, rows[:, part].flatten(0, 1))
    for name, value in in_parts.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_all_lanes_at_once_are_lanes_one_by_one(parts):
    apart, at_once = lane_norm(LANES), lane_norm(LANES)
    for step in range(3):
        for part in range(parts):
            set_lanes(apart, LANES, part, parts)
            set_lanes(at_once, LANES, part, parts)
            rows = encoders.lane_after_lane(interleaved() + step + part, LANES)
            inputs = [rows.clone().requires_grad_(), rows.clone().requires_grad_()]
            found, expected = at_once.all_at_once(inputs[0]), apart.one_by_one(inputs[1])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            weights = torch.linspace(-1, 1, found.numel()).view_as(found)
            for result in (found, expected):
                (result * weights).sum().backward()
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for name, value in at_once.state_dict().items():
        torch.testing.assert_close(value, apart.state_dict()[name], rtol=1e-5, atol=1e-6)
    for found, expected in zip(at_once.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_all_lanes_at_once_take_half_precision_and_keep_the_layout_of_memory():
    x = encoders.lane_after_lane(interleaved(), LANES).to(torch.bfloat16, memory_format=torch.channels_last)
    found = lane_norm(LANES).all_at_once(x)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = lane_norm(LANES).double().one_by_one(x.double())
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=2**-8)
