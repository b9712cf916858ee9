"""Stage 3: encoder and head are trained together on reliable pseudo-labels and all images (SPICE III-C)."""

import copy
from typing import Any, cast

import torch
from torch import Tensor

from spice_ray.contracts import Batch, Progress, Wrap
from spice_ray.core import collectives
from spice_ray.core.augment import Augmentation
from spice_ray.core.joint import JointModel, consistency_loss, seven_sixteenths_cosine, supervised_loss, update_ema
from spice_ray.core.lanes import Lanes
from spice_ray.core.order import stream_key
from spice_ray.settings import Joint
from spice_ray.stages.accumulation import Parts, exchange
from spice_ray.stages.optimizers import build_optimizer, set_lr


def train_joint(
    settings: Joint,
    model: JointModel,
    labelled: Lanes,
    unlabelled: Lanes,
    augmentation: Augmentation,
    *,
    labels: Tensor,
    weights: Tensor,
    seed: int,
    device: torch.device,
    wrap: Wrap,
    progress: Progress,
    accumulate: int = 1,
) -> JointModel:
    """Train a classifier on reliable pseudo-labels, and on its own confident predictions of all images.

    Args:
        settings: The recipe's stage 3.
        model: Where training starts.
        labelled: The stream of reliable samples, this worker's lanes.
        unlabelled: The stream of all images, this worker's lanes.
        augmentation: Makes weak and strong views.
        labels: Pseudo-labels by sample id, int64, (N,).
        weights: Weights of the labelled samples by sample id, float32, (N,).
        seed: The run's.
        device: Where to compute.
        wrap: Makes a module train data-parallel.
        progress: Where to go on from, and whom to tell.
        accumulate: Parts of whole lanes that each batch is computed in, with the same result; a divisor of the lanes.

    Returns:
        The model with the moving average of the weights, equal on all workers.
    """
    trainer = _FixMatch(settings, model, Parts(labelled.num_lanes, accumulate), augmentation, seed, device, wrap)
    labels, weights = labels.to(device), weights.to(device)
    start = trainer.restore(progress.restore())
    for step in range(start, settings.steps):
        set_lr(trainer.optimizer, settings.lr * seven_sixteenths_cosine(step, settings.steps))
        known = labelled.batch(step)
        ids = known.sample_ids
        loss = trainer.step(known, labels[ids], weights[ids], unlabelled.batch(step))
        progress.advance(step + 1, settings.steps, loss, lambda done=step + 1: trainer.state(done))  # type: ignore[misc]
    collectives.average_buffers(trainer.ema)
    return trainer.ema


class _FixMatch:
    """The model, its moving average and the optimiser of one run of stage 3."""

    def __init__(
        self,
        settings: Joint,
        model: JointModel,
        parts: Parts,
        augmentation: Augmentation,
        seed: int,
        device: torch.device,
        wrap: Wrap,
    ) -> None:
        self.settings, self.parts, self.augmentation = settings, parts, augmentation
        self.bare = model.to(device)
        self.ema = copy.deepcopy(self.bare).requires_grad_(False)
        self.model = wrap(self.bare)
        self.optimizer = build_optimizer(
            settings.optimizer, self.bare, settings.lr, settings.weight_decay, nesterov=True
        )
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        self.keys = {name: stream_key(seed, "joint", name) for name in ("labelled", "weak", "strong")}

    def step(self, known: Batch, labels: Tensor, weights: Tensor, unknown: Batch) -> Tensor:
        """One optimiser step; gives the global batch's mean loss."""
        labelled = self.augmentation.weak(known.images, known.draws, self.keys["labelled"])
        weak = self.augmentation.weak(unknown.images, unknown.draws, self.keys["weak"])
        strong = self.augmentation.strong(unknown.images, unknown.draws, self.keys["strong"])
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.learn(labelled, labels, weights, weak, strong)
        self.optimizer.step()
        update_ema(self.ema, self.bare, self.settings.ema)
        return collectives.mean_over_workers(loss)

    def learn(self, labelled: Tensor, labels: Tensor, weights: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
        """Add the gradient of this worker's rows, part after part; gives their mean loss."""
        split, count = self.parts.split, self.parts.count
        ahead = [None] * count if self.settings.one_pass else self.predict_ahead(split(weak))
        rows = zip(split(labelled), split(labels), split(weights), split(weak), ahead, split(strong), strict=True)
        losses = []
        for part, (known, known_labels, known_weights, weak_view, targets, strong_view) in zip(
            self.parts.turns(self.bare), rows, strict=True
        ):
            with exchange(self.model, self.bare, now=part == count - 1):
                if targets is None:
                    logits, targets, strong_logits = self.predict(known, weak_view, strong_view)
                else:
                    logits, strong_logits = self.predict(known, strong_view)
                loss = supervised_loss(logits, known_labels, known_weights)
                unlabelled_loss = consistency_loss(targets, strong_logits, self.settings.confidence)
                loss = loss + self.settings.unlabelled_weight * unlabelled_loss
                (loss / count).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def predict(self, *views: Tensor) -> list[Tensor]:
        """Logits of batches in one pass; rows stay interleaved over lanes when batches are laid end to end."""
        with self.autocast:
            logits: Tensor = self.model(torch.cat(views))
        return list(logits.split([len(view) for view in views]))

    @torch.no_grad()
    def predict_ahead(self, weak: list[Tensor]) -> list[Tensor]:
        """Logits of the weak views of each part, in passes of their own."""
        with self.autocast:
            return [self.bare(weak[part]) for part in self.parts.turns(self.bare)]

    def state(self, step: int) -> dict[str, Any]:
        """Everything that the steps after ``step`` depend on."""
        return {
            "step": step,
            "model": self.bare.state_dict(),
            "buffers": collectives.stacked_buffers(self.bare),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any] | None) -> int:
        """Go on from ``state``; gives the number of steps already done."""
        if state is None:
            return 0
        self.bare.load_state_dict(state["model"])
        collectives.restore_buffers(self.bare, state["buffers"])
        self.ema.load_state_dict(state["ema"])
        collectives.restore_buffers(self.ema, state["buffers"])  # copies, as after every step
        self.optimizer.load_state_dict(state["optimizer"])
        return cast(int, state["step"])
