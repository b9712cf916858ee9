"""Stages 1 and 3 under Ray Train: one ``fit`` per stage, its workers fed by Ray Data, resumed from its checkpoints."""

import math
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from spice_ray.config import Image, Joint, Pretrain, Scale
from spice_ray.contracts import ENCODER, JOINT, Progress, Wrap
from spice_ray.core import collectives
from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import build_encoder
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.core.lanes import DrawnLanes, LaneImages, ShuffledLanes
from spice_ray.core.order import stream_key
from spice_ray.errors import SpiceError, StorageError, TrainingError
from spice_ray.runtime.data import Shards, load_lanes
from spice_ray.runtime.progress import ProgressWriter
from spice_ray.runtime.reliable import read_reliable
from spice_ray.runtime.weights import load_encoder, load_head, save_weights
from spice_ray.stages.pretrain import pretrain
from spice_ray.stages.train_joint import train_joint
from spice_ray.storage import Artifact, publish

_STEPS_BETWEEN_LOOKS = 10
"""How often workers agree whether a checkpoint is due."""


@dataclass(frozen=True)
class PretrainJob:
    """What a worker of stage 1 is given."""

    settings: Pretrain
    image: Image
    shards: Shards
    seed: int
    root: Path
    fingerprint: str


@dataclass(frozen=True)
class JointJob:
    """What a worker of stage 3 is given."""

    settings: Joint
    image: Image
    shards: Shards
    seed: int
    num_clusters: int
    encoder: Artifact
    heads: Artifact
    reliable: Artifact
    root: Path
    fingerprint: str


@dataclass(frozen=True)
class Host:
    """Who runs a worker: what stands between the loop and Ray."""

    device: torch.device
    wrap: Wrap
    progress: Progress


def augmentation_of(image: Image) -> Augmentation:
    """The views that a recipe allows."""
    return Augmentation(image.views, image.mean, image.std)


def worker_lanes(shards: Shards, num_lanes: int, device: torch.device) -> LaneImages:
    """The images of the lanes that this worker serves: L = G / W consecutive ones."""
    share = num_lanes // collectives.world_size()
    first = collectives.rank() * share
    return load_lanes(shards, list(range(first, first + share)), num_lanes, device)


