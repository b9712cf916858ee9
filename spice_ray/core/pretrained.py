"""Models of torchvision and timm as encoders, for weights that are given: without classifier and without dropout.

Names are ``torchvision/NAME`` and ``timm/NAME``. Both libraries say themselves where their features are: timm by
``forward_features`` and ``forward_head``, torchvision by the nodes of its ``create_feature_extractor``. The pooled
feature is what the library's classifier would be given: a class token, or a mean over the map, normalised or not.

S is the side of the images, s that of the feature map, D the embedding width.
"""

import difflib
import math
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from spice_ray.core.encoders import Encoder, LaneBatchNorm2d
from spice_ray.core.order import seeded
from spice_ray.errors import ConfigError

State = dict[str, Tensor]

# Of each torchvision class: the nodes of its feature map and of what its classifier is given.
_NODES = {
    "ResNet": {"layer4": "map", "flatten": "pooled"},
    "RegNet": {"trunk_output": "map", "flatten": "pooled"},
    "DenseNet": {"relu": "map", "flatten": "pooled"},
    "EfficientNet": {"features": "map", "flatten": "pooled"},
    "ConvNeXt": {"features": "map", "classifier.1": "pooled"},
    "SwinTransformer": {"permute": "map", "flatten": "pooled"},
    "VisionTransformer": {"encoder": "tokens"},
}
_REFUSALS = (RuntimeError, AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a library raises where a model cannot be had at a size, or weights cannot be brought into its form."""


class PretrainedEncoder(Encoder):
    """A library's model without its classifier; ``trunk`` keeps the library's own names of weights."""

    classifier: tuple[str, ...] = ()
    """What the names of the classifier's weights begin with."""

    def __init__(self, trunk: nn.Module, image_size: int) -> None:
        """Take a model and measure its embedding width with one black image.

        Raises:
            ValueError: Its pooled feature is not as wide as its map.
        """
        super().__init__(trunk, 0)
        use_lanes(trunk)
        _switch_off_dropout(trunk)
        self.eval()
        with torch.no_grad():
            feature_map, pooled = self(torch.zeros(1, 3, image_size, image_size))
        self.train()
        if feature_map.ndim != 4 or feature_map.shape[:2] != pooled.shape:
            raise ValueError(f"its map is of shape {tuple(feature_map.shape)}, its pooled one {tuple(pooled.shape)}")
        self.embed_dim = pooled.shape[1]

    def adapt(self, state: State) -> State:
        """Weights in the form in which this model takes them: renamed, position embeddings resampled to its grid."""
        return state


class TimmEncoder(PretrainedEncoder):
    """A model of timm, made with ``num_classes=0``."""

    def __init__(self, net: Any, image_size: int) -> None:
        names = net.pretrained_cfg.get("classifier") or ()
        self.classifier = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
        super().__init__(net, image_size)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Encoder.encode`."""
        net: Any = self.trunk
        features = net.forward_features(images)
        pooled = net.forward_head(features, pre_logits=True)
        if features.ndim == 3:
            return _on_grid(features[:, getattr(net, "num_prefix_tokens", 0) :]), pooled
        channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        return features.permute(0, 3, 1, 2) if channels_last else features, pooled

    def adapt(self, state: State) -> State:
        """By the filter of timm's own module, which knows the forms that weights are published in, such as DINOv2's."""
        filter_ = getattr(sys.modules[type(self.trunk).__module__], "checkpoint_filter_fn", None)
        return state if filter_ is None else dict(filter_(state, self.trunk))


class TorchvisionEncoder(PretrainedEncoder):
    """A classification model of torchvision, one of ``_NODES``."""

    def __init__(self, net: Any, image_size: int) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor

        nodes = _NODES.get(type(net).__name__)
        if nodes is None:
            raise ValueError(f"of torchvision's models those of {', '.join(_NODES)} can be used")
        trunk = create_feature_extractor(net, nodes)
        left_out = net.state_dict().keys() - trunk.state_dict().keys()
        self.classifier = tuple({key.rpartition(".")[0] + "." for key in left_out})
        self._sizes = (net.image_size, net.patch_size) if "encoder" in nodes else None
        super().__init__(trunk, image_size)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Encoder.encode`."""
        found = self.trunk(images)
        if self._sizes is None:
            return found["map"], found["pooled"]
        return _on_grid(found["tokens"][:, 1:]), found["tokens"][:, 0]

    def adapt(self, state: State) -> State:
        """Position embeddings of a ViT are resampled."""
        if self._sizes is None:
            return state
        from torchvision.models.vision_transformer import interpolate_embeddings

        image_size, patch_size = self._sizes
        return dict(interpolate_embeddings(image_size, patch_size, dict(state)))


def build_pretrained(name: str, image_size: int) -> PretrainedEncoder:
    """The model called ``name`` for images of S = ``image_size`` pixels, its weights yet to be given.

    Raises:
        ConfigError: There is no such model, timm is not installed, or the model is not for such images.
    """
    library, _, model = name.partition("/")
    try:
        with seeded(0):
            return (_torchvision if library == "torchvision" else _timm)(model, image_size)
    except _REFUSALS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name} cannot be used on images of {image_size} pixels ({reason}); set image.size to one that it was "
            "made for, or choose another model"
        ) from error


def load_given(encoder: Encoder, name: str, state: State, source: str) -> None:
    """Put given weights into an encoder; those of a classifier are left out.

    Args:
        encoder: Of this package or a :class:`PretrainedEncoder`; its weights are overwritten, as float32.
        name: Of the encoder, for people.
        state: Weights by name, also below a prefix such as ``module.`` or ``backbone.``.
        source: Where they are from, for people.

    Raises:
        ConfigError: Weights are missing, unexpected, of another shape or not finite; the encoder is as it was.
    """
    wanted = encoder.trunk.state_dict()
    given = _unwrapped(state, wanted)
    if isinstance(encoder, PretrainedEncoder):
        with suppress(*_REFUSALS):  # of weights of another model: the sentence below names what is wrong with them
            given = encoder.adapt(dict(given))
        given = {key: value for key, value in given.items() if not key.startswith(encoder.classifier)}
    if wrong := _misfits(given, wanted):
        raise ConfigError(
            f"the weights in {source} are not those of {name}, which has {len(wanted)}: {wrong}; give the file of that "
            "model, or name the model that the file is of as pretrain.encoder"
        )
    if not all(value.isfinite().all() for value in given.values()):
        raise ConfigError(f"the weights in {source} hold values that are not finite; give another file")
    encoder.trunk.load_state_dict(given, strict=False)


def use_lanes(model: nn.Module) -> None:
    """Replace every plain batch norm by one that keeps lanes apart, with the same weights and statistics."""
    for name, norm in list(model.named_modules()):
        if type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None:
            lanes = LaneBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
            lanes.load_state_dict(norm.state_dict())
            model.set_submodule(name, lanes)


def count_other_norms(model: nn.Module) -> int:
    """How many batch norms there are that do not keep lanes apart."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return sum(isinstance(m, kinds) and not isinstance(m, LaneBatchNorm2d) for m in model.modules())


def _torchvision(model: str, image_size: int) -> TorchvisionEncoder:
    from torchvision import models

    _check_known("torchvision", model, models.list_models(module=models))
    sized = {"image_size": image_size} if model.startswith("vit_") else {}
    return TorchvisionEncoder(models.get_model(model, weights=None, **sized), image_size)


def _timm(model: str, image_size: int) -> TimmEncoder:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"timm/{model} needs the package timm, which cannot be imported ({error}); install the extra "
            "spice-ray[timm], or timm itself"
        ) from None
    _check_known("timm", model, [*timm.list_models(), *timm.list_models(include_tags=True)])
    sized: dict[str, Any] = (
        {"img_size": image_size} if getattr(timm.get_pretrained_cfg(model), "fixed_input_size", False) else {}
    )
    return TimmEncoder(timm.create_model(model, pretrained=False, num_classes=0, **sized), image_size)


