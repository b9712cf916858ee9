"""Stage 3: encoder and head are trained together on reliable pseudo-labels and all images (SPICE III-C)."""

import copy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from spice_ray.contracts import Progress, Wrap
from spice_ray.core import collectives
from spice_ray.core.augment import Augmentation, MakeView, view_maker
from spice_ray.core.encoders import compile_encoders
from spice_ray.core.joint import (
    AdaptiveThreshold,
    JointModel,
    agreeing_share,
    consistency_loss,
    prediction_means,
    seven_sixteenths_cosine,
    supervised_loss,
    update_ema,
)
from spice_ray.core.lanes import Lanes
from spice_ray.core.order import stream_key
from spice_ray.core.recorded import Recorded
from spice_ray.settings import Joint
from spice_ray.stages.accumulation import Parts, exchange
from spice_ray.stages.optimizers import build_optimizer, set_lr, step_of
from spice_ray.stages.plateau import Plateau


class TrainedJoint(NamedTuple):
    """What stage 3 gives."""

    model: JointModel
    """With the moving average of the weights."""
    steps: int


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
    compiled: bool = False,
) -> TrainedJoint:
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
        compiled: Whether torch compiles the encoder, and a GPU records steps, or with several workers how views are
            made.

    Returns:
        The model, equal on all workers, and after how many steps.
    """
    trainer = _FixMatch(settings, model, Parts(labelled.num_lanes, accumulate), augmentation, seed, device, wrap)
    if compiled:
        trainer.compile()
    labels, weights = labels.to(device), weights.to(device)
    step, total = trainer.restore(progress.restore()), settings.steps
    # No attribute of the trainer: a cycle would keep a recording alive.
    fit = step_of(trainer.fit, trainer.optimizer, device, may_record=compiled and trainer.is_alone)
    while step < total and not trainer.is_over:
        set_lr(trainer.optimizer, settings.lr * seven_sixteenths_cosine(step, total))
        known = labelled.batch(step)
        ids = known.sample_ids
        unknown = unlabelled.batch(step)
        step += 1
        loss = trainer.take_in(
            step, fit(known.images, known.draws, labels[ids], weights[ids], unknown.images, unknown.draws)
        )
        progress.advance(step, step if trainer.is_over else total, loss, lambda done=step: trainer.state(done))  # type: ignore[misc]
    collectives.average_buffers(trainer.ema)
    return TrainedJoint(trainer.ema, step)


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
        self.settings, self.parts, self.device = settings, parts, device
        self.bare = model.to(device)
        self.ema = copy.deepcopy(self.bare).requires_grad_(False)
        self.model = wrap(self.bare)
        self.optimizer = build_optimizer(
            settings.optimizer, self.bare, settings.lr, settings.weight_decay, nesterov=True
        )
        self.adaptive = None
        if settings.threshold == "adaptive":
            self.adaptive = AdaptiveThreshold(self.bare.head.num_clusters, settings.ema, device)
        self.plateau = None if settings.patience is None else Plateau(settings.patience, device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        makers = {"labelled": augmentation.weak, "weak": augmentation.weak, "strong": augmentation.strong}
        self.make_views: dict[str, MakeView] = {
            name: view_maker(make, stream_key(seed, "joint", name)) for name, make in makers.items()
        }

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to gain."""
        return self.plateau is not None and self.plateau.is_over

    @property
    def is_alone(self) -> bool:
        """Whether this is the only worker, so that a step waits for no other."""
        return self.model is self.bare

    def compile(self) -> None:
        """Have torch compile the encoder, and a GPU record how one of several workers makes views."""
        compile_encoders(self.bare)
        if not self.is_alone:
            self.make_views = {name: Recorded(make, self.device) for name, make in self.make_views.items()}

    def fit(
        self, images: Tensor, draws: Tensor, labels: Tensor, weights: Tensor, all_images: Tensor, all_draws: Tensor
    ) -> Tensor:
        """One optimiser step on labelled images, and on others; gives what ``learn`` gives."""
        labelled = self.make_views["labelled"](images, draws)
        weak, strong = (self.make_views[name](all_images, all_draws) for name in ("weak", "strong"))
        self.optimizer.zero_grad(set_to_none=True)
        figures = self.learn(labelled, labels, weights, weak, strong)
        self.optimizer.step()
        update_ema(self.ema, self.bare, self.settings.ema)
        return figures

    def take_in(self, step: int, figures: Tensor) -> Tensor:
        """Learn from the figures of a step, counted from 1; gives the global batch's mean loss."""
        figures = collectives.mean_over_workers(figures)
        if self.plateau is not None:
            self.plateau.add(step, figures[1])
        if self.adaptive is not None:
            self.adaptive.update(figures[-len(self.adaptive.means) :])
        return figures[0].clone()  # a recorded step puts the next ones into their place

    def learn(self, labelled: Tensor, labels: Tensor, weights: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
        """Add the gradient of this worker's rows, part after part.

        Gives their mean loss, the agreeing share if somebody waits for it to stop growing, and the means that adaptive
        thresholds follow.
        """
        # That of before the step, so that all parts and workers have the same.
        threshold = self.settings.confidence if self.adaptive is None else self.adaptive.levels()
        split, count = self.parts.split, self.parts.count
        ahead = [None] * count if self.settings.one_pass else self.predict_ahead(split(weak))
        rows = zip(split(labelled), split(labels), split(weights), split(weak), ahead, split(strong), strict=True)
        figures = []
        for part, (known, known_labels, known_weights, weak_view, targets, strong_view) in zip(
            self.parts.turns(self.bare), rows, strict=True
        ):
            with exchange(self.model, self.bare, now=part == count - 1):
                if targets is None:
                    logits, targets, strong_logits = self.predict(known, weak_view, strong_view)
                else:
                    logits, strong_logits = self.predict(known, strong_view)
                loss = supervised_loss(logits, known_labels, known_weights)
                unlabelled_loss = consistency_loss(targets, strong_logits, threshold)
                loss = loss + self.settings.unlabelled_weight * unlabelled_loss
                (loss / count).backward()
            told = [loss.detach()[None]]
            if self.plateau is not None:
                # By the fixed threshold: adaptive ones are low at first, and so would take luck for agreement.
                told.append(agreeing_share(targets, strong_logits, self.settings.confidence)[None])
            if self.adaptive is not None:
                told.append(prediction_means(targets))
            figures.append(torch.cat(told))
        return torch.stack(figures).mean(dim=0)

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
            "ema_buffers": collectives.stacked_buffers(self.ema),
            "optimizer": self.optimizer.state_dict(),
            "plateau": None if self.plateau is None else self.plateau.state(),
            "adaptive": None if self.adaptive is None else self.adaptive.means,
        }

    def restore(self, state: dict[str, Any] | None) -> int:
        """Go on from ``state``; gives the number of steps already done."""
        if state is None:
            return 0
        self.bare.load_state_dict(state["model"])
        collectives.restore_buffers(self.bare, state["buffers"])
        self.ema.load_state_dict(state["ema"])
        collectives.restore_buffers(self.ema, state["ema_buffers"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.plateau is not None:
            self.plateau.load(state["plateau"])
        if self.adaptive is not None:
            self.adaptive.means.copy_(state["adaptive"])
        return cast(int, state["step"])