def run_pretrain(job: PretrainJob, host: Host) -> None:
    """Stage 1 on one worker; the first worker publishes the encoder."""
    settings = job.settings
    images = worker_lanes(job.shards, settings.lanes, host.device)
    lanes = ShuffledLanes(
        images, rows_per_lane=settings.batch_size // settings.lanes, key=stream_key(job.seed, "pretrain")
    )
    encoder = pretrain(
        settings,
        lanes,
        augmentation_of(job.image),
        num_images=job.shards.num_counted,
        seed=job.seed,
        device=host.device,
        wrap=host.wrap,
        progress=host.progress,
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
    images = worker_lanes(job.shards, settings.lanes, host.device)
    table = read_reliable(job.reliable)
    per_lane = settings.labelled_batch // settings.lanes
    model = train_joint(
        settings,
        initial_joint(job),
        DrawnLanes(images, table.weights > 0, rows_per_lane=per_lane, key=stream_key(job.seed, "labelled")),
        ShuffledLanes(
            images, rows_per_lane=per_lane * settings.unlabelled_ratio, key=stream_key(job.seed, "unlabelled")
        ),
        augmentation_of(job.image),
        labels=table.labels,
        weights=table.weights,
        seed=job.seed,
        device=host.device,
        wrap=host.wrap,
        progress=host.progress,
    )
    if collectives.rank() == 0:
        publish_joint(job, model, skipped=None)


def initial_joint(job: JointJob) -> JointModel:
    """Where stage 3 starts: the result of stages 1 and 2, or random weights."""
    if job.settings.init == "stage2":
        return JointModel(load_encoder(job.encoder), load_head(job.heads))
    encoder = build_encoder(joint_arch(job), stream_key(job.seed, "joint", "encoder"))
    return JointModel(encoder, ClusterHead(encoder.embed_dim, job.num_clusters, stream_key(job.seed, "joint", "head")))


def joint_arch(job: JointJob) -> str:
    """The encoder that stage 3 trains."""
    return job.settings.encoder or str(job.encoder.manifest["arch"])


def publish_skipped(job: JointJob, reason: str) -> None:
    """Publish the result of stages 1 and 2 (SPICE_s) where stage 3 cannot be trained."""
    publish_joint(job, JointModel(load_encoder(job.encoder), load_head(job.heads)), skipped=reason)


def publish_joint(job: JointJob, model: JointModel, skipped: str | None) -> Artifact:
    """Publish a classifier; ``skipped`` says why stage 3 was not trained, None that it was."""

    def write(folder: Path) -> dict[str, Any]:
        save_weights(model, folder / "joint.safetensors")
        arch = joint_arch(job) if skipped is None else job.encoder.manifest["arch"]
        return {"arch": arch, "num_clusters": job.num_clusters, "skipped": skipped}

    return publish(job.root, JOINT, job.fingerprint, write)


class TrainProgress:
    """Ray Train's side of a training loop: checkpoints every so many seconds, and a progress file."""

    def __init__(self, device: torch.device, checkpoint_seconds: float, folder: Path) -> None:
        self._device = device
        self._checkpoint_seconds = checkpoint_seconds
        self._due = time.monotonic() + checkpoint_seconds
        self._writer = ProgressWriter(folder, "train") if collectives.rank() == 0 else None
        self._folder = folder
        self._losses: list[float] = []
        self._pending: list[Tensor] = []

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint that Ray Train knows of."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            state = _read_state(Path(folder) / "state.pt")
        self._losses = state.pop("losses").tolist()
        return state

    def advance(self, step: int, total: int, loss: Tensor, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Show progress; save a checkpoint when one is due, on all workers at the same step."""
        self._pending.append(loss)
        if step % _STEPS_BETWEEN_LOOKS and step != total:
            return
        self._settle(step)
        if self._writer is not None:
            self._writer.write(step, total, self._losses[-1])
        if step == total:
            self._write_losses()
        elif collectives.first_worker_decides(time.monotonic() >= self._due, self._device):
            self._save(step, snapshot())

    def _settle(self, step: int) -> None:
        """Fetch the losses since the last look from the device; all workers hold the same, so all stop together."""
        self._losses += torch.stack(self._pending).tolist()
        self._pending.clear()
        if not math.isfinite(self._losses[-1]):
            raise TrainingError(
                f"the loss of step {step} is not a number; lower the stage's lr, or use precision=fp32, in a new --out"
            )

    def _save(self, step: int, state: dict[str, Any]) -> None:
        if collectives.rank() != 0:
            ray.train.report({"step": step})
        else:
            folder = tempfile.mkdtemp(prefix="spice-checkpoint-")
            torch.save({**state, "losses": torch.tensor(self._losses)}, Path(folder) / "state.pt")
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
            shutil.rmtree(folder, ignore_errors=True)
        self._due = time.monotonic() + self._checkpoint_seconds

    def _write_losses(self) -> None:
        """Leave the loss of every step beside the progress, for whoever looks into a run."""
        if self._writer is not None:
            lines = (f"{number},{value:.9g}" for number, value in enumerate(self._losses, 1))
            (self._folder / "losses.csv").write_text("step,loss\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise StorageError(
            f"the checkpoint {file} is damaged; delete the run's folder checkpoints and run the same command again"
        ) from None
    return state


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Train data-parallel; batch-norm statistics stay each lane's own until the end."""
    return ray.train.torch.prepare_model(module, parallel_strategy_kwargs={"broadcast_buffers": False})


def _work(config: dict[str, Any]) -> str | None:
    """What Ray Train runs on each worker; gives the sentence of an error that a retry would only meet again."""
    job, scale, folder = config["job"], config["scale"], config["progress"]
    torch.set_num_threads(scale.cpus_per_worker)
    device = ray.train.torch.get_device()
    try:
        if not folder.is_dir():
            raise StorageError(f"{folder} is not seen by every node; choose an --out that all nodes mount")
        host = Host(device, wrap_ddp, TrainProgress(device, scale.checkpoint_seconds, folder))
        config["run"](job, host)
    except SpiceError as error:
        return str(error)
    return None


def fit(
    run: Callable[[Any, Host], None], job: PretrainJob | JointJob, scale: Scale, checkpoints: Path, progress: Path
) -> None:
    """Run a training stage on Ray Train until its artifact is published.

    The trainer's name carries the fingerprint, so that the same stage goes on from its last checkpoint and no other
    stage does.

    Raises:
        TrainingError: It failed more often than ``scale.max_failures``.
    """
    name = f"{run.__name__}-{job.fingerprint}"
    resources: dict[str, float] = {"CPU": scale.cpus_per_worker}
    if scale.gpus_per_worker:
        resources["GPU"] = scale.gpus_per_worker
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"run": run, "job": job, "scale": scale, "progress": progress},
        scaling_config=ray.train.ScalingConfig(
            num_workers=scale.workers, use_gpu=scale.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=ray.train.torch.TorchConfig(backend=backend(scale)),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(checkpoints.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        sentence = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise _user_error(error, name) from error
    if sentence is not None:
        shutil.rmtree(checkpoints / name, ignore_errors=True)
        raise TrainingError(sentence)
    shutil.rmtree(checkpoints / name, ignore_errors=True)


def backend(scale: Scale) -> str:
    """What workers talk through: nccl needs a GPU for each of them."""
    return "nccl" if scale.gpus_per_worker >= 1 else "gloo"


def _user_error(error: Exception, name: str) -> TrainingError:
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    first = str(causes[0]).strip().splitlines()[-1] if str(causes[0]).strip() else type(causes[0]).__name__
    return TrainingError(
        f"{name} failed ({first}); run the same command again to go on from the last checkpoint, "
        "with --verbose to see what the workers say"
    )