def _check_known(library: str, model: str, known: list[str]) -> None:
    if model not in known:
        tagged = [name for name in known if name.startswith(model.partition(".")[0] + ".")]
        close = difflib.get_close_matches(model, tagged or known, n=1, cutoff=0)
        raise ConfigError(f"{library} has no model {model!r}; did you mean {close[0]!r}?")


def _on_grid(tokens: Tensor) -> Tensor:
    """Patch tokens, (B, s * s, D), row by row, as a map, (B, D, s, s)."""
    side = math.isqrt(tokens.shape[1])
    grid: Tensor = tokens.transpose(1, 2).unflatten(2, (side, side))
    return grid


def _switch_off_dropout(model: nn.Module) -> None:
    """Stage 3 has no other randomness than counted views."""
    for module in model.modules():
        match type(module).__name__:
            case "Dropout" | "Dropout2d" | "StochasticDepth":
                module.p = 0.0  # type: ignore[assignment]
            case "DropPath":
                module.drop_prob = 0.0  # type: ignore[assignment]


def _unwrapped(state: State, wanted: State) -> State:
    """Weights without the prefixes that training scripts put before a model's own names."""
    # module: DataParallel; _orig_mod: torch.compile; backbone: DINO and its kin; trunk: this package.
    wrappers = [p for p in ("module.", "_orig_mod.", "backbone.", "trunk.") if not _any_begins(wanted, p)]
    while found := [prefix for prefix in wrappers if _any_begins(state, prefix)]:
        # What lies beside a backbone is the head of its training.
        state = {key.removeprefix(found[0]): value for key, value in state.items() if key.startswith(found[0])}
    return state


def _misfits(given: State, wanted: State) -> str:
    """What stands between given weights and those of a model, in words; empty where nothing does."""
    # A count that older files lack and nothing reads.
    missing = {key for key in wanted.keys() - given.keys() if not key.endswith("num_batches_tracked")}
    shapes = {key for key in wanted.keys() & given.keys() if wanted[key].shape != given[key].shape}
    wrong = {"missing": missing, "unexpected": given.keys() - wanted.keys(), "of another shape": shapes}
    return ", ".join(f"{len(keys)} {what} ({_first(keys)})" for what, keys in wrong.items() if keys)


def _any_begins(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _first(keys: Iterable[str]) -> str:
    some = sorted(keys)
    return ", ".join(some[:3]) + (", ..." if len(some) > 3 else "")
