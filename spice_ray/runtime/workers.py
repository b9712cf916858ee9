"""What a training worker of stage 1 or 3 does, whoever hosts it: Ray Train, or a trial of a sweep."""

import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from spice_ray.config import Scale
from spice_ray.contracts import ENCODER, JOINT, Progress, Wrap
from spice_ray.core import collectives
from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import build_encoder
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.core.lanes import Lanes, Stream, serve, shuffle_window
from spice_ray.core.order import stream_key, with_replacement
from spice_ray.errors import ResourceError
from spice_ray.runtime.data import Shards, open_lanes
from spice_ray.runtime.memory import Budget
from spice_ray.runtime.reliable import read_reliable
from spice_ray.runtime.weights import load_encoder, load_head, load_joint, save_weights
from spice_ray.settings import Image, Joint, Pretrain
from spice_ray.stages.pretrain import pretrain
from spice_ray.stages.train_joint import TrainedJoint, train_joint
from spice_ray.storage import Artifact, publish


@dataclass(frozen=True)
class PretrainJob:
    """What a worker of stage 1 is given."""

    kind: ClassVar[str] = ENCODER
    settings: Pretrain
    image: Image
    shards: Shards
    seed: int
    root: Path
    fingerprint: str


@dataclass(frozen=True)
class JointJob:
    """What a worker of stage 3 is given."""

    kind: ClassVar[str] = JOINT
    settings: Joint
    image: Image
    shards: Shards
    seed: int
    num_clusters: int
    arch: str
    """The encoder that is trained."""
    encoder: Artifact | None
    heads: Artifact | None
    """None, both, where labels are given and nothing of stages 1 and 2 is needed."""
    before: Artifact | None
    """The classifier of the round before; none: this is the first."""
    reliable: Artifact
    root: Path
    fingerprint: str


@dataclass(frozen=True)
class Host:
    """Who runs a worker: what stands between the loop and Ray."""

    device: torch.device
    wrap: Wrap
    progress: Progress
    memory: Budget
    """What the worker may hold of them."""
    accumulate: int = 1
    """Parts that it computes a batch in."""
    compiled: bool = False
    """Whether torch compiles the encoders, and a GPU records what it does."""


def may_compile(scale: Scale) -> bool:
    """Whether encoders are compiled.

    Raises:
        ResourceError: They should be, and this node has no compiler.
    """
    if not scale.compile:
        return False
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [
        what
        for what, is_there in {
            "a C compiler": _has_program(os.environ.get("CC"), "gcc", "clang"),
            "a C++ compiler": _has_program(os.environ.get("CXX"), "g++", "clang++"),
            f"Python's headers ({headers})": headers.exists(),
        }.items()
        if not is_there
    ]
    if missing:
        raise ResourceError(
            f"scale.compile=true needs {' and '.join(missing)} on every node and {platform.node()} has none; install "
            "gcc, g++ and python3-dev there, or leave scale.compile out"
        )
    return True


def _has_program(*names: str | None) -> bool:
    return any(name is not None and shutil.which(name) is not None for name in names)


def augmentation_of(image: Image) -> Augmentation:
    """The views that a recipe allows."""
    return Augmentation(image.views, image.mean, image.std)


@contextmanager
def fed(shards: Shards, num_lanes: int, host: Host, *streams: Stream) -> Iterator[list[Lanes]]:
    """The streams over the lanes that this worker serves: L = G / W consecutive ones."""
    share = num_lanes // collectives.world_size()
    first = collectives.rank() * share
    lanes = serve(shards.files, list(range(first, first + share)), num_lanes)
    with open_lanes(shards, lanes, list(streams), host.device, host.memory) as found:
        yield found


def run_pretrain(job: PretrainJob, host: Host) -> None:
    """Stage 1 on one worker; the first worker publishes the encoder."""
    settings = job.settings
    rows, window = settings.batch_size // settings.lanes, shuffle_window(job.shards.image_size)
    images = Stream(stream_key(job.seed, "pretrain"), rows, window)
    with fed(job.shards, settings.lanes, host, images) as (lanes,):
        encoder = pretrain(
            settings,
            lanes,
            replace(augmentation_of(job.image), min_crop=settings.min_crop, blur=settings.blur),
            num_images=job.shards.num_counted,
            seed=job.seed,
            device=host.device,
            wrap=host.wrap,
            progress=host.progress,
            accumulate=host.accumulate,
            compiled=host.compiled,
        )

    def write(folder: Path) -> dict[str, Any]:
        save_weights(encoder, folder / "encoder.safetensors")
        return {
            "arch": settings.encoder,
            "embed_dim": encoder.embed_dim,
            "image": job.image.model_dump(mode="json"),
        }

    if collectives.rank() == 0:
        publish(job.root, ENCODER, job.fingerprint, write)


def run_joint(job: JointJob, host: Host) -> None:
    """Stage 3 on one worker; the first worker publishes the classifier."""
    settings = job.settings
    table = read_reliable(job.reliable)
    rows, window = settings.labelled_batch // settings.lanes, shuffle_window(job.shards.image_size)
    known = Stream(stream_key(job.seed, "labelled"), rows, window, with_replacement, table.weights > 0)
    everything = Stream(stream_key(job.seed, "unlabelled"), rows * settings.unlabelled_ratio, window)
    with fed(job.shards, settings.lanes, host, known, everything) as (labelled, unlabelled):
        trained = train_joint(
            settings,
            initial_joint(job),
            labelled,
            unlabelled,
            augmentation_of(job.image),
            labels=table.labels,
            weights=table.weights,
            seed=job.seed,
            device=host.device,
            wrap=host.wrap,
            progress=host.progress,
            accumulate=host.accumulate,
            compiled=host.compiled,
        )
    if collectives.rank() == 0:
        publish_joint(job, trained, skipped=None)


def initial_joint(job: JointJob) -> JointModel:
    """Where stage 3 starts: the round before, the result of stages 1 and 2, or random weights."""
    if job.before is not None:
        return load_joint(job.before)
    if job.settings.init == "stage2":
        model = stages_before(job)
        columns = job.reliable.manifest.get("columns")
        if columns is not None:
            model.head.reorder(torch.tensor(columns))
        return model
    encoder = build_encoder(job.arch, stream_key(job.seed, "joint", "encoder"))
    return JointModel(encoder, ClusterHead(encoder.embed_dim, job.num_clusters, stream_key(job.seed, "joint", "head")))


def stages_before(job: JointJob) -> JointModel:
    """The result of stages 1 and 2 (SPICE_s)."""
    assert job.encoder is not None
    assert job.heads is not None
    return JointModel(load_encoder(job.encoder), load_head(job.heads))


def publish_skipped(job: JointJob, reason: str) -> None:
    """Publish the result of stages 1 and 2 where stage 3 cannot be trained."""
    publish_joint(job, TrainedJoint(stages_before(job), steps=0), skipped=reason)


def publish_joint(job: JointJob, trained: TrainedJoint, skipped: str | None) -> Artifact:
    """Publish a classifier; ``skipped`` says why stage 3 was not trained, None that it was."""

    def write(folder: Path) -> dict[str, Any]:
        save_weights(trained.model, folder / "joint.safetensors")
        return {
            "arch": job.arch if job.encoder is None or skipped is None else job.encoder.manifest["arch"],
            "image_size": job.image.size,
            "num_clusters": job.num_clusters,
            "steps": trained.steps,
            "skipped": skipped,
        }

    return publish(job.root, JOINT, job.fingerprint, write)
