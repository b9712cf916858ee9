"""Models of torchvision and timm as encoders; all weights are random."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from spice_ray.core.collectives import restore_buffers, stacked_buffers
from spice_ray.core.encoders import LaneBatchNorm2d, build_encoder, set_lanes
from spice_ray.core.joint import update_ema
from spice_ray.core.pretrained import (
    PretrainedEncoder,
    TimmEncoder,
    TorchvisionEncoder,
    build_pretrained,
    count_other_norms,
    load_given,
)
from spice_ray.errors import ConfigError
from tests.library_models import classifier_input

SIZE = 32


def tiny_vit(image_size: int = SIZE) -> nn.Module:
    return VisionTransformer(
        image_size=image_size, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.5
    )


def tiny_densenet(num_classes: int = 1000) -> models.DenseNet:
    return models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=num_classes)


TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], width_per_group=64),
    "regnet": lambda: RegNet(BlockParams([1, 1], [8, 16], [8, 8], [1.0, 1.0], [2, 2]), stem_width=8),
    "densenet": tiny_densenet,
    "efficientnet": lambda: EfficientNet([MBConvConfig(6, 3, 1, 8, 8, 2, 1, 1)], 0.5, 0.9),
    "convnext": lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], stochastic_depth_prob=0.9),
    "swin": lambda: SwinTransformer([2, 2], 8, [1, 2], [2, 2], [4, 4], stochastic_depth_prob=0.9),
    "vit": tiny_vit,
}
TIMM = {
    "test_resnet": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {"img_size": SIZE, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)},
    "vit_small_patch14_dinov2": {"img_size": SIZE, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "vit_small_patch14_reg4_dinov2": {"img_size": SIZE, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "vit_base_patch16_siglip_224": {"img_size": SIZE, "embed_dim": 24, "depth": 1, "num_heads": 2},
}


def images(count: int = 4, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def with_statistics(net: nn.Module) -> nn.Module:
    """Batch norms and layer scales that are not those of a new model."""
    for name, parameter in net.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(1)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return net


def timm_encoder(name: str) -> TimmEncoder:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return TimmEncoder(with_statistics(timm.create_model(name, num_classes=0, **TIMM[name])), SIZE)


def check_contract(encoder: PretrainedEncoder, pooled: Tensor) -> None:
    with torch.no_grad():
        feature_map, found = encoder.eval()(images())
    width = encoder.embed_dim
    assert found.shape == (4, width)
    assert feature_map.shape[:2] == (4, width)
    assert feature_map.shape[2] == feature_map.shape[3]
    torch.testing.assert_close(found, pooled, rtol=1e-5, atol=1e-5)
    assert found.std(dim=0).max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_pooled_feature_is_what_its_classifier_is_given(name: str) -> None:
    torch.manual_seed(0)
    net = with_statistics(TORCHVISION[name]()).eval()
    pooled = classifier_input(net, images())
    check_contract(TorchvisionEncoder(net, SIZE), pooled)


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_timms_pooled_feature_is_the_output_of_a_model_without_classifier(name: str) -> None:
    encoder = timm_encoder(name)
    check_contract(encoder, copy.deepcopy(encoder.trunk).eval()(images()))


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: TorchvisionEncoder(tiny_vit(), SIZE), lambda: timm_encoder([*TIMM][4])])
def test_the_map_of_a_vit_holds_its_patch_tokens_row_by_row(make: Callable[[], PretrainedEncoder]) -> None:
    encoder = make().eval()
    if isinstance(encoder, TimmEncoder):
        tokens = encoder.trunk.forward_features(images())[:, 5:]  # class token and four registers come first
    else:
        tokens = encoder.trunk(images())["tokens"][:, 1:]
    feature_map, _ = encoder(images())
    side = feature_map.shape[2]
    assert tokens.shape[1] == side * side == {16: 16, 24: 4}[encoder.embed_dim]
    for row in range(side):
        for column in range(side):
            assert torch.equal(feature_map[:, :, row, column], tokens[:, row * side + column])


def densenet_encoder() -> TorchvisionEncoder:
    torch.manual_seed(0)
    return TorchvisionEncoder(tiny_densenet(), SIZE)


@torch.no_grad()
@pytest.mark.parametrize("make", [densenet_encoder, lambda: timm_encoder("test_resnet")])
def test_lanes_of_a_librarys_model_are_models_of_their_own_also_in_a_copy(
    make: Callable[[], PretrainedEncoder],
) -> None:
    encoder = make()
    assert count_other_norms(encoder) == 0
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(norm, LaneBatchNorm2d) for norm in norms)
    alone, encoder = copy.deepcopy(encoder), copy.deepcopy(encoder)
    set_lanes(encoder, 2)
    rows = images(8) * torch.tensor([1.0, 3.0]).repeat(4)[:, None, None, None]
    pooled = encoder(rows)[1]
    for lane in range(2):
        torch.testing.assert_close(pooled[lane::2], copy.deepcopy(alone)(rows[lane::2])[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(pooled, copy.deepcopy(alone)(rows)[1], atol=1e-2)


def test_batch_norms_of_timms_own_kind_are_counted() -> None:
    pytest.importorskip("timm")
    assert count_other_norms(build_pretrained("timm/test_efficientnet", SIZE)) > 0


@pytest.mark.parametrize("name", ["efficientnet", "convnext", "swin", "vit"])
def test_a_model_in_training_has_no_dropout(name: str) -> None:
    torch.manual_seed(0)
    encoder = TorchvisionEncoder(TORCHVISION[name](), SIZE)
    assert encoder.training
    first, second = (copy.deepcopy(encoder)(images())[1] for _ in range(2))
    assert torch.equal(first, second)


def test_a_model_without_batch_norm_is_checkpointed_and_averaged() -> None:
    encoder = TorchvisionEncoder(tiny_vit(), SIZE)
    ema = copy.deepcopy(encoder)
    with torch.no_grad():
        encoder.trunk.class_token.fill_(1)
    update_ema(ema, encoder, decay=0.75)
    torch.testing.assert_close(ema.trunk.class_token, torch.full((1, 1, 16), 0.25))
    stacked = stacked_buffers(encoder)
    assert stacked.shape == (1, 0)
    restore_buffers(encoder, stacked)


def test_the_process_generator_is_left_as_it_was() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    build_pretrained("torchvision/resnet18", SIZE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("torchvision/resnet5", 32, "torchvision has no model 'resnet5'; did you mean 'resnet50'?"),
        ("torchvision/fcn_resnet50", 32, "torchvision has no model 'fcn_resnet50'"),
        (
            "torchvision/squeezenet1_0",
            32,
            "cannot be used on images of 32 pixels (of torchvision's models those of ResNet, ",
        ),
        ("torchvision/vit_b_16", 40, "vit_b_16 cannot be used on images of 40 pixels (Input shape indivisible"),
        ("timm/vit_smal_patch14_dinov2", 28, "did you mean 'vit_small_patch14_dinov2'?"),
        ("timm/resnet18.nobodys", 32, "timm has no model 'resnet18.nobodys'; did you mean 'resnet18."),
        ("timm/test_vit", 8, "test_vit cannot be used on images of 8 pixels ("),
        ("timm/mobilenetv3_small_050", 32, "(its map is of shape (1, 288, 1, 1), its pooled one (1, 1024))"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_sentence(name: str, size: int, expected: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    with pytest.raises(ConfigError) as caught:
        build_pretrained(name, size)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_timm_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what 'import timm' then finds is an ImportError
    with pytest.raises(ConfigError, match=r"timm/resnet18 needs the package timm.*spice-ray\[timm\]"):
        build_pretrained("timm/resnet18", SIZE)


def given_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return with_statistics(tiny_densenet(num_classes=7)).state_dict()


def wrapped(state: dict[str, Tensor], prefix: str, **others: Any) -> dict[str, Any]:
    return {**{f"{prefix}{key}": value for key, value in state.items()}, **others}


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "_orig_mod.module.", "trunk."])
def test_weights_are_found_below_prefixes_and_a_classifier_is_left_out(prefix: str) -> None:
    state, encoder = given_state(), densenet_encoder()
    beside = {"module.head.mlp.weight": torch.zeros(2)} if "backbone" in prefix else {}
    load_given(encoder, "densenet", {**wrapped(state, prefix), **beside}, "a.pth")
    net = tiny_densenet(num_classes=7)
    net.load_state_dict(state)
    expected = classifier_input(net.eval(), images())
    torch.testing.assert_close(encoder.eval()(images())[1], expected, rtol=1e-5, atol=1e-5)


def test_weights_of_a_shipped_encoder_fit_with_and_without_its_prefix() -> None:
    given, encoder = build_encoder("convnet", 1), build_encoder("convnet", 2)
    for state in (given.state_dict(), given.trunk.state_dict()):
        load_given(encoder, "convnet", state, "a.pth")
        assert torch.equal(encoder.trunk[0].weight, given.trunk[0].weight)
        encoder = build_encoder("convnet", 2)


def test_half_precision_is_widened_and_counts_that_nothing_reads_may_be_missing() -> None:
    state, encoder = given_state(), densenet_encoder()
    half = {key: value.half() for key, value in state.items() if not key.endswith("num_batches_tracked")}
    load_given(encoder, "densenet", half, "a.pth")
    assert encoder.trunk.features.conv0.weight.dtype == torch.float32
    torch.testing.assert_close(
        encoder.trunk.features.conv0.weight, state["features.conv0.weight"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"features.conv0.weight": None}, "which has 65: 1 missing (features.conv0.weight); give"),
        ({"features.conv9.weight": torch.zeros(1)}, "1 unexpected (features.conv9.weight)"),
        ({"features.conv0.weight": torch.zeros(8, 3, 3, 3)}, "1 of another shape (features.conv0.weight)"),
        (dict.fromkeys(f"features.norm0.{name}" for name in ("bias", "weight", "running_mean", "running_var")),
         "4 missing (features.norm0.bias, features.norm0.running_mean, features.norm0.running_var, ...)"),
        ({"features.conv0.weight": torch.full((8, 3, 7, 7), torch.nan)}, "hold values that are not finite"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_one_sentence_and_change_nothing(
    change: dict[str, Tensor | None], expected: str
) -> None:
    encoder = densenet_encoder()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    state = {key: value for key, value in {**given_state(), **change}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        load_given(encoder, "densenet", state, "a.pth")
    assert expected in str(caught.value)
    assert "a.pth" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", ["torchvision/vit_like", "timm/vit_small_patch14_dinov2"])
def test_weights_of_another_architecture_are_refused_by_their_names(name: str) -> None:
    encoder = timm_encoder(name[5:]) if name.startswith("timm/") else TorchvisionEncoder(tiny_vit(), SIZE)
    with pytest.raises(ConfigError, match=r"a\.pth are not those of .*: \d+ missing \(.*, 67 unexpected \("):
        load_given(encoder, name, wrapped(given_state(), "net."), "a.pth")


@pytest.mark.parametrize("with_classifier", [True, False])
@pytest.mark.parametrize("name", TIMM)
def test_timm_takes_weights_of_the_very_model_as_they_are(name: str, with_classifier: bool) -> None:
    encoder = timm_encoder(name)
    torch.manual_seed(1)
    sizes = {**TIMM[name], "num_classes": 5 if with_classifier else 0}
    state = sys.modules["timm"].create_model(name, **sizes).state_dict()
    load_given(encoder, name, dict(state), "a.pth")
    assert all(torch.equal(value, state[key]) for key, value in encoder.trunk.state_dict().items())


@torch.no_grad()
def test_a_torchvision_vit_takes_weights_of_another_image_size() -> None:
    torch.manual_seed(0)
    state = tiny_vit(64).state_dict()  # 8 x 8 patches
    state["encoder.pos_embedding"][0, 1:] = torch.arange(64.0)[:, None]
    encoder = TorchvisionEncoder(tiny_vit(SIZE), SIZE)  # 4 x 4
    load_given(encoder, "vit", state, "a.pth")
    found = encoder.trunk.encoder.pos_embedding[0]
    assert torch.equal(found[0], state["encoder.pos_embedding"][0, 0])
    # Corners stay where they are.
    assert found[[1, 4, 13, 16], 0].tolist() == pytest.approx([0, 7, 56, 63], abs=1e-4)


@torch.no_grad()
def test_timm_takes_dinov2s_own_file_of_another_image_size() -> None:
    timm = pytest.importorskip("timm")
    name, sizes = "vit_small_patch14_dinov2", {"embed_dim": 24, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    large = with_statistics(timm.create_model(name, num_classes=0, img_size=70, **sizes))  # 5 x 5 patches
    published = {**large.state_dict(), "mask_token": torch.zeros(1, 24)}
    encoder = TimmEncoder(timm.create_model(name, num_classes=0, img_size=28, **sizes), 28)
    load_given(encoder, name, published, "dinov2.pth")
    large.set_input_size(28)
    torch.testing.assert_close(encoder.eval()(images(2, 28))[1], large.eval()(images(2, 28)), rtol=1e-4, atol=1e-5)
