"""Models on disk: safetensors beside the names needed to build them again."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spice_ray.core.encoders import Encoder, build_encoder
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.errors import StorageError
from spice_ray.storage import Artifact


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


def load_encoder(artifact: Artifact) -> Encoder:
    """The encoder of stage 1."""
    encoder = build_encoder(artifact.manifest["arch"], 0)
    encoder.load_state_dict(load_weights(artifact.file("encoder.safetensors")))
    return encoder


def load_head(artifact: Artifact) -> ClusterHead:
    """The chosen head of stage 2."""
    manifest = artifact.manifest
    head = ClusterHead(manifest["embed_dim"], manifest["num_clusters"], 0)
    head.load_state_dict(load_weights(artifact.file(f"head-{manifest['chosen']:03d}.safetensors")))
    return head


def load_joint(artifact: Artifact) -> JointModel:
    """The classifier of stage 3."""
    manifest = artifact.manifest
    encoder = build_encoder(manifest["arch"], 0)
    model = JointModel(encoder, ClusterHead(encoder.embed_dim, manifest["num_clusters"], 0))
    model.load_state_dict(load_weights(artifact.file("joint.safetensors")))
    return model
