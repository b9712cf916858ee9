"""Models on disk: safetensors beside the names needed to build them again."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spice_ray.core.encoders import Encoder, build_encoder
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.core.pretrained import build_pretrained
from spice_ray.errors import ConfigError, StorageError
from spice_ray.storage import Artifact

_NESTED = ("state_dict", "model", "teacher", "student")
"""Where checkpoints keep weights: Lightning, MoCo and timm; DeiT and MAE; DINO, whose teacher is the better one."""


def save_weights(module: nn.Module, file: Path) -> None:
    """Write weights and buffers of a bare module."""
    save_file({name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}, file)


def load_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read a file that :func:`save_weights` wrote.

    Raises:
        StorageError: It is damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError):
        raise StorageError(f"{file} is damaged; delete the folder {file.parent} and run again") from None


def read_given(file: Path) -> dict[str, torch.Tensor]:
    """Read weights that a user gives: safetensors, or a torch file that holds nothing but tensors and plain values.

    Raises:
        ConfigError: It is neither.
    """
    try:
        with file.open("rb") as opened:
            is_safetensors = opened.read(9)[8:] == b"{"
        held = load_file(file) if is_safetensors else torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch's reader raises whatever the bytes make it stumble over
        raise ConfigError(
            f"{file} cannot be read as weights; give a safetensors file, or one that torch.save made of a state_dict"
        ) from None
    found = {key: value for key, value in _innermost(held).items() if isinstance(value, torch.Tensor)}
    if not found:
        raise ConfigError(
            f"{file} holds no weights; give a safetensors file, or one that torch.save made of a state_dict"
        )
    return found


def _innermost(held: Any) -> dict[str, Any]:
    """The state dict of a checkpoint: training scripts put it beside optimisers, teachers beside their students."""
    while isinstance(held, dict):
        inner = next((held[name] for name in _NESTED if isinstance(held.get(name), dict)), None)
        if inner is None:
            return held
        held = inner
    return {}


def build(arch: str, image_size: int) -> Encoder:
    """The encoder called ``arch``, of this package or of a library, for weights that are loaded into it.

    Raises:
        ConfigError: It is a library's, and not there or not for such images.
    """
    return build_pretrained(arch, image_size) if "/" in arch else build_encoder(arch, 0)


def load_encoder(artifact: Artifact) -> Encoder:
    """The encoder of stage 1, or the one given in its place."""
    encoder = build(artifact.manifest["arch"], artifact.manifest["image"]["size"])
    encoder.load_state_dict(load_weights(artifact.file("encoder.safetensors")))
    return encoder


def load_head(artifact: Artifact, number: int | None = None) -> ClusterHead:
    """A head of stage 2; the chosen one, if no other is asked for."""
    manifest = artifact.manifest
    head = ClusterHead(manifest["embed_dim"], manifest["num_clusters"], 0)
    chosen = manifest["chosen"] if number is None else number
    head.load_state_dict(load_weights(artifact.file(f"head-{chosen:03d}.safetensors")))
    return head


def load_joint(artifact: Artifact) -> JointModel:
    """The classifier of stage 3."""
    manifest = artifact.manifest
    encoder = build(manifest["arch"], manifest["image_size"])
    model = JointModel(encoder, ClusterHead(encoder.embed_dim, manifest["num_clusters"], 0))
    model.load_state_dict(load_weights(artifact.file("joint.safetensors")))
    return model
