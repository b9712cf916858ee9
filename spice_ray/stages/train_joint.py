"""Stage 3: encoder and head are trained together on reliable pseudo-labels and all images (SPICE III-C)."""

import copy
from typing import Any, cast

import torch
from torch import Tensor

from spice_ray.config import Joint
from spice_ray.contracts import Batch, Progress, Wrap
from spice_ray.core import collectives
from spice_ray.core.augment import Augmentation
from spice_ray.core.encoders import set_lanes
from spice_ray.core.joint import JointModel, consistency_loss, seven_sixteenths_cosine, supervised_loss, update_ema
from spice_ray.core.lanes import Lanes
from spice_ray.core.order import stream_key
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

    Returns:
        The model with the moving average of the weights, equal on all workers.
    """
    trainer = _FixMatch(settings, model, labelled.num_lanes, augmentation, seed, device, wrap)
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
        lanes: int,
        augmentation: Augmentation,
        seed: int,
        device: torch.device,
        wrap: Wrap,
    ) -> None:
        self.settings, self.augmentation = settings, augmentation
        set_lanes(model, lanes)
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
        labelled_logits, weak_logits, strong_logits = self.predict(labelled, weak, strong)
        loss = supervised_loss(labelled_logits, labels, weights)
        unlabelled_loss = consistency_loss(weak_logits, strong_logits, self.settings.confidence)
        loss = loss + self.settings.unlabelled_weight * unlabelled_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        update_ema(self.ema, self.bare, self.settings.ema)
        return collectives.mean_over_workers(loss.detach())

    def predict(self, labelled: Tensor, weak: Tensor, strong: Tensor) -> list[Tensor]:
        """Logits of the three batches; rows stay interleaved over lanes when batches are laid end to end."""
        with self.autocast:
            if self.settings.one_pass:
                logits = self.model(torch.cat([labelled, weak, strong]))
                return list(logits.split([len(labelled), len(weak), len(strong)]))
            with torch.no_grad():
                weak_logits = self.bare(weak)
            logits = self.model(torch.cat([labelled, strong]))
            return [logits[: len(labelled)], weak_logits, logits[len(labelled) :]]

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
