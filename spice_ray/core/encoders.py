"""Encoders: images in, (feature map, pooled feature) out.

A lane is a batch-norm group: rows come interleaved (row i * L + l belongs to lane l of L), and each lane is normalised
by its own statistics. So the result does not depend on how lanes are spread over workers, and a key cannot recognise
its query by shared batch statistics (MoCo, section 3.3 "Shuffling BN"). Inside an encoder the lanes stand one after
another, where each is one piece of memory in any memory format.
"""

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_ray.core.order import seeded


class OfLanes:
    """What :func:`set_lanes` tells: L, and which of how many parts of a batch the rows are."""

    lanes: int = 1
    part: int = 0
    parts: int = 1


def set_lanes(model: nn.Module, lanes: int, part: int = 0, parts: int = 1) -> None:
    """Tell all of ``model`` how many lanes its rows come from, and which part of a batch they are."""
    for module in model.modules():
        if isinstance(module, OfLanes):
            module.lanes, module.part, module.parts = lanes, part, parts


class LaneBatchNorm2d(OfLanes, nn.BatchNorm2d):
    """Batch norm with one set of batch statistics per lane and one set of running statistics, their mean over lanes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of each lane, (L * b, C, H, W), lane after lane."""
        if not self.training or self.lanes == self.parts == 1:
            return super().forward(x)
        assert self.num_batches_tracked is not None
        # As plain batch norm does: an encoder's file must not show how many lanes each worker served, or in how many
        # parts.
        if self.part == self.parts - 1:
            self.num_batches_tracked.add_(1)
        # What a compiler fuses into few passes over the rows, and would be many of them without it.
        return self.all_at_once(x) if torch.compiler.is_compiling() else self.one_by_one(x)

    def one_by_one(self, x: Tensor) -> Tensor:
        """The library's batch norm for each lane."""
        assert self.running_mean is not None
        assert self.running_var is not None
        means, variances = self.running_mean.repeat(self.lanes, 1), self.running_var.repeat(self.lanes, 1)
        share = self._share()
        normalised = [
            F.batch_norm(rows, mean, variance, self.weight, self.bias, training=True, momentum=share, eps=self.eps)
            for rows, mean, variance in zip(x.chunk(self.lanes), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        return torch.cat(normalised)

    def all_at_once(self, x: Tensor) -> Tensor:
        """The same for all lanes, in float32."""
        assert self.running_mean is not None
        assert self.running_var is not None
        rows = x.unflatten(0, (self.lanes, -1)).float()
        variances, means = torch.var_mean(rows, dim=(1, 3, 4), correction=0, keepdim=True)
        share, count = self._share(), rows[0, :, 0].numel()
        self.running_mean.lerp_(means.detach().mean(dim=0).flatten(), share)
        self.running_var.lerp_(variances.detach().mean(dim=0).flatten() * (count / (count - 1)), share)
        scale = self.weight[:, None, None] * (variances + self.eps).rsqrt()
        normalised: Tensor = (rows - means) * scale + self.bias[:, None, None]
        return normalised.to(x.dtype).flatten(0, 1)

    def _share(self) -> float:
        """Of this part's statistics in the running ones: after all parts each has momentum / parts."""
        momentum = cast(float, self.momentum)
        return momentum / (self.parts - (self.parts - 1 - self.part) * momentum)


def lane_after_lane(rows: Tensor, lanes: int) -> Tensor:
    """Interleaved rows, (b * L, ...), as those of lane 0, then those of lane 1, ..."""
    return rows if lanes == 1 else rows.unflatten(0, (-1, lanes)).transpose(0, 1).flatten(0, 1)


def interleaved(rows: Tensor, lanes: int) -> Tensor:
    """The inverse of :func:`lane_after_lane`."""
    return rows if lanes == 1 else rows.unflatten(0, (lanes, -1)).transpose(0, 1).flatten(0, 1)


class Encoder(OfLanes, nn.Module):
    """A convolutional trunk with global average pooling."""

    def __init__(self, trunk: nn.Module, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.embed_dim = embed_dim

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised images.

        Args:
            images: float, (B, 3, S, S), interleaved over lanes.

        Returns:
            The feature map, (B, D, s, s), and the pooled feature, (B, D).
        """
        lanes = self.lanes if self.training else 1
        feature_map, pooled = self.encode(lane_after_lane(images, lanes))
        return interleaved(feature_map, lanes), interleaved(pooled, lanes)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``, of rows lane after lane."""
        feature_map = self.trunk(images)
        return feature_map, feature_map.mean(dim=(2, 3))


def compile_encoders(model: nn.Module) -> None:
    """Let torch compile the encoders in ``model`` when they first compute, for as long as they are not copied."""
    from torch._dynamo import config as dynamo_config  # seconds of import

    # One for each part of a batch, with and without gradient.
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _COMPILED_AT_MOST)
    dynamo_config.optimize_ddp = False  # it would cut encoders to pieces for the sake of earlier messages
    for module in model.modules():
        if isinstance(module, Encoder):
            module.compile(dynamic=False)


def convnet() -> Encoder:
    """Three 3x3 convolutions of stride 2: small enough to train on a CPU, for images of 16 to 32 pixels."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), LaneBatchNorm2d(outputs), nn.ReLU()]
    return Encoder(nn.Sequential(*layers), 128)


def resnet(name: str, stem: Literal["small", "pooled", "imagenet"]) -> Encoder:
    """The torchvision ResNet called ``name``, without its classifier.

    Args:
        name: ``resnet18`` or ``resnet34``.
        stem: small: one 3x3 convolution of stride 1, for 32 pixels; pooled: the same and a max-pool of stride 2, for 64
            and 96 pixels, SPICE's for STL-10; imagenet: torchvision's own, 7x7 of stride 2 and a max-pool, for 224
            pixels. At 96 pixels ResNet-34 costs 10.4, 3.0 and 0.7 billion multiplications with them.
    """
    from torchvision.models import get_model  # 2 s of import that the workers of other encoders need not wait for

    net = get_model(name, weights=None, norm_layer=LaneBatchNorm2d)
    layers = [net.conv1, net.bn1, net.relu, net.maxpool]
    if stem != "imagenet":
        layers = [nn.Conv2d(3, 64, 3, padding=1, bias=False), LaneBatchNorm2d(64), nn.ReLU()]
    if stem == "pooled":
        layers.append(nn.MaxPool2d(2, padding=1))
    return Encoder(nn.Sequential(*layers, net.layer1, net.layer2, net.layer3, net.layer4), 512)


class WideBlock(nn.Module):
    """A pre-activation residual block (Zagoruyko and Komodakis, 2016) with FixMatch's leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = LaneBatchNorm2d(inputs), LaneBatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        activated = F.leaky_relu(self.bn1(x), 0.1)
        out: Tensor = self.conv2(F.leaky_relu(self.bn2(self.conv1(activated)), 0.1))
        return out + (x if self.shortcut is None else self.shortcut(activated))


def wide_resnet(widen: int, strides: tuple[int, ...]) -> Encoder:
    """FixMatch's backbone: for each of ``strides`` four blocks, each group ``widen`` times 16, 32, 64, ... wide.

    Three groups make WRN-28-widen, four WRN-37-widen.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    inputs = 16
    for group, stride in enumerate(strides):
        outputs = 16 * widen * 2**group
        for block in range(_BLOCKS_PER_GROUP):
            layers.append(WideBlock(inputs, outputs, stride if block == 0 else 1))
            inputs = outputs
    trunk = nn.Sequential(*layers, LaneBatchNorm2d(inputs), nn.LeakyReLU(0.1))
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):  # as in FixMatch and SPICE's stage 3; torch's own are .4 times as large
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return Encoder(trunk, inputs)


_BLOCKS_PER_GROUP = 4
_COMPILED_AT_MOST = 64
_BUILDERS: dict[str, Callable[[], Encoder]] = {
    "convnet": convnet,
    "resnet18_small": lambda: resnet("resnet18", "small"),
    "resnet34_small": lambda: resnet("resnet34", "small"),
    "resnet18_pooled": lambda: resnet("resnet18", "pooled"),
    "resnet34_pooled": lambda: resnet("resnet34", "pooled"),
    "resnet18": lambda: resnet("resnet18", "imagenet"),
    "resnet34": lambda: resnet("resnet34", "imagenet"),
    "wrn28_2": lambda: wide_resnet(2, (1, 2, 2)),
    "wrn28_8": lambda: wide_resnet(8, (1, 2, 2)),
    # For 96 pixels, which the stride of its first group halves.
    "wrn37_2": lambda: wide_resnet(2, (2, 2, 2, 2)),
}


def build_encoder(name: str, key: int) -> Encoder:
    """The encoder called ``name``, its weights drawn from ``key`` alone (the process's generator is left as it was)."""
    with seeded(key):
        # Convolutions are faster so, on the CPU as on tensor cores.
        return _BUILDERS[name]().to(memory_format=torch.channels_last)
