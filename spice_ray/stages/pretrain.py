"""Stage 1: a feature model is trained by contrastive learning (SPICE III-A, MoCo-v2)."""

from typing import Any, cast

import torch
from torch import Tensor

from spice_ray.contracts import Health, Progress, Wrap
from spice_ray.core import collectives
from spice_ray.core.augment import Augmentation, MakeView, view_maker
from spice_ray.core.encoders import Encoder, compile_encoders
from spice_ray.core.health import measure_health, why_collapsed
from spice_ray.core.lanes import Lanes
from spice_ray.core.moco import cosine
from spice_ray.core.order import stream_key
from spice_ray.core.recorded import Recorded
from spice_ray.errors import TrainingError
from spice_ray.settings import Pretrain
from spice_ray.stages.accumulation import Parts, exchange
from spice_ray.stages.contrast import CONTRASTS, Direction
from spice_ray.stages.optimizers import build_optimizer, set_lr, step_of


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
    accumulate: int = 1,
    compiled: bool = False,
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
        accumulate: Parts of whole lanes that each batch is computed in, with the same result; a divisor of the lanes.
            SimCLR, where every row meets every other, computes whole batches.
        compiled: Whether torch compiles the encoders, and a GPU records steps, or with several workers how views are
            made.

    Returns:
        The query encoder, equal on all workers.

    Raises:
        TrainingError: All images became alike.
    """
    parts = Parts(lanes.num_lanes, 1 if settings.loss == "simclr" else accumulate)
    trainer = _Trainer(settings, parts, augmentation, seed, device, wrap)
    if compiled:
        trainer.compile()
    start = trainer.restore(progress.restore())
    # No attribute of the trainer: a cycle would keep a recording alive.
    fit = step_of(trainer.fit, trainer.optimizer, device, may_record=compiled and trainer.is_alone)
    steps_per_epoch = num_images // settings.batch_size
    total = settings.epochs * steps_per_epoch
    for step in range(start, total):
        share = cosine(step, total, settings.warmup_epochs * steps_per_epoch)
        set_lr(trainer.optimizer, settings.lr * share)
        batch = lanes.batch(step)
        loss = fit(batch.images, batch.draws, *trainer.contrast.of_step(step, total))
        # A recorded step puts the next one into its place.
        loss = collectives.mean_over_workers(loss).clone()
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
        advice = "lower pretrain.lr" + (" or raise pretrain.momentum" if settings.loss != "simclr" else "")
        raise TrainingError(
            f"stage 1 collapsed, in epoch {epoch} of {settings.epochs} {sign}; {advice}, in a new --out"
        )


class _Trainer:
    """The models and the optimiser of one run of stage 1."""

    def __init__(
        self, settings: Pretrain, parts: Parts, augmentation: Augmentation, seed: int, device: torch.device, wrap: Wrap
    ) -> None:
        self.settings, self.parts, self.device = settings, parts, device
        self.make_views: list[MakeView] = [
            view_maker(augmentation.contrastive, stream_key(seed, "pretrain", view)) for view in (0, 1)
        ]
        self.contrast = CONTRASTS[settings.loss](settings, parts, seed, device)
        self.query = self.contrast.query
        self.model = wrap(self.query)
        # MoCo's SGD lets biases and batch-norm weights decay too.
        all_decay = settings.loss == "moco" and settings.optimizer == "sgd"
        self.optimizer = build_optimizer(
            settings.optimizer, self.query, settings.lr, settings.weight_decay, all_decay=all_decay
        )
        self.last: tuple[Tensor, Tensor]
        """Unit rows of the two views of the last step, (b * L, P) each."""
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")

    @property
    def is_alone(self) -> bool:
        """Whether this is the only worker, so that a step waits for no other."""
        return self.model is self.query

    def compile(self) -> None:
        """Have torch compile all encoders, and a GPU record how one of several workers makes views."""
        for model in self.contrast.models:
            compile_encoders(model)
        if not self.is_alone:
            self.make_views = [Recorded(make, self.device) for make in self.make_views]

    def fit(self, images: Tensor, draws: Tensor, *of_step: Tensor) -> Tensor:
        """One optimiser step, by the sum of the directions' losses; gives their mean over this worker's rows."""
        first, second = (make(images, draws) for make in self.make_views)
        with self.autocast:
            directions = self.contrast.directions(first, second, *of_step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = [self.learn(direction, last=direction is directions[-1]) for direction in directions]
        self.optimizer.step()
        self.contrast.conclude()
        return torch.stack(losses).mean()

    def learn(self, direction: Direction, *, last: bool) -> Tensor:
        """Add the gradient of one direction, part after part; gives its mean loss."""
        count = self.parts.count
        views = [self.parts.split(view) for view in direction.views]
        targets = [None] * count if direction.targets is None else self.parts.split(direction.targets)
        losses, projected = list[Tensor](), list[list[Tensor]]()
        for part in self.parts.turns(self.query):
            with exchange(self.model, self.query, now=last and part == count - 1):
                with self.autocast:
                    rows = [self.model(view[part]) for view in views]
                loss = self.contrast.loss(rows, targets[part])
                (loss / count).backward()
            losses.append(loss.detach())
            projected.append([row.detach() for row in rows])
        first, *others = (self.parts.join(list(rows)) for rows in zip(*projected, strict=True))
        self.last = first, others[0] if direction.targets is None else direction.targets
        return torch.stack(losses).mean()

    def health(self) -> Health:
        """Of the last global batch; the same on all workers."""
        queries, keys = (collectives.gather_lanes(rows, self.parts.lanes) for rows in self.last)
        return Health(*measure_health(queries, keys).tolist())

    def state(self, step: int) -> dict[str, Any]:
        """Everything that the steps after ``step`` depend on."""
        return {
            "step": step,
            "query": self.query.state_dict(),
            "query_buffers": collectives.stacked_buffers(self.query),
            "optimizer": self.optimizer.state_dict(),
            **self.contrast.state(),
        }

    def restore(self, state: dict[str, Any] | None) -> int:
        """Go on from ``state``; gives the number of steps already done."""
        if state is None:
            return 0
        self.query.load_state_dict(state["query"])
        collectives.restore_buffers(self.query, state["query_buffers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.contrast.restore(state)
        return cast(int, state["step"])
