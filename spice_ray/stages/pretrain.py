"""Stage 1: a feature model is trained by contrastive learning (SPICE III-A, MoCo-v2)."""

from typing import Any, cast

import torch
from torch import Tensor

from spice_ray.config import Pretrain
from spice_ray.contracts import Batch, Health, Progress, Wrap
from spice_ray.core import collectives
from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import Encoder, build_encoder, set_lanes
from spice_ray.core.health import measure_health, why_collapsed
from spice_ray.core.lanes import Lanes
from spice_ray.core.moco import KeyQueue, ProjectedEncoder, cosine, info_nce, momentum_copy, update_momentum
from spice_ray.core.order import permutation, stream_key
from spice_ray.errors import TrainingError
from spice_ray.stages.optimizers import build_optimizer, set_lr


def pretrain(
    settings: Pretrain,
    lanes: Lanes,
    augmentation: Augmentation,
    *,
    num_images: int,
    seed: int,
    device: torch.device,
    wrap: Wrap,
    progress: Progress,
) -> Encoder:
    """Train an encoder so that two views of an image are told from other images by their projections.

    Args:
        settings: The recipe's stage 1.
        lanes: The stream of images, this worker's lanes.
        augmentation: Makes the two views.
        num_images: N, over all workers: what an epoch is.
        seed: The run's.
        device: Where to compute.
        wrap: Makes a module train data-parallel.
        progress: Where to go on from, and whom to tell.

    Returns:
        The query encoder, equal on all workers.

    Raises:
        TrainingError: All images became alike.
    """
    trainer = _Contrast(settings, lanes.num_lanes, augmentation, seed, device, wrap)
    start = trainer.restore(progress.restore())
    steps_per_epoch = num_images // settings.batch_size
    total = settings.epochs * steps_per_epoch
    for step in range(start, total):
        share = cosine(step, total, settings.warmup_epochs * steps_per_epoch)
        set_lr(trainer.optimizer, settings.lr * share)
        loss = trainer.step(step, lanes.batch(step))
        if (step + 1) % steps_per_epoch == 0:
            _examine((step + 1) // steps_per_epoch, loss, trainer.health(), settings, progress)
        progress.advance(step + 1, total, loss, lambda done=step + 1: trainer.state(done))  # type: ignore[misc]
    collectives.average_buffers(trainer.query)
    return trainer.query.encoder


def _examine(epoch: int, loss: Tensor, health: Health, settings: Pretrain, progress: Progress) -> None:
    """Log the health of an epoch, and stop a run that has collapsed."""
    progress.note_health(epoch, loss, health)
    # A new encoder finds all images alike too.
    sign = why_collapsed(health) if epoch > max(settings.warmup_epochs, settings.epochs / 4) else None
    if sign is not None:
        raise TrainingError(
            f"stage 1 collapsed, in epoch {epoch} of {settings.epochs} {sign}; lower pretrain.lr or raise "
            "pretrain.momentum, in a new --out"
        )


class _Contrast:
    """The query model, its momentum copy, the queue and the optimiser of one run of stage 1."""

    def __init__(
        self, settings: Pretrain, lanes: int, augmentation: Augmentation, seed: int, device: torch.device, wrap: Wrap
    ) -> None:
        self.settings, self.lanes, self.augmentation, self.seed = settings, lanes, augmentation, seed
        encoder = build_encoder(settings.encoder, stream_key(seed, "encoder"))
        query = ProjectedEncoder(encoder, settings.projection_dim, stream_key(seed, "projector"))
        set_lanes(query, lanes)
        self.query = query.to(device)
        self.momentum_encoder = momentum_copy(self.query)
        self.model = wrap(self.query)
        self.optimizer = build_optimizer(settings.optimizer, self.query, settings.lr, settings.weight_decay)
        self.queue = KeyQueue(settings.queue_size, settings.projection_dim, stream_key(seed, "queue"), device)
        self.last: tuple[Tensor, Tensor]
        """Queries and keys of the last step, (b * L, P) each."""
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")

    def step(self, step: int, batch: Batch) -> Tensor:
        """One optimiser step; gives the global batch's mean loss."""
        first = self.augmentation.contrastive(batch.images, batch.draws, stream_key(self.seed, "pretrain", 0))
        second = self.augmentation.contrastive(batch.images, batch.draws, stream_key(self.seed, "pretrain", 1))
        update_momentum(self.momentum_encoder, self.query, self.settings.momentum)
        directions = [(first, second), (second, first)] if self.settings.symmetric else [(first, second)]
        losses, keys = list[Tensor](), list[Tensor]()
        for queries, positives in directions:
            all_keys = self.encode_keys(step, positives)
            own_keys = collectives.own_lanes(all_keys, self.lanes)
            with self.autocast:
                projected = self.model(queries)
            losses.append(info_nce(projected, own_keys, self.queue.keys, self.settings.temperature))
            keys.append(all_keys)
        self.last = projected.detach(), own_keys
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        for all_keys in keys:
            self.queue.push(all_keys)
        return collectives.mean_over_workers(loss.detach())

    def health(self) -> Health:
        """Of the last global batch; the same on all workers."""
        queries, keys = (collectives.gather_lanes(rows, self.lanes) for rows in self.last)
        return Health(*measure_health(queries, keys).tolist())

    @torch.no_grad()
    def encode_keys(self, step: int, views: Tensor) -> Tensor:
        """The keys of the global batch, (B, P), each normalised among other rows than its query (shuffled BN)."""
        gathered = collectives.gather_lanes(views, self.lanes)
        shuffle = torch.from_numpy(permutation(stream_key(self.seed, "shuffle", step), len(gathered)))
        shuffle = shuffle.to(views.device, non_blocking=True)
        with self.autocast:
            shuffled = self.momentum_encoder(collectives.own_lanes(gathered[shuffle], self.lanes))
        keys = collectives.gather_lanes(shuffled, self.lanes)
        return torch.empty_like(keys).index_copy_(0, shuffle, keys)

    def state(self, step: int) -> dict[str, Any]:
        """Everything that the steps after ``step`` depend on."""
        return {
            "step": step,
            "query": self.query.state_dict(),
            "query_buffers": collectives.stacked_buffers(self.query),
            "momentum_encoder": self.momentum_encoder.state_dict(),
            "momentum_buffers": collectives.stacked_buffers(self.momentum_encoder),
            "optimizer": self.optimizer.state_dict(),
            "queue": self.queue.keys,
            "queue_position": self.queue.position,
        }

    def restore(self, state: dict[str, Any] | None) -> int:
        """Go on from ``state``; gives the number of steps already done."""
        if state is None:
            return 0
        self.query.load_state_dict(state["query"])
        collectives.restore_buffers(self.query, state["query_buffers"])
        self.momentum_encoder.load_state_dict(state["momentum_encoder"])
        collectives.restore_buffers(self.momentum_encoder, state["momentum_buffers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.queue.keys.copy_(state["queue"])
        self.queue.position = state["queue_position"]
        return cast(int, state["step"])
